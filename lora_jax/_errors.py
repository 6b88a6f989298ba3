"""The one error class of the library."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

SHOWN = 20  # failures in one message


class LoRAError(ValueError):
    """Raised for every misuse that lora_jax detects.

    The message names each offending leaf by its full path, says what was expected and what was
    found, and shows the corrected call. The failures of one call are collected into one error; of
    many the first are shown.
    """


def raise_all(title: str, failures: Iterable[str], fix: str = "") -> None:
    """Raises one `LoRAError`, if there are `failures`: the first ones, and how many more."""
    failures = iter(failures)
    lines = [f"  - {f}" for f in itertools.islice(failures, SHOWN)]
    more = sum(1 for _ in failures)
    lines += [f"  and {more:,} more"] * (more > 0)
    if lines:
        raise LoRAError("\n".join([title, *lines] + ([fix] if fix else [])))


def quoted(text: str, most: int = 80) -> str:
    """What a file of a stranger holds, for a message: in quotes, escaped, and cut.

    >>> quoted("a\\x1b[2J" + "b" * 90, 12)
    "'a\\\\x1b[2Jbbbbbbb…'"
    """
    shown = repr(text[:most])
    return shown[:-1] + "…" + shown[-1] if len(text) > most else shown
