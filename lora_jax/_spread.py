"""Quantised weights between devices: codes and constants are sent, never what they stand for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._codes import SECOND
from lora_jax._errors import LoRAError, raise_all
from lora_jax._formats import STORED
from lora_jax._nnx import map_state
from lora_jax._paths import map_with_path
from lora_jax._quantized import Quantized, is_quantized, lie, names


def gathered(params: Any, axes: str | Sequence[str]) -> Any:
    """Parameters whose quantised leaves are gathered over mesh axes in their codes (FSDP).

    Left to itself, the compiler reads what a device has of a weight, and gathers what was read, in
    16 or 32 bits. Here each device gathers codes and constants of the weight, one layer at a time,
    and reads them, in the forward pass and again in the backward one.

    Args:
      params: with quantised leaves, arrays or shapes, that lie on a mesh.
      axes: the axes over which both the batch and the weights are cut, such as "fsdp".

    Returns:
      The same arrays; the leaves know.

    Raises:
      LoRAError: no quantised leaf; leaves without a `NamedSharding`, or of a mesh without the axes.

    >>> import jax, lora_jax as lora
    >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    >>> where = NamedSharding(Mesh(jax.devices(), "fsdp"), P("fsdp"))
    >>> params = jax.device_put({"w": jax.numpy.ones((64, 64))}, {"w": where})
    >>> lora.gathered(lora.quantize(params, "w"), "fsdp")["w"].read_at.spec
    P(None, None)
    """
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    failures: list[str] = []
    found = []

    def leaf(path, q):
        if not is_quantized(q):
            return q
        where = getattr(q.codes, "sharding", None)
        found.append(path)
        if not isinstance(where, NamedSharding) or not set(axes) <= {*where.mesh.axis_names}:
            failures.append(f"'{path}' lies at {where}")
            return q
        entries = (where.spec[d] if d < len(where.spec) else None for d in range(q.codes.ndim))
        rest = [tuple(n for n in names(e) if n not in axes) or None for e in entries]
        return dataclasses.replace(q, read_at=NamedSharding(where.mesh, PartitionSpec(*rest)))

    result = map_state(lambda tree: map_with_path(leaf, tree), params)
    call = "lora.gathered(jax.device_put(params, shardings), 'fsdp')"
    raise_all(f"expected quantised leaves on a mesh with {', '.join(axes)}:", failures, call)
    if not found:
        raise LoRAError(f"no leaf is quantised: {call}, with params = lora.quantize(...)")
    return result


def sent(q: Quantized, eqn) -> Quantized | None:
    """The weight after an equation that only sends it: None if it must be read for that."""
    name, p = eqn.primitive.name, eqn.params
    if q.order is None:
        return None
    if name == "all_gather":
        return _gathered(q, p)
    sharding = p.get("sharding" if name == "sharding_constraint" else "dst_sharding")
    if name not in ("sharding_constraint", "reshard") or not isinstance(sharding, NamedSharding):
        return None
    return lie(q, sharding)


def _gathered(q: Quantized, p) -> Quantized | None:
    """Each array gathered along an axis of the weight, from devices with a part as of `cut`."""
    axis = q.order[p["all_gather_dimension"]]
    if not p["tiled"] or p["axis_index_groups"] is not None or not _splits(q, axis):
        return None
    in_axis = STORED[q.format].block is None and q.constants.shape[axis] < q.codes.shape[axis]

    def gather(x):
        alone = x.ndim <= axis or (in_axis and x is q.constants)
        return x if alone else lax.all_gather(x, p["axis_name"], axis=axis, tiled=True)

    return jax.tree.map(gather, q)


def cut(q: Quantized, spec: PartitionSpec, mesh: Any) -> Quantized | None:
    """The PartitionSpecs by which each device gets a part that is a quantised weight itself, if the
    weight is cut along `spec`; None where that would cut a block or a group."""
    if q.order is None:
        return None
    parts = dict(zip(q.order, (math.prod(mesh.shape[n] for n in names(e)) for e in spec)))
    fits = all(_splits(q, axis, n) for axis, n in parts.items() if n > 1)
    return q.specs(spec) if fits else None


def _splits(q: Quantized, axis: int, parts: int = 1) -> bool:
    """Whether an axis of the codes can be cut into so many parts, or parts be put together."""
    fmt = STORED[q.format]
    if fmt.block is None or axis < q.stack:
        return True
    per_row = math.ceil(q.stored[-1] / fmt.block)
    if q.second is not None:  # one row of constants after the other: whole groups of them
        rows = math.prod(q.stored[q.stack : -1])
        return axis == q.stack < q.codes.ndim - 1 and rows * per_row % (parts * SECOND) == 0
    blocks = per_row // (8 if fmt.parts == 16 else 1)
    return axis < q.codes.ndim - 1 or (q.pad == 0 and blocks % parts == 0)
