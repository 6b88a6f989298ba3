"""Weights of GGUF files, kept in their blocks."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core.errors import LoRAError
from lora_jax._quantized.weight import Quantized

# {type: (bytes of a block, of them constants, constants' type, bytes whose halves lie together)}
LAYOUT = {
    "Q4_0": (18, 2, np.float16, 16),
    "Q4_1": (20, 4, np.float16, 16),
    "Q8_0": (34, 2, np.float16, None),
    "Q4_K": (144, 16, np.uint8, 32),
}


def gguf_weight(
    tensors: Any, *, kernel: bool = False, order: Any = None, dtype: Any = jnp.float32
) -> Quantized | jax.Array:
    """A weight of a GGUF file as a leaf of the parameters; Q4_0, Q4_1, Q8_0 and Q4_K in their
    blocks, with the same bytes for constants and codes, the codes in the order of the weight.

    Args:
      tensors: a tensor of `gguf.GGUFReader(path).tensors`, or a list of them, one for each layer of
        a scanned model, which are stacked.
      kernel: make a kernel (in, out) of what lies there as (out, in), as torch has it. The codes
        stay where they are: the transpose waits until the weight is read.
      order: indices of output units, where the model has them in another order, as rotary
        embeddings may want of q and k.
      dtype: of the weight that is read.

    Returns:
      A `Quantized` (*stack, out, in) or, as a kernel, (*stack, in, out), for `bind`; of any other
      type an array, dequantised by the gguf package.

    Raises:
      LoRAError: tensors of several types or shapes; a kernel of less than two axes.

    >>> import gguf, jax.numpy as jnp, lora_jax as lora, numpy as np
    >>> from types import SimpleNamespace
    >>> rows = gguf.quants.quantize(np.eye(64, dtype="float32"), gguf.GGMLQuantizationType.Q8_0)
    >>> tensor = SimpleNamespace(data=rows, tensor_type=gguf.GGMLQuantizationType.Q8_0)
    >>> lora.quant.gguf_weight(tensor, kernel=True)  # a tensor of a file looks like this
    Quantized((64, 64), float32, 'q8_0', 8.5 bits)
    """
    several = not hasattr(tensors, "tensor_type")  # which is a tuple as well
    each = list(tensors) if several else [tensors]
    kinds = sorted({t.tensor_type.name for t in each})
    shapes = sorted({tuple(t.data.shape) for t in each})
    if len(kinds) != 1 or len(shapes) != 1:
        raise LoRAError(
            f"expected tensors of one type and shape, found {', '.join(kinds) or 'none'} of bytes "
            f"{', '.join(map(str, shapes))}: read each by itself, for layers that are not scanned"
        )
    (kind,) = kinds
    if kind not in LAYOUT:
        data = [_dequantised(t) for t in each]
    else:
        data = [np.asarray(t.data).view(np.uint8) for t in each]
    data = np.stack(data) if several else data[0]
    if order is not None:
        data = data[..., np.asarray(order), :]
    if kernel and data.ndim < 2:
        raise LoRAError(f"expected a kernel of two axes or more, found {data.shape}: kernel=False")
    if kind not in LAYOUT:
        w = jnp.asarray(data).astype(dtype)
        return w.swapaxes(-1, -2) if kernel else w
    q = _blocks(kind, data, dtype)
    return q.transposed([*range(data.ndim - 2), data.ndim - 1, data.ndim - 2]) if kernel else q


def _blocks(kind: str, data: np.ndarray, dtype: Any) -> Quantized:
    """Of bytes (..., blocks · size)."""
    size, first, number, together = LAYOUT[kind]
    lead = data.shape[:-1]
    blocks = data.reshape(*lead, -1, size)
    constants = np.ascontiguousarray(blocks[..., :first]).view(number).reshape(*lead, -1)
    codes = np.ascontiguousarray(blocks[..., first:])
    if together is None:
        codes = codes.view(np.int8).reshape(*lead, -1)
    else:  # lower halves of bytes first, then the upper ones: two neighbours into a byte
        parts = codes.reshape(*lead, -1, together)
        flat = np.stack([parts & 15, parts >> 4], -2).reshape(*lead, -1)
        codes = (flat[..., ::2] << 4) | flat[..., 1::2]
    codes, constants = jnp.asarray(codes), jnp.asarray(constants)
    return Quantized(codes, constants, None, kind.lower(), np.dtype(dtype), stack=len(lead) - 1)


def _dequantised(tensor: Any) -> np.ndarray:
    quants = importlib.import_module("gguf.quants")
    try:
        return quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as e:
        raise LoRAError(f"'{getattr(tensor, 'name', '?')}': {e}") from None
