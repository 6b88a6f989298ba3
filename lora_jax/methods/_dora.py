"""DoRA: low-rank adapters with a magnitude for each output unit."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from lora_jax._bind import adapter_nodes
from lora_jax._core.errors import raise_all
from lora_jax._core.nnx import state_of
from lora_jax._core.numbers import check_values
from lora_jax._core.paths import flatten, map_with_path
from lora_jax._core.placement import near
from lora_jax._nodes.adapters import LoRA, norms
from lora_jax._nodes.factors import check_factors
from lora_jax._nodes.node import is_node
from lora_jax._quantized.weight import is_quantized
from lora_jax.algebra._finite import check_finite


def dora(params: Any, adapters: Any) -> dict:
    """The adapters with a trainable magnitude for each output unit (DoRA, arXiv:2402.09353): W' =
    m · V / ‖V‖ with V = W + scale·A·B, and m such that W' = V.

    The norm is a constant for the gradient (section 4.3 of the paper). It is computed by `bind`,
    from the factors: for each leaf 2·in·out·rank FLOPs and two passes over W, whatever the batch.
    It is that of the arrays given to `bind`: parts of a leaf, inside of `jax.shard_map`, are an
    error.

    Args:
      params: the base parameters.
      adapters: `LoRA` nodes, as from `init`; of embeddings, too, where each feature is a unit.
        Leaves trained in full or by rows stay as they are.

    Returns:
      A tree with a `DoRA` for each `LoRA`, magnitude (*batch, *out) in the adapters' dtype.

    Raises:
      LoRAError: as `bind`.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"q": jnp.array([[3.0, 0.0], [4.0, 2.0]])}
    >>> adapters = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=1, targets="q"))
    >>> adapters = lora.methods.dora(params, adapters)
    >>> adapters["q"].magnitude
    Array([5., 2.], dtype=float32)
    """
    check_factors(adapter_nodes(params, adapters, "methods.dora"))
    check_finite(adapters, base=params)
    leaves = flatten(state_of(params))
    adapted = flatten(adapters, is_leaf=is_node)
    check_values(((f"'{p}'", leaves[p]) for p in adapted), "lora.methods.dora(params, adapters)")

    raise_all(
        "DoRA's magnitudes are of real weights:",
        (
            f"'{p}' is complex"
            for p, n in adapted.items()
            if isinstance(n, LoRA)
            and any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in (leaves[p], n.a, n.b))
        ),
        "adapt it by LoRA alone",
    )
    adapters = near(adapters)

    def leaf(path: str, node: Any) -> Any:
        if not isinstance(node, LoRA):
            return node
        # A quantised leaf stays in codes: `norms` reads it, and only here.
        base = leaves[path] if is_quantized(leaves[path]) else jnp.asarray(leaves[path])
        # The norms are of W + s·A·B and not of W: training starts where the adapters are.
        m = norms(node, base).astype(node.a.dtype)
        return node.with_magnitude(m)

    return map_with_path(leaf, adapters, is_leaf=is_node)
