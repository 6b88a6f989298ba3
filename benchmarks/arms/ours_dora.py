"""`lora.methods.dora`: the adapters of ours_auto with a magnitude for each output unit."""

from __future__ import annotations

import lora_jax as lora
from arms import ours


def build(setup):
    return ours.build(setup, "auto", method=lora.methods.dora)
