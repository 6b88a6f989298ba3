"""Adapters whose trained arrays are not yet factors: VeRA, LoRA-XS, AdaLoRA.

Each holds what is trained and nothing else, so that optimisers, weight decay and checkpoints see
nothing else; `factors` makes plain `LoRA` nodes of them, by a pure function for each.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lora_jax._core.geometry import RANK, Geometry, spec_along, static


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Indirect:
    """What these nodes have in common: all that is static of the `LoRA` that they stand for.

    Attributes:
      geometry: which axes of the leaf are which.
      scale: the constant before the update.
      dropout: rate on the branch's input.
      embedding: whether the leaf is a look-up table.
    """

    geometry: Geometry = static()  # noqa: RUF009
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)
    embedding: bool = static(default=False)

    @property
    def dims(self) -> dict[str, tuple[int, ...]]:
        """For each axis of each array the axis of the leaf that it runs along, or RANK."""
        raise NotImplementedError

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shapes of the arrays for a leaf of this shape."""
        size = dict(enumerate(shape)) | {RANK: self.rank}
        return {name: tuple(size[d] for d in dims) for name, dims in self.dims.items()}

    def specs(self, spec: PartitionSpec) -> Any:
        """The PartitionSpecs of the arrays, from the leaf's."""
        along = {name: spec_along(dims, spec) for name, dims in self.dims.items()}
        return dataclasses.replace(self, **along)

    def labels(self) -> Any:
        kind = type(self).__name__.lower()
        return dataclasses.replace(self, **{name: f"{kind}_{name}" for name in self.dims})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class VeRA(Indirect):
    """Two vectors of one leaf, between random matrices that all leaves share (arXiv:2310.11454,
    eq. 2). Of a kernel (in, out): scale · A · diag(d) · B · diag(b); see `init_vera`.

    Attributes:
      d: (*batch, rank).
      b: (*batch, *out).
      shape: of the leaf.
    """

    d: jax.Array
    b: jax.Array
    shape: tuple[int, ...] = static(kw_only=True)

    @property
    def rank(self) -> int:
        return self.d.shape[-1]

    @property
    def dims(self) -> dict[str, tuple[int, ...]]:
        g = self.geometry
        return {"d": (*g.batch_axes, RANK), "b": (*g.batch_axes, *g.out_axes)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LoRAXS(Indirect):
    """A square matrix between the leaf's largest singular vectors (arXiv:2405.17604). Of a kernel
    (in, out): scale · A · R · B, A = U·Σ and B = Vᵀ; see `init_lora_xs`.

    Attributes:
      r: R, (*batch, rank, rank).
      shape: of the leaf.
    """

    r: jax.Array
    shape: tuple[int, ...] = static(kw_only=True)

    @property
    def rank(self) -> int:
        return self.r.shape[-1]

    @property
    def dims(self) -> dict[str, tuple[int, ...]]:
        return {"r": (*self.geometry.batch_axes, RANK, RANK)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AdaLoRA(Indirect):
    """An update in the form of a singular value decomposition (arXiv:2303.10512, eq. 3): scale ·
    P·Λ·Q, of which `adalora` prunes singular values; see `init_adalora`.

    Attributes:
      p: P, (*batch, *in, rank).
      lam: the diagonal of Λ, (*batch, rank).
      q: Q, (*batch, rank, *out).
    """

    p: jax.Array
    lam: jax.Array
    q: jax.Array

    @property
    def rank(self) -> int:
        return self.p.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the leaf that the update belongs to."""
        size = {}
        for name in ("p", "q"):
            size |= dict(zip(self.dims[name], getattr(self, name).shape))
        return tuple(size[d] for d in sorted(size) if d != RANK)

    @property
    def dims(self) -> dict[str, tuple[int, ...]]:
        g = self.geometry
        return {"p": g.a_dims, "lam": (*g.batch_axes, RANK), "q": g.b_dims}


FAMILY = (VeRA, LoRAXS, AdaLoRA)


LABELS = tuple(
    f"{cls.__name__.lower()}_{field.name}"
    for cls in FAMILY
    for field in dataclasses.fields(cls)
    if not field.metadata.get("static")
)
