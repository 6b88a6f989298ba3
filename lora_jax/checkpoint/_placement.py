"""Where restored arrays go: where those are that they are restored for."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding

from lora_jax._core.errors import raise_all
from lora_jax._core.nnx import state_of
from lora_jax._core.paths import flatten, nest
from lora_jax._nodes.node import is_node
from lora_jax.checkpoint._fingerprint import Fingerprint
from lora_jax.parallel._shardings import shardings
from lora_jax.parallel._state_shardings import state_shardings


def placement(x: Any):
    """The sharding that a leaf is committed to, or None."""
    if isinstance(x, jax.Array) and not x.committed:
        return None
    return getattr(x, "sharding", None)


def placed_as(saved: Any, base: Any) -> Any:
    """Shapes of the adapters, sharded as the base where it says how."""
    if base is None or isinstance(base, Fingerprint):
        return saved
    leaves = flatten(state_of(base))
    own = {p: placement(leaves[p]) for p in flatten(saved, is_leaf=is_node) if p in leaves}
    if all(where is None for where in own.values()):
        return saved
    raise_all(
        "these leaves of the base are on no device in particular, and others are placed:",
        (f"'{p}'" for p, where in own.items() if where is None),
        "place all of them, jax.device_put(params, shardings), or pass adapters that are placed",
    )
    if own.keys() != flatten(saved, is_leaf=is_node).keys():
        return saved  # another base, as is about to be said
    return _at(saved, shardings(nest(own), saved))


def beside(state: Any, adapters: Any) -> Any:
    """The state, of which shapes that are nowhere go where the adapters' shardings say."""
    leaves = jax.tree.leaves(adapters)
    placed = [isinstance(placement(x), NamedSharding) for x in leaves]
    nowhere = lambda x: isinstance(x, jax.ShapeDtypeStruct) and x.sharding is None
    if not placed or not all(placed) or not any(map(nowhere, jax.tree.leaves(state))):
        return state
    at = state_shardings(state, adapters, jax.tree.map(placement, adapters))
    place = lambda x, s: _at(x, s) if nowhere(x) else x
    return jax.tree.map(place, state, at)


def _at(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
