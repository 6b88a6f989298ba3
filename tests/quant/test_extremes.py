"""Weights of zeros, of the largest numbers of a type and of the smallest ones, through codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax._quantized.formats import FORMATS


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_beside_the_largest(format):
    """A block of zeros is zeros: 1 over a subnormal number is infinite, and 0 times that NaN."""
    w = np.zeros((2, 128), "float32")
    w[0, 3] = 2.0**100
    for quantize in (lora.quant.quantize, jax.jit(lora.quant.quantize, static_argnums=(1, 2))):
        found = lora.quant.dequantize(quantize({"w": jnp.asarray(w)}, "w", format))["w"]
        np.testing.assert_allclose(found, w, rtol=0.2)


@pytest.mark.parametrize("format", ["nf4", "int4", "int8_block", "fp8_block"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_largest_with_double_quantisation(format, dtype):
    """The sum of the blocks' constants is no number of fp32; their mean is."""
    w = jnp.full((4, 128), jnp.finfo(dtype).max, dtype)
    found = lora.quant.dequantize(lora.quant.quantize({"w": w}, "w", format, double=True))["w"]
    assert found.dtype == w.dtype
    np.testing.assert_allclose(*(x.astype("float32") for x in (found, w)), rtol=1e-6)
