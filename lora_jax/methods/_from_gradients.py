"""Gradients of frozen leaves by their largest singular vectors, never formed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._adapt import adapt
from lora_jax._bind import adapter_nodes, bind
from lora_jax._core.einsum import widened
from lora_jax._core.errors import raise_all
from lora_jax._core.keys import path_key
from lora_jax._core.nnx import state_of
from lora_jax._core.numbers import PASSES, POSITIVE, SIZE, check_numbers
from lora_jax._core.paths import flatten, nest
from lora_jax._nodes.adapters import LoRA, LowRank
from lora_jax._nodes.node import is_node
from lora_jax._targets import Target, Targets
from lora_jax.algebra._finite import is_finite
from lora_jax.algebra._svd import as_node, from_svd, svd
from lora_jax.methods._start import (
    each,
    lora_nodes,
    low_rank,
    off_the_base,
    plain_svd,
)

# Columns beside the rank, as Halko et al. advise: the largest directions are found in fewer passes.
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
    >>> g = lora.methods.low_rank_gradients(loss, params, targets)["w"]
    >>> bool(jnp.allclose(g.a @ g.b, jnp.diag(jnp.array([4.0, 1.0, 0.0])), atol=1e-5))
    True
    """
    rank, passes = check_numbers(
        "lora.methods.low_rank_gradients(loss, params, adapters, *args, rank=16, passes=2)",
        rank=(rank, SIZE.or_none),
        passes=(passes, PASSES),
    )
    nodes = low_rank(adapters)
    if not isinstance(adapters, Targets):
        adapter_nodes(params, adapters, "methods.low_rank_gradients")
    ranks = {p: rank or 2 * t.rank for p, t in nodes.items()}
    call = adapt(loss)

    def gradients(factors: Mapping[str, LoRA]) -> dict[str, LoRA]:
        of = lambda ad: call(bind(params, ad), *args)
        return flatten(jax.grad(of)(nest(factors)), is_leaf=lambda x: isinstance(x, LoRA))

    # left (n, in, k) spans G's columns, q (n, out, k) its rows: in turns, each by way of the other.
    left = {p: _random(p, t, ranks[p]) for p, t in nodes.items()}
    q: dict[str, jax.Array] = {}
    for i in range(passes):
        # A product with G turns all columns to its first singular vector; a QR sets them apart.
        left = {p: jnp.linalg.qr(x)[0] for p, x in left.items()} if i else left
        # B = 0, so that the adapted loss is the plain one: ∂/∂B = leftᵀ·G (n, k, out).
        g = gradients({p: _node(t, left[p], None) for p, t in nodes.items()})
        q = {p: jnp.linalg.qr(_pair(g[p])[1].mT)[0] for p in nodes}
        g = gradients({p: _node(t, None, q[p].mT) for p, t in nodes.items()})
        # A = 0 and B = Qᵀ: ∂/∂A = G·Q (n, in, k).
        left = {p: _pair(g[p])[0] for p in nodes}
    # G ≈ (G·Q)·Qᵀ, cut to the rank that was asked for.
    return nest({p: _best(_node(t, left[p], q[p].mT), ranks[p]) for p, t in nodes.items()})


def _random(path: str, t: Target | LowRank, rank: int) -> jax.Array:
    """Normal numbers (n, in, k), k a little more than the rank; the same in every call."""
    n, i, o = t.geometry.sizes(t.shape)
    width = min(rank + OVERSAMPLED, i, o)
    return jax.random.normal(path_key(jax.random.key(0), path), (n, i, width), jnp.float32)


def _pair(node: LoRA) -> tuple[jax.Array, jax.Array]:
    """A as (n, in, k) and B as (n, k, out)."""
    return node.geometry.pair(node.a, node.b)


def _node(t: Target | LowRank, a: jax.Array | None, b: jax.Array | None) -> LoRA:
    """A node of matrices (n, in, k) and (n, k, out); where one is None, it is zero."""
    n, i, o = t.geometry.sizes(t.shape)
    if a is None:
        assert b is not None  # one of the two is given
        a = jnp.zeros((n, i, b.shape[1]), jnp.float32)
    b = jnp.zeros((n, a.shape[2], o), jnp.float32) if b is None else b
    return LoRA(*t.geometry.factors(a, b, t.shape), 1.0, t.geometry, 0.0, t.embedding)


def _best(node: LoRA, rank: int) -> LoRA:
    _, i, o = node.geometry.sizes(node.shape)
    u, s, v = svd(node)
    return from_svd(node, u, s, v, min(rank, i, o))


def lora_ga(params: Any, adapters: Any, gradients: Any, *, gamma: float = 16.0) -> tuple[Any, dict]:
    """The first step of gradient descent is along the best rank-2r part of the full gradient
    (LoRA-GA, Wang 2024, arXiv:2407.05000).

    With G = ∂loss/∂W = U·S·Vᵀ, A = c·U[:, 1…r] and B = c·V[:, r+1…2r]ᵀ, orthonormal but for the
    scale c = ⁴√out / √γ that keeps outputs stable; base' = W − s·A·B. So does the authors'
    code by default ("ArB2r", "stable"), with a randomised SVD. PEFT's port is another method: there
    B is also multiplied by the singular values, and c is on B alone.

    Args:
      params, adapters: as of `pissa`. The paper's scale is alpha / √rank, `rank_stabilized=True`.
      gradients: the gradient of each adapted leaf: either as `jax.grad(loss)(params)` gives it,
        which takes the memory of all of them, or low-rank, from `low_rank_gradients`, with the
        memory of a few adapters.
      gamma: γ, 16 in the authors' code; the smaller, the larger A and B.

    Returns:
      As `pissa`.

    Raises:
      LoRAError: as `pissa`; a leaf without a gradient, or of a rank above min(in, out) / 2.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jnp.eye(4)}, jax.random.normal(jax.random.key(0), (9, 4))
    >>> loss = lambda p: jnp.sum((x @ p["w"]) ** 2)
    >>> start = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets="w"))
    >>> base, adapters = lora.methods.lora_ga(params, start, jax.grad(loss)(params))
    >>> bool(jnp.allclose(lora.merge(base, adapters)["w"], params["w"], atol=1e-6))
    True
    """
    call = "lora.methods.lora_ga(params, adapters, gradients, gamma=16.0)"
    (gamma,) = check_numbers(call, gamma=(gamma, POSITIVE))
    nodes = lora_nodes(adapters)
    found = _gradients(gradients, nodes, lambda node: 2 * node.rank)

    def make(path: str, node: LoRA, w: jax.Array) -> LoRA:
        r = node.rank
        u, _, v = found[path]
        # w is (n, in, out).
        c = w.shape[-1] ** 0.25 / math.sqrt(gamma)
        # Other directions for B than for A: with one set in both, the first step has rank r only.
        return as_node(node, c * u[:, :, :r], c * v[:, r : 2 * r])

    return off_the_base(params, adapters, make, "methods.lora_ga")


def lora_one(
    adapters: Any, gradients: Any, *, gamma: float = 128.0, normalized: bool = True
) -> dict:
    """One step of gradient descent, at rank r, before the first (LoRA-One, Zhang 2025,
    arXiv:2502.01235, algorithm 1): A·B = −G_r / (γ·S₁) with √S on either side; the base stays. The
    authors' code also multiplies A and B by ⁴√out, as LoRA-GA's does, which here is part of γ.

    Args:
      adapters: as of `pissa`.
      gradients: as of `lora_ga`.
      gamma: the step is scale / γ; 128 in the authors' code, with scale = alpha / √rank.
      normalized: divide G by its largest singular value S₁, as algorithm 1 does: γ then means the
        same whatever the size of the loss. False: the step of gradient descent as it is.

    Returns:
      The adapters.

    Raises:
      LoRAError: as `lora_ga`.

    >>> import jax.numpy as jnp, lora_jax as lora, jax
    >>> params, g = {"w": jnp.zeros((2, 2))}, {"w": jnp.diag(jnp.array([4.0, 1.0]))}
    >>> config = lora.LoRAConfig(rank=1, alpha=1, targets="w")
    >>> start = lora.init(jax.random.key(0), params, config)
    >>> moved = lora.merge(params, lora.methods.lora_one(start, g, gamma=0.5))["w"]
    >>> bool(jnp.allclose(moved, jnp.diag(jnp.array([-2.0, 0.0]))))
    True
    """
    call = "lora.methods.lora_one(adapters, gradients, gamma=128.0)"
    (gamma,) = check_numbers(call, traced=True, gamma=(gamma, POSITIVE))
    nodes = lora_nodes(adapters)
    found = _gradients(gradients, nodes, lambda node: node.rank)

    def make(path: str, node: LoRA) -> LoRA:
        u, s, v = found[path]
        # σ (n, k), the largest first.
        top = s[:, :1] if normalized else jnp.ones_like(s[:, :1])
        s = s / jnp.where(top > 0, top, 1) * (node.scale / gamma)
        # `from_svd` takes the scale out again: A·B = −G_r / (γ·S₁).
        return from_svd(node, -u, s, v, node.rank, node.scale)

    return each(adapters, make)


def _gradients(gradients: Any, nodes: Mapping[str, LoRA], rank: Callable) -> dict[str, tuple]:
    """{path: (U, S, Vᵀ)} of the gradients of these leaves."""
    flat = flatten(state_of(gradients), is_leaf=is_node)
    failures, found = [], {}
    for path, node in nodes.items():
        g, need = flat.get(path), rank(node)
        if g is None:
            failures.append(f"'{path}' has none")
        elif tuple(g.shape) != node.shape:
            failures.append(f"'{path}': expected one of {node.shape}, found {tuple(g.shape)}")
        elif not is_finite(g):
            failures.append(f"'{path}': it holds NaN or infinity")
        else:
            matrices = node.geometry.matrices
            found[path] = svd(g) if isinstance(g, LoRA) else plain_svd(matrices(widened(g)))
            if found[path][1].shape[-1] < need:
                have = found[path][1].shape[-1]
                failures.append(f"'{path}': {need} singular values are needed, it has {have}")
    raise_all(
        "the gradients are not those of these adapters:",
        failures,
        "jax.grad(loss)(params), or lora.methods.low_rank_gradients(loss, params, adapters)",
    )
    return found
