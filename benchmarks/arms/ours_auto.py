"""`lora.adapt(fn, plan="auto")`."""

from __future__ import annotations

import functools

from arms import ours

build = functools.partial(ours.build, plan="auto")
