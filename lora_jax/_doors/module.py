"""NNX: a module that holds its adapters, and whose methods are adapted.

Each module of the model with an adapted leaf below it becomes one of an attached class, so that a
part that is called by itself is adapted as well. The adapter of a leaf lies beside it: that of
`kernel` is `kernel_lora_a` and `kernel_lora_b`. A method runs on a copy of the plain classes that
shares every variable.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from lora_jax._adapt import Adapted
from lora_jax._bind import bind
from lora_jax._core.errors import LoRAError
from lora_jax._core.nnx import holds_arrays, modules, owned, places, shared_copy
from lora_jax._core.paths import nest
from lora_jax._doors.subclass import (
    Options,
    Output,
    members,
    options_of,
    plain_class,
    reduced,
    subclass,
)
from lora_jax._nodes.node import Node

SLOTS, MASKS = "lora_slots", "lora_masks"  # the attributes of an attached module
CALL = "lora.attach(model, adapters"


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """Where a module holds the adapter of one of its own leaves; static, in the graph definition.

    Attributes:
      leaf: the path of the variable or array below the module; see `owned`.
      inner: the path below that variable; "" where its value is the leaf.
      node: the adapter, with the names of the module's attributes in the place of its arrays.
    """

    leaf: str
    inner: str
    node: Node

    @property
    def names(self) -> list[str]:
        return jax.tree.leaves(self.node)

    def _key(self) -> tuple:
        return self.leaf, self.inner, tuple(self.names), jax.tree.structure(self.node)

    def __eq__(self, other: object):
        return isinstance(other, Slot) and self._key() == other._key()

    def __hash__(self):
        return hash(self._key())


class Masks(nnx.Module):
    """Draws the keys of the adapters' dropout; `eval()` and `train()` of the model switch it."""

    def __init__(self, rngs: nnx.Rngs | None):
        self.rngs, self.deterministic = rngs, False

    def key(self) -> jax.Array | None:
        if self.deterministic:
            return None
        if self.rngs is None:
            raise LoRAError(
                "the adapters have dropout, and the attached model has no random numbers for it: "
                "lora.attach(model, adapters, rngs=nnx.Rngs(0)), or adapted.eval() for none"
            )
        return self.rngs.dropout()


def attached(
    model: nnx.Module, nodes: Mapping[str, Node], rngs: nnx.Rngs | None, options: Options
) -> Any:
    """The model with the adapters {path: node}, which were checked against it."""
    new = shared_copy(model)
    at = places(new)
    trained = {path: [nnx.LoRAParam(x) for x in jax.tree.leaves(n)] for path, n in nodes.items()}
    for module in modules(new):
        slots = []
        for leaf, x in owned(module).items():
            for path, node in nodes.items():
                if (path + "/").startswith(at.get(id(x), path + "!") + "/"):
                    inner = path.removeprefix(at[id(x)]).removeprefix("/")
                    slots.append(Slot(leaf, inner, _named(node, leaf, inner)))
                    for name, variable in zip(slots[-1].names, trained[path]):
                        setattr(module, name, variable)
        if slots:
            setattr(module, SLOTS, tuple(slots))
    drops = any(getattr(node, "dropout", 0) for node in nodes.values())
    masks = Masks(rngs) if drops else None
    for module in reversed(modules(new)):
        if any(hasattr(below, SLOTS) for below in modules(module)):
            if masks is not None:
                setattr(module, MASKS, masks)
            object.__setattr__(module, "__class__", attached_class(type(module), options))
    return new


def _named(node: Node, leaf: str, inner: str) -> Any:
    """The node with attribute names for arrays, such as kernel_lora_a."""
    own = "_".join(p for p in (*leaf.split("/"), *inner.split("/")) if p)
    path = lambda keys: "_".join(str(getattr(k, "name", getattr(k, "key", k))) for k in keys)
    return jax.tree_util.tree_map_with_path(lambda keys, _: f"{own}_lora_{path(keys)}", node)


def detached(module: Any) -> tuple[Any, dict[str, Node]]:
    """(a module of the plain classes that shares the variables, {path: node})."""
    plain = shared_copy(module)
    found = []
    for x in modules(plain):
        if options_of(x) is None:
            continue
        own, slots = owned(x), vars(x).get(SLOTS, ())
        for slot in slots:
            value_of = {name: getattr(x, name).get_raw_value() for name in slot.names}
            found.append((own.get(slot.leaf), slot.inner, jax.tree.map(value_of.get, slot.node)))
        object.__setattr__(x, "__class__", plain_class(x))
        for name in [*(n for s in slots for n in s.names), SLOTS, MASKS]:
            if name in vars(x):
                delattr(x, name)
    at = places(plain)
    # A leaf of two modules has its adapter in both.
    return plain, {
        "/".join(filter(None, (at[id(leaf)], inner))): node
        for leaf, inner, node in found
        if id(leaf) in at
    }


# ---------------------------------------------------------------- classes
def attached_class(cls: type, options: Options) -> type:
    body: dict[str, Any] = {}
    for name, member in members(cls, nnx.Module):
        body[name] = (_property if isinstance(member, property) else _method)(name, member, options)
    body["__reduce_ex__"] = functools.partialmethod(_reduced)
    return subclass(cls, options, body, pytree=getattr(cls, "_pytree__is_pytree", True))


def _reduced(self: Any, protocol: Any) -> tuple:
    return reduced(attached_class, self, protocol)


def _method(name: str, method: Any, options: Options) -> Any:
    def run(module: Any, *args: Any, **kwargs: Any) -> Output:
        return Output.of(getattr(module, name)(*args, **kwargs))

    call = _adapted(run, name, options)

    @functools.wraps(method, updated=())
    def adapted(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _call(call, self, args, kwargs)

    return adapted


def _property(name: str, member: property, options: Options) -> property:
    """Adapted, if it is computed: what holds no arrays, and parts of the model, are as they are."""
    call = _adapted(lambda module: Output.of(getattr(module, name)), name, options)

    def get(self: Any) -> Any:
        value = member.__get__(self)
        return _call(call, self, (), {}) if holds_arrays(value) else value

    return property(get, member.fset, member.fdel, member.__doc__)


def _adapted(run: Any, name: str, options: Options) -> Adapted:
    run.__name__ = name
    return Adapted(run, *options, part=name != "__call__", made=CALL)


def _call(call: Adapted, module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    plain, nodes = detached(module)
    masks = vars(module).get(MASKS)
    bound = bind(plain, nest(nodes), dropout_key=None if masks is None else masks.key())
    return call((bound, *args), kwargs).value()
