"""Gradients of frozen leaves by their largest singular vectors, never formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._adapt import adapt
from lora_jax._adapters import LoRA
from lora_jax._algebra import from_svd, svd
from lora_jax._bind import adapter_nodes, bind
from lora_jax._errors import LoRAError
from lora_jax._init import path_key
from lora_jax._moments import low_rank
from lora_jax._paths import flatten, nest
from lora_jax._targets import Targets

OVERSAMPLED = 10


def low_rank_gradients(
    loss: Callable, params: Any, adapters: Any, *args: Any, rank: int | None = None, passes: int = 2
) -> dict:
    """About the best low-rank part of the gradient of `loss(params, *args)` with respect to each
    adapted leaf, for `lora_ga`, `lora_one` and `propose`.

    With B = 0 the gradient of B is AᵀG, and with A = 0 that of A is G·Bᵀ: products of the full
    gradient G with any matrix, out of the adapted backward pass, which forms no G. They are all
    that a subspace iteration needs (Halko, Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4).
    Where `jax.grad(loss)(params)` takes the memory of all the leaves, this takes that of adapters
    of rank + 10; and 2·passes gradients of the adapters instead of one of all the parameters.

    Args:
      loss: the plain function; its value is a number.
      params: the parameters, or an NNX module.
      adapters: as from `init`, or `Targets`: which leaves. Only shapes are read.
      *args: a batch.
      rank: of the result; None: twice each adapter's, as `lora_ga` needs.
      passes: each makes it more exact. Where rank + 10 ≥ min(in, out), 1 is exact.

    Returns:
      An adapter tree with scale 1: G ≈ A·B, of leaf after leaf.

    Raises:
      LoRAError: rank or passes below 1; as `adapt`.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.eye(3)}
    >>> targets = lora.select(params, lora.LoRAConfig(rank=1, targets="w"))
    >>> loss = lambda p: jnp.sum((jnp.diag(jnp.array([2.0, 1.0, 0.0])) @ p["w"]) ** 2) / 2
    >>> g = lora.low_rank_gradients(loss, params, targets)["w"]
    >>> bool(jnp.allclose(g.a @ g.b, jnp.diag(jnp.array([4.0, 1.0, 0.0])), atol=1e-5))
    True
    """
    if passes < 1 or (rank is not None and rank < 1):
        raise LoRAError(f"expected rank and passes of at least 1, found {rank} and {passes}")
    nodes = low_rank(adapters)
    if not isinstance(adapters, Targets):
        adapter_nodes(params, adapters, "low_rank_gradients")
    ranks = {p: rank or 2 * t.rank for p, t in nodes.items()}
    call = adapt(loss)

    def gradients(factors):
        of = lambda ad: call(bind(params, ad), *args)
        return flatten(jax.grad(of)(nest(factors)), is_leaf=lambda x: isinstance(x, LoRA))

    left = {p: _random(p, t, ranks[p]) for p, t in nodes.items()}
    for i in range(passes):
        left = {p: jnp.linalg.qr(x)[0] for p, x in left.items()} if i else left
        g = gradients({p: _node(t, left[p], None) for p, t in nodes.items()})
        q = {p: jnp.linalg.qr(_matrix(g[p].b, t).mT)[0] for p, t in nodes.items()}
        g = gradients({p: _node(t, None, q[p].mT) for p, t in nodes.items()})
        left = {p: _matrix(g[p].a, t, first=True) for p, t in nodes.items()}  # G·Q
    return nest({p: _best(_node(t, left[p], q[p].mT), ranks[p]) for p, t in nodes.items()})


def _random(path: str, t, rank: int) -> jax.Array:
    """(n, in, about rank), always the same."""
    n, i, o = t.geometry.sizes(t.shape)
    width = min(rank + OVERSAMPLED, i, o)
    return jax.random.normal(path_key(jax.random.key(0), path), (n, i, width), jnp.float32)


def _matrix(factor, t, first: bool = False) -> jax.Array:
    """A as (n, in, k) or B as (n, k, out)."""
    n, i, o = t.geometry.sizes(t.shape)
    return factor.reshape((n, i, -1) if first else (n, -1, o))


def _node(t, a, b) -> LoRA:
    """A node of matrices (n, in, k) and (n, k, out); of one of them, the other is zero."""
    rank = b.shape[1] if a is None else a.shape[2]
    shapes = t.geometry.factor_shapes(t.shape, rank)
    a, b = (
        jnp.zeros(s, jnp.float32) if x is None else x.reshape(s) for x, s in zip((a, b), shapes)
    )
    return LoRA(a, b, 1.0, t.geometry, 0.0, t.embedding)


def _best(node: LoRA, rank: int) -> LoRA:
    _, i, o = node.geometry.sizes(node.shape)
    return from_svd(node, *svd(node), min(rank, i, o))
