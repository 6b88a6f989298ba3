"""The weights that multiply one input, and the products that a plan makes of them.

Every axis has a label: an axis of a weight or factor that meets one of x has that one's. So dense
layers, heads, experts, transposed uses and batched factors are one case.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._core import compat
from lora_jax._core.einsum import cast, contract, spread, times
from lora_jax._core.geometry import RANK, Factor
from lora_jax._core.order import after
from lora_jax._nodes.weight import AdaptedWeight
from lora_jax._products.plan import Plan
from lora_jax._quantized.dot import dot
from lora_jax._quantized.weight import value

Labels = tuple[Hashable, ...]


@dataclasses.dataclass(frozen=True)
class Member:
    """One weight of a group: the labels of W (None: the update alone), of B and of y."""

    wl: Labels | None
    bl: Labels
    out: Labels
    scale: float
    dtype: Any  # of y
    precision: Any = None
    preferred: Any = None
    numbers: Any = None  # dot_general's dimension_numbers, as the model wrote the base product
    weight_first: bool = False
    where: tuple[Any, tuple] | None = None  # (mesh, pairs (label of y, mesh axis)), where given

    def sharding(self, labels: Labels):
        """Of an array of `labels`, or None if the operands' types decide it."""
        if self.where is None:
            return None
        mesh, pairs = self.where
        spec = PartitionSpec(*(dict(pairs).get(d) for d in labels))
        return spec if mesh is None else NamedSharding(mesh, spec)

    @property
    def params(self):
        return dict(precision=self.precision, preferred_element_type=self.preferred)

    def base(self, x, xl, w):
        """(x·W, its labels), to the bit what the model computes."""
        have = tuple(d for d in self.out if d in xl or d in self.wl)

        def whole(x, w):
            if self.numbers is None:
                return self.dot(x, xl, w, self.wl)[0]
            operands = (w, x) if self.weight_first else (x, w)
            return lax.dot_general(*operands, self.numbers, **self.params)

        return dot(whole, x, xl, w, self.wl, have, x, **self.params), have

    def dot(self, x, xl, y, yl):
        """(x·y, its labels), summed over what y_i does not have."""
        have = tuple(d for d in self.out if d in xl or d in yl)
        return contract(x, xl, y, yl, have, sharding=self.sharding(have), **self.params), have

    def sum(self, terms):
        """The sum of (array, labels), each constant along the labels that it lacks."""
        size = {d: n for y, have in terms for d, n in zip(have, y.shape) if n != 1}
        shape = [size.get(d, 1) for d in self.out]
        terms = (cast(spread(y, have, self.out, shape), self.dtype) for y, have in terms)
        return functools.reduce(lax.add, terms)


@dataclasses.dataclass(frozen=True)
class Group:
    """All that is static: the labels of x and of every A, the members, and the plan."""

    xl: Labels
    al: Labels
    members: tuple[Member, ...]
    plan: Plan
    bases: Any = None  # the structure of the list of all W, where some are quantised

    @property
    def hl(self) -> Labels:
        """The labels of x·A: what is left of x, and the rank; alike for all members."""
        m = self.members[0]
        left = dict.fromkeys((*self.xl, *self.al))
        return (*(d for d in left if d != RANK and (d in m.out or d in m.bl)), RANK)

    @property
    def precision(self):
        return self.members[0].precision

    def split(self, args):
        """x, the A, the B and the W (None, for the updates alone) of a flat list."""
        n = len(self.members)
        x, a, b, w = args[0], args[1 : n + 1], args[n + 1 : 2 * n + 1], args[2 * n + 1 :]
        if self.bases is not None:
            w = jax.tree.unflatten(self.bases, w)
        return x, a, b, w or [None] * n

    def side_by_side(self, values, labels):
        """Arrays joined along the rank where the plan shares the product, else as they are."""
        if not self.plan.shared:
            return list(values)
        return [lax.concatenate(values, labels.index(RANK))]

    def apart(self, values, labels, ranks):
        """The inverse."""
        if not self.plan.shared:
            return values
        return lax.split(values[0], ranks, labels.index(RANK))

    def ranks(self, a):
        return [v.shape[self.al.index(RANK)] for v in a]


def hidden(group: Group, x, a) -> list:
    """s·(x·A) of each member, in x's dtype."""
    scales, ranks = [m.scale for m in group.members], group.ranks(a)
    a = [cast(v, x.dtype) for v in a]
    summed = math.prod(n for d, n in zip(group.xl, x.shape) if d not in group.hl)
    late = x.size * ranks[0] < a[0].size * summed  # the scale goes to the smaller of A and x·A
    a = a if late else map(times, a, scales)
    sharding = group.members[0].sharding(group.hl)
    h = [
        contract(x, group.xl, v, group.al, group.hl, sharding, precision=group.precision)
        for v in group.side_by_side(list(a), group.al)
    ]
    h = group.apart(h, group.hl, ranks)
    return list(map(times, h, scales)) if late else h


def up(group: Group, h, b):
    """The terms (x·A)·B."""
    return [m.dot(h_, group.hl, cast(b_, h_.dtype), m.bl) for m, h_, b_ in zip(group.members, h, b)]


def base(group: Group, x, w):
    """The terms x·W."""
    return [m.base(x, group.xl, w_) for m, w_ in zip(group.members, w)]


def _merged(group: Group, m: Member, w, a, b):
    dims = lambda labels: tuple(d if d == RANK else m.wl.index(d) for d in labels)
    a, b = Factor(a, dims(group.al)), Factor(b, dims(m.bl))
    return AdaptedWeight(w, a, b, scale=m.scale).materialise()


def through_merged(group: Group, inputs, a, b, w, dot):
    """dot(m, input, W + s·A·B) of each member, one merged weight at a time.

    Each waits for the result of the one before, and the first for its input: no scheduler can form
    those of many layers ahead of their use, or keep those of the forward pass for the backward.
    """
    outs: list = []
    for m, x, w_, a_, b_ in zip(group.members, inputs, w, a, b):
        a_ = after(outs[-1] if outs else x, a_)
        w_ = value(w_, outs[-1] if outs else x)
        outs.append(dot(m, x, _merged(group, m, w_, a_, b_)))
    return outs


def to_outputs(group: Group, x, a, b, w):
    """x·(W + s·A·B) of each member."""
    dot = lambda m, x, w_: m.sum([m.base(x, group.xl, w_)])
    return through_merged(group, [x] * len(w), a, b, w, dot)


def factored(group: Group, x, h, b, w):
    terms = [up(group, h, b)] if w[0] is None else [base(group, x, w), up(group, h, b)]
    return [m.sum(t) for m, t in zip(group.members, zip(*terms))]


def gradient(x, xl, y, yl, out, like, precision):
    """x·y of labels `out`, in the dtype and, where shardings are in types, the sharding of `like`.

    XLA transposes what stands on the left of a contraction over several axes: the smaller one does.
    """
    if sum(d in yl and d not in out for d in xl) > 1 and y.size < x.size:
        x, xl, y, yl = y, yl, x, xl
    z = contract(x, xl, y, yl, out, precision=precision, sharding=compat.explicit_sharding(like))
    return cast(z, like.dtype)
