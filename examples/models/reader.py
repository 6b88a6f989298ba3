"""A small transformer in Flax Linen that reads images of 8×8 pixels, row by row."""

import flax.linen as nn


class Reader(nn.Module):
    """(N, 8, 8) -> (N, 10)."""

    width: int = 64
    layers: int = 2

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="embed")(x)  # [N, 8, D]
        x += self.param("position", nn.initializers.normal(0.02), x.shape[1:])
        for i in range(self.layers):
            x = Block(name=f"layers_{i}")(x)
        return nn.Dense(10, name="head")(nn.LayerNorm(name="norm")(x).mean(1))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x += nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(4 * x.shape[-1], name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1], name="down")(y)
