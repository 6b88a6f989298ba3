"""Products with one matrix of a stack for each row, and their derivatives.

A sum by slot, x_t · M[s_t] or the gradient of M, is one primitive; the update of each row's own
factors, s·(x·A)·B, is another. The shapes and the ways to them are in `slot_ways`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from lora_jax._core import compat
from lora_jax._core.einsum import cast, times, wide
from lora_jax._products.plan import RUN
from lora_jax._products.slot_ways import (
    WAYS,
    Choice,
    in_place,
    nearest,
    of_row,
    rows_first,
    slots_first,
)


def chosen(x: jax.Array, y: jax.Array, s: jax.Array, how: Choice) -> jax.Array:
    """The sum Σ x·y·[s = k] of labels `how.out`, differentiable in x and y."""
    return _chosen_p.bind(*compat.same_vma(x, y, s), how=how)[0]


def _chosen(x: jax.Array, y: jax.Array, s: jax.Array, *, how: Choice) -> list[jax.Array]:
    way, dtype = WAYS[how.planned(x, y, s)], how.dtype
    if not how.sums:  # rows are added one after another: in fp32, and rounded once
        how = dataclasses.replace(how, dtype=wide(dtype))
    return [cast(way(x, y, s, how), dtype)]


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
    downs = [slots_first(a, p.down.yl)[0] for p, a in zip(pairs, ab[::2])]
    # Alike for all: the labels of x and of its slots, and how many there are.
    how = pairs[0].down

    def one(row: tuple) -> list:
        x, k = row
        return [of_row(p.down, x, k, a) for p, a in zip(pairs, downs)]

    hs = lax.map(one, (rows_first(x, how.xl, how.sl)[0], nearest(s, how)))
    return [
        chosen(times(in_place(h, s, p.down), p.scale), b, s, p.up)
        for p, h, b in zip(pairs, hs, ab[1::2])
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
