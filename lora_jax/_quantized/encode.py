"""Numbers to codes: blocks with their constants, and constants that are quantised again.

Shapes: w (..., block), codes (..., block), constants (...).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax._quantized.formats import E2M1_BITS, SECOND, Format, dynamic_map, looked_up


def encode(fmt: Format, w: jax.Array, scale: Any = 1.0) -> tuple[jax.Array, jax.Array]:
    """(codes, constants) of blocks: w (..., block) gives (..., block) and (...); `scale` as from
    `whole_scale`, with as many axes as the constants.

    The constant of a block that holds NaN or infinity is NaN, and so is all that is read of it.
    """
    w, largest = _exactly(w), most(w.dtype)
    top = _top(w)
    if fmt.whole:
        # by reciprocals, written out: a quotient of arrays that are broadcast may be one or not
        constants = _e4m3(top * np.float32(1 / 6) * (1 / scale))
        step = constants * scale
        unit = jnp.abs(w) * jnp.where(step > 0, 1 / step, 0)[..., None]
        sign = jnp.where(jnp.signbit(w), 8, 0).astype(jnp.uint8)
        return _nearest(E2M1_BITS[:8], unit, even=True) | sign, constants.astype(jnp.float8_e4m3fn)
    if fmt.power:
        assert fmt.levels is not None  # as such a format has
        power, down = _power(top, largest)
        # E2M1 as it is, not by 6: then no product is rounded, and half way is half way
        codes = _nearest([6 * x for x in fmt.levels], jnp.clip(w * down[..., None], -6, 6))
        return codes, power.astype(jnp.float8_e8m0fnu)
    # 1 / top, by which bitsandbytes multiplies, is subnormal beyond 2^126, and flushed to zero
    down = jnp.where(top > 2.0**126, 0.25, 1.0).astype(jnp.float32)[..., None]
    # at least the smallest normal number: 1 over a subnormal one is infinite, and 0 times that NaN
    unit = w * down * (1.0 / (jnp.maximum(top, 2.0**-126)[..., None] * down))
    if fmt.levels is not None:
        return _nearest(fmt.levels, jnp.clip(unit, -1, 1)), top
    whole = jnp.issubdtype(fmt.dtype, jnp.integer)
    return (jnp.round if whole else _e4m3)(unit * fmt.top).astype(fmt.dtype), top


def most(dtype: Any) -> float:
    """The largest number of a type, and of fp32, in which codes are read."""
    return min(float(jnp.finfo(dtype).max), float(np.finfo(np.float32).max))


def _power(top: jax.Array, largest: float) -> tuple[jax.Array, jax.Array]:
    """The least power of two by which 6, the largest level, reaches a block's maximum, or the
    largest by which 6 is still a number of the weight's type; NaN of NaN. And 1 over it."""
    # By the bits of top = m·2^e, 1 ≤ m < 2: 2^(e − 2), and 2^(e − 1) where m > 1.5 carries.
    bits = lax.bitcast_convert_type(jnp.maximum(top, 2.0**-120), jnp.int32)
    bits = (bits + ((1 << 22) - 1) >> 23) - 2
    bits = jnp.minimum(bits, 127 + math.floor(math.log2(largest / 6)))
    # written out: neither is exact by exp2, and a quotient by more than 2^126 is zero
    power, down = (lax.bitcast_convert_type(x << 23, jnp.float32) for x in (bits, 254 - bits))
    return jnp.where(jnp.isnan(top), jnp.nan, power), down


def _exactly(w: jax.Array) -> jax.Array:
    """w in fp32, of the values that its type has. XLA leaves out casts to a narrower float and
    back, and what is read where it was made would not be what is stored."""
    bits = jnp.finfo(w.dtype).nmant
    wide = w.astype(jnp.float32)
    return lax.reduce_precision(wide, 8, bits) if bits < 23 else wide


def _e4m3(x: jax.Array) -> jax.Array:
    """The nearest number of float8_e4m3fn, |x| ≤ 448, as its cast gives it; see `_exactly`."""
    # Below 2^-6 they are multiples of 2^-9, above they have three bits after the first.
    small = jnp.round(x * 512) * np.float32(1 / 512)
    return jnp.where(jnp.abs(x) < 2.0**-6, small, lax.reduce_precision(x, 8, 3))


def whole_scale(w: jax.Array, stack: int) -> jax.Array:
    """The fp32 number of each weight of a stack, of blocks (*stack, ..., block): (*stack,). By it
    the largest block's constant is 448, the largest of E4M3, where its largest code is 6."""
    top = _top(_exactly(w))
    top = jnp.where(jnp.isnan(top), 0, top)  # a block that is not finite spoils no other
    return jnp.maximum(jnp.max(top, range(stack, top.ndim)) * np.float32(1 / 2688), 2.0**-100)


def _top(w: jax.Array) -> jax.Array:
    """max|w| of each block, NaN where it is not finite."""
    # said in so many words: the maximum that XLA computes on CPUs may pass over a NaN
    return jnp.where(jnp.isfinite(w).all(-1), jnp.max(jnp.abs(w), -1), jnp.nan)


def _nearest(levels: Sequence[float], x: jax.Array, even: bool = False) -> jax.Array:
    """The number of the nearest level; half way, the lower one or, as a cast does, the even one."""
    values = np.asarray(levels, np.float32)
    # middle[i] is the border between levels i and i + 1.
    middle = (values[1:] + values[:-1]) / 2
    if even:
        # above an odd number half way is up: the bound is the number before it
        middle[1::2] = np.nextafter(middle[1::2], np.float32(0))
    # To compare with all of so few is twelve times as fast as to search, and takes no memory.
    return jnp.searchsorted(jnp.asarray(middle), x, method="compare_all").astype(jnp.uint8)


def pack(codes: jax.Array) -> jax.Array:
    """Two codes of four bits in a byte: (..., n) as (..., n / 2)."""
    return (codes[..., ::2] << 4) | codes[..., 1::2]


def doubled(
    constants: jax.Array, stack: int, largest: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """8 bits for each constant less their mean (arXiv:2305.14314, section 3), in groups of 256;
    none is read as more than the largest number of the weight's type."""
    lead = constants.shape[:stack]
    # All constants of one weight in a row, cut into groups without regard to its axes.
    flat = constants.reshape(*lead, -1)
    # a sum of the largest numbers is none: by a power of two less
    down = jnp.where(jnp.max(flat, -1) > 2.0**64, 2.0**-64, 1.0).astype(flat.dtype)
    mean = jnp.mean(flat * down[..., None], -1) / down
    flat = flat - mean[..., None]
    more = -flat.shape[-1] % SECOND
    groups = jnp.pad(flat, [(0, 0)] * stack + [(0, more)]).reshape(*lead, -1, SECOND)
    top = jnp.max(jnp.abs(groups), -1)
    levels = dynamic_map()
    middle = jnp.asarray((levels[1:] + levels[:-1]) / 2)
    unit = groups / jnp.maximum(top, 1e-38)[..., None]
    codes = jnp.searchsorted(middle, unit)
    over = looked_up(levels, codes) * top[..., None] > largest - mean[..., None, None]
    return codes.astype(jnp.uint8) - over.astype(jnp.uint8), (top, mean)
