"""One slot of a stack as arrays of NumPy, read where it lies."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from lora_jax._core.errors import LoRAError
from lora_jax._core.numbers import integer
from lora_jax.algebra._stack import check_taken, choose, slot_count

CALL = "lora.peft.save(folder, stacked, mapping, slot=0)"


def on_host(stacked: Any, slot: Any) -> Any:
    """`choose(stacked, slot)` without an array on any device: of each part one shard is read, and
    of it this slot.

    Raises:
      LoRAError: no stack, a number that has no slot, an empty slot.
    """
    capacity, number = slot_count(stacked, CALL) - 1, integer(slot)
    if number is None or number not in range(capacity):
        raise LoRAError(f"slot={slot!r}: expected 0 to {capacity - 1}: {CALL}")
    leaves = jax.tree.leaves(stacked)
    if all(isinstance(x, jax.Array) and x.is_fully_addressable for x in leaves):
        # A CPU's arrays are looked at in place; of other devices the slot alone is sent.
        in_place = all(d.platform == "cpu" for d in leaves[0].devices())
        found = jax.tree.map(functools.partial(_read, number, in_place), stacked)
    else:
        found = choose(stacked, number)
    check_taken(found, number, CALL)
    return found


def _read(number: int, in_place: bool, x: jax.Array) -> np.ndarray:
    parts = []  # (where it lies in the slot, numbers)
    for shard in x.addressable_shards:
        slots, *where = shard.index
        at = number - (slots.start or 0)
        if shard.replica_id == 0 and 0 <= at < shard.data.shape[0]:
            data = np.asarray(shard.data)[at] if in_place else np.asarray(_at(shard.data, at))
            parts.append((tuple(where), data))
    if len(parts) == 1:
        return parts[0][1]
    # As torch has it, whose matrices are turned: then nothing copies it again.
    shape = x.shape[1:]
    turn = lambda v: v[:-2] + v[-2:][::-1]
    out = np.empty(turn(shape), x.dtype).transpose(turn(tuple(range(len(shape)))))
    for where, data in parts:
        out[where] = data
    return out


@jax.jit
def _at(x: jax.Array, at: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, at, keepdims=False)
