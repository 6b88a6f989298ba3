"""The leaves of a tree by name: what a checkpoint says of each, and how each is read back.

Names are paths. In orbax's own names a dot separates, so that two leaves whose keys hold dots would
be one file and one of them lost; here dots are escaped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapters import LoRA, is_node
from lora_jax._describe import node_to_json
from lora_jax._errors import LoRAError, raise_all
from lora_jax._fingerprint import checksums
from lora_jax._paths import flatten, path_of


def named(tree: Any) -> dict[str, Any]:
    """{path: leaf}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {jax.tree_util.keystr(keys, simple=True, separator="/"): x for keys, x in leaves}
    if len(flat) != len(leaves):
        raise LoRAError("two leaves of the tree have one path; no key may hold a slash")
    return flat


def escaped(name: str) -> str:
    """
    >>> escaped("layers/0.1/kernel")
    'layers.0%2E1.kernel'
    """
    return name.replace("%", "%25").replace(".", "%2E").replace("/", ".")


def recorded(tree: Any, what: str) -> tuple[dict[str, dict], dict[str, Any]]:
    """({path: entry}, {escaped path: array}): what JSON says of each leaf, and what orbax writes.

    An entry is {"value": ...} of a number or string, or {"array": [dtype, shape], "sum": checksum},
    of a typed key with {"key": its implementation}.
    """
    entries, arrays, failures = {}, {}, []
    for path, x in named(tree).items():
        if _is_plain(x):
            entries[path] = {"value": x}
        elif isinstance(x, jax.Array | np.ndarray | np.generic):
            entries[path] = {"array": _type(x)}
            if _is_key(x):
                entries[path]["key"] = str(jax.random.key_impl(x))
            arrays[path] = jax.random.key_data(x) if _is_key(x) else _own(x)
        else:
            failures.append(f"{what}: '{path}' is a {type(x).__name__}")
    raise_all(
        "these leaves cannot be saved:",
        failures,
        "expected arrays, random keys, numbers or strings",
    )
    for path, value in checksums(arrays).items():
        entries[path]["sum"] = value
    return entries, {escaped(p): x for p, x in arrays.items() if x.size}


def differences(entries, like: Any, what: str, shapes: bool, grow: bool) -> list[str]:
    """A line for each leaf that is saved and not expected, or the other way round, or of another
    kind; with `shapes`, or another type or shape."""
    wanted = named(like)
    lines = [f"{what}: '{p}' was saved, but is not expected" for p in entries.keys() - wanted]
    lines += [f"{what}: '{p}' was not saved" for p in wanted.keys() - entries.keys()]
    for path in wanted.keys() & entries.keys():
        entry, x = entries[path], wanted[path]
        if ("value" in entry) != _is_plain(x):
            found = type(x).__name__
            lines.append(f"{what}: '{path}' was saved as {_said(entry)}, found a {found}")
        elif shapes and "array" in entry:
            dtype, shape = _type(x)
            saved_dtype, saved = entry["array"]
            same = shape == saved or (grow and _one_axis_larger(saved, shape))
            if dtype != saved_dtype or not same:
                found = _said({"array": [dtype, shape]})
                lines.append(f"{what}: '{path}' was saved as {_said(entry)}, found {found}")
    return sorted(lines)


def other_nodes(saved: Mapping[str, Any], adapters: Any, grow: bool) -> list[str]:
    """A line for each adapter that is not as the one that was saved."""
    lines = []
    for path, node in flatten(adapters, is_leaf=is_node).items():
        if not is_node(node):
            lines.append(f"adapters: '{path}' is a {type(node).__name__}, not an adapter")
        elif path in saved:  # else `differences` says so
            mine, theirs = node_to_json(node), node_to_json(saved[path])
            if grow and isinstance(node, LoRA) and isinstance(saved[path], LoRA):
                mine, theirs, problem = _but_rank(node, saved[path], mine, theirs)
                lines += [f"adapters: '{path}': {problem}"] if problem else []
            odd = {k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k)}
            lines += [
                f"adapters: '{path}': {k} {theirs.get(k)} was saved, found {mine.get(k)}"
                for k in sorted(odd)
            ]
    return lines


def abstract(entries, like: Any) -> dict[str, Any]:
    """{escaped path: what orbax is to restore}: shapes as saved, placed as `like`.

    What `like` puts on no device in particular is read into host memory.
    """
    targets = {}
    for path, x in named(like).items():
        if "value" in entries[path] or 0 in entries[path]["array"][1]:
            continue
        dtype, shape = entries[path]["array"]
        if "key" in entries[path]:
            dtype, shape = "uint32", jax.eval_shape(jax.random.key_data, x).shape
        where = placement(x)
        targets[escaped(path)] = (
            np.empty(shape, jnp.dtype(dtype))
            if where is None
            else jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=where)
        )
    return targets


def rebuilt(entries, like: Any, arrays: Mapping[str, Any], fresh: Set[str], where: str) -> Any:
    """The tree with what was read; raises if a value is not what was saved.

    Where `like` is larger, the leaves that `fresh` names keep the rest of it, and others get zeros.
    """
    arrays = {
        p: arrays[escaped(p)] if escaped(p) in arrays else np.empty(e["array"][1], e["array"][0])
        for p, e in entries.items()
        if "array" in e
    }
    sums = checksums(arrays)
    raise_all(
        f"{where} is damaged:",
        [f"'{p}': the values are not those that were saved" for p, s in sums.items()
         if s != entries[p]["sum"]],
        "restore another step by lora.restore(..., step=...)",
    )  # fmt: skip
    leaves = [
        entries[p]["value"]
        if "value" in entries[p]
        else _leaf(arrays[p], x, entries[p].get("key"), p in fresh)
        for p, x in named(like).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def with_scales(tree: Any, saved: Mapping[str, Any]) -> Any:
    """The tree, its nodes (the adapters, or their moments) with the scales that were saved."""

    def node(keys, x):
        if not isinstance(x, LoRA):
            return x
        path = path_of(keys)
        owners = [p for p in saved if path == p or path.endswith("/" + p)]
        if not owners:
            return x
        return dataclasses.replace(x, scale=saved[max(owners, key=len)].scale)

    return jax.tree_util.tree_map_with_path(node, tree, is_leaf=is_node)


def _type(x) -> list:
    return [str(x.dtype), list(x.shape)]


def _is_plain(x) -> bool:
    """Whether a leaf is kept as JSON. (NumPy's float64 is a float of Python's, and is not.)"""
    return isinstance(x, bool | int | float | str) and not isinstance(x, np.generic)


def _said(entry) -> str:
    if "value" in entry:
        return f"a {type(entry['value']).__name__}"
    dtype, shape = entry["array"]
    return f"{dtype}{tuple(shape)}"


def _is_key(x) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _own(x):
    """Of host memory a copy: it may be changed while it is written."""
    return x if isinstance(x, jax.Array) else np.array(x)


def placement(x):
    """The sharding that a leaf is committed to, or None."""
    if isinstance(x, jax.Array) and not x.committed:
        return None
    return getattr(x, "sharding", None)


def _leaf(value, like, impl: str | None, fresh: bool):
    """A restored array as `like`, padded to its shape: by the end of `like`, or by zeros."""
    if impl is not None:
        return jax.random.wrap_key_data(jnp.asarray(value), impl=impl)
    if isinstance(like, np.ndarray | np.generic):
        return value if isinstance(like, np.ndarray) else np.asarray(value)[()]
    value = jnp.asarray(value)
    if value.shape == tuple(like.shape):
        return value
    axis = next(d for d, n in enumerate(value.shape) if n != like.shape[d])

    def pad(value, like):
        rest = jax.lax.slice_in_dim(like, value.shape[axis], like.shape[axis], axis=axis)
        return jnp.concatenate([value, rest if fresh else jnp.zeros_like(rest)], axis)

    if not isinstance(like, jax.Array):
        like = jnp.zeros(like.shape, like.dtype)
    return jax.jit(pad, out_shardings=placement(like))(value, like)


def drawn(adapters: Any) -> set[str]:
    """The names of the factors that start at random: those which may keep their new columns."""
    nodes = flatten(adapters, is_leaf=is_node)
    return {f"{p}/{'b' if n.embedding else 'a'}" for p, n in nodes.items() if isinstance(n, LoRA)}


def _but_rank(node: LoRA, saved: LoRA, mine: dict, theirs: dict) -> tuple[dict, dict, str | None]:
    """The descriptions without what a larger rank changes, and what forbids it."""
    if node.rank == saved.rank:
        return mine, theirs, None
    problem = None
    if node.rank < saved.rank:
        problem = f"rank {saved.rank} was saved, found {node.rank}; a rank can only grow"
    elif not isinstance(node.a, jax.Array):
        problem = "to grow, pass arrays, adapters = lora.init(key, params, config), not shapes"
    elif node.shape != saved.shape or node.a.dtype != saved.a.dtype:
        problem = f"{saved.a.dtype}{saved.shape} was saved, found {node.a.dtype}{node.shape}"
    keep = ("kind", "geometry", "dropout", "embedding")
    return {k: mine[k] for k in keep}, {k: theirs[k] for k in keep}, problem


def _one_axis_larger(saved, wanted) -> bool:
    larger = [a < b for a, b in zip(saved, wanted) if a != b]
    return len(saved) == len(wanted) and larger == [True]
