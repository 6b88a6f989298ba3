"""Many adapters in one tree of fixed shapes: chosen by number, compiled once.

A stack is an adapter tree whose arrays have one more axis in front, as `jax.vmap` wants it. Its
last slot is always empty (the base model), so that the number -1 means no adapter.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._core import compat
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.mesh import laid, on_devices_of, placement
from lora_jax._core.nnx import state_of
from lora_jax._core.numbers import SIZE, check_numbers, holds, integer
from lora_jax._core.paths import flatten, map_with_path, nest
from lora_jax._core.placement import away, check_there, near
from lora_jax._nodes.adapters import LowRank, rows_of
from lora_jax._nodes.node import is_node
from lora_jax._nodes.tokens import ForTokens, remembering
from lora_jax.algebra._arguments import checked
from lora_jax.algebra._finite import check_finite

if TYPE_CHECKING:
    import chex


def stack(
    adapters: Sequence[Any],
    *,
    capacity: int | None = None,
    rank: int | None = None,
    base: Any = None,
) -> dict:
    """Several adapters as one tree. Ranks may differ (zeros fill up, which is exact), and targets.

    Args:
      adapters: adapter trees of one base.
      capacity: how many there may be, with room for those that `put` adds; None: these.
      rank: of every leaf; None: the largest that it has.
      base: the base parameters, for leaves that are trained in full, by rows or scaled (DoRA): an
        empty slot holds the base's values, or their norms.

    Returns:
      The tree of the adapters, each array with an axis of capacity + 1 in front; the scale is
      folded into B, so each scale is 1, and dropout is 0. Use it by `choose`.

    Raises:
      LoRAError: no adapters, more than the capacity, a rank above `rank`, adapters that do not fit
        each other, a leaf of another kind without `base`; all of them at once. NaN or infinity.

    One adapter for each example of a batch, the products with the base being done once for all:

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.eye(2)}
    >>> def node(x):
    ...     b = jnp.full((1, 2), x)
    ...     return {"w": lora.LoRA(jnp.ones((2, 1)), b, 1.0, lora.Geometry((0,), (1,)))}
    >>> stacked = lora.algebra.stack([node(1.0), node(10.0)])
    >>> fn = lora.adapt(lambda params, x: x @ params["w"])
    >>> one = lambda number, x: fn(lora.bind(params, lora.algebra.choose(stacked, number)), x)
    >>> jax.vmap(one)(jnp.array([1, 0, -1]), jnp.ones((3, 2)))
    Array([[21., 21.],
           [ 3.,  3.],
           [ 1.,  1.]], dtype=float32)
    """
    call = "lora.algebra.stack([first, second], capacity=64, rank=16)"
    if isinstance(adapters, Mapping) or not isinstance(adapters, Iterable):
        found = type(adapters).__name__
        raise LoRAError(f"expected a list of adapter trees, found a {found}: {call}")
    adapters = list(adapters)
    trees = [flatten(checked(tree), is_leaf=is_node) for tree in adapters]
    check_numbers(call, capacity=(capacity, SIZE.or_none), rank=(rank, SIZE.or_none))
    capacity = len(trees) if capacity is None else operator.index(capacity)
    if not trees or len(trees) > capacity:
        raise LoRAError(f"expected 1 to {capacity} adapters, found {len(trees)}: {call}")
    check_finite(*adapters)
    leaves = {} if base is None else flatten(state_of(base))
    failures: list[str] = []
    out = {}
    for path in dict.fromkeys(p for tree in trees for p in tree):
        nodes = [tree[path] for tree in trees if path in tree]
        try:
            like = _slot(nodes, rank, leaves.get(path))
            slots = [_fitted(tree.get(path), like) for tree in trees]
        except LoRAError as problem:
            failures.append(f"'{path}': {problem}")
            continue
        # At least one, the last: it stays empty.
        slots += [like] * (capacity + 1 - len(trees))
        # All slots have the same static fields (scale 1, dropout 0), so they are one pytree type.
        out[path] = jax.tree.map(_stacked, *slots)
    raise_all("these adapters cannot be stacked:", failures, "they must be of one base")
    check_finite(out)  # once more: with the scale in B
    return nest(out)


def choose(stacked: Any, index: int | chex.Array, mask: chex.Array | None = None) -> Any:
    """The adapters under a number, or, of an array of them, those of each token; -1 is none.

    Args:
      stacked: as from `stack`.
      index: an integer, under `jax.vmap` also one for each example: `bind` gives the stack itself
        to each product, as with an array. (Not where `choose` is in a `jax.jit` or `jax.checkpoint`
        of its own inside of the vmap: JAX traces its body before it maps it, and factors are
        gathered there; pass an array instead.) Or an array of integers, one for each position of
        the inputs of every adapted product, along the axes that its weight lacks: (B, T), as of
        packed sequences, or (B, 1), one for each example; no `vmap` is needed.
        What is jitted with it as an argument is not compiled anew for another choice. -1 is the
        base; every other number that has no slot, such as -2 or the capacity, gives NaN where it is
        traced.
      mask: booleans, for which tokens the adapters are active, as aLoRA's are from its invocation
        tokens on; elsewhere the model is the base. It has the shape that an array of numbers
        would have, (B, T), or (T,) for each example under `jax.vmap`. None: for all tokens.

    Returns:
      Adapters for `bind`; of an array, or with a mask, for nothing else.

    Raises:
      LoRAError: an index that is no integer, a number that has no slot and is not traced, a mask
        that is not boolean or not of the index's shape, no stack. When the model is called: numbers
        or a mask of another shape than the inputs', a leaf that is used otherwise than in products
        of matrices.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> def node(x):
    ...     b = jnp.full((1, 2), x)
    ...     return {"w": lora.LoRA(jnp.ones((2, 1)), b, 1.0, lora.Geometry((0,), (1,)))}
    >>> stacked = lora.algebra.stack([node(1.0), node(10.0)])
    >>> lora.algebra.choose(stacked, 1)["w"].b
    Array([[10., 10.]], dtype=float32)

    >>> params, fn = {"w": jnp.eye(2)}, lora.adapt(lambda p, x: x @ p["w"])
    >>> packed = lora.algebra.choose(stacked, jnp.array([[1, 0, -1]]))
    >>> fn(lora.bind(params, packed), jnp.ones((1, 3, 2)))
    Array([[[21., 21.],
            [ 3.,  3.],
            [ 1.,  1.]]], dtype=float32)

    >>> some = lora.algebra.choose(stacked, 1, jnp.array([False, True]))
    >>> fn(lora.bind(params, some), jnp.ones((2, 2)))
    Array([[ 1.,  1.],
           [21., 21.]], dtype=float32)
    """
    count, index = slot_count(stacked, "choose(stacked, 0)"), _numbers(index)
    _check_slots(index, count - 1)
    stacked, index = near(stacked), jnp.asarray(index)
    if mask is None:
        if index.ndim == 0:
            return _chosen(stacked, index, count)
        slots = _slots(index, count)
    else:
        mask = _mask(mask, index)
        if index.ndim == 0:  # for some tokens one of them: a stack of one
            stacked, index, count = _taken(stacked, index[None]), jnp.zeros((), jnp.int32), 2
        slots = jnp.where(mask, _slots(index, count), -1)
    return jax.tree.map(lambda node: ForTokens(node, slots), stacked, is_leaf=is_node)


def slot_count(stacked: Any, call: str) -> int:
    """How many slots a stack has, with the empty one; `call` is one that would do."""
    nodes = flatten(stacked, is_leaf=is_node)
    # The axes of what is trained in full are those that its array has: nothing tells it.
    slots = lambda x: x.more_axes == 1 if hasattr(x, "geometry") else not isinstance(x, ForTokens)
    wrong = [
        f"'{path}' is a {type(x).__name__}" + " that has no slots" * is_node(x)
        for path, x in nodes.items()
        if not is_node(x) or not slots(x)
    ]
    call = f"stacked = lora.algebra.stack([...], capacity=8), then {call}"
    sizes = {x.shape[0] for node in nodes.values() if not wrong for x in jax.tree.leaves(node)}
    if not wrong and (len(sizes) != 1 or min(sizes) < 2):
        wrong = [f"arrays with {sorted(sizes)} slots"]
    raise_all("expected a stack, found:", wrong, call)
    check_there(flatten(stacked))
    return sizes.pop()


def check_taken(adapters: Any, slot: int, call: str) -> None:
    """That a slot, as `choose` gives it, is not empty: not all of A and B are zero."""
    nodes = [x for x in flatten(adapters, is_leaf=is_node).values() if isinstance(x, LowRank)]
    if nodes and not any(x.any() for node in nodes for x in (node.a, node.b)):
        raise LoRAError(f"slot {slot} is empty: expected one that has adapters: {call}")


def _numbers(index: Any) -> chex.Array:
    """The numbers of slots as an array, of NumPy if they are no array of JAX's."""
    call = "lora.algebra.choose(stacked, 0)"
    try:
        found = index if isinstance(index, jax.Array) else np.asarray(index)
    except ValueError as problem:  # lists of several lengths
        raise LoRAError(f"expected integers as an index: {call}: {problem}") from None
    if not holds(found):
        raise LoRAError(f"expected integers as an index, found {found.dtype}: {call}")
    return found


def _check_slots(index: chex.Array, capacity: int) -> None:
    # Not what is spread over several processes either: it cannot be read here, and is NaN.
    if isinstance(index, jax.core.Tracer) or not getattr(index, "is_fully_addressable", True):
        return
    numbers = np.unique(np.asarray(index))
    wrong = numbers[(numbers < -1) | (numbers >= capacity)]
    if len(wrong):
        raise LoRAError(
            f"no slot has the number {', '.join(map(str, wrong[:8]))}: expected -1, the base, or 0 "
            f"to {capacity - 1}: lora.algebra.choose(stacked, jnp.where(known, slots, -1))"
        )


def _mask(mask: Any, index: jax.Array) -> jax.Array:
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    call = "lora.algebra.choose(stacked, index, mask > 0)"
    if mask.dtype != jnp.bool_:
        raise LoRAError(f"mask: expected booleans, found {mask.dtype}: {call}")
    try:
        np.broadcast_shapes(mask.shape, index.shape)
    except ValueError:
        raise LoRAError(
            f"mask: expected one of {index.shape}, as the index is, found {mask.shape}: {call}"
        ) from None
    return jnp.asarray(mask)


def _chosen(stacked: Any, index: jax.Array, count: int) -> Any:
    taken = _taken(stacked, index)
    if compat.mapped(index) == 1:
        return taken
    # One for each example: a product may read the stack itself, where that costs less.
    slot = _slots(index, count)
    return jax.tree.map(
        lambda node, whole: remembering(node, whole, slot), taken, stacked, is_leaf=is_node
    )


def _slots(index: chex.Array, count: int) -> jax.Array:
    """The places of slots among `count`, -1 of the empty one."""
    at = places(index, count)
    return jnp.where(at == count - 1, -1, at)


def _taken(stacked: Any, index: jax.Array) -> Any:
    """The slots of these numbers: one program for all leaves that lie on the same devices."""
    leaves, tree = jax.tree.flatten(stacked)
    together: dict[Any, list[int]] = {}
    for i, x in enumerate(leaves):
        known = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
        where = x.sharding if known else None
        place = where and (getattr(where, "mesh", None) or frozenset(where.device_set))
        together.setdefault(place, []).append(i)
    for group in together.values():
        for i, x in zip(group, _take([leaves[i] for i in group], index)):
            leaves[i] = x
    return jax.tree.unflatten(tree, leaves)


@functools.partial(jax.jit, inline=True)
def _take(leaves: list[jax.Array], index: jax.Array) -> list[jax.Array]:
    return [rows_of(x, places(index, len(x)), mode="fill") for x in leaves]


def places(index: chex.Array, count: int) -> jax.Array:
    """The place of a slot among `count`. The last one is empty, and is -1.

    A number without a slot goes past the end. There JAX reads NaN and writes nothing; it does not
    count from the other side, as it would with a negative place.
    """
    # A large unsigned number would wrap to a negative one, and -1 is the empty slot.
    if jnp.issubdtype(index.dtype, jnp.unsignedinteger):
        most = min(count, jnp.iinfo(index.dtype).max)
        index = jnp.minimum(index, jnp.asarray(most, index.dtype)).astype(jnp.int32)
    # int8 could not hold a count of 200.
    index = index.astype(jnp.int32) if index.dtype.itemsize < 4 else index
    exists = (index >= 0) & (index < count - 1)
    return jnp.where(index == -1, count - 1, jnp.where(exists, index, count))


def put(stacked: Any, index: int | chex.Array, adapters: Any | None) -> Any:
    """The stack with other adapters, or none, under a number: to add, replace or remove one.

    Args:
      stacked: as from `stack`; not changed. Under `jax.jit` it may be donated.
      index: an integer from 0 on; also a traced one, which is not checked: one that has no slot
        changes none. The shapes stay, so what takes the stack is not compiled anew. (A jitted
        function with `adapters` as an argument is traced for each scale, which is static; that of
        `stack([adapters])` is 1.)
      adapters: adapters whose leaves and ranks the stack has room for; None empties the slot.

    Raises:
      LoRAError: a leaf that the stack does not have, of another kind, shape or a larger rank; NaN
        or infinity.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> node = lora.LoRA(jnp.ones((2, 1)), jnp.ones((1, 2)), 1.0, lora.Geometry((0,), (1,)))
    >>> stacked = lora.algebra.put(lora.algebra.stack([{"w": node}], capacity=8), 3, {"w": node})
    >>> lora.algebra.choose(stacked, 3)["w"].b, lora.algebra.choose(stacked, 4)["w"].b
    (Array([[1., 1.]], dtype=float32), Array([[0., 0.]], dtype=float32))
    """
    capacity = slot_count(stacked, "put(stacked, 0, adapters)") - 1
    slots = flatten(stacked, is_leaf=is_node)
    adapters = {} if adapters is None else checked(adapters)
    check_there(flatten(adapters))
    # As `choose` needs them; what comes out lies where it lay.
    lay, stacked = stacked, near(stacked)
    adapters = on_devices_of(stacked, adapters)
    new = flatten(adapters, is_leaf=is_node)
    failures = [f"'{p}' is no leaf of the stack" for p in new if p not in slots]
    # What a slot looks like: the same kinds, ranks and dtypes.
    empty = choose(stacked, -1)
    filled = {}
    for path, like in flatten(empty, is_leaf=is_node).items():
        try:
            filled[path] = _fitted(new.get(path), like)
        except LoRAError as problem:
            failures.append(f"'{path}': {problem}")
    if not isinstance(index, jax.core.Tracer) and integer(index) not in range(capacity):
        failures.append(f"number {index}: expected 0 to {capacity - 1}")
    raise_all(
        "these adapters do not fit the stack:",
        failures,
        "make a new one: lora.algebra.stack([...], capacity=..., rank=...)",
    )
    check_finite(filled)  # as the slot has it: with the scale in B, and of its type
    # In the structure of the stack; a leaf that `adapters` lacks is an empty slot.
    one = map_with_path(lambda path, _: filled[path], empty, is_leaf=is_node)

    index = jnp.asarray(_numbers(index))

    def written(all_: jax.Array, new: jax.Array, lay: jax.Array) -> jax.Array:
        at = places(index, len(all_))
        # A traced -1 must not fill the empty slot: past the end, the write is dropped.
        at = jnp.where(at == capacity, len(all_), at)
        # Where the slots lie: as all of it, but for the slots' own axis, the first.
        where = placement(all_)
        own = where and NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
        spread = compat.explicit_sharding(all_)
        filled = jnp.asarray(all_).at[at].set(laid(new, own), mode="drop", out_sharding=spread)
        return away(filled, lay)

    return jax.tree.map(written, stacked, one, lay)


def _stacked(*slots: jax.Array) -> jax.Array:
    """The arrays with an axis in front, placed like the first one that is spread over devices."""
    where = next(filter(None, map(placement, slots)), None)
    return jnp.stack([laid(x, where) for x in slots])


def _slot(nodes: Sequence[Any], rank: int | None, base: Any) -> Any:
    """An empty slot for these nodes of one leaf."""
    first = nodes[0]
    if base is None and first.lost is not None:
        raise LoRAError(
            f"is a {type(first).__name__}, and an empty slot holds the base's values: "
            "lora.algebra.stack(adapters, base=params)"
        )
    return first.empty(nodes, rank, base)


def _fitted(node: Any, like: Any) -> Any:
    """A node as the slot has it; None is an empty slot."""
    if node is None:
        return like
    kinds = [
        any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in jax.tree.leaves(n))
        for n in (node, like)
    ]
    if kinds[0] and not kinds[1]:
        raise LoRAError("is complex, and the stack is not")
    if type(node) is not type(like) or node.shape != like.shape:
        raise LoRAError(
            f"expected a {type(like).__name__} of {like.shape}, found a {type(node).__name__} of "
            f"{node.shape}"
        )
    return node.fitted(like)
