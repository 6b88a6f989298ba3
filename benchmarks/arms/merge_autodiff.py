"""W + scale·A·B formed inside the loss, and differentiated: a gradient of W's size per leaf."""

from __future__ import annotations

from flax import traverse_util

from arms import JaxArm


def build(setup):
    def logits(adapters, params, ids):
        params = traverse_util.flatten_dict(params)
        for path, ab in adapters.items():
            kernel = params[*path, "kernel"]
            merged = kernel + setup.config.scale * (ab["a"] @ ab["b"])
            params[*path, "kernel"] = merged.astype(kernel.dtype)
        return setup.model.apply({"params": traverse_util.unflatten_dict(params)}, ids)

    return JaxArm(setup, logits, setup.adapters, setup.params)
