"""The second moments of what each adapted leaf is multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapt import adapt
from lora_jax._adapters import LowRank, is_node
from lora_jax._einsum import wide
from lora_jax._errors import LoRAError, raise_all
from lora_jax._nnx import map_state, state_of
from lora_jax._paths import flatten, map_with_path
from lora_jax._targets import Targets
from lora_jax._weight import AdaptedWeight, Factor, Geometry


def second_moments(
    fn: Callable, params: Any, adapters: Any, *args: Any, **kwargs: Any
) -> dict[str, jax.Array]:
    """C = Σ xᵀx of the inputs x of each adapted leaf, in `fn(params, *args, **kwargs)`.

    x are the rows that meet the leaf's in axes: tokens, the patches of a convolution, what was
    routed to an expert. The model is not changed. It costs one call of `fn`, and for each leaf two
    products of x and an (in, in) matrix; under jit nothing else is computed.
    Moments of several batches add up, `jax.tree.map(jnp.add, first, second)`, to those of all.

    Args:
      fn: the plain function, such as `lambda p, x: model.apply({"params": p}, x)`.
      params: the parameters, or an NNX module.
      adapters: as from `init`, or `Targets`: which leaves. Only shapes are read. Memory is
        4·in² bytes for each weight, so of a large model take a part of them at a time.
      *args, **kwargs: a batch.

    Returns:
      {path: (n, in, in)} in fp32 or wider, n the number of weights that the leaf stacks. It is zero
      where no output depends on the product by a differentiable way, or the product is in a
      function with a `jax.custom_vjp` of its own: `eva` and `corda` refuse that.

    Raises:
      LoRAError: look-up tables, the inputs of which are no vectors; leaves that do not exist.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.ones((2, 3))}
    >>> targets = lora.select(params, lora.LoRAConfig(rank=1, targets="w"))
    >>> x = jnp.array([[1.0, 2.0], [0.0, 1.0]])
    >>> lora.second_moments(lambda p, x: jnp.tanh(x @ p["w"]), params, targets, x)["w"]
    Array([[[1., 2.],
            [2., 5.]]], dtype=float32)
    """
    leaves = flatten(state_of(params))
    nodes = low_rank(adapters)
    failures = [
        f"'{p}' is a look-up table: its inputs are row numbers" for p, t in nodes.items()
        if t.embedding
    ]  # fmt: skip
    failures += [
        f"'{p}' {t.shape} is no leaf of the parameters" for p, t in nodes.items()
        if p not in leaves or tuple(leaves[p].shape) != tuple(t.shape)
    ]  # fmt: skip
    raise_all("these have no second moments:", failures, "exclude them, or pass their own params")
    probes = {p: _identity(t.geometry, t.shape, leaves[p].dtype) for p, t in nodes.items()}
    call = adapt(fn, strict=False)

    def run(probes):
        def leaf(path, base):
            if path not in probes:
                return base
            a = Factor(probes[path], nodes[path].geometry.a_dims)
            axes = tuple((d,) for d in range(len(base.shape)))
            return AdaptedWeight(base, a, None, origin=path, axes=axes)

        return call(map_state(lambda tree: map_with_path(leaf, tree), params), *args, **kwargs)

    out, back = jax.vjp(run, probes)
    (moments,) = back(jax.tree.map(_no_cotangent, out))
    return {
        p: c.reshape(*t.geometry.sizes(t.shape)[:2], -1)
        for (p, t), c in zip(nodes.items(), (moments[p] for p in nodes))
    }


def low_rank(adapters: Any) -> dict[str, Any]:
    """{path: what has geometry, shape, rank and scale}, of adapters or targets."""
    if isinstance(adapters, Targets):
        return dict(adapters.lora)
    nodes = flatten(adapters, is_leaf=is_node)
    if not any(map(is_node, nodes.values())):
        raise LoRAError(
            "expected adapters or Targets: adapters = lora.init(key, params, config), or "
            "targets = lora.select(params, config, survey)"
        )
    return {p: n for p, n in nodes.items() if isinstance(n, LowRank)}


def checked_moments(moments: Any, nodes: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The second moments of these leaves, if there are any and they say something."""
    failures = []
    for path, t in nodes.items():
        n, i, _ = t.geometry.sizes(t.shape)
        c = moments.get(path) if isinstance(moments, Mapping) else None
        if c is None:
            failures.append(f"'{path}' has none")
        elif tuple(c.shape) != (n, i, i):
            failures.append(f"'{path}': expected {(n, i, i)}, found {tuple(c.shape)}")
        elif not isinstance(c, jax.core.Tracer) and not _says_something(c):
            failures.append(
                f"'{path}' has a moment that is zero or not finite: no differentiable way leads "
                "from its product to an output, it is moved beyond recognition, or unused"
            )
    raise_all(
        "the second moments are not those of these adapters:",
        failures,
        "moments = lora.second_moments(fn, params, adapters, batch)",
    )
    return {p: moments[p] for p in nodes}


def _says_something(c) -> bool:
    """An expert may have seen nothing, but not all of them."""
    with jax.ensure_compile_time_eval():  # it may be a constant of a jitted function
        return bool(jnp.isfinite(c).all() & (jnp.trace(c, axis1=1, axis2=2) > 0).any())


def _identity(g: Geometry, shape, dtype) -> jax.Array:
    """(*batch, *in, in): the identity, for each weight of the stack."""
    batch, inner = ([shape[d] for d in axes] for axes in (g.batch_axes, g.in_axes))
    n = g.sizes(shape)[1]
    eye = jnp.eye(n, dtype=wide(dtype)).reshape(*inner, n)
    return jnp.broadcast_to(eye, (*batch, *inner, n))


def _no_cotangent(y):
    if jnp.issubdtype(y.dtype, jnp.inexact):
        return jnp.zeros(y.shape, y.dtype)
    return np.zeros(y.shape, jax.dtypes.float0)
