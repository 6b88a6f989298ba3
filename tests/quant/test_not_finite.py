"""A number that is not one is refused, or stays one: no format hides it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from common import examples, fails
from hypothesis import given
from hypothesis import strategies as st

import lora_jax as lora
from lora_jax._quantized.formats import FORMATS

W = rand.normal(jax.random.key(0), (3, 128))
DOUBLE = {"nf4", "int4", "int8_block", "fp8_block"}


@given(
    format=st.sampled_from(sorted(FORMATS)),
    double=st.booleans(),
    value=st.sampled_from([np.nan, np.inf, -np.inf]),
    at=st.tuples(st.integers(0, 2), st.integers(0, 127)),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
@examples(12)
def test_refused_where_it_is_known_and_nan_where_it_is_traced(format, double, value, at, dtype):
    double = double and format in DOUBLE
    params = {"a": {"w": W.astype(dtype).at[at].set(value)}, "b": W}
    make = lambda p: lora.quant.quantize(p, ["a/w", "b"], format, double=double)
    with fails(rf"'a/w': -?(nan|inf) at index \({at[0]}, {at[1]}\) of \(3, 128\) {dtype}"):
        make(params)
    read = lora.quant.dequantize(jax.jit(make)(params))
    assert not np.isfinite(read["a"]["w"][at]) and np.isfinite(read["b"]).all()
    if not double and FORMATS[format].block is not None:  # the block, and nothing but it
        block = FORMATS[format].block
        bad = np.zeros((3, 128), bool)
        bad[at[0], at[1] // block * block :][:block] = True
        np.testing.assert_array_equal(np.isnan(read["a"]["w"].astype(jnp.float32)), bad)


def test_all_leaves_are_named_and_the_first_index():
    bad = W.at[1, 70].set(jnp.inf).at[2, 0].set(jnp.nan)
    stack = jnp.stack([W, bad]).astype("bfloat16")
    rules = [lora.Rule("s", batch_axes=(0,), in_axes=(1,), out_axes=(2,))]
    chosen = lora.select(
        {"s": stack, "w": bad}, lora.LoRAConfig(rank=2, targets=["s", "w"], rules=rules)
    )
    with fails(r"(?s)'s': inf at index \(1, 1, 70\) of .*'w': inf at index \(1, 70\)"):
        lora.quant.quantize({"s": stack, "w": bad}, chosen)
    with fails(r"'w': inf at index \(1, 70\)"):
        lora.quant.quantize({"w": jax.eval_shape(lambda: W)}, "w", load=lambda _: np.asarray(bad))
    start = lora.init(jax.random.key(0), {"w": W}, lora.LoRAConfig(rank=2, targets="w"))
    with fails(r"'w': inf at index \(1, 70\)"):
        lora.quant.loftq({"w": bad}, start, "w")


def test_numbers_beyond_the_reader_s_type_are_refused():
    with jax.enable_x64(True), fails(r"'w': 1e\+300 at index \(0, 3\) of \(3, 128\) float64"):
        lora.quant.quantize({"w": W.astype("float64").at[0, 3].set(1e300)}, "w")


@pytest.mark.parametrize("format", ["nf4", "int8", "fp8_block"])
def test_the_largest_numbers(format):
    """1 / max|w| is subnormal beyond 2^126, and would be flushed to zero."""
    w = jnp.full((2, 64), 3e38).at[0, 3].set(1e38)
    read = lora.quant.dequantize(lora.quant.quantize({"w": w}, "w", format))["w"]
    small = lora.quant.dequantize(lora.quant.quantize({"w": w * 2.0**-64}, "w", format))["w"]
    np.testing.assert_allclose(read * 2.0**-64, small, rtol=4 * np.finfo("float32").eps)
