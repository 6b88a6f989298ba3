"""What the initialisers share: which nodes they set, and taking an update out of the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._bind import adapter_nodes
from lora_jax._core.einsum import widened
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.mesh import anywhere, placed, placement
from lora_jax._core.nnx import state_of
from lora_jax._core.numbers import check_values
from lora_jax._core.paths import flatten, nest
from lora_jax._core.placement import near
from lora_jax._merge import unmerge
from lora_jax._nodes.adapters import LoRA, LowRank
from lora_jax._nodes.node import is_node
from lora_jax._quantized.weight import is_quantized
from lora_jax._targets import Targets
from lora_jax.algebra._arguments import linear
from lora_jax.algebra._finite import is_finite

FIX = (
    "a scale must be positive and a rank one that the leaf has: "
    "lora.init(key, params, lora.LoRAConfig(rank=8, alpha=16))"
)


def lora_nodes(adapters: Any) -> dict[str, LoRA]:
    """{path: node} of the leaves that an initialiser sets."""
    flat = flatten(linear(adapters), is_leaf=is_node)
    nodes = {p: n for p, n in flat.items() if isinstance(n, LoRA)}
    failures = [f"'{p}' has scale {n.scale}" for p, n in nodes.items() if not n.scale > 0]
    for p, n in nodes.items():
        _, i, o = n.geometry.sizes(n.shape)
        if n.rank > min(i, o):
            failures.append(f"'{p}' has rank {n.rank}, above min(in={i}, out={o})")
    raise_all("these adapters cannot be initialised:", failures, FIX)
    return nodes


def each(adapters: Any, make: Callable) -> dict:
    """The adapters with make(path, node) for each `LoRA`."""
    flat = flatten(adapters, is_leaf=is_node)
    return nest({p: make(p, n) if isinstance(n, LoRA) else n for p, n in flat.items()})


def off_the_base(params: Any, adapters: Any, make: Callable, verb: str) -> tuple[Any, dict]:
    """(base − scale·A·B, adapters), with nodes from make(path, node, w), w (n, in, out)."""
    # For its checks alone: adapters of this model.
    adapter_nodes(params, adapters, verb)
    nodes = lora_nodes(adapters)
    leaves = flatten(state_of(params))
    check_values(((f"'{p}'", leaves[p]) for p in nodes), f"lora.{verb}(params, adapters)")
    raise_all(
        "these hold NaN or infinity:",
        (f"'{p}' of the base" for p in nodes if not is_finite(leaves[p])),
        f"look at the base, or leave them out of the adapters: lora.{verb}(params, adapters)",
    )
    raise_all(
        "these leaves are quantised, and their codes cannot give up a part:",
        (f"'{p}'" for p in nodes if is_quantized(leaves[p])),
        "first the initialiser, of the plain parameters, then lora.quant.quantize(base, ...); or "
        "loftq",
    )

    def one(path: str, node: LoRA) -> LoRA:
        # A leaf that is offloaded to the host is fetched by itself.
        w = near(jnp.asarray(leaves[path]))
        # On meshes with explicit axes `anywhere` gives replicated factors: they go to their places.
        found = anywhere(lambda w: make(path, node, node.geometry.matrices(widened(w))))(w)
        return placed(found, placement(w))

    new = each(adapters, one)
    flat = flatten(new, is_leaf=is_node)
    # The factors as they are stored, so that what their rounding lost stays in the base.
    return unmerge(params, nest({p: flat[p] for p in nodes})), new


def plain_svd(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
    return u, s, v


def low_rank(adapters: Any) -> dict[str, Any]:
    """{path: what has geometry, shape, rank and scale}, of adapters or targets."""
    if isinstance(adapters, Targets):
        return dict(adapters.lora)
    nodes = flatten(adapters, is_leaf=is_node)
    if not any(map(is_node, nodes.values())):
        raise LoRAError(
            "expected adapters or Targets: adapters = lora.init(key, params, config), or "
            "targets = lora.select(params, config, survey)"
        )
    return {p: n for p, n in nodes.items() if isinstance(n, LowRank)}
