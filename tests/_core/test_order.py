"""One value after another: the value itself, and ordered on each platform by what it heeds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax._core.order import ordered

X = jnp.array([[jnp.nan, 1.0], [2.0, jnp.inf]])
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "uint8", "int8", "int32")


@pytest.mark.parametrize("of_x", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_value_is_kept_to_the_bit(dtype, of_x):
    y = jnp.array([0, 1, 3, 100, -0.0 if "f" in dtype else 7]).astype(dtype)
    got = jax.jit(ordered)(X.astype(of_x), y)
    assert got.dtype == y.dtype
    np.testing.assert_array_equal(*(np.asarray(v).view(np.uint8) for v in (got, y)))


def lowered(*platforms):
    traced = jax.jit(ordered).trace(X, jnp.ones(3))
    return traced.lower(lowering_platforms=platforms).as_text()


def test_each_platform_gets_what_it_heeds():
    """Whatever the machine is that lowers: XLA drops barriers on CPUs alone."""
    marks = {
        "cpu": "stablehlo.clamp",
        "tpu": "optimization_barrier",
        "cuda": "optimization_barrier",
    }
    for platform, mark in marks.items():
        (other,) = {*marks.values()} - {mark}
        text = lowered(platform)
        assert mark in text and other not in text
    both = lowered("cpu", "tpu")
    assert all(mark in both for mark in marks.values())


def test_derivatives_and_batches_are_those_of_the_value():
    y = jnp.array([1.0, 2.0, 3.0])
    loss = lambda x, y: jnp.sum(jnp.sin(ordered(x, y)))
    to_x, to_y = jax.grad(loss, (0, 1))(X, y)
    np.testing.assert_array_equal(to_x, jnp.zeros_like(X))
    np.testing.assert_allclose(to_y, jnp.cos(y), rtol=1e-6)
    np.testing.assert_allclose(jnp.diag(jax.hessian(loss, 1)(X, y)), -jnp.sin(y), rtol=1e-6)
    # what is not of the batch stays so: out_axes=None refuses a batched output
    np.testing.assert_array_equal(jax.vmap(ordered, (0, None), out_axes=None)(X, y), y)
    np.testing.assert_array_equal(jax.vmap(ordered, (None, 0))(X, y), y)
    np.testing.assert_array_equal(ordered(jnp.zeros((0, 2)), y), y)
