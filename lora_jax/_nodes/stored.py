"""A base that is read as it will be stored: Q(W + s·A·B), rounded to a format's levels."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from lora_jax._core.geometry import RANK, Factor, static
from lora_jax._core.order import ordered
from lora_jax._nodes.weight import AdaptedWeight
from lora_jax._quantized.make import rounded, unstorable
from lora_jax._quantized.waiting import Waiting
from lora_jax._quantized.weight import is_quantized


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Stored(Waiting):
    """What a merged weight becomes when it is stored in a format, made where it is used.

    It is the base of an adapted weight whose factors take the gradient: that of W + s·A·B, as if
    nothing was rounded (straight through, arXiv:1308.3432). The ones in here have none.

    Attributes:
      weight: W with its update, as the leaf lies.
      format: a key of `FORMATS`.
      in_axes, stack, double: as in `quantized`.
    """

    updated: ClassVar[bool] = True

    weight: AdaptedWeight
    format: str = static()
    in_axes: tuple[int, ...] = static()
    stack: int = static()
    double: bool = static()

    @classmethod
    def of(cls, w: AdaptedWeight, format: str) -> Stored:
        plain = dataclasses.replace(w, seed=None, origin="", axes=(), stacked=())
        return cls(plain, format, **layout(w, format))

    @property
    def stored(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def stored_dtype(self) -> Any:
        return self.weight.dtype

    @property
    def sliceable(self) -> bool:
        """Whether the parts of axis 0 are those of each array."""
        base = self.weight.base
        order = self.order
        first = order is not None and order[:1] == (0,) and self.stack > 0
        first = first and all(f.dims[:1] == (0,) for f in (self.weight.a, self.weight.b))
        return first and (not is_quantized(base) or base.sliceable)

    def part(self) -> Stored:
        """One of axis 0, of arrays that were sliced already."""
        down = lambda f: Factor(f.value, tuple(d if d == RANK else d - 1 for d in f.dims[1:]))
        w = self.weight
        base = w.base.part() if is_quantized(w.base) else w.base
        part = dataclasses.replace(
            self,
            weight=dataclasses.replace(w, base=base, a=down(w.a), b=down(w.b)),
            in_axes=tuple(d - 1 for d in self.in_axes if d),
            stack=self.stack - 1,
            moves=(),
            moved_to=None,
        )
        return part._moving(self.moves)

    def rows(self, eqn: Any, indices: jax.Array) -> None:
        """No look-up of some rows: all are made."""

    def value(self, after: jax.Array | None = None) -> jax.Array:
        """The weight as an array, see `Waiting`."""
        w = self.weight
        if after is not None:
            base = w.base
            late = ordered(after, base.codes if is_quantized(base) else base)
            base = dataclasses.replace(base, codes=late) if is_quantized(base) else late
            w = dataclasses.replace(w, base=base, a=w.a.map(lambda a: ordered(after, a)))
        how = dict(in_axes=self.in_axes, stack=self.stack, double=self.double)
        return self._moved(rounded(w.materialise(), self.format, **how))


def layout(w: AdaptedWeight, format: str) -> dict[str, Any]:
    """How a leaf with these factors is stored in a format, for `in_codes`: as its own codes are, if
    they are of that format; else by the axes of its factors."""
    if is_quantized(w.base) and w.base.format == format and w.base.storable:
        return w.base.how
    batch = sorted(d for d in w.a.dims if d != RANK and w.b.has(d))
    in_axes = tuple(d for d in w.a.dims if d != RANK and d not in batch)
    stack = len(batch) if batch == [*range(len(batch))] else 0
    return dict(in_axes=in_axes, stack=stack, double=False)


def problems(w: AdaptedWeight) -> list[str]:
    """Why a leaf cannot be trained as it will be stored."""
    found = [unstorable(w)]
    if w.drops:
        found.append(f"has dropout {w.dropout}, and what is stored has none")
    if w.tokens is not None:
        found.append("is adapted for some tokens alone, and what is stored serves all")
    if w.gain is not None:
        found.append("is scaled by a magnitude (DoRA), whose gradient needs what is not rounded")
    if w.rows is not None:
        found.append("has rows that are trained by themselves")
    return [f"'{w.origin}' {problem}" for problem in found if problem]
