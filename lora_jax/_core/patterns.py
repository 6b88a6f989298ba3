"""Patterns that mean leaves, by their paths."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from typing import Any

from lora_jax._core.errors import LoRAError
from lora_jax._core.paths import module_of

# A suffix ("q_proj"), a glob ("*/attn/*"), a compiled regex (full match) or predicate(path, leaf).
Pattern = str | re.Pattern | Callable[[str, Any], bool]

Patterns = Pattern | Sequence[Pattern]


def as_patterns(patterns: Patterns) -> tuple[Pattern, ...]:
    return (patterns,) if is_pattern(patterns) else tuple(patterns)  # type: ignore[arg-type]


def matches(pattern: Pattern, path: str, leaf: Any = None) -> bool:
    """Whether a pattern means this leaf, by the leaf's own path or its module's.

    >>> matches("q_proj", "layers/0/q_proj/kernel"), matches("proj", "layers/0/q_proj/kernel")
    (True, False)
    >>> matches("layers/*/q_proj", "layers/0/q_proj/kernel")
    True
    >>> matches(re.compile(r".*[qv]_proj"), "layers/0/v_proj/kernel")
    True
    """
    # "layers/0/q_proj/kernel", and its module, "layers/0/q_proj".
    names = [path, *([module_of(path)] if "/" in path else [])]
    match pattern:
        case re.Pattern():
            return any(pattern.fullmatch(n) for n in names)
        case str() if any(c in pattern for c in "*?["):
            return any(fnmatch.fnmatchcase(n, pattern) for n in names)
        case str():
            return any(n == pattern or n.endswith("/" + pattern) for n in names)
    try:
        return bool(pattern(path, leaf))
    except Exception as e:
        raise LoRAError(
            f"a pattern that is a function failed at '{path}': {type(e).__name__}: {e}; it is "
            "called with the leaf's path and the leaf: targets=lambda path, leaf: leaf.ndim == 2"
        ) from e


def describe(pattern: Pattern) -> str:
    return repr(pattern.pattern if isinstance(pattern, re.Pattern) else pattern)


ONE_PATTERN = "a pattern is a suffix ('q_proj'), a glob ('*/attn/*'), re.compile(...) or a function"


def is_pattern(x: Any) -> bool:
    if isinstance(x, re.Pattern):
        return isinstance(x.pattern, str)
    # A class can be called, but is no predicate: it was meant as a type of layers.
    return x != "" if isinstance(x, str) else callable(x) and not isinstance(x, type)
