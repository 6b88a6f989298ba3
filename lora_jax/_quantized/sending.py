"""Quantised weights between devices: codes and constants are sent, never what they stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._core.geometry import names
from lora_jax._quantized.formats import SECOND, STORED
from lora_jax._quantized.weight import Quantized, is_quantized, lie


def sent(q: Quantized, eqn: Any) -> Quantized | None:
    """The weight after an equation that only sends it; None if it must be read for that."""
    name, p = eqn.primitive.name, eqn.params
    # After a reshape no axis of the weight is one of the codes.
    if not is_quantized(q) or q.order is None:
        return None
    if name == "all_gather":
        return _gathered(q, p)
    sharding = p.get("sharding" if name == "sharding_constraint" else "dst_sharding")
    if name not in ("sharding_constraint", "reshard") or not isinstance(sharding, NamedSharding):
        return None
    return lie(q, sharding)


def _gathered(q: Quantized, p: Mapping[str, Any]) -> Quantized | None:
    """Each array gathered along an axis of the weight, from devices with a part as of `cut`."""
    assert q.order is not None  # as `sent` has seen
    axis = q.order[p["all_gather_dimension"]]
    if STORED[q.format].tiles:  # one constant may be of the whole, or of each part
        return None
    if not p["tiled"] or p["axis_index_groups"] is not None or not _splits(q, axis):
        return None
    # Per channel the constants have size 1 along the in axes: each device has them all.
    in_axis = STORED[q.format].block is None and q.constants.shape[axis] < q.codes.shape[axis]

    def gather(x: jax.Array) -> jax.Array:
        # The mean of constants that are quantised twice has the axes of the stack alone.
        alone = x.ndim <= axis or (in_axis and x is q.constants)
        return x if alone else lax.all_gather(x, p["axis_name"], axis=axis, tiled=True)

    return jax.tree.map(gather, q)


def cut(q: Quantized, spec: PartitionSpec, mesh: Any) -> Quantized | None:
    """The PartitionSpecs by which each device gets a part that is a quantised weight itself, if the
    weight is cut along `spec`; None where that would cut a block or a group."""
    if not is_quantized(q) or q.order is None:
        return None
    parts = dict(zip(q.order, (math.prod(mesh.shape[n] for n in names(e)) for e in spec)))
    fits = all(_splits(q, axis, n) for axis, n in parts.items() if n > 1)
    return q.specs(spec) if fits else None


def _splits(q: Quantized, axis: int, parts: int = 1) -> bool:
    """Whether an axis of the codes can be cut into so many parts, or parts be put together."""
    fmt = STORED[q.format]
    if fmt.tiles:
        whole = axis < q.codes.ndim - 1 or q.pad == 0
        arrays = jax.tree.leaves((q.constants, q.second))
        return whole and all(x.shape[axis] == 1 or x.shape[axis] % parts == 0 for x in arrays)
    if fmt.block is None or axis < q.stack:
        return True
    per_row = math.ceil(q.stored[-1] / fmt.block)
    if q.double:
        # One row of constants after the other, in groups: only whole groups can be apart.
        rows = math.prod(q.stored[q.stack : -1])
        return axis == q.stack < q.codes.ndim - 1 and rows * per_row % (parts * SECOND) == 0
    # Q4_K has its constants in bytes that serve eight blocks each.
    blocks = per_row // (8 if fmt.parts == 16 else 1)
    # Other axes are cut between rows of blocks, the last one between blocks.
    return axis < q.codes.ndim - 1 or (q.pad == 0 and blocks % parts == 0)
