"""Four ways to a sum of rows with one matrix of a stack each, x_t · M[s_t].

Shapes: x (T, in), M (slots, in, out), s (T,) integers, y (T, out). A row of slot -1 is zero, and
one of any other number that has no slot is NaN; a slot that is not finite spoils its own rows
alone. Axes are labelled, as in `group`, so T, in and out are any number of axes.

With the gradient of M, (slots, in, out), it is one sum, Σ x·y·[s = k], over k where y has the
slots, or not where the result has them: the transpose of each kind is the other.
`plan.way_by_slot` takes one of four ways:

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
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax._core import compat
from lora_jax._core.einsum import (
    Labels,
    along,
    cast,
    contract,
    in_order,
    laid_along,
    mapped_label,
    wide,
)
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
        if self.sums:
            inner = [d for d in self.xl if d in self.yl and d not in self.out]
        else:
            inner = [d for d in self.xl if d not in self.yl and d not in self.sl]
        outer = [d for d in self.yl if d != SLOT and d not in self.xl]
        rows = [d for d in self.xl if d not in self.sl and d not in inner]
        return of(self.sl), of(rows), of(inner), of(outer)

    def planned(self, x: Any, y: Any, s: Any, like: Any = None) -> str:
        """The way; `like`: an array that lies as x does, where x is a shape alone."""
        like = x if like is None else like
        # A stack for each row is none that could be looked up in.
        each = {*self.sl} & {*(self.yl if self.sums else self.out)}
        # And a look-up would need to be told the sharding of its result.
        if each or compat.explicit_sharding(s) is not None:
            return "concatenated"
        if self.way != "auto":
            return self.way
        local = all(map(compat.one_device, (like, y, s)))
        itemsize, platform = jnp.dtype(self.dtype).itemsize, compat.platform(like)
        return way_by_slot(*self.sizes(x, y), self.slots, itemsize, platform, local, self.sums)

    def mapped(self, of_x: bool, of_y: bool, of_s: bool) -> Choice:
        """With one axis more in front of the result, and of what has it."""
        new = mapped_label(self.out)
        lead = lambda labels, has=True: (new, *labels) if has else labels
        return dataclasses.replace(
            self,
            xl=lead(self.xl, of_x),
            yl=lead(self.yl, of_y),
            sl=lead(self.sl, of_s),
            out=lead(self.out),
            where=laid_along(self.where, self.out, lead(self.out)),
        )

    def contract(self, x: Any, xl: Labels, y: Any, yl: Labels, out: Labels) -> jax.Array:
        how = dict(precision=self.precision, preferred_element_type=self.dtype)
        return contract(x, xl, y, yl, out, laid_along(self.where, self.out, out), **how)


def _along(v: jax.Array, have: Labels, out: Labels, like: jax.Array) -> jax.Array:
    """v of labels `have` in the shape and, where that is part of types, the sharding of `like`,
    which has the labels `out`."""
    return compat.lying_as(along(v, have, out, like.shape), like)


def _only(where: jax.Array, have: Labels, v: jax.Array, labels: Labels) -> jax.Array:
    """v where `where` is true, and zero elsewhere."""
    return jnp.where(_along(where, have, labels, v), v, jnp.zeros((), v.dtype))


def _without(z: jax.Array, s: jax.Array, how: Choice) -> jax.Array:
    """The result with its rows without a slot: zero for -1, else NaN."""
    # (T,): what stands in a row that no slot is for
    none = jnp.where(s == -1, np.zeros((), z.dtype), np.asarray(np.nan, z.dtype))
    each = lambda v: _along(v, how.sl, how.out, z)
    return jnp.where(each(_exists(s, how)), z, each(none))


def _gathered(
    x: jax.Array, y: jax.Array, s: jax.Array, how: Choice, product: Callable = Choice.contract
) -> jax.Array:
    if how.sums:
        stack, rest = slots_first(y, how.yl)
        each = jnp.take(stack, s, axis=0, mode="clip")
        return _without(product(how, x, how.xl, each, (*how.sl, *rest), how.out), s, how)
    rest = tuple(d for d in how.out if d != SLOT)
    each = how.contract(x, how.xl, y, how.yl, (*how.sl, *rest))
    total = compat.same_vma(jnp.zeros((how.slots, *each.shape[s.ndim :]), each.dtype), each)[0]
    # past the end nothing is written
    total = total.at[jnp.where(s < 0, how.slots, s)].add(each, mode="drop")
    return in_order(total, (SLOT, *rest), how.out)


def _terms(
    how: Choice, x: jax.Array, xl: Labels, y: jax.Array, yl: Labels, out: Labels
) -> jax.Array:
    """x·y as a sum of as many arrays as the axes that are summed have elements."""
    summed = [d for d in xl if d in yl and d not in out]

    def parts(v: jax.Array, labels: Labels) -> Iterator[jax.Array]:
        order = [*summed, *(d for d in out if d in labels)]
        v = cast(in_order(v, labels, order), wide(how.dtype))
        rest = v.shape[len(summed) :]
        where = [list(out).index(d) for d in order[len(summed) :]]
        return (lax.broadcast_in_dim(part, shape, where) for part in v.reshape(-1, *rest))

    size = dict(zip(xl, x.shape)) | dict(zip(yl, y.shape))
    shape = [size[d] for d in out]
    terms = map(lax.mul, parts(x, xl), parts(y, yl))
    return cast(functools.reduce(lax.add, terms), how.dtype)


def _one_by_one(x: jax.Array, y: jax.Array, s: jax.Array, how: Choice) -> jax.Array:
    if not how.sums:
        return _added_one_by_one(x, y, s, how)
    (x, _), (stack, _), at = rows_first(x, how.xl, how.sl), slots_first(y, how.yl), nearest(s, how)

    def each(x: jax.Array, at: jax.Array) -> jax.Array:
        return lax.map(lambda row: of_row(how, row[0], row[1], stack), (x, at))

    def run(x: jax.Array, at: jax.Array) -> jax.Array:
        # of packed sequences most runs are of one slot
        one = lambda x, at: of_row(how, x, at[0], stack, ("row",))
        return lax.cond(jnp.all(at == at[0]), one, each, x, at)

    if len(at) >= 4 * RUN and len(at) % RUN == 0:
        runs = tuple(v.reshape(-1, RUN, *v.shape[1:]) for v in (x, at))
        return in_place(lax.map(lambda rows: run(*rows), runs), s, how)
    return in_place(each(x, at), s, how)


def _added_one_by_one(x: jax.Array, y: jax.Array, s: jax.Array, how: Choice) -> jax.Array:
    """The gradient of the stack: each row's product is added to its slot's."""
    (x, xl), (y, yl) = rows_first(x, how.xl, how.sl), rows_first(y, how.yl, how.sl)
    out = tuple(d for d in how.out if d != SLOT)

    def add(total: jax.Array, row: tuple) -> tuple[jax.Array, None]:
        x, y, k, exists = row
        z = how.contract(x, xl, y, yl, out)
        z = jnp.where(exists, z, jnp.zeros((), z.dtype))
        new = lax.dynamic_index_in_dim(total, k, keepdims=False) + z
        return lax.dynamic_update_index_in_dim(total, new, k, 0), None

    size = dict(zip(yl, y.shape[1:])) | dict(zip(xl, x.shape[1:]))
    total = jnp.zeros((how.slots, *(size[d] for d in out)), how.dtype)
    total = compat.same_vma(total, x, y, s)[0]
    rows = x, y, nearest(s, how), _exists(s, how).reshape(-1)
    return in_order(lax.scan(add, total, rows)[0], (SLOT, *out), how.out)


def of_row(
    how: Choice, x: jax.Array, k: jax.Array, stack: jax.Array, many: tuple = ()
) -> jax.Array:
    """x·M[k] of one row, or of `many` rows of one slot, without the labels of the rows."""
    rest = lambda labels: tuple(d for d in labels if d not in how.sl and d != SLOT)
    m = lax.dynamic_index_in_dim(stack, k, keepdims=False)
    return how.contract(x, (*many, *rest(how.xl)), m, rest(how.yl), (*many, *rest(how.out)))


def nearest(s: jax.Array, how: Choice) -> jax.Array:
    """The slot that is read for each row, (T,), also where there is none."""
    return jnp.clip(s, 0, how.slots - 1).reshape(-1)


def _exists(s: jax.Array, how: Choice) -> jax.Array:
    return (s >= 0) & (s < how.slots)


def in_place(z: jax.Array, s: jax.Array, how: Choice) -> jax.Array:
    """The result from one for each row, (T, …) or (T / RUN, RUN, …)."""
    rest = [d for d in how.out if d not in how.sl]
    z = z.reshape(*s.shape, *z.shape[z.ndim - len(rest) :])
    return _without(in_order(z, [*how.sl, *rest], how.out), s, how)


def rows_first(x: jax.Array, xl: Labels, sl: Labels) -> tuple[jax.Array, tuple]:
    """x with the axes of the slots' rows in front, as one, and the labels of the rest."""
    rest = tuple(d for d in xl if d not in sl)
    x = in_order(x, xl, (*sl, *rest))
    return x.reshape(-1, *x.shape[len(sl) :]), rest


def slots_first(y: jax.Array, yl: Labels) -> tuple[jax.Array, tuple]:
    """y with the axis of the slots in front, and the labels of the rest."""
    rest = tuple(d for d in yl if d != SLOT)
    return in_order(y, yl, (SLOT, *rest)), rest


def _concatenated(x: jax.Array, y: jax.Array, s: jax.Array, how: Choice) -> jax.Array:
    hot = s[..., None] == jnp.arange(how.slots, dtype=s.dtype)
    hl = (*how.sl, SLOT)
    _, _, inner, outer = how.sizes(x, y)
    if not how.sums:
        (x, xl), (y, yl) = (x, how.xl), (y, how.yl)
        if compat.less(outer, inner):  # the smaller one is written once for each slot
            (x, xl), (y, yl) = (y, yl), (x, xl)
        y, bad, bl = _finite(y, yl, how.sl)
        z = how.contract(*_by_slot(x, xl, hot, hl), y, yl, how.out)
        # (T, slots) to (slots,): whose rows were not finite
        met = hot & _along(bad, bl, hl, hot)
        gone = tuple(i for i, d in enumerate(hl) if d not in how.out)
        return _spoilt(z, how.out, jnp.any(met, gone), [d for d in hl if d in how.out])
    if not compat.less(inner, outer):
        # x·M for each slot, (T, slots, out), of which one is kept; out is the smaller
        full = (*how.out, SLOT)
        z = how.contract(x, how.xl, y, how.yl, full)
        z = jnp.sum(_only(hot, hl, z, full), -1)
        return _without(z, s, how)
    y, bad, bl = _finite(y, how.yl, hl)
    z = how.contract(*_by_slot(x, how.xl, hot, hl), y, how.yl, how.out)
    # (T, slots) to (T,): rows of a slot that is not finite
    met = jnp.any(hot & _along(bad, bl, hl, hot), -1)
    return _without(_spoilt(z, how.out, met, how.sl), s, how)


def _by_slot(x: jax.Array, xl: Labels, hot: jax.Array, hl: Labels) -> tuple[jax.Array, tuple]:
    """x at each row's own slot, (T, slots, in), zero at the others."""
    wide = lax.broadcast_in_dim(x, (*x.shape, hot.shape[-1]), range(x.ndim))
    labels = (*xl, SLOT)
    return _only(hot, hl, wide, labels), labels


def _finite(y: jax.Array, yl: Labels, kept: Labels) -> tuple[jax.Array, jax.Array, Labels]:
    """y with zeros along `kept` where a part of it is not finite; where that is, and the labels of
    that. 0 times NaN would be NaN in the rows of others."""
    have = [d for d in yl if d in kept]
    bad = jnp.any(~jnp.isfinite(y), tuple(i for i, d in enumerate(yl) if d not in kept))
    return _only(~bad, have, y, yl), bad, have


def _spoilt(z: jax.Array, labels: Labels, bad: jax.Array, have: Labels) -> jax.Array:
    return jnp.where(_along(bad, have, labels, z), np.asarray(np.nan, z.dtype), z)


WAYS: dict[str, Callable] = {
    "gathered": _gathered,
    "summed": functools.partial(_gathered, product=_terms),
    "one by one": _one_by_one,
    "concatenated": _concatenated,
}
