"""Weights that bitsandbytes wrote, read as it reads them.

tests/data/bitsandbytes_4bit.safetensors was made with torch 2.13 and bitsandbytes 0.50.2, on a CPU:

    def put(name, w, nested):
        q, state = F.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=nested)
        out[f"{name}.weight"] = q
        for k, v in state.as_dict(packed=True).items():
            out[f"{name}.weight.{k}"] = v.contiguous()
        return F.dequantize_4bit(q, state)

    g = torch.Generator().manual_seed(0)
    read = put("plain", torch.randn(3, 128, generator=g).bfloat16(), False)
    out["nested.read"] = put("nested", torch.randn(34, 512, generator=g), True)[::8].contiguous()
    out["plain.read"] = read.float()
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from common import assert_close, fails, noisy, value_and_grad
from safetensors.numpy import load_file

import lora_jax as lora

GOLDEN = load_file(
    __file__.replace("quant/test_bitsandbytes.py", "data/bitsandbytes_4bit.safetensors")
)
STATE = ".quant_state.bitsandbytes__nf4"


def test_values_are_those_of_bitsandbytes_to_the_bit():
    plain = lora.quant.bitsandbytes_weight(GOLDEN, "plain.weight")
    assert plain.dtype == jnp.bfloat16 and plain.shape == (3, 128)
    np.testing.assert_array_equal(plain.value().astype(jnp.float32), GOLDEN["plain.read"])
    nested = lora.quant.bitsandbytes_weight(GOLDEN, "nested.weight")
    assert nested.second is not None and nested.shape == (34, 512)
    np.testing.assert_array_equal(nested.value()[::8], GOLDEN["nested.read"])
    got = lora.quant.bitsandbytes_weight(GOLDEN, "nested.weight", kernel=True)
    np.testing.assert_array_equal(lora.quant.dequantize({"w": got})["w"].T, nested.value())


def test_layers_of_a_scan():
    """A stack of doubly quantised kernels, trained on as on its values."""
    q = {"w": lora.quant.bitsandbytes_weight(GOLDEN, ["nested.weight"] * 2, kernel=True)}
    plain = lora.quant.dequantize(q)
    assert plain["w"].shape == (2, 512, 34) and q["w"].sliceable

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w / 16) @ w.T / 16, None), x, p["w"])[0]

    x = rand.normal(jax.random.key(0), (4, 512))
    survey = lora.survey(fn, plain, x)
    config = lora.LoRAConfig(rank=2, targets="w")
    adapters = noisy(lora.init(jax.random.key(0), q, config, survey))
    got, want = (
        value_and_grad(run)(adapters)
        for run in (
            lambda ad: lora.adapt(fn)(lora.bind(q, ad), x),
            lambda ad: fn(lora.merge(plain, ad), x),
        )
    )
    assert_close(got[1], want[1], factor=256)
    assert_close(got[0], want[0], factor=2048)


def changed(**state):
    """The golden tensors with another description."""
    name = "nested.weight" + STATE
    new = json.loads(GOLDEN[name].tobytes()) | state
    return GOLDEN | {name: np.frombuffer(json.dumps(new).encode(), np.uint8)}


@pytest.mark.parametrize(
    "tensors, name, match",
    [
        (GOLDEN, "nested.wait", "there is no nested.wait.*nearest: nested.weight"),
        (changed(quant_type="fp4"), "nested.weight", "levels are those of 'fp4'"),
        (changed(blocksize=128), "nested.weight", "blocks of 128 in rows of 512; expected 64"),
        (changed(shape=[544, 32]), "nested.weight", "blocks of 64 in rows of 32; expected 64"),
        (changed(nested_blocksize=128), "nested.weight", "groups of 128 constants"),
        (changed(dtype="int8"), "nested.weight", "weights of 'int8'; expected one of float32"),
        (changed(shape=[3.0, 128]), "nested.weight", r"shape='\[3.0, 128\]', expected a list of"),
        (changed(nested_offset=float("nan")), "nested.weight", "nested_offset='nan', expected"),
        (
            GOLDEN | {"plain.weight.absmax": GOLDEN["plain.weight.absmax"][:-1]},
            "plain.weight",
            r"'plain.weight.absmax': expected float32\(6,\), found float32\(5,\)",
        ),
        (
            GOLDEN | {"plain.weight.absmax": -GOLDEN["plain.weight.absmax"]},
            "plain.weight",
            "'plain.weight.absmax': expected from 0 to 3.39e.38, found -.* at index 0",
        ),
        (
            GOLDEN | {"nested.weight.nested_quant_map": np.linspace(-1, 1, 256, dtype="f4")},
            "nested.weight",
            "other values of 8 bits",
        ),
        (GOLDEN, ["nested.weight", "plain.weight"], "'plain.weight' is .*3, 128"),
    ],
)
def test_errors(tensors, name, match):
    with fails(match):
        lora.quant.bitsandbytes_weight(tensors, name)
