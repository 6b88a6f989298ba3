"""Random arrays as `jax.random` draws them, but of NumPy: nothing is compiled for each shape.

XLA compiles `jax.random.normal` anew for each shape and dtype, a fifth of the suite's time.
"""

import jax
import jax.numpy as jnp
import numpy as np


def _generator(key):
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())


def normal(key, shape=(), dtype=jnp.float32):
    """Standard normal values; of a traced key those of `jax.random`."""
    if isinstance(key, jax.core.Tracer):
        return jax.random.normal(key, shape, dtype)
    draw = _generator(key).standard_normal
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.asarray((draw(shape) + 1j * draw(shape)) / 2**0.5, dtype)
    return jnp.asarray(draw(shape), dtype)
