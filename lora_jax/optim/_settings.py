"""One rule for the numbers that optimisers are given."""

from __future__ import annotations

from typing import Any

from lora_jax._core.errors import LoRAError
from lora_jax._core.numbers import (
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    SIZE,
    STEPS,
    STEPS_OR_ZERO,
    check_numbers,
)

# What is asked of each, by its name.
KINDS = {
    "rank": SIZE,
    "target_rank": POSITIVE,
    **dict.fromkeys(("update_proj_gap", "interval", "steps"), STEPS),
    **dict.fromkeys(("tinit", "tfinal"), STEPS_OR_ZERO),
    **dict.fromkeys(("b1", "b2", "beta1", "beta2"), BELOW_ONE),
    **dict.fromkeys(("learning_rate", "weight_decay"), NOT_NEGATIVE),
    **dict.fromkeys(("eps", "delta", "scale", "ratio"), NOT_NEGATIVE),
    "embedding_learning_rate": NOT_NEGATIVE.or_none,
}

# They may be functions of the step.
SCHEDULES = ("learning_rate", "embedding_learning_rate", "weight_decay")


def check_settings(call: str, **settings: Any) -> list[Any]:
    """The settings, as from `check_numbers`; raises for numbers out of range. Arrays pass that
    `optax.inject_hyperparams` has traced."""
    fixed = {k: x for k, x in settings.items() if not (k in SCHEDULES and callable(x))}
    found = check_numbers(call, traced=True, **{k: (x, KINDS[k]) for k, x in fixed.items()})
    return [*(settings | dict(zip(fixed, found))).values()]


def check_optimiser(tx: Any, call: str) -> None:
    """Raises unless this is an optimiser, and not the function that makes one."""
    if not all(callable(getattr(tx, name, None)) for name in ("init", "update")):
        found = f"the function {tx.__name__}" if hasattr(tx, "__name__") else type(tx).__name__
        raise LoRAError(f"expected an optimiser, such as optax.adam(1e-3), found {found}: {call}")
