"""Parameters that qwix quantised, kept in their codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax._core.errors import LoRAError, quoted, raise_all
from lora_jax._core.nnx import map_state
from lora_jax._core.paths import map_with_path
from lora_jax._quantized.encode import pack
from lora_jax._quantized.weight import Quantized

FLOATS = ("float4_e2m1fn", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e4m3")
NAMED = {  # qtypes that are not types: the type of their codes
    "nf4": "uint4", "int2": "int4", "int3": "int4", "int5": "int8", "int6": "int8", "int7": "int8",
    "mxfp8": "float8_e4m3fn", "mxfp4": "float4_e2m1fn", "nvfp4": "float4_e2m1fn",
}  # fmt: skip
PACKED = {"int4": "qwix_int4", "float4_e2m1fn": "qwix_e2m1", "uint4": "qwix_nf4"}
SCALES = ("bfloat16", "float16", "float32")


def from_qwix(params: Any) -> Any:
    """Parameters with each `QArray` of qwix as a leaf that `bind` understands, so that adapters
    train on a model that qwix quantised. Values are those of `qwix.dequantize`, to the bit.

    The arrays are the same ones; only codes of four bits are laid two in a byte. All that a QArray
    may be is read: a scale for each channel, for tiles of any axes or for the whole, with zero
    points or without, codes of integers, floats of 4 and 8 bits, or NF4. Nothing of qwix's own is
    computed: activations stay as they are, and the function is the plain one.

    Args:
      params: a tree that holds QArrays, as `qwix.quantize_params` returns it, or one QArray.

    Returns:
      A tree like it, with a `Quantized` in the place of each QArray. They are only read:
      `lora.merge(..., requantize=True)` does not store them again.

    Raises:
      LoRAError: no QArray; QArrays whose arrays do not belong together, of types that are not read,
        or with a scale that is not finite. All are listed.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> from types import SimpleNamespace
    >>> codes, scale = jnp.ones((64, 32), "int8"), jnp.full((1, 32), 0.5)
    >>> qarray = SimpleNamespace(qvalue=codes, scale=scale, zero_point=None, qtype=jnp.int8)
    >>> lora.quant.from_qwix({"kernel": qarray})["kernel"]  # a QArray looks like this
    Quantized((64, 32), float32, 'qwix', 8.5 bits)
    """
    bad: list[str] = []
    found: list[str] = []

    def leaf(path: str, x: Any) -> Any:
        if _is_aux(x):  # what `quantize_params` puts around an array
            return map_with_path(
                lambda p, y: leaf(f"{path}/{p}".strip("/"), y), x.array, _is_qarray
            )
        if not _is_qarray(x):
            return x
        found.append(path)
        problems = list(_problems(x))
        bad.extend(f"'{path}': {p}" for p in problems)
        return x if problems else _quantized(x)

    is_leaf = lambda x: _is_qarray(x) or _is_aux(x)
    out = map_state(lambda tree: map_with_path(leaf, tree, is_leaf), params)
    raise_all("these arrays of qwix's cannot be kept in their codes:", bad)
    if not found:
        raise LoRAError(
            "no leaf is a QArray: lora.quant.from_qwix(qwix.quantize_params(params, abstract)); to "
            "quantise by this library, lora.quant.quantize(params, targets)"
        )
    return out


def _is_qarray(x: Any) -> bool:
    return all(hasattr(x, name) for name in ("qvalue", "scale", "zero_point", "qtype"))


def _is_aux(x: Any) -> bool:
    return hasattr(x, "array") and hasattr(x, "how")


def _problems(x: Any) -> Iterator[str]:
    """What of a QArray does not belong together, or is not read."""
    parts = {n: getattr(x, n) for n in ("qvalue", "scale", "zero_point")}
    parts = {n: a for n, a in parts.items() if a is not None}
    for name, a in parts.items():
        if not isinstance(a, jax.Array | np.ndarray):
            yield (
                f"its {name} is a {type(a).__name__}, expected an array; of shapes: "
                "jax.eval_shape(lora.quant.from_qwix, params)"
            )
            return
    if not {"qvalue", "scale"} <= {*parts}:
        yield "it has no qvalue or no scale"
        return
    codes, scale = x.qvalue, x.scale
    kind, want = str(codes.dtype), _codes_of(x.qtype)
    if want is None:
        yield f"qtype={quoted(str(x.qtype))} is none that is read: {', '.join(NAMED)}, or a type"
    elif want != kind:
        yield f"codes of {kind}, and qtype={quoted(str(x.qtype))} has {want}"
    elif kind not in ("int8", "int4", *FLOATS) and x.qtype != "nf4":
        yield f"codes of {kind}; expected int4, int8, {', '.join(FLOATS)}, or those of 'nf4'"
    if str(scale.dtype) not in SCALES:
        yield f"a scale of {scale.dtype}; expected one of {', '.join(SCALES)}"
    elif not isinstance(scale, jax.core.Tracer) and not np.isfinite(np.asarray(scale, "f4")).all():
        yield "its scale is not finite: it is damaged, or of a run that diverged"
    for name, a in parts.items():
        if a.ndim != codes.ndim or any(n == 0 or d % n for d, n in zip(codes.shape, a.shape)):
            yield f"{name} {a.shape} does not stand for equal parts of qvalue {codes.shape}"
    if not codes.ndim or not codes.size:
        yield f"qvalue {codes.shape} is no weight"
    zero = parts.get("zero_point")
    if zero is not None and zero.dtype != codes.dtype:
        yield f"a zero_point of {zero.dtype}, and codes of {kind}"


def _codes_of(qtype: Any) -> str | None:
    if isinstance(qtype, str) and qtype in NAMED:
        return NAMED[qtype]
    try:
        return str(jnp.dtype(qtype))
    except TypeError:
        return None


def _quantized(x: Any) -> Quantized:
    codes, scale, zero = jnp.asarray(x.qvalue), jnp.asarray(x.scale), x.zero_point
    second = None if zero is None else (jnp.asarray(zero).astype(scale.dtype),)
    format, pad = PACKED.get(str(codes.dtype), "qwix"), 0
    if format != "qwix":
        pad = codes.shape[-1] % 2
        codes = _bits(jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, pad)]))
        codes = pack(codes)
    return Quantized(codes, scale, second, format, np.dtype(scale.dtype), pad)


def _bits(codes: jax.Array) -> jax.Array:
    """Codes of four bits as whole numbers from 0 to 15."""
    if jnp.issubdtype(codes.dtype, jnp.floating):
        codes = lax.bitcast_convert_type(codes, jnp.uint4)
    return codes.astype(jnp.int8).astype(jnp.uint8) & 15
