"""Weights of GGUF files, kept in their blocks."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core import compat
from lora_jax._core.errors import LoRAError
from lora_jax._core.numbers import check_flags
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
      LoRAError: tensors of several types or shapes; a kernel of less than two axes; data whose type
        or length is not that of whole blocks, or whose shape is not the one that the file says;
        constants, or numbers, that are not finite.

    >>> import gguf, jax.numpy as jnp, lora_jax as lora, numpy as np
    >>> from types import SimpleNamespace
    >>> rows = gguf.quants.quantize(np.eye(64, dtype="float32"), gguf.GGMLQuantizationType.Q8_0)
    >>> tensor = SimpleNamespace(data=rows, tensor_type=gguf.GGMLQuantizationType.Q8_0)
    >>> lora.quant.gguf_weight(tensor, kernel=True)  # a tensor of a file looks like this
    Quantized((64, 64), float32, 'q8_0', 8.5 bits)
    """
    # By this, as a tensor of gguf's is a tuple as well.
    several = not hasattr(tensors, "tensor_type")
    if several and not isinstance(tensors, Iterable):
        raise LoRAError(
            f"expected a tensor of gguf.GGUFReader(path).tensors, or several, found "
            f"{type(tensors).__name__}: lora.quant.gguf_weight(reader.tensors[0])"
        )
    check_flags("lora.quant.gguf_weight(tensor, kernel=True)", kernel=kernel)
    each = list(tensors) if several else [tensors]
    if not compat.is_float_type(dtype):
        raise LoRAError(f"dtype={dtype!r}: expected a floating type, dtype=jnp.bfloat16")
    found = [_checked(t, i if several else None) for i, t in enumerate(each)]
    kinds = sorted({kind for kind, _ in found})
    shapes = sorted({data.shape for _, data in found})
    if len(kinds) != 1 or len(shapes) != 1:
        raise LoRAError(
            f"expected tensors of one type and shape, found {', '.join(kinds) or 'none'} of bytes "
            f"{', '.join(map(str, shapes))}: read each by itself, for layers that are not scanned"
        )
    (kind,) = kinds
    data = [x for _, x in found]
    data = np.stack(data) if several else data[0]
    if order is not None:
        # Rows are output units, (*stack, out, bytes): their blocks move with them.
        data = data[..., _order(order, data.shape[several:]), :]
    if kernel and data.ndim - several < 2:
        raise LoRAError(
            f"expected a kernel of two axes or more, found {data.shape[several:]}: kernel=False"
        )
    if kind not in LAYOUT:
        # `_checked` has dequantised what is not kept in blocks.
        w = jnp.asarray(data).astype(dtype)
        return w.swapaxes(-1, -2) if kernel else w
    q = _blocks(kind, data, dtype)
    return q.transposed([*range(data.ndim - 2), data.ndim - 1, data.ndim - 2]) if kernel else q


def _checked(tensor: Any, place: int | None) -> tuple[str, np.ndarray]:
    """(type, bytes in blocks, or values of a type that is not kept in blocks) of a tensor that
    holds what it says."""
    name = getattr(tensor, "name", None)
    what = f"'{name}'" if isinstance(name, str) else "the tensor"
    what += "" if place is None else f" (number {place} of the list)"
    kind, data = (getattr(tensor, part, None) for part in ("tensor_type", "data"))
    kind = str(getattr(kind, "name", None))
    sizes = importlib.import_module("gguf.constants").GGML_QUANT_SIZES
    sizes = {k.name: v for k, v in sizes.items()}
    if kind not in sizes or not isinstance(data, np.ndarray):
        raise LoRAError(
            f"{what}: expected a tensor_type of gguf's and data in a NumPy array, found {kind!r} "
            f"and {type(data).__name__}: lora.quant.gguf_weight(gguf.GGUFReader(path).tensors[0])"
        )
    # Elements and bytes of a block; F32 and F16 are blocks of one element.
    elements, size = sizes[kind]
    want = np.dtype({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8))
    unit = size // want.itemsize
    if data.dtype != want or not data.ndim or not data.size or data.shape[-1] % unit:
        raise LoRAError(
            f"{what}: expected {kind} as {want} in rows of whole blocks of {unit}, found "
            f"{data.dtype}{data.shape}"
        )
    shape = (*data.shape[:-1], data.shape[-1] // unit * elements)
    # In the order of the file, the innermost axis first.
    said = getattr(tensor, "shape", None)
    said = shape if said is None else tuple(np.atleast_1d(said).tolist())[::-1]
    if said != shape:
        raise LoRAError(f"{what}: its data are of shape {shape}, and it says that it is of {said}")
    data = np.ascontiguousarray(data)
    if kind in LAYOUT:
        constants = data.reshape(-1, size)[:, : LAYOUT[kind][1]]
        # Two numbers of fp16 at most; what follows in Q4_K are codes of 6 bits, always finite.
        numbers = np.ascontiguousarray(constants[:, :4]).view(np.float16)
        unit_of = "the constants of block"
    else:
        data = _dequantised(tensor, data, what)
        numbers, unit_of = data.reshape(-1, data.shape[-1]), "row"
    bad = ~np.isfinite(numbers).all(-1)
    if bad.any():
        at = int(np.argmax(bad))
        odd = next(x for x in numbers[at].tolist() if not math.isfinite(x))
        raise LoRAError(
            f"{what}: expected finite numbers, found {odd} in {unit_of} {at} of {bad.size}; the "
            "file is damaged, copy it again"
        )
    return kind, data


def _order(order: Any, shape: tuple[int, ...]) -> np.ndarray:
    index = np.asarray(order)
    n = shape[-2] if len(shape) > 1 else None
    if not jnp.issubdtype(index.dtype, np.integer) or sorted(index.ravel()) != list(range(n or 0)):
        raise LoRAError(
            f"order: expected each of the {n or 'no'} output units once, found "
            f"{index.dtype}{index.shape}: order=np.random.permutation({n or 0})"
        )
    return index.reshape(-1)


def _blocks(kind: str, data: np.ndarray, dtype: Any) -> Quantized:
    """A weight from bytes (..., blocks · size)."""
    size, first, number, together = LAYOUT[kind]
    lead = data.shape[:-1]
    blocks = data.reshape(*lead, -1, size)
    constants = np.ascontiguousarray(blocks[..., :first]).view(number).reshape(*lead, -1)
    codes = np.ascontiguousarray(blocks[..., first:])
    if together is None:
        # Q8_0: a byte a code.
        codes = codes.view(np.int8).reshape(*lead, -1)
    else:
        # In GGUF the lower halves of 16 or 32 bytes are the first numbers, and the upper halves
        # those after them. Here two neighbours share a byte, the first in the upper half.
        parts = codes.reshape(*lead, -1, together)
        flat = np.stack([parts & 15, parts >> 4], -2).reshape(*lead, -1)
        codes = (flat[..., ::2] << 4) | flat[..., 1::2]
    codes, constants = jnp.asarray(codes), jnp.asarray(constants)
    return Quantized(codes, constants, None, kind.lower(), np.dtype(dtype), stack=len(lead) - 1)


def _dequantised(tensor: Any, data: np.ndarray, what: str) -> np.ndarray:
    quants = importlib.import_module("gguf.quants")
    try:
        # What is not finite is refused by its place.
        with np.errstate(all="ignore"):
            return quants.dequantize(data, tensor.tensor_type)
    except NotImplementedError as e:
        raise LoRAError(f"{what}: {e}") from None
