"""VeRA, LoRA-XS and AdaLoRA in a scanned model, against their formula on dense weights."""

import functools

from common import assert_close, value_and_grad
from test_family import KEY, densely, made, methods
from zoo import IDS, Transformer

import lora_jax as lora


@functools.cache
def scanned():
    """A scanned and rematerialised model: (function, parameters, survey)."""
    model = Transformer(True)
    params = model.init(KEY, IDS)["params"]
    apply = lambda params, ids: model.apply({"params": params}, ids)
    return apply, params, lora.survey(apply, params, IDS)


TARGETS = ["query", "up"]


@methods
def test_scan_and_remat(method):
    """Outputs, gradients and merged weights; devices and checkpoints are in test_methods.py."""
    apply, params, survey = scanned()
    adapters, frozen = made(method, params, survey=survey, targets=TARGETS)
    f = lora.adapt(apply)
    factored = lambda ad: f(lora.bind(params, lora.methods.factors(ad, frozen)), IDS)
    dense = lambda ad: apply(densely(params, ad, frozen), IDS)
    (grads, y), (dense_grads, dense_y) = (
        value_and_grad(run)(adapters) for run in (factored, dense)
    )
    assert_close(y, dense_y, factor=256)
    assert_close(grads, dense_grads, factor=1024)
    merged = lora.merge(params, lora.methods.factors(adapters, frozen))
    assert_close(merged, densely(params, adapters, frozen))
