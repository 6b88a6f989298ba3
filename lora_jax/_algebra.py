"""Adapters as values: sums, scalings, other ranks, and adapters of a full fine-tuning.

Every adapter stands for its update Δ = scale · A·B, and these are functions of updates: exact, or
the best of a given rank. They work on the factors: the singular values of a product of (in, r) and
(r, out) are those of an r × r matrix, after a QR decomposition of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._adapters import DoRA, Full, LoRA, Rows, is_node
from lora_jax._einsum import wide
from lora_jax._errors import LoRAError, raise_all
from lora_jax._factors import check_factors
from lora_jax._nnx import state_of
from lora_jax._paths import flatten, nest
from lora_jax._targets import Targets
from lora_jax._weight import Geometry


def combine(
    adapters: Sequence[Any], weights: Sequence[Any] | None = None, *, base: Any = None
) -> dict:
    """Σ wₖ·Δₖ of several adapters, exactly: their factors side by side (task arithmetic,
    arXiv:2212.04089, of low-rank task vectors).

    The sum of updates is not the update of summed factors, (A₁+A₂)·(B₁+B₂), which has cross terms.
    The rank of the result is the sum of the ranks; `resize` makes it smaller.

    Args:
      adapters: adapter trees of one base. They may have other targets and ranks: what a tree does
        not have is zero.
      weights: for each tree a number, or {path: number or an array along the leaf's batch axes},
        one for each leaf; traced ones too, so that they can be learned (LoraHub, arXiv:2307.13269;
        LoRA Soups, arXiv:2410.13025). None: 1 each, the sum.
      base: the base parameters, for leaves that are trained in full or by rows: there the update is
        the difference from the base.

    Returns:
      An adapter tree; the weights are folded into B, and each scale is 1. Dropout is kept where
      all agree on it, and 0 elsewhere.

    Raises:
      LoRAError: no adapters, another number of weights, adapters that do not fit each other, a leaf
        trained in full without `base`; all of them at once. A `DoRA`, which adds no update.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> node = lora.LoRA(jnp.ones((2, 1)), jnp.ones((1, 2)), 1.0, lora.Geometry((0,), (1,)))
    >>> mixed = lora.combine([{"w": node}, {"w": node}], [0.5, -2.0])
    >>> lora.merge({"w": jnp.zeros((2, 2))}, mixed)["w"]
    Array([[-1.5, -1.5],
           [-1.5, -1.5]], dtype=float32)
    """
    trees = [flatten(linear(tree), is_leaf=is_node) for tree in adapters]
    weights = [1.0] * len(trees) if weights is None else list(weights)
    if not trees or len(trees) != len(weights):
        raise LoRAError(
            f"expected one weight for each of {len(trees)} adapters, found {len(weights)}: "
            "lora.combine([first, second], [0.5, 0.5])"
        )
    leaves = {} if base is None else flatten(state_of(base))
    failures: list[str] = []
    out = {}
    for path in dict.fromkeys(p for tree in trees for p in tree):
        parts = [
            (tree[path], weight_of(w, path)) for tree, w in zip(trees, weights) if path in tree
        ]
        problem = differ([node for node, _ in parts], leaves.get(path))
        if problem is not None:
            failures.append(f"'{path}': {problem}")
        elif isinstance(parts[0][0], LoRA):
            out[path] = _side_by_side(parts)
        else:
            out[path] = _moved(parts, leaves[path])
    raise_all("these adapters cannot be combined:", failures, "they must be of one base")
    return nest(out)


def scaled(adapters: Any, weight: Any) -> dict:
    """weight · Δ, exactly; −1 negates an adapter (arXiv:2212.04089, "forgetting").

    Args:
      adapters: adapters, without leaves that are trained in full or by rows (for these `combine`
        needs the base).
      weight: as one of those of `combine`.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> node = lora.LoRA(jnp.ones((2, 1)), jnp.ones((1, 2)), 1.0, lora.Geometry((0,), (1,)))
    >>> lora.scaled({"w": node}, -1.0)["w"].b
    Array([[-1., -1.]], dtype=float32)
    """
    return combine([adapters], [weight])


def resize(adapters: Any, rank: int | None = None, *, energy: float | None = None) -> dict:
    """The adapters of another rank: the best approximation of each update (Eckart and Young), or,
    where the rank grows, the same update with zeros beside it.

    Args:
      adapters: any adapters; leaves trained in full or by rows stay as they are.
      rank: the rank of every leaf.
      energy: or, leaf by leaf, the smallest rank that keeps this share of ‖Δ‖² (of a stack, in each
        of its weights). It depends on values, so not under jit.

    Returns:
      Adapters with scale 1 and balanced factors: A = U·√Σ, B = √Σ·Vᵀ.

    Raises:
      LoRAError: neither or both of rank and energy, or one out of range; a `DoRA`.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> node = lora.LoRA(jnp.ones((4, 3)), jnp.ones((3, 2)), 2.0, lora.Geometry((0,), (1,)))
    >>> small = lora.resize({"w": node}, energy=0.99)["w"]  # all of it is in one direction
    >>> small.rank, bool(jnp.allclose(small.a @ small.b, 6.0))
    (1, True)
    """
    fits = rank >= 1 if energy is None and rank is not None else 0 < (energy or 0) <= 1
    if (rank is None) == (energy is None) or not fits:
        raise LoRAError(
            f"expected a rank >= 1 or an energy in (0, 1], found rank={rank}, energy={energy}: "
            "lora.resize(adapters, rank=8) or lora.resize(adapters, energy=0.95)"
        )

    def leaf(node):
        if not isinstance(node, LoRA):
            return node
        u, s, v = svd(node)
        keep = rank if energy is None else rank_for(s, energy)
        return from_svd(node, u, s, v, keep)

    return jax.tree.map(leaf, linear(adapters), is_leaf=is_node)


def extract(
    base: Any,
    tuned: Any,
    targets: Targets,
    *,
    energy: float | None = None,
    drop: bool = False,
) -> tuple[dict, dict[str, float]]:
    """Adapters of a model that was fine-tuned in full: the best of each rank (the SVD of W' − W).

    Args:
      base: the parameters before.
      tuned: the parameters after, of the same structure.
      targets: what `select` returned: leaves and their ranks; leaves of `full` are taken as they
        are in `tuned`, those of `rows` row by row.
      energy: instead of the targets' ranks, the smallest that keep this share of ‖W' − W‖².
      drop: whether changes of leaves that are no targets may be lost.

    Returns:
      (adapters with scale 1, {path: share of ‖W' − W‖² that is kept, the least of a stack}).

    Raises:
      LoRAError: leaves that changed and are no targets (unless `drop`), or trees that differ.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> base, tuned = {"w": jnp.zeros((4, 4))}, {"w": jnp.diag(jnp.array([3.0, 1.0, 0.0, 0.0]))}
    >>> targets = lora.select(base, lora.LoRAConfig(rank=1, targets="w"))
    >>> lora.extract(base, tuned, targets)[1]["w"]  # 9 of 10
    0.9
    """
    if energy is not None and not 0 < energy <= 1:
        raise LoRAError(f"energy={energy}: expected a share in (0, 1]")
    before, after = (flatten(state_of(x)) for x in (base, tuned))
    failures = [f"'{p}' is in one tree alone" for p in before.keys() ^ after.keys()]
    failures += [
        f"'{p}': {tuple(before[p].shape)} became {tuple(after[p].shape)}"
        for p in before.keys() & after.keys()
        if before[p].shape != after[p].shape
    ]
    raise_all("these are not one model before and after:", sorted(failures))
    chosen = {*targets.lora, *targets.full, *targets.rows}
    lost = [p for p in before if p not in chosen and bool(jnp.any(before[p] != after[p]))]
    if not drop:
        raise_all(
            "these leaves changed, and are no targets:",
            (f"'{p}'" for p in lost),
            "select them too (`full=[...]`), or lora.extract(..., drop=True)",
        )
    flat: dict[str, Any] = {}
    kept: dict[str, float] = {}
    for path, t in targets.lora.items():
        flat[path], kept[path] = _extracted(before[path], after[path], t, targets.config, energy)
    for path in targets.full:
        flat[path] = Full(jnp.asarray(after[path]).astype(targets.config.dtype))
    for path, (shape, index) in targets.rows.items():
        rows = jnp.asarray(after[path])[jnp.asarray(index)]
        flat[path] = Rows(rows.astype(targets.config.dtype), index, shape[0])
    return nest(flat), kept


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


def linear(adapters: Any) -> Any:
    """The adapters, if each stands for an update that is added to the base."""
    nodes = flatten(checked(adapters), is_leaf=is_node)
    raise_all(
        "these are scaled by magnitudes, so what they add depends on the base:",
        (f"'{p}' is a DoRA" for p, n in nodes.items() if isinstance(n, DoRA)),
        "merge them, lora.merge(params, adapters), and take a low-rank update by lora.extract",
    )
    return adapters


def checked(adapters: Any) -> Any:
    """The adapters, if that is what they are."""
    nodes = jax.tree.leaves(adapters, is_leaf=is_node)
    wrong = [type(n).__name__ for n in nodes if not is_node(n)]
    if wrong or not nodes:
        raise LoRAError(
            f"expected adapters, as from lora.init, found {wrong[0] if wrong else 'an empty tree'}"
        )
    check_factors(flatten(adapters, is_leaf=is_node))
    return adapters


def weight_of(weight: Any, path: str) -> Any:
    """The weight of one leaf."""
    if not isinstance(weight, Mapping):
        return weight
    if path not in weight:
        raise LoRAError(f"the weights have none for '{path}'; there are {', '.join(weight)}")
    return weight[path]


def differ(nodes: list, base: Any) -> str | None:
    """What is wrong with combining these nodes of one leaf."""
    first = nodes[0]
    if any(type(n) is not type(first) or n.shape != first.shape for n in nodes):
        return "found " + ", ".join(f"{type(n).__name__} of {n.shape}" for n in nodes)
    if isinstance(first, LoRA):
        if any((n.geometry, n.embedding) != (first.geometry, first.embedding) for n in nodes):
            return f"the axes differ: {[n.geometry for n in nodes]}"
    elif base is None:
        return (
            f"is a {type(first).__name__}, whose update is the difference from the base: "
            "lora.combine(adapters, weights, base=params)"
        )
    return None


def _side_by_side(parts: list[tuple[LoRA, Any]]) -> LoRA:
    """[A₁ A₂ …] and [w₁s₁B₁; w₂s₂B₂; …]."""
    nodes = typed_alike([n for n, _ in parts])
    b = [_times(n.b, n.scale, w, n.geometry) for n, (_, w) in zip(nodes, parts)]
    a = jnp.concatenate([n.a for n in nodes], -1)
    b = jnp.concatenate(b, len(nodes[0].geometry.batch_axes))
    return dataclasses.replace(nodes[0], a=a, b=b, scale=1.0)


def typed_alike(nodes: list[LoRA]) -> list[LoRA]:
    """The nodes in the widest of their dtypes, with the dropout that all agree on, or none."""
    dtype = jnp.result_type(*(n.a.dtype for n in nodes))
    dropout = nodes[0].dropout if all(n.dropout == nodes[0].dropout for n in nodes) else 0.0
    cast = lambda n: {"a": n.a.astype(dtype), "b": n.b.astype(dtype)}
    return [dataclasses.replace(n, **cast(n), dropout=dropout) for n in nodes]


def _times(b, scale: float, weight: Any, geometry: Geometry):
    """scale · weight · B, the weight along the batch axes."""
    weight = jnp.asarray(weight, b.dtype) * scale
    return b * weight.reshape(weight.shape + (1,) * (b.ndim - weight.ndim))


def _moved(parts: list[tuple[Any, Any]], base) -> Any:
    """base + Σ w·(value − base), of leaves in full, or of all rows that any of the parts has."""
    first = parts[0][0]
    base = jnp.asarray(base)
    if isinstance(first, Full):
        start = base.astype(first.value.dtype)
        moves = [(n.value - start) * jnp.asarray(w, start.dtype) for n, w in parts]
        return Full(sum(moves, start))
    index = tuple(sorted({i for n, _ in parts for i in n.index}))
    rows = start = base[jnp.asarray(index)].astype(first.value.dtype)
    for node, w in parts:
        at = jnp.asarray([index.index(i) for i in node.index])
        rows = rows.at[at].add((node.value - start[at]) * jnp.asarray(w, start.dtype))
    return Rows(rows, index, first.length)


def _extracted(before, after, t, config, energy) -> tuple[LoRA, float]:
    """The node of one leaf, and the share of its change that is kept."""
    g = t.geometry
    dtype = wide(after.dtype)
    change = jnp.asarray(after).astype(dtype) - jnp.asarray(before).astype(dtype)
    order = (*g.batch_axes, *g.in_axes, *g.out_axes)
    u, s, v = jnp.linalg.svd(change.transpose(order).reshape(g.sizes(t.shape)), full_matrices=False)
    rank = t.rank if energy is None else rank_for(s, energy)
    shapes = g.factor_shapes(t.shape, rank)
    blank = (jax.ShapeDtypeStruct(shape, config.dtype) for shape in shapes)
    like = LoRA(*blank, 1.0, g, t.dropout, t.embedding)
    return from_svd(like, u, s, v, rank), round(float(share_kept(s, rank)), 6)
