"""Weights of GGUF files in their blocks: read as the gguf package reads them, and trained on."""

from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import adapted, assert_close, fails, noisy, value_and_grad
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora

gguf = pytest.importorskip("gguf")
Tensor = namedtuple("Tensor", "data tensor_type name")  # as the reader's
KEY = jax.random.key(0)
BITS = {"Q4_0": 4.5, "Q4_1": 5.0, "Q8_0": 8.5, "Q4_K": 4.5}


def tensor(kind, *shape, seed=0):
    """One as a reader gives it; Q4_K of random bytes, with scales that are finite."""
    kind = gguf.GGMLQuantizationType[kind]
    rng = np.random.default_rng(seed)
    if kind.name == "Q4_K":
        blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // 256, 144), np.uint8)
        halves = (rng.standard_normal((*blocks.shape[:-1], 2)) / 512).astype(np.float16)
        blocks[..., :4] = halves.view(np.uint8)
        data = blocks.reshape(*shape[:-1], -1)
    else:
        data = gguf.quants.quantize(rng.standard_normal(shape, np.float32), kind)
    return Tensor(data=data, tensor_type=kind, name="w")


def theirs(t):
    return gguf.quants.dequantize(t.data, t.tensor_type)


@pytest.mark.parametrize("kind", BITS)
def test_values_are_those_of_gguf_to_the_bit(kind):
    """Products of few bits are exact in fp32, so that a fused multiply-add rounds alike."""
    t = tensor(kind, 3, 24, 512)
    q = lora.quant.gguf_weight(t)
    np.testing.assert_array_equal(jax.jit(lambda q: q.value())(q), theirs(t))
    assert q.bits == BITS[kind] and q.nbytes == t.data.nbytes and q.shape == (3, 24, 512)
    kernel = lora.quant.gguf_weight(t, kernel=True)
    assert kernel.shape == (3, 512, 24)
    np.testing.assert_array_equal(
        lora.quant.dequantize({"w": kernel})["w"], theirs(t).swapaxes(1, 2)
    )
    order = np.random.default_rng(1).permutation(24)
    got = lora.quant.gguf_weight(t, order=order, dtype=jnp.bfloat16)
    want = jnp.asarray(theirs(t)[:, order]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got.value().astype(jnp.float32), want.astype(jnp.float32))


@pytest.mark.parametrize("kind", ["F32", "F16", "Q5_0"])
def test_other_types_are_arrays(kind):
    t = tensor(kind, 8, 64)
    np.testing.assert_array_equal(lora.quant.gguf_weight([t, t], kernel=True)[1], theirs(t).T)


@pytest.mark.parametrize("kind", BITS)
def test_training_on_scanned_layers(kind):
    """As on the dequantised weights; no array of the stack's shape, but codes, is there."""
    layers = [tensor(kind, 256, 256, seed=i) for i in range(3)]
    table = tensor("Q8_0", 10, 256, seed=9)
    q = {"w": lora.quant.gguf_weight(layers, kernel=True), "table": lora.quant.gguf_weight(table)}
    plain = lora.quant.dequantize(q)
    np.testing.assert_array_equal(plain["w"][1], theirs(layers[1]).T)

    def fn(p, ids):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w / 16), None), p["table"][ids], p["w"])
        return x @ p["table"].T

    ids = jnp.array([1, 3, 3, 7])
    f, adapters = adapted(fn, plain, ids, targets="w")
    got, want = (
        value_and_grad(run)(adapters)
        for run in (
            lambda ad: f(lora.bind(q, ad), ids),
            lambda ad: fn(lora.merge(plain, ad), ids),
        )
    )
    assert_close(got[1], want[1], factor=256)
    assert_close(got[0], want[0], factor=2048)
    loss = lambda ad, q: jnp.sum(f(lora.bind(q, ad), ids))
    text = jax.jit(jax.grad(loss)).lower(adapters, q).compile().as_text()
    assert "f32[3,256,256]" not in text
    assert ("s8[3,256,256]" if kind == "Q8_0" else "u8[3,256,128]") in text
    assert_close(lora.adapt(fn)(lora.bind(q, None), ids), fn(plain, ids), factor=256)


def test_sharding_of_a_transposed_weight():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    q = {"w": lora.quant.gguf_weight(tensor("Q4_1", 32, 64), kernel=True)}
    q = jax.device_put(q, NamedSharding(mesh, P("b")))  # the output units
    start = noisy(lora.init(KEY, q, lora.LoRAConfig(rank=2, targets="w")))
    at = lora.parallel.shardings(q, start)["w"]
    assert at.a.spec == P(None, None) and at.b.spec == P(None, "b")


def test_errors():
    one, other = tensor("Q4_0", 8, 64), tensor("Q4_1", 8, 64)
    with fails("of one type and shape, found Q4_0, Q4_1"):
        lora.quant.gguf_weight([one, other])
    with fails("expected a kernel of two axes or more, found .64,."):
        lora.quant.gguf_weight(tensor("F32", 64), kernel=True)
    q = {"w": lora.quant.gguf_weight(one)}
    adapters = lora.init(KEY, q, lora.LoRAConfig(rank=2, targets="w"))
    with fails("'w' is a Quantized.*'q4_0'.*which is only read"):
        lora.merge(q, adapters, requantize=True)
