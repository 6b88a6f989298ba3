"""The arrays of a quantised weight: constants quantised twice, and how codes are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._quantized.formats import (
    Format,
    blocks_of,
    decode,
    dynamic_look_up,
    dynamic_map,
    unpack,
)

SECOND = 256  # constants that share one of their own, with double quantisation


def doubled(constants: jax.Array, stack: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """8 bits for each constant less their mean (arXiv:2305.14314, section 3), in groups of 256."""
    lead = constants.shape[:stack]
    flat = constants.reshape(*lead, -1)
    mean = jnp.mean(flat, -1)
    flat = flat - mean[..., None]
    more = -flat.shape[-1] % SECOND
    groups = jnp.pad(flat, [(0, 0)] * stack + [(0, more)]).reshape(*lead, -1, SECOND)
    top = jnp.max(jnp.abs(groups), -1)
    levels = dynamic_map()
    middle = jnp.asarray((levels[1:] + levels[:-1]) / 2)
    unit = groups / jnp.maximum(top, 1e-38)[..., None]
    return jnp.searchsorted(middle, unit).astype(jnp.uint8), (top, mean)


def undoubled(
    codes: jax.Array,
    second: tuple[jax.Array, jax.Array],
    shape: Sequence[int],
    stack: int,
    level: Callable[[jax.Array], jax.Array] = dynamic_look_up,
) -> jax.Array:
    """The constants, of `shape`, from their codes, read by `level`."""
    top, mean = second
    lead, rest = shape[:stack], shape[stack:]
    flat = level(codes) * top[..., None]
    flat = flat.reshape(*lead, -1)[..., : math.prod(rest)] + mean[..., None]
    return flat.reshape(shape)


def read(
    fmt: Format, codes: jax.Array, constants: jax.Array, shape: Sequence[int], dtype: Any
) -> jax.Array:
    """The weight of `shape` from codes (..., n), or (..., n / 2), and constants (..., blocks)."""
    if fmt.block is None:
        return (codes.astype(jnp.float32) * (constants * (1 / fmt.top))).astype(dtype)
    codes = unpack(codes) if fmt.bits == 4 else codes
    n, block = blocks_of(shape[-1], fmt.block)
    w = decode(fmt, codes.reshape(*shape[:-1], n, block), constants, dtype)
    return w.reshape(*shape[:-1], n * block)[..., : shape[-1]]
