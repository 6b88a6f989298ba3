"""Products with weights of four bits, on TPUs without putting the two halves of a byte together.

There, to put neighbours side by side is to write the weight out, several times over. So the upper
and the lower halves, which are the even and the odd numbers along the last axis, each have a
product of their own, and what is put together is the result, or taken apart is x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from lora_jax import _compat
from lora_jax._einsum import Labels, contract
from lora_jax._formats import STORED
from lora_jax._quantized import Quantized, is_quantized, value


def dot(whole: Callable, x, xl: Labels, w: Any, wl: Labels, out: Labels, after, **params):
    """The product of x and a weight that may be quantised: `whole(x, array)`, or, on TPUs, where
    it can be, the same sum in halves. `after` as in `value`."""
    if not is_quantized(w) or not _apart(w):
        return whole(x, value(w, after))
    return lax.platform_dependent(
        x,
        w,
        tpu=lambda x, w: halves(x, xl, w, wl, out, after, **params),
        default=lambda x, w: whole(x, value(w, after)),
    )


def _apart(q: Quantized) -> bool:
    explicit = _compat.explicit_sharding(q.codes) is not None
    return STORED[q.format].bits == 4 and q.pad == 0 and q.order is not None and not explicit


def halves(x, xl: Labels, q: Quantized, wl: Labels, out: Labels, after=None, **params):
    """The same from two products: with the even and with the odd numbers of the last axis."""
    last = wl[q.order.index(q.codes.ndim - 1)]
    ys = []
    for i, w in enumerate(q.each_half(after)):
        part = x
        if last in xl:
            d = list(xl).index(last)
            pairs = x.reshape(*x.shape[:d], -1, 2, *x.shape[d + 1 :])
            part = lax.index_in_dim(pairs, i, d + 1, keepdims=False)
        ys.append(contract(part, xl, w, wl, out, **params))
    if last not in out:
        return ys[0] + ys[1]
    d = list(out).index(last)
    y = jnp.stack(ys, d + 1)
    return y.reshape(*y.shape[:d], -1, *y.shape[d + 2 :])
