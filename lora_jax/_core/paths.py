"""Leaf paths: how a leaf of any Flax tree is named, whatever holds it.

A path is a string such as `encoder/layer_0/query/kernel`. The wrappers of Flax (`nn.Partitioned`
and its kin, `nnx.Param`) are transparent: they add nothing to the path of the array that they hold.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.tree_util import GetAttrKey, keystr

from lora_jax._core.errors import LoRAError


def path_of(keys: tuple) -> str:
    """The path of a leaf from the keys of `jax.tree_util.tree_flatten_with_path`."""
    if keys and isinstance(keys[-1], GetAttrKey) and keys[-1].name in ("value", "raw_value"):
        keys = keys[:-1]  # the box of nn.Partitioned or nnx.Param
    return keystr(keys, simple=True, separator="/")


def whole(is_leaf: Callable[[Any], bool] | None = None) -> Callable[[Any], bool]:
    """What is one leaf: what `is_leaf` says, and classes that say so of themselves."""
    return lambda x: getattr(type(x), "lora_leaf", False) or (is_leaf is not None and is_leaf(x))


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """{path: leaf} of any pytree, in the tree's own order; a quantised weight is one leaf.

    Raises:
      LoRAError: two leaves have the same path.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=whole(is_leaf))[0]
    flat = {path_of(keys): leaf for keys, leaf in leaves}
    # Such as {"a/b": x, "a": {"b": y}}, or the keys 1 and "1".
    if len(flat) != len(leaves):
        raise LoRAError(
            "two leaves of the tree have the same path; rename one of: "
            + ", ".join(sorted(path_of(k) for k, _ in leaves))
        )
    return flat


def map_with_path(
    fn: Callable[[str, Any], Any], tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """`jax.tree.map` that also passes the path; boxes are kept."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: fn(path_of(keys), leaf), tree, is_leaf=whole(is_leaf)
    )


def nest(flat: Mapping[str, Any]) -> dict:
    """{"a/b": x} as {"a": {"b": x}}.

    Raises:
      LoRAError: one path is the beginning of another.
    """
    tree: dict = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                break
        # A leaf where a dict has to be, or a dict where the leaf has to be.
        if not isinstance(node, dict) or last in node:
            raise LoRAError(
                f"'{path}' and another path that it begins or continues cannot both be trained in "
                "one tree; train one of them"
            )
        node[last] = value
    return tree


def module_of(path: str) -> str:
    """The path of the module that holds a leaf."""
    return path.rpartition("/")[0]


def nearest(name: str, paths: Iterable[str], n: int = 5) -> list[str]:
    """The paths that a person who wrote `name` most likely meant."""
    paths = list(paths)
    last = re.split(r"[/.]", name)[-1]
    # By its last name, against each name of a path, or as a whole: the better of both.
    score = {
        p: max(
            [difflib.SequenceMatcher(None, last, part).ratio() for part in p.split("/")]
            + [difflib.SequenceMatcher(None, name, p).ratio()]
        )
        for p in paths
    }
    return sorted(paths, key=lambda p: -score[p])[:n]
