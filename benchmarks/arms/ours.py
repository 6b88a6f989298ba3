"""`lora.adapt`: the arms ours_auto, ours_factored and ours_merged are its plans."""

from __future__ import annotations

import dataclasses

import jax
from flax import traverse_util

import lora_jax as lora
from arms import JaxArm


def build(setup, plan, method=None):
    model, params, case = setup.model, setup.params, setup.case
    survey = lora.survey(model.apply, {"params": params}, setup.ids)
    alpha = setup.config.scale * case.rank
    config = lora.LoRAConfig(rank=case.rank, alpha=alpha, targets=case.targets)
    adapters = traverse_util.flatten_dict(lora.init(jax.random.key(0), params, config, survey))
    adapters = traverse_util.unflatten_dict(
        {
            path: dataclasses.replace(node, **setup.adapters[path[:-1]])
            for path, node in adapters.items()
        }
    )
    if method is not None:
        adapters = method(params, adapters)
    apply = lora.adapt(model.apply, plan=plan)

    def logits(adapters, params, ids):
        return apply({"params": lora.bind(params, adapters)}, ids)

    return JaxArm(
        setup,
        logits,
        adapters,
        params,
        merged=lora.merge(params, adapters),
        comparable=method is None,
    )
