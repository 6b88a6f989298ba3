"""qwix: the model's class is copied, and its calls of jax.numpy are intercepted.

Its adapters are in the type of the base; fp32 ones are cast on their way in.
"""

from __future__ import annotations

import re

import jax
import qwix
from flax import traverse_util

from arms import JaxArm


def build(setup):
    config, case = setup.config, setup.case
    rule = qwix.LoraRule(
        module_path=f".*/({'|'.join(map(re.escape, case.targets))})",
        rank=case.rank,
        alpha=config.scale * case.rank,
    )
    model = qwix.apply_lora_to_model(setup.model, qwix.LoraProvider([rule]))
    adapters = {
        (*path, f"kernel_lora_{k}"): x for path, ab in setup.adapters.items() for k, x in ab.items()
    }

    def logits(adapters, params, ids):
        adapters = jax.tree.map(lambda x: x.astype(config.dtype), adapters)
        both = traverse_util.flatten_dict(params) | traverse_util.flatten_dict(adapters)
        return model.apply({"params": traverse_util.unflatten_dict(both)}, ids)

    return JaxArm(setup, logits, traverse_util.unflatten_dict(adapters), setup.params)
