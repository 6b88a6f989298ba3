"""Quantised weights from arrays, and what arrays become by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core.errors import LoRAError
from lora_jax._quantized.encode import doubled, encode, most, pack, whole_scale
from lora_jax._quantized.formats import FORMATS, Format, block_sizes, decode
from lora_jax._quantized.weight import Quantized


def check_format(format: Any, call: str) -> str | None:
    """What is wrong with the name of a format."""
    if isinstance(format, str) and format in FORMATS:
        return None
    return f"{call}={format!r}: expected one of {', '.join(FORMATS)}"


def unstorable(w: Any) -> str | None:
    """Why no format is for a leaf, or a weight that stands for one."""
    shape, dtype = tuple(w.shape), w.dtype
    if len(shape) < 2 or 0 in shape or not jnp.issubdtype(dtype, jnp.floating):
        return f"is {dtype}{shape}: expected floats, of two axes or more"
    return None


def quantized(
    w: jax.Array,
    format: str = "nf4",
    *,
    in_axes: Sequence[int] = (-2,),
    stack: int = 0,
    double: bool = False,
) -> Quantized:
    """One array; see `quantize`.

    >>> import jax.numpy as jnp
    >>> q = quantized(jnp.linspace(-1, 1, 128).reshape(2, 64), "nf4")
    >>> q, bool(abs(q.value() - jnp.linspace(-1, 1, 128).reshape(2, 64)).max() < 0.152)
    (Quantized((2, 64), float32, 'nf4', 4.5 bits), True)
    """
    fmt, wrong = FORMATS[format], unstorable(w)
    if wrong:
        raise LoRAError(f"what is to be quantised {wrong}")
    if double and fmt.block is None:
        raise LoRAError(f"double quantisation is for blocks; {format!r} has a constant per channel")
    if double and (fmt.power or fmt.whole):
        raise LoRAError(f"double=True: the constants of {format!r} are of 8 bits without it")
    if fmt.block is None:
        axes = tuple(d % w.ndim for d in in_axes)
        # (*rest, *in axes), then (*rest, in): one constant for each row
        front = jnp.moveaxis(w, axes, range(-len(axes), 0))
        flat = front.reshape(*front.shape[: w.ndim - len(axes)], -1)
        codes, constants = encode(fmt, flat)
        # Back to the weight's axes; constants have ones where the in axes are.
        codes = jnp.moveaxis(codes.reshape(front.shape), range(-len(axes), 0), axes)
        constants = jnp.expand_dims(constants, sorted(axes))
        return Quantized(codes, constants, None, format, np.dtype(w.dtype), stack=stack)
    return _in_blocks(w, fmt, stack, double)[0]


def rounded(w: jax.Array, format: str, *, in_axes: Any, stack: int, double: bool) -> jax.Array:
    """What `quantized` makes of an array, read again: without codes that are packed and taken
    apart, which on CPUs takes five times as long as all else."""
    fmt = FORMATS[format]
    if fmt.block is None:
        return quantized(w, format, in_axes=in_axes, stack=stack).value()
    q, codes = _in_blocks(w, fmt, stack, double)
    read = decode(fmt, codes, q.block_constants(), w.dtype)
    return read.reshape(*w.shape[:-1], -1)[..., : w.shape[-1]]


def _in_blocks(w: jax.Array, fmt: Format, stack: int, double: bool) -> tuple[Quantized, jax.Array]:
    """(the weight, its codes as numbers of their own, (..., blocks, block))."""
    shape, dtype = tuple(w.shape), np.dtype(w.dtype)
    n, block = block_sizes(shape[-1], fmt.block)
    # Zeros fill the last block; a block is (..., n, block).
    w = jnp.pad(w, [(0, 0)] * (w.ndim - 1) + [(0, n * block - shape[-1])])
    blocks = w.reshape(*shape[:-1], n, block)
    second: Any = None
    if fmt.whole:
        second = (whole_scale(blocks, stack),)
        scale = jnp.expand_dims(second[0], range(stack, w.ndim))  # as the constants
        codes, constants = encode(fmt, blocks, scale)
    else:
        codes, constants = encode(fmt, blocks)
    if double:
        constants, second = doubled(constants, stack, most(dtype))
    flat = codes.reshape(*shape[:-1], n * block)
    flat, pad = pack(flat) if fmt.bits == 4 else flat, n * block - shape[-1]
    return Quantized(flat, constants, second, fmt.name, dtype, pad, stack), codes


in_codes = jax.jit(quantized, static_argnames=("format", "in_axes", "stack", "double"))
