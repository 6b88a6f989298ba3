"""Where the adapters live: each leaf's sharding from its base's.

A runs along the weight's input axes, B along its output axes, both along its stack (layers,
experts); so each takes the base's sharding of the axes that it shares, and the rank is replicated.
Then the products with A and B need no collective that those with W do not, and none of the
gradients is larger than an adapter.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.nnx import state_of
from lora_jax._core.paths import flatten, map_with_path, nearest, path_of
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
      adapters: what `init` returned, arrays or shapes; or the `Targets` that `select` returned.
      mesh: of specs and of names in boxes; with it, names go before the arrays' own sharding.
      rules: pairs (logical axis, mesh axis or axes), for specs and boxes of logical names, as in
        `nn.logical_to_mesh_axes`; an axis without a rule is replicated.
      uneven: what to do with an axis that the devices do not divide: raise, or replicate it and
        warn once, with all such leaves.

    Returns:
      A tree like the adapters: `NamedSharding`s, for `jax.jit(..., out_shardings=)` and
      `jax.device_put`; `PartitionSpec`s, for `jax.shard_map`, where params are specs and no mesh is
      given; a base array's own sharding where it is on one device.

    Raises:
      LoRAError: a base leaf that says nothing of its sharding, that is missing, or that names an
        axis which the mesh does not have; an axis that does not divide. All of them are listed.

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
    base = flatten(state_of(params), is_leaf=_says_where)
    failures: list[str] = []
    if isinstance(adapters, Targets):
        adapters = _abstract(adapters)

    def leaf(path: str, node: Any) -> Any:
        if not is_node(node):
            raise LoRAError(
                f"expected adapters or Targets, found a tree with a {type(node).__name__} at "
                f"'{path}': {CALL}"
            )
        found, problem = _base_sharding(base, path, mesh, rules)
        if problem is None:
            problem = _too_long(found, len(node.shape))
        if problem is not None:
            failures.append(f"'{path}': {problem}")
            return node
        spec = getattr(found, "spec", found)
        if not isinstance(spec, PartitionSpec):
            return jax.tree.map(lambda _: found, node)  # one device
        spec = P(*(None if x is P.UNCONSTRAINED else x for x in spec))
        if isinstance(found, PartitionSpec):
            return node.specs(spec)
        return jax.tree.map(lambda own: NamedSharding(found.mesh, own), node.specs(spec))

    result = map_with_path(leaf, adapters, is_leaf=is_node)
    raise_all("the base does not say how these leaves are sharded:", failures, CALL)
    result, dropped = _even(adapters, result)
    if dropped and uneven == "error":
        raise_all(
            "these axes do not divide among the devices:",
            dropped,
            "pad the base, change its sharding, or lora.parallel.shardings(..., "
            "uneven='replicate')",
        )
    if dropped:
        warnings.warn("\n  - ".join(["replicated:", *dropped]), stacklevel=2)
    return result


def _abstract(targets: Targets) -> Any:
    """The shapes of the adapters of these targets."""
    shapes = {path: t.shape for path, t in targets.lora.items()} | dict(targets.full)
    shapes |= {path: shape for path, (shape, _) in targets.rows.items()}
    flat = {p: jax.ShapeDtypeStruct(s, targets.config.dtype) for p, s in shapes.items()}
    return jax.eval_shape(lambda flat: init(jax.random.key(0), flat, targets), flat)


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
        if any(p.startswith(path + "/") for p in base):
            return None, "the base has a tree there; a PartitionSpec is written P('fsdp', 'tp')"
        return None, "the base has no such leaf; nearest: " + ", ".join(nearest(path, base, 3))
    x = base[path]
    names, value, own_rules, own_mesh = _names(x)
    found = value if isinstance(value, Sharding | PartitionSpec) else _own(value)
    if names is not None and (mesh is not None or not isinstance(found, NamedSharding)):
        found, mesh = names, own_mesh if mesh is None else mesh
    if isinstance(found, PartitionSpec):
        rules = own_rules if rules is None else rules
        if rules is not None:
            found = nn.logical_to_mesh_axes(tuple(found), rules) or P()
        if mesh is None:
            return found, None
        names = [name for entry in found for name in _entry(entry)]
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
    if mesh is not None and (not isinstance(found, NamedSharding) or found.mesh != mesh):
        return None, f"is sharded as {found}, and not over the mesh that was passed"
    if not isinstance(found, NamedSharding) and len(found.device_set) > 1:
        return None, f"has a {type(found).__name__}; expected a NamedSharding"
    return found, None


def _own(x: Any) -> Any:
    """An array's sharding; of a tracer, that of its type."""
    if isinstance(x, jax.core.Tracer):
        return jax.typeof(x).sharding
    return getattr(x, "sharding", None)


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
    return None, P() if x is None else x, None, None


def _entry(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    if entry is None or entry is P.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


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
            parts = math.prod(sharding.mesh.shape[name] for name in _entry(entry))
            if x.shape[d] % parts:
                entries[d] = None
                dropped.append(
                    f"'{path_of(keys)}' {x.shape}: axis {d}, of size {x.shape[d]}, over "
                    f"{entry!r}, {parts} devices"
                )
        return NamedSharding(sharding.mesh, P(*entries))

    return jax.tree_util.tree_map_with_path(leaf, adapters, result), dropped
