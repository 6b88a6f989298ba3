"""What enters a product with a weight, told by a gradient.

A product of x with a weight is linear in the weight, so that with any a in the weight's place
aᵀ ↦ xᵀ(x·a) is the product followed by its own transpose. `observed` is x itself, with a rule of
differentiation in which the gradient of `a` is that. Where `a` is the identity it is the second
moment of the inputs, C = xᵀx. It comes out of scans, jits, remat and shardings as any gradient
does, and no rule but those of the products knows of it.

Shapes: x (T, in), a (in, r), x·a (T, r), and the moment xᵀ(x·a) (in, r), where r is the size of in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp

from lora_jax._core.einsum import cast
from lora_jax._core.errors import LoRAError
from lora_jax._core.geometry import RANK
from lora_jax._nodes.weight import Probe


def observed(
    w: Probe, inner: Collection[int], x: jax.Array, product: Callable, *rest: jax.Array
) -> jax.Array:
    """x, such that the gradient of a is C·a whatever the cotangent.

    Args:
      w: the probe, with its factor a.
      inner: the axes of the weight that the product sums over.
      product: (x, a, *rest) -> x·a, linear in a.
      rest: integers that the product needs.
    """
    factor = w.a
    assert factor is not None
    a = factor.value
    size = math.prod(factor.size(d) for d in inner if factor.has(d))
    # Part of a leaf, or used the other way round: x is not what the leaf's in axes meet.
    if size != factor.size(RANK):
        return x
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise LoRAError(
            f"'{w.name}' is multiplied by {x.dtype}: a second moment is of floating-point inputs "
            "alone. Leave it out, exclude=['" + f"{w.name}'], or cast its input in the model"
        )

    @jax.custom_vjp
    def tap(x: jax.Array, a: jax.Array, rest: Sequence) -> jax.Array:
        return x

    # The cotangent g goes on to x as it is; to a goes the moment, which needs no g.
    def forward(x: jax.Array, a: jax.Array, rest: Sequence) -> tuple:
        # h = x·a, (T, r), and back(h) = xᵀ·h, (in, r)
        h, back = jax.vjp(lambda a: product(cast(x, a.dtype), a, *rest), a)
        return x, back(h)[0]

    tap.defvjp(forward, lambda moment, g: (g, moment, None))
    return tap(x, a, rest)
