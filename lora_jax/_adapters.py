"""The trainable tree: what stands in it for each leaf, as pytrees that hold arrays only.

An adapter tree is a nested dict with one of these nodes at the path of each leaf that is trained.
Everything that is not trained (scale, axes, row numbers) is static, so no optimiser can reach it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lora_jax._weight import RANK, AdaptedWeight, Factor, Geometry, spec_along

static = functools.partial(dataclasses.field, metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LoRA:
    """The low-rank update of one leaf (arXiv:2106.09685, section 4.1): scale · A·B.

    Attributes:
      a: (*batch, *in, rank).
      b: (*batch, rank, *out).
      scale: alpha / rank; static, so neither a gradient nor weight decay reaches it.
      geometry: which axes of the leaf are which.
      dropout: rate on the branch's input.
      embedding: whether the leaf is a look-up table.
    """

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
    def shape(self) -> tuple[int, ...]:
        """The shape of the leaf that the update belongs to."""
        size = dict(zip(self.geometry.a_dims, self.a.shape)) | dict(
            zip(self.geometry.b_dims, self.b.shape)
        )
        return tuple(size[d] for d in sorted(size) if d != RANK)

    def weight(self, base: Any, path: str, seed: Factor | None = None) -> AdaptedWeight:
        """`base` with this update beside it; nothing is computed."""
        return AdaptedWeight(
            base,
            Factor(self.a, self.geometry.a_dims),
            Factor(self.b, self.geometry.b_dims),
            seed,
            self.scale,
            self.dropout,
            path,
            tuple((d,) for d in range(len(base.shape))),
        )

    def specs(self, spec: PartitionSpec) -> LoRA:
        """The PartitionSpecs of the arrays, from the leaf's."""
        along = functools.partial(spec_along, spec=spec)
        return dataclasses.replace(
            self, a=along(self.geometry.a_dims), b=along(self.geometry.b_dims)
        )

    def labels(self) -> LoRA:
        kind = "embedding_" if self.embedding else ""
        return dataclasses.replace(self, a=kind + "a", b=kind + "b")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Full:
    """A leaf that is trained in full: `value` takes the place of the base's, cast to its dtype."""

    value: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def specs(self, spec: PartitionSpec) -> Full:
        return Full(spec_along(tuple(range(len(self.shape))), spec))

    def labels(self) -> Full:
        return Full("full")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a table that are trained (new tokens): `value` (n, d) replaces rows `index`."""

    value: jax.Array
    index: tuple[int, ...] = static()
    length: int = static()

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length, *self.value.shape[1:])

    def weight(self, base: Any, path: str, seed: Factor | None = None) -> AdaptedWeight:
        """`base` plus a one-hot (V, n) times the rows' change (n, d): a rank-n update, exactly."""
        del seed
        index = jnp.asarray(self.index)
        one_hot = jnp.zeros((self.length, len(self.index)), self.value.dtype)
        one_hot = one_hot.at[index, jnp.arange(len(self.index))].set(1)
        change = self.value - jax.lax.stop_gradient(base[index]).astype(self.value.dtype)
        return AdaptedWeight(
            base,
            Factor(one_hot, (0, RANK)),
            Factor(change, (RANK, 1)),
            origin=path,
            axes=((0,), (1,)),
        )

    def specs(self, spec: PartitionSpec) -> Rows:
        of_rows = spec_along((RANK, *range(1, len(self.shape))), spec)
        return dataclasses.replace(self, value=of_rows)

    def labels(self) -> Rows:
        return dataclasses.replace(self, value="rows")


NODES = (LoRA, Full, Rows)


def is_node(x: Any) -> bool:
    return isinstance(x, NODES)
