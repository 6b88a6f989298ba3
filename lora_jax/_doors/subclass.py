"""One subclass for each class of a model: the same class to who uses it, with other methods."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from lora_jax._interpret.trace import is_array


class Options(NamedTuple):
    """How the methods of an attached class are adapted; see `lora.adapt`."""

    strict: bool
    plan: str
    save: str | Callable | None
    merge_aware: str | None


def options_of(x: Any) -> Options | None:
    """Those of an attached object; None of any other."""
    return vars(type(x)).get("_lora_options")


def subclass(cls: type, options: Options, body: dict[str, Any], **kwargs: Any) -> type:
    """The subclass of `cls` with these options: one, however often it is asked for.

    JAX and Flax keep each class that they know for ever, so a class for each object would leak,
    and be traced anew. Python keeps the subclasses of a class: no other record is needed.
    """
    own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return known(cls, options) or type(cls)(
        cls.__name__, (cls,), {**own, **body, "_lora_options": options}, **kwargs
    )


def known(cls: type, options: Options) -> type | None:
    found = (c for c in cls.__subclasses__() if vars(c).get("_lora_options") == options)
    return next(found, None)


def plain_class(x: Any) -> type:
    """The class of the model that an attached object was made from."""
    return type(x).__bases__[0]


def reduced(make: Callable[[type, Options], type], x: Any, protocol: Any) -> tuple:
    """How pickle writes an attached object: its class is found by that of the model."""
    _, _, *rest = object.__reduce_ex__(x, protocol)
    return _new, (make, plain_class(x), options_of(x)), *rest


def _new(make: Callable[[type, Options], type], cls: type, options: Options) -> Any:
    return object.__new__(make(cls, options))


def members(cls: type, above: type) -> Iterator[tuple[str, Any]]:
    """(name, method or property) of a class, of those that `above` does not have itself.

    Generators and coroutines run on the attached object, whose methods are adapted.
    """
    found: dict[str, Any] = {}
    for each in reversed(cls.__mro__):
        if each not in above.__mro__:
            found |= vars(each)
    for name, value in found.items():
        special = name.startswith("__") and name != "__call__"
        if special or (name in dir(above) and name != "__call__"):
            continue
        if isinstance(value, property):
            yield name, value
        elif callable(value) and not isinstance(value, type | staticmethod | classmethod):
            own = inspect.unwrap(value)  # within what Flax puts around it
            if not (inspect.isgeneratorfunction(own) or inspect.iscoroutinefunction(own)):
                yield name, value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a method returns: arrays, and anything else, which is a constant of the trace."""

    arrays: list
    constants: tuple = dataclasses.field(metadata=dict(static=True))  # None for an array
    structure: Any = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def of(cls, tree: Any) -> Output:
        leaves, structure = jax.tree.flatten(tree)
        arrays = [x for x in leaves if is_array(x)]
        return cls(arrays, tuple(None if is_array(x) else x for x in leaves), structure)

    def value(self) -> Any:
        arrays = iter(self.arrays)
        leaves = [next(arrays) if x is None else x for x in self.constants]
        return jax.tree.unflatten(self.structure, leaves)
