"""The low-rank contraction: x·(scale·A·B) as two small products, never through A·B."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._einsum import Labels, cast, contract, times
from lora_jax._weight import RANK, SEED_IMPL, AdaptedWeight, Factor


def low_rank(
    x: jax.Array,
    xl: Labels,
    w: AdaptedWeight,
    wl: Sequence[Hashable],
    out: Labels,
    use: int,
    **params: Any,
) -> jax.Array:
    """The update's part of a contraction of `x` with the weight, of labels `out`.

    `xl` labels x's axes, `wl[d]` is the label of the weight's axis d. The factor that makes the
    cheaper first product comes first: A for x·W, B for x·Wᵀ.
    """
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else w.dtype
    x = dropout(cast(x, dtype), w, use)
    label = dict(enumerate(wl)) | {RANK: "rank"}
    size = {d: n for d, n in zip(xl, x.shape)}
    for f in (w.a, w.b):
        size |= {label[d]: n for d, n in zip(f.dims, f.value.shape)}
    plans = [_Order(xl, f, s, label, out, size) for f, s in ((w.a, w.b), (w.b, w.a))]
    best = min(plans, key=lambda p: p.flops)
    return best(x, xl, w.scale, out, dtype, params)


class _Order:
    """x·first·second, and what it costs."""

    def __init__(self, xl, first: Factor, second: Factor, label, out, size):
        self.first, self.second, self.size = first, second, size
        self.fl = tuple(label[d] for d in first.dims)
        self.sl = tuple(label[d] for d in second.dims)
        self.hl = tuple(d for d in dict.fromkeys([*xl, *self.fl]) if d in out or d in self.sl)
        flops = [
            math.prod(size[d] for d in {*a, *b}) for a, b in ((xl, self.fl), (self.hl, self.sl))
        ]
        self.flops = sum(flops)

    def __call__(self, x, xl, scale, out, dtype, params):
        first, second = cast(self.first.value, dtype), cast(self.second.value, dtype)
        hl = self.hl
        # The scale goes to whichever of x·A, A and B is smallest.
        sizes = [math.prod(self.size[d] for d in hl), first.size, second.size]
        where = sizes.index(min(sizes))
        first = times(first, scale) if where == 1 else first
        second = times(second, scale) if where == 2 else second
        h = contract(x, xl, first, self.fl, hl, precision=params.get("precision"))
        h = times(h, scale) if where == 0 else h
        have = tuple(d for d in out if d in hl or d in self.sl)
        y = contract(h, hl, second, self.sl, have, **params)
        if have != tuple(out):  # the update is constant along an axis of size 1 that grew
            y = lax.expand_dims(y, [i for i, d in enumerate(out) if d not in have])
        return y


def dropout(x: jax.Array, w: AdaptedWeight, use: int) -> jax.Array:
    """Inverted dropout on the branch's input; its mask is of the weight, its stack and the use."""
    if w.seed is None or not w.dropout:
        return x
    data = w.seed.sorted().value
    key = jax.random.wrap_key_data(data.reshape(-1, data.shape[-1])[0], impl=SEED_IMPL)
    keep = jax.random.bernoulli(jax.random.fold_in(key, use), 1 - w.dropout, x.shape)
    return jnp.where(keep, x / (1 - w.dropout), jnp.zeros_like(x))
