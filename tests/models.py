"""Models in the styles that people write them in: Linen, NNX, and bare functions of arrays."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

VOCAB, WIDTH, WIDE = 50, 16, 24


class Block(nn.Module):
    """A pre-norm transformer block, shaped for nn.scan: (carry, input) -> (carry, output)."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(nn.LayerNorm()(x))
        h = nn.gelu(nn.Dense(WIDE, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH, name="down")(h), None


class Transformer(nn.Module):
    """Two blocks, in a loop or as one scanned and rematerialised block; the head is the embedding."""

    scanned: bool = False

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(VOCAB, WIDTH, name="embed")
        x = embed(ids)
        if self.scanned:
            layers = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            x, _ = layers(name="layers")(x, None)
        else:
            for i in range(2):
                x, _ = Block(name=f"layer_{i}")(x)
        return embed.attend(nn.LayerNorm()(x))


class ConvNet(nn.Module):
    """Convolution, depthwise convolution, batch norm, dropout; `features` is a second method."""

    @nn.compact
    def __call__(self, x, train=True):
        return nn.Dense(3, name="head")(self.features(x, train))

    @nn.compact
    def features(self, x, train=True):
        x = nn.Conv(8, (3, 3), strides=2, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Conv(16, (3, 3), feature_group_count=8, name="depthwise")(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.3, deterministic=not train)(x)
        return nn.gelu(nn.Conv(8, (1, 1), name="pointwise")(x)).mean((1, 2))


class Experts(nn.Module):
    """Three experts made by nn.vmap, summed, and a head; each has its own input, or all have one."""

    shared: bool = False

    @nn.compact
    def __call__(self, x):
        experts = nn.vmap(
            nn.Dense,
            in_axes=None if self.shared else 0,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            axis_size=3,
        )
        x = x if self.shared else jnp.stack([x, -x, 2 * x])
        return nn.Dense(3, name="head")(nn.tanh(experts(8, name="experts")(x)).sum(0))


class NnxBlock(nnx.Module):
    """A pre-norm block with a convolution."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.conv = nnx.Conv(WIDTH, WIDE, (3,), rngs=rngs)
        self.drop = nnx.Dropout(0.1, deterministic=True, rngs=rngs)
        self.down = nnx.Linear(WIDE, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.drop(self.down(nnx.gelu(self.conv(x))))


class NnxTransformer(nnx.Module):
    """Two blocks, in a loop or stacked by nnx.vmap and run by nnx.scan and nnx.remat."""

    def __init__(self, rngs: nnx.Rngs, scanned: bool = False):
        self.scanned = scanned
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        if scanned:
            self.layers = nnx.split_rngs(splits=2)(nnx.vmap(NnxBlock))(rngs)
        else:
            self.layers = nnx.List([NnxBlock(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        if self.scanned:
            step = nnx.remat(lambda x, block: block(x))
            x = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        else:
            for block in self.layers:
                x = block(x)
        return self.head(x)
