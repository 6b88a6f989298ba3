"""quax: array-ish values with a rule for each primitive, and its own `LoraArray`.

It has no alpha and its factors are in the type of the base, so A is scaled and both are cast on
their way in. It has no rule for remat: there its weights are materialised, as it allows when
asked to.
"""

from __future__ import annotations

import equinox as eqx
import jax
import quax
from flax import traverse_util
from quax.examples.lora import LoraArray

from arms import JaxArm


def build(setup):
    config = setup.config
    apply = quax.quaxify(setup.model.apply)

    def logits(adapters, params, ids):
        params = traverse_util.flatten_dict(params)
        for path, ab in adapters.items():
            base = params[*path, "kernel"]
            weight = LoraArray(
                base,
                rank=config.rank,
                key=jax.random.key(0),
                allow_materialise=setup.case.scan,
            )
            a, b = (config.scale * ab["a"]).astype(base.dtype), ab["b"].astype(base.dtype)
            params[*path, "kernel"] = eqx.tree_at(lambda w: (w.a, w.b), weight, (a, b))
        return apply({"params": traverse_util.unflatten_dict(params)}, ids)

    return JaxArm(setup, logits, setup.adapters, setup.params)
