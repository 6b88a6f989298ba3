"""Quantised leaves, arrays of qwix's and files that were damaged: read as they say, or refused."""

import dataclasses

import pytest

pytest.importorskip("gguf")

import jax
import jax.numpy as jnp
import numpy as np
from common import fails
from damage_codes import OUTCOMES, good
from damage_quantised import run_of

import lora_jax as lora

CASES = {"codes": 40, "qarray": 40, "safetensors": 60, "gguf file": 60}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of casts that a generator makes
@pytest.mark.parametrize("kind", OUTCOMES)
def test_damaged(kind):
    found = run_of(OUTCOMES[kind], kind, 0, CASES[kind])
    assert found["refused"] > 0 and found["read"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OUTCOMES)
def test_many_damaged(kind):
    found = run_of(OUTCOMES[kind], kind, 5000, 20 * CASES[kind])
    assert min(found["refused"], found["read"]) > 40, found


@pytest.mark.parametrize("second", [(), []])
def test_no_second_constants_are_none(second):
    q = dataclasses.replace(good("fp8", (8, 64), "float32", False, 0), second=second)
    with fails(
        f"'w': expected a tuple of arrays as second, found an empty {type(second).__name__}"
    ):
        lora.quant.dequantize({"w": q})


def test_a_leaf_without_rows_is_printed():
    q = jax.tree.map(
        lambda x: x[:0] if len(x) == 8 else x, good("int8", (8, 64), "float32", False, 0)
    )
    assert repr(q) == "Quantized((0, 64), float32, 'int8', 2048 bits)" and q.value().shape == (
        0,
        64,
    )


HARMS = {
    "cast": (
        lambda q: jax.tree.map(lambda x: x.astype("bfloat16"), q),
        "bfloat16, bfloat16 are not the types of",
    ),
    "no pad": (lambda q: dataclasses.replace(q, pad=None), "pad=None"),
    "no codes": (lambda q: dataclasses.replace(q, codes=None), "expected arrays as codes"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_every_door_names_the_leaf(harm):
    q, (harmed, what) = good("nf4", (8, 128), "float32", False, 0), HARMS[harm]
    bad, x = {"a": {"w": harmed(q)}, "b": jnp.ones(3)}, jnp.ones((1, 8))
    config = lora.LoRAConfig(rank=1, targets="w")
    node = lora.init(jax.random.key(0), {"a": {"w": q.value()}}, config)
    match = f"(?s)were damaged since they were made:.*'a/w': {what}"
    for door in (
        lambda: lora.survey(lambda p, x: x @ p["a"]["w"], bad, x),
        lambda: lora.select(bad, config),
        lambda: lora.init(jax.random.key(0), bad, config),
        lambda: lora.bind(bad, None),
        lambda: lora.bind(bad, node),
        lambda: lora.merge(bad, node),
        lambda: lora.quant.dequantize(bad),
        lambda: lora.quant.errors(bad, bad),
    ):
        with fails(match):
            door()


@pytest.mark.parametrize("harm", [dict(pad=None), dict(format=3), dict(codes=np.ones(()))])
def test_doors_that_ask_for_the_shape_alone(harm):
    q = good("nf4", (8, 128), "float32", False, 0)
    params, bad = {"w": q.value()}, {"w": dataclasses.replace(q, **harm)}
    node = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=1, targets="w"))
    for door in (
        lambda: lora.peft.mapping({"w.weight": (128, 8)}, bad),
        lambda: lora.parallel.memory(bad, node),
        lambda: lora.algebra.combine([node], base=bad),
    ):
        with fails("(?s)were damaged since they were made:.*'w': "):
            door()
