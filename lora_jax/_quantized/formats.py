"""Number formats of a quantised weight: blocks along its last axis, each with a constant.

A block of n numbers is stored as n codes and c = max|w|, and read as level(code) · c. Codes of four
bits lie two in a byte, the first one in the upper half, as in bitsandbytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax._core import compat

SECOND = 256  # constants that share one of their own, with double quantisation

# NF4 (arXiv:2305.14314, appendix E): quantiles of N(0, 1), scaled to [-1, 1], with an exact zero.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip

# E2M1 (OCP Microscaling Formats v1.0, 5.3.3): sign, two bits of exponent, one of mantissa; by 6.
E2M1 = tuple(x / 6 for x in (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6))
# The same by their bits, sign first, as NVFP4 has them.
E2M1_BITS = tuple(s * x for s in (1.0, -1.0) for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6))


@dataclasses.dataclass(frozen=True)
class Format:
    """How the numbers of a block are stored.

    Attributes:
      name: such as "nf4".
      block: how many numbers share a constant; None: all of an output unit (per channel).
      levels: the values of the codes of a format of four bits; else None.
      dtype: of the codes, where they are numbers: level(code) = code / top.
      top: the largest code.
      power: whether constants are powers of two, of 8 bits (times 6, the largest level).
      whole: whether constants are E4M3, times one fp32 number of the whole weight.
      parts: how many numbers stand for a constant: 2, scale and offset, w = level(code)·d + m; 16,
        bytes of Q4_K for eight blocks, see `_scales`.
      tiles: whether constants, of the weight's number of axes, stand for equal parts of any of
        them: w = (level(code) − zero) · c, computed in c's type.
    """

    name: str
    block: int | None
    levels: tuple[float, ...] | None = None
    dtype: Any = None
    top: float = 1.0
    power: bool = False
    whole: bool = False
    parts: int = 1
    tiles: bool = False

    @property
    def bits(self) -> int:
        return 4 if self.levels is not None else 8 * jnp.dtype(self.dtype).itemsize

    def holds(self, codes: Any, constants: Any, *second: Any) -> bool:
        """Whether a weight is kept in arrays of these types; see `Quantized`."""
        is_float = compat.is_float_type
        if not all(map(is_float, second)):
            return False
        if self.tiles and self.levels is None:
            own = codes == jnp.int8 or is_float(codes)
        else:
            own = codes == (self.dtype or jnp.uint8)
        if self.parts == 16:
            more = constants == jnp.uint8 and not second
        elif self.power:
            more = constants == jnp.float8_e8m0fnu and not second
        elif self.whole:  # or what both stand for, in fp32
            more = is_float(constants) and len(second) == (constants == jnp.float8_e4m3fn)
        elif second and not self.tiles:
            more = constants == jnp.uint8 and len(second) == 2 and self.name in FORMATS
            more = more and self.block is not None
        else:
            more = is_float(constants) and len(second) < 2
        return own and more


_INT4 = tuple(i / 7 for i in range(-7, 8))

FORMATS = {
    f.name: f
    for f in (
        Format("nf4", 64, NF4),
        Format("int4", 64, _INT4),
        Format("mxfp4", 32, E2M1, power=True),
        Format("nvfp4", 16, E2M1_BITS, whole=True),
        Format("int8", None, dtype=jnp.int8, top=127.0),
        Format("int8_block", 64, dtype=jnp.int8, top=127.0),
        Format("fp8", None, dtype=jnp.float8_e4m3fn, top=448.0),
        Format("fp8_block", 64, dtype=jnp.float8_e4m3fn, top=448.0),
    )
}

# Those of GGUF files (llama.cpp, ggml-quants.c) are read, and not made: levels and codes are whole
# numbers, and constants are fp16.
STORED = FORMATS | {
    f.name: f
    for f in (
        Format("q4_0", 32, tuple(float(i) for i in range(-8, 8))),
        Format("q4_1", 32, tuple(float(i) for i in range(16)), parts=2),
        Format("q8_0", 32, dtype=jnp.int8),
        Format("q4_k", 32, tuple(float(i) for i in range(16)), parts=16),
        # of qwix: codes of 8 bits as they are, those of 4 bits by their bits
        Format("qwix", None, dtype=jnp.int8, tiles=True),
        Format("qwix_int4", None, tuple(float((i + 8) % 16 - 8) for i in range(16)), tiles=True),
        Format("qwix_nf4", None, NF4, tiles=True),
        Format("qwix_e2m1", None, E2M1_BITS, tiles=True),
    )
}


def decode(fmt: Format, codes: jax.Array, constants: jax.Array, dtype: Any) -> jax.Array:
    """The numbers: codes (..., n, block) and constants (..., n), or what `parts` says, give
    (..., n, block), computed in fp32."""
    constants, offset = _scales(fmt, constants)
    if fmt.levels is not None:
        unit = level(fmt.levels, codes)
    else:
        unit = codes.astype(jnp.float32) * (1 / fmt.top)
    w = unit * constants[..., None]
    return (w if offset is None else w + offset[..., None]).astype(dtype)


def level(levels: Sequence[float], codes: jax.Array) -> jax.Array:
    """The levels of codes of four bits, in fp32: looked up on GPUs, where the compiler writes out
    what halving has on the way, by halving elsewhere, where it writes out what a look-up has."""
    # A value for each of 16 codes: int4 and E2M1 have 15 levels, and nothing writes the last.
    return level_p.bind(codes, levels=(*levels, *(math.nan,) * (16 - len(levels))))[0]


def looked_up(levels: Sequence[float] | np.ndarray, codes: jax.Array) -> jax.Array:
    """The levels of codes, of as many bits as there are levels for."""
    table, where = jnp.asarray(np.asarray(levels, np.float32)), compat.explicit_sharding(codes)
    return table.at[codes].get(out_sharding=where, mode="promise_in_bounds")


def _by_halving(levels: Sequence[float] | np.ndarray, codes: jax.Array) -> jax.Array:
    # Each bit of the code, from the lowest, chooses within pairs of neighbours: 16 values are
    # 8, then 4, 2 and 1.
    values: list = [np.float32(x) for x in levels]
    bit = 0
    while len(values) > 1:
        odd = (codes >> bit & 1) == 1
        values = [jnp.where(odd, *pair) for pair in zip(values[1::2], values[::2])]
        bit += 1
    return values[0]


_look_up: Callable = lambda codes, levels: [looked_up(levels, codes)]
level_p = compat.primitive(
    "level", lambda codes, levels: [_by_halving(levels, codes)], cuda=_look_up, rocm=_look_up
)


def _scales(fmt: Format, constants: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """(scale, offset or None) of each block, in fp32."""
    if fmt.parts == 1:
        return constants.astype(jnp.float32) * (6 if fmt.power else 1), None
    # (..., blocks, 2), or for Q4_K (..., groups of eight blocks, 16 bytes)
    each = constants.reshape(*constants.shape[:-1], -1, fmt.parts)
    if fmt.parts == 2:
        return each[..., 0].astype(jnp.float32), each[..., 1].astype(jnp.float32)
    # Two fp16, of scales and of minima, and 6 bits for either of each block: 4 of them in whole
    # bytes, whose upper 2 bits are those of the other 4.
    halves = lax.bitcast_convert_type(each[..., :4].reshape(*each.shape[:-1], 2, 2), "float16")
    low, high, both = each[..., 4:8], each[..., 8:12], each[..., 12:]
    scales = jnp.concatenate([low & 63, (both & 15) | (low >> 6 << 4)], -1)
    minima = jnp.concatenate([high & 63, (both >> 4) | (high >> 6 << 4)], -1)
    # (..., groups, 1) · (..., groups, 8) as (..., blocks)
    scales, minima = (
        (halves[..., i, None].astype(jnp.float32) * x.astype(jnp.float32)).reshape(
            *constants.shape[:-1], -1
        )
        for i, x in enumerate((scales, minima))
    )
    # Q4_K is w = scale · code − minimum.
    return scales, -minima


def unpack(packed: jax.Array) -> jax.Array:
    """(..., n / 2) as (..., n). Halves that are chosen fuse, and those that are stacked do not."""
    twice = jnp.broadcast_to(packed[..., None], (*packed.shape, 2)).reshape(*packed.shape[:-1], -1)
    upper = lax.broadcasted_iota(
        jnp.int32, twice.shape, twice.ndim - 1, out_sharding=compat.explicit_sharding(twice)
    )
    return jnp.where(upper % 2 == 0, twice >> 4, twice & 15)


def dynamic_map() -> np.ndarray:
    """The 256 values of the 8-bit dynamic data type (Dettmers 2016, arXiv:1511.04561), ascending:
    ±10^(i-6) times the centres of 2^i equal parts of [0.1, 1], i = 0 … 6, and 0 and 1; to the bit
    those of bitsandbytes, where the edges are torch's `linspace`.

    >>> dynamic_map().shape, float(dynamic_map()[-1])
    ((256,), 1.0)
    """
    f32, values = np.float32, [0.0, 1.0]
    for i in range(7):
        n = 2**i
        step, k = float((f32(1) - f32(0.1)) / f32(n)), np.arange(n + 1)
        # from the nearer end, rounded once
        edges = np.where(k < (n + 1) // 2, float(f32(0.1)) + step * k, 1 - step * (n - k))
        edges = edges.astype(f32)
        centres = (edges[1:] + edges[:-1]) / f32(2) * f32(10.0 ** (i - 6))
        values += [*centres, *-centres]
    return np.sort(np.asarray(values, np.float32))


def dynamic_level(codes: jax.Array) -> jax.Array:
    """The entries of `dynamic_map`: looked up, but on TPUs, which write out what that has."""
    return dynamic_p.bind(codes)[0]


def _dynamic_looked_up(codes: jax.Array) -> list[jax.Array]:
    return [looked_up(dynamic_map(), codes)]


def _dynamic_by_halving(codes: jax.Array) -> list[jax.Array]:
    # The map is odd about 127, but for the last entry, 1.
    far = jnp.where(codes < 127, 127 - codes, codes - 127)
    # Entries 127 to 254 are zero and what is above it, a power of two of them; 1 is the last.
    of = jnp.where(far == 128, np.float32(1), _by_halving(dynamic_map()[127:255], far))
    return [jnp.where(codes < 127, -of, of)]


dynamic_p = compat.primitive("level_dynamic", _dynamic_looked_up, tpu=_dynamic_by_halving)


def block_sizes(size: int, block: int | None) -> tuple[int, int]:
    """(number of blocks, numbers in each) of an axis."""
    block = size if block is None else block
    return math.ceil(size / block), block


def undoubled(
    codes: jax.Array, second: tuple[jax.Array, ...], shape: Sequence[int], stack: int
) -> jax.Array:
    """The constants, of `shape`, from their codes."""
    top, mean = (x.astype(jnp.float32) for x in second)
    lead, rest = shape[:stack], shape[stack:]
    # (*stack, groups, 256) · (*stack, groups, 1), without the padding of the last group
    flat = dynamic_level(codes) * top[..., None]
    flat = flat.reshape(*lead, -1)[..., : math.prod(rest)] + mean[..., None]
    return flat.reshape(shape)


def read_tiles(
    fmt: Format, codes: jax.Array, constants: jax.Array, zero: jax.Array | None, last: int
) -> jax.Array:
    """The weight from constants, and numbers that stand for zero, of equal parts of its axes."""
    if fmt.levels is not None:
        codes = level(fmt.levels, unpack(codes)[..., :last])
    w = codes.astype(constants.dtype)
    w = w if zero is None else _by_tiles(lax.sub, w, zero.astype(w.dtype))
    return _by_tiles(lax.mul, w, constants)


def _by_tiles(op: Callable, w: jax.Array, of: jax.Array) -> jax.Array:
    """op(w, of): n of axis d are d / n of `of`."""
    pairs = [(n, d // n) for d, n in zip(w.shape, of.shape)]
    parts = w.reshape([n for pair in pairs for n in pair])
    of = of.reshape([n for pair in pairs for n in (pair[0], 1)])
    return op(parts, jnp.broadcast_to(of, parts.shape)).reshape(w.shape)


def read(
    fmt: Format, codes: jax.Array, constants: jax.Array, shape: Sequence[int], dtype: Any
) -> jax.Array:
    """The weight of `shape` from codes (..., n), or (..., n / 2), and constants (..., blocks)."""
    if fmt.block is None:
        # Per channel: constants of size 1 along the in axes, against the codes as they lie.
        scale = constants.astype(jnp.float32) * (1 / fmt.top)
        return (codes.astype(jnp.float32) * scale).astype(dtype)
    codes = unpack(codes) if fmt.bits == 4 else codes
    n, block = block_sizes(shape[-1], fmt.block)
    w = decode(fmt, codes.reshape(*shape[:-1], n, block), constants, dtype)
    return w.reshape(*shape[:-1], n * block)[..., : shape[-1]]
