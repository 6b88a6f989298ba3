"""`flax.nnx.LoRALinear`: the model written in NNX, its layers replaced by LoRA layers.

It has no alpha, so B is scaled on its way in.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from arms import JaxArm, NotApplicable


class Block(nnx.Module):
    def __init__(self, config, targets, rngs):
        c = self.config = config
        for name in ("norm_1", "norm_2"):
            setattr(self, name, nnx.RMSNorm(c.width, dtype=c.dtype, rngs=rngs))
        shapes = dict.fromkeys("qkvo", (c.width, c.width))
        shapes |= {"gate": (c.width, c.hidden), "up": (c.width, c.hidden)}
        shapes |= {"down": (c.hidden, c.width)}
        for name, shape in shapes.items():
            layer = nnx.Linear
            kwargs = dict(use_bias=False, dtype=c.dtype, rngs=rngs)
            if name in targets:
                layer = nnx.LoRALinear
                kwargs |= dict(lora_rank=c.rank, lora_dtype=c.dtype)
            setattr(self, name, layer(*shape, **kwargs))

    def __call__(self, x):
        split = lambda y: y.reshape(*y.shape[:2], self.config.heads, -1)
        y = self.norm_1(x)
        q, k, v = split(self.q(y)), split(self.k(y)), split(self.v(y))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.reshape(x.shape))
        y = self.norm_2(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Llama(nnx.Module):
    """llama.Llama, with the same names, so that its parameters fit."""

    def __init__(self, config, targets=(), rngs=None):
        c = self.config = config
        rngs = rngs or nnx.Rngs(0)
        self.embed = nnx.Embed(c.vocab, c.width, dtype=c.dtype, rngs=rngs)
        for i in range(c.layers):
            setattr(self, f"layer_{i}", Block(c, targets, rngs))
        self.norm = nnx.RMSNorm(c.width, dtype=c.dtype, rngs=rngs)
        self.head = nnx.Linear(c.width, c.vocab, use_bias=False, dtype=c.dtype, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        for i in range(self.config.layers):
            x = getattr(self, f"layer_{i}")(x)
        return self.head(self.norm(x)).astype(jnp.float32)


def build(setup):
    if setup.case.scan:
        raise NotApplicable("the scanned model is Linen's")
    config = setup.config
    model = Llama(config, setup.case.targets)
    graph, adapters, base = nnx.split(model, nnx.LoRAParam, ...)
    nnx.replace_by_pure_dict(base, setup.params)
    values = {
        (*path, "lora", f"lora_{k}"): x
        for path, ab in setup.adapters.items()
        for k, x in ab.items()
    }
    nnx.replace_by_pure_dict(adapters, traverse_util.unflatten_dict(values))

    def logits(adapters, base, ids):
        scale = lambda path, x: config.scale * x if "lora_b" in jax.tree_util.keystr(path) else x
        adapters = jax.tree_util.tree_map_with_path(scale, adapters)
        return nnx.merge(graph, adapters, base)(ids)

    return JaxArm(setup, logits, adapters, base)
