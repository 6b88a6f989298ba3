"""The weights that multiply one input, and the products that are made of them and their factors.

Shapes: x (T, in), A (in, r), x·A (T, r), B (r, out), W (in, out), y (T, out). Every axis has a
label, and an axis of a weight or factor that meets one of x has that one's. So dense layers, heads,
experts, transposed uses and batched factors are one case: T, in, r and out are any number of axes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._core import compat
from lora_jax._core.einsum import Labels, Where, along, cast, contract, holding, laid_along, times
from lora_jax._core.geometry import RANK
from lora_jax._products.plan import Plan
from lora_jax._quantized.dot import Whole, dot

Term = tuple[jax.Array, Labels]  # of a sum, constant along the labels of the sum that it lacks


@dataclasses.dataclass(frozen=True)
class Member:
    """One weight of a group."""

    wl: Labels  # of W; (): the update alone
    out: Labels  # of y
    dtype: Any  # of y
    bl: Labels = ()  # of B
    scale: float = 1.0
    precision: Any = None
    preferred: Any = None
    numbers: Any = None  # dot_general's dimension_numbers, as the model wrote the base product
    weight_first: bool = False
    where: Where = None  # the sharding that the model gives y; None: the operands' types decide it

    @property
    def params(self) -> dict[str, Any]:
        return dict(precision=self.precision, preferred_element_type=self.preferred)

    def base(self, x: jax.Array, xl: Labels, w: Any) -> Term:
        """x·W, to the bit what the model computes."""
        have = tuple(d for d in self.out if d in xl or d in self.wl)

        # Static and hashable: `dot` keeps one trace for all weights that are alike.
        whole = Whole(_as_written, (self, tuple(xl)))
        return dot(whole, x, xl, w, self.wl, have, **self.params), have

    def contract(self, x: jax.Array, xl: Labels, y: jax.Array, yl: Labels, precision: Any) -> Term:
        """x·y, summed over what the member's result does not have."""
        have = tuple(d for d in self.out if d in xl or d in yl)
        # 8-bit floats would be rounded before they are added; complex numbers may not be narrowed.
        kept = self.preferred is None or jnp.iscomplexobj(x)
        preferred = None if kept else holding(self.preferred)
        params = dict(precision=precision, preferred_element_type=preferred)
        where = laid_along(self.where, self.out, have)
        return contract(x, xl, y, yl, have, where, **params), have

    def sum(self, terms: Sequence[Term], size: Mapping = MappingProxyType({})) -> jax.Array:
        """The result: the sum of its terms, in its dtype; 8-bit floats are rounded once. `size` is
        of labels that no term may have."""
        # A term of size 1 along an axis that another has in full is constant there.
        size = dict(size) | {d: n for y, have in terms for d, n in zip(have, y.shape) if n != 1}
        shape, dtype = [size.get(d, 1) for d in self.out], holding(self.dtype)
        whole = (cast(along(y, have, self.out, shape), dtype) for y, have in terms)
        return cast(functools.reduce(lax.add, whole), self.dtype)


def _as_written(x: jax.Array, w: jax.Array, m: Member, xl: Labels) -> jax.Array:
    # After a vmap the model's dimension numbers no longer fit: the labels say the same.
    if m.numbers is None:
        return m.contract(x, xl, w, m.wl, m.precision)[0]
    operands = (w, x) if m.weight_first else (x, w)
    return lax.dot_general(*operands, m.numbers, **m.params)


@dataclasses.dataclass(frozen=True)
class Group:
    """All that is static of the products of one x."""

    xl: Labels  # of x
    al: Labels  # of every A
    members: tuple[Member, ...]
    plan: Plan
    dtype: Any  # of x·A, and of A and B beside it
    precision: Any = None  # of the products with A and B
    bases: Any = None  # the structure of the list of all W, where some are quantised

    @property
    def hl(self) -> Labels:
        """The labels of x·A: what is left of x, and the rank."""
        m = self.members[0]  # alike for all members
        left = dict.fromkeys((*self.xl, *self.al))
        return (*(d for d in left if d != RANK and (d in m.out or d in m.bl)), RANK)

    def split(self, args: Sequence) -> tuple[Any, Sequence, Sequence, Sequence]:
        """x, the A, the B and the W (None, for the updates alone) of a flat list."""
        n = len(self.members)
        x, a, b, w = args[0], args[1 : n + 1], args[n + 1 : 2 * n + 1], args[2 * n + 1 :]
        # flat arrays back to weights in codes
        if self.bases is not None:
            w = jax.tree.unflatten(self.bases, w)
        return x, a, b, w or [None] * n

    def sizes(self, w: Sequence) -> list[dict]:
        """For each member the size of each axis of W, where it is there."""
        return [dict(zip(m.wl, getattr(w_, "shape", ()))) for m, w_ in zip(self.members, w)]

    def side_by_side(self, values: Sequence[jax.Array], labels: Labels) -> list[jax.Array]:
        """Arrays joined along the rank where the plan shares the product, else as they are."""
        if not self.plan.shared:
            return list(values)
        return [lax.concatenate(values, labels.index(RANK))]

    def apart(
        self, values: Sequence[jax.Array], labels: Labels, ranks: Sequence[int]
    ) -> Sequence[jax.Array]:
        """The inverse of `side_by_side`."""
        if not self.plan.shared:
            return values
        return lax.split(values[0], ranks, labels.index(RANK))

    def ranks(self, a: Sequence[jax.Array]) -> list[int]:
        return [v.shape[self.al.index(RANK)] for v in a]


def hidden(group: Group, x: jax.Array, a: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """s·(x·A) of each member, (T, r), in the group's dtype."""
    scales, ranks = [m.scale for m in group.members], group.ranks(a)
    x, *a = (cast(v, group.dtype) for v in (x, *a))
    summed = math.prod(n for d, n in zip(group.xl, x.shape) if d not in group.hl)
    # The scale goes to the smaller of A and x·A.
    late = compat.less(x.size * ranks[0], a[0].size * summed)
    a = a if late else list(map(times, a, scales))
    first = group.members[0]
    sharding = laid_along(first.where, first.out, group.hl)
    # (T, Σr) if shared, else one (T, r) for each
    h = [
        contract(x, group.xl, v, group.al, group.hl, sharding, precision=group.precision)
        for v in group.side_by_side(a, group.al)
    ]
    h = group.apart(h, group.hl, ranks)
    return list(map(times, h, scales)) if late else h


def up(group: Group, h: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[Term]:
    """The terms (x·A)·B."""
    return [
        m.contract(h_, group.hl, cast(b_, h_.dtype), m.bl, group.precision)
        for m, h_, b_ in zip(group.members, h, b)
    ]


def base(group: Group, x: jax.Array, w: Sequence) -> list[Term]:
    """The terms x·W."""
    return [m.base(x, group.xl, w_) for m, w_ in zip(group.members, w)]


def factored(
    group: Group, x: jax.Array, h: Sequence[jax.Array], b: Sequence[jax.Array], w: Sequence
) -> list[jax.Array]:
    """x·W + (x·A)·B of each member, or without x·W where there is no W."""
    terms = [up(group, h, b)] if w[0] is None else [base(group, x, w), up(group, h, b)]
    return [m.sum(t) for m, t in zip(group.members, zip(*terms))]


def gradient(
    x: jax.Array, xl: Labels, y: jax.Array, yl: Labels, out: Labels, like: Any, precision: Any
) -> jax.Array:
    """x·y of labels `out`, in the dtype and, where shardings are in types, sharding of `like`;
    constant along the labels that neither has."""
    # XLA transposes what stands on the left of a contraction over several axes: the smaller one.
    if sum(d in yl and d not in out for d in xl) > 1 and compat.less(y.size, x.size):
        x, xl, y, yl = y, yl, x, xl
    where = compat.explicit_sharding(like)
    have = tuple(d for d in out if d in xl or d in yl)
    # The sharding of the axes that the product has; the rest is broadcast below.
    own = laid_along(where, out, have)
    z = cast(contract(x, xl, y, yl, have, precision=precision, sharding=own), like.dtype)
    if len(have) == len(out):
        return z
    return lax.broadcast_in_dim(z, like.shape, [*map(out.index, have)], out_sharding=where)


def toward_x(x: Any, xl: Labels, m: Member, g: jax.Array, w: Any) -> jax.Array:
    """g·Wᵀ, a term of the cotangent of x: in the type of x, which is what `x` is here."""
    how = dict(precision=m.precision, preferred_element_type=x.dtype)
    return dot(Whole(_whole_toward_x, (m, tuple(xl), x)), g, m.out, w, m.wl, xl, **how)


def _whole_toward_x(g: jax.Array, w: jax.Array, m: Member, xl: Labels, x: Any) -> jax.Array:
    return gradient(g, m.out, w, m.wl, xl, x, m.precision)
