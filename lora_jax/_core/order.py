"""When a value is made: not before another one is there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax._core import compat


def tied(x: jax.Array, codes: jax.Array) -> jax.Array:
    """`codes`, but not before `x` is there; see `after`, which this is for integers."""
    if not x.size or not compat.one_device(x) or not compat.one_device(codes):
        return lax.optimization_barrier((x, codes))[1]
    first = lax.squeeze(lax.slice(x, [0] * x.ndim, [1] * x.ndim), range(x.ndim))
    bits = lax.bitcast_convert_type(first, np.dtype(f"int{8 * x.dtype.itemsize}"))
    zero = np.zeros((), bits.dtype)
    unseen = lax.clamp(zero, bits, zero)  # 0, which XLA does not foresee
    raw = codes if jnp.issubdtype(codes.dtype, jnp.integer) else lax.bitcast_convert_type(
        codes, jnp.uint8
    )  # fmt: skip
    raw = raw + lax.convert_element_type(unseen, raw.dtype)
    return raw if raw.dtype == codes.dtype else lax.bitcast_convert_type(raw, codes.dtype)


def after(x, a):
    """`a`, but not before `x` is there.

    XLA drops optimization barriers on the CPU before it schedules; so `a` is multiplied by a one
    that it does not foresee, a clamp of the bits of one element of x between 1 and 1. Of a sharded
    x that element would have to be sent around; there a barrier has to do.
    """
    if not x.size or not compat.one_device(x):
        return lax.optimization_barrier((x, a))[1]
    first = lax.squeeze(lax.slice(x, [0] * x.ndim, [1] * x.ndim), range(x.ndim))
    bits = lax.bitcast_convert_type(first, np.dtype(f"int{8 * x.dtype.itemsize}"))
    one = np.ones((), bits.dtype)
    return lax.mul(a, lax.convert_element_type(lax.clamp(one, bits, one), a.dtype))
