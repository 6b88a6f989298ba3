"""Products with quantised weights, which write out as little as possible of what they read.

* On TPUs, putting the two halves of each byte side by side writes the weight out several times.
  So the upper halves (the even numbers along the last axis) and the lower ones (the odd numbers)
  have a product each. Then either the two results are put side by side, or x is taken apart.
* A table of many rows, such as a head that is tied to an embedding, is read some rows at a time.

Shapes: x (T, in), W (in, out) in codes, y (T, out); each axis has a label.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._core import compat
from lora_jax._core.einsum import Labels, cast, contract
from lora_jax._quantized.formats import STORED
from lora_jax._quantized.waiting import value
from lora_jax._quantized.weight import Quantized, is_quantized

# A table of LARGE numbers or more, and of TALL rows or more for each column, is read in parts: of
# PART numbers at most each, and at most MOST of them.
LARGE, PART, MOST = 2**24, 2**22, 512
TALL = 4


@dataclasses.dataclass(frozen=True)
class Whole:
    """x·w as one product, `fn(x, w, *given)`: a function that equals one of equal parts."""

    fn: Callable[..., jax.Array]
    given: tuple

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return self.fn(x, w, *self.given)


@dataclasses.dataclass(frozen=True)
class Reading:
    """All that is static of a product with a quantised weight."""

    whole: Whole
    xl: Labels
    wl: Labels
    out: Labels
    params: tuple  # of dot_general, pairs of a name and a value
    base: Any  # the structure of the weight's arrays

    def weight(self, arrays: Sequence[jax.Array]) -> Quantized:
        return jax.tree.unflatten(self.base, arrays)


def dot(
    whole: Whole, x: jax.Array, xl: Labels, w: Any, wl: Labels, out: Labels, **params: Any
) -> jax.Array:
    """The product of x and a weight that may be quantised: `whole(x, array)`, or the same sum in
    halves or by rows. The weight is read when x is there, and for this product alone."""
    if not is_quantized(w):
        return whole(x, value(w, x))
    parts = _parts(w, x)
    # The rows are summed (x has them) or free (the result has them); a batch axis is both.
    if parts > 1 and (_label(w, wl, 0) in xl) != (_label(w, wl, 0) in out):
        return by_rows(x, xl, w, wl, out, parts, **params)
    if not _in_halves(w):
        return whole(x, value(w, x))
    arrays, structure = jax.tree.flatten(w)
    how = Reading(whole, tuple(xl), tuple(wl), tuple(out), tuple(params.items()), structure)
    return coded_dot_p.bind(*compat.same_vma(x, *arrays), how=how)[0]


def _read_as_one(x: jax.Array, *arrays: jax.Array, how: Reading) -> list[jax.Array]:
    return [how.whole(x, value(how.weight(arrays), x))]


def _read_in_halves(x: jax.Array, *arrays: jax.Array, how: Reading) -> list[jax.Array]:
    w = how.weight(arrays)
    return [halves(x, how.xl, w, how.wl, how.out, x, **dict(how.params))]


def _typed(x: jax.Array, *arrays: jax.Array, how: Reading) -> list[jax.Array]:
    w = how.weight(arrays)
    zeros = jnp.zeros(w.shape, w.dtype)
    return [how.whole(*compat.same_vma(x, zeros, *arrays)[:2])]


coded_dot_p = compat.primitive(
    "coded_dot", _read_as_one, typed=_typed, once=True, tpu=_read_in_halves
)


def read_whole(x: jax.Array, w: Any) -> bool:
    """Whether `dot` reads the weight as one array: neither by rows nor, on TPUs, in halves."""
    if not is_quantized(w):
        return True
    return _parts(w, x) == 1 and not (compat.platform(x) == "tpu" and _in_halves(w))


def _in_halves(q: Quantized) -> bool:
    # A padded axis has no whole pairs; one with an explicit sharding cannot be split in two.
    explicit = compat.explicit_sharding(q.codes) is not None
    fmt = STORED[q.format]
    halved = fmt.bits == 4 and not fmt.tiles and q.pad == 0
    return halved and q.order is not None and not explicit


def halves(
    x: jax.Array,
    xl: Labels,
    q: Quantized,
    wl: Labels,
    out: Labels,
    after: jax.Array | None = None,
    **params: Any,
) -> jax.Array:
    """From two products: with the even and with the odd numbers of the last axis."""
    last = _label(q, wl, q.codes.ndim - 1)
    ys = []
    for i, w in enumerate(q.each_half(after)):
        part = x
        if last in xl:
            d = list(xl).index(last)
            # x (..., in, ...) as (..., in / 2, 2, ...): its even numbers, then its odd ones
            pairs = x.reshape(*x.shape[:d], -1, 2, *x.shape[d + 1 :])
            part = lax.index_in_dim(pairs, i, d + 1, keepdims=False)
        ys.append(contract(part, xl, w, wl, out, **params))
    if last not in out:
        return ys[0] + ys[1]
    d = list(out).index(last)
    # two of (..., out / 2, ...) as (..., out / 2, 2, ...), then (..., out, ...)
    y = jnp.stack(ys, d + 1)
    return y.reshape(*y.shape[:d], -1, *y.shape[d + 2 :])


def _label(q: Quantized, wl: Labels, axis: int) -> Hashable:
    """The label of an axis of the codes."""
    assert q.order is not None  # as `_in_halves` and `_parts` have seen
    return wl[q.order.index(axis)]


def _parts(q: Quantized, x: jax.Array) -> int:
    """In how many equal parts of rows a table is read; 1 for what is no table."""
    tiles = STORED[q.format].tiles
    if tiles or q.codes.ndim != 2 or q.order is None or q.read_at is not None:
        return 1
    rows, columns = q.stored
    large = rows * columns >= LARGE and rows >= TALL * columns
    if not large or not compat.one_device(x) or not compat.one_device(q.codes):
        return 1
    fits = (n for n in range(2, MOST + 1) if rows % n == 0 and rows // n * columns <= PART)
    return next(fits, 1)


def by_rows(
    x: jax.Array, xl: Labels, q: Quantized, wl: Labels, out: Labels, parts: int, **params: Any
) -> jax.Array:
    """Each part of the rows gives a part of the result, or a term of it."""
    label, count = _label(q, wl, 0), q.stored[0] // parts
    dtype = params.pop("preferred_element_type", None) or jnp.result_type(x, q.dtype)
    summed = label not in out
    # terms are added in fp32, whatever the result's type
    kept = jnp.promote_types(dtype, jnp.float32) if summed else dtype
    # Constants in codes of their own lie in groups that run across rows: read once, for all.
    q = dataclasses.replace(q, constants=q.block_constants(), second=None)
    size = dict(zip(wl, q.shape)) | dict(zip(xl, x.shape))
    # A carry has one type from the first step on: it varies wherever a term does.
    every = frozenset().union(*map(compat.varying, (x, *jax.tree.leaves(q))))
    start = compat.vary(jnp.zeros([size[d] for d in out], kept), every)

    def some(v: jax.Array, i: jax.Array, axis: int) -> jax.Array:
        return lax.dynamic_slice_in_dim(v, i * count, count, axis)

    def add(i: jax.Array, y: jax.Array) -> jax.Array:
        # Constants per channel have size 1 along the rows where these are the in axis.
        of_rows = lambda v: some(v, i, 0) if v.shape[0] == q.stored[0] else v
        w = jax.tree.map(of_rows, q).value()
        part = some(x, i, list(xl).index(label)) if summed else x
        z = contract(part, xl, w, wl, out, preferred_element_type=kept, **params)
        if summed:
            return y + z
        return lax.dynamic_update_slice_in_dim(y, z, i * count, list(out).index(label))

    return cast(lax.fori_loop(0, parts, add, start), dtype)
