"""What the functions of several adapters are given: adapters, a weight for each, a rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.numbers import SHARE, SIZE, is_real, shown
from lora_jax._nodes.adapters import LoRA
from lora_jax._nodes.node import is_node


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


def several(
    adapters: Any, weights: Any, call: str
) -> tuple[list[Any], list[Mapping[str, Any] | Any]]:
    """The adapters, and a weight for each."""
    if isinstance(adapters, Mapping) or is_node(adapters) or not _iterable(adapters):
        tree = isinstance(adapters, Mapping) or is_node(adapters)
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
            return int(x) if float(x) == x and isinstance(x, int) else float(x)
        found = None if isinstance(x, str | bytes) else jnp.asarray(x)
    except (TypeError, ValueError, OverflowError):
        pass
    numbers = (jnp.floating, jnp.integer)
    if found is None or not any(jnp.issubdtype(found.dtype, kind) for kind in numbers):
        return f"{x!r:.80}"
    return found


def check_weights(trees: Sequence[Mapping[str, Any]], weights: Sequence[Any], call: str) -> None:
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


def weight_of(weight: Any, path: str, node: Any) -> Any:
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
