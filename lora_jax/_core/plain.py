"""Frozen dataclasses as JSON, and back."""

from __future__ import annotations

import dataclasses
import json
import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lora_jax._core.errors import LoRAError, quoted


def plain(x: Any) -> Any:
    """What JSON can hold of a value: a regular expression is a dict, a function its name.

    >>> plain({"a": re.compile("q|v"), "b": (1, 2)})
    {'a': {'regex': 'q|v', 'flags': 32}, 'b': [1, 2]}
    """
    # A dataclass that can be called, such as an initialiser, is written as a function.
    has_fields = dataclasses.is_dataclass(x) and not callable(x)
    if has_fields:
        return {f.name: plain(getattr(x, f.name)) for f in dataclasses.fields(x)}
    if isinstance(x, re.Pattern):
        return {"regex": x.pattern, "flags": x.flags}
    if isinstance(x, np.dtype):
        return x.name
    if isinstance(x, Mapping) and not all(isinstance(k, str) for k in x):
        # A regular expression may be a key of `rows`; those of JSON are strings.
        return {"pairs": [[plain(k), plain(v)] for k, v in x.items()]}
    if isinstance(x, Mapping):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, str | bool | int | float | None):
        return x
    if hasattr(x, "tolist"):  # NumPy's and JAX's
        return x.tolist()
    if isinstance(x, Iterable):
        return [plain(v) for v in x]
    if isinstance(x, numbers.Real):
        return int(x) if isinstance(x, numbers.Integral) else float(x)
    return {"function": f"{x.__module__}.{getattr(x, '__qualname__', type(x).__qualname__)}"}


def unplain(x: Any) -> Any:
    """The value of what `plain` made, with tuples for lists and dicts for dataclasses.

    Raises:
      LoRAError: a function was part of it.
    """
    if isinstance(x, Mapping) and x.keys() == {"function"}:
        raise LoRAError(f"the function {x['function']} cannot be made again from its name")
    if isinstance(x, Mapping) and x.keys() == {"regex", "flags"}:
        try:
            return re.compile(x["regex"], x["flags"])
        except (re.error, TypeError, ValueError, OverflowError, RecursionError) as e:
            raise LoRAError(f"{quoted(str(x))} is not a regular expression: {e}") from None
    if isinstance(x, Mapping) and x.keys() == {"pairs"}:
        try:
            return dict(map(unplain, x["pairs"]))
        except (TypeError, ValueError) as e:
            raise LoRAError(f"{quoted(str(x))} are no pairs: {e}") from None
    if isinstance(x, Mapping):
        return {k: unplain(v) for k, v in x.items()}
    return tuple(map(unplain, x)) if isinstance(x, list) else x


def has_function(x: Any) -> bool:
    """Whether a function was part of what `plain` made this of."""
    if isinstance(x, Mapping):
        return x.keys() == {"function"} or any(map(has_function, x.values()))
    return isinstance(x, list) and any(map(has_function, x))


def written(x: Any) -> str:
    """The JSON text of a dataclass.

    Raises:
      LoRAError: it holds a function.
    """
    values = plain(x)
    for name, value in values.items():
        if has_function(value):
            raise LoRAError(
                f"{type(x).__name__}: {name} holds a function, which JSON cannot; write a pattern, "
                "'*/attn/*' or re.compile(...), or a name in its place"
            )
    return json.dumps(values)


def fields_of(cls: type, text: Any) -> dict[str, Any]:
    """{field: value} of what `written` wrote for this class, as text or read by `json`.

    Raises:
      LoRAError: it is something else.
    """
    try:
        values = json.loads(text) if isinstance(text, str | bytes) else text
        known = {f.name for f in dataclasses.fields(cls)}
        if isinstance(values, Mapping) and known >= values.keys():
            return unplain(values)
        found = sorted(values.keys() - known) if isinstance(values, Mapping) else values
    except (ValueError, RecursionError) as e:
        # It is a ValueError as well, and says more than the line below would.
        if isinstance(e, LoRAError):
            raise
        found = f"no JSON ({e})"
    raise LoRAError(
        f"expected what {cls.__name__}.to_json() wrote, found {quoted(str(found))}: "
        f"lora.{cls.__name__}.from_json(value.to_json())"
    )
