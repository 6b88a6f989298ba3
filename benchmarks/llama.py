"""A Llama-style Linen model, plain or with LoRA written into its modules by hand.

The hand-written variant is what a careful person writes: x·W + scale·(x·A)·B in each dense layer,
A and B in a collection of their own.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

ALL = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Config:
    vocab: int = 256
    width: int = 128
    hidden: int = 352
    heads: int = 4
    layers: int = 2
    scan: bool = False
    unroll: int = 1  # layers in the body of the scan
    activations: jax.sharding.Sharding | None = None  # of what passes between layers
    dtype: jnp.dtype = jnp.float32
    by_hand: tuple[str, ...] = ()  # the layers with LoRA written in
    rank: int = 16
    scale: float = 2.0


def constrained(x, config):
    where = config.activations
    return x if where is None else jax.lax.with_sharding_constraint(x, where)


class Dense(nn.Module):
    features: int
    config: Config

    @nn.compact
    def __call__(self, x):
        c = self.config
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        x = x.astype(c.dtype)
        y = jnp.dot(x, kernel.astype(c.dtype))  # not `@`, which qwix does not intercept
        if self.name in c.by_hand:
            a = self.variable("lora", "a", jnp.zeros, (x.shape[-1], c.rank)).value
            b = self.variable("lora", "b", jnp.zeros, (c.rank, self.features)).value
            y = y + c.scale * ((x @ a.astype(c.dtype)) @ b.astype(c.dtype))
        return y


class Block(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, _=None):
        c = self.config
        dense = lambda n, name: Dense(n, c, name=name)
        split = lambda y: y.reshape(*y.shape[:2], c.heads, -1)
        y = nn.RMSNorm(dtype=c.dtype, name="norm_1")(x)
        q, k, v = (split(dense(c.width, n)(y)) for n in "qkv")
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + dense(c.width, "o")(y.reshape(x.shape))
        y = nn.RMSNorm(dtype=c.dtype, name="norm_2")(x)
        y = nn.silu(dense(c.hidden, "gate")(y)) * dense(c.hidden, "up")(y)
        return constrained(x + dense(c.width, "down")(y), c), None


class Llama(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, ids):
        c = self.config
        x = nn.Embed(c.vocab, c.width, dtype=c.dtype, name="embed")(ids)
        x = constrained(x, c)
        if c.scan:
            stack = nn.scan(
                nn.remat(Block, prevent_cse=False),
                length=c.layers,
                unroll=c.unroll,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
            )
            x, _ = stack(c, name="layers")(x)
        else:
            for i in range(c.layers):
                x, _ = Block(c, name=f"layer_{i}")(x)
        x = nn.RMSNorm(dtype=c.dtype, name="norm")(x)
        return Dense(c.vocab, c, name="head")(x).astype(jnp.float32)


def loss(logits, ids):
    """Mean cross-entropy of the next token."""
    logp = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logp, ids[:, 1:, None], axis=-1).mean()
