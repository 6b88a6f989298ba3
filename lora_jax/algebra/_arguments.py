"""What functions of adapters are given, checked: adapters, a weight for each, a base, a rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.nnx import state_of
from lora_jax._core.numbers import SHARE, SIZE, is_real, shown
from lora_jax._core.paths import flatten
from lora_jax._core.placement import near
from lora_jax._nodes.adapters import DoRA, Full, LoRA, Rows
from lora_jax._nodes.factors import check_factors
from lora_jax._nodes.node import is_node
from lora_jax._quantized.waiting import check_codes
from lora_jax.algebra._finite import check_finite


def check_rank(rank: Any, energy: Any, call: str) -> tuple[int | None, float | None]:
    """The rank and the energy, one of them None; raises for all else. `call` has {} in their
    place."""
    fits = SIZE.fits(rank) if energy is None else rank is None and SHARE.fits(energy)
    if not fits:
        raise LoRAError(
            "expected a rank >= 1 or an energy in (0, 1] (and a rank < 2**24), found "
            f"rank={shown(rank)}, energy={shown(energy)}: "
            f"{call.format('rank=8')} or {call.format('energy=0.95')}"
        )
    return SIZE.plain(rank), None if energy is None else float(energy)


def _several(
    adapters: Any, weights: Any, call: str
) -> tuple[list[Any], list[Mapping[str, Any] | Any]]:
    """The adapters, and a weight for each."""
    tree = isinstance(adapters, Mapping) or is_node(adapters)
    if tree or not _iterable(adapters):
        found = "one tree" if tree else type(adapters).__name__
        raise LoRAError(f"expected several adapters, found {found}: {call}")
    adapters = list(adapters)
    if weights is None:
        weights = [1.0] * len(adapters)
    if isinstance(weights, Mapping | str | bytes) or not _iterable(weights):
        raise LoRAError(f"expected a list of weights, found {type(weights).__name__}: {call}")
    weights = list(weights)
    if not adapters or len(adapters) != len(weights):
        raise LoRAError(
            f"expected one weight for each of {len(adapters)} adapters, found {len(weights)}: "
            + call
        )
    return adapters, [
        {p: _factor(x) for p, x in w.items()} if isinstance(w, Mapping) else _factor(w)
        for w in weights
    ]


def _iterable(x: Any) -> bool:
    # An array without axes says that it can be iterated over.
    return isinstance(x, Iterable) and getattr(x, "shape", None) != ()


def _factor(x: Any) -> Any:
    """A number of Python's, or an array of numbers; anything else as a text that shows it."""
    found = None
    try:
        if is_real(x):
            return float(x)
        found = None if isinstance(x, str | bytes) else jnp.asarray(x)
    except (TypeError, ValueError, OverflowError):
        pass
    numbers = (jnp.floating, jnp.integer)
    if found is None or not any(jnp.issubdtype(found.dtype, kind) for kind in numbers):
        return f"{x!r:.80}"
    return found


def _check_weights(trees: Sequence[Mapping[str, Any]], weights: Sequence[Any], call: str) -> None:
    """Raises for weights that are no numbers, lack a leaf, or name one that no tree has."""
    known = {path for tree in trees for path in tree}
    failures = []
    for k, (tree, weight) in enumerate(zip(trees, weights)):
        each = weight if isinstance(weight, Mapping) else {"": weight}
        failures += [
            f"weights[{k}]{f' of {path!r}' * bool(path)} is {x}: expected a finite number"
            for path, x in each.items()
            if isinstance(x, str)
        ]
        if isinstance(weight, Mapping):
            failures += [
                f"the weights have none for '{path}'; there are {', '.join(map(str, weight))}"
                for path in tree
                if path not in weight
            ]
            failures += [
                f"weights[{k}] has one for '{path}', which no adapter has"
                for path in weight
                if path not in known
            ]
    raise_all("these weights do not fit the adapters:", failures, call)


def _weight_of(weight: Any, path: str, node: Any) -> Any:
    """The weight of one leaf: a number, or an array along its first batch axes."""
    weight = weight[path] if isinstance(weight, Mapping) else weight
    axes = node.geometry.batch_axes if isinstance(node, LoRA) else ()
    shape, found = tuple(node.shape[d] for d in axes), jnp.shape(weight)
    # Such as the layers of (layers, experts).
    if found != shape[: len(found)]:
        raise LoRAError(
            f"'{path}': a weight of shape {found}; expected a number, or an array along the "
            f"leaf's batch axes, {shape}"
        )
    return weight


def linear(adapters: Any) -> Any:
    """The adapters, if each stands for an update that is added to the base."""
    adapters = checked(adapters)
    nodes = flatten(adapters, is_leaf=is_node)
    raise_all(
        "these are scaled by magnitudes, so what they add depends on the base:",
        (f"'{p}' is a DoRA" for p, n in nodes.items() if isinstance(n, DoRA)),
        "merge them, lora.merge(params, adapters), and take a low-rank update by "
        "lora.algebra.extract",
    )
    return adapters


def checked(adapters: Any) -> Any:
    """The adapters, if that is what they are."""
    nodes = jax.tree.leaves(adapters, is_leaf=is_node)
    wrong = [type(n).__name__ for n in nodes if not is_node(n)]
    if wrong or not nodes:
        raise LoRAError(
            f"expected adapters, as from lora.init, found {wrong[0] if wrong else 'an empty tree'}"
        )
    flat = flatten(adapters, is_leaf=is_node)
    check_factors(flat)
    raise_all(
        "these factors do not fit each other:",
        (f"'{p}'{wrong}" for p, n in flat.items() if (wrong := _unfit(n))),
        "make them by lora.init(key, params, config)",
    )
    # NumPy's fp64, as JAX has it.
    as_jax = lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x
    return near(jax.tree.map(as_jax, adapters))


def _unfit(node: Any) -> str | None:
    if not node.of_arrays:
        return " holds what is no array"
    if node.more_axes:
        return " is a stack, or a part of one: lora.algebra.choose(stacked, 0) of it first"
    wrong = node.misfit(tuple(node.shape))
    return wrong and f": {wrong}"


def _differ(nodes: list, base: Any) -> str | None:
    """What is wrong with combining these nodes of one leaf."""
    first = nodes[0]
    if any(type(n) is not type(first) or n.shape != first.shape for n in nodes):
        return "found " + ", ".join(f"{type(n).__name__} of {n.shape}" for n in nodes)
    if isinstance(first, LoRA):
        # Factors of one shape may still run along other axes of a square leaf.
        if any((n.geometry, n.embedding) != (first.geometry, first.embedding) for n in nodes):
            return f"the axes differ: {[n.geometry for n in nodes]}"
    elif base is None:
        return (
            f"is a {type(first).__name__}, whose update is the difference from the base: "
            "lora.algebra.combine(adapters, weights, base=params)"
        )
    return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """One leaf of one adapter: its node; its weight, a number or an array along the leaf's first
    batch axes; and the base where the update is the difference from it. Or an array, the update
    itself, and a weight for each matrix of it."""

    node: Any
    weight: Any
    base: Any = None


# The parts of one leaf, one for each adapter; None where an adapter lacks the leaf.
Parts = tuple[Part | None, ...]


def parts_of(
    adapters: Any, weights: Any, base: Any, call: str, *, dense: bool = True, exact: bool = False
) -> dict[str, Parts]:
    """{path: its part of each adapter}, checked.

    Args:
      dense: something is done to the elements of updates, which not all kinds have.
      exact: low-rank leaves come back in full, and need the base.
    """
    adapters, weights = _several(adapters, weights, call)
    if dense:
        trees = [flatten(tree, is_leaf=is_node) for tree in adapters]
        raise_all(
            "these leaves are no adapters that can be merged:",
            dict.fromkeys(
                f"'{path}' is a {type(node).__name__}; expected a LoRA, Full or Rows"
                for tree in trees
                for path, node in tree.items()
                if type(node) not in (LoRA, Full, Rows)
            ),
            "as from lora.init(key, params, config)",
        )
    adapters = [*map(checked if dense else linear, adapters)]
    trees = [flatten(tree, is_leaf=is_node) for tree in adapters]
    _check_weights(trees, weights, call)
    check_finite(*adapters, weights=weights, base=base)
    starts = {} if base is None else flatten(state_of(base))
    check_codes(starts)
    failures: list[str] = []
    out: dict[str, Parts] = {}
    # The union of the targets, in the order of their first appearance.
    for path in dict.fromkeys(p for tree in trees for p in tree):
        nodes = [tree[path] for tree in trees if path in tree]
        start = starts.get(path)
        problem = _differ(nodes, start)
        if problem is None:
            problem = _base_problem(nodes[0], start, exact)
        # The order and sign of complex elements, and what is drawn of them, are not defined.
        of = jax.tree.leaves((nodes, start))
        if problem is None and dense and any(map(jnp.iscomplexobj, of)):
            problem = "is complex; its sum is lora.algebra.combine(adapters, weights)"
        if problem is not None:
            failures.append(f"'{path}': {problem}")
            continue
        # A low-rank leaf that stays low-rank needs no base.
        start = None if isinstance(nodes[0], LoRA) and not exact else near(start)
        out[path] = tuple(
            Part(tree[path], _weight_of(w, path, tree[path]), start) if path in tree else None
            for tree, w in zip(trees, weights)
        )
    done = "merged" if dense else "combined"
    raise_all(f"these adapters cannot be {done}:", failures, "they must be of one base")
    return out


def _base_problem(node: Any, start: Any, exact: bool) -> str | None:
    if start is None:
        return f"the base has no such leaf of {node.shape}" if exact else None
    if not hasattr(start, "shape"):
        return f"of {node.shape}, but the base has a {type(start).__name__} there"
    if tuple(start.shape) != node.shape:
        return f"of {node.shape}, but the base has {tuple(start.shape)}"
    return None
