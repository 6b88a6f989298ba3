"""What the merging methods do to the elements of task vectors: trim, drop, elect signs, add up.

A task vector is one adapter's update, leaf by leaf. An array of it has three axes, (weights of the
stack, in, out), and is made when it is needed: one leaf at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax._core import compat
from lora_jax._core.einsum import product, wide
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.keys import path_key
from lora_jax._core.mesh import anywhere, placed
from lora_jax._core.nnx import state_of
from lora_jax._core.paths import flatten
from lora_jax._core.placement import near
from lora_jax._nodes.adapters import Full, LoRA, Rows
from lora_jax._nodes.node import is_node
from lora_jax.algebra._arguments import check_weights, several, weight_of
from lora_jax.algebra._combine import checked, differ
from lora_jax.algebra._finite import check_finite
from lora_jax.algebra._svd import leaf_sharding, matrices

# Bits of a magnitude that one pass over the leaves decides: fp32 takes two passes.
DIGIT = 16

# Elements that int32 counts, whatever their digits: all may be zeros.
COUNTED = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Method:
    """A merge of task vectors.

    Attributes:
      density: the share of elements that a vector keeps, the largest; 1: all.
      rate: the share that is dropped at random, the rest being divided by 1 − rate; 0: none.
      elect: the mean of what has the elected sign; otherwise the sum.
      per_weight: whether each weight is trimmed by itself, and not the vector as a whole.
    """

    density: float = 1.0
    rate: float = 0.0
    elect: bool = False
    per_weight: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """One leaf of one task vector: an adapter's node, or an array; its weight, a number or (n,);
    and the base where the update is the difference from it."""

    node: Any
    weight: jax.Array
    base: Any = None


# The parts of one leaf, one for each adapter; None where an adapter lacks the leaf.
Parts = tuple[Part | None, ...]


def parts_of(
    adapters: Sequence[Any],
    weights: Sequence[Any] | None,
    base: Any,
    call: str,
    exact: bool = False,
) -> dict[str, Parts]:
    """{path: its part of each task vector}, checked."""
    adapters, weights = several(adapters, weights, call)
    trees = [flatten(tree, is_leaf=is_node) for tree in adapters]
    raise_all(
        "these leaves are no adapters that can be merged:",
        dict.fromkeys(
            f"'{path}' is a {type(node).__name__}; expected a LoRA, Full or Rows"
            for tree in trees
            for path, node in tree.items()
            if type(node) not in (LoRA, Full, Rows)
        ),
        "as from lora.init(key, params, config)",
    )
    adapters = [*map(checked, adapters)]
    trees = [flatten(tree, is_leaf=is_node) for tree in adapters]
    check_weights(trees, weights, call)
    check_finite(*adapters, weights=weights, base=base)
    starts = {} if base is None else flatten(state_of(base))
    failures: list[str] = []
    out: dict[str, Parts] = {}
    for path in dict.fromkeys(p for tree in trees for p in tree):
        nodes = [tree[path] for tree in trees if path in tree]
        start, low_rank = starts.get(path), isinstance(nodes[0], LoRA)
        problem = differ(nodes, start)
        if problem is None and start is None and exact:
            problem = f"the base has no such leaf of {nodes[0].shape}"
        if problem is None and start is not None and tuple(start.shape) != nodes[0].shape:
            problem = f"of {nodes[0].shape}, but the base has {tuple(start.shape)}"
        # The order and sign of complex elements, and what is drawn of them, are not defined.
        numbers = jax.tree.leaves((nodes, start))
        if problem is None and any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in numbers):
            problem = "is complex; its sum is lora.algebra.combine(adapters, weights)"
        if problem is not None:
            failures.append(f"'{path}': {problem}")
            continue
        # Without `exact` a low-rank leaf stays low-rank, and its update needs no base.
        start = None if low_rank and not exact else start
        out[path] = tuple(
            Part(tree[path], _spread(path, tree[path], w), start) if path in tree else None
            for tree, w in zip(trees, weights)
        )
    raise_all("these adapters cannot be merged:", failures, "they must be of one base")
    return out


def _spread(path: str, node: Any, weight: Any) -> jax.Array:
    """What a leaf's update is multiplied by, a number for each of the stacked weights: (n,)."""
    axes = node.geometry.batch_axes if isinstance(node, LoRA) else ()
    shape = tuple(node.shape[d] for d in axes)
    weight = jnp.asarray(weight_of(weight, path, node), wide(jax.tree.leaves(node)[0].dtype))
    # (*first,) to (*first, 1, …) to (*batch,) to (n,).
    weight = weight.reshape(weight.shape + (1,) * (len(shape) - weight.ndim))
    return jnp.broadcast_to(weight, shape).reshape(-1)


def vector(part: Part) -> jax.Array:
    """weight · Δ in fp32 or wider: (n, in, out); (1, size, 1) of a leaf in full; (1, rows, d)."""
    part, node = near(part), near(part.node)
    if not isinstance(node, LoRA):
        return anywhere(_vector)(part)
    # Where both factors lie along one mesh axis they have no product: as the leaf's they do not.
    return _vector(dataclasses.replace(part, node=placed(node, leaf_sharding(node))))


@jax.jit
def _vector(part: Part) -> jax.Array:
    node, weight = part.node, part.weight.reshape(-1, 1, 1)
    if isinstance(node, LoRA):
        # scale·A (n, in, r) times B (n, r, out).
        node = product(*matrices(node))
    # An array is a task vector already (what `knots` has aligned): it is only weighted.
    elif not isinstance(node, jax.Array):
        index = slice(None) if isinstance(node, Full) else jnp.asarray(node.index)
        # Rounded as the adapter's own start was, so that what was not trained has moved by 0.
        start = jnp.asarray(part.base)[index].astype(node.value.dtype)
        dtype = wide(start.dtype)
        shape = (1, -1, 1) if isinstance(node, Full) else (1, *start.shape)
        node = (node.value.astype(dtype) - start.astype(dtype)).reshape(shape)
    return node * weight.astype(node.dtype)


def merged(
    leaves: Mapping[str, Parts], path: str, cuts: Mapping, key: jax.Array | None, method: Method
) -> jax.Array:
    """The merged update of one leaf; of rows, all that any of the adapters has, in order."""
    have = [(k, part) for k, part in enumerate(leaves[path]) if part is not None]
    vectors = [vector(part) for _, part in have]
    if key is not None:
        key = path_key(key, path)
    # By the path and then by the place among all adapters, so that a leaf that another adapter
    # lacks, or one more leaf, draws nothing anew.
    keys = [None if key is None else jax.random.fold_in(key, k) for k, _ in have]
    rows = tuple(getattr(part.node, "index", None) for _, part in have)
    at = [cuts[path][k] for k, _ in have]
    return _merged(vectors, at, keys, method.rate, elect=method.elect, rows=rows)


@functools.partial(jax.jit, static_argnames=("elect", "rows"))
def _merged(
    vectors: list[jax.Array],
    cuts: Sequence[jax.Array],
    keys: Sequence[jax.Array | None],
    rate: Any,
    *,
    elect: bool,
    rows: tuple,
) -> jax.Array:
    # Before the rows are joined: in rows that a vector lacks there is nothing to trim or drop.
    vectors = [_sparse(x, cut, key, rate) for x, cut, key in zip(vectors, cuts, keys)]
    if rows[0] is not None:
        union = sorted({i for index in rows for i in index})
        # (1, rows of any, d), each vector in its own rows.
        blank = jnp.zeros((1, len(union), vectors[0].shape[-1]), vectors[0].dtype)
        at = [jnp.asarray([union.index(i) for i in index]) for index in rows]
        vectors = [blank.at[:, i].set(x) for i, x in zip(at, vectors)]
    total: Any = sum(vectors)
    return _agreed(vectors) if elect else total


def _sparse(x: jax.Array, cut: jax.Array, key: jax.Array | None, rate: Any) -> jax.Array:
    # What is equal to the cut but for rounding is kept with it.
    rounding = 1 - 4 * jnp.finfo(x.dtype).eps
    x = jnp.where(jnp.abs(x) < cut.astype(x.dtype) * rounding, 0, x)
    # A cut of infinity or NaN says nothing of what is below it.
    x = jnp.where(jnp.isfinite(cut), x, jnp.nan)
    if key is None:
        return x
    left = 1 - jnp.asarray(rate, x.dtype)
    # 0·x and not 0, so that NaN stays NaN.
    kept = compat.lying_as(jax.random.bernoulli(key, left, x.shape), x)
    return jnp.where(kept, x / left, 0 * x)


def _agreed(vectors: Sequence[jax.Array]) -> jax.Array:
    """The mean of the elements that have the elected sign; zero has none, and is not counted."""
    total: Any = sum(vectors)
    # γ = sgn(Σ τₖ), then the mean over {k: sgn τₖ = γ} (arXiv:2306.01708, algorithm 1).
    size = sum(map(jnp.abs, vectors))
    # The sign of a sum that is no larger than the rounding of its terms is not known: none.
    rounding = 4 * jnp.finfo(total.dtype).eps
    sign = jnp.where(jnp.abs(total) <= rounding * size, 0, jnp.sign(total))
    agree = [x * sign > 0 for x in vectors]
    count = sum(a.astype(total.dtype) for a in agree)
    # Where none agrees the sum is 0, and so is the mean.
    mean = sum(jnp.where(a, x, 0) for a, x in zip(agree, vectors)) / jnp.maximum(count, 1)
    # A comparison with NaN is False, which would hide it.
    return jnp.where(jnp.isfinite(total), mean, jnp.nan)


def cuts(leaves: Mapping[str, Parts], method: Method) -> dict[str, list]:
    """{path: for each adapter the magnitude to trim at}: one for all leaves, or for each weight."""
    count = len(next(iter(leaves.values())))
    if method.density == 1:
        # No magnitude is below 0: nothing is trimmed.
        nothing = [jnp.zeros((1, 1, 1))] * count
        return dict.fromkeys(leaves, nothing)
    if method.per_weight:
        cut = lambda part: part and _cut([part], method.density, per_weight=True)
        return {path: [cut(part) for part in parts] for path, parts in leaves.items()}
    # The task vector is all leaves of one adapter: one magnitude for each adapter.
    each = ([p for x in leaves.values() if (p := x[k]) is not None] for k in range(count))
    found = [_cut(parts, method.density) for parts in each]
    return dict.fromkeys(leaves, found)


def _cut(parts: Sequence[Part], density: float, per_weight: bool = False) -> jax.Array:
    """The magnitude of the number-th largest element, exactly, from one array at a time: (1, 1, 1),
    or of each weight of a stack, (n, 1, 1).

    The bits of floats that are not negative are ordered as the floats are. So each pass counts the
    elements by the next digit of their bits, among those that have the digits found so far.
    """
    shapes = [jax.eval_shape(vector, part) for part in parts]
    dtype = jnp.result_type(*(s.dtype for s in shapes))
    weights = shapes[0].shape[0] if per_weight else 1
    size, bits = sum(s.size for s in shapes) // max(weights, 1), jnp.finfo(dtype).bits
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(parts))
    if traced and size > COUNTED:
        raise LoRAError(
            f"under jit, {size:,} elements of a task vector are more than can be counted: merge "
            "outside of jit, or trim each weight by itself, per_weight=True"
        )
    # int32 counts on the device; the host, with int64, counts to 2⁶³.
    xp = jnp if traced else np
    own = (lambda c: c) if per_weight else (lambda c: c.sum(0, keepdims=True))
    at = lambda table, digit: xp.take_along_axis(table, digit[:, None], 1)[:, 0]
    # `found` holds the leading digits of the element sought; `need` is its place, from the largest
    # on, among the elements that begin with them.
    need = xp.full((weights,), max(1, round(density * size)))
    found = xp.zeros((weights,), f"uint{bits}")
    for shift in np.arange(bits - DIGIT, -1, -DIGIT, dtype=np.int32):
        each = (_digits(vector(part).astype(dtype), found, shift) for part in parts)
        # (weights, 2¹⁶); summed over the leaves and their parts, one array at a time.
        counts: Any = sum(own(xp.asarray(c).astype(int).sum(1)) for c in each)
        # Elements with this digit or a larger one. It falls: the last digit with enough is the one.
        above = xp.cumsum(counts[:, ::-1], 1)[:, ::-1]
        digit = xp.sum(above >= need[:, None], 1) - 1
        # Those with a larger digit come before it.
        need = need - (at(above, digit) - at(counts, digit))
        found = (found << DIGIT) | digit.astype(found.dtype)
    return lax.bitcast_convert_type(jnp.asarray(found), dtype).reshape(-1, 1, 1)


@anywhere
@jax.jit
def _digits(x: jax.Array, found: jax.Array, shift: Any) -> jax.Array:
    """How many magnitudes of each weight begin with the bits `found` and have each digit next:
    (n, parts, 2¹⁶), of parts of the weight that int32 can count."""
    # Bits have no derivative: the cut is a constant of the merge.
    word = lax.bitcast_convert_type(jnp.abs(lax.stop_gradient(x)), found.dtype)
    word = word.reshape(len(x), math.prod(x.shape[1:])) >> shift.astype(word.dtype)
    digit = (word & (2**DIGIT - 1)).astype(jnp.int32)
    # In the first pass nothing is found yet: both sides are 0.
    match = ((word >> DIGIT) == found[:, None]).astype(jnp.int32)
    rows = jnp.arange(len(x))[:, None]
    parts = [slice(i, i + COUNTED) for i in range(0, max(1, digit.shape[1]), COUNTED)]
    none = jnp.zeros((len(x), 2**DIGIT), jnp.int32)
    return jnp.stack([none.at[rows, digit[:, p]].add(match[:, p]) for p in parts], 1)
