"""The models of tests/data/bases in Flax: Linen, scanned or not, and NNX."""

import dataclasses
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from golden_models import attention, rms, rotated, tensors
from models import bert

BASES = pathlib.Path(__file__).parent.parent / "data" / "bases"


def inputs(name):
    """(input, what torch gives for it)."""
    io = tensors(BASES / f"{name}_io.safetensors")
    x = io["x"]
    return jnp.asarray(x.astype(np.int32) if x.dtype == np.int64 else x), io["y"]


def settings(name):
    return json.loads((BASES / name / "config.json").read_text())


def heads(x, n):
    return x.reshape(*x.shape[:-1], n, -1)


def causal(q, k, v):
    """[B, T, H, K], of which k and v may have fewer heads -> [B, T, H·K]."""
    q, k = rotated(q), rotated(k)
    return attention(q, *(jnp.repeat(y, q.shape[2] // y.shape[2], 2) for y in (k, v)))


# ---------------------------------------------------------------- Llama, Mixtral and Qwen3-MoE
@dataclasses.dataclass(frozen=True)
class Config:
    tied: bool = False
    bias: bool = False
    scan: bool = False
    experts: str = ""  # "mixtral" or "qwen"
    kernels: bool = False  # with an axis of heads


class RMSNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return rms({"scale": self.param("scale", nn.initializers.ones, x.shape[-1:])}, x)


class Attention(nn.Module):
    c: Config

    @nn.compact
    def __call__(self, x):
        qwen = self.c.experts == "qwen"
        n, size = (4, 8) if qwen else (4, 4)

        def project(name, n):
            if self.c.kernels:
                return nn.DenseGeneral((n, size), use_bias=self.c.bias, name=name)(x)
            return heads(nn.Dense(n * size, use_bias=self.c.bias, name=name)(x), n)

        q, k, v = project("q_proj", n), project("k_proj", 2), project("v_proj", 2)
        if qwen:
            q, k = RMSNorm(name="q_norm")(q), RMSNorm(name="k_norm")(k)
        y = causal(q, k, v)
        if self.c.kernels:
            y, axes = heads(y, n), (-2, -1)
            return nn.DenseGeneral(x.shape[-1], axes, use_bias=self.c.bias, name="o_proj")(y)
        return nn.Dense(x.shape[-1], use_bias=self.c.bias, name="o_proj")(y)


class MLP(nn.Module):
    width: int
    bias: bool = False
    names: tuple = ("gate_proj", "up_proj", "down_proj")

    @nn.compact
    def __call__(self, x):
        gate, up, down = self.names
        dense = lambda n, name: nn.Dense(n, use_bias=self.bias, name=name)
        y = nn.silu(dense(self.width, gate)(x)) * dense(self.width, up)(x)
        return dense(x.shape[-1], down)(y)


class Experts(nn.Module):
    """Each expert at all tokens, those that are not chosen with weight 0."""

    width: int
    names: tuple

    @nn.compact
    def __call__(self, x):
        logits = nn.Dense(4, use_bias=False, name="gate")(x)  # [B, T, E]
        p, chosen = jax.lax.top_k(jax.nn.softmax(logits), 2)
        share = (jax.nn.one_hot(chosen, 4) * (p / p.sum(-1, keepdims=True))[..., None]).sum(-2)
        each = nn.vmap(MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None,
                       out_axes=0, axis_size=4)  # fmt: skip
        y = each(self.width, names=self.names, name="experts")(x)  # [E, B, T, D]
        return jnp.einsum("ebtd,bte->btd", y, share)


class Layer(nn.Module):
    c: Config

    @nn.compact
    def __call__(self, x, _=None):
        x = x + Attention(self.c, name="self_attn")(RMSNorm(name="input_layernorm")(x))
        y = RMSNorm(name="post_attention_layernorm")(x)
        if self.c.experts == "mixtral":
            return x + Experts(24, ("w1", "w3", "w2"), name="block_sparse_moe")(y), None
        if self.c.experts:
            return x + Experts(8, MLP.names, name="mlp")(y), None
        return x + MLP(24, self.c.bias, name="mlp")(y), None


class Llama(nn.Module):
    c: Config = Config()

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(64, 16, name="embed_tokens")
        x = embed(ids)
        if self.c.scan:
            layers = nn.scan(
                Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            x, _ = layers(self.c, name="layers")(x, None)
        else:
            for i in range(2):
                x, _ = Layer(self.c, name=f"layers_{i}")(x)
        x = RMSNorm(name="norm")(x)
        return embed.attend(x) if self.c.tied else nn.Dense(64, use_bias=False, name="lm_head")(x)


class NNXLayer(nnx.Module):
    def __init__(self, bias, rngs):
        dense = lambda i, o: nnx.Linear(i, o, use_bias=bias, rngs=rngs)
        norm = lambda: nnx.RMSNorm(16, rngs=rngs)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.self_attn = nnx.Dict(
            q_proj=dense(16, 16), k_proj=dense(16, 8), v_proj=dense(16, 8), o_proj=dense(16, 16)
        )
        self.mlp = nnx.Dict(gate_proj=dense(16, 24), up_proj=dense(16, 24), down_proj=dense(24, 16))

    def __call__(self, x):
        y, a, m = self.input_layernorm(x), self.self_attn, self.mlp
        q, k, v = (heads(p(y), n) for p, n in ((a.q_proj, 4), (a.k_proj, 2), (a.v_proj, 2)))
        x = x + a.o_proj(causal(q, k, v))
        y = self.post_attention_layernorm(x)
        return x + m.down_proj(nnx.silu(m.gate_proj(y)) * m.up_proj(y))


class NNXLlama(nnx.Module):
    def __init__(self, tied=False, bias=False, *, rngs):
        self.embed_tokens = nnx.Embed(64, 16, rngs=rngs)
        self.layers = nnx.List([NNXLayer(bias, rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(16, rngs=rngs)
        self.lm_head = None if tied else nnx.Linear(16, 64, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return self.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x)


# ---------------------------------------------------------------- GPT-2
class GPT2Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm(1e-5, name="ln_1")(x)
        q, k, v = (heads(z, 2) for z in jnp.split(nn.Dense(48, name="c_attn")(y), 3, -1))
        x = x + nn.Dense(16, name="c_proj")(attention(q, k, v))
        y = nn.LayerNorm(1e-5, name="ln_2")(x)
        return x + nn.Dense(16, name="mlp_c_proj")(nn.gelu(nn.Dense(64, name="c_fc")(y))), None


class GPT2(nn.Module):
    scan: bool = False

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(48, 16, name="wte")
        x = embed(ids) + nn.Embed(16, 16, name="wpe")(jnp.arange(ids.shape[1]))
        if self.scan:
            blocks = nn.scan(
                GPT2Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            x, _ = blocks(name="h")(x, None)
        else:
            for i in range(2):
                x, _ = GPT2Block(name=f"h_{i}")(x)
        return embed.attend(nn.LayerNorm(1e-5, name="ln_f")(x))


GPT2_NAMES = {r"\.attn": "", r"\.mlp\.c_fc": ".c_fc", r"\.mlp\.": ".mlp_"}


# ---------------------------------------------------------------- ViT
class ViTLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm(1e-12, name="layernorm_before")(x)
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(y)
        y = nn.LayerNorm(1e-12, name="layernorm_after")(x)
        y = nn.gelu(nn.Dense(24, name="intermediate")(y), approximate=False)
        return x + nn.Dense(16, name="output")(y), None


class ViT(nn.Module):
    scan: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (4, 4), 4, name="patch_embeddings")(x.transpose(0, 2, 3, 1))
        x = x.reshape(x.shape[0], -1, 16)
        token = self.param("cls_token", nn.initializers.zeros, (1, 1, 16))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 16)), x], 1)
        x += self.param("position_embeddings", nn.initializers.zeros, (1, 5, 16))
        if self.scan:
            layers = nn.scan(
                ViTLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            x, _ = layers(name="layer")(x, None)
        else:
            for i in range(2):
                x, _ = ViTLayer(name=f"layer_{i}")(x)
        return nn.Dense(3, name="classifier")(nn.LayerNorm(1e-12, name="layernorm")(x)[:, 0])


VIT_NAMES = {
    r"^vit\.(embeddings\.|encoder\.)?": "",
    r"\.projection": "",
    r"attention\.attention": "attention",
    r"attention\.output": "attention.out",
    r"\.dense": "",
}


BERT_CONFIG = bert.BertConfig(40, 16, 2, 4, 24, 12)


class Bert(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return bert.Bert(BERT_CONFIG, name="bert")(ids, jnp.ones_like(ids))
