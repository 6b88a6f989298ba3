"""What the gradient keeps of the forward pass: a policy of `jax.checkpoint`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jax import lax

from lora_jax._core import compat

FEW = 256  # numbers that a product sums over: it costs less to make it again than to keep it

# JAX's own that cost much to make again: products, sorts, and what is sent between devices.
_DEAR = {
    lax.conv_general_dilated_p,
    lax.fft_p,
    lax.sort_p,
    lax.top_k_p,
    lax.psum_p,
    lax.all_gather_p,
    lax.all_to_all_p,
    lax.ppermute_p,
}
_CHEAP = {p for p in vars(lax).values() if isinstance(p, compat.Primitive)} - _DEAR
# Random bits, names, what is of a weight's size, DoRA's gain.
_OF_ALL = ("random_", "threefry", "rng_", "name", "ordered", "level", "gained")


def products(primitive: Any, *avals: Any, **params: Any) -> bool:
    """Whether to keep a result: of a product, a convolution, an exchange between devices or a
    kernel that is not JAX's own; not what is made of these element by element, by moving or by
    summing, nor products that sum over few numbers, such as those with B or of attention's scores.
    """
    if primitive.name in ("dot_general", "ragged_dot_general"):
        numbers = params.get("dimension_numbers") or params["ragged_dot_dimension_numbers"]
        (summed, _), _ = getattr(numbers, "dot_dimension_numbers", numbers)
        return not compat.less(math.prod(avals[0].shape[d] for d in summed), FEW + 1)
    return primitive not in _CHEAP and not primitive.name.startswith(_OF_ALL)


def all_but_gained(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether to keep a result where weights have a gain and nothing else is asked for: not what
    the gain gives, as its gradient keeps the product before it, nor what an activation and its gate
    are made of, element by element: less than LoRA keeps, within kernels that read the product.
    """
    return primitive.name not in ("gained", "mul", "sub", "logistic", "tanh", "erf")


def policy(save: Any) -> Callable | None:
    """The policy that `adapt(save=)` stands for."""
    return products if save == "products" else save


def has_own(jaxpr: Any) -> bool:
    """Whether a program has a `jax.checkpoint` of its own, which a policy around would overrule, or
    effects that may not be made again, such as an ordered print."""
    if compat.unrepeatable(jaxpr):
        return True
    for eqn in jaxpr.eqns:
        inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
        if eqn.primitive.name in compat.REMAT:
            return True
        if inner is not None and has_own(compat.opened(inner)[0]):
            return True
    return False
