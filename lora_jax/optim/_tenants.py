"""Tenants that come to a slot of a stack and go from it, with their optimiser's state."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.geometry import RANK
from lora_jax._core.mesh import on_devices_of
from lora_jax._core.numbers import integer
from lora_jax._core.paths import flatten, nest
from lora_jax._nodes.node import array_names, is_node
from lora_jax.algebra._stack import check_taken, choose, put
from lora_jax.optim._per_slot import PerSlotState, in_three, of_each_other, rank_of, state_shapes


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
        Both may lie on other devices than the stack does, and take its types.

    Returns:
      (stacked, state), of the shapes that they had: a compiled step goes on.

    Raises:
      LoRAError: a slot that there is not, other targets, a rank above that of the stack, a state
        that is not the adapters' or holds NaN, an optimiser whose state has another form at another
        rank (factored moments), a stack and a `state` that are not of each other or not of `tx`;
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
    capacity = of_each_other(stacked, state, tx) - 1
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
    expected = state_shapes(tx, adapters)
    own = tx.init(adapters) if own is None else own
    _check_state(own, expected)
    # Infinity may be the start of a running minimum.
    raise_all(
        "this state holds NaN:",
        [
            _key(k)
            for k, x in jax.tree_util.tree_leaves_with_path(own)
            if not isinstance(x, jax.core.Tracer) and jnp.isnan(jnp.asarray(x)).any()
        ],
        "lora.optim.join(tx, stacked, state, slot, adapters), with a new one",
    )
    own = on_devices_of(stacked, own)
    # The state of a slot of zeros, as `update` shows it what the tenant lacks, in which its own
    # numbers take their places.
    empty = tx.init(jax.tree.map(jnp.zeros_like, choose(new, slot)))
    given = {_key(k): x for k, x in jax.tree_util.tree_leaves_with_path(own)}
    fits = lambda a, b: len(a) == len(b) and all(m <= n for m, n in zip(a, b))
    raise_all(
        "the optimiser keeps another state at the tenant's rank than at the stack's:",
        [
            f"{_key(k)}: {np.shape(given[_key(k)])}, in the stack {like.shape}"
            for k, like in jax.tree_util.tree_leaves_with_path(empty)
            if _key(k) in given and not fits(np.shape(given[_key(k)]), like.shape)
        ],
        "optax.adafactor(..., factored=False), or the stack's rank: lora.algebra.resize(adapters, "
        "rank)",
    )
    inner = jax.tree_util.tree_map_with_path(
        lambda k, like: _padded(given[_key(k)], like) if _key(k) in given else like, empty
    )
    # Where `put` writes nothing, neither does this: JAX would count a negative slot from the end.
    place = jnp.where((slot >= 0) & (slot < capacity), slot, capacity + 1)
    at = lambda all_, x: jnp.asarray(all_).at[place].set(x, mode="drop")
    scale = {
        p: at(x, in_three(getattr(nodes.get(p), "scale", 1.0))) for p, x in state.scale.items()
    }
    rank = {p: at(x, rank_of(nodes.get(p))) for p, x in state.rank.items()}
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
      LoRAError: a slot that there is not, or that is empty; a stack and a `state` that are not of
        each other or not of `tx`; under jit.

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
    capacity = of_each_other(stacked, state, tx) - 1
    if any(isinstance(x, jax.core.Tracer) for x in (slot, *state.rank.values())):
        raise LoRAError(
            "the ranks of the tenants are read, and under jax.jit they have no values: "
            "lora.optim.leave(tx, stacked, state, slot) outside of it"
        )
    if integer(slot) not in range(capacity):
        raise LoRAError(
            f"slot {slot}: expected 0 to {capacity - 1}: lora.optim.leave(tx, stacked, state, 0)"
        )
    chosen, found = choose(stacked, slot), {}
    check_taken(chosen, slot, "lora.optim.join(tx, stacked, state, slot, adapters) before it")
    for path, node in flatten(chosen, is_leaf=is_node).items():
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
    like, x = jnp.asarray(like), jnp.asarray(x)
    # A key has no other type to take.
    x = x if x.dtype == like.dtype else x.astype(like.dtype)
    return like.at[tuple(map(slice, x.shape))].set(x)


def _key(keys: tuple) -> str:
    return jax.tree_util.keystr(keys)


def _check_state(own: Any, expected: Any) -> None:
    def shape(x: Any) -> str:
        try:
            return f"{jnp.result_type(x)} of {np.shape(x)}"
        except TypeError:
            return f"a {type(x).__name__}"

    shapes = lambda tree: {_key(k): shape(x) for k, x in jax.tree_util.tree_leaves_with_path(tree)}
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
