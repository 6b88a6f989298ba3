"""Linen: a module whose `apply`, methods and `bind` understand bound parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any

import flax.linen as nn
import jax

from lora_jax._adapt import Adapted
from lora_jax._doors.subclass import (
    Options,
    Output,
    members,
    options_of,
    plain_class,
    reduced,
    subclass,
)
from lora_jax._nodes.weight import is_weight

CALL = "lora.attach(module"


def attached(module: nn.Module, options: Options) -> Any:
    new = module.clone()
    object.__setattr__(new, "__class__", attached_class(type(module), options))
    return new


def detached(module: nn.Module) -> Any:
    new = module.clone()
    object.__setattr__(new, "__class__", plain_class(module))
    return new


def attached_class(cls: type, options: Options) -> type:
    body: dict[str, Any] = {
        name: _method(name, method)
        for name, method in members(cls, nn.Module)
        if not isinstance(method, property) and name != "setup"
    }
    body |= {name: _attaching(cls, name, options) for name in ("__post_init__", "setup")}
    body |= {"apply": _apply(options), "__hash__": cls.__hash__, "__eq__": cls.__eq__}
    body["__reduce_ex__"] = functools.partialmethod(_reduced)
    return subclass(cls, options, body)


def _reduced(self: Any, protocol: Any) -> tuple:
    return reduced(attached_class, self, protocol)


def _holds_weights(tree: Any) -> bool:
    return any(map(is_weight, jax.tree.leaves(tree, is_leaf=is_weight)))


def _plain_apply(module: Any, variables: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    return plain_class(module).apply(module, variables, *args, **kwargs)


def _run(module: Any, variables: Any, args: tuple, kwargs: dict[str, Any]) -> Output:
    return Output.of(_plain_apply(module, variables, args, kwargs))


_run.__name__ = "apply"  # as an error calls it


def _apply(options: Options) -> Any:
    whole, part = (Adapted(_run, *options, part=p, made=CALL) for p in (False, True))

    @nn.nowrap
    @functools.wraps(nn.Module.apply, updated=())
    def apply(self: Any, variables: Any, *args: Any, **kwargs: Any) -> Any:
        if not _holds_weights(variables):
            return _plain_apply(self, variables, args, kwargs)
        method = kwargs.get("method")
        name = method.name if isinstance(method, _Counted) else method
        call = whole if name in (None, "__call__") else part
        try:
            hash(self)
        except TypeError:  # no constant of the trace: each call is traced anew
            fn = functools.wraps(_run)(functools.partial(_run, self))
            call = Adapted(fn, *options, part=call.part, made=CALL)
            return call((variables, args, kwargs), {}).value()
        return call((self, variables, args, kwargs), {}).value()

    return apply


def _attaching(cls: type, name: str, options: Options) -> Any:
    """The methods of Flax's that give a bound module its children; they are attached as it is."""

    @nn.nowrap
    def adapted(self: Any) -> None:
        getattr(cls, name)(self)
        if self.scope is not None and _holds_weights(self.scope.variables()):
            _attach_children(self, options)

    return adapted


def _attach_children(module: Any, options: Options) -> None:
    fields = [value for name, value in vars(module).items() if not name.startswith("_")]
    for child in jax.tree.leaves(fields, is_leaf=lambda x: isinstance(x, nn.Module)):
        # A child that is not bound, of a class with its own `parent`, or met before.
        if isinstance(child, nn.Module) and options_of(child) is None:
            object.__setattr__(child, "__class__", attached_class(type(child), options))
            _attach_children(child, options)


def _method(name: str, method: Any) -> Any:
    @nn.nowrap
    @functools.wraps(method, updated=())
    def adapted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.scope is None or not _holds_weights(self.scope.variables()):
            return method.__get__(self)(*args, **kwargs)
        return _bound(self, name, args, kwargs)

    return adapted


def _bound(module: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A method of a module that `bind` returned, or of a child of it: what it changes of the
    variables, and how many random numbers it draws, is written back."""
    scope = module.scope
    unbound, variables = module.unbind()
    method = _Counted(name, _counts(scope.rng_counters))
    # The streams as they are: those of a child begin with its name.
    how = dict(rngs=dict(scope.rngs), mutable=scope.mutable, method=method)
    out = unbound.apply(variables, *args, **how, **kwargs)
    (out, counts), changed = (out, {}) if scope.mutable is False else out
    _set_counts(scope.rng_counters, counts)
    for collection, values in changed.items():
        for key, value in values.items():
            scope.put_variable(collection, key, value)
    return out


@dataclasses.dataclass(frozen=True)
class _Counted:
    """A method that goes on where the random numbers of a bound module are: their counts, of its
    own streams and of its children's, are constants of the trace."""

    name: str
    counts: tuple

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, tuple]:
        _set_counts(module.scope.rng_counters, self.counts)
        out = getattr(module, self.name)(*args, **kwargs)
        return out, _counts(module.scope.rng_counters)


def _counts(counters: dict) -> tuple[tuple[Hashable, Any], ...]:
    return tuple((k, _counts(n) if isinstance(n, dict) else n) for k, n in counters.items())


def _set_counts(counters: dict, counts: tuple) -> None:
    """In place: each child holds its own part of them."""
    for key, n in counts:
        if isinstance(n, tuple):
            _set_counts(counters.setdefault(key, {}), n)
        else:
            counters[key] = n
