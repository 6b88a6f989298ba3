"""The first adapters of a parameter tree: pure, and keyed by path."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._config import LoRAConfig
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.keys import as_key, path_key
from lora_jax._core.nnx import state_of
from lora_jax._core.numbers import check_values
from lora_jax._core.paths import flatten, nest
from lora_jax._core.placement import check_placed, near
from lora_jax._nodes.adapters import Full, LoRA, Rows, rows_of
from lora_jax._nodes.node import leaves_of
from lora_jax._quantized.waiting import value
from lora_jax._select import no_config, select
from lora_jax._survey import Survey
from lora_jax._targets import Target, Targets

if TYPE_CHECKING:
    import chex


def init(
    key: chex.PRNGKey,
    params: Any,
    config: LoRAConfig | Targets = None,  # type: ignore[assignment]
    survey: Survey | None = None,
) -> dict:
    """The adapters of a parameter tree, such that the adapted function equals the plain one.

    A is random and B is zero (arXiv:2106.09685, section 4.1); for embeddings A is zero and B is
    N(0, 1), as in loralib and PEFT. Each leaf's values depend on `key` and its path alone. The
    values of the base are read only for leaves that are trained in full or by rows.

    Args:
      key: a PRNG key, of either kind.
      params: the parameters, or an NNX module; under `jax.eval_shape` or jit, abstract.
      config: a `LoRAConfig`, or the `Targets` that `select` made of one.
      survey: how the function uses each leaf, see `select`.

    Returns:
      A nested dict that has, at the path of each trained leaf, a `LoRA` with arrays a
      (*batch, *in, rank) and b (*batch, rank, *out), a `Full` or a `Rows`. It holds arrays only,
      for optax. `nnx.Optimizer` looks for Variables and would find none: it takes
      `lora.attach(model, adapters)`.

    Raises:
      LoRAError: as `select`; or the arguments are not a key, parameters and a configuration; an
        init function returned another shape; or leaves that do not lie on the same devices.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"q": {"kernel": jnp.ones((64, 32))}}
    >>> adapters = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=4, targets="q"))
    >>> jax.tree.map(jnp.shape, adapters["q"]["kernel"].a), adapters["q"]["kernel"].b.shape
    ((64, 4), (4, 32))
    """
    if isinstance(params, Targets | LoRAConfig):
        shifted = config is None or isinstance(config, Survey)
        wrong = "the key is missing" if shifted else "params come before config"
        given = "" if config is None else ", survey"
        raise LoRAError(f"{wrong}: lora.init(jax.random.key(0), params, config{given})")
    targets, key = targets_of(params, config, survey, key=key), as_key(key)
    config, leaves = targets.config, flatten(state_of(params))
    whole = ((f"'{p}'", leaves[p]) for p in (*targets.full, *targets.rows))
    check_values(whole, "jax.eval_shape(lora.init, key, params, targets)")
    check_placed(leaves, {*targets.lora, *targets.full, *targets.rows})
    flat: dict[str, Any] = {}
    failures: list[str] = []
    for path, t in targets.lora.items():
        flat[path] = _lora(path_key(key, path), path, t, config, failures)
    # These start at the base's own values, so the function is unchanged.
    for path in targets.full:
        flat[path] = Full(jnp.asarray(near(value(leaves[path]))).astype(config.dtype))
    for path, (shape, index) in targets.rows.items():
        rows = rows_of(jnp.asarray(near(value(leaves[path]))), jnp.asarray(index))
        flat[path] = Rows(rows.astype(config.dtype), index, shape[0])
    raise_all(
        "the init function did not return what it was asked for:",
        failures,
        "it is called as init(key, shape, dtype), and returns such an array",
    )
    return nest(flat)


def targets_of(
    params: Any,
    config: LoRAConfig | Targets,
    survey: Survey | None,
    call: str = "lora.init",
    key: Any = None,
) -> Targets:
    """What adapters are made for, checked against the parameters."""
    if not isinstance(config, Targets | LoRAConfig):
        raise no_config(f"{call}(key, params", config, survey, key)
    leaves = leaves_of(params, f"{call}(key, params, config)")
    targets = config if isinstance(config, Targets) else select(params, config, survey)
    targets.check_fit(leaves, f"{call}(key, params, lora.select(params, config, survey))")
    # JAX would make fp32 of it, with no more than a warning.
    if jax.dtypes.canonicalize_dtype(targets.config.dtype) != targets.config.dtype:
        raise LoRAError(
            "dtype=float64: JAX has it after jax.config.update('jax_enable_x64', True); "
            "or lora.LoRAConfig(dtype='float32')"
        )
    return targets


def _lora(key: jax.Array, path: str, t: Target, config: LoRAConfig, failures: list[str]) -> LoRA:
    a_shape, b_shape = t.geometry.factor_shapes(t.shape, t.rank)
    # fan_in is that of one weight, not of the stack: the product of its in axes.
    random = _initialiser(config.init, fan_in=t.geometry.sizes(t.shape)[1], rank=t.rank)
    # A function for A is asked for A, whatever the leaf.
    if t.embedding and not callable(config.init):
        a = jnp.zeros(a_shape, config.dtype)
        b = jax.random.normal(key, b_shape, config.dtype)
    else:
        try:
            a = random(key, a_shape, config.dtype)
        except TypeError as e:  # a function of other arguments
            failures.append(f"'{path}': it failed with {type(e).__name__}: {e}")
            a = jnp.zeros(a_shape, config.dtype)
        b = jnp.zeros(b_shape, config.dtype)
    # NumPy draws in fp64, whatever it is asked for.
    a = jnp.asarray(a, config.dtype) if isinstance(a, np.ndarray) else a
    if not isinstance(a, jax.Array):
        # jax.nn.initializers.orthogonal makes such a function, and is none.
        hint = ": call it, init=jax.nn.initializers.orthogonal()" if callable(a) else ""
        failures.append(f"'{path}': expected {a_shape}, found {type(a).__name__}{hint}")
    elif a.shape != a_shape:
        failures.append(f"'{path}': expected {a_shape}, found {a.shape}")
    elif a.dtype != config.dtype:
        failures.append(f"'{path}': expected {config.dtype}, found {a.dtype}")
    if failures:
        return LoRA(b, b, t.scale, t.geometry)
    return LoRA(a, b, t.scale, t.geometry, t.dropout, t.embedding)


def _initialiser(init: str | Callable, fan_in: int, rank: int) -> Callable:
    if callable(init):
        return init
    if init == "gaussian":
        # The standard deviation is 1 / rank, as in PEFT.
        return lambda key, shape, dtype: jax.random.normal(key, shape, dtype) / rank
    # Kaiming-uniform with a = √5: gain √(2 / (1 + a²)), and the bound is gain · √(3 / fan_in).
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
