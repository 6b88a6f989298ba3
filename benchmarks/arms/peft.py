"""PyTorch and PEFT: the model written in torch, wrapped by `get_peft_model`, run eagerly.

Not JAX, so that its time says what the whole stack costs. It has CUDA where JAX has it too.
"""

from __future__ import annotations

import os

import jax
import numpy as np
import peft
import torch
import torch.nn.functional as F
from flax import traverse_util
from torch import nn

from arms import LEARNING_RATE, NotApplicable


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        linear = lambda n, m: nn.Linear(n, m, bias=False)
        self.norm_1, self.norm_2 = (nn.RMSNorm(c.width, eps=1e-6) for _ in range(2))
        self.q, self.k, self.v, self.o = (linear(c.width, c.width) for _ in range(4))
        self.gate, self.up = (linear(c.width, c.hidden) for _ in range(2))
        self.down = linear(c.hidden, c.width)

    def forward(self, x):
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        y = self.norm_1(x)
        q, k, v = split(self.q(y)), split(self.k(y)), split(self.v(y))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm_2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """llama.Llama, with the same names."""

    def __init__(self, c):
        super().__init__()
        self.embed = nn.Embedding(c.vocab, c.width)
        self.layers = [f"layer_{i}" for i in range(c.layers)]
        for name in self.layers:
            self.add_module(name, Block(c))
        self.norm = nn.RMSNorm(c.width, eps=1e-6)
        self.head = nn.Linear(c.width, c.vocab, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for name in self.layers:
            x = getattr(self, name)(x)
        return self.head(self.norm(x)).float()


def _tensor(x):
    return torch.from_numpy(np.array(x, np.float32))


class PeftArm:
    comparable = True
    cost = {}  # noqa: RUF012

    def __init__(self, setup):
        self._setup = setup
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = self._adapted()
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimiser = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=1e-4, fused=True)
        self._ids = self._tokens(setup.ids)
        self.forwards = {
            "plain": self._forward(self._base()),
            "unmerged": self._forward(self._adapted()),
            "merged": self._forward(self._adapted().merge_and_unload()),
        }

    def _tokens(self, ids):
        return torch.from_numpy(np.array(ids)).long().to(self._device)

    def _base(self):
        model = Llama(self._setup.config)
        state = {}
        for path, x in traverse_util.flatten_dict(self._setup.params).items():
            x = _tensor(x)
            state[".".join(path[:-1]) + ".weight"] = x.T if path[-1] == "kernel" else x
        model.load_state_dict(state)
        bf16 = self._setup.config.dtype == jax.numpy.bfloat16
        return model.to(self._device, torch.bfloat16 if bf16 else torch.float32)

    def _adapted(self):
        setup = self._setup
        config = peft.LoraConfig(
            r=setup.case.rank,
            lora_alpha=setup.config.scale * setup.case.rank,
            target_modules=list(setup.case.targets),
        )
        model = peft.get_peft_model(self._base(), config)
        modules = dict(model.base_model.model.named_modules())
        with torch.no_grad():
            for path, ab in setup.adapters.items():
                layer = modules[".".join(path)]
                layer.lora_A["default"].weight.copy_(_tensor(ab["a"]).T)
                layer.lora_B["default"].weight.copy_(_tensor(ab["b"]).T)
        return model

    def _forward(self, model):
        cache = {}

        @torch.inference_mode()
        def forward(ids):
            if id(ids) not in cache:  # the copy of the tokens is not part of the forward pass
                cache[id(ids)] = self._tokens(ids)
            out = model(cache[id(ids)])
            return out if self._device == "cpu" else torch.cuda.synchronize()

        return forward

    def step(self):
        logits = self._model(self._ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), self._ids[:, 1:].flatten())
        loss.backward()
        self._optimiser.step()
        self._optimiser.zero_grad()
        return loss.item()


def build(setup):
    if setup.case.scan:
        raise NotApplicable("torch has no scan")
    if jax.default_backend() != "cpu" and not torch.cuda.is_available():
        raise NotApplicable("torch has no accelerator here")
    torch.set_num_threads(os.cpu_count())
    return PeftArm(setup)
