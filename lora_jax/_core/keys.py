"""Random keys that belong to a path."""

from __future__ import annotations

import contextlib
import numbers
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax._core.errors import LoRAError


def path_key(key: jax.Array, path: str) -> jax.Array:
    """A key of the path's own: another leaf in the tree changes nothing (CRC-32, not `hash`)."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def as_key(key: Any, call: str = "lora.init({key}, params, config)") -> jax.Array:
    """A typed key, from either kind.

    Raises:
      LoRAError: it is none; with the corrected call.
    """
    # `nnx.Rngs`, which can be called, has a stream for any name, "dtype" as well.
    dtype, shape = None if callable(key) else getattr(key, "dtype", None), getattr(key, "shape", ())
    typed = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    if typed and shape == ():
        return key
    # A raw key of jax.random.PRNGKey; with more axes it would be several keys.
    if dtype == jnp.uint32 and len(shape) == 1:
        with contextlib.suppress(TypeError, ValueError):  # words of another implementation
            return jax.random.wrap_key_data(key)
    # `init(7, params, config)`: the integer was meant as a seed.
    whole = isinstance(key, numbers.Integral) and not isinstance(key, bool)
    found, cure = type(key).__name__, f"jax.random.key({key if whole else 0})"
    if isinstance(key, nnx.Rngs):
        cure = "rngs()"
    elif typed:
        found, cure = f"{shape} keys", f"keys[{', '.join('0' * len(shape))}]"
    elif dtype == jnp.uint32 and shape == (4,):
        # What `jax.random.key_data` gives of such a key.
        found, cure = "the words of an rbg key", "jax.random.wrap_key_data(words, impl='rbg')"
    raise LoRAError(f"expected a PRNG key, found {found}: " + call.format(key=cure))
