"""Random arrays as `jax.random` draws them, but of NumPy: nothing is compiled for each shape.

XLA compiles `jax.random.normal` anew for each shape and dtype, a fifth of the suite's time.
"""

import jax
import jax.numpy as jnp
import numpy as np


def _generator(key):
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())


def normal(key, shape=(), dtype=jnp.float32, scale=1.0):
    """Normal values of a standard deviation; of a traced key those of `jax.random`."""
    if isinstance(key, jax.core.Tracer):
        return (scale * jax.random.normal(key, shape, dtype)).astype(dtype)
    draw = _generator(key).standard_normal
    values = draw(shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        values = (values + 1j * draw(shape)) / 2**0.5
    return jnp.asarray(scale * values, dtype)
