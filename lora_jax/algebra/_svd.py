"""Updates by their singular values, without forming a matrix of the size of W."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lora_jax._core.einsum import product, widened
from lora_jax._core.errors import LoRAError
from lora_jax._nodes.adapters import LoRA


def matrices(node: LoRA) -> tuple[jax.Array, jax.Array]:
    """scale·A (n, in, r) and B (n, r, out) of the n weights of a stack, in fp32 or wider."""
    a, b = node.geometry.pair(widened(node.a), widened(node.b))
    return a * node.scale, b


def svd(node: LoRA) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U (n, in, k), σ (n, k) and Vᵀ (n, k, out) of the update, k = min(rank, in, out)."""
    a, b = matrices(node)
    qa, ra = jnp.linalg.qr(a)
    qb, rb = jnp.linalg.qr(b.mT)
    u, s, v = jnp.linalg.svd(product(ra, rb.mT), full_matrices=False)
    return product(qa, u), s, product(v, qb.mT)


def range_svd(x: jax.Array, rank: int, passes: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """About the largest singular values and vectors of x (n, in, out), by subspace iteration from a
    random start, always the same (Halko, Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4)."""
    width = min(rank + 10, *x.shape[-2:])
    basis = lambda x, y: jnp.linalg.qr(product(x, y))[0]
    q = basis(x, jax.random.normal(jax.random.key(0), (x.shape[-1], width), x.dtype))
    for _ in range(passes):
        q = basis(x, basis(x.mT, q))
    u, s, v = jnp.linalg.svd(product(q.mT, x), full_matrices=False)
    return product(q, u), s, v


def rank_for(s: jax.Array, energy: float) -> int:
    """The smallest rank at which each row of singular values keeps this share of Σσ²."""
    if isinstance(s, jax.core.Tracer):
        raise LoRAError("a rank from the energy depends on values: not under jit; pass rank=")
    total = jnp.sum(s**2, -1, keepdims=True)
    enough = jnp.cumsum(s**2, -1) >= energy * total * (1 - 4 * jnp.finfo(s.dtype).eps)
    return int(jnp.max(jnp.argmax(enough, -1))) + 1


def share_kept(s: jax.Array, rank: int, total: jax.Array | None = None) -> jax.Array:
    """The share of the total, Σσ², that the largest `rank` σ have, the least of a stack."""
    total = jnp.sum(s**2, -1) if total is None else total
    top = jnp.sum(s[:, :rank] ** 2, -1)
    return jnp.min(jnp.where(total > 0, top / jnp.where(total > 0, total, 1), 1))


def from_svd(like: LoRA, u, s, v, rank: int, scale: float = 1.0) -> LoRA:
    """A node like `like`, of this rank and scale, with the largest of these directions."""
    keep = min(rank, s.shape[-1])
    root = jnp.sqrt(s[:, :keep] / scale)
    a, b = u[:, :, :keep] * root[:, None, :], root[:, :, None] * v[:, :keep]
    pad = [(0, rank - keep)]
    a, b = jnp.pad(a, [(0, 0), (0, 0), *pad]), jnp.pad(b, [(0, 0), *pad, (0, 0)])
    return as_node(like, a, b, scale)


def as_node(like: LoRA, a: jax.Array, b: jax.Array, scale: float | None = None) -> LoRA:
    """The node with matrices (n, in, r) and (n, r, out), in its own dtypes."""
    a, b = like.geometry.factors(a, b, like.shape)
    scale = like.scale if scale is None else scale
    a, b = a.astype(like.a.dtype), b.astype(like.b.dtype)
    return dataclasses.replace(like, a=a, b=b, scale=scale)
