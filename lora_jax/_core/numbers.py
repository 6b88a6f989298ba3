"""Numbers of Python, NumPy or JAX."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import jax.numpy as jnp


def integer(x: Any) -> int | None:
    """An integer of any library as Python's; None of a boolean, a traced one, or anything else.

    >>> integer(jnp.int32(4)), integer(True), integer(4.0)
    (4, None, None)
    """
    try:
        # A traced integer raises a TypeError of JAX's here, and 4.0 one of Python's.
        return None if jnp.issubdtype(jnp.result_type(x), jnp.bool_) else operator.index(x)
    except TypeError:
        return None


def is_real(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def unequal(x: Any, y: Any) -> Any:
    """Where two arrays differ; of numbers that are none, NaN, any two are equal.

    >>> unequal(jnp.array([1.0, jnp.nan]), jnp.array([2.0, jnp.nan]))
    Array([ True, False], dtype=bool)
    """
    return (x != y) & ~((x != x) & (y != y))


def number(x: Any) -> Any:
    """A number of any library as Python's; anything else as it is."""
    whole = integer(x)
    return float(x) if whole is None and is_real(x) else x if whole is None else whole
