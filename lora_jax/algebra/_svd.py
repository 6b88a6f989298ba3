"""Updates by their singular values, without forming a matrix of the size of W."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lora_jax._core.einsum import wide
from lora_jax._core.errors import LoRAError
from lora_jax._nodes.adapters import LoRA


def matrices(node: LoRA) -> tuple[jax.Array, jax.Array]:
    """scale·A (n, in, r) and B (n, r, out) of the n weights of a stack, in fp32 or wider."""
    n, i, o = node.geometry.sizes(node.shape)
    dtype = wide(node.a.dtype)
    a, b = node.a.astype(dtype), node.b.astype(dtype)
    return a.reshape(n, i, node.rank) * node.scale, b.reshape(n, node.rank, o)


def svd(node: LoRA) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U (n, in, k), σ (n, k) and Vᵀ (n, k, out) of the update, k = min(rank, in, out)."""
    a, b = matrices(node)
    qa, ra = jnp.linalg.qr(a)
    qb, rb = jnp.linalg.qr(b.mT)
    u, s, v = jnp.linalg.svd(ra @ rb.mT, full_matrices=False)
    return qa @ u, s, v @ qb.mT


def range_svd(x: jax.Array, rank: int, passes: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """About the largest singular values and vectors of x (n, in, out), by subspace iteration from a
    random start, always the same (Halko, Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4)."""
    width = min(rank + 10, *x.shape[-2:])
    q = jnp.linalg.qr(x @ jax.random.normal(jax.random.key(0), (x.shape[-1], width), x.dtype))[0]
    for _ in range(passes):
        q = jnp.linalg.qr(x @ jnp.linalg.qr(x.mT @ q)[0])[0]
    u, s, v = jnp.linalg.svd(q.mT @ x, full_matrices=False)
    return q @ u, s, v


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
    a_shape, b_shape = like.geometry.factor_shapes(like.shape, rank)
    a, b = a.reshape(a_shape).astype(like.a.dtype), b.reshape(b_shape).astype(like.b.dtype)
    return dataclasses.replace(like, a=a, b=b, scale=scale)
