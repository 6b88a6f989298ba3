"""The leaves of a tree by name: what a checkpoint says of each, and how each is read back.

Names are paths. In orbax's own names a dot separates, so that two leaves whose keys hold dots would
be one file and one of them lost; here dots are escaped.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Set
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core.errors import raise_all
from lora_jax._core.paths import flatten
from lora_jax._core.placement import is_gone
from lora_jax._nodes.node import is_node
from lora_jax.checkpoint._describe import node_to_json
from lora_jax.checkpoint._fingerprint import checksums


def named(tree: Any) -> dict[str, Any]:
    """{path: leaf}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in leaves]
    raise_all(
        "several leaves of the tree have one path:",
        (f"'{path}' ({n} leaves)" for path, n in Counter(paths).items() if n > 1),
        "no key may hold a slash",
    )
    return {path: x for path, (_, x) in zip(paths, leaves)}


def escaped(name: str) -> str:
    """A path as orbax may name it.

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
        elif _is_storable(x):
            entries[path] = {"array": _type(x)}
            if _is_key(x):
                entries[path]["key"] = str(jax.random.key_impl(x))
            # A typed key is written as its words, uint32.
            arrays[path] = jax.random.key_data(x) if _is_key(x) else _own(x)
        else:
            failures.append(f"{what}: '{path}' is {_kind(x)}")
    raise_all(
        "these leaves cannot be saved:",
        failures,
        "expected arrays, random keys, numbers or strings",
    )
    # After all are known to be storable: this reads every value.
    for path, value in checksums(arrays).items():
        entries[path]["sum"] = value
    # What has no elements is whole by its entry, and not written.
    return entries, {escaped(p): x for p, x in arrays.items() if x.size}


def differences(
    entries: Mapping[str, Mapping], like: Any, what: str, growing: Mapping[str, int] | None
) -> list[str]:
    """A line for each leaf that is saved and not expected, or the other way round, or of another
    kind, type or shape (`growing`: {path: axis along which it may be larger}; None: any shape)."""
    wanted = named(like)
    lines = [f"{what}: '{p}' was saved, but is not expected" for p in entries.keys() - wanted]
    lines += [f"{what}: '{p}' was not saved" for p in wanted.keys() - entries.keys()]
    for path in wanted.keys() & entries.keys():
        entry, x = entries[path], wanted[path]
        if not _is_plain(x) and not hasattr(x, "dtype"):
            lines.append(f"{what}: '{path}' was saved as {_said(entry)}, found {_kind(x)}")
            continue
        mine = {"value": x} if _is_plain(x) else {"array": _type(x)}
        if "value" in entry and "value" in mine:
            same = type(entry["value"]) is type(x)
        elif "value" in entry or "value" in mine:
            # A step count may be Python's number in one tree and an array of one in the other.
            same = _number(entry) == _number(mine) is not None and _holds(mine, entry)
        elif growing is None:
            same = True
        else:
            dtype, shape = _type(x)
            saved_dtype, saved = entry["array"]
            same = dtype == saved_dtype and _fits(saved, shape, growing.get(path))
        if not same:
            lines.append(f"{what}: '{path}' was saved as {_said(entry)}, found {_said(mine)}")
    return sorted(lines)


def other_nodes(described: Mapping[str, Any], adapters: Any, growing: Set[str]) -> list[str]:
    """A line for each adapter that is not as the one that was saved; of those that grow, rank and
    scale are not compared."""
    lines = []
    for path, node in flatten(adapters, is_leaf=is_node).items():
        if not is_node(node):
            lines.append(f"adapters: '{path}' is a {type(node).__name__}, not an adapter")
        # Otherwise, as where it holds what is no array, `differences` says so.
        elif path in described and all(hasattr(x, "dtype") for x in jax.tree.leaves(node)):
            mine, theirs = node_to_json(node), described[path]
            aside = ("a", "b", "scale") if path in growing else ()
            odd = {k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k)}
            lines += [
                f"adapters: '{path}': {k} {theirs.get(k)} was saved, found {mine.get(k)}"
                for k in sorted(odd.difference(aside))
            ]
    return lines


def abstract(entries: Mapping[str, Mapping], like: Any) -> dict[str, Any]:
    """{escaped path: what orbax is to restore}: shapes as saved, placed as `like`.

    What `like` puts on no device in particular is read into host memory.
    """
    targets: dict[str, Any] = {}
    for path, x in named(like).items():
        # Nothing of it is in orbax's files.
        if "value" in entries[path] or 0 in entries[path]["array"][1]:
            continue
        dtype, shape = entries[path]["array"]
        if "key" in entries[path]:
            # The words of its keys.
            dtype, shape = "uint32", jax.eval_shape(jax.random.key_data, x).shape
        where = placement(x)
        targets[escaped(path)] = (
            # Orbax reads into NumPy what is asked for as NumPy.
            np.empty(shape, jnp.dtype(dtype))
            if where is None
            else jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=where)
        )
    return targets


def rebuilt(
    entries: Mapping[str, Mapping],
    like: Any,
    arrays: Mapping[str, Any],
    growing: Mapping[str, tuple],
    where: str,
) -> Any:
    """The tree with what was read; raises if a value is not what was saved.

    `growing`: {path: (axis, whether it keeps the rest of `like` there, and not zeros)}.
    """
    values = {p: arrays[escaped(p)] for p in entries if escaped(p) in arrays}
    # Before anything is padded: of what was saved.
    sums = checksums(values)
    raise_all(
        f"{where} is damaged:",
        [
            f"'{p}': the values are not those that were saved"
            for p, s in sums.items()
            if s != entries[p]["sum"]
        ],
        "restore another step by lora.checkpoint.restore(..., step=...)",
    )
    leaves = [
        _leaf(entries[p], values.get(p), x, *growing.get(p, (None, False)))
        for p, x in named(like).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def placement(x: Any) -> Any:
    """The sharding that a leaf is committed to, or None."""
    if isinstance(x, jax.Array) and not x.committed:
        return None
    return getattr(x, "sharding", None)


def _type(x: Any) -> list:
    return [str(x.dtype), list(x.shape)]


def _kind(x: Any) -> str:
    if not hasattr(x, "dtype"):
        return type(x).__name__
    why = ", traced: save outside of jax.jit" if isinstance(x, jax.core.Tracer) else ""
    return f"{x.dtype}{tuple(x.shape)}{', donated or deleted' if is_gone(x) else why}"


def _is_plain(x: Any) -> bool:
    """Whether a leaf is kept as JSON: an enum, or NumPy's float64, would come back as another."""
    return type(x) in (bool, int, float, str)


def _said(entry: Mapping) -> str:
    if "value" in entry:
        return f"a {type(entry['value']).__name__}"
    dtype, shape = entry["array"]
    return f"{dtype}{tuple(shape)}" if shape else f"a {dtype}"


def _is_key(x: Any) -> TypeGuard[jax.Array]:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


# JAX's and NumPy's types that files have a name for.
_STORABLE = re.compile(r"bool|u?int(8|16|32|64)|int[24]|b?float(8_\w+|16|32|64)|complex(64|128)")


def _is_storable(x: Any) -> bool:
    if not isinstance(x, jax.Array | np.ndarray | np.generic) or isinstance(x, jax.core.Tracer):
        return False
    if _is_key(x):
        return x.size > 0 and not is_gone(x)
    # A mask would be lost.
    masked = isinstance(x, np.ma.MaskedArray)
    return not masked and _STORABLE.fullmatch(str(x.dtype)) is not None


def _own(x: Any) -> Any:
    """A copy of what is in host memory: that may be changed while it is written."""
    return x if isinstance(x, jax.Array) else np.array(x)


def _leaf(entry: Mapping, value: Any, like: Any, axis: int | None, keep: bool) -> Any:
    """A restored leaf of the kind of `like`, padded along `axis` to its size."""
    if _is_plain(like):
        return entry["value"] if "value" in entry else type(like)(np.asarray(value)[()])
    if "value" in entry:
        value = np.asarray(entry["value"], like.dtype)
        where = placement(like)
        return jnp.asarray(value) if where is None else jax.device_put(value, where)
    # It has no elements.
    if value is None:
        abstract = isinstance(like, jax.ShapeDtypeStruct)
        return jnp.zeros(like.shape, like.dtype, device=like.sharding) if abstract else like
    if "key" in entry:
        return jax.random.wrap_key_data(jnp.asarray(value), impl=entry["key"])
    on_host = isinstance(like, np.ndarray | np.generic)
    value = np.asarray(value) if on_host else jnp.asarray(value)
    if axis is not None and value.shape[axis] < like.shape[axis]:
        value = _padded(value, like, axis, keep)
    return value[()] if isinstance(like, np.generic) else value


def _padded(value: Any, like: Any, axis: int, keep: bool) -> Any:
    """`value` with the rest of `like` behind it along `axis`, or zeros."""

    def pad(value: Any, like: Any) -> jax.Array:
        rest = jax.lax.slice_in_dim(like, value.shape[axis], like.shape[axis], axis=axis)
        return jnp.concatenate([value, rest if keep else jnp.zeros_like(rest)], axis)

    if isinstance(like, np.ndarray):
        # On the host, and back to it.
        return np.asarray(pad(value, like))
    if not isinstance(like, jax.Array):
        like = jnp.zeros(like.shape, like.dtype)
    # Jitted, so that the result lies as `like` does without a copy on one device.
    return jax.jit(pad, out_shardings=placement(like))(value, like)


def _number(entry: Mapping) -> type | None:
    """int or float of a number, or of an array of one: either may be read as the other."""
    if "value" in entry:
        return {int: int, float: float}.get(type(entry["value"]))
    if entry["array"][1] != [] or "key" in entry:
        return None
    dtype, kinds = jnp.dtype(entry["array"][0]), {int: jnp.integer, float: jnp.floating}
    return next((t for t, kind in kinds.items() if jnp.issubdtype(dtype, kind)), None)


def _holds(mine: Mapping, entry: Mapping) -> bool:
    """Whether an array of integers has room for a saved one."""
    if "value" in mine or _number(entry) is float:
        return True
    info = jnp.iinfo(mine["array"][0])
    return info.min <= entry["value"] <= info.max


def _fits(saved: list[int], wanted: list[int], axis: int | None) -> bool:
    """Whether the shapes are equal, or but for `axis`, which is larger."""
    if axis is None or len(saved) != len(wanted):
        return saved == wanted
    rest = lambda shape: [n for d, n in enumerate(shape) if d != axis]
    return rest(saved) == rest(wanted) and saved[axis] <= wanted[axis]
