"""Where the adapters live: each leaf's sharding from its base's.

A runs along the weight's input axes, B along its output axes, both along its stack (layers,
experts); so each takes the base's sharding of the axes that it shares, and the rank is replicated.
Then the products with A and B need no collective that those with W do not, and none of the
gradients is larger than an adapter.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from lora_jax._adapters import is_node
from lora_jax._errors import LoRAError, raise_all
from lora_jax._init import init
from lora_jax._nnx import state_of
from lora_jax._paths import flatten, map_with_path, nearest, path_of
from lora_jax._targets import Targets

P = PartitionSpec
CALL = "lora.shardings(params, adapters, mesh=mesh), with sharded params, or a tree of specs"


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
    >>> of = lora.shardings(specs, lora.select(params, config))["q"]["kernel"]
    >>> of.a, of.b
    (P('fsdp', None), P(None, 'tp', None))
    """
    if uneven not in ("error", "replicate"):
        raise LoRAError(f"uneven={uneven!r}: expected 'error' or 'replicate'")
    base = flatten(state_of(params), is_leaf=_says_where)
    failures: list[str] = []
    if isinstance(adapters, Targets):
        adapters = _abstract(adapters)

    def leaf(path, node):
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
            "pad the base, change its sharding, or lora.shardings(..., uneven='replicate')",
        )
    if dropped:
        warnings.warn("\n  - ".join(["replicated:", *dropped]), stacklevel=2)
    return result


def state_shardings(state: Any, tree: Any, shardings: Any) -> Any:
    """The sharding of each leaf of an optimiser's state: that of the leaf which it belongs to.

    Every part of `state` that has the structure of `tree` (moments, accumulated gradients; also
    with `optax.MaskedNode`s, as under `optax.partition`) is sharded like it. An array with as many
    axes as its leaf, but with other sizes (GaLore's projector and moments), is sharded along the
    axes that have the leaf's size. All else (counts, factored moments with less axes, the constants
    of moments in 8 bits) is replicated.

    Args:
      state: `tx.init(adapters)`, arrays or, by `jax.eval_shape(tx.init, adapters)`, shapes; or any
        tree that holds such states, as a `flax.training.train_state.TrainState` does.
      tree: what the optimiser trains: the adapters, arrays or shapes.
      shardings: of `tree`, as from `lora.shardings`.

    Returns:
      A tree like `state`.

    Raises:
      LoRAError: `shardings` is not a tree like `tree`, or the state holds adapters of another one.

    >>> import jax, optax, lora_jax as lora
    >>> from jax.sharding import PartitionSpec as P
    >>> params = {"q": jax.ShapeDtypeStruct((64, 32), "float32")}
    >>> make = lambda: lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=4, targets="q"))
    >>> adapters = jax.eval_shape(make)
    >>> specs = lora.shardings({"q": P("fsdp", "tp")}, adapters)
    >>> state = jax.eval_shape(optax.adam(1e-3).init, adapters)
    >>> adam, _ = lora.state_shardings(state, adapters, specs)
    >>> adam.count, adam.mu["q"].a, adam.nu["q"].b
    (P(), P('fsdp', None), P(None, 'tp'))
    """
    structure = jax.tree.structure(tree)
    if jax.tree.structure(shardings) != structure:
        raise LoRAError(
            "the shardings are of another tree; expected the structure of the trained tree, "
            f"{structure}, found {jax.tree.structure(shardings)}: "
            "lora.state_shardings(state, adapters, lora.shardings(params, adapters))"
        )
    paired = _bare(jax.tree.map(_Pair, tree, shardings))
    some = next(iter(jax.tree.leaves(shardings)), P())
    odd: list[str] = []
    everywhere = P() if isinstance(some, PartitionSpec) else some
    if isinstance(some, NamedSharding):
        everywhere = NamedSharding(some.mesh, P())

    def part(keys, x):
        pairs = _matched(x, paired)
        if pairs is None:
            if is_node(x):
                odd.append(f"'{path_of(keys)}': a {type(x).__name__} of {x.shape}")
            return everywhere
        leaves, treedef = jax.tree.flatten(x, is_leaf=_masked)
        return treedef.unflatten(
            leaf if _masked(leaf) else _along(jnp.shape(leaf), pair, everywhere)
            for leaf, pair in zip(leaves, pairs)
        )

    stop = lambda x: is_node(x) or _matched(x, paired) is not None
    result = jax.tree_util.tree_map_with_path(part, state, is_leaf=stop)
    raise_all(
        "the state holds adapters that are no part of the tree that it is said to train:",
        odd,
        "lora.state_shardings(jax.eval_shape(tx.init, adapters), adapters, shardings)",
    )
    return result


class _Pair:
    """A leaf and its sharding, as one leaf."""

    def __init__(self, like, sharding):
        self.like, self.sharding = like, sharding


def _along(shape, pair: _Pair, everywhere) -> Any:
    """The sharding of an array of this shape that belongs to the leaf of the pair."""
    like, found = pair.like.shape, pair.sharding
    spec = getattr(found, "spec", found)
    if shape == like:
        return found
    if len(shape) != len(like) or not isinstance(spec, PartitionSpec):
        return everywhere
    entries = (*spec, *(None,) * (len(like) - len(spec)))
    spec = P(*(entry if n == size else None for entry, n, size in zip(entries, shape, like)))
    return NamedSharding(found.mesh, spec) if isinstance(found, NamedSharding) else spec


def _bare(tree):
    """The tree with each adapter as a dict of its arrays: its scale, which is static, aside."""

    def arrays(x):
        if not is_node(x):
            return x
        leaves = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda child: child is not x)[0]
        return {keys[0].name: child for keys, child in leaves}

    return jax.tree.map(arrays, tree, is_leaf=is_node)


def _masked(x) -> bool:
    return isinstance(x, optax.MaskedNode)


def _matched(x, paired) -> list | None:
    """For each leaf of x its partner, if x has the structure of `paired`, or less of it; or more,
    where it has several arrays for each of a leaf's (codes and constants of moments in 8 bits)."""
    bare = _bare(x)
    leaves = jax.tree.leaves(bare, is_leaf=_masked)
    try:
        partners = jax.tree.structure(bare, is_leaf=_masked).flatten_up_to(paired)
    except ValueError:
        return _several(bare, paired)
    fits = all(_masked(leaf) or isinstance(p, _Pair) for leaf, p in zip(leaves, partners))
    return partners if fits else None


def _several(bare, paired) -> list | None:
    try:
        parts = jax.tree.structure(paired).flatten_up_to(bare)
    except ValueError:
        return None
    pairs = zip(jax.tree.leaves(paired), parts)
    return [pair for pair, part in pairs for _ in jax.tree.leaves(part, is_leaf=_masked)]


def _abstract(targets: Targets) -> Any:
    """The shapes of the adapters of these targets."""
    shapes = {path: t.shape for path, t in targets.lora.items()} | dict(targets.full)
    shapes |= {path: shape for path, (shape, _) in targets.rows.items()}
    flat = {p: jax.ShapeDtypeStruct(s, targets.config.dtype) for p, s in shapes.items()}
    return jax.eval_shape(lambda flat: init(jax.random.key(0), flat, targets), flat)


def _says_where(x) -> bool:
    return x is None or isinstance(
        x, Sharding | PartitionSpec | nn.meta.AxisMetadata | nnx.Variable
    )


def _base_sharding(base, path, mesh, rules) -> tuple[Any, str | None]:
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
            found = nn.logical_to_mesh_axes(tuple(found), rules)
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


def _own(x) -> Any:
    """An array's sharding; of a tracer, that of its type."""
    if isinstance(x, jax.core.Tracer):
        return jax.typeof(x).sharding
    return getattr(x, "sharding", None)


def _names(x) -> tuple:
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


def _entry(entry) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    if entry is None or entry is P.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _too_long(found, ndim: int) -> str | None:
    spec = getattr(found, "spec", found)
    if isinstance(spec, PartitionSpec) and len(spec) > ndim:
        return f"{spec} has {len(spec)} axes, the leaf {ndim}"
    return None


def _even(adapters, result) -> tuple[Any, list[str]]:
    """The shardings with axes that do not divide replicated, and a line for each of these."""
    dropped: list[str] = []

    def leaf(keys, x, sharding):
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
