"""What the optimisers of two factors share."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax._core.einsum import product, wide, widened
from lora_jax._core.errors import LoRAError
from lora_jax._core.paths import map_with_path
from lora_jax._nodes.adapters import DoRA, LowRank
from lora_jax._nodes.node import is_node
from lora_jax.optim._labels import FROZEN, labels


def columns(node: LowRank) -> tuple[jax.Array, jax.Array]:
    """A (n, in, r) and Bᵀ (n, out, r) of the n weights of a stack, in fp32 or wider."""
    a, b = node.geometry.pair(widened(node.a), widened(node.b))
    return a, b.mT


def with_columns(
    like: LowRank, x: jax.Array | None = None, y: jax.Array | None = None, dtype: Any = None
) -> LowRank:
    """`like` with these A (n, in, r) and Bᵀ (n, out, r), in its shapes and dtypes, or `dtype`."""
    a = like.a if x is None else x.reshape(like.a.shape).astype(dtype or like.a.dtype)
    b = like.b if y is None else y.mT.reshape(like.b.shape).astype(dtype or like.b.dtype)
    return dataclasses.replace(like, a=a, b=b)


def gram(x: jax.Array) -> jax.Array:
    """xᵀ·x (n, r, r)."""
    return product(x.mT, x)


def power(gram: jax.Array, exponent: float, delta: Any = 0.0) -> jax.Array:
    """(gram + δI)^exponent, and 0 in directions that are lost beside the largest."""
    w, v = jnp.linalg.eigh(gram)
    # Rounding makes small eigenvalues negative.
    w = jnp.maximum(w, 0) + delta
    kept = w > w.shape[-1] * jnp.finfo(w.dtype).eps * w[..., -1:]
    # The pseudo-inverse; the inner `where` keeps 0 ** −1 from being computed.
    w = jnp.where(kept, jnp.where(kept, w, 1) ** exponent, 0)
    return product(v * w[..., None, :], v.mT)


def has_factors(x: Any) -> bool:
    """Whether x is a node with A and B, and not one that `optax.partition` keeps from us."""
    if not isinstance(x, LowRank):
        return False
    # optax.partition shows each transformation the whole tree, with MaskedNodes for others' leaves.
    hidden = [isinstance(part, optax.MaskedNode) for part in (x.a, x.b)]
    if any(hidden) and not all(hidden):
        raise LoRAError(
            "this transformation needs A and B together, and optax.partition gives them different "
            "labels: map 'a' and 'b' of lora.optim.labels(adapters) to one label"
        )
    if x.scale == 0:
        raise LoRAError(
            "an adapter of scale 0 has no gradient and no step: lora.LoRAConfig(alpha=16)"
        )
    return not any(hidden)


def on_factors(fn: Callable, tree: Any, *rest: Any, other: Callable = lambda x, *_: x) -> Any:
    """`fn` of the nodes with two factors, and `other` of all other leaves."""
    pick = lambda x, *more: (fn if has_factors(x) else other)(x, *more)
    return jax.tree.map(pick, tree, *rest, is_leaf=is_node)


def unzip(tree: Any, kind: type) -> list:
    """A tree of named tuples of this kind as a tree for each of their fields."""
    is_leaf = lambda x: isinstance(x, kind)
    take = lambda field: jax.tree.map(operator.attrgetter(field), tree, is_leaf=is_leaf)
    return [take(field) for field in kind._fields]


def required(params: Any, name: str) -> Any:
    if params is None:
        raise LoRAError(
            f"lora.{name} needs the adapters, not only their gradients: "
            "tx.update(grads, state, adapters)"
        )
    return params


def scaling(name: str, init: Callable, update: Callable) -> optax.GradientTransformationExtraArgs:
    """A transformation that knows alpha / rank: `update(updates, state, adapters, scales)` gets it
    of each node, in its place: the node's own, or what `per_slot` gives by path, whose nodes hold
    it in B."""

    def scaled(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        slot_scales: Mapping[str, Any] | None = None,
        **extra: Any,
    ):
        nodes, given = required(params, name), slot_scales or {}
        own = lambda path, x: given.get(path, getattr(x, "scale", None))
        return update(updates, state, nodes, map_with_path(own, nodes, is_leaf=is_node))

    return optax.GradientTransformationExtraArgs(init, scaled)


def stateless(leaf: Callable, name: str) -> optax.GradientTransformationExtraArgs:
    """`leaf(update, node, scale)` of each node that has factors."""

    def update(updates: optax.Updates, state: Any, nodes: Any, scales: Any):
        return on_factors(leaf, updates, nodes, scales), state

    return scaling(name, lambda params: optax.EmptyState(), update)


class Out(NamedTuple):
    """What a step gives for one leaf."""

    update: Any
    mu: Any
    basis: Any = None
    nu: Any = None
    escaped: Any = None


def partition(
    tx: optax.GradientTransformation, other: optax.GradientTransformation
) -> optax.GradientTransformation:
    """`tx` for factors, `other` for the adapters' other leaves, nothing for frozen ones."""
    # A magnitude is "other": it is no factor, and goes to the second optimiser.
    own = {"a", "b", "embedding_a", "embedding_b"}
    kind = lambda label: "factor" if label in own else label if label == FROZEN else "other"
    return optax.partition(
        {"factor": tx, "other": other, FROZEN: optax.set_to_zero()},
        lambda tree: jax.tree.map(kind, labels(tree)),
    )


def zeros_like(node: LowRank, size: int | None = None) -> LowRank:
    """Zeros like A and B, or (size, size) for each weight of the stack; nothing for a magnitude."""
    n = len(node.geometry.batch_axes)
    # As many axes as the factor has, so that a sharding along its batch axes fits.
    square = lambda x: (*x.shape[:n], size, *(1,) * (x.ndim - n - 2), size)
    shape = lambda x: x.shape if size is None else square(x)
    zeros: dict[str, Any] = {
        k: jnp.zeros(shape(x), wide(x.dtype)) for k, x in (("a", node.a), ("b", node.b))
    }
    if isinstance(node, DoRA):
        zeros["magnitude"] = optax.MaskedNode()
    return dataclasses.replace(node, **zeros)


def with_node(like: LowRank, a: jax.Array, b: jax.Array) -> LowRank:
    """`like` with these values in its shapes."""
    return dataclasses.replace(like, a=a.reshape(like.a.shape), b=b.reshape(like.b.shape))


def masked_like(x: Any, *_: Any) -> optax.MaskedNode:
    return optax.MaskedNode()
