"""Every public function of `lora.quant` with what it is not for: a LoRAError that says so."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import fails

import lora_jax as lora
from lora_jax import quant

W = jnp.ones((8, 64))
P = {"w": W, "n": jnp.ones(4)}
Q = quant.quantize(P, "w")
AD = lora.init(jax.random.key(0), P, lora.LoRAConfig(rank=2, targets="w"))
ODD = [
    None,
    ["nf4"],
    b"nf4",
    {},
    np.float32(1),
    1.5,
    re.compile("w"),
    {1},
    "x",
    np.ones(3),
    object(),
]
CALLS = {
    "format": (lambda x: quant.quantize(P, "w", x), "format=.*: expected one of nf4"),
    "double": (lambda x: quant.quantize(P, "w", double=x), "double=.*: expected True or False"),
    "format of loftq": (lambda x: quant.loftq(P, AD, "w", x), "format=.*: expected one of nf4"),
    "double of loftq": (lambda x: quant.loftq(P, AD, "w", double=x), "expected True or False"),
    "what load gives": (lambda x: quant.quantize(P, "w", load=lambda _: x), "'w': load gives"),
    "the other tree": (lambda x: quant.errors(Q, {"w": x, "n": 0}), "not the parameters of one model:.*'w"),
    "gguf's kernel": (lambda x: quant.gguf_weight([], kernel=x), "kernel=.*expected True or False"),
    "bitsandbytes' kernel": (
        lambda x: quant.bitsandbytes_weight({}, "w", kernel=x), "kernel=.*expected True or False"),
    "codes": (lambda x: quant.dequantize({"w": quant.Quantized(x, x, x, "nf4", "float32")}), "'w': "),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_odd_arguments(name):
    call, match = CALLS[name]
    for x in ODD:
        with fails(f"(?s){match}"):
            call(x)


def test_other_odd_arguments():
    for x in ("x", 1, ["n"]):
        with fails("load=.*: expected a function of a path"):
            quant.quantize(P, "w", load=x)
    for x in (1, None, [], np.ones(3), {1}, b"d"):
        with fails("axes=.*: expected the names of mesh axes"):
            quant.gathered(Q, x)
    tensor = SimpleNamespace(data=np.ones((2, 4), "float32"), tensor_type=None)
    for x in ("", 1j, ["f4"], "int8", None):
        with fails("dtype=.*: expected a floating type"):
            quant.gguf_weight(tensor, dtype=x)
    with fails("targets=.*expected one or several patterns"):
        quant.quantize(P, np.ones(3))


LEAVES = {
    "one axis": (jnp.ones(4), r"float32\(4,\)|ambiguous|axes"),
    "complex": (W.astype("complex64"), "complex64"),
    "integers": (jnp.ones((8, 64), "int32"), "int32"),
    "a shape": (jax.ShapeDtypeStruct((8, 64), "float32"), "'w' is a shape without numbers: give load="),
    "infinity": (np.full((8, 64), np.inf), r"'w': inf at index \(0, 0\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEAVES)
def test_odd_leaves(name):
    leaf, match = LEAVES[name]
    with fails(match):
        quant.quantize({"w": leaf, "n": W}, "w")


def test_shapes_have_no_codes():
    shapes = jax.eval_shape(lambda: Q)
    with fails("(?s)shapes, without codes to read:.*'w'"):
        quant.dequantize(shapes)
    with fails("'w' is a shape without numbers"):
        quant.errors(shapes, Q)
    with fails(r"'w' is \(8, 64\) in one and \(3, 3\) in the other"):
        quant.errors(Q, {"w": jnp.ones((3, 3)), "n": P["n"]})
