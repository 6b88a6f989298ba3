"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from arms import JaxArm


def build(setup):
    def logits(params, _, ids):
        return setup.model.apply({"params": params}, ids)

    return JaxArm(setup, logits, setup.params, {}, comparable=False)
