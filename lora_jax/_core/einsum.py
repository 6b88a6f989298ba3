"""Einstein summation of two labelled arrays, and the arithmetic around it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

Labels = Sequence[Hashable]


# Operators of jax.lax: those of jax.numpy are several times slower to trace.


def cast(x, dtype) -> jax.Array:
    return x if x.dtype == dtype else lax.convert_element_type(x, dtype)


def wide(dtype):
    """The type in which updates are added to weights of `dtype`: fp32, or the weights' if wider."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


def times(x, scale: float) -> jax.Array:
    """`x` times a constant, in x's dtype."""
    return x if scale == 1.0 else lax.mul(x, np.asarray(scale, x.dtype))


def plus(y, delta) -> jax.Array:
    """`y + delta` in y's dtype."""
    return lax.add(y, cast(delta, y.dtype))


def spread(y, have: Labels, out: Labels, shape: Sequence[int]):
    """`y` of labels `have`, a subsequence of `out`, in the full shape: constant along the rest."""
    if y.shape == tuple(shape):
        return y
    return lax.broadcast_in_dim(y, shape, [out.index(d) for d in have])


def contract(x, xl: Labels, y, yl: Labels, out: Labels, sharding=None, **params) -> jax.Array:
    """Einstein summation of two arrays with labelled axes, as one dot_general.

    Labels that only one operand has and `out` lacks are summed first. `sharding` is the result's,
    where shardings are part of types; `params` are dot_general's precision and
    preferred_element_type.
    """
    x, xl = _sum_lone(x, xl, yl, out)
    y, yl = _sum_lone(y, yl, xl, out)
    both = [d for d in xl if d in yl]
    batch = [d for d in both if d in out]
    summed = [d for d in both if d not in out]
    dims = tuple(
        tuple(tuple(labels.index(d) for d in group) for labels in (xl, yl))
        for group in (summed, batch)
    )
    zl = [*batch, *(d for d in xl if d not in both), *(d for d in yl if d not in both)]
    if sharding is not None:
        axis = dict(zip(out, getattr(sharding, "spec", sharding)))
        spec = PartitionSpec(*(axis.get(d) for d in zl))
        named = isinstance(sharding, NamedSharding)
        params["out_sharding"] = NamedSharding(sharding.mesh, spec) if named else spec
    z = lax.dot_general(x, y, dims, **params)
    order = [zl.index(d) for d in out]
    return z if order == sorted(order) else lax.transpose(z, order)


def _sum_lone(x, xl, yl, out):
    lone = tuple(i for i, d in enumerate(xl) if d not in yl and d not in out)
    if not lone:
        return x, tuple(xl)
    return jnp.sum(x, axis=lone), tuple(d for i, d in enumerate(xl) if i not in lone)
