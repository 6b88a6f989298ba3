"""Double quantisation: the constants of blocks in codes of 8 bits (arXiv:2305.14314, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core import compat
from lora_jax._quantized.formats import by_halving, looked_up

SECOND = 256  # constants that share one of their own, with double quantisation


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


def _looked_up(codes: jax.Array) -> list[jax.Array]:
    return [looked_up(dynamic_map(), codes)]


def _by_halves(codes: jax.Array) -> list[jax.Array]:
    # The map is odd about 127, but for the last entry, 1.
    far = jnp.where(codes < 127, 127 - codes, codes - 127)
    # Entries 127 to 254 are zero and what is above it, a power of two of them; 1 is the last.
    of = jnp.where(far == 128, np.float32(1), by_halving(dynamic_map()[127:255], far))
    return [jnp.where(codes < 127, -of, of)]


dynamic_p = compat.primitive("level_dynamic", _looked_up, tpu=_by_halves)


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


def undoubled(
    codes: jax.Array, second: tuple[jax.Array, ...], shape: Sequence[int], stack: int
) -> jax.Array:
    """The constants, of `shape`, from their codes."""
    top, mean = second
    lead, rest = shape[:stack], shape[stack:]
    # (*stack, groups, 256) · (*stack, groups, 1), without the padding of the last group
    flat = dynamic_level(codes) * top[..., None]
    flat = flat.reshape(*lead, -1)[..., : math.prod(rest)] + mean[..., None]
    return flat.reshape(shape)
