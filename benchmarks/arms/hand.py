"""LoRA written into the modules by hand: what all other arms are compared with."""

from __future__ import annotations

import dataclasses

import llama
from flax import traverse_util

from arms import JaxArm


def build(setup):
    model = llama.Llama(dataclasses.replace(setup.config, by_hand=setup.case.targets))

    def logits(adapters, params, ids):
        return model.apply({"params": params, "lora": adapters}, ids)

    return JaxArm(setup, logits, traverse_util.unflatten_dict(setup.adapters), setup.params)
