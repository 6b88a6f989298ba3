"""The one error class of the library."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

SHOWN = 20  # failures in one message


class LoRAError(ValueError):
    """Raised for every misuse that lora_jax detects.

    The message names each offending leaf by its full path, says what was expected and what was
    found, and shows the corrected call. The failures of one call are collected into one error; of
    many the first are shown.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> try:
    ...     lora.select({"q": jnp.ones((4, 3))}, lora.LoRAConfig(rank=8, targets="q"))
    ... except lora.LoRAError as error:
    ...     print(str(error).splitlines()[1].partition("; ")[0])
    - 'q' (4, 3): rank 8 exceeds min(in=4, out=3)
    """


def raise_all(title: str, failures: Iterable[str], fix: str = "") -> None:
    """Raises one `LoRAError`, if there are `failures`: the first ones, and how many more."""
    failures = iter(failures)
    lines = [f"  - {f}" for f in itertools.islice(failures, SHOWN)]
    # The rest is counted and not kept: the wrong tree may give thousands.
    more = sum(1 for _ in failures)
    lines += [f"  and {more:,} more"] * (more > 0)
    if lines:
        raise LoRAError("\n".join([title, *lines] + ([fix] if fix else [])))


# What a model would do to an array. `shape` and `dtype` are kept: Flax reads them before any use.
_DUNDERS = """
    jax_array array getitem iter len float bool matmul rmatmul mul rmul add radd sub rsub truediv
    rtruediv neg pow
""".split()


_METHODS = "astype reshape transpose sum mean dot ravel take flatten squeeze swapaxes".split()


def refuse_use(cls: type, refuse: Callable) -> None:
    """Makes any use of a `cls` as the array that it stands for a call of `refuse`, which raises."""
    # Python looks dunders up on the class alone, never on the instance.
    for name in [*(f"__{name}__" for name in _DUNDERS), *_METHODS]:
        setattr(cls, name, refuse)
    for name in ("T", "mT", "at"):
        setattr(cls, name, property(refuse))


def quoted(text: str, most: int = 80) -> str:
    """Text from a stranger's file, for a message: in quotes, escaped, and cut.

    >>> quoted("a\\x1b[2J" + "b" * 90, 12)
    "'a\\\\x1b[2Jbbbbbbb…'"
    """
    shown = repr(text[:most])
    return shown[:-1] + "…" + shown[-1] if len(text) > most else shown
