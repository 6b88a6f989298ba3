"""Llama in Flax Linen: one layer, scanned; and samplers. For weights see smollm2.py."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

import lora_jax as lora


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
    def __call__(self, x, cos, sin, mask, cache, start):
        c = self.config
        H = c.hidden_size // c.num_heads

        def heads(name, n):
            y = nn.Dense(n * H, use_bias=False, dtype=c.dtype, name=name)(x)
            return y.reshape(*y.shape[:-1], n, H)  # [B, T, n, H]

        q = rope(heads("q_proj", c.num_heads), cos, sin)
        k = rope(heads("k_proj", c.num_kv_heads), cos, sin)
        v = heads("v_proj", c.num_kv_heads)
        if cache is not None:  # two of [B, S, n, H]: what is new goes to start, start + 1, …
            put = jax.lax.dynamic_update_slice_in_dim
            k, v = cache = tuple(put(old, new, start, 1) for old, new in zip(cache, (k, v)))
        causal = cache is None  # else the mask is
        y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal)  # k, v are shared
        y = y.reshape(*x.shape[:-1], c.num_heads * H)
        return nn.Dense(c.hidden_size, use_bias=False, dtype=c.dtype, name="o_proj")(y), cache


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
    def __call__(self, x, cos, sin, mask, start, cache):
        norm = partial(nn.RMSNorm, epsilon=self.config.norm_eps, dtype=self.config.dtype)
        y = norm(name="input_layernorm")(x)
        y, cache = Attention(self.config, name="self_attn")(y, cos, sin, mask, cache, start)
        x = x + y
        y = norm(name="post_attention_layernorm")(x)
        return x + MLP(self.config, name="mlp")(y), cache  # (carry, stacked)


class Llama(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, ids, mask=None, at=None, cache=None, start=0):
        """ids [B, T] -> logits [B, T, V], or [B, V] at the positions at [B].

        mask [B, T] is False at padding on the left; padding on the right needs none. With a cache,
        keys and values of [L, B, S, n, H], ids stand at start, start + 1, … and the result is
        (logits, cache); there is no padding then.
        """
        c = self.config
        embed = nn.Embed(c.vocab_size, c.hidden_size, dtype=c.dtype, name="embed_tokens")
        H = c.hidden_size // c.num_heads
        freq = c.rope_theta ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
        at_ = start + jnp.arange(ids.shape[1])
        angle = at_.astype(jnp.float32)[:, None, None] * freq  # [T, 1, H/2]
        mask = None if mask is None else mask[:, None, None, :].astype(bool)  # over the keys
        if cache is not None:
            mask = (jnp.arange(cache[0].shape[2]) <= at_[:, None])[None, None]  # [1, 1, T, S]

        layer = nn.remat(Layer, prevent_cse=False) if c.remat else Layer
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast, 0),
            length=c.num_layers,
        )
        rotation = jnp.cos(angle), jnp.sin(angle)
        x, new = layers(c, name="layers")(embed(ids), *rotation, mask, start, cache)
        x = nn.RMSNorm(epsilon=c.norm_eps, dtype=c.dtype, name="norm")(x)
        x = x if at is None else x[jnp.arange(len(x)), at]
        logits = embed.attend(x)  # tied: x @ embedding.T
        return logits if cache is None else (logits, new)


def empty_cache(config, batch, length):
    """Keys and values of [L, B, S, n, H]."""
    c = config
    shape = c.num_layers, batch, length, c.num_kv_heads, c.hidden_size // c.num_heads
    return jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype)


@partial(jax.jit, static_argnums=(0, 4))
def sample(apply, params, ids, cache, n, key, temperature=1.0):
    """ids [B, T] -> n more, [B, n], and the log-probability of each, [B, n], at this temperature.

    The cache holds T + n; it may be any tree that `apply(params, ids, cache=, start=)` takes.
    """

    def pick(t, logits):
        logits = logits[:, -1].astype(jnp.float32) / temperature
        new = jax.random.categorical(jax.random.fold_in(key, t), logits)[:, None]
        return new, jnp.take_along_axis(jax.nn.log_softmax(logits), new, -1)

    def step(state, t):
        (token, logp), cache = state
        logits, cache = apply({"params": params}, token, cache=cache, start=t)
        return (pick(t + 1, logits), cache), (token, logp)

    T = ids.shape[1]
    logits, cache = apply({"params": params}, ids, cache=cache)
    first = pick(T, logits)
    (last, _), rest = jax.lax.scan(step, (first, cache), T + jnp.arange(n - 1))
    rest = (jnp.concatenate([r[..., 0].T, x], 1) for r, x in zip(rest, last))
    return tuple(rest)


@partial(jax.jit, static_argnums=(0, 3))
def generate(apply, params, ids, n, key, temperature=0.0):
    """ids [B, T] -> [B, T+n]. Runs the full context for every token: for short texts only."""

    def step(t, ids):
        logits = apply({"params": params}, ids)[:, t - 1].astype(jnp.float32)  # [B, V]
        noise = jax.random.gumbel(jax.random.fold_in(key, t), logits.shape)
        return ids.at[:, t].set(jnp.argmax(logits + temperature * noise, axis=-1).astype(ids.dtype))

    T = ids.shape[1]
    return jax.lax.fori_loop(T, T + n, step, jnp.pad(ids, ((0, 0), (0, n))))


def mapping_of(params):
    """Hugging Face's names of the layers, which lie in one stack here."""
    table = {r"model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)": "layers/{2}/{3}/kernel[{1}]"}
    names = {}
    for block in ("self_attn", "mlp"):
        for name, leaf in params["layers"][block].items():
            layers, n_in, n_out = leaf["kernel"].shape
            names |= {
                f"model.layers.{i}.{block}.{name}.weight": (n_out, n_in) for i in range(layers)
            }
    targets = lora.LoRAConfig(
        rank=1,
        targets=["layers/*/kernel"],
        rules=[lora.Rule("layers/*", batch_axes=(0,), in_axes=(1,), out_axes=(2,))],
    )
    return lora.peft.mapping(names, params, lora.select(params, targets), mapping=table)
