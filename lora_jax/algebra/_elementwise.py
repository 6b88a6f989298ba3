"""What the merging methods do to the elements of task vectors: trim, drop, elect signs, add up.

A task vector is one adapter's update, leaf by leaf. An array of it is (weights of the stack, in,
out), or (1, *shape) of a leaf in full, and is made when it is needed: one leaf at a time.
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
from lora_jax._core.errors import LoRAError
from lora_jax._core.keys import path_key
from lora_jax._core.mesh import anywhere, placed
from lora_jax._nodes.adapters import Full, LoRA, Rows, rows_of
from lora_jax.algebra._arguments import Part, Parts
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


def spread(part: Part) -> jax.Array:
    """What a leaf's update is multiplied by, a number for each of the stacked weights: (n,)."""
    node, weight = part.node, jnp.asarray(part.weight)
    axes = node.geometry.batch_axes if isinstance(node, LoRA) else ()
    shape = tuple(node.shape[d] for d in axes)
    weight = weight.astype(wide(jax.tree.leaves(node)[0].dtype))
    # (*first,) to (*first, 1, …) to (*batch,) to (n,).
    weight = weight.reshape(weight.shape + (1,) * (len(shape) - weight.ndim))
    return jnp.broadcast_to(weight, shape).reshape(-1)


def vector(part: Part) -> jax.Array:
    """weight · Δ in fp32 or wider: (n, in, out); (1, *shape) of a leaf in full; (1, rows, d)."""
    node = part.node
    # Where both factors lie along one mesh axis they have no product: as the leaf's they do not.
    own = placed(node, leaf_sharding(node)) if isinstance(node, LoRA) else node
    return _vector(dataclasses.replace(part, node=own))


@jax.jit
def _vector(part: Part) -> jax.Array:
    node = part.node
    # An array is a task vector already (what `knots` has aligned): it is only weighted.
    weight = part.weight if isinstance(node, jax.Array) else spread(part)
    if isinstance(node, LoRA):
        # scale·A (n, in, r) times B (n, r, out).
        node = product(*matrices(node))
    elif not isinstance(node, jax.Array):
        start = jnp.asarray(part.base)
        start = start if isinstance(node, Full) else rows_of(start, jnp.asarray(node.index))
        # Rounded as the adapter's own start was, so that what was not trained has moved by 0.
        start = start.astype(node.value.dtype)
        dtype = wide(start.dtype)
        node = (node.value.astype(dtype) - start.astype(dtype))[None]
    return node * _along_first(weight.astype(node.dtype), node)


def _along_first(each: jax.Array, x: jax.Array) -> jax.Array:
    """Numbers, one for each entry of the first axis of x, or one for all, to meet it."""
    return each.reshape(-1, *(1,) * (x.ndim - 1))


def summed(parts: Sequence[Part]) -> jax.Array:
    """The sum of the task vectors of one leaf; of rows, all that any of the adapters has."""
    return _summed([vector(p) for p in parts], _indices(parts))


@functools.partial(jax.jit, static_argnums=1)
def _summed(vectors: list[jax.Array], rows: tuple) -> jax.Array:
    return functools.reduce(jnp.add, _joined(vectors, rows))


def _indices(parts: Sequence[Part]) -> tuple:
    return tuple(getattr(p.node, "index", None) for p in parts)


def _joined(vectors: list[jax.Array], rows: tuple) -> list[jax.Array]:
    """Task vectors of the same rows: (1, rows of any, d), each one's in their places."""
    if rows[0] is None:
        return vectors
    union, like = sorted({i for index in rows for i in index}), vectors[0]
    where = compat.explicit_sharding(like)
    blank = compat.lying_as(jnp.zeros((1, len(union), like.shape[-1]), like.dtype), like)
    at = [jnp.asarray([union.index(i) for i in index]) for index in rows]
    return [blank.at[:, i].set(x, out_sharding=where) for i, x in zip(at, vectors)]


def moved(parts: Parts, delta: jax.Array) -> Full | Rows:
    """base + Δ, in the dtype of the adapters; what was low-rank, in fp32 or wider."""
    have = [p for p in parts if p is not None]
    node, base = have[0].node, jnp.asarray(have[0].base)
    if isinstance(node, Rows):
        index = tuple(sorted({i for p in have for i in p.node.index}))
        start = rows_of(base, jnp.asarray(index)).astype(node.value.dtype)
        value = start.astype(delta.dtype) + delta.reshape(start.shape)
        return Rows(value.astype(start.dtype), index, node.length)
    dtype = node.value.dtype if isinstance(node, Full) else delta.dtype
    if isinstance(node, LoRA):
        # (n, in, out) to the leaf's own order of axes.
        delta = node.geometry.leaf(delta, node.shape)
    # As `vector` has it: from the base as the adapter's dtype rounds it.
    start = base.astype(dtype)
    value = start.astype(delta.dtype) + delta.reshape(start.shape)
    return Full(value.astype(dtype))


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
    rows = _indices([part for _, part in have])
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
    vectors = _joined(vectors, rows)
    total: Any = sum(vectors)
    return _agreed(vectors) if elect else total


def _sparse(x: jax.Array, cut: jax.Array, key: jax.Array | None, rate: Any) -> jax.Array:
    # What is equal to the cut but for rounding is kept with it.
    rounding, cut = 1 - 4 * jnp.finfo(x.dtype).eps, _along_first(cut, x)
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
        nothing = [jnp.zeros(1)] * count
        return dict.fromkeys(leaves, nothing)
    if method.per_weight:
        cut = lambda part: part and _cut([part], method.density, per_weight=True)
        return {path: [cut(part) for part in parts] for path, parts in leaves.items()}
    # The task vector is all leaves of one adapter: one magnitude for each adapter.
    each = ([p for x in leaves.values() if (p := x[k]) is not None] for k in range(count))
    found = [_cut(parts, method.density) for parts in each]
    return dict.fromkeys(leaves, found)


def _cut(parts: Sequence[Part], density: float, per_weight: bool = False) -> jax.Array:
    """The magnitude of the number-th largest element, exactly, from one array at a time: (1,), or
    of each weight of a stack, (n,).

    The bits of floats that are not negative are ordered as the floats are. So each pass counts the
    elements by the next digit of their bits, among those that have the digits found so far.
    """
    shapes = [jax.eval_shape(vector, part) for part in parts]
    dtype = jnp.result_type(*(s.dtype for s in shapes))
    weights = shapes[0].shape[0] if per_weight else 1
    size, bits = sum(s.size for s in shapes) // max(weights, 1), jnp.finfo(dtype).bits
    # Under jit also what is made of arrays that are known.
    some = jax.tree.leaves(parts)
    traced = compat.staging() or any(isinstance(x, jax.core.Tracer) for x in some)
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
    return lax.bitcast_convert_type(jnp.asarray(found), dtype)


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
