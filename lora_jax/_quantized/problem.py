"""Whether the fields of a quantised weight belong together."""

from __future__ import annotations

import math
from typing import Any

from lora_jax._quantized.formats import SECOND, STORED, blocks_of, is_float


def problem(q: Any) -> str | None:
    """Why the fields are not those of one weight, as of leaves that were cut by hand, cast, or
    restored into others; None if they are."""
    fmt = STORED.get(q.format) if isinstance(q.format, str) else None
    if fmt is None:
        return f"format={q.format!r}: expected one of {', '.join(STORED)}"
    second = () if q.second is None else q.second
    if not isinstance(second, tuple | list):
        return f"expected a tuple of arrays as second, found a {type(second).__name__}"
    arrays = (q.codes, q.constants, *second)
    if odd := [x for x in arrays if not (hasattr(x, "shape") and hasattr(x, "dtype"))]:
        return f"expected arrays as codes and constants, found a {type(odd[0]).__name__}"
    if not is_float(q.stored_dtype):
        return f"stored_dtype={q.stored_dtype!r}: expected a floating type"
    if not fmt.holds(*(x.dtype for x in arrays)):
        return f"{', '.join(str(x.dtype) for x in arrays)} are not the types of {q.format!r}"
    shape, *others = (tuple(x.shape) for x in arrays)
    whole = all(type(n) is int and n >= 0 for n in (q.pad, q.stack))
    if not whole or q.stack >= max(len(shape), 1):
        return f"pad={q.pad!r} and stack={q.stack!r} of codes {shape}"
    *lead, last = q.stored if shape else (0,)
    if last < 1:
        return f"pad={q.pad} of codes {shape}: there is nothing"
    stack = tuple(lead[: q.stack])
    n, block = blocks_of(last, fmt.block)
    each = n * min(fmt.parts, 2)  # scales; scales and offsets; 16 bytes for eight blocks
    if fmt.block is None:
        many = [(k, d) for x in others for k, d in zip(x, q.stored)]
        good = all(k and d % k == 0 if fmt.tiles else k in (1, d) for k, d in many)
        good = good and all(len(x) == len(shape) for x in others)
    elif q.double:
        groups = math.ceil(math.prod(lead[q.stack :]) * n / SECOND)
        good = others == [(*stack, groups, SECOND), (*stack, groups), stack]
    else:
        scale = (others[1:] or [()])[0]  # of NVFP4, for each of a stack, or of layers put together
        good = others[0] == (*lead, each) and scale == tuple(lead[: len(scale)])
        good = good and len(scale) >= len(stack) * fmt.whole and each % fmt.parts == 0
    pad = q.pad <= (fmt.bits == 4) if fmt.tiles else q.pad == n * block - last
    if good and pad:
        return None
    return (
        f"codes {shape} and constants {', '.join(map(str, others))} of {q.format!r} are not "
        "of one part of a weight. By hand (shard_map, all_gather) cut the last axis between "
        f"blocks of {fmt.block}, and, with double quantisation, the first axis after the "
        f"stack alone, in groups of {SECOND} constants; `jax.jit` needs no such care"
    )
