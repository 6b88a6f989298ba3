"""Updates by their singular values, without forming a matrix of the size of W.

Shapes: n weights in a stack; A (n, in, r), B (n, r, out), x (n, in, out); U (n, in, k), σ (n, k),
falling, and Vᵀ (n, k, out).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._core.einsum import product, widened
from lora_jax._core.errors import LoRAError
from lora_jax._core.geometry import Geometry
from lora_jax._core.mesh import anywhere, placement
from lora_jax._nodes.adapters import LoRA


def matrices(node: LoRA) -> tuple[jax.Array, jax.Array]:
    """scale·A (n, in, r) and B (n, r, out) of the n weights of a stack, in fp32 or wider."""
    a, b = node.geometry.pair(widened(node.a), widened(node.b))
    return a * node.scale, b


def leaf_sharding(node: LoRA) -> NamedSharding | None:
    """The sharding of the leaf that these factors belong to, as far as their own shows it."""
    sides = ((node.geometry.a_dims, placement(node.a)), (node.geometry.b_dims, placement(node.b)))
    known = [(dims, s) for dims, s in sides if s is not None]
    # {axis of the leaf: mesh axes}; the rank's own axis is no axis of the leaf and drops out. A
    # mesh axis that each factor gives to another axis of the leaf is that of A.
    entry: dict[int, Any] = {}
    for d, e in (pair for dims, s in known for pair in zip(dims, s.spec) if pair[1] is not None):
        taken = {n for own in entry.values() for n in jax.tree.leaves(own)}
        if taken.isdisjoint(jax.tree.leaves(e)):
            entry.setdefault(d, e)
    spec = PartitionSpec(*(entry.get(d) for d in range(len(node.shape))))
    return NamedSharding(known[0][1].mesh, spec) if known else None


@anywhere
@jax.jit
def svd(node: LoRA) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U (n, in, k), σ (n, k) and Vᵀ (n, k, out) of the update, k = min(rank, in, out)."""
    a, b = matrices(node)
    # A·B = Qa·(Ra·Rbᵀ)·Qbᵀ: the middle is r × r, and its singular values are those of A·B.
    qa, ra = jnp.linalg.qr(a)
    qb, rb = jnp.linalg.qr(b.mT)
    u, s, v = jnp.linalg.svd(product(ra, rb.mT), full_matrices=False)
    return product(qa, u), s, product(v, qb.mT)


def range_svd(x: jax.Array, rank: int, passes: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """About the largest singular values and vectors of x (n, in, out), by subspace iteration from a
    random start, always the same (Halko, Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4)."""
    width = min(rank + 10, *x.shape[-2:])
    basis = lambda x, y: jnp.linalg.qr(product(x, y))[0]
    # q (n, in, width): x times a random (out, width).
    q = basis(x, jax.random.normal(jax.random.key(0), (x.shape[-1], width), x.dtype))
    for _ in range(passes):
        # A QR after each product: otherwise all columns turn to the first singular vector.
        q = basis(x, basis(x.mT, q))
    u, s, v = jnp.linalg.svd(product(q.mT, x), full_matrices=False)
    return product(q, u), s, v


def best_svd(x: jax.Array, rank: int, spread: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U, σ and Vᵀ of x (n, in, out), at least for the largest `rank` σ.

    All of them, by LAPACK; where x is spread over devices, a few more than `rank`, by products
    alone, so that no device gathers x.
    """
    if spread:
        return spread_svd(x, rank)
    u, s, v = jnp.linalg.svd(x, full_matrices=False)
    return u, s, v


@functools.partial(jax.jit, static_argnums=(1, 2))
def spread_svd(x: jax.Array, rank: int, passes: int = 8) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `range_svd`, with bases from Gram matrices: each device keeps its part of x, and what is
    sent has 2·rank + 16 columns. Exact where x has no more rows or columns than that."""
    width = min(2 * rank + 16, *x.shape[-2:])
    # q (n, out, width) and p (n, in, width), in turns.
    q = jax.random.normal(jax.random.key(0), (len(x), x.shape[-1], width), x.dtype)
    for _ in range(passes):
        p = _basis(product(x, q))
        q = _basis(product(x.mT, p))
    p = _basis(product(x, q))
    # Only pᵀ·x·q, width × width, is decomposed: it is small and the same on every device.
    u, s, v = jnp.linalg.svd(product(product(p.mT, x), q), full_matrices=False)
    return product(p, u), s, product(v, q.mT)


def _basis(y: jax.Array) -> jax.Array:
    """Orthonormal columns that span those of y (n, p, k), and zeros for what fp32 has lost.

    The Gram matrix squares singular values, so what is small is found in a second turn, in what the
    first leaves; together they see down to about 10⁻⁴ of the largest.
    """

    def turn(y: jax.Array):
        # The largest entry becomes 1: squares in the Gram matrix neither overflow nor vanish.
        y = y / jnp.maximum(jnp.max(jnp.abs(y), (1, 2), keepdims=True), jnp.finfo(y.dtype).tiny)
        # Eigenvalues rise: the largest is the last.
        w, v = jnp.linalg.eigh(product(y.mT, y))
        kept = (w > 2 * w.shape[-1] * jnp.finfo(w.dtype).eps * w[:, -1:])[:, None]
        # Orthogonal columns of length √w; a root of infinity makes zeros of those that are lost.
        y = product(y, v)
        root = jnp.where(kept, jnp.sqrt(jnp.where(kept, w[:, None], 1)), jnp.inf)
        return y / root, jnp.where(kept, 0, y)

    q, rest = turn(y)
    # Twice, as after one projection rounding leaves a part along q.
    outside = lambda y: y - product(q, product(q.mT, y))
    found = jnp.any(rest != 0, (1, 2), keepdims=True)
    # q has its zeros in front, and so has this: reversed, it fills them.
    more = jnp.where(found, turn(outside(outside(rest)))[0], 0)[..., ::-1]
    # The last turn makes the two orthonormal to each other.
    return turn(jnp.where(jnp.any(q != 0, 1, keepdims=True), q, more))[0]


def rank_for(s: jax.Array, energy: float) -> int:
    """The smallest rank at which each row of singular values keeps this share of Σσ²."""
    if isinstance(s, jax.core.Tracer):
        raise LoRAError("a rank from the energy depends on values: not under jit; pass rank=")
    if not s.shape[-1]:  # of an update without factors
        return 1
    return int(_rank_for(s, energy))


@jax.jit
def _rank_for(s: jax.Array, energy: float) -> jax.Array:
    total = jnp.sum(s**2, -1, keepdims=True)
    # The slack is for an energy of 1: the running sum may end just below the total.
    enough = jnp.cumsum(s**2, -1) >= energy * total * (1 - 4 * jnp.finfo(s.dtype).eps)
    # argmax of booleans is the first True; the largest rank of a stack serves all of it.
    return jnp.max(jnp.argmax(enough, -1), initial=0) + 1


@functools.partial(jax.jit, static_argnums=1)
def share_kept(s: jax.Array, rank: int, total: jax.Array | None = None) -> jax.Array:
    """The share of the total, Σσ², that the largest `rank` σ have; of a stack, the least."""
    total = jnp.sum(s**2, -1) if total is None else total
    top = jnp.sum(s[:, :rank] ** 2, -1)
    share = jnp.where(total > 0, top / jnp.where(total > 0, total, 1), 1)
    return jnp.min(share, initial=1)  # 1 of a stack of nothing


def from_svd(
    like: LoRA, u: jax.Array, s: jax.Array, v: jax.Array, rank: int, scale: float = 1.0
) -> LoRA:
    """A node like `like`, of this rank and scale, with the largest of these directions."""
    a, b = _balanced(u, s, v, rank, scale)
    return as_node(like, a, b, scale)


# As one program for each shape: eagerly each of its steps would be one.
@functools.partial(jax.jit, static_argnums=(3, 4))
def _balanced(
    u: jax.Array, s: jax.Array, v: jax.Array, rank: int, scale: float
) -> tuple[jax.Array, jax.Array]:
    """scale·A·B = U·Σ·Vᵀ with A = U·√(Σ/scale) and B = √(Σ/scale)·Vᵀ."""
    keep = min(rank, s.shape[-1])
    root = jnp.sqrt(s[:, :keep] / scale)
    a, b = u[:, :, :keep] * root[:, None, :], root[:, :, None] * v[:, :keep]
    # min(in, out) may be less than the rank: zeros along its axis.
    pad = [(0, rank - keep)]
    return jnp.pad(a, [(0, 0), (0, 0), *pad]), jnp.pad(b, [(0, 0), *pad, (0, 0)])


def as_node(like: LoRA, a: jax.Array, b: jax.Array, scale: float | None = None) -> LoRA:
    """The node with matrices (n, in, r) and (n, r, out), in its own dtypes."""
    a, b = _stored(a, b, like.geometry, like.shape, like.a.dtype, like.b.dtype)
    return dataclasses.replace(like, a=a, b=b, scale=like.scale if scale is None else scale)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _stored(a: jax.Array, b: jax.Array, g: Geometry, shape: tuple, *dtypes: Any) -> tuple:
    a, b = g.factors(a, b, shape)
    return a.astype(dtypes[0]), b.astype(dtypes[1])
