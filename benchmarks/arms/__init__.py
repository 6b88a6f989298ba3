"""The arms: ways to train, or run, the same model with the same adapters.

Each is a module of this package with a function `build(setup) -> Arm`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Protocol

import jax
import llama
import optax

LEARNING_RATE = 1e-3
# {arm: what pip installs for it}, in the order of the tables
ARMS = {
    "hand": "",
    "floor": "",
    "full": "",
    "merge_autodiff": "",
    "ours_auto": "",
    "ours_factored": "",
    "ours_merged": "",
    "ours_dora": "",
    "qwix": "qwix==0.1.8",
    "quax": "quax==0.4.6",
    "nnx_lora": "",
    "peft": "torch==2.13.0 peft==0.21.2",
}


class NotApplicable(Exception):
    """The case does not exist for this arm."""


class Arm(Protocol):
    """What is measured.

    Attributes:
      comparable: whether its losses are to equal those of `hand`.
      cost: XLA's own figures of the training step, which count the body of a loop once; empty
        where there is no XLA.
      forwards: {"plain", "unmerged", "merged": a function of tokens}; what there is of them.
    """

    comparable: bool
    cost: dict[str, float]
    forwards: dict[str, Callable[[jax.Array], Any]]

    def step(self) -> float:
        """One training step, waited for; its loss, before the update."""


def build(name: str, setup) -> Arm:
    return importlib.import_module(f"arms.{name}").build(setup)


def missing(name: str) -> str:
    """What to install for the arm; empty if it is there."""
    try:
        importlib.import_module(f"arms.{name}")
    except ModuleNotFoundError:
        if ARMS[name]:
            return ARMS[name]
        raise
    return ""


class JaxArm:
    """An arm from `logits(trained, frozen, ids)`: the rest is the same for all of JAX."""

    def __init__(self, setup, logits, trained, frozen, merged=None, comparable=True, tx=None):
        self.comparable = comparable
        self._tx = tx or optax.adamw(LEARNING_RATE)
        self._logits, self._frozen, self._ids = logits, frozen, setup.ids
        self._trained, self._state = trained, self._tx.init(trained)
        forward = jax.jit(logits)
        self.forwards = {"unmerged": lambda ids: forward(trained, frozen, ids)}
        if merged is not None:
            plain = jax.jit(lambda params, ids: setup.model.apply({"params": params}, ids))
            self.forwards["merged"] = lambda ids: plain(merged, ids)
            self.forwards["plain"] = lambda ids: plain(setup.params, ids)

    def _update(self, trained, state, frozen, ids):
        loss = lambda trained: llama.loss(self._logits(trained, frozen, ids), ids)
        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = self._tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    @functools.cached_property
    def _compiled(self):
        args = self._trained, self._state, self._frozen, self._ids
        return jax.jit(self._update).lower(*args).compile()

    def step(self):
        outs = self._compiled(self._trained, self._state, self._frozen, self._ids)
        self._trained, self._state, value = jax.block_until_ready(outs)
        return float(value)

    @property
    def cost(self):
        cost = self._compiled.cost_analysis()
        memory = self._compiled.memory_analysis()
        return {
            "flops": cost["flops"],
            "bytes": cost["bytes accessed"],
            "temp": memory.temp_size_in_bytes,
        }
