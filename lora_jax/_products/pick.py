"""Updates by adapters of a stack, of which each example of a batch has its own.

The factors that a batch needs, gathered in front of the products, are written and read once more
than they are used; for one token each, that is most of the traffic of a layer. On a CPU the
examples are taken in a loop instead, which reads each factor where it lies in the stack and adds
each update where it belongs, unless what is gathered stays in the cache: a turn of a loop takes
some 2 µs. Elsewhere the factors are gathered and multiplied as one batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching

from lora_jax._core import compat
from lora_jax._core.einsum import Labels
from lora_jax._core.geometry import Factor
from lora_jax._nodes.weight import AdaptedWeight
from lora_jax._products.contract import Product, contracted
from lora_jax._products.primitive import primitive

CACHED = 3 << 20  # bytes; at 2 MiB to gather is faster, at 4 it is twice as slow (2 cores, 2026-11)


@dataclasses.dataclass(frozen=True)
class Pick:
    """All that is static of one product: the weight's shape, scale and labels; see `Product`."""

    shape: tuple[int, ...]
    weight_dtype: Any
    a_dims: tuple[int, ...]
    b_dims: tuple[int, ...]
    scale: float
    xl: Labels
    wl: Labels
    out: Labels
    dtype: Any
    precision: Any

    def added(self, y, x, a, b):
        """y + scale · x·A·B."""
        base = jax.ShapeDtypeStruct(self.shape, self.weight_dtype)
        w = AdaptedWeight(base, Factor(a, self.a_dims), Factor(b, self.b_dims), scale=self.scale)
        params = dict.fromkeys(("preferred_element_type", "dimension_numbers", "out_sharding"))
        params["precision"] = self.precision
        product = Product(
            w, self.wl, self.out, self.dtype, params, False, lambda: y, whole=False, use=0
        )
        return contracted(x, self.xl, [product], "factored")[0][0]


def added(y, product: Product, x, xl: Labels):
    """y plus the update of a product, whose weight holds the factors of a stack and a slot."""
    w = product.w
    pick = Pick(
        w.shape,
        w.dtype,
        w.a.dims,
        w.b.dims,
        w.scale,
        tuple(xl),
        tuple(product.wl),
        tuple(product.out),
        product.dtype,
        product.params["precision"],
    )
    return added_p.bind(y, x, w.slot, w.a.value, w.b.value, pick=pick)[0]


def _added(y, x, slot, a, b, *, pick: Pick):
    a, b = (jnp.take(f, slot, axis=0, mode="fill") for f in (a, b))
    return [pick.added(y, x, a, b)]


added_p = primitive("picked_update", _added)


def _jvp(primals, tangents, *, pick: Pick):
    fn = functools.partial(_added, pick=pick)
    return jax.jvp(fn, tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


ad.primitive_jvps[added_p] = _jvp


def _batch(args, dims, *, pick: Pick):
    y, x, slot, a, b = dims
    fn = functools.partial(_added, pick=pick)
    if slot is None or a is not None or b is not None or not all(map(compat.one_device, args)):
        return jax.vmap(fn, list(dims))(*args), [0]
    (size,) = {v.shape[d] for v, d in zip(args, dims) if d is not None}
    args = [batching.bdim_at_front(args[0], y, size), *args[1:]]
    gathered = jax.vmap(fn, (0, *dims[1:]))
    factors = args[3:]
    copied = size * sum(f.dtype.itemsize * math.prod(f.shape[1:]) for f in factors)
    outs = math.prod(n for d, n in zip(pick.wl, pick.shape) if d not in pick.xl)
    if args[0].size == size * outs and copied <= CACHED:  # one row for each example
        return gathered(*args), [0]
    looped = functools.partial(_looped, x_dim=x, slot_dim=slot, pick=pick)
    return lax.platform_dependent(*args, cpu=looped, default=gathered), [0]


batching.primitive_batchers[added_p] = _batch


def _looped(ys, x, slots, a, b, *, x_dim, slot_dim, pick: Pick):
    """One example after the other, each update added in place.

    One loop for each weight: XLA runs those of independent weights side by side.
    """
    count = len(a)
    at = functools.partial(lax.dynamic_index_in_dim, keepdims=False)

    def one(i, ys):
        slot = at(slots, i, slot_dim)
        slot = jnp.where(slot < 0, slot + count, slot)
        exists = (slot >= 0) & (slot < count)
        own_x = x if x_dim is None else at(x, i, x_dim)
        own_b = jnp.where(exists, at(b, slot), jnp.nan)
        y = pick.added(at(ys, i), own_x, at(a, slot), own_b)
        return lax.dynamic_update_index_in_dim(ys, y, i, 0)

    return [lax.fori_loop(0, len(ys), one, ys)]
