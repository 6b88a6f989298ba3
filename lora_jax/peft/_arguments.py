"""What callers give, checked."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax._core import compat
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.paths import path_of
from lora_jax._core.placement import is_gone


def as_path(folder: Any) -> Path:
    try:
        found = Path(folder)
    except TypeError:
        raise LoRAError(f"expected the path of a folder, found {type(folder).__name__}") from None
    if "\0" in str(found):
        raise LoRAError(f"{str(found)!r}: a path holds no NUL")
    return found


def one_of(value: Any, among: Iterable[str], argument: str) -> None:
    """Raises unless a text that a caller gives is one of several."""
    if not (isinstance(value, str) and value in among):
        raise LoRAError(f"{argument}={value!r}: expected one of {', '.join(among)}")


def check_texts(**given: Any) -> None:
    """Raises for all arguments that are neither texts nor None."""
    odd = [f"{k}={v!r}" for k, v in given.items() if not isinstance(v, str | None)]
    raise_all("expected texts, or None:", odd)


def check_arrays(tree: Any, call: str) -> None:
    """Raises for all arrays of a tree whose values cannot be read."""

    found = [(path_of(keys), x) for keys, x in jax.tree_util.tree_leaves_with_path(tree)]
    traced = lambda x: isinstance(x, jax.core.Tracer)
    shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    raise_all(
        "these arrays have no values:",
        [
            *(f"'{path}' is traced: outside of jax.jit" for path, x in found if traced(x)),
            *(f"'{path}' is a shape alone" for path, x in found if shape(x)),
            *(f"'{path}' is deleted, as by donate_argnums" for path, x in found if is_gone(x)),
        ],
        call,
    )


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
    if not compat.is_float_type(dtype):
        raise LoRAError(f"dtype={dtype!r}: expected a floating-point type: dtype='bfloat16'")
    return np.dtype(dtype)
