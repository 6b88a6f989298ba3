"""Products with quantised weights that have no adapter.

The weight is read for the product, and once more for the gradient of its input; it has none itself.
Shapes: x (T, in), W (in, out) in codes, y (T, out); each axis has a label, so there may be more.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from lora_jax._core import compat
from lora_jax._core.einsum import Labels, cast, contract
from lora_jax._quantized.dot import Whole, dot
from lora_jax._quantized.weight import Quantized


@dataclasses.dataclass(frozen=True)
class Frozen:
    """All that is static of x·W: the labels of x, of W and of the result, and how it is written."""

    xl: Labels
    wl: Labels
    out: Labels
    base: Any  # the structure of W's arrays
    numbers: Any = None  # dot_general's dimension_numbers, as the model wrote the product
    weight_first: bool = False
    precision: Any = None
    preferred: Any = None

    @property
    def params(self) -> dict[str, Any]:
        return dict(precision=self.precision, preferred_element_type=self.preferred)

    def weight(self, arrays: Sequence[jax.Array]) -> Quantized:
        return jax.tree.unflatten(self.base, arrays)


def product(x: jax.Array, w: Quantized, how: Frozen) -> jax.Array:
    """x·W."""
    return frozen_p.bind(*compat.same_vma(x, *jax.tree.leaves(w)), how=how)[0]


def _product(x: jax.Array, *arrays: jax.Array, how: Frozen) -> list[jax.Array]:
    w, whole = how.weight(arrays), Whole(_as_written, (how,))
    return [dot(whole, x, how.xl, w, how.wl, how.out, **how.params)]


def _as_written(x: jax.Array, w: jax.Array, how: Frozen) -> jax.Array:
    if how.numbers is None:
        return contract(x, how.xl, w, how.wl, how.out, **how.params)
    operands = (w, x) if how.weight_first else (x, w)
    return lax.dot_general(*operands, how.numbers, **how.params)


def _toward_x(g: jax.Array, w: jax.Array, how: Frozen) -> jax.Array:
    return contract(g, how.out, w, how.wl, how.xl, precision=how.precision)


def _jvp(primals: Sequence, tangents: Sequence, *, how: Frozen) -> tuple[list, list]:
    y = frozen_p.bind(*primals, how=how)
    # Codes have no tangent, and their constants are never trained.
    x, arrays = tangents[0], primals[1:]
    return y, [None] if x is None else frozen_p.bind(x, *arrays, how=how)


def _transpose(cts: Sequence, x: Any, *arrays: jax.Array, how: Frozen) -> list:
    (g,) = cts
    w = how.weight(arrays)
    # dx (T, in) = g (T, out) · Wᵀ
    g, whole = cast(g, w.dtype), Whole(_toward_x, (how,))
    dx = dot(whole, g, how.out, w, how.wl, how.xl, precision=how.precision)
    return [cast(dx, x.dtype)] + [None] * len(arrays)


def _batch(
    size: int, args: Sequence, batched: Sequence[bool], *, how: Frozen
) -> tuple[list, list[bool]]:
    del size
    if any(batched[1:]):
        fn = functools.partial(_product, how=how)
        return jax.vmap(fn, [0 if b else None for b in batched])(*args), [True]
    # another axis of x is another label, and the weight is read once for all
    new = ("batch", sum(isinstance(d, tuple) and d[0] == "batch" for d in how.out))
    how = dataclasses.replace(how, xl=(new, *how.xl), out=(new, *how.out), numbers=None)
    return frozen_p.bind(*args, how=how), [True]


frozen_p = compat.primitive(
    "frozen_product", _product, jvp=_jvp, transpose=_transpose, batch=_batch
)
