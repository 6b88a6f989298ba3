"""No adapters: the forward pass and the gradients of the layers' inputs, and no more.

Trained is something added to the embedded tokens, by plain descent, so that each layer's input
gradient is formed and no weight's is. LoRA does not need all of it: nothing below the first
adapter is differentiated.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import optax

from arms import LEARNING_RATE, JaxArm


def build(setup):
    config = setup.config

    def logits(added, params, ids):
        def add(call, args, kwargs, context):
            out = call(*args, **kwargs)
            embedded = isinstance(context.module, nn.Embed) and context.method_name == "__call__"
            return out + added if embedded else out

        with nn.intercept_methods(add):
            return setup.model.apply({"params": params}, ids)

    added = jnp.zeros((*setup.ids.shape, config.width), config.dtype)
    tx = optax.sgd(LEARNING_RATE)
    return JaxArm(setup, logits, added, setup.params, comparable=False, tx=tx)
