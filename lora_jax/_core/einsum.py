"""Einstein summation of two labelled arrays, and the arithmetic around it."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._core import compat

Where = NamedSharding | PartitionSpec | None  # the sharding of a result, if it is given
Labels = Sequence[Hashable]  # one for each axis of an array; equal ones are the same axis


def mapped_label(labels: Labels) -> Hashable:
    """The label of an axis that vmap adds: no other one, also of vmaps within each other."""
    return "vmap", sum(isinstance(d, tuple) and d[0] == "vmap" for d in labels)


# All arithmetic is by operators of jax.lax: those of jax.numpy are several times slower to trace.


def cast(x: jax.Array, dtype: Any) -> jax.Array:
    """x in `dtype`. A real `dtype` takes the real part of a complex x, as the gradient of a real
    input does."""
    if x.dtype == dtype:
        return x
    if _is_complex(x.dtype) and not _is_complex(dtype):
        # convert_element_type would drop the imaginary part with a warning.
        x = lax.real(x)
    return lax.convert_element_type(x, dtype)


def wide(dtype: Any) -> Any:
    """The type in which updates are added to weights of `dtype`: fp32, or the weights' if wider."""
    return holding(dtype, jnp.float32)


@functools.lru_cache(maxsize=1024)
def holding(*dtypes: Any) -> Any:
    """The narrowest float or complex type that holds all of `dtypes`. Integers and 8-bit floats do
    not count; where there is nothing else, it is bf16."""
    held = {jnp.dtype(t) for t in dtypes if _has_range(t)}
    if len(held) < 2:
        return held.pop() if held else jnp.dtype(jnp.bfloat16)
    # Two types or more: of bf16 and fp16 neither holds the other, so fp32 is the least that can.
    return np.result_type(np.float32, *(t for t in held if t.itemsize > 2))


def meeting(x: Any, w: Any, out: Any) -> Any:
    """The type of the products of an input of type `x` with the factors of a weight of type `w`.

    It holds both. Integers and 8-bit floats hold no x·A: for these alone it is the result's.
    """
    return holding(x, w) if _has_range(x) or _has_range(w) else holding(out)


def _has_range(dtype: Any) -> bool:
    """Whether sums are safe in it: neither an integer nor of 8 bits or fewer."""
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.dtype(dtype).itemsize > 1


def _is_complex(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.complexfloating)


def addable(dtypes: Sequence[Any], out: Any) -> bool:
    """Whether an update of operands of `dtypes` can be added to a result of type `out`: not to
    integers, which are rounded, nor to what drops an imaginary part."""
    return _is_complex(out) or (
        jnp.issubdtype(out, jnp.floating) and not any(map(_is_complex, dtypes))
    )


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x @ y of matrices, in full precision on every platform: what is no part of the model's own
    passes is exact to its dtype."""
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def widened(x: Any) -> jax.Array:
    """x as an array in fp32, or wider."""
    x = jnp.asarray(x)
    return cast(x, wide(x.dtype))


def times(x: jax.Array, scale: float) -> jax.Array:
    """`x` times a constant, in x's dtype."""
    return x if scale == 1.0 else lax.mul(x, np.asarray(scale, x.dtype))


def plus(y: jax.Array, delta: jax.Array) -> jax.Array:
    """`y + delta` in y's dtype; 8-bit floats are added in bf16 and rounded once."""
    dtype = holding(y.dtype)
    return cast(lax.add(cast(y, dtype), cast(delta, dtype)), y.dtype)


def in_order(y: jax.Array, have: Labels, out: Labels) -> jax.Array:
    """`y` of labels `have` with its axes in the order in which they stand in `out`."""
    order = [have.index(d) for d in out if d in have]
    return y if order == sorted(order) else lax.transpose(y, order)


def along(y: jax.Array, have: Labels, out: Labels, shape: Sequence[int]) -> jax.Array:
    """`y` of labels `have`, all of them in `out`, in the full shape: constant along the rest."""
    y = in_order(y, have, out)
    if y.shape == tuple(shape):
        return y
    return lax.broadcast_in_dim(y, shape, [i for i, d in enumerate(out) if d in have])


def laid_along(where: Where, have: Labels, out: Labels) -> Where:
    """The sharding of an array of labels `out` from that of one of labels `have`: along each axis
    as there, and along no mesh axis where `have` lacks it."""
    if where is None:
        return None
    named = isinstance(where, NamedSharding)
    axis = dict(zip(have, where.spec if named else where))
    spec = PartitionSpec(*map(axis.get, out))
    return where.update(spec=spec) if named else spec


def contract(
    x: jax.Array,
    xl: Labels,
    y: jax.Array,
    yl: Labels,
    out: Labels,
    sharding: Where = None,
    **params: Any,
) -> jax.Array:
    """Einstein summation of two arrays with labelled axes, as one dot_general: x (T, in) of labels
    `xl` and A (in, r) of labels `yl` give x·A (T, r) of labels `out`.

    Labels that only one operand has and `out` lacks are summed first. `sharding` is the result's,
    where shardings are part of types; `params` are dot_general's precision and
    preferred_element_type.
    """
    x, xl = sum_lone(x, xl, yl, out)
    y, yl = sum_lone(y, yl, xl, out)
    # Labels of both: batch axes where the result has them, else summed.
    both = [d for d in xl if d in yl]
    batch = [d for d in both if d in out]
    summed = [d for d in both if d not in out]
    places = lambda labels, group: tuple(labels.index(d) for d in group)
    dims = ((places(xl, summed), places(yl, summed)), (places(xl, batch), places(yl, batch)))
    # dot_general gives the batch axes first, then what is left of x, then what is left of y
    zl = [*batch, *(d for d in xl if d not in both), *(d for d in yl if d not in both)]
    # `sharding` is in the order of `out`; dot_general wants that of its own result.
    own = laid_along(sharding, out, zl)
    return in_order(lax.dot_general(x, y, dims, out_sharding=own, **params), zl, out)


def sum_lone(x: jax.Array, xl: Labels, yl: Labels, out: Labels) -> tuple[jax.Array, Labels]:
    """x summed over its labels that neither the other operand nor the result has, and the rest."""
    # dot_general cannot sum an axis that one operand alone has.
    lone = tuple(i for i, d in enumerate(xl) if d not in yl and d not in out)
    if not lone:
        return x, tuple(xl)
    return jnp.sum(x, axis=lone), tuple(d for i, d in enumerate(xl) if i not in lone)


def gained(y: jax.Array, gain: jax.Array, axes: Sequence[int]) -> jax.Array:
    """(1 + gain)·y as y + gain·y, in which a small gain is not rounded away.

    `axes` of y are those of the gain. The gradient keeps y, and the gain as it is: not one as
    large as y.
    """
    return _gained_p.bind(*compat.same_vma(y, gain), axes=tuple(axes))[0]


def _along_times(y: jax.Array, gain: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    along = lax.broadcast_in_dim(cast(gain, y.dtype), y.shape, axes)
    return lax.mul(y, compat.lying_as(along, y))


def _gained(y: jax.Array, gain: jax.Array, *, axes: tuple[int, ...]) -> list[jax.Array]:
    full = cast(y, holding(y.dtype))
    return [cast(lax.add(full, _along_times(full, gain, axes)), y.dtype)]


def _gained_jvp(
    primals: Sequence, tangents: Sequence, *, axes: tuple[int, ...]
) -> tuple[list, list]:
    tangents = compat.instantiated(primals, tangents)
    # One equation, so that a policy of jax.checkpoint sees what the gain gives as such.
    y = _gained_p.bind(*primals, axes=axes)
    return y, _gained_tangent_p.bind(*tangents, *primals, axes=axes)


def _gained_tangent(
    ty: jax.Array, tg: jax.Array, y: jax.Array, gain: jax.Array, *, axes: tuple[int, ...]
) -> list[jax.Array]:
    (of_y,), full = _gained(ty, gain, axes=axes), cast(y, holding(y.dtype))
    return [lax.add(of_y, cast(_along_times(full, tg, axes), y.dtype))]


def _gained_transpose(cts: Sequence, *args: jax.Array, axes: tuple[int, ...]) -> list:
    (ct,), (_, tg, y, gain) = cts, args
    others = tuple(d for d in range(y.ndim) if d not in axes)
    dtype = wide(holding(y.dtype))
    dgain = jnp.sum(lax.mul(cast(ct, dtype), cast(y, dtype)), others)
    dgain = compat.lying_as(cast(dgain, tg.dtype), tg)
    return [*_gained(ct, gain, axes=axes), dgain, None, None]


_gained_p = compat.primitive("gained", _gained, jvp=_gained_jvp)
_gained_tangent_p = compat.primitive("gained_tangent", _gained_tangent, transpose=_gained_transpose)
