"""Adapters as values: sums, scalings, other ranks, and adapters of a full fine-tuning.

Every adapter stands for its update Δ = scale · A·B, and these are functions of updates: exact, or
the best of a given rank. They work on the factors: the singular values of a product of (in, r) and
(r, out) are those of an r × r matrix, after a QR decomposition of each.

Shapes: A (*batch, *in, r) and B (*batch, r, *out) in a node; scale·A (n, in, r), B (n, r, out) and
Δ (n, in, out) as matrices, of the n weights that a leaf stacks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core import compat
from lora_jax._core.einsum import widened
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.mesh import anywhere, placed
from lora_jax._core.nnx import state_of
from lora_jax._core.paths import flatten, nest
from lora_jax._core.placement import near
from lora_jax._nodes.adapters import DoRA, Full, LoRA, Rows, rows_of
from lora_jax._nodes.factors import check_factors
from lora_jax._nodes.node import is_node
from lora_jax.algebra._arguments import check_rank, check_weights, several, weight_of
from lora_jax.algebra._finite import check_finite
from lora_jax.algebra._svd import from_svd, leaf_sharding, rank_for, svd


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
      all agree on it, and 0 elsewhere. Factors in 16 bits come back in fp32 where weight · scale
      · B would be rounded. It is not where weight · scale is 0 or ±1, or, in bf16, a power of two.

    Raises:
      LoRAError: no adapters, another number of weights, adapters that do not fit each other, a leaf
        trained in full without `base`; all of them at once. A `DoRA`, which adds no update. Values
        that are not finite, by name; under jit they are not known, and the result is NaN there.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> node = lora.LoRA(jnp.ones((2, 1)), jnp.ones((1, 2)), 1.0, lora.Geometry((0,), (1,)))
    >>> mixed = lora.algebra.combine([{"w": node}, {"w": node}], [0.5, -2.0])
    >>> lora.merge({"w": jnp.zeros((2, 2))}, mixed)["w"]
    Array([[-1.5, -1.5],
           [-1.5, -1.5]], dtype=float32)
    """
    call = "lora.algebra.combine([first, second], [0.5, 0.5])"
    adapters, weights = several(adapters, weights, call)
    trees = [flatten(linear(tree), is_leaf=is_node) for tree in adapters]
    check_weights(trees, weights, call)
    check_finite(*adapters, weights=weights, base=base)
    leaves = {} if base is None else flatten(state_of(base))
    failures: list[str] = []
    out = {}
    # The union of the targets, in the order of their first appearance.
    for path in dict.fromkeys(p for tree in trees for p in tree):
        # (node, weight) of the trees that have the leaf; in the others its update is zero.
        parts = [(tree[path], w) for tree, w in zip(trees, weights) if path in tree]
        problem = differ([node for node, _ in parts], leaves.get(path))
        if problem is not None:
            failures.append(f"'{path}': {problem}")
            continue
        parts = [(node, weight_of(w, path, node)) for node, w in parts]
        if isinstance(parts[0][0], LoRA):
            out[path] = _side_by_side(parts)
        else:
            # Full or Rows: `differ` has made sure that the base has the leaf.
            base = near(leaves[path])
            out[path] = placed(anywhere(_moved)(parts, base), compat.explicit_sharding(base))
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
    >>> lora.algebra.scaled({"w": node}, -1.0)["w"].b
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
      LoRAError: neither or both of rank and energy, or one out of range; a `DoRA`; values that are
        not finite.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> node = lora.LoRA(jnp.ones((4, 3)), jnp.ones((3, 2)), 2.0, lora.Geometry((0,), (1,)))
    >>> small = lora.algebra.resize({"w": node}, energy=0.99)["w"]  # all of it is in one direction
    >>> small.rank, bool(jnp.allclose(small.a @ small.b, 6.0))
    (1, True)
    """
    rank, energy = check_rank(rank, energy, "lora.algebra.resize(adapters, {})")
    # `linear` refuses DoRA, `check_finite` NaN: an SVD of it would not say which leaf had it.
    adapters = linear(adapters)
    check_finite(adapters)

    def leaf(node: Any) -> Any:
        if not isinstance(node, LoRA):
            return node
        u, s, v = svd(node)
        keep = rank if energy is None else rank_for(s, energy)
        assert keep is not None  # one of the two is given
        # The SVD does not keep a sharding: the factors go to where that of the leaf puts them.
        return placed(from_svd(node, u, s, v, keep), leaf_sharding(node))

    return jax.tree.map(leaf, adapters, is_leaf=is_node)


def linear(adapters: Any) -> Any:
    """The adapters, if each stands for an update that is added to the base."""
    adapters = checked(adapters)
    nodes = flatten(adapters, is_leaf=is_node)
    raise_all(
        "these are scaled by magnitudes, so what they add depends on the base:",
        (f"'{p}' is a DoRA" for p, n in nodes.items() if isinstance(n, DoRA)),
        "merge them, lora.merge(params, adapters), and take a low-rank update by "
        "lora.algebra.extract",
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
    flat = flatten(adapters, is_leaf=is_node)
    check_factors(flat)
    raise_all(
        "these factors do not fit each other:",
        (f"'{p}'{wrong}" for p, n in flat.items() if (wrong := _unfit(n))),
        "make them by lora.init(key, params, config)",
    )
    # NumPy's fp64, as JAX has it.
    as_jax = lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x
    return near(jax.tree.map(as_jax, adapters))


def _unfit(node: Any) -> str | None:
    if not node.of_arrays:
        return " holds what is no array"
    if node.more_axes:
        return " is a stack, or a part of one: lora.algebra.choose(stacked, 0) of it first"
    wrong = node.misfit(tuple(node.shape))
    return wrong and f": {wrong}"


def differ(nodes: list, base: Any) -> str | None:
    """What is wrong with combining these nodes of one leaf."""
    first = nodes[0]
    if any(type(n) is not type(first) or n.shape != first.shape for n in nodes):
        return "found " + ", ".join(f"{type(n).__name__} of {n.shape}" for n in nodes)
    if isinstance(first, LoRA):
        # Factors of one shape may still run along other axes of a square leaf.
        if any((n.geometry, n.embedding) != (first.geometry, first.embedding) for n in nodes):
            return f"the axes differ: {[n.geometry for n in nodes]}"
    elif base is None:
        return (
            f"is a {type(first).__name__}, whose update is the difference from the base: "
            "lora.algebra.combine(adapters, weights, base=params)"
        )
    return None


def _side_by_side(parts: list[tuple[LoRA, Any]]) -> LoRA:
    """[A₁ A₂ …] and [w₁s₁B₁; w₂s₂B₂; …], in fp32 where w·s·B is no number of a narrower type."""
    nodes = typed_alike([n for n, _ in parts])
    if not all(_keeps(n.b.dtype, n.scale, w) for n, (_, w) in zip(nodes, parts)):
        # All of them, not only those that would be rounded: one array has one dtype.
        nodes = [dataclasses.replace(n, a=widened(n.a), b=widened(n.b)) for n in nodes]
    b = [_times(n.b, n.scale, w) for n, (_, w) in zip(nodes, parts)]
    # Σ wₖsₖ·Aₖ·Bₖ as one product of block matrices: A grows along its last axis, B along the first
    # after its batch axes.
    a = jnp.concatenate([n.a for n in nodes], -1)
    b = jnp.concatenate(b, len(nodes[0].geometry.batch_axes))
    return dataclasses.replace(nodes[0], a=a, b=b, scale=1.0)


def typed_alike(nodes: list[LoRA]) -> list[LoRA]:
    """The nodes in the widest of their dtypes, with the dropout that all agree on, or none."""
    dtype = jnp.result_type(*(n.a.dtype for n in nodes))
    dropout = nodes[0].dropout if all(n.dropout == nodes[0].dropout for n in nodes) else 0.0
    cast = lambda n: {"a": n.a.astype(dtype), "b": n.b.astype(dtype)}
    return [dataclasses.replace(n, **cast(n), dropout=dropout) for n in nodes]


def _keeps(dtype: Any, scale: float, weight: Any) -> bool:
    """Whether scale · weight · B may stay in this type: always in fp32 or wider, and in 16 bits
    where no bit of B is lost. bf16 has the exponents of fp32, so there powers of two lose none."""
    # An array may be traced: in 16 bits nothing can be promised of its values.
    if jnp.finfo(dtype).bits > 16 or not isinstance(weight, int | float):
        return jnp.finfo(dtype).bits > 16
    factor = abs(scale * weight)
    if dtype == jnp.bfloat16 and 2.0**-32 < factor < 2.0**32:
        # A power of two has this mantissa. It moves the exponent alone, for which ±32 leaves room.
        return math.frexp(factor)[0] == 0.5
    return factor in (0.0, 1.0)


def _times(b: jax.Array, scale: float, weight: Any) -> jax.Array:
    """scale · weight · B, the weight along the batch axes."""
    if isinstance(weight, int | float):
        # Two Python numbers: the product is rounded in fp64, and then once to B's type.
        weight, scale = weight * scale, 1.0
    weight = jnp.asarray(weight, b.dtype) * scale
    # (*batch,) to (*batch, 1, …), beside B (*batch, r, *out).
    return b * weight.reshape(weight.shape + (1,) * (b.ndim - weight.ndim))


def _moved(parts: list[tuple[Any, Any]], base: Any) -> Any:
    """base + Σ w·(value − base), of leaves in full, or of all rows that any of the parts has, in
    fp32 or wider and rounded once."""
    first = parts[0][0]
    base, dtype = jnp.asarray(base), first.value.dtype
    index = None
    if isinstance(first, Rows):
        index = tuple(sorted({i for n, _ in parts for i in n.index}))
        base = rows_of(base, jnp.asarray(index))
    # In the adapters' dtype first, as they started from it: what was not trained has not moved.
    total = start = widened(base.astype(dtype))
    for node, w in parts:
        # The node's own rows among those of all; a leaf in full is taken whole.
        at = ... if index is None else jnp.asarray([index.index(i) for i in node.index])
        move = widened(node.value).astype(start.dtype) - start[at]
        total = total.at[at].add(move * jnp.asarray(w, start.dtype))
    total = total.astype(dtype)
    return Full(total) if index is None else Rows(total, index, first.length)
