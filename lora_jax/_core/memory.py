"""Arrays in a host's memory, which no product takes: to the devices, and back."""

from __future__ import annotations

from typing import Any

import jax

Space = jax.memory.Space


def on_host(x: Any) -> bool:
    return isinstance(x, jax.Array) and jax.typeof(x).memory_space == Space.Host


def near(tree: Any) -> Any:
    """The tree with each array in the memory of its devices; the same array where it is there."""
    return jax.tree.map(lambda x: jax.device_put(x, Space.Device) if on_host(x) else x, tree)


def away(x: jax.Array, like: Any) -> jax.Array:
    """x on the host, if `like` is an array there."""
    return jax.device_put(x, Space.Host) if on_host(like) else x
