"""Quantised tensors of files, damaged, and what a reader may make of them.

Each case is a seed. What is read is compared with a reading that shares no code with the library's:
gguf's own, and, of bitsandbytes, one in NumPy that believes nothing.
"""

from __future__ import annotations

import collections
import json
import sys
import types
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax._quantized.formats import NF4, dynamic_map

STATE = "quant_state.bitsandbytes__nf4"
KINDS = ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "F32", "F16", "BF16", "Q5_0", "Q6_K"]
TYPES = ["uint8", "int8", "int32", "int64", "float16", "float32", "float64", "bool", "complex64"]
JSON = [None, True, 0, -1, 1, 64, 128, 256, 2**63, 10**30, 0.5, float("nan"), float("inf"), 1e300,
        "", "nf4", "fp4", "float32", "float64", "int8", "bfloat16", "x" * 99, [], [64], [2, 64],
        [-2, 64], [2.0, 64], [True, 64], [0, 64], ["2", 64], [2, [64]], {}, {"a": 1}]  # fmt: skip


def pick(rng: np.random.Generator, items: Any) -> Any:
    items = list(items)
    return items[rng.integers(len(items))]


# ---------------------------------------------------------------- what any array may suffer


def damaged_array(x: np.ndarray, rng: np.random.Generator) -> Any:
    x = np.atleast_1d(x)
    if x.dtype.kind not in "biufc":
        return x  # damaged before
    flat = x.reshape(-1)
    way = rng.integers(13)
    n = int(rng.integers(1, 5)) if rng.integers(2) else int(rng.integers(1, flat.size + 1))
    if way == 0:
        return flat[: max(0, flat.size - n)]
    if way == 1:
        return x[: max(0, x.shape[0] - n)]
    if way == 2:
        return x[..., : max(0, x.shape[-1] - n)]
    if way == 3:
        more = np.resize(flat if rng.integers(2) else np.zeros_like(flat[:1]), n)
        return np.concatenate([flat, more])
    if way == 4:
        return np.concatenate([x, x[:n]])
    if way == 5:
        with np.errstate(all="ignore"):
            return x.astype(pick(rng, TYPES))
    if way == 6:
        try:
            return x.view(pick(rng, TYPES))
        except (TypeError, ValueError):
            return flat
    if way == 7:
        return pick(rng, [flat, x[None], x[..., None], x.T, x[::-1], np.asarray(flat[:1])[0]])
    if way == 8 and x.dtype.kind == "f":
        y = np.array(flat)
        with np.errstate(all="ignore"):
            y[rng.integers(y.size)] = pick(rng, [np.nan, np.inf, -np.inf, -1.0, 3e38, 0.0, 1e-45])
        return y.reshape(x.shape)
    if way == 9:
        return pick(rng, [None, [], [1, 2], "bytes", object(), np.array([None]), np.array("x"), 7])
    if way == 10:
        return np.zeros(pick(rng, [(0,), (), (0, 64), (64, 0), (1,)]), x.dtype)
    data = bytearray(x.tobytes())
    for _ in range(rng.integers(1, 4)):
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    return np.frombuffer(bytes(data), x.dtype).reshape(x.shape)


# ---------------------------------------------------------------- bitsandbytes


def stored(name: str, shape: tuple, dtype: str, nested: bool, seed: int = 0) -> dict:
    """As bitsandbytes writes a weight, of random codes."""
    rng, n = np.random.default_rng(seed), int(np.prod(shape))
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": dtype, "shape": list(shape)}
    out = {
        name: rng.integers(0, 256, (n // 2, 1), np.uint8),
        f"{name}.absmax": rng.random(n // 64, np.float32),
        f"{name}.quant_map": np.array(NF4, np.float32),
    }
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        out[f"{name}.absmax"] = rng.integers(0, 256, n // 64, np.uint8)
        out[f"{name}.nested_absmax"] = rng.random(-(-n // 64 // 256), np.float32)
        out[f"{name}.nested_quant_map"] = dynamic_map()
    out[f"{name}.{STATE}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return out


GOOD = {
    "a": stored("a", (4, 128), "float32", False),
    "b": stored("b", (3, 64), "bfloat16", False, 1),
    "c": stored("c", (36, 512), "float16", True, 2),
    "d": stored("d", (2, 2, 64), "float32", True, 3),
}


def damaged_json(data: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    text = data.tobytes().decode()
    state = json.loads(text)
    way, key = rng.integers(9), pick(rng, state)
    if way == 0:
        del state[key]
    elif way == 1:
        state[pick(rng, [key, "nested_offset", "nested_blocksize", "more"])] = pick(rng, JSON)
    elif way == 2:
        state[key] = pick(rng, JSON)
    elif way == 3:
        shape = state["shape"]
        n = int(np.prod(shape))
        state["shape"] = pick(rng, [shape[::-1], [n], [1, n], [n, 1], [n // 64, 64], [*shape, 1],
                                    shape[:-1], [2 * shape[0], *shape[1:]], [n // 128, 128]])  # fmt: skip
    if way < 4:
        text = json.dumps(state)
    elif way == 4:
        text = text[: rng.integers(len(text))]
    elif way == 5:
        text = pick(rng, ["[" * 3000, "[" * 100_000, "{}", "[]", "null", "3", "", "\0", '{"a":' * 700,
                          text[:-1] + ', "shape": [2, 64]}', " " * 5000 + text, "9" * 4000])  # fmt: skip
    elif way == 6:
        return np.frombuffer(text.encode("utf-16"), np.uint8)
    else:
        raw = bytearray(text.encode())
        raw[rng.integers(len(raw))] = rng.integers(256)
        return np.frombuffer(bytes(raw), np.uint8)
    return np.frombuffer(text.encode(), np.uint8)


def bitsandbytes_case(seed: int) -> tuple[dict, Any, dict]:
    """(tensors, name, arguments)"""
    rng = np.random.default_rng(seed)
    name = pick(rng, GOOD)
    tensors = {k: v for part in GOOD.values() for k, v in part.items()}
    names: Any = name
    if not rng.integers(5):
        names = [name, pick(rng, GOOD)] if rng.integers(2) else [name, name]
    for _ in range(rng.integers(1, 4)):
        key = pick(rng, GOOD[name])
        way = rng.integers(8)
        if key not in tensors or way == 0:
            tensors.pop(key, None)
        elif way == 1:
            other = pick(rng, tensors)
            tensors[key], tensors[other] = tensors[other], tensors[key]
        elif way == 2:  # what belongs to another weight
            part = key.removeprefix(name)
            tensors[key] = tensors.get(pick(rng, GOOD) + part, tensors[key])
        elif way == 3:
            tensors[f"{name}.nested_absmax"] = np.ones(1, np.float32)
        elif way == 4 or key.endswith(STATE):
            key = f"{name}.{STATE}"
            if isinstance(tensors.get(key), np.ndarray) and tensors[key].dtype == np.uint8:
                try:
                    tensors[key] = damaged_json(tensors[key], rng)
                except Exception:
                    tensors.pop(key)  # damaged twice
        elif isinstance(tensors[key], np.ndarray) and tensors[key].size:
            tensors[key] = damaged_array(tensors[key], rng)
    return tensors, names, {"kernel": bool(rng.integers(2))}


def read_bitsandbytes(tensors: dict, name: str) -> np.ndarray:
    """What the tensors say, if they say one thing; else an AssertionError."""
    state = json.loads(tensors[f"{name}.{STATE}"].tobytes())
    codes, constants = tensors[name], tensors[f"{name}.absmax"]
    n = int(np.prod(state["shape"]))
    assert state["quant_type"] == "nf4" and state["blocksize"] == 64 and n > 0
    assert state["dtype"] in ("float32", "float16", "bfloat16") and state["shape"][-1] % 64 == 0
    assert codes.dtype == np.uint8 and codes.size * 2 == n and constants.size * 64 == n
    assert np.allclose(tensors[f"{name}.quant_map"], NF4, rtol=1e-6)
    if "nested_offset" in state:
        top = tensors[f"{name}.nested_absmax"]
        assert constants.dtype == np.uint8 and top.dtype == np.float32
        assert state["nested_blocksize"] == 256 and top.size == -(-constants.size // 256)
        assert np.allclose(tensors[f"{name}.nested_quant_map"], dynamic_map(), rtol=1e-6)
        each = dynamic_map()[constants] * np.repeat(top, 256)[: constants.size]
        constants = each + np.float32(state["nested_offset"])
    else:
        assert f"{name}.nested_absmax" not in tensors
    assert constants.dtype == np.float32 and np.isfinite(constants).all()
    halves = np.stack([codes.reshape(-1) >> 4, codes.reshape(-1) & 15], -1).reshape(-1, 64)
    w = (np.asarray(NF4, np.float32)[halves] * constants[:, None]).reshape(state["shape"])
    return np.asarray(jnp.asarray(w).astype(state["dtype"]).astype(jnp.float32))


def bitsandbytes_outcome(seed: int) -> str:
    tensors, names, kwargs = bitsandbytes_case(seed)
    try:
        q = lora.quant.bitsandbytes_weight(tensors, names, **kwargs)
    except lora.LoRAError as e:
        assert any(n in str(e) for n in ([names] if isinstance(names, str) else names)), str(e)
        assert str(e).isascii() or "…" in str(e)
        return "refused"
    each = [read_bitsandbytes(tensors, n) for n in ([names] if isinstance(names, str) else names)]
    want = each[0] if isinstance(names, str) else np.stack(each)
    compare(q, want.swapaxes(-1, -2) if kwargs["kernel"] else want)
    return "read"


# ---------------------------------------------------------------- GGUF


def tensor(kind: str, shape: tuple[int, ...], seed: int = 0, name: str = "w") -> Any:
    qtype = gguf.GGMLQuantizationType[kind]
    rng = np.random.default_rng(seed)
    if kind in ("Q4_K", "Q6_K"):  # which gguf does not make: bytes, with finite constants
        size = {"Q4_K": 144, "Q6_K": 210}[kind]
        blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // 256, size), np.uint8)
        halves = (rng.standard_normal((*blocks.shape[:-1], 2)) / 512).astype(np.float16)
        if kind == "Q4_K":
            blocks[..., :4] = halves.view(np.uint8)
        else:
            blocks[..., -2:] = np.ascontiguousarray(halves[..., :1]).view(np.uint8)
        data = blocks.reshape(*shape[:-1], -1)
    else:
        data = gguf.quants.quantize(rng.standard_normal(shape, np.float32), qtype)
    said = np.asarray(shape[::-1], np.uint64)
    return types.SimpleNamespace(name=name, data=data, tensor_type=qtype, shape=said)


def gguf_case(seed: int) -> tuple[Any, dict]:
    rng = np.random.default_rng(seed)
    kind = pick(rng, KINDS)
    shape = pick(rng, [(8, 256), (2, 4, 512)])
    each = [tensor(kind, shape, i, f"blk.{i}.w") for i in range(pick(rng, [1, 1, 2]))]
    t = each[0]
    kwargs = {"kernel": bool(rng.integers(2)), "dtype": pick(rng, ["float32", "bfloat16"])}
    if not rng.integers(4):
        good = rng.permutation(shape[-2])
        kwargs["order"] = pick(
            rng, [good, good, good[:-1], good + 1, good * 1.0, good * 0, 3, None]
        )
    for _ in range(rng.integers(1, 4)):
        way = rng.integers(9)
        if way == 0:
            t.tensor_type = gguf.GGMLQuantizationType[
                pick(rng, [*KINDS, "F64", "I8", "Q8_K", "Q2_K"])
            ]
        elif way == 1:
            t.tensor_type = pick(rng, [None, "Q4_0", 2, types.SimpleNamespace(name="Q9_9")])
        elif way == 2:
            said = np.array(shape[::-1])
            t.shape = pick(rng, [said[::-1], said[:-1], said * 2, [], None, 7, "x", [256]])
        elif way == 3:
            t.data = tensor(pick(rng, KINDS), pick(rng, [shape, (8, 256)]), 5).data
        elif way == 4 and isinstance(t.data, np.ndarray) and t.data.dtype == np.uint8:
            size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34, "Q4_K": 144}.get(kind)
            if size and t.data.size and t.data.size % size == 0:
                blocks = np.array(t.data).reshape(-1, size)
                at = rng.integers(len(blocks))
                blocks[at, :2] = np.array([pick(rng, [np.nan, np.inf, -1, 6e4])], "f2").view("u1")
                t.data = blocks.reshape(t.data.shape)
        elif way == 5:
            delattr(t, pick(rng, [k for k in vars(t) if k != "data" or rng.integers(2)] or ["x"]))
            if not hasattr(t, "data"):
                break
            t.__dict__.setdefault("shape", None)
        elif isinstance(getattr(t, "data", None), np.ndarray) and t.data.size:
            t.data = damaged_array(t.data, rng)
        if not hasattr(t, "tensor_type"):
            break
    return (each if len(each) > 1 or rng.integers(2) else t), kwargs


def gguf_outcome(seed: int) -> str:
    given, kwargs = gguf_case(seed)
    try:
        q = lora.quant.gguf_weight(given, **kwargs)
    except lora.LoRAError as e:
        assert "expected" in str(e) or "says" in str(e) or "not yet implemented" in str(e), str(e)
        return "refused"
    each = []
    for t in given if isinstance(given, list) else [given]:
        kind = t.tensor_type.name
        n, size = gguf.constants.GGML_QUANT_SIZES[t.tensor_type]
        want = {"F32": np.float32, "F16": np.float16}.get(kind, np.uint8)
        assert (
            t.data.dtype == want and t.data.nbytes and t.data.shape[-1] * want().nbytes % size == 0
        )
        w = gguf.quants.dequantize(np.ascontiguousarray(t.data), t.tensor_type)
        shape = (*t.data.shape[:-1], t.data.shape[-1] * want().nbytes // size * n)
        said = getattr(t, "shape", None)
        assert w.shape == shape and np.isfinite(w).all()
        assert said is None or tuple(np.asarray(said).tolist())[::-1] == shape
        each.append(w)
    w = np.stack(each) if isinstance(given, list) else each[0]
    if kwargs.get("order") is not None:
        assert sorted(kwargs["order"]) == list(range(w.shape[-2]))
        w = w[..., np.asarray(kwargs["order"]), :]
    w = w.swapaxes(-1, -2) if kwargs["kernel"] else w
    compare(q, np.asarray(jnp.asarray(w).astype(kwargs["dtype"]).astype(jnp.float32)))
    return "read"


# ---------------------------------------------------------------- a run of many


def compare(q: Any, want: np.ndarray) -> None:
    value = q.value() if isinstance(q, lora.quant.Quantized) else q
    got = np.asarray(value.astype(jnp.float32))
    assert got.shape == want.shape
    eps = float(jnp.finfo(value.dtype).eps)  # a fused multiply-add rounds once less
    np.testing.assert_allclose(got, want, rtol=2 * eps, atol=eps * np.abs(want).max(initial=0))


OUTCOMES = {"bitsandbytes": bitsandbytes_outcome, "gguf": gguf_outcome}


def run(kind: str, first: int, count: int) -> collections.Counter:
    """{outcome: how many}; raises, with the seed, at what is neither right nor a LoRAError."""
    return run_of(OUTCOMES[kind], kind, first, count)


def run_of(outcome: Any, kind: str, first: int, count: int) -> collections.Counter:
    """The same, by a function of a seed."""
    found: collections.Counter = collections.Counter()
    for seed in range(first, first + count):
        try:
            found[outcome(seed)] += 1
        except Exception as e:
            raise AssertionError(f"{kind}, seed {seed}: {type(e).__name__}: {e}") from e
    return found


if __name__ == "__main__":  # python tests/support/damage_quantised.py [cases of each]
    jax.config.update("jax_platforms", "cpu")
    for kind in OUTCOMES:
        print(kind, dict(run(kind, 0, int(sys.argv[1]))))
