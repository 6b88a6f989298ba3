"""Products with one matrix of a stack for each row: x_t · M[s_t], and their derivatives.

Shapes: x (T, in), M (slots, in, out), s (T,) integers, y (T, out). A row of slot -1 is zero, and
one of any other number that has no slot is NaN; a slot that is not finite spoils its own rows
alone. Axes are labelled, as in `group`, so T, in and out are any number of axes.

With the gradient of M, (slots, in, out), it is one sum, Σ x·y·[s = k], over k where y has the
slots, or not where the result has them: the transpose of each kind is the other. There are four
ways to it, of which `plan.way_by_slot` takes one:

* gathered: M[s], a copy for each group of rows, and one batched product;
* summed: the same product as a sum over its few terms, which XLA makes on a CPU in one pass with
  what it is added to, and without a copy of M[s];
* one by one: a loop that reads M[s_t] where it lies, once for a run of rows of one slot;
* concatenated: one product with all the matrices side by side, of which each row keeps its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax._core import compat
from lora_jax._core.einsum import Labels, cast, contract, times, wide
from lora_jax._core.geometry import SLOT
from lora_jax._products.plan import RUN, way_by_slot


@dataclasses.dataclass(frozen=True)
class Choice:
    """All that is static of one sum Σ x·y·[s = k].

    Attributes:
      xl, yl, sl, out: the labels of x, y, s and the result. SLOT is in `yl` or in `out`. x has all
        of `sl`, and so has y where it does not have the slots, or the result where it does not.
      slots: how many there are.
      dtype: of the result.
      precision: of the products.
      way: one of `plan.SLOT_WAYS`, or "auto".
      where: the sharding of the result, if that is part of its type.
    """

    xl: tuple
    yl: tuple
    sl: tuple
    out: tuple
    slots: int
    dtype: Any
    precision: Any = None
    way: str = "auto"
    where: Any = None

    @property
    def sums(self) -> bool:
        """Whether this is a product, and not the gradient of the stack."""
        return SLOT in self.yl

    def sizes(self, x: Any, y: Any) -> tuple[Any, Any, Any, Any]:
        """(groups of rows of one slot, rows of a group, in, out)."""
        size = dict(zip(self.yl, y.shape)) | dict(zip(self.xl, x.shape))
        of = lambda labels: math.prod(size[d] for d in labels)
        kept = {*self.out} if self.sums else {*self.sl}
        inner = [d for d in self.xl if d not in kept and (not self.sums or d in self.yl)]
        if not self.sums:
            inner = [d for d in inner if d not in self.yl]
        outer = [d for d in self.yl if d != SLOT and d not in self.xl]
        rows = [d for d in self.xl if d not in self.sl and d not in inner]
        return of(self.sl), of(rows), of(inner), of(outer)

    def planned(self, x: Any, y: Any, s: Any, like: Any = None) -> str:
        """The way; `like`: an array that lies as x does, where x is a shape alone."""
        like = x if like is None else like
        if {*self.sl} & {*(self.yl if self.sums else self.out)}:
            return "concatenated"  # a stack for each row is none that could be looked up in
        if compat.explicit_sharding(s) is not None:
            return "concatenated"  # a look-up would need to be told the sharding of its result
        if self.way != "auto":
            return self.way
        local = all(map(compat.one_device, (like, y, s)))
        itemsize, platform = jnp.dtype(self.dtype).itemsize, compat.platform(like)
        return way_by_slot(*self.sizes(x, y), self.slots, itemsize, platform, local, self.sums)

    def mapped(self, of_x: bool, of_y: bool, of_s: bool) -> Choice:
        """With one axis more in front of the result, and of what has it."""
        new = ("slots", sum(isinstance(d, tuple) and d[0] == "slots" for d in self.out))
        lead = lambda labels, has=True: (new, *labels) if has else labels
        return dataclasses.replace(
            self,
            xl=lead(self.xl, of_x),
            yl=lead(self.yl, of_y),
            sl=lead(self.sl, of_s),
            out=lead(self.out),
            where=self.where and self.where.update(spec=PartitionSpec(None, *self.where.spec)),
        )

    def contract(self, x: Any, xl: Labels, y: Any, yl: Labels, out: Labels) -> jax.Array:
        how = dict(precision=self.precision, preferred_element_type=self.dtype)
        if self.where is None:
            return contract(x, xl, y, yl, out, **how)
        spec = dict(zip(self.out, self.where.spec))
        own = self.where.update(spec=PartitionSpec(*(spec.get(d) for d in out)))
        return contract(x, xl, y, yl, out, own, **how)


def chosen(x: jax.Array, y: jax.Array, s: jax.Array, how: Choice) -> jax.Array:
    """The sum Σ x·y·[s = k] of labels `how.out`, differentiable in x and y."""
    return _chosen_p.bind(*compat.same_vma(x, y, s), how=how)[0]


def _chosen(x: jax.Array, y: jax.Array, s: jax.Array, *, how: Choice) -> list[jax.Array]:
    way, dtype = _WAYS[how.planned(x, y, s)], how.dtype
    if not how.sums:  # rows are added one after another: in fp32, and rounded once
        how = dataclasses.replace(how, dtype=wide(dtype))
    return [cast(way(x, y, s, how), dtype)]


def _along(v: jax.Array, have: Labels, out: Labels, like: jax.Array) -> jax.Array:
    """v of labels `have` in the shape and, where that is part of types, the sharding of `like`,
    which has the labels `out`."""
    v = lax.broadcast_in_dim(v, like.shape, [list(out).index(d) for d in have])
    return compat.lying_as(v, like)


def _only(where: jax.Array, have: Labels, v: jax.Array, labels: Labels) -> jax.Array:
    """v where `where` is true, and zero elsewhere."""
    return jnp.where(_along(where, have, labels, v), v, jnp.zeros((), v.dtype))


def _without(z: jax.Array, s: jax.Array, how: Choice) -> jax.Array:
    """The result with its rows without a slot: zero for -1, else NaN."""
    # (T,): what stands in a row that no slot is for
    none = jnp.where(s == -1, np.zeros((), z.dtype), np.asarray(np.nan, z.dtype))
    along = lambda v: _along(v, how.sl, how.out, z)
    return jnp.where(along((s >= 0) & (s < how.slots)), z, along(none))


def _gathered(
    x: jax.Array, y: jax.Array, s: jax.Array, how: Choice, product: Callable = Choice.contract
) -> jax.Array:
    if how.sums:
        at = how.yl.index(SLOT)
        rest = tuple(d for d in how.yl if d != SLOT)
        each = jnp.take(jnp.moveaxis(y, at, 0), s, axis=0, mode="clip")
        return _without(product(how, x, how.xl, each, (*how.sl, *rest), how.out), s, how)
    rest = tuple(d for d in how.out if d != SLOT)
    each = how.contract(x, how.xl, y, how.yl, (*how.sl, *rest))
    total = compat.same_vma(jnp.zeros((how.slots, *each.shape[s.ndim :]), each.dtype), each)[0]
    # past the end nothing is written
    total = total.at[jnp.where(s < 0, how.slots, s)].add(each, mode="drop")
    return jnp.moveaxis(total, 0, how.out.index(SLOT))


def _terms(
    how: Choice, x: jax.Array, xl: Labels, y: jax.Array, yl: Labels, out: Labels
) -> jax.Array:
    """x·y as a sum of as many arrays as the axes that are summed have elements."""
    summed = [d for d in xl if d in yl and d not in out]

    def parts(v: jax.Array, labels: Labels) -> Iterator[jax.Array]:
        order = [*summed, *(d for d in out if d in labels)]
        v = lax.transpose(v, [labels.index(d) for d in order])
        rest = v.shape[len(summed) :]
        flat = cast(v, wide(how.dtype)).reshape(-1, *rest)
        where = [list(out).index(d) for d in order[len(summed) :]]
        return (lax.broadcast_in_dim(part, shape, where) for part in flat)

    size = dict(zip(xl, x.shape)) | dict(zip(yl, y.shape))
    shape = [size[d] for d in out]
    terms = map(lax.mul, parts(x, xl), parts(y, yl))
    return cast(functools.reduce(lax.add, terms), how.dtype)


def _one_by_one(x: jax.Array, y: jax.Array, s: jax.Array, how: Choice) -> jax.Array:
    x, xl = _rows(x, how.xl, how.sl)
    at = jnp.clip(s, 0, how.slots - 1).reshape(-1)
    if how.sums:
        yl = tuple(d for d in how.yl if d != SLOT)
        y = jnp.moveaxis(y, how.yl.index(SLOT), 0)
        out = tuple(d for d in how.out if d not in how.sl)

        def product(x: jax.Array, k: jax.Array, many: tuple = ()) -> jax.Array:
            m = lax.dynamic_index_in_dim(y, k, keepdims=False)
            return how.contract(x, (*many, *xl), m, yl, (*many, *out))

        def each(x: jax.Array, at: jax.Array) -> jax.Array:
            return lax.scan(lambda _, row: (None, product(*row)), None, (x, at))[1]

        def run(x: jax.Array, at: jax.Array) -> jax.Array:
            # of packed sequences most runs are of one slot
            one = lambda x, at: product(x, at[0], ("row",))
            return lax.cond(jnp.all(at == at[0]), one, each, x, at)

        if len(at) >= 4 * RUN and len(at) % RUN == 0:
            runs = (v.reshape(-1, RUN, *v.shape[1:]) for v in (x, at))
            z = lax.scan(lambda _, rows: (None, run(*rows)), None, tuple(runs))[1]
        else:
            z = each(x, at)
        return _in_place(z, s, how)
    y, yl = _rows(y, how.yl, how.sl)
    out = tuple(d for d in how.out if d != SLOT)
    exists = ((s >= 0) & (s < how.slots)).reshape(-1)

    def add(total: jax.Array, row: tuple) -> tuple[jax.Array, None]:
        k, ok, x, y = row
        z = how.contract(x, xl, y, yl, out)
        z = jnp.where(ok, z, jnp.zeros((), z.dtype))
        new = lax.dynamic_index_in_dim(total, k, keepdims=False) + z
        return lax.dynamic_update_index_in_dim(total, new, k, 0), None

    size = dict(zip(yl, y.shape[1:])) | dict(zip(xl, x.shape[1:]))
    total = jnp.zeros((how.slots, *(size[d] for d in out)), how.dtype)
    total = compat.same_vma(total, x, y, s)[0]
    total, _ = lax.scan(add, total, (at, exists, x, y))
    return jnp.moveaxis(total, 0, how.out.index(SLOT))


def _in_place(z: jax.Array, s: jax.Array, how: Choice) -> jax.Array:
    """The result from one for each row, (T, …) or (T / RUN, RUN, …)."""
    rest = [d for d in how.out if d not in how.sl]
    z = z.reshape(*s.shape, *z.shape[z.ndim - len(rest) :])
    own = [*how.sl, *rest]
    return _without(jnp.transpose(z, [own.index(d) for d in how.out]), s, how)


def _rows(x: jax.Array, xl: Labels, sl: Labels) -> tuple[jax.Array, tuple]:
    """x with the axes of the slots' rows in front, as one, and the labels of the rest."""
    rest = tuple(d for d in xl if d not in sl)
    x = jnp.transpose(x, [list(xl).index(d) for d in (*sl, *rest)])
    return x.reshape(-1, *x.shape[len(sl) :]), rest


def _concatenated(x: jax.Array, y: jax.Array, s: jax.Array, how: Choice) -> jax.Array:
    hot = s[..., None] == jnp.arange(how.slots, dtype=s.dtype)
    hl = (*how.sl, SLOT)
    _, _, inner, outer = how.sizes(x, y)
    if not how.sums:
        (x, xl), (y, yl) = (x, how.xl), (y, how.yl)
        if compat.less(outer, inner):  # the smaller one is written once for each slot
            (x, xl), (y, yl) = (y, yl), (x, xl)
        y, bad = _finite(y, yl, how.sl)
        z = how.contract(*_by_slot(x, xl, hot, hl), y, yl, how.out)
        # (T, slots) to (slots,): whose rows were not finite
        met = hot & bad[..., None]
        gone = tuple(i for i, d in enumerate(hl) if d not in how.out)
        return _spoilt(z, how.out, jnp.any(met, gone), [d for d in hl if d in how.out])
    if not compat.less(inner, outer):
        # x·M for each slot, (T, slots, out), of which one is kept; out is the smaller
        full = (*how.out, SLOT)
        z = how.contract(x, how.xl, y, how.yl, full)
        z = jnp.sum(_only(hot, hl, z, full), -1)
        return _without(z, s, how)
    kept = [d for d in how.yl if d == SLOT or d in how.sl]
    y, bad = _finite(y, how.yl, kept)
    z = how.contract(*_by_slot(x, how.xl, hot, hl), y, how.yl, how.out)
    # (T, slots) to (T,): rows of a slot that is not finite
    met = jnp.any(hot & _along(bad, kept, hl, hot), -1)
    return _without(_spoilt(z, how.out, met, how.sl), s, how)


def _by_slot(x: jax.Array, xl: Labels, hot: jax.Array, hl: Labels) -> tuple[jax.Array, tuple]:
    """x at each row's own slot, (T, slots, in), zero at the others."""
    wide = lax.broadcast_in_dim(x, (*x.shape, hot.shape[-1]), range(x.ndim))
    labels = (*xl, SLOT)
    return _only(hot, hl, wide, labels), labels


def _finite(y: jax.Array, yl: Labels, kept: Labels) -> tuple[jax.Array, jax.Array]:
    """y with zeros along `kept` where a part of it is not finite, and where that is: 0 times NaN
    would be NaN in the rows of others."""
    kept = list(kept)
    order = [d for d in yl if d in kept]
    bad = jnp.any(~jnp.isfinite(y), tuple(i for i, d in enumerate(yl) if d not in kept))
    clean = _only(~bad, order, y, yl)
    return clean, jnp.transpose(bad, [order.index(d) for d in kept])


def _spoilt(z: jax.Array, labels: Labels, bad: jax.Array, have: Labels) -> jax.Array:
    order = [d for d in labels if d in have]
    bad = jnp.transpose(bad, [list(have).index(d) for d in order])
    return jnp.where(_along(bad, order, labels, z), np.asarray(np.nan, z.dtype), z)


_WAYS: dict[str, Callable] = {
    "gathered": _gathered,
    "summed": functools.partial(_gathered, product=_terms),
    "one by one": _one_by_one,
    "concatenated": _concatenated,
}


def _jvp(primals: Sequence, tangents: Sequence, *, how: Choice) -> tuple[list, list]:
    (x, y, s), (tx, ty, _) = primals, tangents
    parts = [chosen(tx, y, s, how)] if tx is not None else []
    parts += [chosen(x, ty, s, how)] if ty is not None else []
    total = functools.reduce(lax.add, parts) if parts else None
    return [chosen(x, y, s, how)], [total]


def _transpose(cts: Sequence, x: Any, y: Any, s: jax.Array, *, how: Choice) -> list:
    (ct,) = cts
    if not isinstance(x, jax.Array):
        first, other, labels, like = (how.out, ct), (how.yl, y), how.xl, x
        if not how.sums:  # what has the slots is the second
            first, other = other, first
    else:
        first, other, labels, like = (how.xl, x), (how.out, ct), how.yl, y
    # The transpose is such a sum again: the cotangent takes the place of what is wanted.
    new = dataclasses.replace(
        how,
        xl=first[0],
        yl=other[0],
        out=labels,
        dtype=like.dtype,
        where=compat.explicit_sharding(like),
    )
    d = cast(chosen(first[1], other[1], s, new), like.dtype)
    return [None, d, None] if isinstance(x, jax.Array) else [d, None, None]


def _batch(
    size: int, args: Sequence, batched: Sequence[bool], *, how: Choice
) -> tuple[list, list[bool]]:
    """Another axis is another label, and the way to it is planned anew."""
    x, y, s = args
    of_x, of_y, of_s = batched
    if of_y and of_s and how.sums and how.where is None:  # a stack for each: none is shared
        axes = [0 if one else None for one in batched]
        return jax.vmap(functools.partial(_chosen, how=how), axes)(*args), [True]
    x, of_x = _wide(x, of_x, of_s, size)
    y, of_y = _wide(y, of_y, of_s and not how.sums, size)
    return [chosen(x, y, s, how.mapped(of_x, of_y, of_s))], [True]


def _wide(v: jax.Array, has: bool, needs: bool, size: int) -> tuple[jax.Array, bool]:
    return (lax.broadcast(v, (size,)), True) if needs and not has else (v, has)


_chosen_p = compat.primitive(
    "product_by_slot", _chosen, jvp=_jvp, transpose=_transpose, batch=_batch
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """All that is static of s·(x·A)·B: the product with A, that with B, and the scale."""

    down: Choice
    up: Choice
    scale: float

    def plan(self, x: jax.Array, a: jax.Array, b: jax.Array, s: jax.Array) -> str:
        h = jax.eval_shape(functools.partial(chosen, how=self.down), x, a, s)
        ways = self.down.planned(x, a, s), self.up.planned(h, b, s, x)
        return ", ".join(dict.fromkeys(ways))


def by_slot(
    x: jax.Array,
    s: jax.Array,
    factors: Sequence[tuple[jax.Array, jax.Array]],
    pairs: Sequence[Pair],
) -> list[jax.Array]:
    """s·(x·A)·B for all the (A, B) that multiply one x."""
    flat = compat.same_vma(x, s, *(v for pair in factors for v in pair))
    return _pairs_p.bind(*flat, pairs=tuple(pairs))


def _in_turn(x: jax.Array, s: jax.Array, *ab: jax.Array, pairs: Sequence[Pair]) -> list[jax.Array]:
    def one(pair: Pair, a: jax.Array, b: jax.Array) -> jax.Array:
        return chosen(times(chosen(x, a, s, pair.down), pair.scale), b, s, pair.up)

    return [one(*args) for args in zip(pairs, ab[::2], ab[1::2])]


def _pairs(x: jax.Array, s: jax.Array, *ab: jax.Array, pairs: Sequence[Pair]) -> list[jax.Array]:
    """Where each A is read one by one, a single loop does it for all of them."""
    # A loop for each would read x once for each of its steps.
    loop = all(p.down.planned(x, a, s) == "one by one" for p, a in zip(pairs, ab[::2]))
    if not loop or s.size >= 4 * RUN:
        return _in_turn(x, s, *ab, pairs=pairs)
    downs = [p.down for p in pairs]
    stacks = [jnp.moveaxis(a, how.yl.index(SLOT), 0) for how, a in zip(downs, ab[::2])]
    rows, xl = _rows(x, downs[0].xl, downs[0].sl)
    rest = lambda labels: tuple(d for d in labels if d not in (*downs[0].sl, SLOT))

    def one(_: None, row: tuple) -> tuple[None, list]:
        k, x = row
        own = (lax.dynamic_index_in_dim(a, k, keepdims=False) for a in stacks)
        return None, [
            how.contract(x, xl, m, rest(how.yl), rest(how.out)) for how, m in zip(downs, own)
        ]

    at = jnp.clip(s, 0, downs[0].slots - 1).reshape(-1)
    _, hs = lax.scan(one, None, (at, rows))
    return [
        chosen(times(_in_place(h, s, p.down), p.scale), b, s, p.up)
        for h, b, p in zip(hs, ab[1::2], pairs)
    ]


def _pairs_batch(
    size: int, args: Sequence, batched: Sequence[bool], *, pairs: Sequence[Pair]
) -> tuple[list, list[bool]]:
    x, s, *ab = args
    of_x, of_s, *of_ab = batched
    if any(of_ab):  # a stack for each
        axes = [0 if one else None for one in batched]
        outs = jax.vmap(functools.partial(_in_turn, pairs=pairs), axes)(*args)
    else:
        x, _ = _wide(x, of_x, of_s, size)
        whole = lambda how: how.mapped(True, False, of_s)
        pairs = [Pair(whole(p.down), whole(p.up), p.scale) for p in pairs]
        outs = by_slot(x, s, [*zip(ab[::2], ab[1::2])], pairs)
    return outs, [True] * len(outs)


_pairs_p = compat.primitive("update_by_slot", _pairs, derived=_in_turn, batch=_pairs_batch)
