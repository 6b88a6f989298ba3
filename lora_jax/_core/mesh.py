"""Arrays over several devices: where they lie, and functions of them on meshes of any kind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax._core import compat


def placement(x: Any) -> NamedSharding | None:
    """Where x lies over several devices, as far as it is known: of a tracer, by its type."""
    if isinstance(x, jax.core.Tracer):
        found = compat.explicit_sharding(x)
    else:
        found = getattr(x, "sharding", None)
    return found if isinstance(found, NamedSharding) and found.mesh.size > 1 else None


def anywhere(fn: Callable) -> Callable:
    """`fn` of trees of arrays on meshes of any kind. Explicit axes are automatic inside of it: the
    compiler decides on shardings there, and the results are replicated."""

    @functools.wraps(fn)
    def call(*args: Any):
        arrays = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
        where = next(filter(None, map(compat.explicit_sharding, arrays)), None)
        if where is None:
            return fn(*args)
        mesh = where.mesh
        # Only these change: an axis that an outer shard_map made manual stays so.
        explicit = [n for n, t in zip(mesh.axis_names, mesh.axis_types) if t == AxisType.Explicit]
        replicated = NamedSharding(mesh, PartitionSpec())
        run = jax.sharding.auto_axes(fn, axes=tuple(explicit), out_sharding=replicated)
        return run(*args)

    return call


def laid(x: jax.Array, where: NamedSharding | None) -> jax.Array:
    """x, there; None: where it is."""
    if where is None:
        return x
    # device_put takes concrete arrays and meshes of devices; `reshard` takes the others.
    traced = isinstance(x, jax.core.Tracer) or not isinstance(where.mesh, Mesh)
    return jax.sharding.reshard(x, where) if traced else jax.device_put(x, where)


def on_devices_of(like: Any, tree: Any) -> Any:
    """The arrays on the devices of those of `like`; those that are elsewhere come there whole."""
    first = jax.tree.leaves(like)[0]
    if isinstance(first, jax.core.Tracer) or not isinstance(first, jax.Array):
        return tree
    where, over = first.sharding, placement(first)
    there = NamedSharding(over.mesh, PartitionSpec()) if over else where

    def moved(x: Any) -> Any:
        concrete = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
        elsewhere = concrete and x.sharding.device_set != where.device_set
        return jax.device_put(x, there) if elsewhere else x

    return jax.tree.map(moved, tree)


def placed(node: Any, where: NamedSharding | None) -> Any:
    """An adapter's node where the leaf's sharding puts it (see `lora.parallel.shardings`)."""
    if where is None:
        return node
    # A place has to be named here: what is unconstrained is replicated.
    spec = PartitionSpec(*(None if x is PartitionSpec.UNCONSTRAINED else x for x in where.spec))
    own = jax.tree.map(lambda s: NamedSharding(where.mesh, s), node.specs(spec))
    explicit = AxisType.Explicit in where.mesh.axis_types
    return jax.tree.map(jax.sharding.reshard if explicit else jax.device_put, node, own)
