"""Weights that bitsandbytes stored in NF4, kept in their codes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core.errors import LoRAError, quoted, raise_all
from lora_jax._core.numbers import check_flags
from lora_jax._core.paths import nearest
from lora_jax._quantized.formats import NF4, SECOND, dynamic_map
from lora_jax._quantized.weight import Quantized

STATE = "quant_state.bitsandbytes__nf4"

# Numbers of a row that share a constant; bitsandbytes' default, and what `Quantized` has.
BLOCK = 64

DTYPES = ("float32", "float16", "bfloat16")

# Bytes; bitsandbytes writes about 200.
MAX_STATE = 4096


def _whole(x: Any) -> bool:
    # Not isinstance: JSON's true is an int as well.
    return type(x) is int and 0 < x < 1 << 48


def _shape(x: Any) -> bool:
    return isinstance(x, list) and 0 < len(x) <= 8 and all(map(_whole, x))


def _finite(x: Any) -> bool:
    return type(x) in (int, float) and abs(x) <= float(np.finfo(np.float32).max)


# {key of the state: (what it is, in words, whether a value is that)}
KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "quant_type": ("a string", lambda x: isinstance(x, str)),
    "blocksize": ("a positive integer", _whole),
    "dtype": ("a string", lambda x: isinstance(x, str)),
    "shape": ("a list of one to eight positive integers", _shape),
}


NESTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "nested_blocksize": ("a positive integer", _whole),
    "nested_dtype": ("a string", lambda x: isinstance(x, str)),
    "nested_offset": ("a finite number of fp32", _finite),
}


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
        block; layers that differ; a tensor whose type or shape is not what the state says, or a
        constant that no weight of its type has (NaN, negative, too large).

    >>> import json, lora_jax as lora, numpy as np
    >>> from lora_jax._quantized.formats import NF4  # a file brings these 16 levels with it
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
    if not isinstance(tensors, Mapping):
        raise LoRAError(
            f"expected a dict of tensors, found {type(tensors).__name__}: "
            "lora.quant.bitsandbytes_weight(safetensors.numpy.load_file(path), name)"
        )
    check_flags("lora.quant.bitsandbytes_weight(tensors, name, kernel=True)", kernel=kernel)
    if isinstance(name, str):
        q = _one(tensors, name)
    elif not isinstance(name, Sequence) or not name or not all(isinstance(n, str) for n in name):
        raise LoRAError(f"expected a name, or a list of names, found {name!r}")
    else:
        layers = [_one(tensors, n) for n in name]
        of = [(q.shape, str(q.dtype), q.second is None) for q in layers]
        raise_all(
            "layers of a stack must be alike:",
            (f"'{n}' is {o}, and '{name[0]}' {of[0]}" for n, o in zip(name, of) if o != of[0]),
            "read each by itself, for layers that are not scanned",
        )
        # Codes, constants and their own constants, each with an axis of layers in front.
        q = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
        q = dataclasses.replace(q, stack=1)
    n = q.ndim
    if kernel and n < 2:
        raise LoRAError(
            f"{name!r}: expected a kernel of two axes or more, found {q.shape}: kernel=False"
        )
    return q.transposed([*range(n - 2), n - 1, n - 2]) if kernel else q


def _one(tensors: Mapping[str, Any], name: str) -> Quantized:
    state, parts = _checked(tensors, name)
    shape, dtype = tuple(state["shape"]), jnp.dtype(state["dtype"])
    # (n / 2, 1) to (*rows, columns / 2): rows are whole blocks, so no byte holds codes of two rows.
    # In both formats the first of two codes is in the upper half of its byte.
    codes = jnp.asarray(parts[""].reshape(*shape[:-1], shape[-1] // 2))
    constants = parts["absmax"]
    if "nested_offset" not in state:
        constants = jnp.asarray(constants.reshape(*shape[:-1], -1))
        return Quantized(codes, constants, None, "nf4", dtype)
    # (groups, 256): the last group is a whole one in memory, and a shorter one in the file.
    constants = np.pad(constants, (0, -constants.size % SECOND)).reshape(-1, SECOND)
    # Maxima (groups,), and the mean that was taken off all constants.
    second = (jnp.asarray(parts["nested_absmax"]), jnp.asarray(state["nested_offset"], jnp.float32))
    return Quantized(codes, jnp.asarray(constants), second, "nf4", dtype)


def _checked(tensors: Mapping[str, Any], name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """(state, {part: array}) of a weight, each compared with what the others say of it."""
    title = f"'{name}' cannot be kept in its codes:"
    of = lambda part: f"{name}.{part}" if part else name
    missing = [of(p) for p in ("", "absmax", "quant_map", STATE) if of(p) not in tensors]
    if missing:
        near = ", ".join(nearest(missing[0], [str(k) for k in tensors], 3)) or "none"
        raise LoRAError(
            f"expected a weight in NF4; there is no {', '.join(missing)}; nearest: {near}"
        )
    state = _state(tensors[of(STATE)], of(STATE))
    # In this order, as each needs the one before: the kinds of the state's values, what they say,
    # the tensors' types and shapes by it, the numbers in them.
    raise_all(title, _state_problems(state))
    raise_all(title, _format_problems(state))
    n, nested = math.prod(state["shape"]), "nested_offset" in state
    blocks = n // BLOCK
    want: dict[str, tuple[str, tuple[int, ...]]] = {
        "": ("uint8", (n // 2, 1)),
        "absmax": ("uint8" if nested else "float32", (blocks,)),
        "quant_map": ("float32", (16,)),
    }
    second = {
        "nested_absmax": ("float32", (math.ceil(blocks / SECOND),)),
        "nested_quant_map": ("float32", (256,)),
    }
    want |= second if nested else {}
    failures = [f"there is no '{of(p)}'" for p in want if of(p) not in tensors]
    if not nested:
        failures += [f"'{of(p)}', but no state of it" for p in second if of(p) in tensors]
    parts = {p: _array(tensors[of(p)]) for p in want if of(p) in tensors}
    for part, x in parts.items():
        dtype, shape = want[part]
        if (str(x.dtype), x.shape) != want[part]:
            failures.append(f"'{of(part)}': expected {dtype}{shape}, found {x.dtype}{x.shape}")
    raise_all(title, failures)
    raise_all(title, _value_problems(of, parts, state))
    return state, parts


def _array(x: Any) -> np.ndarray:
    """As NumPy has it; what it cannot read has the type of no tensor."""
    try:
        return np.asarray(x)
    # Whatever an object of a stranger raises.
    except Exception:
        return np.asarray(None)


def _state(data: Any, where: str) -> dict:
    """The JSON object in a tensor of bytes."""
    data = _array(data)
    if data.dtype != np.uint8 or data.ndim != 1 or data.size > MAX_STATE:
        raise LoRAError(
            f"'{where}': expected at most {MAX_STATE:,} bytes of JSON as uint8(n,), found "
            f"{data.dtype}{data.shape}"
        )

    def pairs(items: list[tuple[str, Any]]) -> dict:
        if len(dict(items)) != len(items):
            raise ValueError("a key appears twice")
        return dict(items)

    try:
        state = json.loads(data.tobytes().decode(), object_pairs_hook=pairs)
    # UnicodeDecodeError is a ValueError.
    except (ValueError, RecursionError) as e:
        text = "it is nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise LoRAError(f"'{where}': expected JSON, found {quoted(text)}") from None
    if not isinstance(state, dict):
        raise LoRAError(f"'{where}': expected a JSON object, found a {type(state).__name__}")
    return state


def _state_problems(state: Mapping[str, Any]) -> Iterator[str]:
    """What of the state is missing, unknown, or of another kind."""
    nested = state.keys() & NESTED.keys()
    for key, (kind, is_one) in (KEYS | (NESTED if nested else {})).items():
        if key not in state:
            yield f"its state has no '{key}', expected {kind}"
        elif not is_one(state[key]):
            yield f"its state has {key}={quoted(repr(state[key]))}, expected {kind}"
    for key in state.keys() - KEYS.keys() - NESTED.keys():
        yield f"its state has {quoted(key)}, expected {', '.join([*KEYS, *NESTED])}"


def _format_problems(state: Mapping[str, Any]) -> Iterator[str]:
    """What of the state this reader does not do."""
    if state["quant_type"] != "nf4":
        yield f"its levels are those of {quoted(state['quant_type'])}, and not NF4's"
    if state["blocksize"] != BLOCK or state["shape"][-1] % BLOCK:
        yield f"blocks of {state['blocksize']} in rows of {state['shape'][-1]}; expected {BLOCK}"
    if state["dtype"] not in DTYPES:
        yield f"weights of {quoted(state['dtype'])}; expected one of {', '.join(DTYPES)}"
    if state.get("nested_blocksize", SECOND) != SECOND:
        yield f"groups of {state['nested_blocksize']} constants; expected {SECOND}"
    if state.get("nested_dtype", "float32") != "float32":
        yield f"constants of {quoted(state['nested_dtype'])}; expected float32"


def _value_problems(
    of: Callable[[str], str], parts: Mapping[str, np.ndarray], state: Mapping[str, Any]
) -> Iterator[str]:
    if not _same(parts["quant_map"], NF4):
        yield f"'{of('quant_map')}': its levels are not NF4's"
    nested = "nested_absmax" in parts
    if nested and not _same(parts["nested_quant_map"], dynamic_map()):
        yield (
            f"'{of('nested_quant_map')}': its constants have other values of 8 bits than "
            "bitsandbytes' dynamic type"
        )
    # The constant of a block is a number of the weight: finite in its type, and not negative.
    maxima = "nested_absmax" if nested else "absmax"
    most = float(jnp.finfo(state["dtype"]).max)
    found = parts[maxima]
    # So, and not by its opposite, NaN is bad too.
    bad = ~((found >= 0) & (found <= most))
    if bad.any():
        at = int(np.argmax(bad))
        yield f"'{of(maxima)}': expected from 0 to {most:.4g}, found {found[at]} at index {at}"
    elif nested:
        level = dynamic_map()[parts["absmax"]].astype(np.float64)
        # The constant of a block is level · maximum of its group + mean.
        top = np.repeat(found, SECOND)[: level.size]
        read = np.abs(level * top + state["nested_offset"])
        if read.size and read.max() > most:
            at = int(np.argmax(read))
            yield f"'{of('absmax')}': constant {at} is {read[at]:.4g}, expected at most {most:.4g}"


def _same(found: np.ndarray, want: Any) -> bool:
    """To a unit in the last place: torch's arithmetic has changed."""
    return np.allclose(found, np.asarray(want, np.float32), rtol=2e-7, atol=0)
