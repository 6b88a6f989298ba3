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

from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.geometry import RANK
from lora_jax._core.mesh import beside
from lora_jax._core.numbers import integer
from lora_jax._core.paths import flatten, nest
from lora_jax._nodes.node import array_names, is_node
from lora_jax.algebra._stack import put

if TYPE_CHECKING:
    import chex


class PerSlotState(NamedTuple):
    """The state of `per_slot`.

    Attributes:
      inner: the optimiser's state, each array with an axis of slots in front; also the step counts,
        and what `optax.inject_hyperparams` keeps.
      scale: {path: (n, 3)}, alpha / rank of each tenant's leaf, a sum of three fp32 numbers: so
        `leave` gives back the very float. The first is what is computed with.
      rank: {path: (n,)}, its rank; 0 where it does not train the leaf, 1 of a leaf without ranks.
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
      Other arguments go to `tx`, the same for all slots.

    Raises:
      LoRAError: `active` has another length or is not boolean; gradients, params or state of
        another stack.

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

    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> PerSlotState:
        nodes, count = flatten(params, is_leaf=is_node), _slots(params)
        return PerSlotState(
            jax.vmap(inner.init)(params),
            {p: jnp.tile(_in_three(1.0), (count, 1)) for p in nodes},
            {p: jnp.full(count, _rank(node), jnp.int32) for p, node in nodes.items()},
        )

    def update(
        updates: Any, state: Any, params: Any = None, *, active: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        trained = _active(active, _checked(updates, state))
        if params is not None:
            _checked(params, state)
        grads = _alone(updates, state, lambda b, s: b * s, mask=True)
        params = params if params is None else _alone(params, state, lambda b, s: b / s)
        one = lambda g, own, p: inner.update(g, own, p, **extra)
        updates, new = jax.vmap(one)(grads, state.inner, params)
        updates = _alone(updates, state, lambda b, s: b * s, mask=True)
        updates = jax.tree.map(lambda u: _where(trained, u, jnp.zeros_like(u)), updates)
        new = jax.tree.map(lambda new, old: _where(trained, new, old), new, state.inner)
        return updates, state._replace(inner=new)

    return optax.GradientTransformationExtraArgs(init, update)


def join(
    tx: optax.GradientTransformation,
    stacked: Any,
    state: PerSlotState,
    slot: int,
    adapters: Any,
    own: Any = None,
) -> tuple[Any, PerSlotState]:
    """The stack and the state with a tenant in a slot; whoever was there is gone.

    Args:
      tx: the optimiser of one adapter, as `per_slot` got it.
      stacked: as from `lora.algebra.stack`.
      state: of `per_slot(tx)`.
      slot: from 0 to capacity − 1; also a traced one, which is not checked: one that there is not
        changes nothing.
      adapters: of leaves and ranks that the stack has room for; alpha and rank are the tenant's.
      own: the tenant's state, as from `tx.init(adapters)`, a run of its own, or `leave`; None: new.
        Both may lie on other devices than the stack does.

    Returns:
      (stacked, state), of the shapes that they had: a compiled step goes on.

    Raises:
      LoRAError: a slot that there is not, other targets, a rank above that of the stack, a state
        that is not the adapters', a stack and a `state` that are not of each other or not of `tx`;
        nothing is changed.

    >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
    >>> node = lora.LoRA(jnp.ones((2, 1)), jnp.ones((1, 2)), 4.0, lora.Geometry((0,), (1,)))
    >>> stacked = lora.algebra.stack([{"w": node}], capacity=8, rank=2)
    >>> tx = optax.adam(1e-3)
    >>> state = lora.optim.per_slot(tx).init(stacked)
    >>> stacked, state = lora.optim.join(tx, stacked, state, 5, {"w": node})
    >>> float(state.scale["w"][5, 0]), int(state.rank["w"][5])
    (4.0, 1)
    """
    capacity = _checked(stacked, state, tx) - 1
    if adapters is None:
        raise LoRAError(
            "expected adapters, found None; to empty a slot: lora.algebra.put(stacked, slot, None)"
        )
    nodes = flatten(adapters, is_leaf=is_node)
    still = [p for p, node in nodes.items() if getattr(node, "scale", 1.0) == 0]
    raise_all(
        "adapters of scale 0 cannot be trained:",
        still,
        "lora.LoRAConfig(alpha=...) of another alpha",
    )
    new = put(stacked, slot, adapters)  # refuses what does not fit
    expected = jax.eval_shape(tx.init, adapters)
    own = tx.init(adapters) if own is None else own
    _check_state(own, expected)
    own = beside(own, stacked)
    # The state of an empty slot, in which the tenant's own numbers take their places.
    empty = tx.init(_own(new, slot))
    given = {_key(k): x for k, x in jax.tree_util.tree_leaves_with_path(own)}
    inner = jax.tree_util.tree_map_with_path(
        lambda k, like: _padded(given[_key(k)], like) if _key(k) in given else like, empty
    )
    # Where `put` writes nothing, neither does this: JAX would count a negative slot from the end.
    place = jnp.where((slot >= 0) & (slot < capacity), slot, capacity + 1)
    at = lambda all_, x: all_.at[place].set(x, mode="drop")
    scale = {
        p: at(x, _in_three(getattr(nodes.get(p), "scale", 1.0))) for p, x in state.scale.items()
    }
    rank = {p: at(x, _rank(nodes.get(p))) for p, x in state.rank.items()}
    return new, PerSlotState(jax.tree.map(at, state.inner, inner), scale, rank)


def leave(
    tx: optax.GradientTransformation, stacked: Any, state: PerSlotState, slot: int
) -> tuple[Any, Any]:
    """The adapters and the optimiser's state of a slot, as a run alone would have them.

    The slot stays as it is: `join` puts another tenant there, and
    `lora.algebra.put(stacked, slot, None)` empties it.

    Args:
      tx: the optimiser of one adapter, as `per_slot` got it.
      stacked: as from `lora.algebra.stack`.
      state: of `per_slot(tx)`; its ranks are read, so not under jit.
      slot: from 0 to capacity − 1.

    Returns:
      (adapters, own): with the tenant's rank and scale, without leaves that it does not train; B to
      one rounding, as it is divided by the scale.

    Raises:
      LoRAError: a slot that there is not; a stack and a `state` that are not of each other or not
        of `tx`; under jit.

    >>> import jax.numpy as jnp, optax, lora_jax as lora
    >>> node = lora.LoRA(jnp.ones((2, 1)), jnp.ones((1, 2)), 4.0, lora.Geometry((0,), (1,)))
    >>> stacked = lora.algebra.stack([{"w": node}], capacity=8, rank=2)
    >>> tx = optax.adam(1e-3)
    >>> state = lora.optim.per_slot(tx).init(stacked)
    >>> stacked, state = lora.optim.join(tx, stacked, state, 5, {"w": node})
    >>> adapters, own = lora.optim.leave(tx, stacked, state, 5)
    >>> adapters["w"].b, adapters["w"].scale
    (Array([[1., 1.]], dtype=float32), 4.0)
    """
    capacity = _checked(stacked, state, tx) - 1
    if any(isinstance(x, jax.core.Tracer) for x in (slot, *state.rank.values())):
        raise LoRAError(
            "the ranks of the tenants are read, and under jax.jit they have no values: "
            "lora.optim.leave(tx, stacked, state, slot) outside of it"
        )
    if integer(slot) not in range(capacity):
        raise LoRAError(
            f"slot {slot}: expected 0 to {capacity - 1}: lora.optim.leave(tx, stacked, state, 0)"
        )
    found = {}
    for path, node in flatten(_own(stacked, slot), is_leaf=is_node).items():
        rank, scale = int(state.rank[path][slot]), sum(map(float, state.scale[path][slot]))
        if rank:
            found[path] = _of_rank(node, rank, scale)
    adapters = nest(found)
    given = {_key(k): x for k, x in jax.tree_util.tree_leaves_with_path(state.inner)}
    own = jax.tree_util.tree_map_with_path(
        lambda k, like: given[_key(k)][slot][tuple(map(slice, like.shape))],
        jax.eval_shape(tx.init, adapters),
    )
    return adapters, own


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
      LoRAError: values and slots that are not of one (B,), or slots that are no integers.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> lora.optim.by_slot(jnp.array([1.0, 3.0, 5.0, 7.0]), jnp.array([2, 2, 0, -1]), 3)
    (Array([5., 0., 2.], dtype=float32), Array([ True, False,  True], dtype=bool))
    """
    values, slots = jnp.asarray(values), jnp.asarray(slots)
    whole = jnp.issubdtype(slots.dtype, jnp.integer)
    if values.ndim != 1 or values.shape != slots.shape or not whole:
        raise LoRAError(
            f"expected (B,) values and (B,) integers, found {values.dtype} of {values.shape} and "
            f"{slots.dtype} of {slots.shape}: lora.optim.by_slot(losses, slots, capacity)"
        )
    member = slots.astype(jnp.int32)[:, None] == jnp.arange(capacity)  # (B, capacity)
    count = member.sum(0)
    total = jnp.where(member, values[:, None], 0).sum(0)
    return total / jnp.maximum(count, 1).astype(total.dtype), count > 0


def _slots(stacked: Any) -> int:
    sizes = {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(stacked)}
    if len(sizes) != 1 or min(sizes) < 2:
        raise LoRAError(
            f"expected a stack, found arrays with {sorted(sizes)} slots: "
            "tx.init(lora.algebra.stack([...], capacity=8))"
        )
    return sizes.pop()


def _checked(stacked: Any, state: Any, tx: optax.GradientTransformation | None = None) -> int:
    """n, of a stack and a state that belong to each other, and to `tx` if it is given."""
    count = _slots(stacked)
    call = "state = lora.optim.per_slot(tx).init(stacked)"
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
    if tx is not None:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked)
        want, has = jax.tree.structure(jax.eval_shape(tx.init, like)), state.inner
        if want != jax.tree.structure(has):
            raise LoRAError(
                f"the state is not of this optimiser: expected {want}, found "
                f"{jax.tree.structure(has)}: lora.optim.join(tx, stacked, state, ...), tx as "
                "per_slot got it"
            )
    return count


def _active(active: Any, count: int) -> jax.Array:
    """(n,) booleans; the empty slot, the last, is never trained."""
    if active is None:
        return jnp.arange(count) < count - 1
    active = jnp.asarray(active)
    if active.shape != (count - 1,) or active.dtype != jnp.bool_:
        raise LoRAError(
            f"active: expected {count - 1} booleans, found {active.dtype} of shape {active.shape}: "
            "means, active = lora.optim.by_slot(losses, slots, capacity)"
        )
    return jnp.append(active, False)


def _where(trained: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    return jnp.where(trained.reshape(-1, *(1,) * (yes.ndim - 1)), yes, no)


def _alone(stacked: Any, state: PerSlotState, change: Any, mask: bool = False) -> Any:
    """A tree of the stack with B as the tenants alone have it; `mask` zeroes what is padding."""

    def leaf(path: str, node: Any) -> Any:
        scale, rank = state.scale[path][:, 0], state.rank[path]
        new = {}
        for name in array_names(node):
            x, dims = getattr(node, name), node.dims.get(name, ())
            along = lambda v, x=x: v.reshape(-1, *(1,) * (x.ndim - 1))
            if hasattr(node, "scale") and name == "b":
                x = change(x, along(scale).astype(x.dtype))
            if mask:
                # (n, ..., r, ...): column i of a slot is the tenant's where i < its rank.
                at = dims.index(RANK) + 1 if RANK in dims and hasattr(node, "rank") else None
                index = jnp.arange(x.shape[at]) if at else jnp.zeros(1, jnp.int32)
                shape = [1] * x.ndim
                shape[at or 0] = -1
                x = jnp.where(index.reshape(shape) < along(rank), x, jnp.zeros_like(x))
            new[name] = x
        return dataclasses.replace(node, **new)

    nodes = flatten(stacked, is_leaf=is_node)
    return nest({path: leaf(path, node) for path, node in nodes.items()})


def _own(stacked: Any, slot: int) -> Any:
    return jax.tree.map(lambda x: x[slot], stacked)


def _in_three(scale: float) -> np.ndarray:
    """A float as three of fp32 that add up to it: it has 53 bits, and each of them 24."""
    parts = []
    for _ in range(3):
        parts.append(np.float32(scale - sum(map(float, parts))))
    return np.stack(parts)


def _rank(node: Any) -> int:
    return 0 if node is None else getattr(node, "rank", 1)


def _of_rank(node: Any, rank: int, scale: float) -> Any:
    """A node of a slot as the tenant's own: of its rank, and with its scale out of B."""
    if not hasattr(node, "rank"):
        return node
    new = {}
    for name in array_names(node):
        x, dims = getattr(node, name), node.dims.get(name, ())
        if RANK in dims:
            x = jax.lax.slice_in_dim(x, 0, rank, axis=dims.index(RANK))
        new[name] = x / scale if name == "b" else x
    return dataclasses.replace(node, **new, scale=scale)


def _padded(x: Any, like: jax.Array) -> jax.Array:
    """A tenant's array in its place of the slot, whose rank may be larger."""
    return jnp.asarray(like).at[tuple(map(slice, jnp.shape(x)))].set(x)


def _key(keys: tuple) -> str:
    return jax.tree_util.keystr(keys)


def _check_state(own: Any, expected: Any) -> None:
    shapes = lambda tree: {
        _key(k): f"{jnp.result_type(x)} of {np.shape(x)}"
        for k, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    want, found = shapes(expected), shapes(own)
    raise_all(
        "the state is not that of these adapters:",
        [
            f"{k}: expected {want.get(k, 'nothing')}, found {found.get(k, 'nothing')}"
            for k in sorted(want.keys() | found.keys())
            if want.get(k) != found.get(k)
        ],
        "lora.optim.join(tx, stacked, state, slot, adapters, tx.init(adapters))",
    )
