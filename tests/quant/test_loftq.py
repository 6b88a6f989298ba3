"""LoftQ: codes and adapters that are fitted to the weights together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from common import assert_close, fails, peft_starts

import lora_jax as lora

KEY = jax.random.key(0)


def started(params, rank, targets="w", **config):
    return lora.init(KEY, params, lora.LoRAConfig(rank=rank, targets=targets, **config))


def left(params, base, adapters):
    """‖W − Q − s·A·B‖ / ‖W − q(W)‖"""
    w, plain = params["w"], lora.quant.dequantize(lora.quant.quantize(params, "w"))["w"]
    return float(jnp.linalg.norm(w - lora.merge(base, adapters)["w"]) / jnp.linalg.norm(w - plain))


@pytest.mark.parametrize("iterations, want", [(1, 0.852), (5, 0.750), (10, 0.732)])
def test_residual_on_a_normal_distribution(iterations, want):
    """Rank 16 of 192: the smaller the matrix, the more of its error is of low rank."""
    params = {"w": jax.random.normal(KEY, (192, 192))}
    got = left(params, *lora.quant.loftq(params, started(params, 16), "w", iterations=iterations))
    assert abs(got - want) < 0.012


def test_one_iteration_is_the_svd_of_the_error():
    params = {"w": rand.normal(KEY, (64, 96))}
    base, adapters = lora.quant.loftq(params, started(params, 4), "w", iterations=1)
    q = lora.quant.quantize(params, "w")
    np.testing.assert_array_equal(base["w"].codes, q["w"].codes)
    error = params["w"] - q["w"].value()
    s = jnp.linalg.svd(error, compute_uv=False)
    rest = params["w"] - lora.merge(base, adapters)["w"]
    assert_close(jnp.linalg.norm(rest) ** 2, jnp.sum(s[4:] ** 2))
    assert_close(jnp.linalg.norm(rest, 2), s[4])


@pytest.mark.parametrize("iterations", [1, 3])
def test_it_is_that_of_peft(iterations):
    """PEFT's own with bitsandbytes' NF4; its factors have no scale before them."""
    stored = peft_starts()
    params, want = {"w": stored["loftq.w"]}, [stored[f"loftq.{iterations}.{k}"] for k in "qab"]
    # A scale of 5.
    start = started(params, 2, alpha=10)
    base, adapters = lora.quant.loftq(params, start, "w", iterations=iterations)
    q, a, b = want
    # Its first codes are the same; later ones follow from an SVD, and blocks have other constants.
    assert_close(base["w"].value(), q, factor=1 if iterations == 1 else 16)
    node = adapters["w"]
    assert_close(5 * node.a @ node.b, b @ a, factor=64)
    assert_close(jnp.linalg.norm(node.a, axis=0), np.linalg.norm(b, axis=0) / 5**0.5, factor=64)


@pytest.mark.parametrize("format, double", [("nf4", True), ("int8", False)])
def test_stacks_and_leaves_without_an_adapter(format, double):
    """Each layer of a stack as by itself; types are kept; other leaves are the same arrays."""
    stack = rand.normal(KEY, (3, 64, 64)).astype(jnp.bfloat16)
    params = {"w": stack, "v": jnp.eye(64), "norm": jnp.ones(64)}
    rules = [lora.Rule("w", batch_axes=(0,), in_axes=(1,), out_axes=(2,))]
    start = started(params, 4, rules=rules)
    both = lora.select(params, lora.LoRAConfig(targets=["w", "v"], rules=rules))
    make = lambda p, ad, t: lora.quant.loftq(p, ad, t, format, double=double, iterations=2)
    base, adapters = make(params, start, both)
    assert base["w"].dtype == jnp.bfloat16 and base["w"].stack == 1
    assert base["norm"] is params["norm"] and isinstance(base["v"], lora.quant.Quantized)
    one = {"w": stack[1]}
    alone, node = make(one, started(one, 4), "w")
    assert_close(base["w"].value()[1], alone["w"].value(), jnp.bfloat16)
    merged = lora.merge(base, adapters)["w"]
    assert_close(merged[1], lora.merge(alone, node)["w"], jnp.bfloat16)


def test_abstract():
    params = {"w": jax.ShapeDtypeStruct((64, 64), "float32")}
    start = jax.eval_shape(lambda p: started(p, 2), params)
    base, adapters = jax.eval_shape(lambda p, ad: lora.quant.loftq(p, ad, "w"), params, start)
    assert base["w"].codes.shape == (64, 32) and adapters["w"].a.shape == (64, 2)


def test_errors():
    params = {"w": jnp.eye(64), "v": jnp.eye(64)}
    start = started(params, 2)
    with fails("iterations=0: expected an integer >= 1"):
        lora.quant.loftq(params, start, "w", iterations=0)
    with fails("none of these adapted leaves is quantised:\n  - 'w'"):
        lora.quant.loftq(params, start, "v")
    with fails("quantised already"):
        lora.quant.loftq(lora.quant.quantize(params, "w"), start, "w")
