"""NVFP4: E2M1 in blocks of 16, a constant in E4M3 for each, one fp32 number for each weight."""

import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import rand
from common import adapted, assert_close, noisy, value_and_grad
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax._quantized.encode import _e4m3
from lora_jax._quantized.formats import unpack
from lora_jax._quantized.make import quantized

KEY = jax.random.key(0)


def by_hand(w):
    """(values, E4M3 constants, fp32 number) by ml_dtypes' own casts; w: (rows, blocks · 16)."""
    f32 = np.float32
    blocks = np.asarray(w, f32).reshape(len(w), -1, 16)
    top = np.abs(blocks).max(-1)
    scale = f32(top.max() * f32(1 / 2688))
    constants = (top * f32(1 / 6) * (1 / scale)).astype(ml_dtypes.float8_e4m3fn)
    step = constants.astype(f32)[..., None] * scale
    codes = np.clip(blocks * np.where(step > 0, 1 / np.where(step > 0, step, 1), 0), -6, 6).astype(
        ml_dtypes.float4_e2m1fn
    )
    return codes, constants, scale, (codes.astype(f32) * step).reshape(w.shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_to_ml_dtypes(dtype):
    """Codes are the bits of float4_e2m1fn, constants those of float8_e4m3fn; a block of zeros, and
    one that is small beside the largest."""
    w = rand.normal(KEY, (64, 128)).at[3].set(0).at[5].multiply(1e-7).astype(dtype)
    q = jax.jit(lambda w: quantized(w, "nvfp4"))(w)
    codes, constants, scale, values = by_hand(w)
    np.testing.assert_array_equal(q.second[0], scale)
    np.testing.assert_array_equal(np.asarray(q.constants).view(np.uint8), constants.view(np.uint8))
    np.testing.assert_array_equal(unpack(q.codes), codes.reshape(w.shape).view(np.uint8))
    np.testing.assert_array_equal(q.value(), values.astype(w.dtype))
    assert 8 * q.nbytes == 4 * w.size + 8 * w.size / 16 + 32  # bits


def test_e4m3_is_the_cast():
    """Each number of it, those half way between two, and the neighbours of these in fp32."""
    to = np.sort(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    to = to[np.isfinite(to)]
    middle = (to[1:] + to[:-1]) / 2
    near = [np.nextafter(middle, np.float32(end)) for end in (-500, 500)]
    x = np.concatenate([to, middle, *near, np.array([np.nan, -0.0, 1e-30, 448.0001], np.float32)])
    want = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(_e4m3)(x).view(np.uint32), want.view(np.uint32))


def test_half_way_is_even():
    """Each number half way between two of E2M1, and its neighbours in fp32, of either sign."""
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    middle = (levels[1:] + levels[:-1]) / 2
    near = [np.nextafter(middle, np.float32(to)) for to in (0, 9)]
    some = np.concatenate([middle, *near, levels])
    w = np.zeros((4, 16), np.float32)
    w.reshape(-1)[: some.size] = some
    w[:, -1] = 6  # the constant of each block is the same, and exact
    w = np.concatenate([w, -w]) * np.float32(448)
    w = jnp.asarray(w)
    codes, _, scale, _ = by_hand(np.asarray(w))
    assert scale == 1
    np.testing.assert_array_equal(
        unpack(quantized(w, "nvfp4").codes), codes.reshape(w.shape).view("uint8")
    )


def test_a_stack_has_a_number_for_each_weight():
    """Each weight as it would be by itself; a scan slices codes, constants and numbers."""
    w = rand.normal(KEY, (3, 32, 48)) * jnp.array([1e-3, 1.0, 50.0])[:, None, None]
    q = quantized(w, "nvfp4", stack=1)
    assert q.second[0].shape == (3,) and q.sliceable
    for i in range(3):
        one = quantized(w[i], "nvfp4")
        np.testing.assert_array_equal(q.value()[i], one.value())
        part = jax.tree.map(lambda x, i=i: x[i], q).part()
        np.testing.assert_array_equal(part.value(), one.value())
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w @ w.T), None), x, p["w"])[0]
    x = rand.normal(KEY, (5, 32))
    rule = lora.Rule("w", batch_axes=(0,), in_axes=(1,), out_axes=(2,))
    adapters = noisy(lora.init(KEY, {"w": q}, lora.LoRAConfig(rank=2, targets="w", rules=[rule])))
    got, want = (value_and_grad(run)(adapters) for run in (
        lambda ad: lora.adapt(fn)(lora.bind({"w": q}, ad), x),
        lambda ad: fn(lora.merge({"w": q}, ad), x),
    ))  # fmt: skip
    assert_close(got[1], want[1])
    assert_close(got[0], want[0], factor=512)


def test_named_sharded_and_gathered():
    params = {"w": rand.normal(KEY, (64, 128))}
    base = lora.quant.quantize(params, "w", "nvfp4")
    assert lora.checkpoint.fingerprint(base) != lora.checkpoint.fingerprint(params)
    where = NamedSharding(Mesh(np.array(jax.devices()[:1]), "d"), P("d"))
    specs = base["w"].specs(P("d", None), where.mesh)
    assert specs.codes == P("d", None) and specs.second == (P(),)
    place = lambda x, s: jax.device_put(x, NamedSharding(where.mesh, s))
    q = lora.quant.gathered({"w": jax.tree.map(place, base["w"], specs)}, "d")["w"]
    np.testing.assert_array_equal(jax.jit(lambda q: q.value())(q), base["w"].value())


@pytest.mark.parametrize("spec", [P("d", None), P(None, "d")], ids=["rows", "columns"])
def test_a_step_under_fsdp(spec):
    """As on one device; what is gathered are codes and constants, no float of the weight's size."""
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T
    base = {"w": quantized(rand.normal(KEY, (64, 256)), "nvfp4")}
    f, adapters = adapted(fn, lora.quant.dequantize(base), jnp.ones((8, 64)), targets="w")
    x = rand.normal(KEY, (8, 64))
    loss = lambda ad, q, x: jnp.mean(jnp.sin(f(lora.bind(q, ad), x)))
    step = jax.jit(jax.value_and_grad(loss))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
    spread = {"w": jax.tree.map(place, base["w"], base["w"].specs(spec, mesh))}
    given = lora.quant.gathered(spread, "d")
    ours = jax.device_put(adapters, lora.parallel.shardings(spread, adapters))
    compiled = step.lower(ours, given, place(x, P("d"))).compile()
    assert_close(compiled(ours, given, place(x, P("d"))), step(adapters, base, x), factor=256)
    lines = [line for line in compiled.as_text().splitlines() if " all-gather(" in line]
    sizes = [
        (kind, math.prod(map(int, shape.split(","))))
        for line in lines
        for kind, shape in re.findall(r"(\w+)\[([\d,]+)\]", line.split("all-gather(")[0])
    ]
    assert any(kind == "u8" and n == base["w"].codes.size for kind, n in sizes), sizes
    assert not [n for kind, n in sizes if kind[0] in "fb" and n >= base["w"].size], sizes


def test_loftq_leaves_less():
    params = {"w": rand.normal(KEY, (64, 64))}
    f, start = adapted(lambda p, x: x @ p["w"], params, params["w"], targets="w")
    base, adapters = lora.quant.loftq(params, start, "w", "nvfp4")
    left = jnp.linalg.norm(params["w"] - lora.merge(base, adapters)["w"])
    plain = lora.quant.quantize(params, "w", "nvfp4")
    assert left < 0.9 * jnp.linalg.norm(params["w"] - plain["w"].value())
    del f
