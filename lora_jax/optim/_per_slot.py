"""Many tenants of one stack, each trained as it would be alone.

The arrays of a stack, and of an optimiser's state for it, have an axis of slots in front, n
= capacity + 1; the last slot is empty and never trained. `stack` folds a tenant's scale s = alpha /
rank into B. The optimiser sees what the tenant alone would show it: B / s, and s times the gradient
of s·B; its update of B is multiplied by s again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax._core.einsum import wide
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.geometry import RANK
from lora_jax._core.numbers import SIZE, check_numbers, holds
from lora_jax._core.paths import flatten, nest
from lora_jax._nodes.node import array_names, is_node
from lora_jax.algebra._stack import places, slot_count
from lora_jax.optim._settings import check_optimiser

if TYPE_CHECKING:
    import chex


class PerSlotState(NamedTuple):
    """The state of `per_slot`.

    Attributes:
      inner: the optimiser's state, each array with an axis of slots in front; also the step counts,
        and what `optax.inject_hyperparams` keeps.
      scale: {path: (n, 3)}, alpha / rank of each tenant's leaf, a sum of three fp32 numbers: so
        `leave` gives back the very float, and adapters of fp64 are trained with it.
      rank: {path: (n,)}, its rank; 0 where it does not train the leaf, 1 of a leaf without ranks.

    >>> import jax, jax.numpy as jnp, lora_jax as lora, optax
    >>> config = lora.LoRAConfig(rank=2, targets="w")
    >>> stacked = lora.algebra.stack(
    ...     [lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, config)], capacity=2
    ... )
    >>> tx = optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)
    >>> state = lora.optim.per_slot(tx).init(stacked)
    >>> rates = state.inner.hyperparams["learning_rate"]  # one for each slot, and the empty one
    >>> rates.shape, rates.at[1].set(3e-3).shape
    ((3,), (3,))
    """

    inner: Any
    scale: Mapping[str, jax.Array]
    rank: Mapping[str, jax.Array]


def per_slot(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimiser that trains each slot of a stack by itself, as it would be trained alone.

    Each slot has its own state, step count, schedule and clipping, and with
    `optax.inject_hyperparams` its own learning rate: `state.inner.hyperparams["learning_rate"]` has
    n = capacity + 1 of them. The padding of a smaller rank, leaves that a tenant does not train,
    and the empty slot get neither gradient nor update.

    Args:
      tx: what would train one adapter. One that mixes the elements of a leaf along the rank (a
        factored moment, the norm of a block) sees the zeros of the padding.

    Returns:
      An optimiser of a tree from `lora.algebra.stack`. Its `update` takes `active`, (capacity,)
      booleans: who has a batch in this step; None: all. Who has none keeps adapters and state.
      Other arguments go to `tx`, the same for all slots; and so does `slot_scales`, {path: alpha /
      rank} of the slot, as its B holds none where `tx` sees it.

    Raises:
      LoRAError: no optimiser; `active` has another length or is not boolean; gradients, params or
        state of another stack or optimiser.

    Tenants come and go by `join` and `leave`, and no step is compiled anew; `by_slot` makes the
    loss of a mixed batch. Those that the stack was made of, and that did not `join`, are trained at
    its rank and as if their scale were 1: `stack` has it in B.

    >>> import jax.numpy as jnp, optax, lora_jax as lora
    >>> node = lora.LoRA(jnp.ones((2, 1)), jnp.ones((1, 2)), 1.0, lora.Geometry((0,), (1,)))
    >>> stacked = lora.algebra.stack([{"w": node}, {"w": node}])
    >>> tx = lora.optim.per_slot(optax.sgd(0.5))
    >>> active = jnp.array([True, False])
    >>> updates, state = tx.update(stacked, tx.init(stacked), stacked, active=active)
    >>> updates["w"].b
    Array([[[-0.5, -0.5]],
           [[ 0. ,  0. ]],
           [[ 0. ,  0. ]]], dtype=float32)
    """

    check_optimiser(tx, "lora.optim.per_slot(optax.adam(1e-4))")
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> PerSlotState:
        nodes, count = flatten(params, is_leaf=is_node), slot_count(params, "tx.init(stacked)")
        state_shapes(inner, _of_a_slot(params))
        return PerSlotState(
            jax.vmap(inner.init)(params),
            {p: jnp.tile(in_three(1.0), (count, 1)) for p in nodes},
            {p: jnp.full(count, rank_of(node), jnp.int32) for p, node in nodes.items()},
        )

    def update(
        updates: Any, state: Any, params: Any = None, *, active: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        trained = _active(active, of_each_other(updates, state, inner))
        grads = _alone(updates, state, lambda b, s: b * s)
        if params is not None:
            of_each_other(params, state, inner)
            params = _alone(params, state, lambda b, s: b / s)
        one = lambda g, own, p, s: inner.update(g, own, p, slot_scales=s, **extra)
        updates, new = jax.vmap(one)(grads, state.inner, params, _scales(updates, state))
        updates = _alone(updates, state, lambda b, s: b * s)
        updates = jax.tree.map(lambda u: _where(trained, u, jnp.zeros_like(u)), updates)
        new = jax.tree.map(lambda new, old: _where(trained, new, old), new, state.inner)
        return updates, state._replace(inner=new)

    return optax.GradientTransformationExtraArgs(init, update)


def by_slot(values: chex.Array, slots: chex.Array, capacity: int) -> tuple[chex.Array, chex.Array]:
    """The mean of each tenant's examples in a mixed batch, and who has any.

    The sum of the means is the loss: its gradient in a tenant's arrays is that of the tenant's mean
    alone, however many examples the others have.

    Args:
      values: (B,), such as losses.
      slots: (B,) integers, the slot of each example; −1, the base, belongs to nobody, nor does a
        number that has no slot.
      capacity: of the stack.

    Returns:
      (means, active): (capacity,) each; a mean is 0 where there is no example.

    Raises:
      LoRAError: values and slots that are not of one (B,), slots that are no integers, a capacity
        that is no number of slots.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> lora.optim.by_slot(jnp.array([1.0, 3.0, 5.0, 7.0]), jnp.array([2, 2, 0, -1]), 3)
    (Array([5., 0., 2.], dtype=float32), Array([ True, False,  True], dtype=bool))
    """
    call = "lora.optim.by_slot(losses, slots, capacity)"
    check_numbers(call, capacity=(capacity, SIZE))
    values, slots = (_array(x, f"(B,) values and (B,) integers: {call}") for x in (values, slots))
    fits = values.ndim == slots.ndim == 1 and holds(values, jnp.number) and holds(slots)
    if not fits or values.shape != slots.shape:
        raise LoRAError(
            f"expected (B,) values and (B,) integers, found {values.dtype} of {values.shape} and "
            f"{slots.dtype} of {slots.shape}: {call}"
        )
    if isinstance(slots, np.ndarray):  # of 64 bits JAX would keep 32: another number
        slots = np.where((slots >= -1) & (slots < capacity), slots.astype(np.int32), -2)
    values, at = jnp.asarray(values), places(jnp.asarray(slots), capacity + 1)
    member = at[:, None] == jnp.arange(capacity, dtype=at.dtype)  # (B, capacity)
    count = member.sum(0)
    total = jnp.where(member, values[:, None], 0).sum(0)
    return total / jnp.maximum(count, 1).astype(total.dtype), count > 0


def of_each_other(stacked: Any, state: Any, tx: Any) -> int:
    """n, of a stack and a state that belong to each other and to `tx`."""
    call = "state = lora.optim.per_slot(tx).init(stacked)"
    count = slot_count(stacked, call)
    if not isinstance(state, PerSlotState):
        raise LoRAError(f"expected a PerSlotState, found a {type(state).__name__}: {call}")
    found = {p: len(x) for p, x in state.rank.items()}
    raise_all(
        "the state is not that of this stack:",
        [
            f"'{p}': slots in the stack {n or 'none'}, in the state {found.get(p, 'none')}"
            for p, n in (
                dict.fromkeys(found) | dict.fromkeys(flatten(stacked, is_leaf=is_node), count)
            ).items()
            if n != found.get(p)
        ],
        call,
    )
    check_optimiser(tx, call)
    want, has = state_shapes(tx, _of_a_slot(stacked)), state.inner
    if jax.tree.structure(want) != jax.tree.structure(has):
        raise LoRAError(
            f"the state is not of this optimiser: expected {jax.tree.structure(want)}, found "
            f"{jax.tree.structure(has)}: {call}, tx as per_slot got it"
        )
    raise_all(
        "the state is not that of this stack:",
        [
            f"{jax.tree_util.keystr(keys)}: expected {(count, *x.shape)}, found {jnp.shape(y)}"
            for (keys, x), y in zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(has))
            if (count, *x.shape) != jnp.shape(y)
        ],
        call,
    )
    return count


def state_shapes(tx: Any, adapters: Any) -> Any:
    """The shapes of `tx.init(adapters)`."""
    try:
        return jax.eval_shape(tx.init, adapters)
    except (KeyError, TypeError, ValueError) as problem:
        raise LoRAError(
            f"the optimiser does not take these adapters: {problem}\nmasks and labels as functions "
            "fit any tenant: optax.masked(tx, lambda tree: jax.tree.map(..., tree))"
        ) from problem


def _of_a_slot(stacked: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked)


def _array(x: Any, expected: str) -> Any:
    try:
        return x if isinstance(x, jax.Array) else np.asarray(x)
    except ValueError as problem:  # lists of several lengths
        raise LoRAError(f"expected {expected}: {problem}") from None


def _active(active: Any, count: int) -> jax.Array:
    """(n,) booleans; the empty slot, the last, is never trained."""
    if active is None:
        return jnp.arange(count) < count - 1
    call = "means, active = lora.optim.by_slot(losses, slots, capacity)"
    active = _array(active, f"{count - 1} booleans: {call}")
    if active.shape != (count - 1,) or active.dtype != jnp.bool_:
        raise LoRAError(
            f"active: expected {count - 1} booleans, found {active.dtype} of shape {active.shape}: "
            f"{call}"
        )
    return jnp.append(jnp.asarray(active), False)


def _where(trained: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    return jnp.where(trained.reshape(-1, *(1,) * (yes.ndim - 1)), yes, no)


def _alone(stacked: Any, state: PerSlotState, change: Any) -> Any:
    """A tree of the stack with B as the tenants alone have it, and zeros where they have nothing:
    the base's values in a leaf that one lacks would decay, and count in a global norm."""
    scales = _scales(stacked, state)

    def leaf(path: str, node: Any) -> Any:
        rank = state.rank[path]
        new = {}
        for name in array_names(node):
            x, dims = getattr(node, name), node.dims.get(name, ())
            along = lambda v, x=x: v.reshape(-1, *(1,) * (x.ndim - 1))
            if path in scales and name == "b":
                x = change(x, along(scales[path]).astype(x.dtype))
            # (n, ..., r, ...): column i of a slot is the tenant's where i < its rank.
            at = dims.index(RANK) + 1 if RANK in dims and hasattr(node, "rank") else None
            index = jnp.arange(x.shape[at]) if at else jnp.zeros(1, jnp.int32)
            shape = [1] * x.ndim
            shape[at or 0] = -1
            new[name] = jnp.where(index.reshape(shape) < along(rank), x, jnp.zeros_like(x))
        return dataclasses.replace(node, **new)

    nodes = flatten(stacked, is_leaf=is_node)
    return nest({path: leaf(path, node) for path, node in nodes.items()})


def _scales(stacked: Any, state: PerSlotState) -> dict:
    """alpha / rank of each slot, (n,), of the leaves that have it."""
    return {
        path: jnp.sum(state.scale[path], -1, dtype=wide(node.b.dtype))
        for path, node in flatten(stacked, is_leaf=is_node).items()
        if hasattr(node, "scale")
    }


def in_three(scale: float) -> np.ndarray:
    """A float as three of fp32 that add up to it: it has 53 bits, and each of them 24."""
    parts = []
    for _ in range(3):
        parts.append(np.float32(scale - sum(map(float, parts))))
    return np.stack(parts)


def rank_of(node: Any) -> int:
    return 0 if node is None else getattr(node, "rank", 1)
