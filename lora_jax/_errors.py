"""The one error class of the library."""

from __future__ import annotations

from collections.abc import Iterable


class LoRAError(ValueError):
    """Raised for every misuse that lora_jax detects.

    The message names each offending leaf by its full path, says what was expected and what was
    found, and shows the corrected call. All failures of one call are collected into one error.
    """


def raise_all(title: str, failures: Iterable[str], fix: str = "") -> None:
    """Raises one `LoRAError` listing `failures`, if there are any."""
    lines = [f"  - {f}" for f in failures]
    if lines:
        raise LoRAError("\n".join([title, *lines] + ([fix] if fix else [])))
