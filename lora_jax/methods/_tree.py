"""What the methods with nodes of their own share: their trees, and reading what is frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._core.einsum import cast
from lora_jax._core.paths import flatten, nest
from lora_jax._init import init
from lora_jax._nodes.node import Node, is_node
from lora_jax._targets import Target, Targets

CALL = (
    "lora.methods.factors(adapters, frozen), with "
    "adapters, frozen = lora.methods.init_{}(key, params, config)"
)


def static_of(t: Target, scale: float | None = None) -> dict[str, Any]:
    return dict(
        geometry=t.geometry,
        scale=t.scale if scale is None else scale,
        dropout=t.dropout,
        embedding=t.embedding,
    )


def tree_of(
    key: jax.Array, params: Any, targets: Targets, node: Callable[[str, Target], Node]
) -> dict:
    """The nodes of all leaves: those in full and by rows as `init` makes them."""
    # Without low-rank leaves only those in full and by rows are left.
    rest = init(key, params, dataclasses.replace(targets, lora={}))
    flat = {path: node(path, t) for path, t in targets.lora.items()}
    return nest(flat | flatten(rest, is_leaf=is_node))


def along_rank(x: jax.Array, b: jax.Array) -> jax.Array:
    """x (*batch, rank), to be multiplied with b (*batch, rank, *out)."""
    # (*batch, rank, 1, …)
    return jnp.expand_dims(x, tuple(range(x.ndim, b.ndim)))


def constant(x: Any, dtype: Any) -> jax.Array:
    """A frozen array in the dtype of what is trained; no gradient flows to it."""
    return jax.lax.stop_gradient(cast(jnp.asarray(x), dtype))
