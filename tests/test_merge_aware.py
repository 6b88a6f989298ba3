"""Training through the rounding that merging into codes brings: the same function afterwards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import assert_close, fails, noisy

import lora_jax as lora
from lora_jax._quantized.formats import FORMATS

KEY = jax.random.key(0)
FORMATS_4 = ["int4", "int8", "mxfp4", "nf4", "nvfp4"]


def normal(seed, *shape):
    """Numbers of few bits, so that W + s·A·B is the same in whatever order it is summed."""
    x = jax.random.normal(jax.random.key(seed), shape)
    return jnp.round(x * 32) / 32


X = normal(5, 6, 64)
PARAMS = {"up": normal(1, 64, 96), "down": normal(2, 64, 96), "norm": jnp.ones(96)}
NET = lambda p, x: (jnp.tanh(x @ p["up"]) * p["norm"]) @ p["down"].T


def started(params, fn, *args, targets=("up", "down"), **config):
    survey = lora.survey(fn, lora.quant.dequantize(params), *args)
    config = lora.LoRAConfig(rank=2, alpha=4, targets=list(targets), **config)
    adapters = lora.init(KEY, params, config, survey)
    return jax.tree.map(lambda x: jnp.round(noisy(x, scale=0.5) * 8) / 8, adapters)


def loss(y):
    return jnp.sum(jnp.sin(y.astype(jnp.float32)))


def straight_through(q, fn, params, adapters, *args):
    """The definition: Q(W + s·A·B) forward, and the gradient of W + s·A·B."""
    merged = lora.merge(params, adapters)
    w = {k: m + jax.lax.stop_gradient(v - m) for (k, m), v in zip(merged.items(), q.values())}
    return fn(w, *args)


@pytest.mark.parametrize("coded", [False, True], ids=["float base", "base in codes"])
@pytest.mark.parametrize("format", FORMATS_4)
def test_the_function_is_kept_by_merging(format, coded):
    """Outputs, and the gradients of factors and input by the definition, written by hand."""
    base = lora.quant.quantize(PARAMS, ["up", "down"], format) if coded else PARAMS
    adapters = started(base, NET, X)
    f = lora.adapt(NET, merge_aware=format)
    ours = lambda ad, x: f(lora.bind(base, ad), x)
    merged = lora.merge(base, adapters, requantize=True if coded else format)
    assert all(merged[k].format == format for k in ("up", "down"))
    assert merged["norm"] is base["norm"]
    plain = lora.quant.dequantize(merged)
    both = jax.jit(lambda ad, x: (ours(ad, x), jax.grad(lambda *a: loss(ours(*a)), (0, 1))(ad, x)))
    got, grads = both(adapters, X)
    assert_close(got, NET(plain, X), factor=64)
    assert_close(jax.jit(lambda x: lora.adapt(NET)(lora.bind(merged, None), x))(X), got)
    by_hand = lambda ad, x: loss(straight_through(plain, NET, base, ad, x))
    assert_close(grads, jax.grad(by_hand, (0, 1))(adapters, X), factor=512)
    lost = NET(lora.merge(base, adapters), X)
    assert np.abs(lost - got).max() > 1e-3  # rounding is seen


LAYERS = normal(3, 3, 64, 64)


@pytest.mark.parametrize("format, coded", [("nf4", True), ("nvfp4", False), ("int8", True)])
@pytest.mark.parametrize("how", ["scan", "scan and remat", "transposed scan"])
def test_layers_of_a_scan(format, coded, how):
    """One layer at a time, under jit, scan and remat; the same as layer by layer, merged."""
    step = lambda x, w: (jnp.tanh(x @ (w.T if "transposed" in how else w)), None)
    step = jax.checkpoint(step) if "remat" in how else step
    fn = lambda p, x: jax.lax.scan(step, x, p["w"])[0]
    params = {"w": LAYERS}
    chosen = lora.select(params, lora.LoRAConfig(rank=2, targets="w"), lora.survey(fn, params, X))
    base = lora.quant.quantize(params, chosen, format) if coded else params
    adapters = started(base, fn, X, targets=["w"])
    f = lora.adapt(fn, merge_aware=format)
    ours = lambda ad, x: f(lora.bind(base, ad), x)
    got = jax.jit(lambda ad, x: (ours(ad, x), jax.grad(lambda *a: loss(ours(*a)), (0, 1))(ad, x)))
    got = got(adapters, X)
    plain = lora.quant.dequantize(lora.merge(base, adapters, requantize=format))
    by_hand = lambda ad, x: straight_through(plain, fn, base, ad, x)
    want = by_hand(adapters, X), jax.grad(lambda *a: loss(by_hand(*a)), (0, 1))(adapters, X)
    assert_close(got[0], want[0])
    assert_close(got[1], want[1], factor=512)


@pytest.mark.parametrize("which", ["inputs", "adapters"])
def test_under_vmap(which):
    """A batch of inputs; an adapter for each of them."""
    adapters = started(PARAMS, NET, X)
    f = lora.adapt(NET, merge_aware="nf4")
    one = lambda ad, x: jax.grad(lambda ad: loss(f(lora.bind(PARAMS, ad), x)))(ad)
    x = jnp.stack([X, X + 1])
    if which == "inputs":
        got, each = jax.vmap(one, (None, 0))(adapters, x), [adapters, adapters]
    else:
        each = [adapters, jax.tree.map(lambda a: 2 * a, adapters)]
        got = jax.vmap(one)(jax.tree.map(lambda *a: jnp.stack(a), *each), x)
    want = [one(ad, v) for ad, v in zip(each, x)]
    assert_close(got, jax.tree.map(lambda *a: jnp.stack(a), *want), factor=512)


def test_one_weight_at_a_time():
    """Of twelve layers, neither what is merged nor what is rounded is there all at once."""
    n, d = 12, 256
    params = {f"w{i:02}": normal(i, d, d) for i in range(n)}
    fn = lambda p, x: functools.reduce(lambda x, w: jnp.tanh(x @ w), p.values(), x)
    x = normal(40, 8, d)
    base = lora.quant.quantize(params, list(params), "nf4")
    adapters = started(base, fn, x, targets=params)
    run = lambda f: jax.jit(jax.grad(lambda ad, base: loss(f(lora.bind(base, ad), x))))
    temp = lambda f: run(f).lower(adapters, base).compile().memory_analysis().temp_size_in_bytes
    aware = temp(lora.adapt(fn, merge_aware="nf4"))
    weight = 4 * d * d
    assert aware < temp(lora.adapt(fn, plan="merged")) + 4 * weight
    assert aware < 6 * weight < n * weight


def test_training_lowers_the_loss_that_is_deployed():
    """Gradient descent on a target: what is merged into codes has the loss that was trained."""
    base = lora.quant.quantize(PARAMS, ["up", "down"], "int4")
    config = lora.LoRAConfig(rank=4, targets=["up", "down"])
    start = lora.init(KEY, base, config, lora.survey(NET, PARAMS, X))
    target = NET(PARAMS, X)
    error = lambda y: jnp.mean((y - target) ** 2)
    f = lora.adapt(NET, merge_aware="int4")

    @jax.jit
    def step(ad):
        grads = jax.grad(lambda ad: error(f(lora.bind(base, ad), X)))(ad)
        return jax.tree.map(lambda a, g: a - 0.01 * g / (1e-6 + jnp.abs(g).max()), ad, grads)

    ad = start
    for _ in range(60):
        ad = step(ad)
    deployed = lora.adapt(NET)(lora.bind(lora.merge(base, ad, requantize=True), None), X)
    trained, before = error(f(lora.bind(base, ad), X)), error(NET(lora.quant.dequantize(base), X))
    # to a rounding: a number half way between two levels may fall to either side
    assert abs(error(deployed) - trained) < 0.02 * trained
    assert error(deployed) < 0.9 * before, (error(deployed), before)


def call(
    fn=NET, params=PARAMS, targets=("up", "down"), merge_aware="nf4", key=None, make=None, **adapt
):
    adapters = started(params, fn, X, targets=targets, dropout=0.1 if key is not None else 0.0)
    adapters = make(params, adapters) if make else adapters
    bound = lora.bind(params, adapters, dropout_key=key)
    return lora.adapt(fn, merge_aware=merge_aware, **adapt)(bound, X)


CODED = lora.quant.quantize(PARAMS, ["up", "down"], "int8")
ERRORS = {
    "format": (dict(merge_aware="nf5"), "merge_aware='nf5': expected one of nf4"),
    "type": (dict(merge_aware=True), "merge_aware=True: expected one of nf4"),
    "plan": (dict(plan="merged"), "plan='merged' with merge_aware='nf4'"),
    "dropout": (dict(key=KEY), "(?s)'down' has dropout 0.1.*'up' has dropout"),
    "dora": (dict(make=lora.methods.dora), "'down' is scaled by a magnitude"),
    "other codes": (dict(params=CODED), "'down' is a Quantized.*'int8'.*expected an array, or 'nf4'"),
    "look-up": (
        dict(fn=lambda p, x: p["up"][jnp.arange(6)] + x @ p["up"], targets=("up",)),
        "(?s)for matrix products.*'up' is used by gather",
    ),
    "sum": (
        dict(fn=lambda p, x: x @ (p["up"] + p["down"]), strict=False),
        "(?s)for matrix products.*'up'",
    ),
    "convolution": (
        dict(fn=lambda p, x: jax.lax.conv(x[:, :, None, None], p["up"], (1, 1), "VALID"),
             params={"up": normal(1, 96, 64, 1, 1)}, targets=("up",)),
        "(?s)for matrix products.*'up' is used by conv_general_dilated",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    given, match = ERRORS[name]
    with fails(match):
        call(**given)


def test_errors_of_merging():
    adapters = started(CODED, NET, X)
    with fails("requantize='nf5': expected one of nf4"):
        lora.merge(PARAMS, adapters, requantize="nf5")
    with fails("(?s)in codes already, and not in 'nf4'.*'down' is a Quantized.*requantize=True"):
        lora.merge(CODED, adapters, requantize="nf4")
    assert set(FORMATS_4) <= set(FORMATS)


def test_a_weight_that_is_returned_is_what_is_deployed():
    fn = lambda p, x: (x @ p["up"], p["up"])
    adapters = started(PARAMS, fn, X, targets=["up"])
    y, w = lora.adapt(fn, merge_aware="nf4")(lora.bind(PARAMS, adapters), X)
    stored = lora.merge(PARAMS, adapters, requantize="nf4")["up"].value()
    np.testing.assert_array_equal(w, stored)
    assert_close(y, X @ stored)
