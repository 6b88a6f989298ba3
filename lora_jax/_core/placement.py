"""Where arrays lie. Those that one program takes have to lie on the same devices: `check_placed`
names those that do not, before JAX refuses them. No product takes an array in a host's memory:
`near` brings it to the devices, and `away` back. Of adapters it is one rule: whatever takes them
reads them by `near`, and what it makes lies on the devices."""

from __future__ import annotations

import collections
from collections.abc import Container, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from lora_jax._core.errors import raise_all
from lora_jax._core.geometry import spec_along

Space = jax.memory.Space


def summed(x: Any) -> str | None:
    """What is wrong with a leaf, or a spec, that is the same on all devices only once a sum over
    them is made, of it or of its gradient (`reduced`)."""
    typed = isinstance(x, jax.core.Tracer)
    where = jax.typeof(x).sharding if typed else getattr(x, "sharding", x)
    spec = getattr(where, "spec", where)
    for kind in ("unreduced", "reduced"):
        if isinstance(spec, PartitionSpec) and (axes := getattr(spec, kind, None)):
            return (
                f"is {kind} along {', '.join(sorted(axes))}; expected a leaf that is whole there: "
                f"jax.sharding.reshard(leaf, {spec_along(tuple(range(len(spec))), spec)})"
            )
    return None


def is_gone(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_deleted()


def check_there(*trees: Mapping[str, Any]) -> None:
    """Raises for arrays of {path: leaf} that gave their memory to others."""
    raise_all(
        "these arrays have been donated or deleted:",
        (
            f"'{path}'"
            for flat in trees
            for path, x in flat.items()
            if any(map(is_gone, jax.tree.leaves(x)))
        ),
        "pass what the step returned in their place",
    )


def check_placed(
    leaves: Mapping[str, Any], adapted: Container[str], nodes: Mapping[str, Any] | None = None
) -> None:
    """Raises for parameters and adapters that do not lie on the same devices, as `jax.jit` would.

    What is traced has no place yet. Arrays that are not committed to a device go where the others
    are; but a leaf with an adapter has to say where that lies, if the others are spread.

    Args:
      leaves: {path: leaf of the base}, arrays, shapes or shardings.
      adapted: the paths of those with an adapter.
      nodes: {path: adapter}.
    """
    found = {p: [w for x in jax.tree.leaves(leaves[p]) if (w := summed(x))] for p in leaves}
    raise_all(
        "these leaves cannot have an adapter:",
        (f"'{path}' {found[path][0]}" for path in leaves if path in adapted and found[path]),
    )
    # {path: the sharding of each array, None where it is not committed}
    base = {path: _shardings(x) for path, x in leaves.items()}
    own = {path: _shardings(x) for path, x in (nodes or {}).items()}
    known = [[s for each in of.values() for s in each if s is not None] for of in (base, own)]
    places = {s: _place(s) for s in {*known[0], *known[1]}}
    if not places:
        return
    # The base says where, and the adapters only if no leaf of it does. Among places the one
    # with most arrays counts, and among equal ones that with most devices.
    count = collections.Counter(places[s] for s in known[0] or known[1])
    most = max(known[0] or known[1], key=lambda s: (count[places[s]], _size(s)))
    spread = bool(known[0]) and _size(most) > 1

    def wrong(s: Sharding | None, path: str) -> bool:
        return (spread and path in adapted) if s is None else places[s] != places[most]

    def lines(of: Mapping[str, list], what: str) -> list[str]:
        odd = {p: [s for s in each if wrong(s, p)] for p, each in of.items()}
        return [f"{what}'{p}' is {_named(s[0])}" for p, s in odd.items() if s]

    # An adapter that is not committed goes where the program runs.
    own = {path: [s for s in each if s is not None] for path, each in own.items()}
    of_base, of_nodes = lines(base, ""), lines(own, "the adapter of ")
    fixes = [
        "params = jax.device_put(params, shardings), with all shardings of one mesh",
        "adapters = jax.device_put(adapters, lora.parallel.shardings(params, adapters))",
    ]
    raise_all(
        f"parameters and adapters have to lie on the same devices; others are {_named(most)}:",
        [*of_base, *of_nodes],
        "; ".join(fix for fix, odd in zip(fixes, (of_base, of_nodes)) if odd),
    )


def _shardings(x: Any) -> list[Sharding | None]:
    """The sharding of each array, None of one that is on no device in particular."""
    found: list[Sharding | None] = []
    for leaf in jax.tree.leaves(x):
        if isinstance(leaf, jax.core.Tracer):
            continue
        if isinstance(leaf, jax.Array):
            found.append(leaf.sharding if leaf.committed else None)
        elif isinstance(leaf, np.ndarray):
            found.append(None)
        elif isinstance(leaf, Sharding):
            found.append(leaf)
        elif isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None:
            found.append(leaf.sharding)
    return found


def _size(sharding: Sharding) -> int:
    mesh = getattr(sharding, "mesh", None)  # which may be abstract
    return len(sharding.device_set) if mesh is None else mesh.size


def _place(sharding: Sharding) -> tuple:
    """What has to be equal among the arguments of one program: the devices in their order, and the
    mesh where that is part of types."""
    mesh = getattr(sharding, "mesh", None)
    typed = mesh is not None and mesh.size > 1 and AxisType.Explicit in mesh.axis_types
    if isinstance(mesh, Mesh):
        return tuple(mesh.devices.flat), mesh.abstract_mesh if typed else None
    if mesh is not None:  # an abstract one: of no devices
        return mesh, None
    return tuple(sorted(sharding.device_set, key=lambda d: d.id)), None


def _named(sharding: Sharding | None) -> str:
    if sharding is None:
        return "on no device in particular"
    if isinstance(sharding, NamedSharding):
        ids = [d.id for d in sharding.mesh.devices.flat] if isinstance(sharding.mesh, Mesh) else []
        some = f", devices {', '.join(map(str, ids[:8]))}{', ...' * (len(ids) > 8)}" if ids else ""
        kinds = sorted({kind.name for kind in sharding.mesh.axis_types})
        sizes = dict(sharding.mesh.shape)
        return f"at {sharding.spec} of the mesh {sizes} ({'/'.join(kinds)}{some})"
    devices = sorted(sharding.device_set, key=lambda d: d.id)
    return f"on {', '.join(map(str, devices[:8]))}{', ...' * (len(devices) > 8)}"


def on_host(x: Any) -> bool:
    if isinstance(x, jax.core.Tracer):
        return jax.typeof(x).memory_space == Space.Host
    # In JAX 0.10.0 the type of such an array does not say so.
    return isinstance(x, jax.Array) and x.sharding.memory_kind == "pinned_host"


def near(tree: Any) -> Any:
    """The tree with each array in the memory of its devices; the same one where all are there."""
    if not any(map(on_host, jax.tree.leaves(tree))):
        return tree
    return jax.tree.map(lambda x: _put(x, Space.Device) if on_host(x) else x, tree)


def away(tree: Any, like: Any) -> Any:
    """The arrays on the host, if `like` is an array, or are codes, there."""
    there = any(map(on_host, jax.tree.leaves(like)))
    return jax.tree.map(lambda x: _put(x, Space.Host), tree) if there else tree


def _put(x: Any, space: Space) -> Any:
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
        return jax.device_put(x, space)
    # By its sharding: JAX 0.10.0 cannot send what is sharded to a `Space`.
    own = min(x.sharding.device_set, key=lambda d: d.id).default_memory().kind
    kind = "pinned_host" if space == Space.Host else own
    return jax.device_put(x, x.sharding.with_memory_kind(kind))
