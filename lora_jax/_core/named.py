"""Frozen dataclasses that say what was wrong with the call that makes one."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from lora_jax._core.errors import raise_all
from lora_jax._core.paths import nearest


class Named:
    """Refuses names that are not its own by those that are, where Python would raise TypeError."""

    theirs: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, theirs: Mapping[str, str]):
        # {what others call a field: its name here, or what it is here, if no field}
        cls.theirs = theirs

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # `__new__` comes before the dataclass's `__init__`, which would raise a TypeError.
        signature = inspect.signature(cls.__init__)
        own = list(signature.parameters)[1:]
        failures, call, named = [], [repr(x) for x in args], {}
        for name, value in kwargs.items():
            ours = cls.theirs.get(name, name)
            if ours not in own:
                none = f"it has no '{name}'; nearest: {', '.join(nearest(name, own, 3))}"
                failures.append(none if ours == name else f"'{name}' is {ours}")
                continue
            if ours != name:
                failures.append(f"'{name}' is '{ours}' here")
            named[ours] = value
            # PEFT's rank_pattern is a dict: its value is not what `rules` takes.
            call.append(f"{ours}=..." if ours == "rules" else f"{ours}={value!r}")
        try:
            # Without any arguments it is `copy` or `pickle` that calls.
            signature.bind(None, *args, **named) if args or kwargs else None
        except TypeError as e:
            failures.append(f"{e}; its arguments are {', '.join(own)}")
        raise_all(f"{cls.__name__}:", failures, f"lora.{cls.__name__}({', '.join(call)})")
        return super().__new__(cls)

    def _put(self, **values: Any) -> None:
        # `__post_init__` sets its own fields; the dataclass is frozen for everyone else.
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _call(self, cures: Mapping[str, str]) -> str:
        """This call, with other values for what is wrong."""
        given = []
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            default = {} if f.default is dataclasses.MISSING else f.default
            if f.name in cures or not (type(value) is type(default) and value == default):
                text = cures.get(f.name) or repr(value)
                # Sixty rules would hide the one argument that is wrong.
                given.append(f"{f.name}={text if len(text) < 100 else '...'}")
        return f"lora.{type(self).__name__}({', '.join(given)})"
