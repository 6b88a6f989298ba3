"""Quantised leaves that were damaged after they were made, and what may be made of them.

Each case is a seed. What is read is compared with a reading in NumPy that shares no code with the
library's, and believes nothing of what it is given.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import tempfile
import types
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from damage_quantised import GOOD, compare, damaged_array, pick, read_bitsandbytes, tensor

import lora_jax as lora
from lora_jax._quantized.formats import NF4, dynamic_map

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
LEVELS = {
    "nf4": np.array(NF4),
    "int4": np.array([*np.arange(-7, 8) / 7, np.nan]),
    "mxfp4": np.array([*-E2M1[:0:-1], *E2M1, np.nan]),
    "nvfp4": np.array([*E2M1, *-E2M1]),
}
BLOCK = {"nf4": 64, "int4": 64, "mxfp4": 32, "nvfp4": 16, "int8_block": 64, "fp8_block": 64}
EIGHT = {"int8": ("int8", 127), "fp8": ("float8_e4m3fn", 448)}
FLOATS = ("float32", "float16", "bfloat16")


def good(format: str, shape: tuple, dtype: str, double: bool, seed: int) -> Any:
    """A leaf, and a stack of weights where it has three axes."""
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    rules = [lora.Rule("w", batch_axes=(0,), in_axes=(1,), out_axes=(2,))] if len(shape) > 2 else []
    params = {"w": jnp.asarray(w).astype(dtype)}
    chosen = lora.select(params, lora.LoRAConfig(rank=1, targets="w", rules=rules))
    return lora.quant.quantize(params, chosen, format, double=double)["w"]


def numbers(x: Any, *types: str) -> np.ndarray:
    """In fp64; an AssertionError if it is no array of these types."""
    assert isinstance(x, jax.Array | np.ndarray) and str(x.dtype) in types
    return np.asarray(x).astype(np.float64)


def read_codes(q: Any) -> np.ndarray:
    """The numbers of a leaf, if what it says is one thing; else an AssertionError."""
    assert isinstance(q.format, str) and str(np.dtype(q.stored_dtype)) in FLOATS and not q.moves
    assert type(q.stack) is type(q.pad) is int and q.format in {*BLOCK, *EIGHT}
    codes, four = q.codes, q.format in LEVELS
    kind, top = EIGHT.get(q.format.removesuffix("_block"), ("uint8", 1))
    numbers(codes, kind)
    *lead, n = codes.shape
    n, last = n * (1 + four), n * (1 + four) - q.pad
    assert lead and n and 0 <= q.stack <= len(lead) and last > 0 <= q.pad
    if q.format in EIGHT:
        constants = numbers(q.constants, *FLOATS)
        assert q.second is None and q.pad == 0 and constants.ndim == codes.ndim
        assert all(c in (1, d) for c, d in zip(constants.shape, codes.shape))
        return numbers(codes, kind) / top * constants
    block = BLOCK[q.format]
    shape = (*lead, n // block)
    assert n % block == 0 and q.pad < block
    stack = tuple(lead[: q.stack])
    if q.format == "nvfp4":
        assert isinstance(q.second, tuple | list)
        (scale,) = q.second
        # One for each of a stack, or of layers that were put together.
        assert scale.shape == tuple(lead[: scale.ndim]) and scale.ndim >= q.stack
        constants = numbers(q.constants, "float8_e4m3fn")
        more = tuple(range(scale.ndim, len(shape)))
        constants = constants * np.expand_dims(numbers(scale, *FLOATS), more)
    elif q.format == "mxfp4":
        assert q.second is None
        with np.errstate(over="ignore"):  # 6 · 2^126 is infinite in fp32, and 0 times that is NaN
            constants = np.float32(6) * numbers(q.constants, "float8_e8m0fnu").astype("f4") / 6
    elif q.second is None:
        constants = numbers(q.constants, *FLOATS)
    else:
        maxima, mean = q.second
        groups = math.ceil(math.prod(shape[q.stack :]) / 256)
        assert q.constants.shape == (*stack, groups, 256)
        assert maxima.shape == (*stack, groups) and mean.shape == stack
        numbers(q.constants, "uint8")
        each = dynamic_map().astype(np.float64)[np.asarray(q.constants)]
        flat = (each * numbers(maxima, *FLOATS)[..., None]).reshape(*stack, -1)
        flat = flat[..., : math.prod(shape[q.stack :])] + numbers(mean, *FLOATS)[..., None]
        constants = flat.reshape(shape)
    assert constants.shape == shape
    if four:
        codes = np.asarray(codes)
        codes = np.stack([codes >> 4, codes & 15], -1).reshape(*lead, n)
        unit = LEVELS[q.format][codes]
    else:
        unit = numbers(codes, kind) / top
    return (unit.reshape(*shape, block) * constants[..., None]).reshape(*lead, n)[..., :last]


def as_type(to: str, x: Any) -> Any:
    return x.astype(to) if hasattr(x, "astype") and x.dtype.kind not in "USO" else x


def codes_case(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    format = pick(rng, [*BLOCK, *EIGHT])
    shape = pick(rng, [(8, 128), (6, 70), (2, 8, 64), (3, 4, 100)])
    twice = format in ("nf4", "int4", "int8_block", "fp8_block") and bool(rng.integers(2))
    q = good(format, shape, pick(rng, FLOATS), twice, int(rng.integers(4)))
    for _ in range(rng.integers(1, 3)):
        way = rng.integers(11)
        parts = ["codes", "constants"] + ["second"] * (q.second is not None)
        part = pick(rng, parts)
        if way == 0:
            q = dataclasses.replace(q, format=pick(rng, [*BLOCK, *EIGHT, "nf5", None, 4, "q4_k"]))
        elif way == 1:
            q = dataclasses.replace(q, pad=pick(rng, [-1, 0, 1, 26, 60, 64, 1000, 1.0, None]))
        elif way == 2:
            q = dataclasses.replace(q, stack=pick(rng, [-1, 0, 1, 2, 3, 9, 0.5, None]))
        elif way == 3:
            dtypes = [*FLOATS, "int32", "bool", "complex64", None, "x", np.dtype("float32")]
            q = dataclasses.replace(q, stored_dtype=pick(rng, dtypes))
        elif way == 4:
            one = jnp.ones(pick(rng, [(), (1,), (2,), (8, 1)]))
            q = dataclasses.replace(q, second=pick(rng, [None, (), (one,), (one, one), [one], one]))
        elif way == 5:  # of another leaf
            other = good(
                pick(rng, [*BLOCK, *EIGHT]), pick(rng, [shape, (8, 128)]), "float32", False, 9
            )
            q = dataclasses.replace(q, **{part: getattr(other, part)})
        elif way == 6:  # cast, as a tree of floats would be
            to = pick(rng, [*FLOATS, "int32", "uint8", "int8"])
            q = jax.tree.map(functools.partial(as_type, to), q)
        elif part == "second" and isinstance(q.second, tuple) and q.second:
            at = int(rng.integers(len(q.second)))
            new = [*q.second]
            new[at] = hurt(new[at], rng)
            q = dataclasses.replace(q, second=tuple(new))
        elif part != "second":
            q = dataclasses.replace(q, **{part: hurt(getattr(q, part), rng)})
    return q


def hurt(x: Any, rng: np.random.Generator) -> Any:
    """An array that was damaged, as JAX has it where it can be one; small floats by their bits."""
    if not hasattr(x, "dtype") or not x.size:
        return x
    small = str(x.dtype).startswith("float8")
    x = np.asarray(x)
    y = damaged_array(
        x.view(np.uint8) if small else x.astype("f4") if x.dtype == ml_dtypes.bfloat16 else x, rng
    )
    if small and isinstance(y, np.ndarray) and y.dtype == np.uint8:
        y = y.view(x.dtype)
    try:
        return jnp.asarray(y) if rng.integers(4) and y is not None else y
    except Exception:
        return y


OPERATIONS = ("dequantize", "errors", "merge", "requantize", "product", "jit", "look", "coverage")


def codes_outcome(seed: int) -> str:
    q = codes_case(seed)
    how = pick(np.random.default_rng([seed, 1]), OPERATIONS)
    try:
        want = read_codes(q)
    except Exception:
        want = None
    try:
        got = operate(q, how, (8, 128) if want is None else want.shape)
    except lora.LoRAError:
        if want is not None:  # merge refuses what is not finite
            finite = np.isfinite(np.asarray(want, str(q.stored_dtype))).all()
            refused = not finite or (how == "requantize" and not want.size)
            assert how in ("merge", "requantize") and refused, "refused, and good"
        return "refused"
    if how == "look":
        return "looked at"
    assert want is not None, f"{how} of what is damaged: {q!r}"
    if got is not None:
        eps = float(jnp.finfo(got.dtype).eps)
        got = np.asarray(got).astype(np.float64)
        with np.errstate(all="ignore"):
            want = np.asarray(want, str(q.stored_dtype)).astype(np.float64)
        if how == "product" and not np.isfinite(want).all():
            return "read"  # a sum spreads it
        assert got.shape == want.shape and (np.isnan(got) == np.isnan(want)).all()
        top = np.abs(want[np.isfinite(want)]).max(initial=0)
        fine = np.isfinite(want)
        np.testing.assert_allclose(got[fine], want[fine], rtol=4 * eps, atol=4 * eps * top + 1e-37)
    return "read"


def operate(q: Any, how: str, shape: tuple[int, ...]) -> Any:
    params = {"a": {"w": q}}
    *lead, i, o = shape if len(shape) > 1 else (1, *shape)
    if how == "look":
        repr(q)
    elif how in ("dequantize", "jit"):
        # What is no array does not enter a jitted function: JAX says so, before any of ours.
        arrays = all(isinstance(x, jax.Array) for x in jax.tree.leaves(q))
        read = jax.jit(lora.quant.dequantize) if how == "jit" and arrays else lora.quant.dequantize
        return read(params)["a"]["w"]
    elif how == "errors":
        lora.quant.errors(params, params)
    elif how in ("product", "coverage"):
        bound = lora.bind(params, None)
        fn = lambda p, x: x @ p["a"]["w"]
        x = jnp.broadcast_to(jnp.eye(i, dtype=q.dtype), (*lead, i, i))
        if how == "product":
            return lora.adapt(fn)(bound, x)
        lora.coverage(fn, bound, x)
    else:
        n = len(lead)
        g = lora.Geometry((n,), (n + 1,), tuple(range(n)))
        node = lora.LoRA(jnp.zeros((*lead, i, 1)), jnp.zeros((*lead, 1, o)), 1.0, g)
        again = how == "requantize"
        merged = lora.merge(params, {"a": {"w": node}}, requantize=again)["a"]["w"]
        return None if again else merged
    return None


# ---------------------------------------------------------------- qwix's arrays

QWIX = ("int8", "int4", "uint4", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn")


def qarray_case(seed: int) -> tuple[Any, bool]:
    rng = np.random.default_rng(seed)
    dtype, shape = pick(rng, QWIX), pick(rng, [(8, 32), (8, 33), (2, 4, 16), (16,)])
    tiles = tuple(pick(rng, [1, d, *(k for k in (2, 4, 8) if d % k == 0)]) for d in shape)
    codes = jnp.asarray(rng.integers(0, 7, shape)).astype(dtype)
    scale = jnp.asarray(rng.random(tiles) + 0.1, pick(rng, FLOATS))
    qtype = "nf4" if dtype == "uint4" else codes.dtype
    zero = None
    if dtype in ("int8", "int4") and not rng.integers(3):
        zero = jnp.asarray(rng.integers(-3, 4, tiles)).astype(dtype)
    x = types.SimpleNamespace(qvalue=codes, scale=scale, zero_point=zero, qtype=qtype)
    for _ in range(rng.integers(1, 3)):
        way, part = rng.integers(8), pick(rng, ["qvalue", "scale", "zero_point"])
        if way == 0:
            x.qtype = pick(
                rng, [None, 4, "nf4", "int8", "int4", "mxfp4", "int9", object(), [1], {}, "é"]
            )
        elif way == 1:
            vars(x).pop(pick(rng, list(vars(x))))
            break
        elif way == 2:
            shapes = [(), (1,), shape, tiles, (0,), (3, 5), (*tiles, 1), (1, *tiles)]
            setattr(x, part, jnp.ones(pick(rng, shapes), pick(rng, [*FLOATS, "int8", "int4"])))
        elif way == 3:
            setattr(
                x,
                part,
                pick(rng, [None, 1, "x", [1.0], object(), jax.ShapeDtypeStruct(shape, "int8")]),
            )
        elif getattr(x, part) is not None:
            a = getattr(x, part)
            four = hasattr(a, "dtype") and str(a.dtype) in ("int4", "uint4", "float4_e2m1fn")
            setattr(x, part, a[: rng.integers(0, 3)] if four and a.ndim else hurt(a, rng))
    return x, bool(rng.integers(2))


def read_qarray(x: Any) -> np.ndarray:
    codes, scale, zero = x.qvalue, x.scale, x.zero_point
    parts = [a for a in (codes, scale, zero) if a is not None]
    assert all(isinstance(a, jax.Array | np.ndarray) for a in parts) and len(parts) > 1
    kind = str(codes.dtype)
    named = {"nf4": "uint4", "mxfp4": "float4_e2m1fn", "int8": "int8", "int4": "int4"}
    want = named.get(x.qtype) if isinstance(x.qtype, str) else str(np.dtype(x.qtype))
    assert kind == want and kind in QWIX and (kind != "uint4" or x.qtype == "nf4")
    assert codes.ndim and codes.size and str(scale.dtype) in FLOATS
    assert np.isfinite(np.asarray(scale).astype("f8")).all() and (
        zero is None or zero.dtype == codes.dtype
    )
    whole = []
    for a in parts[1:]:
        assert a.ndim == codes.ndim and all(n and d % n == 0 for d, n in zip(codes.shape, a.shape))
        a = np.asarray(a.astype(jnp.float32))
        for d, n in enumerate(codes.shape):
            a = np.repeat(a, n // a.shape[d], d)
        whole.append(jnp.asarray(a).astype(scale.dtype))
    w = jnp.asarray(codes).astype(jnp.float32)
    w = jnp.asarray(np.asarray(NF4, "f4"))[w.astype(int)] if kind == "uint4" else w
    w = w.astype(scale.dtype)
    w = w - whole[1] if zero is not None else w
    return np.asarray((w * whole[0]).astype(jnp.float32))


def qarray_outcome(seed: int) -> str:
    x, wrapped = qarray_case(seed)
    tree = {"a": {"w": types.SimpleNamespace(array=x, how=None) if wrapped else x}}
    try:
        got = lora.quant.from_qwix(tree)["a"]["w"].value()
    except lora.LoRAError as e:
        assert "'a/w" in str(e) or "no leaf is a QArray" in str(e), str(e)
        try:
            read_qarray(x)
        except Exception:
            return "refused"
        raise AssertionError(f"refused, and good: {e}") from None
    want = read_qarray(x)
    assert got.shape == want.shape
    np.testing.assert_array_equal(np.asarray(got.astype(jnp.float32)), want)
    return "read"


# ---------------------------------------------------------------- files, by their bytes


def damaged_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    raw, way = bytearray(data), rng.integers(5)
    if way == 0:
        return bytes(raw[: rng.integers(len(raw))])
    if way == 1:
        at = rng.integers(len(raw))
        return bytes(raw[:at] + raw[at + rng.integers(1, 40) :])
    if way == 2:
        at = rng.integers(len(raw))
        return bytes(
            raw[:at] + bytes(rng.integers(0, 256, rng.integers(1, 40), np.uint8)) + raw[at:]
        )
    for _ in range(rng.integers(1, 9)):  # most in the front, where the names and shapes are
        at = rng.integers(min(len(raw), 600)) if way == 3 else rng.integers(len(raw))
        raw[at] = rng.integers(256)
    return bytes(raw)


def safetensors_outcome(seed: int) -> str:
    rng = np.random.default_rng(seed)
    name = pick(rng, GOOD)
    try:
        found = safetensors.numpy.load(damaged_bytes(safetensors.numpy.save(GOOD[name]), rng))
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, AttributeError):
        return "no file"
    try:
        q = lora.quant.bitsandbytes_weight(found, name)
    except lora.LoRAError as e:
        assert name in str(e)
        return "refused"
    compare(q, read_bitsandbytes(found, name))
    return "read"


def gguf_file(kind: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "m.gguf")
        writer = gguf.GGUFWriter(path, "llama")
        for i in range(2):
            t = tensor(kind, (8, 256), i)
            writer.add_tensor(f"blk.{i}.w", t.data, raw_dtype=t.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with open(path, "rb") as file:
            return file.read()


FILES: dict[str, bytes] = {}


def gguf_file_outcome(seed: int) -> str:
    rng = np.random.default_rng(seed)
    kind = pick(rng, ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "F16", "Q6_K"])
    if kind not in FILES:
        FILES[kind] = gguf_file(kind)
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(damaged_bytes(FILES[kind], rng))
        file.flush()
        try:
            with np.errstate(all="ignore"):
                tensors = gguf.GGUFReader(file.name).tensors
        except Exception:  # whatever the reader of gguf raises
            return "no file"
        kernel = bool(rng.integers(2))
        given = tensors if rng.integers(2) else tensors[:1]
        given = given if len(given) != 1 else given[0]
        try:
            q = lora.quant.gguf_weight(given, kernel=kernel)
        except lora.LoRAError:
            return "refused"
        several = isinstance(given, list)
        each = [
            gguf.quants.dequantize(np.array(t.data), t.tensor_type)
            for t in (given if several else [given])
        ]
        want = np.stack(each) if several else each[0]
        compare(q, want.swapaxes(-1, -2) if kernel else want)
    return "read"


OUTCOMES = {
    "codes": codes_outcome,
    "qarray": qarray_outcome,
    "safetensors": safetensors_outcome,
    "gguf file": gguf_file_outcome,
}
