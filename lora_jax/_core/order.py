"""When a value is made: not before another one is there."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax._core import compat


def ordered(x: jax.Array, y: jax.Array) -> jax.Array:
    """`y`, but not before `x` is there.

    An optimization barrier, but on CPUs, where XLA drops barriers before it schedules. A primitive
    with a lowering of its own for CPUs is one equation, and right when lowered for another machine.
    """
    # The trick takes one element of x, which of a sharded x would have to be sent around.
    if not x.size or not compat.one_device(x) or not compat.one_device(y):
        return _barrier(x, y)[0]
    return ordered_p.bind(x, y)[0]


def _barrier(x: jax.Array, y: jax.Array) -> list[jax.Array]:
    return [lax.optimization_barrier((x, y))[1]]


def _times_one(x: jax.Array, y: jax.Array) -> list[jax.Array]:
    """y times a one that XLA does not foresee: the bits of an element of x, clamped to [1, 1]."""
    first = lax.squeeze(lax.slice(x, [0] * x.ndim, [1] * x.ndim), range(x.ndim))
    first = lax.real(first) if jnp.iscomplexobj(first) else first
    # As an integer: the clamp of a NaN would be NaN.
    bits = lax.bitcast_convert_type(first, np.dtype(f"int{8 * first.dtype.itemsize}"))
    one = np.ones((), bits.dtype)
    # codes of 8-bit floats as whole numbers: their products are slow, and not exact everywhere
    whole = y.dtype.itemsize == 1 and jnp.issubdtype(y.dtype, jnp.floating)
    raw = lax.bitcast_convert_type(y, jnp.uint8) if whole else y
    raw = lax.mul(raw, lax.convert_element_type(lax.clamp(one, bits, one), raw.dtype))
    return [lax.bitcast_convert_type(raw, y.dtype) if whole else raw]


def _jvp(primals: Sequence, tangents: Sequence) -> tuple[list, list]:
    # y does not depend on x, and its tangent need not wait
    return ordered_p.bind(*primals), [tangents[1]]


def _batch(size: int, args: Sequence, batched: Sequence[bool]) -> tuple[list, list[bool]]:
    # after the whole batch of x: an unbatched y stays one
    del size
    return ordered_p.bind(*args), [batched[1]]


ordered_p = compat.primitive("ordered", _barrier, jvp=_jvp, batch=_batch, cpu=_times_one)
