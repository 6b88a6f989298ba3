"""Quantised leaves that are gathered in their codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.geometry import names
from lora_jax._core.nnx import map_state
from lora_jax._core.paths import map_with_path
from lora_jax._quantized.weight import is_quantized


def gathered(params: Any, axes: str | Sequence[str]) -> Any:
    """Parameters whose quantised leaves are gathered over mesh axes in their codes (FSDP).

    Left to itself, the compiler reads what a device has of a weight, and gathers what was read, in
    16 or 32 bits. Here each device gathers codes and constants of the weight, one layer at a time,
    and reads them, in the forward pass and again in the backward one.

    Args:
      params: with quantised leaves, arrays or shapes, that lie on a mesh.
      axes: the axes over which both the batch and the weights are cut, such as "fsdp".

    Returns:
      The same arrays, in leaves that know where they are read.

    Raises:
      LoRAError: no quantised leaf; leaves without a `NamedSharding`, or of a mesh without the axes.

    >>> import jax, lora_jax as lora
    >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    >>> where = NamedSharding(Mesh(jax.devices(), "fsdp"), P("fsdp"))
    >>> params = jax.device_put({"w": jax.numpy.ones((64, 64))}, {"w": where})
    >>> lora.quant.gathered(lora.quant.quantize(params, "w"), "fsdp")["w"].read_at.spec
    P(None, None)
    """
    call = "lora.quant.gathered(jax.device_put(params, shardings), 'fsdp')"
    axes = (axes,) if isinstance(axes, str) else axes
    if not isinstance(axes, Sequence) or not axes or not all(isinstance(n, str) for n in axes):
        raise LoRAError(f"axes={axes!r}: expected the names of mesh axes, {call}")
    failures: list[str] = []
    found = []

    def leaf(path: str, q: Any) -> Any:
        if not is_quantized(q):
            return q
        # Codes have the weight's axes, the last one halved or padded: its sharding is theirs.
        where = getattr(q.codes, "sharding", None)
        found.append(path)
        if not isinstance(where, NamedSharding) or not set(axes) <= {*where.mesh.axis_names}:
            failures.append(f"'{path}' lies at {where}")
            return q
        entries = (where.spec[d] if d < len(where.spec) else None for d in range(q.codes.ndim))
        # Other axes, such as those of tensor parallelism, stay cut.
        rest = [tuple(n for n in names(e) if n not in axes) or None for e in entries]
        return dataclasses.replace(q, read_at=NamedSharding(where.mesh, PartitionSpec(*rest)))

    result = map_state(lambda tree: map_with_path(leaf, tree), params)
    raise_all(f"expected quantised leaves on a mesh with {', '.join(axes)}:", failures, call)
    if not found:
        raise LoRAError(f"no leaf is quantised: {call}, with params = lora.quant.quantize(...)")
    return result
