"""The trainable tree: what stands in it for each leaf, as pytrees that hold arrays only.

An adapter tree is a nested dict with one of these nodes at the path of each leaf that is trained.
Everything that is not trained (scale, axes, row numbers) is static, so no optimiser can reach it.
Shapes: W (in, out), A (in, r), B (r, out), all with the same batch axes in front.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax._core import compat
from lora_jax._core.einsum import cast, contract, laid_along, wide
from lora_jax._core.errors import LoRAError
from lora_jax._core.geometry import RANK, Factor, Geometry, static
from lora_jax._core.keys import path_key
from lora_jax._core.numbers import COUNT, COUNT_OR_ZERO
from lora_jax._core.placement import near
from lora_jax._nodes.node import Node
from lora_jax._nodes.weight import AdaptedWeight, own_axes
from lora_jax._quantized.waiting import is_waiting, value

if TYPE_CHECKING:
    import chex


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank(Node):
    """What the nodes with two factors have in common; see `LoRA`."""

    a: jax.Array
    b: jax.Array
    scale: float = static()
    geometry: Geometry = static()  # noqa: RUF009
    dropout: float = static(default=0.0)
    embedding: bool = static(default=False)

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    @property
    def dims(self) -> dict[str, tuple[int, ...]]:
        return {"a": self.geometry.a_dims, "b": self.geometry.b_dims}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spanned()

    def weight(self, base: Any, path: str, key: chex.PRNGKey | None = None) -> AdaptedWeight:
        """`base` with this update beside it; nothing is computed but the masks' key data."""
        # Chosen from a stack under vmap: a product may read the stack itself.
        of_stack = getattr(self, "_of_stack", None)
        if of_stack is not None:
            return of_stack.weight(base, path, key)
        return AdaptedWeight(
            base,
            Factor(self.a, self.geometry.a_dims),
            Factor(self.b, self.geometry.b_dims),
            self._seed(key, path),
            scale=self.scale,
            dropout=self.dropout,
            origin=path,
            axes=own_axes(base),
        )

    def _seed(self, key: jax.Array | None, path: str) -> Factor | None:
        """Key data for each weight of the stack: (*batch, 2)."""
        if key is None or not self.dropout:
            return None
        batch = self.geometry.batch_axes
        # The sizes of the batch axes, which A has in front.
        shape = self.a.shape[: len(batch)]
        # Words and no key: scans, vmap and shard_map take them as they take any array.
        return Factor(jax.random.bits(path_key(key, path), (*shape, 2), "uint32"), (*batch, RANK))

    def labels(self) -> Any:
        kind = "embedding_" if self.embedding else ""
        return dataclasses.replace(self, a=kind + "a", b=kind + "b")

    def empty(self, nodes: Sequence[Any], rank: int | None, base: Any) -> Any:
        """The slot of a stack that changes nothing, with room for these nodes of the same leaf.

        Args:
          nodes: in the widest of their dtypes.
          rank: of the slot; None: the largest of the nodes'.
          base: the leaf; may be None where an update is added to it.
        """
        del base
        room = max(getattr(n, "rank", 0) for n in nodes) if rank is None else rank
        dtype = jnp.result_type(*(x.dtype for n in nodes for x in jax.tree.leaves(n)))
        a, b = (jnp.zeros(s, dtype) for s in self.geometry.factor_shapes(self.shape, room))
        # Static fields are one for the whole stack: each adapter's scale goes into its B.
        return dataclasses.replace(self, a=a, b=b, scale=1.0, dropout=0.0)

    def fitted(self, like: Any) -> Any:
        """The node as the slot `like` has it: padded with zeros to its rank, the scale in B.

        Raises:
          LoRAError: other axes, or a larger rank.
        """
        if (self.geometry, self.embedding) != (like.geometry, like.embedding):
            raise LoRAError(f"expected {like.geometry}, found {self.geometry}")
        if self.rank > like.rank:
            raise LoRAError(f"expected a rank of at most {like.rank}, found {self.rank}")
        more = like.rank - self.rank
        # New columns of A meet new rows of B, both zero: the update is the same.
        pad = lambda x, d: jnp.pad(x, [(0, more if i == d else 0) for i in range(x.ndim)])
        a = pad(self.a, self.a.ndim - 1).astype(like.a.dtype)
        b = pad(self.b, len(self.geometry.batch_axes)).astype(like.b.dtype) * self.scale
        return dataclasses.replace(like, a=a, b=b)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LoRA(LowRank):
    """The low-rank update of one leaf (arXiv:2106.09685, section 4.1): scale · A·B.

    Attributes:
      a: (*batch, *in, rank).
      b: (*batch, rank, *out).
      scale: alpha / rank; static, so neither a gradient nor weight decay reaches it.
      geometry: which axes of the leaf are which.
      dropout: rate on the branch's input.
      embedding: whether the leaf is a look-up table.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> b = jnp.array([[1.0, 0.0, 2.0]])
    >>> node = lora.LoRA(jnp.ones((2, 1)), b, scale=0.5, geometry=lora.Geometry((0,), (1,)))
    >>> node.rank, node.shape
    (1, (2, 3))
    >>> lora.merge({"w": jnp.zeros((2, 3))}, {"w": node})["w"]
    Array([[0.5, 0. , 1. ],
           [0.5, 0. , 1. ]], dtype=float32)
    """

    def with_magnitude(self, magnitude: jax.Array) -> DoRA:
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return DoRA(**own, magnitude=magnitude)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DoRA(LowRank):
    """A leaf by direction and magnitude (arXiv:2402.09353, eq. 5): W' = m · V / ‖V‖ for each output
    unit, with V = W + scale·A·B; no gradient flows through the norm (section 4.3).

    `dora` makes them. The attributes are those of `LoRA`, and

    Attributes:
      magnitude: m, (*batch, *out).

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> node = lora.LoRA(jnp.ones((2, 1)), jnp.zeros((1, 2)), 1.0, lora.Geometry((0,), (1,)))
    >>> node = node.with_magnitude(jnp.array([5.0, 10.0]))
    >>> lora.merge({"w": jnp.array([[3.0, 3.0], [4.0, 4.0]])}, {"w": node})["w"]
    Array([[3., 6.],
           [4., 8.]], dtype=float32)
    """

    magnitude: jax.Array = dataclasses.field(kw_only=True)

    lost: ClassVar[str | None] = "scaled"

    @property
    def dims(self) -> dict[str, tuple[int, ...]]:
        return super().dims | {"magnitude": (*self.geometry.batch_axes, *self.geometry.out_axes)}

    def weight(self, base: Any, path: str, key: chex.PRNGKey | None = None) -> AdaptedWeight:
        """`base` with this update and m / ‖V‖ beside it; only the norms are computed."""
        varying = compat.varying(base) if isinstance(base, jax.core.Tracer) else ()
        if varying:
            raise LoRAError(
                f"'{path}' varies over the mesh axes {', '.join(sorted(varying))}: of a part of it "
                "there is no norm. Adapt the function that calls jax.shard_map, and bind outside: "
                "lora.adapt(jax.shard_map(fn, ...))(lora.bind(params, adapters), x)"
            )
        # W' = V · m / n = V + gain · V: as a difference, in fp32, a small gain is not rounded away.
        m = self.magnitude.astype(wide(self.magnitude.dtype))
        n = norms(jax.lax.stop_gradient(self), jax.lax.stop_gradient(base)).astype(m.dtype)
        # An output unit of V that is zero stays so; the inner `where` spares its gradient 0 / 0.
        gain = jnp.where(n > 0, (m - n) / jnp.where(n > 0, n, 1), 0)
        gain = jnp.expand_dims(gain, len(self.geometry.batch_axes))  # (*batch, 1, *out)
        weight = super().weight(base, path, key)
        return dataclasses.replace(weight, gain=Factor(gain, self.geometry.b_dims))

    def labels(self) -> DoRA:
        return dataclasses.replace(super().labels(), magnitude="magnitude")

    def empty(self, nodes: Sequence[Any], rank: int | None, base: Any) -> DoRA:
        like = super().empty(nodes, rank, base)
        # With m = ‖W‖ the slot changes nothing.
        m = norms(like, base if is_waiting(base) else jnp.asarray(base)).astype(like.a.dtype)
        return dataclasses.replace(like, magnitude=m)

    def fitted(self, like: DoRA) -> DoRA:
        magnitude = self.magnitude.astype(like.b.dtype)
        return dataclasses.replace(super().fitted(like), magnitude=magnitude)


def norms(node: LowRank, base: Any) -> jax.Array:
    """‖W + scale·A·B‖ of each output unit, (*batch, *out), in fp32 or wider.

    From ‖W‖² + 2s·⟨AᵀW, B⟩ + s²·⟨AᵀA·B, B⟩, so the sum is never formed.
    """
    g, base = node.geometry, near(value(base))
    dtype = wide(base.dtype)
    # `other` labels a second rank axis, so that AᵀA has two.
    a, b, w, other = cast(node.a, dtype), cast(node.b, dtype), cast(base, dtype), RANK - 1
    rename = lambda dims: tuple(other if d == RANK else d for d in dims)
    where = compat.explicit_sharding(base)

    def product(
        x: jax.Array, xl: Sequence[int], y: jax.Array, yl: Sequence[int], out: Sequence[int]
    ):  # sharded as the base is along the axes of `out`
        own = laid_along(where, range(base.ndim), out)
        return contract(x, xl, y, yl, out, own, precision=jax.lax.Precision.HIGHEST)

    # (*batch, r, *out); (*batch, r, r); (*batch, r, *out)
    if base.dtype == jnp.bfloat16 and a.dtype == jnp.float32 and where is None:
        dims = g.a_dims, tuple(range(base.ndim)), g.b_dims
        (aw,) = _down_p.bind(*compat.same_vma(a, base), dims=dims)
    else:
        aw = product(a, g.a_dims, w, range(base.ndim), g.b_dims)
    aa = product(a, g.a_dims, a, rename(g.a_dims), (*g.batch_axes, RANK, other))
    aab = product(aa, (*g.batch_axes, RANK, other), b, rename(g.b_dims), g.b_dims)
    # Summed over the rank: (*batch, *out)
    low_rank = jnp.sum(b * (2 * node.scale * aw + node.scale**2 * aab), len(g.batch_axes))
    # Summed over the in axes, its axes are in the leaf's order: to (*batch, *out) as well.
    squares = jnp.sum(w**2, g.in_axes)
    left = sorted((*g.batch_axes, *g.out_axes))
    squares = squares.transpose([left.index(d) for d in (*g.batch_axes, *g.out_axes)])
    # Where the terms cancel, rounding may leave a sum below zero.
    return jnp.sqrt(jnp.maximum(squares + low_rank, 0))


def _down(a: jax.Array, w: jax.Array, *, dims: tuple) -> list[jax.Array]:
    """Aᵀ·W of A in fp32 and W in bf16, by labels of A, W and the result."""
    al, wl, out = dims
    highest = jax.lax.Precision.HIGHEST
    return [contract(a, al, cast(w, a.dtype), wl, out, precision=highest)]


def _down_in_parts(a: jax.Array, w: jax.Array, *, dims: tuple) -> list[jax.Array]:
    """The same to the last bit of A, without a copy of W in fp32: A is a sum of three in bf16,
    whose products with W are exact in fp32."""
    al, wl, out = dims
    parts = []
    for _ in range(3):  # 24 bits of 8 each; XLA may drop a cast there and back, but not this
        parts.append(jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7))
        a = a - parts[-1]
    three = jax.lax.concatenate([cast(p, w.dtype) for p in parts], al.index(RANK))
    aw = contract(three, al, w, wl, out, preferred_element_type=a.dtype)
    rank = a.shape[al.index(RANK)]
    return [functools.reduce(jax.lax.add, jax.lax.split(aw, [rank] * 3, out.index(RANK)))]


# A CPU has no product of bf16 with a result in fp32 for some layouts.
_down_p = compat.primitive(
    "down_exactly", _down, cuda=_down_in_parts, rocm=_down_in_parts, tpu=_down_in_parts
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Full(Node):
    """A leaf that is trained in full: `value` takes the place of the base's, cast to its dtype.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> lora.bind({"bias": jnp.zeros(2)}, {"bias": lora.Full(jnp.ones(2))})
    {'bias': Array([1., 1.], dtype=float32)}
    """

    value: jax.Array

    lost: ClassVar[str | None] = "trained in full"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dims(self) -> dict[str, tuple[int, ...]]:
        return {"value": tuple(range(len(self.shape)))}

    def weight(self, base: Any, path: str, key: chex.PRNGKey | None = None) -> jax.Array:
        del path, key
        return self.value.astype(base.dtype)

    def labels(self) -> Full:
        return dataclasses.replace(self, value="full")

    def empty(self, nodes: Sequence[Any], rank: int | None, base: Any) -> Full:
        del nodes, rank
        return Full(jnp.asarray(near(value(base))).astype(self.value.dtype))

    def fitted(self, like: Full) -> Full:
        return Full(self.value.astype(like.value.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rows(Node):
    """Rows of a table that are trained (new tokens): `value` (n, d) replaces rows `index`.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> node = lora.Rows(jnp.ones((1, 2)), index=(2,), length=3)
    >>> lora.merge({"table": jnp.zeros((3, 2))}, {"table": node})["table"]
    Array([[0., 0.],
           [0., 0.],
           [1., 1.]], dtype=float32)
    """

    value: jax.Array
    index: tuple[int, ...] = static()
    length: int = static()

    lost: ClassVar[str | None] = "trained in full"

    def __post_init__(self):
        super().__post_init__()
        rows = self.index if isinstance(self.index, tuple) else ()
        known = COUNT.fits(self.length) and all(map(COUNT_OR_ZERO.fits, rows))
        if not (rows and known and max(rows) < self.length and len({*rows}) == len(rows)):
            raise LoRAError(
                f"index={self.index!r}, length={self.length!r} of a Rows: expected a tuple of "
                "different rows, each below the number of rows of the table"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length, *self.value.shape[1:])

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        found = self.value.shape[:1]
        if found != (len(self.index),):
            return f"there are {len(self.index)} rows, and value has {found or 'none'}"
        return super().misfit(shape)

    @property
    def dims(self) -> dict[str, tuple[int, ...]]:
        # The number of trained rows is the rank of the update, and no axis of the leaf.
        return {"value": (RANK, *range(1, len(self.shape)))}

    def weight(self, base: Any, path: str, key: chex.PRNGKey | None = None) -> AdaptedWeight:
        """`base` plus a one-hot (V, n) times the rows' change (n, d), an update of rank n; where
        rows are looked up, `value` itself."""
        del key
        index = jnp.asarray(self.index)
        one_hot = jnp.zeros((self.length, len(self.index)), self.value.dtype)
        one_hot = one_hot.at[index, jnp.arange(len(self.index))].set(1)
        rows = base.at_rows(index) if is_waiting(base) else rows_of(base, index)
        # W + one_hot·(value − W[index]): these rows are `value`, all others W.
        change = self.value - jax.lax.stop_gradient(rows).astype(self.value.dtype)
        return AdaptedWeight(
            base,
            Factor(one_hot, (0, RANK)),
            Factor(change, (RANK, 1)),
            rows=Factor(self.value, (RANK, 1)),
            origin=path,
            axes=((0,), (1,)),
        )

    def merged(self, base: Any, sign: float = 1.0) -> jax.Array:
        del sign
        base, index = value(base), jnp.asarray(self.index)
        new, where = self.value.astype(base.dtype), compat.explicit_sharding(base)
        # Set and not added, as a sum with W would round.
        return base.at[index].set(new, out_sharding=where)

    def labels(self) -> Rows:
        return dataclasses.replace(self, value="rows")

    def empty(self, nodes: Sequence[Any], rank: int | None, base: Any) -> Rows:
        del nodes, rank
        rows = rows_of(jnp.asarray(near(value(base))), jnp.asarray(self.index))
        return dataclasses.replace(self, value=rows.astype(self.value.dtype))

    def fitted(self, like: Rows) -> Rows:
        if self.index != like.index:
            raise LoRAError(f"expected the rows {like.index}, found {self.index}")
        return dataclasses.replace(self, value=self.value.astype(like.value.dtype))


def rows_of(table: jax.Array, index: jax.Array, mode: str | None = None) -> jax.Array:
    """Rows, split as the table's columns are where that is part of types."""
    where = compat.explicit_sharding(table)
    table, axes = jnp.asarray(table), range(table.ndim)
    own = laid_along(where, axes, ((RANK,) * index.ndim + (*axes[1:],)))
    return table.at[index].get(mode=mode, out_sharding=own)
