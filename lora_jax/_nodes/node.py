"""The protocol: what stands in an adapter tree at the path of a trained leaf."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import serialization
from jax.sharding import PartitionSpec

from lora_jax._core.errors import LoRAError
from lora_jax._core.geometry import RANK, Geometry, spec_along
from lora_jax._core.nnx import state_of
from lora_jax._core.numbers import BELOW_ONE, COUNT_OR_ZERO, FINITE
from lora_jax._core.paths import flatten
from lora_jax._nodes.weight import is_weight
from lora_jax._quantized.waiting import check_codes

if TYPE_CHECKING:
    import chex


class Node:
    """What stands at the path of a trained leaf. Its arrays are trained; all else is static.

    A method is one class: a frozen dataclass, registered by `jax.tree_util.register_dataclass`,
    with `shape` and, in most cases, `factors` alone. `bind`, `merge`, `lora.checkpoint`,
    `lora.optim` and `lora.parallel` ask the node; nothing is registered with them.

    Attributes:
      shape: of the leaf that it belongs to, a static field or a property.
      dims: for each array the axis of the leaf that each of its axes runs along; -1 (RANK) for the
        rank, None for an axis of its own. An array that is not named is replicated by `specs`.
      lost: how merging replaces the base's values; None where it adds to them, so that `unmerge`
        can take the update out again.

    >>> import dataclasses, jax, jax.numpy as jnp, lora_jax as lora
    >>> @jax.tree_util.register_dataclass
    ... @dataclasses.dataclass(frozen=True)
    ... class Column(lora.methods.Node):  # u (in,) adds the same to each column of W (in, out)
    ...     u: jax.Array
    ...     shape: tuple = dataclasses.field(metadata=dict(static=True))
    ...     def factors(self, frozen=None):
    ...         ones = jnp.ones((1, self.shape[1]))
    ...         return lora.LoRA(self.u[:, None], ones, 1.0, lora.Geometry((0,), (1,)))
    >>> adapters = {"w": Column(jnp.array([1.0, 2.0]), (2, 3))}
    >>> lora.merge({"w": jnp.zeros((2, 3))}, adapters)["w"]
    Array([[1., 1., 1.],
           [2., 2., 2.]], dtype=float32)
    """

    lost: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any):
        # So that flax.serialization, and what stands on it, writes any node: its arrays, by name.
        super().__init_subclass__(**kwargs)
        # True replaces an earlier entry, for a class that a notebook defines again.
        serialization.register_serialization_state(cls, _state_dict, _from_state_dict, True)

    def __post_init__(self):
        # `jax.tree` makes nodes as well, with anything in the place of arrays, but not of these.
        for name, (holds, expected) in _STATIC.items():
            if name in self.__dict__ and not holds(found := self.__dict__[name]):
                raise LoRAError(f"{name}={found!r} of a {type(self).__name__}: expected {expected}")

    @property
    def of_arrays(self) -> bool:
        """Whether it is not what `jax.tree.map` made of a node: types, names, None."""
        are = lambda xs: all(hasattr(x, "shape") for x in xs)
        leaves = jax.tree.leaves(self)
        # Those that have axes of the leaf are arrays; a field may hold several others. Only with
        # arrays does a node know its axes.
        return bool(leaves) and are(leaves) and are(getattr(self, name) for name in self.dims)

    if TYPE_CHECKING:  # else no subclass could have it as a field

        @property
        def shape(self) -> tuple[int, ...]: ...

    @property
    def dims(self) -> Mapping[str, tuple[Any, ...]]:
        return {}

    def factors(self, frozen: Any = None) -> Any:
        """The node with the same update that `bind` understands; itself, where it is one.

        Args:
          frozen: what the method keeps frozen: the node at this path of the tree that `factors` was
            given, or that tree itself if there are no nodes in it.

        Raises:
          LoRAError: `frozen` is not what the method needs; the message has no path.
        """
        del frozen
        return self

    def weight(self, base: Any, path: str, key: chex.PRNGKey | None = None) -> Any:
        """What `bind` puts there: an `AdaptedWeight`, or an array in the base's place, of its
        dtype.

        Args:
          base: the leaf, an array or a `Quantized`.
          path: of the leaf.
          key: draws the dropout masks of this call; None: no dropout.
        """
        plain = self.factors()
        if plain is self:
            raise NotImplementedError(f"{type(self).__name__} needs `factors` or `weight`")
        return plain.weight(base, path, key)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why it does not belong to a leaf of this shape, or None."""
        geometry = getattr(self, "geometry", None)
        if geometry is not None and not geometry.covers(len(shape)):
            return f"the leaf has shape {shape}, the adapter was made for {self.shape}, {geometry}"
        size: dict[Any, Any] = dict(enumerate(shape))
        # The leaf's sizes by axis, and the rank's by the first array that has it.
        for name, dims in self.dims.items():
            found = tuple(getattr(self, name).shape)
            for d, n in zip(dims, found):
                if d == RANK:
                    size.setdefault(RANK, n)  # the first says what the rank is
            # An axis of its own may have any size; one that the array lacks is said to be "any".
            own = (*found, *("any",) * (len(dims) - len(found)))
            want = tuple(size.get(d, n) for d, n in zip(dims, own))
            if want != found:
                return f"the leaf has shape {shape}; expected {name} of {want}, found {found}"
        if tuple(self.shape) != shape:
            return f"the leaf has shape {shape}, the adapter was made for {self.shape}"
        return None

    @property
    def more_axes(self) -> int | None:
        """How many axes each array has beyond `dims`: 1 in a stack; None if they differ."""
        more = {len(jnp.shape(getattr(self, n))) - len(dims) for n, dims in self.dims.items()}
        return more.pop() if len(more) == 1 else None

    def merged(self, base: Any, sign: float = 1.0) -> jax.Array:
        """The plain array that the leaf becomes; with sign −1 the update is subtracted."""
        weight = self.weight(base, "")
        if not is_weight(weight):
            return weight.astype(base.dtype)
        # A·B alone changes its sign, by the constant in front of it.
        return dataclasses.replace(weight, scale=sign * weight.scale).materialise()

    def specs(self, spec: PartitionSpec) -> Any:
        """The PartitionSpecs of the arrays, from the leaf's."""
        return self._each(lambda name: spec_along(self.dims.get(name, ()), spec))

    def labels(self) -> Any:
        """The label of each array, for `optax.partition`."""
        return self._each(lambda name: f"{type(self).__name__.lower()}_{name}")

    def spanned(self) -> tuple[int, ...]:
        """The shape of a leaf each axis of which some array runs along."""
        size: dict[Any, int] = {}
        for name, dims in self.dims.items():
            size |= dict(zip(dims, getattr(self, name).shape))
        # In the order of their labels, which are the leaf's axes 0, 1, …
        return tuple(size[d] for d in sorted(size.keys() - {RANK, None}))

    def _each(self, fn: Callable[[str], Any]) -> Any:
        """The node with fn(name) in the place of each array."""
        node: Any = self
        # A field may hold several arrays.
        each = lambda name: jax.tree.map(lambda _: fn(name), getattr(node, name))
        return dataclasses.replace(node, **{name: each(name) for name in array_names(node)})


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple | list) and all(map(COUNT_OR_ZERO.fits, x))


# The static fields that any node may have: (whether it holds, what is expected). First what there
# is in nearly all nodes: `jax.tree` makes many.
_STATIC: dict[str, tuple[Callable[[Any], bool], str]] = {
    "scale": (lambda x: (type(x) is float and abs(x) < math.inf) or FINITE.fits(x), FINITE.text),
    "dropout": (lambda x: (type(x) is float and x == 0) or BELOW_ONE.fits(x), BELOW_ONE.text),
    "geometry": (
        lambda x: isinstance(x, Geometry) and x.of_integers,
        "axes, such as lora.Geometry((0,), (1,))",
    ),
    "shape": (_is_shape, "the leaf's shape"),
}


def array_names(node: Any) -> list[str]:
    """The fields that are trained, of a node or its class."""
    return [f.name for f in dataclasses.fields(node) if not f.metadata.get("static")]


def _state_dict(node: Any) -> dict[str, Any]:
    return {name: serialization.to_state_dict(getattr(node, name)) for name in array_names(node)}


def _from_state_dict(node: Any, state: Mapping[str, Any]) -> Any:
    """The node with other arrays: all that is static is its own."""
    names = array_names(node)
    if {*names} != {*state}:
        raise LoRAError(
            f"expected the arrays of a {type(node).__name__}, {', '.join(names)}; found "
            f"{', '.join(map(str, state)) or 'none'}: flax.serialization.from_bytes(adapters, "
            "data), with adapters as those that were written"
        )
    # Flax restores values of any shape: shapes are compared below.
    restore = serialization.from_state_dict
    new: dict[str, Any] = {name: restore(getattr(node, name), state[name], name) for name in names}
    for name, x in new.items():
        if jax.tree.map(jnp.shape, x) != jax.tree.map(jnp.shape, getattr(node, name)):
            raise LoRAError(
                f"{name} of a {type(node).__name__}: expected shape "
                f"{jnp.shape(getattr(node, name))}, found {jnp.shape(x)}: another rank or leaf"
            )
    return dataclasses.replace(node, **new)


def is_node(x: Any) -> bool:
    return isinstance(x, Node)


NO_REF = (
    "it is a jax.Ref, and only arrays are adapted: pass what it holds, ref[...]; of an NNX module, "
    "nnx.with_vars(model, ref=False)"
)


def leaves_of(params: Any, call: str) -> dict[str, Any]:
    """{path: leaf} of parameters; of a module, those of its state.

    Raises:
      LoRAError: there are no arrays, or they are adapters, with the corrected call; quantised
        leaves that were damaged.
    """
    leaves = flatten(state_of(params), is_leaf=lambda x: is_weight(x) or is_node(x))
    if any(map(is_node, leaves.values())):
        raise LoRAError(f"expected parameters, found adapters: {call}")
    check_codes(leaves)  # before anything asks for their shapes
    if not any(hasattr(x, "shape") for x in leaves.values()):
        found, cure = f"{type(params).__name__} without arrays", call
        if isinstance(params, nn.Module):
            found, cure = "a Linen module", f"params = model.init(key, x)['params'], then {call}"
        raise LoRAError(f"expected parameters, found {found}: {cure}")
    return leaves
