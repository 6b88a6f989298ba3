"""Weights that bitsandbytes stored in NF4, kept in their codes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.paths import nearest
from lora_jax._quantized.formats import NF4, SECOND, dynamic_map
from lora_jax._quantized.weight import Quantized

STATE = "quant_state.bitsandbytes__nf4"


BLOCK = 64


def bitsandbytes_weight(
    tensors: Mapping[str, Any], name: str | Sequence[str], *, kernel: bool = False
) -> Quantized:
    """A weight in bitsandbytes' NF4, with constants doubly quantised or not, as a leaf of the
    parameters: the same codes and constants.

    Args:
      tensors: what is in the file, such as `safetensors.numpy.load_file(path)`: besides `name`
        itself `name.absmax`, `name.quant_map`, `name.quant_state.bitsandbytes__nf4` and, where
        doubly quantised, `name.nested_absmax` and `name.nested_quant_map`.
      name: such as "model.layers.0.self_attn.q_proj.weight"; or several, one for each layer of a
        scanned model, which are stacked.
      kernel: make a kernel (in, out) of what lies there as (out, in): the transpose waits until the
        weight is read.

    Returns:
      A `Quantized` for `bind`, of the type that was quantised.

    Raises:
      LoRAError: missing tensors, FP4, blocks of other sizes than 64 and 256, rows that end within a
        block; layers that differ.

    >>> import json, lora_jax as lora, numpy as np
    >>> from lora_jax._quantized.formats import NF4
    >>> state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64]}
    >>> tensors = {
    ...     "w": np.zeros((64, 1), "uint8"),
    ...     "w.absmax": np.ones(2, "float32"),
    ...     "w.quant_map": np.array(NF4, "float32"),
    ...     "w.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), "uint8"),
    ... }
    >>> lora.quant.bitsandbytes_weight(tensors, "w", kernel=True)
    Quantized((64, 2), bfloat16, 'nf4', 4.5 bits)
    """
    if isinstance(name, str):
        q = _one(tensors, name)
    else:
        layers = [_one(tensors, n) for n in name]
        of = [(q.shape, str(q.dtype), q.second is None) for q in layers]
        raise_all(
            "layers of a stack must be alike:",
            (f"'{n}' is {o}, and '{name[0]}' {of[0]}" for n, o in zip(name, of) if o != of[0]),
            "read each by itself, for layers that are not scanned",
        )
        q = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
        q = dataclasses.replace(q, stack=1)
    n = q.ndim
    return q.transposed([*range(n - 2), n - 1, n - 2]) if kernel else q


def _one(tensors: Mapping[str, Any], name: str) -> Quantized:
    missing = [f"{name}{part}" for part in ("", ".absmax", ".quant_map", f".{STATE}")]
    missing = [part for part in missing if part not in tensors]
    if missing:
        near = nearest(missing[0], tensors, 3)
        raise LoRAError(
            f"expected a weight in NF4; there is no {', '.join(missing)}; nearest: "
            + ", ".join(near)
        )
    state = json.loads(np.asarray(tensors[f"{name}.{STATE}"]).tobytes())
    nested = "nested_offset" in state
    shape, dtype = tuple(state["shape"]), jnp.dtype(state["dtype"])
    raise_all(f"'{name}' cannot be kept in its codes:", _problems(tensors, name, state))
    codes = jnp.asarray(tensors[name]).reshape(*shape[:-1], shape[-1] // 2)
    constants = np.asarray(tensors[f"{name}.absmax"]).reshape(-1)
    if not nested:
        constants = jnp.asarray(constants).reshape(*shape[:-1], -1)
        return Quantized(codes, constants, None, "nf4", dtype)
    constants = np.pad(constants, (0, -constants.size % SECOND)).reshape(-1, SECOND)
    top = jnp.asarray(tensors[f"{name}.nested_absmax"]).reshape(-1)
    second = (top, jnp.asarray(state["nested_offset"], jnp.float32))
    return Quantized(codes, jnp.asarray(constants), second, "nf4", dtype)


def _problems(tensors: Mapping[str, Any], name: str, state: Mapping):
    if state["quant_type"] != "nf4" or not _same(tensors[f"{name}.quant_map"], NF4):
        yield f"its levels are those of {state['quant_type']}, and not NF4's"
    if state["blocksize"] != BLOCK or state["shape"][-1] % BLOCK:
        yield f"blocks of {state['blocksize']} in rows of {state['shape'][-1]}; expected {BLOCK}"
    if "nested_offset" not in state:
        return
    absent = [p for p in ("nested_absmax", "nested_quant_map") if f"{name}.{p}" not in tensors]
    if absent:
        yield f"there is no {' and no '.join(absent)}"
    elif not _same(tensors[f"{name}.nested_quant_map"], dynamic_map()):
        yield "its constants have other values of 8 bits than bitsandbytes' dynamic type"
    if state["nested_blocksize"] != SECOND:
        yield f"groups of {state['nested_blocksize']} constants; expected {SECOND}"


def _same(found: Any, want: Any) -> bool:
    """To a unit in the last place: torch's arithmetic has changed."""
    found, want = np.asarray(found, np.float32).reshape(-1), np.asarray(want, np.float32)
    return found.shape == want.shape and np.allclose(found, want, rtol=2e-7, atol=0)
