"""`lora.adapt(fn, plan="factored")`."""

from __future__ import annotations

import functools

from arms import ours

build = functools.partial(ours.build, plan="factored")
