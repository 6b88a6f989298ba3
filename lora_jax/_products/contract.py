"""The low-rank contraction: all adapted weights that multiply one input, grouped and planned.

Shapes: x (T, in), A (in, r), x·A (T, r), B (r, out); for x·Wᵀ, A and B change places.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.lax import Precision

from lora_jax._core import compat
from lora_jax._core.einsum import Labels, along, cast, holding, laid_along, meeting, plus, sum_lone
from lora_jax._core.errors import LoRAError
from lora_jax._core.geometry import PART, RANK, SEED_IMPL, SLOT, Factor
from lora_jax._nodes.weight import AdaptedWeight
from lora_jax._products.group import Group, Member
from lora_jax._products.linear import adapted
from lora_jax._products.plan import AWARE, Plan, planned
from lora_jax._products.slot_ways import Choice
from lora_jax._products.slots import Pair, by_slot
from lora_jax._quantized.dot import read_whole
from lora_jax._quantized.waiting import is_waiting

Labelled = tuple[jax.Array, tuple[Hashable, ...]]  # an array, and the labels of its axes


@dataclasses.dataclass(frozen=True)
class Product:
    """One contraction of x with an adapted weight.

    Attributes:
      w: the weight.
      m: x·W as the model wrote it. `m.wl` labels the weight's axes, those that meet an axis of x by
        that axis's label.
      base: gives x·W, for a product that is not `whole`.
      whole: whether x·W is made together with the update; not so where x is of integers, or the
        model gives the result a sharding.
      use: a number that no other use has.
    """

    w: AdaptedWeight
    m: Member
    base: Callable[[], jax.Array]
    whole: bool
    use: int

    def meeting(self, x: jax.Array) -> Any:
        """The type in which x meets the factors."""
        return meeting(x.dtype, self.w.dtype, self.m.dtype)

    def arithmetic(self, x: jax.Array) -> tuple[Any, Any]:
        """(type, precision) of the products with the factors."""
        dtype, precision = self.meeting(x), self.m.precision
        if not dtype == x.dtype == self.w.dtype and not isinstance(precision, Precision | tuple):
            precision = None  # an algorithm is one for the model's own types
        return dtype, precision

    def factors(self, x: jax.Array, xl: Labels) -> tuple[Labelled, Labelled]:
        """(first, second) factor, with labels: A then B for x·W, B then A for x·Wᵀ.

        The one that makes the cheaper first product comes first.
        """
        own = [d for d in self.w.a.dims if d < 0]  # of the factors alone: their labels
        label = dict(enumerate(self.m.wl)) | dict(zip(own, own))
        size = dict(zip(xl, x.shape)) | dict(zip(self.m.wl, self.w.shape))
        size |= {d: self.w.a.size(d) for d in own}

        def flops(first: Factor, second: Factor) -> int:
            fl, sl = ([label[d] for d in f.dims] for f in (first, second))
            hl = [d for d in dict.fromkeys([*xl, *fl]) if d in self.m.out or d in sl]
            cost = lambda *labels: math.prod(size[d] for d in {*labels[0], *labels[1]})
            return cost(xl, fl) + cost(hl, sl)

        a, b = self.w.a, self.w.b
        first, second = (b, a) if compat.less(flops(b, a), flops(a, b)) else (a, b)
        # Those that meet x in x's order, then the rank: only equal orders share a product.
        at = lambda d: xl.index(label[d]) if label[d] in xl else len(xl)
        first = first.order(tuple(sorted(first.dims, key=lambda d: (d == RANK, at(d), d))))
        labelled = lambda f: (f.value, tuple(label[d] for d in f.dims))
        return labelled(first), labelled(second)


def contracted(
    x: jax.Array, xl: Labels, products: Sequence[Product], mode: str
) -> list[tuple[jax.Array, Plan | str]]:
    """(result, plan) of each product. Those whose A run along the same axes of x are one group."""
    groups: dict[Any, list[int]] = {}
    parts = [p.factors(x, xl) for p in products]
    for i, (p, ((_, al), (_, bl))) in enumerate(zip(products, parts)):
        # A stands beside another A if both run along the same axes, in the same order, and meet x
        # in the same arithmetic.
        left = tuple(d for d in xl if d in p.m.out or d in bl)
        # Not beside others: what has a mask of its own, and A along other axes than x's.
        alone = i if p.w.drops or not {*al} <= {*xl, RANK, SLOT} else None
        slots = None if p.w.tokens is None else id(p.w.tokens)
        key = (al, left, p.m.precision, p.whole, p.meeting(x), alone, slots)
        groups.setdefault(key, []).append(i)
    outs: list[Any] = [None] * len(products)
    for members in groups.values():
        some, own = [products[i] for i in members], [parts[i] for i in members]
        for i, p, (y, plan) in zip(members, some, _multiplied(x, xl, some, own, mode)):
            outs[i] = p.w.gained(y, p.m.out, p.m.wl), plan
    return outs


def _multiplied(
    x: jax.Array,
    xl: Labels,
    products: Sequence[Product],
    parts: Sequence[tuple[Labelled, Labelled]],
    mode: str,
) -> list[tuple[jax.Array, Plan | str]]:
    """The results of one group, and its plan."""
    # What they share is in the key of the group, so the first speaks for all.
    first = products[0]
    if first.w.tokens is not None:
        return _by_slot(x, xl, products, parts)
    whole = first.whole and not first.w.apart
    (_, al), _ = parts[0]
    plan = _plan(x, xl, products, parts, mode, whole)
    bases: list[jax.Array] = []
    dtype, precision = first.arithmetic(x)
    if not whole:
        # x·W as the model wrote it, and the update of x as floats beside it
        bases = [p.base() for p in products]
        x = dropout(cast(x, dtype), first.w, first.use)
        xl = (PART, *xl) if first.w.a.has(PART) else xl
    own = lambda m: m if whole else dataclasses.replace(m, wl=(), dtype=holding(m.dtype))
    members = tuple(
        dataclasses.replace(own(p.m), bl=bl, scale=p.w.scale)
        for p, (_, (_, bl)) in zip(products, parts)
    )
    ys = adapted(
        Group(tuple(xl), al, members, plan, dtype, precision),
        x,
        [a for (a, _), _ in parts],
        [b for _, (b, _) in parts],
        [p.w.base for p in products] if whole else (),
    )
    if not whole:
        ys = list(map(plus, bases, ys))
    return [(y, plan) for y in ys]


def _plan(
    x: jax.Array,
    xl: Labels,
    products: Sequence[Product],
    parts: Sequence[tuple[Labelled, Labelled]],
    mode: str,
    whole: bool,
) -> Plan:
    first = products[0]
    size = dict(zip(xl, x.shape)) | dict(zip(first.m.wl, first.w.shape))
    # What is summed; rows are what x has beside the weight's own axes.
    inner = {d for d in first.m.wl if d in xl and d not in first.m.out}
    rows = math.prod(size[d] for d in xl if d not in first.m.wl)
    outs = [math.prod(n for d, n in zip(p.m.wl, p.w.shape) if d not in xl) for p in products]
    ranks = [p.w.a.size(RANK) for p in products]
    # A along all that is summed, B along nothing of it: the merged weight is of the weight's shape.
    apart = whole and all(
        inner <= {*al} <= {*xl, RANK} and not inner & {*bl} for (_, al), (_, bl) in parts
    )
    joinable = apart and all(
        {*al, *bl} <= {*p.m.wl, RANK}
        and {*p.m.wl} & {*xl} == {*first.m.wl} & {*xl}
        and p.meeting(x) == p.m.dtype == p.w.dtype == x.dtype
        and compat.explicit_sharding(x) is None
        and read_whole(x, p.w.base)
        for p, ((_, al), (_, bl)) in zip(products, parts)
    )
    # Where the compiler shards, T is of all devices together, and the costs would be wrong.
    local = all(map(compat.one_device, jax.tree.leaves((x, [p.w.base for p in products]))))
    updated = all(is_waiting(p.w.base) and p.w.base.updated for p in products)
    if not whole or (mode == "beside" and not joinable) or (mode == AWARE and not updated):
        mode = "factored"
    return planned(
        mode,
        rows,
        math.prod(size[d] for d in inner),
        outs,
        ranks,
        x.dtype.itemsize,
        mergeable=apart and local and all(_keeps_all_bits(p, x) for p in products),
        joinable=joinable and local and compat.platform(x) == "gpu",
        # what is read from codes is written for the product anyway
        copied=sum(k for k, p in zip(outs, products) if not is_waiting(p.w.base)),
    )


def _keeps_all_bits(p: Product, x: jax.Array) -> bool:
    """Whether the product reads the weight in fp32 or wider, so that a small update of a large
    weight is not rounded away. In fp32, GPUs and TPUs do so only at the highest precision."""
    wide = all(v.dtype.itemsize >= 4 for v in (x, p.w.base))
    highest = jax.lax.Precision.HIGHEST
    full = p.m.precision in (highest, (highest, highest))
    return wide and (full or compat.platform(x) == "cpu")


def _by_slot(
    x: jax.Array,
    xl: Labels,
    products: Sequence[Product],
    parts: Sequence[tuple[Labelled, Labelled]],
) -> list[tuple[jax.Array, Plan | str]]:
    """x·W of each, and beside it x times the factors of each position's own slot; and how."""
    first = products[0]
    bases, (s, sl) = [p.base() for p in products], _slots(x, xl, first)
    dtype, precision = first.arithmetic(x)
    x = dropout(cast(x, dtype), first.w, first.use)
    (_, al), (_, bl) = parts[0]
    # Summed here: a choice knows no axes that x alone has.
    x, xl = sum_lone(x, xl, al, (*bl, *first.m.out))
    pairs: list[Pair] = []
    for p, y, ((a, al), (_, bl)) in zip(products, bases, parts):
        left = dict.fromkeys((*xl, *al))
        hl = (*(d for d in left if d not in (RANK, SLOT) and (d in p.m.out or d in bl)), RANK)
        count = a.shape[al.index(SLOT)]
        # Along the rank x·A is whole, and its update lies as x·W does.
        where = laid_along(compat.explicit_sharding(x), xl, hl)
        down = Choice(tuple(xl), al, sl, hl, count, dtype, precision, where=where)
        out = tuple(d for d in p.m.out if d in hl or d in bl)
        where = laid_along(compat.explicit_sharding(y), p.m.out, out)
        up = Choice(hl, bl, sl, out, count, holding(p.m.dtype), precision, where=where)
        pairs.append(Pair(down, up, p.w.scale))
    factors = [(cast(a, dtype), cast(b, dtype)) for (a, _), (b, _) in parts]
    deltas = by_slot(x, s, factors, pairs)
    return [
        (plus(y, along(d, pair.up.out, p.m.out, y.shape)), "by slot: " + pair.plan(x, *f, s))
        for p, y, d, pair, f in zip(products, bases, deltas, pairs, factors)
    ]


def _slots(x: jax.Array, xl: Labels, p: Product) -> tuple[jax.Array, tuple]:
    """The slots of the positions of x, and the labels of their axes: those of x that the weight
    lacks, less those along which all have the same."""
    assert p.w.tokens is not None
    free = [i for i, d in enumerate(xl) if d not in p.m.wl]
    sizes, found = tuple(x.shape[i] for i in free), tuple(p.w.tokens.shape)
    fits = len(sizes) == len(found) and all(n in (1, size) for n, size in zip(found, sizes))
    if found and not fits:
        raise LoRAError(
            f"'{p.w.name}' is multiplied by inputs of shape {tuple(x.shape)}, which have {sizes} "
            f"positions; expected slots or a mask of that shape, or of 1 in places, found {found}: "
            "lora.algebra.choose(stacked, slots), with slots (batch, tokens) or (batch, 1)"
        )
    own = [i for i, n in enumerate(found) if n != 1]
    return p.w.tokens.reshape([found[i] for i in own]), tuple(xl[free[i]] for i in own)


def dropout(x: jax.Array, w: AdaptedWeight, use: int) -> jax.Array:
    """Inverted dropout on the branch's input; its mask is of the weight, its stack and the use.

    For a weight with an axis PART, x gets one as well, in front: each part has its own mask.
    """
    if w.seed is None or not w.drops:
        return x
    data = w.seed.sorted().value  # (parts, *batch, 2), or (*batch, 2)
    n = w.seed.size(PART) if w.seed.has(PART) else 1
    words = data.reshape(n, -1, data.shape[-1])[:, 0]
    kept = np.float32(1 - w.dropout)  # of this type also where JAX has 64 bits

    def mask(words: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(words, impl=SEED_IMPL)
        return jax.random.bernoulli(jax.random.fold_in(key, use), kept, x.shape)

    if w.seed.has(PART):
        keep, x = jax.vmap(mask)(words), lax.broadcast(x, (n,))
    else:
        keep = mask(words[0])
    where = compat.explicit_sharding(x)
    placed = lambda v: v if where is None else jax.sharding.reshard(v, where)
    zeros = jnp.zeros(x.shape, x.dtype)
    return jnp.where(placed(keep), x / (1 - w.dropout), placed(zeros))
