"""Random keys that belong to a path."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._core.errors import LoRAError


def path_key(key: jax.Array, path: str) -> jax.Array:
    """A key of the path's own: another leaf in the tree changes nothing (CRC-32, not `hash`)."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def as_key(key: Any, call: str = "lora.init({key}, params, config)") -> jax.Array:
    """A typed key, from either kind.

    Raises:
      LoRAError: it is none; with the corrected call.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return key
    # A raw key of jax.random.PRNGKey; with more axes it would be several keys.
    if dtype == jnp.uint32 and jnp.ndim(key) == 1:
        return jax.random.wrap_key_data(key)
    # `init(7, params, config)`: the integer was meant as a seed.
    seed = key if isinstance(key, int) and not isinstance(key, bool) else 0
    raise LoRAError(
        f"expected a PRNG key, found {type(key).__name__}: "
        + call.format(key=f"jax.random.key({seed})")
    )
