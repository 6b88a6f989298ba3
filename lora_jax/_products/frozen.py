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

from lora_jax._core import compat
from lora_jax._core.einsum import Labels, cast, mapped_label
from lora_jax._products.group import Member, toward_x
from lora_jax._quantized.weight import Quantized


def product(x: jax.Array, xl: Labels, w: Quantized, m: Member) -> jax.Array:
    """x·W, of which `m` says how."""
    arrays, base = jax.tree.flatten(w)
    return frozen_p.bind(*compat.same_vma(x, *arrays), xl=tuple(xl), m=m, base=base)[0]


def _product(x: jax.Array, *arrays: jax.Array, xl: Labels, m: Member, base: Any) -> list[jax.Array]:
    return [m.sum([m.base(x, xl, jax.tree.unflatten(base, arrays))])]


def _jvp(primals: Sequence, tangents: Sequence, **how: Any) -> tuple[list, list]:
    y = frozen_p.bind(*primals, **how)
    # Codes have no tangent, and their constants are never trained.
    x, arrays = tangents[0], primals[1:]
    return y, [None] if x is None else frozen_p.bind(x, *arrays, **how)


def _transpose(cts: Sequence, x: Any, *arrays: jax.Array, xl: Labels, m: Member, base: Any) -> list:
    w = jax.tree.unflatten(base, arrays)
    # dx (T, in) = g (T, out) · Wᵀ
    return [toward_x(x, xl, m, cast(cts[0], w.dtype), w)] + [None] * len(arrays)


def _batch(
    size: int, args: Sequence, batched: Sequence[bool], *, xl: Labels, m: Member, base: Any
) -> tuple[list, list[bool]]:
    del size
    if any(batched[1:]):
        fn = functools.partial(_product, xl=xl, m=m, base=base)
        return jax.vmap(fn, [0 if b else None for b in batched])(*args), [True]
    # another axis of x is another label, and the weight is read once for all
    new = mapped_label(m.out)
    m = dataclasses.replace(m, out=(new, *m.out), numbers=None)
    return frozen_p.bind(*args, xl=(new, *xl), m=m, base=base), [True]


frozen_p = compat.primitive(
    "frozen_product", _product, jvp=_jvp, transpose=_transpose, batch=_batch
)
