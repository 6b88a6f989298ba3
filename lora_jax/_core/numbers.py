"""Numbers of Python, NumPy or JAX."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core.errors import LoRAError, raise_all


def integer(x: Any) -> int | None:
    """An integer of any library as Python's; None of a boolean, a traced one, or anything else.

    >>> integer(jnp.int32(4)), integer(True), integer(4.0)
    (4, None, None)
    """
    if type(x) is int:  # of any size: JAX's types end at 2⁶⁴
        return x
    if isinstance(x, str | bytes):  # NumPy takes "i" for a type
        return None
    try:
        # A traced integer raises a TypeError of JAX's, 4.0 one of Python's; a dict, a ValueError.
        return None if jnp.issubdtype(jnp.result_type(x), jnp.bool_) else operator.index(x)
    except (TypeError, ValueError, OverflowError):
        return None


def positions(given: Any, name: str) -> tuple[int, ...]:
    """The numbers of arguments, one or several, as `jax.jit` takes them."""
    one = isinstance(given, str | bytes) or not isinstance(given, Iterable)
    each = (given,) if one else tuple(given)
    found = tuple(n for n in map(integer, each) if n is not None)
    if len(found) < len(each):
        raise LoRAError(f"{name}={given!r:.80}: expected an integer, or several: {name}=(1,)")
    return found


def holds(x: Any, kind: Any = jnp.integer) -> bool:
    """Whether an array is of numbers of a kind. To NumPy an interval of time is an integer."""
    return jnp.issubdtype(x.dtype, kind) and x.dtype.kind != "m"


def is_real(x: Any) -> bool:
    # To NumPy an interval of time is an integer.
    return isinstance(x, numbers.Real) and not isinstance(x, bool | np.timedelta64)


def shown(x: Any) -> str:
    """What an error says of it: Python does not print an integer of thousands of digits."""
    try:
        return f"{x!r:.200}"
    except ValueError:
        return f"an integer of {x.bit_length()} bits"


def unequal(x: Any, y: Any) -> Any:
    """Where two arrays differ; of numbers that are none, NaN, any two are equal.

    >>> unequal(jnp.array([1.0, jnp.nan]), jnp.array([2.0, jnp.nan]))
    Array([ True, False], dtype=bool)
    """
    return (x != y) & ~((x != x) & (y != y))


def number(x: Any) -> Any:
    """A number of any library as Python's; anything else as it is."""
    whole = integer(x)
    known = _real(x) if whole is None else whole
    return x if known is None else known


@dataclasses.dataclass(frozen=True)
class Number:
    """What a call asks of a number.

    Attributes:
      text: in words.
      holds: of one that is finite.
      whole: whether it is an integer, of any library.
      optional: whether None will do.
      limit: words for the largest, if there is one.

    >>> COUNT.fits(jnp.int32(4)), COUNT.fits(2.5), SHARE.fits(float("nan")), SHARE.fits(True)
    (True, False, False, False)
    """

    text: str
    holds: Callable[[Any], bool]
    whole: bool = False
    optional: bool = False
    limit: str = ""

    @property
    def or_none(self) -> Number:
        return dataclasses.replace(self, text=f"{self.text}, or None", optional=True)

    def fits(self, x: Any, traced: bool = False) -> bool:
        """Whether x is such a number; `traced`: or one that is not known yet, and no integer."""
        if x is None:
            return self.optional
        if isinstance(x, jax.core.Tracer):
            return traced and not self.whole and x.shape == ()
        known = integer(x) if self.whole else _real(x)
        return known is not None and self.holds(known)

    def plain(self, x: Any) -> Any:
        """A number that fits as Python's; real ones of JAX, which may be traced, as they are."""
        if self.whole:
            return integer(x)
        return x if isinstance(x, jax.Array) else _real(x)


def _real(x: Any) -> float | None:
    """A finite number of any library as Python's; None of anything else."""
    try:
        scalar = getattr(x, "shape", None) == () and jnp.issubdtype(x.dtype, jnp.floating)
        found = x if is_real(x) or scalar else integer(x)
        found = None if found is None else float(found)
    except (TypeError, ValueError, OverflowError):
        # No array; an integer beyond any float.
        return None
    return found if found is not None and math.isfinite(found) else None


def _whole(least: int, below: float = math.inf, limit: str = "") -> Number:
    return Number(f"an integer >= {least}", lambda x: least <= x < below, True, limit=limit)


COUNT, COUNT_OR_ZERO = _whole(1), _whole(0)
# The size of an axis; steps that int32 counts; turns that end within a lifetime.
SIZE = _whole(1, 2**24, ", less than 2**24")
STEPS, STEPS_OR_ZERO = (_whole(least, 2**31, ", less than 2**31") for least in (1, 0))
PASSES, PASSES_OR_ZERO = (_whole(least, 1001, ", at most 1000") for least in (1, 0))
POSITIVE = Number("a finite number > 0", lambda x: x > 0)
NOT_NEGATIVE = Number("a finite number >= 0", lambda x: x >= 0)
FINITE = Number("a finite number", lambda x: True)
AT_LEAST_ONE = Number("a number >= 1", lambda x: x >= 1)
SHARE = Number("a share in (0, 1]", lambda x: 0 < x <= 1)
BELOW_ONE = Number("a number in [0, 1)", lambda x: 0 <= x < 1)


def refused(traced: bool = False, /, **asked: tuple[Any, Number]) -> list[str]:
    """A line for each argument, name=(value, what is asked of it), that is no such number."""
    return [
        f"{name}={shown(x)}: expected {kind.text}{kind.limit}"
        for name, (x, kind) in asked.items()
        if not kind.fits(x, traced)
    ]


def check_flags(call: str, **given: Any) -> None:
    """Raises for arguments that are neither True nor False, with the corrected call."""
    wrong = [f"{n}={x!r:.80}" for n, x in given.items() if not isinstance(x, bool | np.bool_)]
    if wrong:
        raise LoRAError(f"{', '.join(wrong)}: expected True or False: {call}")


def check_values(leaves: Iterable[tuple[str, Any]], call: str) -> None:
    """Raises for (name, tree) with shapes alone, with the corrected call."""
    abstract = lambda tree: any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))
    raise_all(
        "these have shapes and no values:",
        (name for name, tree in leaves if abstract(tree)),
        f"on arrays, or under jax.eval_shape: {call}",
    )


def check_numbers(call: str, traced: bool = False, **asked: tuple[Any, Number]) -> list[Any]:
    """The arguments, each as its `Number.plain`; raises for all that are `refused`, with the
    corrected call."""
    raise_all("these arguments are not as expected:", refused(traced, **asked), call)
    return [kind.plain(x) for x, kind in asked.values()]
