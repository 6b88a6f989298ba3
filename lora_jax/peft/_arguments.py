"""What callers give, checked."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._core.errors import LoRAError


def as_path(folder: Any) -> Path:
    if not isinstance(folder, str | os.PathLike):
        raise LoRAError(f"expected the path of a folder, found {type(folder).__name__}")
    return Path(folder)


def as_names(names: Any, argument: str) -> tuple[str, ...] | None:
    """A list of texts that a caller gives, or None; a text alone would be read by its letters."""
    if names is None:
        return None
    found = tuple(names) if isinstance(names, Iterable) and not isinstance(names, str) else (names,)
    if isinstance(names, str) or not all(isinstance(x, str) for x in found):
        right = names if isinstance(names, str) else "name"
        raise LoRAError(f"{argument}={names!r}: expected a list of texts: {argument}=[{right!r}]")
    return found


def as_float(dtype: Any) -> np.dtype | None:
    """A floating-point type that a caller asks for, or None."""
    if dtype is None:
        return None
    try:
        kind = np.dtype(dtype)
    except TypeError:
        kind = np.dtype(object)
    if not jnp.issubdtype(kind, jnp.floating):
        raise LoRAError(f"dtype={dtype!r}: expected a floating-point type: dtype='bfloat16'")
    return kind
