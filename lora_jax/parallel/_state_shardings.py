"""Where the optimiser's state lives: where its leaf does."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.paths import path_of
from lora_jax._nodes.node import is_node
from lora_jax.parallel._shardings import P


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
      shardings: of `tree`, as from `lora.parallel.shardings`.

    Returns:
      A tree like `state`.

    Raises:
      LoRAError: `shardings` is not a tree like `tree`, or the state holds adapters of another one.

    >>> import jax, optax, lora_jax as lora
    >>> from jax.sharding import PartitionSpec as P
    >>> params = {"q": jax.ShapeDtypeStruct((64, 32), "float32")}
    >>> make = lambda: lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=4, targets="q"))
    >>> adapters = jax.eval_shape(make)
    >>> specs = lora.parallel.shardings({"q": P("fsdp", "tp")}, adapters)
    >>> state = jax.eval_shape(optax.adam(1e-3).init, adapters)
    >>> adam, _ = lora.parallel.state_shardings(state, adapters, specs)
    >>> adam.count, adam.mu["q"].a, adam.nu["q"].b
    (P(), P('fsdp', None), P(None, 'tp'))
    """
    structure, at = jax.tree.structure(tree), jax.tree.leaves(shardings)
    places = PartitionSpec | Sharding
    if jax.tree.structure(shardings) != structure or not all(isinstance(x, places) for x in at):
        raise LoRAError(
            "the shardings are of another tree; expected the structure of the trained tree, "
            f"{structure}, found {jax.tree.structure(shardings)}: "
            "lora.parallel.state_shardings(state, adapters, lora.parallel.shardings(params, "
            "adapters))"
        )
    # (leaf, sharding) in the structure of the tree: a part of the state is compared with this.
    paired = _bare(jax.tree.map(_Pair, tree, shardings))
    some = next(iter(at), P())
    odd: list[str] = []
    # Replicated, in the form that the caller's shardings have: a spec, a sharding, or one device.
    everywhere = P() if isinstance(some, PartitionSpec) else some
    if isinstance(some, NamedSharding):
        everywhere = NamedSharding(some.mesh, P())

    def part(keys: tuple, x: Any) -> Any:
        # The partners of x's leaves, where x is a copy of the tree, such as mu in Adam's state.
        pairs = _matched(x, paired)
        if pairs is None:
            if is_node(x):
                odd.append(f"'{path_of(keys)}': a {type(x).__name__} of {x.shape}")
            return everywhere
        leaves, treedef = jax.tree.flatten(x, is_leaf=_masked)
        # A MaskedNode stays: the state that comes back has its structure.
        return treedef.unflatten(
            leaf if _masked(leaf) else _along(jnp.shape(leaf), pair, everywhere)
            for leaf, pair in zip(leaves, pairs)
        )

    # The outermost part that matches is taken whole; what holds it, tuples and dicts, is walked.
    stop = lambda x: is_node(x) or _matched(x, paired) is not None
    result = jax.tree_util.tree_map_with_path(part, state, is_leaf=stop)
    raise_all(
        "the state holds adapters that are no part of the tree that it is said to train:",
        odd,
        "lora.parallel.state_shardings(jax.eval_shape(tx.init, adapters), adapters, shardings)",
    )
    return result


class _Pair:
    """A leaf and its sharding, as one leaf."""

    def __init__(self, like: Any, sharding: Any):
        self.like, self.sharding = like, sharding


def _along(shape: tuple[int, ...], pair: _Pair, everywhere: Any) -> Any:
    """The sharding of an array of this shape that belongs to the leaf of the pair."""
    like, found = pair.like.shape, pair.sharding
    spec = getattr(found, "spec", found)
    if shape == like:
        return found
    if len(shape) != len(like) or not isinstance(spec, PartitionSpec):
        return everywhere
    # A spec may be shorter than the array; the axes that it lacks are replicated.
    entries = (*spec, *(None,) * (len(like) - len(spec)))
    spec = P(*(entry if n == size else None for entry, n, size in zip(entries, shape, like)))
    return NamedSharding(found.mesh, spec) if isinstance(found, NamedSharding) else spec


def _bare(tree: Any) -> Any:
    """The tree with each adapter as a dict of its arrays: its scale, which is static, aside."""

    def arrays(x: Any) -> Any:
        if not is_node(x):
            return x
        # One level deep: the node's arrays, or what stands in their place.
        leaves = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda child: child is not x)[0]
        return {keys[0].name: child for keys, child in leaves}

    return jax.tree.map(arrays, tree, is_leaf=is_node)


def _masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _matched(x: Any, paired: Any) -> list | None:
    """The partner of each leaf of x, if x has the structure of `paired`; else None.

    x may have less of it, MaskedNodes, or more: several arrays for a leaf, such as codes and
    constants of moments in 8 bits.
    """
    bare = _bare(x)
    leaves = jax.tree.leaves(bare, is_leaf=_masked)
    try:
        # Up to x's leaves: where x has less, a MaskedNode stands before a whole subtree of pairs.
        partners = jax.tree.structure(bare, is_leaf=_masked).flatten_up_to(paired)
    except ValueError:
        return _several(bare, paired)
    fits = all(_masked(leaf) or isinstance(p, _Pair) for leaf, p in zip(leaves, partners))
    return partners if fits else None


def _several(bare: Any, paired: Any) -> list | None:
    try:
        # The other way round: where x has more, several of its arrays stand for one leaf.
        parts = jax.tree.structure(paired).flatten_up_to(bare)
    except ValueError:
        return None
    pairs = zip(jax.tree.leaves(paired), parts)
    return [pair for pair, part in pairs for _ in jax.tree.leaves(part, is_leaf=_masked)]
