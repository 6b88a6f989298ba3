"""Small adapters read into larger ones: which leaves grow, what of the larger stays, the scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._config import LoRAConfig, Rule
from lora_jax._core.paths import flatten, path_of
from lora_jax._nodes.adapters import LowRank
from lora_jax._nodes.node import is_node


def growing(tree: Any, saved: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """{path of an array: (path of its adapter, its rank axis)}, of the adapters in a tree (or of
    their moments in a state) that have a larger rank than the one that was saved."""
    found = {}
    for keys, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_node):
        # A moment of "layers/q" is at "0/mu/layers/q" in the state.
        owner = _owner(path_of(keys), saved)
        if owner is None or not isinstance(node, LowRank):
            continue
        if not isinstance(saved[owner], LowRank):
            continue
        of = {"a": len(node.geometry.a_dims) - 1, "b": len(node.geometry.batch_axes)}
        at = jax.tree_util.keystr(keys, simple=True, separator="/")
        for name, axis in of.items():
            factor = getattr(node, name)
            # A MaskedNode in a state has no shape.
            if hasattr(factor, "shape") and factor.shape[axis] != saved[owner].rank:
                found[f"{at}/{name}"] = (owner, axis)
    return found


def kept(adapters: Any, saved: Mapping[str, Any], paths: set[str]) -> tuple[set[str], list[str]]:
    """(names of the factors whose new part stays as it was passed, what is wrong).

    One factor of the new part is zero, so that the product stays. The other is not, or neither
    would ever get a gradient: that one is kept.
    """
    names, lines = set(), []
    for path, node in flatten(adapters, is_leaf=is_node).items():
        # Those that do not grow are compared as they are, by `other_nodes`.
        if path not in paths:
            continue
        rank, least = node.rank, saved[path].rank
        problem = None
        if rank < least:
            problem = f"rank {least} was saved, found {rank}; a rank can only grow"
        elif node.shape != saved[path].shape or node.a.dtype != saved[path].a.dtype:
            problem = f"of {saved[path].shape} {saved[path].a.dtype} was saved, found {node.shape}"
            problem += f" {node.a.dtype}"
        elif not all(isinstance(x, jax.Array) for x in (node.a, node.b)):
            problem = "to grow, pass arrays, adapters = lora.init(key, params, config), not shapes"
        else:
            # The new columns of A, (*batch, *in, rank), and rows of B, (*batch, rank, *out).
            tails = {
                "a": node.a[..., least:],
                "b": jax.lax.slice_in_dim(node.b, least, rank, axis=len(node.geometry.batch_axes)),
            }
            drawn = [name for name, x in tails.items() if bool(jnp.any(x != 0))]
            names.update(f"{path}/{name}" for name in drawn)
            if len(drawn) != 1:
                problem = (
                    f"of its new part, {' and '.join(drawn) or 'neither factor'} is not zero; "
                    "expected one: pass adapters as lora.init makes them"
                )
        if problem is not None:
            lines.append(f"adapters: '{path}': {problem}")
    return names, lines


def with_scales(tree: Any, saved: Mapping[str, Any]) -> Any:
    """The tree, its adapters (or their moments) with the scales that were saved."""

    def node(keys: Any, x: Any) -> Any:
        owner = _owner(path_of(keys), saved)
        if not isinstance(x, LowRank) or owner is None:
            return x
        return dataclasses.replace(x, scale=saved[owner].scale)

    return jax.tree_util.tree_map_with_path(node, tree, is_leaf=is_node)


def config_of(config: LoRAConfig, adapters: Any) -> LoRAConfig:
    """The configuration with the rank of each adapter, and alpha such that its scale is the same:
    a rule for each leaf."""
    rules = []
    for path, node in flatten(adapters, is_leaf=is_node).items():
        if isinstance(node, LowRank):
            # The scale is linear in alpha, by rank or by its root.
            alpha = node.scale / config.scale(node.rank, 1.0)
            leaf = jax.ShapeDtypeStruct(node.shape, node.a.dtype)
            rule = dataclasses.replace(config.rule(path, leaf), pattern=path, rank=node.rank)
            rules.append(dataclasses.replace(rule, alpha=alpha))
    if not rules:
        return config
    first: Rule = rules[0]
    # All alike: the configuration's own rank and alpha say it.
    if all((r.rank, r.alpha) == (first.rank, first.alpha) for r in rules) and not config.rules:
        assert first.rank is not None and first.alpha is not None  # by `rule`
        return dataclasses.replace(config, rank=first.rank, alpha=first.alpha)
    return dataclasses.replace(config, rules=tuple(rules))


def _owner(path: str, saved: Mapping[str, Any]) -> str | None:
    """The longest path of a saved adapter that a path in a tree ends with."""
    found = [p for p in saved if path == p or path.endswith("/" + p)]
    return max(found, key=len, default=None)
