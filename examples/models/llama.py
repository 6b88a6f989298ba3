"""Llama in Flax Linen: one layer, scanned; and a sampler. For weights see smollm2.py."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_layers: int = 30
    num_heads: int = 9
    num_kv_heads: int = 3
    rope_theta: float = 100_000.0
    norm_eps: float = 1e-5
    remat: bool = False  # recompute each layer in the backward pass
    dtype: jnp.dtype = jnp.float32  # of the activations; parameters are kept in float32


def rope(x, cos, sin):
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # the two halves rotate (HF's convention)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x, cos, sin, mask):
        c = self.config
        H = c.hidden_size // c.num_heads

        def heads(name, n):
            y = nn.Dense(n * H, use_bias=False, dtype=c.dtype, name=name)(x)
            return y.reshape(*y.shape[:-1], n, H)  # [B, T, n, H]

        q = rope(heads("q_proj", c.num_heads), cos, sin)
        k = rope(heads("k_proj", c.num_kv_heads), cos, sin)
        v = heads("v_proj", c.num_kv_heads)
        y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)  # k, v are shared
        y = y.reshape(*x.shape[:-1], c.num_heads * H)
        return nn.Dense(c.hidden_size, use_bias=False, dtype=c.dtype, name="o_proj")(y)


class MLP(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        dense = partial(nn.Dense, use_bias=False, dtype=c.dtype)
        gate = dense(c.intermediate_size, name="gate_proj")(x)
        up = dense(c.intermediate_size, name="up_proj")(x)
        return dense(c.hidden_size, name="down_proj")(nn.silu(gate) * up)


class Layer(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x, cos, sin, mask):
        norm = partial(nn.RMSNorm, epsilon=self.config.norm_eps, dtype=self.config.dtype)
        y = norm(name="input_layernorm")(x)
        x = x + Attention(self.config, name="self_attn")(y, cos, sin, mask)
        y = norm(name="post_attention_layernorm")(x)
        return x + MLP(self.config, name="mlp")(y), None  # (carry, nothing stacked)


class Llama(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, ids, mask=None, at=None):
        """ids [B, T] -> logits [B, T, V], or [B, V] at the positions at [B].

        mask [B, T] is False at padding on the left; padding on the right needs none.
        """
        c = self.config
        embed = nn.Embed(c.vocab_size, c.hidden_size, dtype=c.dtype, name="embed_tokens")
        H = c.hidden_size // c.num_heads
        freq = c.rope_theta ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
        angle = jnp.arange(ids.shape[1], dtype=jnp.float32)[:, None, None] * freq  # [T, 1, H/2]
        mask = None if mask is None else mask[:, None, None, :].astype(bool)  # over the keys

        layer = nn.remat(Layer, prevent_cse=False) if c.remat else Layer
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
        )
        x, _ = layers(c, name="layers")(embed(ids), jnp.cos(angle), jnp.sin(angle), mask)
        x = nn.RMSNorm(epsilon=c.norm_eps, dtype=c.dtype, name="norm")(x)
        x = x if at is None else x[jnp.arange(len(x)), at]
        return embed.attend(x)  # tied: x @ embedding.T


@partial(jax.jit, static_argnums=(0, 3))
def generate(apply, params, ids, n, key, temperature=0.0):
    """ids [B, T] -> [B, T+n]. Runs the full context for every token: for short texts only."""

    def step(t, ids):
        logits = apply({"params": params}, ids)[:, t - 1].astype(jnp.float32)  # [B, V]
        noise = jax.random.gumbel(jax.random.fold_in(key, t), logits.shape)
        return ids.at[:, t].set(jnp.argmax(logits + temperature * noise, axis=-1).astype(ids.dtype))

    T = ids.shape[1]
    return jax.lax.fori_loop(T, T + n, step, jnp.pad(ids, ((0, 0), (0, n))))
