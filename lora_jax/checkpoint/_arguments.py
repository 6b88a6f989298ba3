"""The arguments of `save` and `restore`: checked, and as they are written down."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import orbax.checkpoint as ocp

from lora_jax._core.errors import LoRAError
from lora_jax._core.numbers import integer
from lora_jax.checkpoint._fingerprint import Fingerprint


def refuse_a_train_state(tree: Any, call: str) -> None:
    """What holds the parameters and more, Flax's TrainState and its like, is no adapters."""
    if hasattr(tree, "params") and hasattr(tree, "opt_state"):
        call = call.replace("adapters,", "state.params,").replace("opt_state", "state")
        raise LoRAError(
            f"expected adapters, found a {type(tree).__name__}: pass state.params, and the whole "
            f"as state=state: {call}"
        )


def refuse_a_manager_that_cannot_write(manager: ocp.CheckpointManager) -> None:
    """Orbax would write nothing and say, on the log alone, that it skips the step."""
    # It does not make public either; where a later version has other names, it is as if open.
    store = getattr(manager, "_non_blocking_metadata_store", None)
    executor = getattr(store, "_single_thread_executor", None)
    options = getattr(manager, "_options", None)
    found = {
        "is closed": getattr(executor, "_shutdown", False),
        "only reads (read_only=True)": getattr(options, "read_only", False),
    }
    for what, holds in found.items():
        if holds:
            raise LoRAError(
                f"the manager of {manager.directory} {what}, and nothing was saved; open one that "
                "writes: with ocp.CheckpointManager(directory) as manager: "
                "lora.checkpoint.save(manager, ...)"
            )


def refuse_variables(base: Fingerprint, wanted: Iterable[str]) -> None:
    """A base one level too high: {"params": params}, where adapters are of params."""
    missing = [p for p in wanted if p not in base.leaves]
    if missing and all(f"params/{p}" in base.leaves for p in missing):
        raise LoRAError(
            f"'{missing[0]}' is 'params/{missing[0]}' in the base that was passed: pass the inner "
            "tree, base=variables['params']"
        )


def step_number(step: Any) -> int:
    number = integer(step)
    if number is None or number < 0:
        raise LoRAError(f"step={step!r}: expected an integer from 0 on")
    return number


def numbers(metrics: Mapping[str, Any] | None) -> dict[str, float] | None:
    if metrics is None:
        return None
    try:
        return _unique([(str(k), float(v)) for k, v in metrics.items()])
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise LoRAError(f"metrics={metrics!r}: expected numbers, {{'loss': 0.5}}") from None


def as_json(data: Any) -> Any:
    """What JSON gives back of `data`."""
    try:
        return json.loads(json.dumps(data), object_pairs_hook=_unique)
    except (TypeError, ValueError, RecursionError) as e:
        raise LoRAError(
            f"data cannot be saved as JSON ({e}); expected numbers, strings, lists and dicts; "
            "arrays and keys go into state="
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("two keys of a dict are one as text, such as 1 and '1'")
    return found
