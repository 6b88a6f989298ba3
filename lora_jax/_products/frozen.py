"""Products with quantised weights that have no adapter.

The weight is read for the product, and once more for the gradient of its input; it has none itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching

from lora_jax._core import compat
from lora_jax._core.einsum import Labels, cast, contract
from lora_jax._products.primitive import primitive
from lora_jax._quantized.dot import dot


@dataclasses.dataclass(frozen=True)
class Frozen:
    """All that is static of x·W: the labels of x, of W and of the result, and how it is written."""

    xl: Labels
    wl: Labels
    out: Labels
    base: Any  # the structure of W's arrays
    numbers: Any = None
    weight_first: bool = False
    precision: Any = None
    preferred: Any = None

    @property
    def params(self):
        return dict(precision=self.precision, preferred_element_type=self.preferred)

    def weight(self, arrays):
        return jax.tree.unflatten(self.base, arrays)


def product(x, w, how: Frozen):
    return frozen_p.bind(*compat.same_vma(x, *jax.tree.leaves(w)), how=how)[0]


def _product(x, *arrays, how: Frozen):
    def whole(x, w):
        if how.numbers is None:
            return contract(x, how.xl, w, how.wl, how.out, **how.params)
        operands = (w, x) if how.weight_first else (x, w)
        return lax.dot_general(*operands, how.numbers, **how.params)

    return [dot(whole, x, how.xl, how.weight(arrays), how.wl, how.out, x, **how.params)]


frozen_p = primitive("frozen_product", _product)


def _jvp(primals, tangents, *, how: Frozen):
    arrays = primals[1:]
    y = frozen_p.bind(*primals, how=how)
    if type(tangents[0]) is ad.Zero:
        return y, [ad.Zero.from_primal_value(y[0])]
    return y, frozen_p.bind(tangents[0], *arrays, how=how)


ad.primitive_jvps[frozen_p] = _jvp


def _transpose(cts, x, *arrays, how: Frozen):
    (g,) = cts
    if type(g) is ad.Zero:
        return [ad.Zero(x.aval)] + [None] * len(arrays)
    w = how.weight(arrays)
    labels = how.wl, how.xl
    whole = lambda g, w: contract(g, how.out, w, *labels, precision=how.precision)
    dx = dot(whole, cast(g, w.dtype), how.out, w, *labels, g, precision=how.precision)
    return [cast(dx, x.aval.dtype)] + [None] * len(arrays)


ad.primitive_transposes[frozen_p] = _transpose


def _batch(args, dims, *, how: Frozen):
    if any(d is not None for d in dims[1:]):
        return jax.vmap(lambda *args: _product(*args, how=how), list(dims))(*args), [0]
    new = ("batch", sum(isinstance(d, tuple) and d[0] == "batch" for d in how.out))
    how = dataclasses.replace(how, xl=(new, *how.xl), out=(new, *how.out), numbers=None)
    return frozen_p.bind(jnp.moveaxis(args[0], dims[0], 0), *args[1:], how=how), [0]


batching.primitive_batchers[frozen_p] = _batch
