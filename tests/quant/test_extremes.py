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


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
def test_finite_numbers_are_read_as_finite(format, dtype):
    """Near the largest number of a type: MXFP4's next power of two, and constants that double
    quantisation rounds up, were read as infinite, and 0 times that as NaN."""
    most = float(jnp.finfo(dtype).max)
    part = np.random.default_rng(0).uniform(0.7, 1, (3, 32, 128))
    part[1:] *= np.where(np.arange(128) % 3, 1e-4, -1)  # and small ones beside them
    part[:, 0, 0] = 1
    w = jnp.asarray((part * most).astype(dtype).reshape(96, 128))
    for double in {False, format in ("nf4", "int4")}:
        q = lora.quant.quantize({"w": w}, "w", format, double=double)
        found = np.asarray(lora.quant.dequantize(q)["w"], "float64")
        lost = np.abs(found - np.asarray(w, "float64")) / most
        # MXFP4 of fp32: 6·2^125, three quarters of the largest, is the last below infinity.
        assert lost.max() < 0.3, (double, found.max())


def test_mxfp4_is_the_nearest_of_its_levels():
    """To the bit, against all levels in fp64: powers of two and quotients are not rounded."""
    rng = np.random.default_rng(0)
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = np.concatenate([-levels[:0:-1], levels])
    w = rng.normal(size=(64, 32)) * 2.0 ** rng.integers(-118, 123, (64, 1))
    w[:16] = np.exp2(rng.integers(-8, 8, (16, 32))) * rng.choice([0.25, 0.75, 5, 6], (16, 32))
    w = w.astype("float32").astype("float64")
    found = lora.quant.dequantize(
        lora.quant.quantize({"w": jnp.asarray(w, "float32")}, "w", "mxfp4")
    )
    power = 2.0 ** np.ceil(np.log2(np.abs(w).max(-1, keepdims=True) / 6))
    # the first of two that are as near: half way, the lower one
    best = levels[np.abs((w / power)[..., None] - levels).argmin(-1)]
    np.testing.assert_array_equal(found["w"], best * power)
