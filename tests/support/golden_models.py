"""The models of tests/data/peft_golden as small functions, with trees in Flax's conventions."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core.paths import nest
from lora_jax.peft._file import DTYPES, PLACES, parse_json

GOLDEN = pathlib.Path(__file__).parent.parent / "data" / "peft_golden"


def tensors(path):
    """{name: array} of a safetensors file, bfloat16 too."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = parse_json(data[8:start], path)
    header.pop("__metadata__", None)
    types = {**DTYPES, **PLACES}
    return {
        name: np.frombuffer(data[start:], np.uint8)[slice(*t["data_offsets"])]
        .view(types[t["dtype"]])
        .reshape(t["shape"])
        for name, t in header.items()
    }


def folder(name):
    return GOLDEN / name


def inputs(name):
    """(input, the base's output, the adapted output)."""
    io = tensors(folder(name) / "io.safetensors")
    x = next(v for k, v in io.items() if k.startswith("in_"))
    x = x.astype(np.int32) if x.dtype == np.int64 else x
    return jnp.asarray(x), io["y_base"], io["y_adapter"]


def base(name):
    return tensors(folder(name) / "base.safetensors")


def tree(flat):
    return jax.tree.map(jnp.asarray, nest(flat))


# Net: an embedding, a Linear, a GPT-2 Conv1D and a head


def net_params(name):
    w = base(name)
    return tree(
        {
            "emb/embedding": w["emb.weight"],
            "lin/kernel": w["lin.weight"].T,
            "lin/bias": w["lin.bias"],
            "c1d/kernel": w["c1d.weight"],
            "c1d/bias": w["c1d.bias"],
            "head/kernel": w["head.weight"].T,
            "head/bias": w["head.bias"],
        }
    )


def dense(p, x):
    y = x @ p["kernel"]
    return y + p["bias"] if "bias" in p else y


def net(p, x):
    h = p["emb"]["embedding"][x]
    h = jax.nn.relu(dense(p["lin"], h))
    h = jax.nn.relu(dense(p["c1d"], h))
    return dense(p["head"], h)


# Convolutions: NHWC and HWIO, as in Flax


def conv_params(name):
    w = base(name)
    flat = {}
    for m in ("conv", "pw", "cv1"):
        kernel = w[f"{m}.weight"]
        flat[f"{m}/kernel"] = kernel.transpose(*range(2, kernel.ndim), 1, 0)
        flat[f"{m}/bias"] = w[f"{m}.bias"]
    return tree(flat)


def conv(p, x):
    n = x.ndim - 2
    letters = "HW"[:n]
    dims = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    y = jax.lax.conv_general_dilated(x, p["kernel"], (1,) * n, "SAME", dimension_numbers=dims)
    return y + p["bias"]


def convnet(p, x):
    x = x.transpose(0, 2, 3, 1)
    h = jax.nn.relu(conv(p["pw"], jax.nn.relu(conv(p["conv"], x))))
    return conv(p["cv1"], h.reshape(h.shape[0], -1, h.shape[-1])).transpose(0, 2, 1)


# Experts


def moe_params(name, transposed=True):
    """transposed: (experts, in, out), as JAX models mostly have them."""
    w = base(name)
    turn = (lambda x: x.swapaxes(1, 2)) if transposed else (lambda x: x)
    return tree(
        {
            "experts/gate_up_proj": turn(w["experts.gate_up_proj"]),
            "experts/down_proj": turn(w["experts.down_proj"]),
            "out/kernel": w["out.weight"].T,
            "out/bias": w["out.bias"],
        }
    )


def moe(p, x, transposed=True):
    one, two = ("bi,eio->beo", "beo,eoi->bei") if transposed else ("bi,eoi->beo", "beo,eio->bei")
    h = jnp.einsum(one, x, p["experts"]["gate_up_proj"])
    h = jnp.einsum(two, jax.nn.relu(h), p["experts"]["down_proj"]).sum(1)
    return dense(p["out"], h)


# MultiheadAttention, with split and per-head kernels


def mha_params(name):
    w = base(name)
    flat = {}
    for i, n in enumerate(("query", "key", "value")):
        rows = slice(8 * i, 8 * i + 8)
        flat[f"attn/{n}/kernel"] = w["attn.in_proj_weight"][rows].T.reshape(8, 2, 4)
        flat[f"attn/{n}/bias"] = w["attn.in_proj_bias"][rows].reshape(2, 4)
    flat["attn/out/kernel"] = w["attn.out_proj.weight"].T.reshape(2, 4, 8)
    flat["attn/out/bias"] = w["attn.out_proj.bias"]
    flat["out/kernel"] = w["out.weight"].T
    flat["out/bias"] = w["out.bias"]
    return tree(flat)


MHA_MAPPING = {
    "attn.in_proj_weight": [f"attn/{n}/kernel" for n in ("query", "key", "value")],
    "attn.out_proj": "attn/out/kernel",
}


def mha(p, x):
    q, k, v = (
        jnp.einsum("bte,ehd->bthd", x, p["attn"][n]["kernel"]) + p["attn"][n]["bias"]
        for n in ("query", "key", "value")
    )
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / 2.0)
    h = jnp.einsum("bhts,bshd->bthd", weights, v)
    h = jnp.einsum("bthd,hde->bte", h, p["attn"]["out"]["kernel"]) + p["attn"]["out"]["bias"]
    return dense(p["out"], h)


# Llama: unrolled, or with stacked layers


def llama_params(name, scanned=False, fused=False):
    w = base(name)
    flat = {}
    for key, value in w.items():
        parts = key.split(".")
        last = "kernel" if value.ndim == 2 else "scale"
        last = "embedding" if "embed_tokens" in parts else last
        value = value.T if last == "kernel" else value
        flat["/".join([*parts[:-1], last])] = value
    if fused:
        flat = _fused(flat)
    if scanned:
        out = {}
        for key, value in flat.items():
            if ("layers/0/") in key:
                both = [value, flat[key.replace("layers/0/", "layers/1/")]]
                out[key.replace("layers/0/", "layers/")] = np.stack(both)
            elif "layers/1/" not in key:
                out[key] = value
        flat = out
    return tree(flat)


def _fused(flat):
    """q, k and v as one kernel (in, 32)."""
    out = {k: v for k, v in flat.items() if not re.search("[qkv]_proj", k)}
    for i in (0, 1):
        at = f"model/layers/{i}/self_attn/"
        kernels = [flat[f"{at}{n}_proj/kernel"] for n in "qkv"]
        out[at + "qkv/kernel"] = np.concatenate(kernels, axis=1)
    return out


def rms(p, x):
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6)
    return p["scale"] * y.astype(x.dtype)


def rotated(x):
    n, half = x.shape[1], x.shape[-1] // 2
    angle = jnp.arange(n, dtype=jnp.float32)[:, None] / 10000.0 ** (
        np.arange(half, dtype="f4") / half
    )
    cos, sin = (f(jnp.concatenate([angle, angle], -1))[None, :, None] for f in (jnp.cos, jnp.sin))
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], -1)
    return x * cos.astype(x.dtype) + turned * sin.astype(x.dtype)


def attention(q, k, v):
    mask = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1]).astype(q.dtype)
    scores = jnp.where(mask, scores.astype(jnp.float32), -1e30)
    weights = jax.nn.softmax(scores).astype(q.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(*q.shape[:2], -1)


def llama_layer(p, x):
    h = rms(p["input_layernorm"], x)
    a = p["self_attn"]
    if "qkv" in a:
        q, k, v = jnp.split(h @ a["qkv"]["kernel"], [16, 24], axis=-1)
    else:
        q, k, v = (dense(a[f"{n}_proj"], h) for n in "qkv")
    q, k, v = (y.reshape(*y.shape[:2], -1, 4) for y in (q, k, v))
    q, k = rotated(q), rotated(k)
    k, v = (jnp.repeat(y, 2, axis=2) for y in (k, v))
    x = x + dense(a["o_proj"], attention(q, k, v))
    h = rms(p["post_attention_layernorm"], x)
    m = p["mlp"]
    h = jax.nn.silu(dense(m["gate_proj"], h)) * dense(m["up_proj"], h)
    return x + dense(m["down_proj"], h)


def llama(p, ids):
    m = p["model"]
    x = m["embed_tokens"]["embedding"][ids]
    layers = m["layers"]
    if "0" in layers:
        for i in sorted(layers):
            x = llama_layer(layers[i], x)
    else:
        x, _ = jax.lax.scan(lambda x, p: (llama_layer(p, x), None), x, layers)
    return dense(p["lm_head"], rms(m["norm"], x)).astype(jnp.float32)


# GPT-2


def gpt2_params(name, split=False):
    w = base(name)
    flat = {}
    for key, value in w.items():
        parts = key.split(".")
        last = parts[-1]
        if last == "weight":
            last = "kernel" if "c_" in parts[-2] or parts[-2] == "lm_head" else "scale"
            last = "embedding" if parts[-2] in ("wte", "wpe") else last
        value = value.T if parts[0] == "lm_head" else value
        path = "/".join([*parts[:-1], last])
        if split and "c_attn" in path:
            for n, part in zip("qkv", np.split(value, 3, axis=-1)):
                flat[path.replace("c_attn", n)] = part
        else:
            flat[path] = value
    return tree(flat)


GPT2_SPLIT = {
    r"transformer\.h\.(\d)\.attn\.c_attn": [f"transformer/h/{{1}}/attn/{n}/kernel" for n in "qkv"]
}


def layer_norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def gpt2(p, ids):
    t = p["transformer"]
    x = t["wte"]["embedding"][ids] + t["wpe"]["embedding"][: ids.shape[1]]
    for i in sorted(t["h"]):
        b = t["h"][i]
        h = layer_norm(b["ln_1"], x)
        if "c_attn" in b["attn"]:
            q, k, v = jnp.split(dense(b["attn"]["c_attn"], h), 3, axis=-1)
        else:
            q, k, v = (dense(b["attn"][n], h) for n in "qkv")
        q, k, v = (y.reshape(*y.shape[:2], 2, 8) for y in (q, k, v))
        x = x + dense(b["attn"]["c_proj"], attention(q, k, v))
        h = layer_norm(b["ln_2"], x)
        h = jax.nn.gelu(dense(b["mlp"]["c_fc"], h), approximate=True)
        x = x + dense(b["mlp"]["c_proj"], h)
    return dense(p["lm_head"], layer_norm(t["ln_f"], x))
