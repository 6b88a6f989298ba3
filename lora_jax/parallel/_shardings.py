"""Where the adapters live: each leaf's sharding from its base's.

A runs along the weight's input axes, B along its output axes, both along its stack (layers,
experts); so each takes the base's sharding of the axes that it shares, and the rank is replicated.
Then the products with A and B need no collective that those with W do not, and none of the
gradients is larger than an adapter.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.geometry import names as mesh_axes
from lora_jax._core.nnx import state_of
from lora_jax._core.paths import flatten, map_with_path, nearest, path_of
from lora_jax._core.placement import check_placed, summed
from lora_jax._init import init
from lora_jax._nodes.node import is_node
from lora_jax._targets import Targets

P = PartitionSpec


CALL = (
    "lora.parallel.shardings(params, adapters, mesh=mesh), with sharded params, or a tree of specs"
)


def shardings(
    params: Any,
    adapters: Any,
    *,
    mesh: Mesh | None = None,
    rules: Sequence[tuple[str, Any]] | None = None,
    uneven: Literal["error", "replicate"] = "error",
) -> Any:
    """The sharding of each adapter leaf, from the base's.

    Args:
      params: the base, in any form that says how it is sharded: arrays or `jax.ShapeDtypeStruct`s
        with shardings, a tree of `NamedSharding`s or `PartitionSpec`s (None: replicated), boxes of
        Linen (`nn.Partitioned`, `nn.LogicallyPartitioned`), or an NNX module or state.
      adapters: what `init` returned, arrays or shapes; or the `Targets` that `select` returned; or
        a stack of adapters, whose axis of slots is replicated. Specs do not say how many axes a
        leaf has, so a stack of leaves that are all trained in full or by rows needs arrays or
        shapes as `params`.
      mesh: of specs and of names in boxes; with it, names go before the arrays' own sharding.
      rules: pairs (logical axis, mesh axis or axes), for specs and boxes of logical names, as in
        `nn.logical_to_mesh_axes`. Without a rule, a name of the mesh's own axes stands for itself,
        and any other axis is replicated.
      uneven: what to do with an axis that the devices do not divide: raise, or replicate it and
        warn once, with all such leaves.

    Returns:
      A tree like the adapters: `NamedSharding`s, for `jax.jit(..., out_shardings=)` and
      `jax.device_put`; `PartitionSpec`s, for `jax.shard_map`, where params are specs and no mesh is
      given; a base array's own sharding where it is on one device.

    Raises:
      LoRAError: a base leaf that says nothing of its sharding (under `jax.jit`, where the compiler
        decides on it), that is missing, or that names an axis which the mesh does not have; an axis
        that does not divide; base leaves that do not lie on the same devices. All are listed.

    >>> import jax, lora_jax as lora
    >>> from jax.sharding import PartitionSpec as P
    >>> params = {"q": {"kernel": jax.ShapeDtypeStruct((64, 8, 16), "float32")}}
    >>> rule = lora.Rule("q", in_axes=(0,), out_axes=(1, 2))
    >>> config = lora.LoRAConfig(rank=4, targets="q", rules=[rule])
    >>> specs = {"q": {"kernel": P("fsdp", "tp")}}
    >>> of = lora.parallel.shardings(specs, lora.select(params, config))["q"]["kernel"]
    >>> of.a, of.b
    (P('fsdp', None), P(None, 'tp', None))
    """
    if uneven not in ("error", "replicate"):
        raise LoRAError(f"uneven={uneven!r}: expected 'error' or 'replicate'")
    if not isinstance(mesh, Mesh | AbstractMesh | None):
        raise LoRAError(
            f"expected a mesh, found a {type(mesh).__name__}: lora.parallel.shardings(params, "
            "adapters, mesh=jax.make_mesh((4, 2), ('fsdp', 'tp')))"
        )
    rules = None if rules is None else _pairs(rules)
    # A spec is a tuple to `jax.tree`, and None is nothing: both are leaves here.
    base = flatten(state_of(params), is_leaf=_says_where)
    failures: list[str] = []
    if isinstance(adapters, Targets):
        adapters = _abstract(adapters)
    flat = flatten(adapters, is_leaf=is_node)
    for path, node in flat.items():
        if not is_node(node):
            raise LoRAError(
                f"expected adapters or Targets, found a tree with a {type(node).__name__} at "
                f"'{path}': {CALL}"
            )
        if not node.of_arrays:
            raise LoRAError(f"the adapter of '{path}' holds what is no array: {CALL}")
    slots = _slot_axes(flat, base)
    # With a mesh, each leaf below is found to be on it.
    places = {} if mesh is not None else {p: _names(x)[1] for p, x in base.items()}

    def leaf(path: str, node: Any):
        # The base's sharding, then the entries that the factors share with it, then the slots.
        found, problem = _base_sharding(base, path, mesh, rules)
        node = _slot(node, slots[path])
        if problem is None:
            problem = _too_long(found, len(node.shape))
        if problem is not None:
            failures.append(f"'{path}': {problem}")
            return node
        spec = getattr(found, "spec", found)
        # On one device. A base in host memory keeps its adapters on the device all the same.
        if not isinstance(spec, PartitionSpec):
            return jax.tree.map(lambda _: found.with_memory_kind(None), node)
        places[path] = found
        # What the compiler decides of the base, it does not decide of an adapter: replicated.
        spec = P(*(None if x is P.UNCONSTRAINED else x for x in spec))
        specs = jax.tree.map(lambda own: P(*(None,) * slots[path], *own), node.specs(spec))
        if isinstance(found, PartitionSpec):
            return specs
        return jax.tree.map(lambda own: NamedSharding(found.mesh, own), specs)

    result = map_with_path(leaf, adapters, is_leaf=is_node)
    raise_all("the base does not say how these leaves are sharded:", failures, CALL)
    # Every leaf must lie on the same devices, or one jit could not take them all.
    check_placed(places, flat)
    result, dropped = _even(adapters, result)
    if dropped and uneven == "error":
        raise_all(
            "these axes do not divide among the devices:",
            dropped,
            "pad the base, change its sharding, or lora.parallel.shardings(..., "
            "uneven='replicate')",
        )
    if dropped:
        # The caller's line.
        warnings.warn("\n  - ".join(["replicated:", *dropped]), stacklevel=2)
    return result


def _abstract(targets: Targets) -> Any:
    """The shapes of the adapters of these targets."""
    shapes = {path: t.shape for path, t in targets.lora.items()} | dict(targets.full)
    shapes |= {path: shape for path, (shape, _) in targets.rows.items()}
    flat = {p: jax.ShapeDtypeStruct(s, targets.config.dtype) for p, s in shapes.items()}
    return jax.eval_shape(lambda flat: init(jax.random.key(0), flat, targets), flat)


def _slot(node: Any, n: int) -> Any:
    """The shapes of one slot, of adapters with n axes of slots in front."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[n:], x.dtype), node)


def _slot_axes(nodes: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, int]:
    """{path: how many axes of slots stand before those that the node knows of}.

    A node says it by its `dims`, or the base by its shape. Where neither does (a leaf trained in
    full, for which there is a spec alone), it is as in the rest of the tree.
    """

    def fits(node: Any, n: int, ndim: int | None) -> bool:
        # With n axes taken off, each array must have as many as its `dims` name.
        one = _slot(node, n)
        known = all(len(dims) == len(getattr(one, name).shape) for name, dims in one.dims.items())
        return known and ndim in (None, len(one.shape))

    possible = {}
    for path, node in nodes.items():
        shape = getattr(_names(base[path])[1] if path in base else None, "shape", None)
        ndim = None if shape is None else len(shape)
        most = min((len(x.shape) for x in jax.tree.leaves(node)), default=0)
        possible[path] = {n for n in range(most + 1) if fits(node, n, ndim)}
    # A leaf that fits with several numbers takes one that all leaves can have, the smallest.
    common = set.intersection(*filter(None, possible.values())) if any(possible.values()) else {0}
    return {path: min(own & common or own, default=0) for path, own in possible.items()}


def _says_where(x: Any) -> bool:
    return x is None or isinstance(
        x, Sharding | PartitionSpec | nn.meta.AxisMetadata | nnx.Variable
    )


def _base_sharding(
    base: Mapping[str, Any],
    path: str,
    mesh: Mesh | None,
    rules: Sequence[tuple[str, Any]] | None,
) -> tuple[Any, str | None]:
    """(sharding or spec of a base leaf, None), or (None, what is wrong)."""
    if path not in base:
        # P written as a plain tuple or list was flattened as a tree.
        if any(p.startswith(path + "/") for p in base):
            return None, "the base has a tree there; a PartitionSpec is written P('fsdp', 'tp')"
        return None, "the base has no such leaf; nearest: " + ", ".join(nearest(path, base, 3))
    x = base[path]
    names, value, own_rules, own_mesh = _names(x)
    found = value if isinstance(value, Sharding | PartitionSpec) else _own(value)
    # Names in a box count where a mesh is passed, or where the value does not say it itself.
    if names is not None and (mesh is not None or not isinstance(found, NamedSharding)):
        found, mesh = names, own_mesh if mesh is None else mesh
    if problem := summed(found):
        return None, problem
    if isinstance(found, PartitionSpec):
        rules = own_rules if rules is None else rules
        if rules is not None:
            try:
                found = _ruled(found, rules, () if mesh is None else mesh.axis_names)
            except ValueError as problem:
                return None, f"{found}: {problem}"
        if mesh is None:
            return found, None
        if odd := [x for x in found if x is not P.UNCONSTRAINED and not _is_entry(x)]:
            return None, f"{found}: {odd[0]!r} is no name of an axis"
        names = [name for entry in found for name in mesh_axes(entry)]
        unknown = set(names) - set(mesh.axis_names)
        if unknown:
            return None, (
                f"{found} names {', '.join(sorted(unknown))}; the mesh has "
                f"{', '.join(mesh.axis_names)}, and logical names need rules=[(name, axis), ...]"
            )
        if len(set(names)) != len(names):
            return None, f"{found} names an axis of the mesh twice"
        return NamedSharding(mesh, found), None
    if not isinstance(found, Sharding):
        return None, f"a {type(value).__name__} without a sharding"
    # The type of a tracer says how it lies along Explicit and Manual axes, and not along Auto ones.
    traced = any(isinstance(part, jax.core.Tracer) for part in jax.tree.leaves(value))
    if traced and isinstance(found, NamedSharding) and (left := _left_to_the_compiler(found.mesh)):
        return None, (
            f"is traced, and the compiler decides how it lies along {', '.join(left)}: call "
            "shardings outside of jax.jit, or pass specs"
        )
    if mesh is not None and (not isinstance(found, NamedSharding) or found.mesh != mesh):
        return None, f"is sharded as {found}, and not over the mesh that was passed"
    if not isinstance(found, NamedSharding) and len(found.device_set) > 1:
        return None, f"has a {type(found).__name__}; expected a NamedSharding"
    return found, None


def _is_entry(x: Any) -> bool:
    """Whether x says where an axis of an array lies: along an axis of a mesh, several or none."""
    several = isinstance(x, tuple | list) and all(isinstance(name, str) for name in x)
    return x is None or isinstance(x, str) or several


def _pairs(rules: Any) -> list[tuple[str, Any]]:
    """The rules, if each is (logical axis, None, a mesh axis or several)."""
    fits = lambda pair: (
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and _is_entry(pair[1])
    )
    # A dict is the names alone, and a name of two letters would pass for a pair.
    pairs = list(rules) if isinstance(rules, Iterable) and not isinstance(rules, Mapping) else [0]
    if not all(map(fits, pairs)):
        raise LoRAError(
            f"rules={rules!r}: expected pairs of a logical axis and what it is on the mesh: "
            "lora.parallel.shardings(params, adapters, mesh=mesh, rules=[('embed', 'fsdp'), "
            "('mlp', ('tp',)), ('layers', None)])"
        )
    return pairs


def _ruled(names: PartitionSpec, rules: Sequence, own: Sequence[str]) -> PartitionSpec:
    """Logical names as mesh axes; the mesh's own names stand for themselves."""
    entries = tuple(None if x is P.UNCONSTRAINED else x for x in names)
    free = set(own) - {name for name, _ in rules}
    # Flax takes rules in order, and replicates what none names: the mesh's own names come last.
    kept: list[Any] = [(x, x) for x in entries if mesh_axes(x) and free.issuperset(mesh_axes(x))]
    return nn.logical_to_mesh_axes(entries, [*rules, *kept]) or P()


def _own(x: Any) -> Any:
    """An array's sharding; of a tracer, that of its type."""
    return (
        jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    )


def _left_to_the_compiler(mesh: Any) -> list[str]:
    return [
        name
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
        if size > 1 and kind == AxisType.Auto
    ]


def _names(x: Any) -> tuple:
    """(spec of names, value, logical rules, mesh) of a box, or of what needs none."""
    if isinstance(x, nn.Partitioned):
        return x.get_partition_spec(), x.value, getattr(x, "rules", None), x.mesh
    if isinstance(x, nn.meta.AxisMetadata):
        return None, x.unbox(), None, None
    if isinstance(x, nnx.Variable):
        of = x.get_metadata()
        names, value = of.get("out_sharding"), x.get_value()
        if isinstance(names, Sharding):
            return None, names, None, None
        return P(*names) if names else None, value, of.get("sharding_rules"), of.get("mesh")
    # None in a tree of specs is a leaf that is replicated.
    return None, P() if x is None else x, None, None


def _too_long(found: Any, ndim: int) -> str | None:
    spec = getattr(found, "spec", found)
    if isinstance(spec, PartitionSpec) and len(spec) > ndim:
        return f"{spec} has {len(spec)} axes, the leaf {ndim}"
    return None


def _even(adapters: Any, result: Any) -> tuple[Any, list[str]]:
    """The shardings with axes that do not divide replicated, and a line for each of these."""
    dropped: list[str] = []

    def leaf(keys: tuple, x: Any, sharding: Any) -> Any:
        if not isinstance(sharding, NamedSharding):
            return sharding
        entries = list(sharding.spec)
        for d, entry in enumerate(entries):
            parts = math.prod(sharding.mesh.shape[name] for name in mesh_axes(entry))
            # jax.device_put and jit's out_shardings refuse such an axis.
            if x.shape[d] % parts:
                entries[d] = None
                dropped.append(
                    f"'{path_of(keys)}' {x.shape}: axis {d}, of size {x.shape[d]}, over "
                    f"{entry!r}, {parts} devices"
                )
        return NamedSharding(sharding.mesh, P(*entries))

    return jax.tree_util.tree_map_with_path(leaf, adapters, result), dropped
