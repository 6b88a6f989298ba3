"""The arms of benchmarks/methods.py: ways to train one model, each a start and an optimiser."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import optax

import lora_jax as lora

RANK, QV = 8, ("query", "value")


class Arm(NamedTuple):
    """One way to train.

    Attributes:
      start: (task, seed) -> (base, trained, frozen); where trained is the parameters, base is not
        read.
      tx: (learning rate, number of steps, task) -> an optimiser.
      rate: the middle of the sweep.
      penalty: of the trained tree, added to the loss.
      fixed: labels of arrays in the trained tree that the optimiser leaves as they are.
    """

    start: Callable[[SimpleNamespace, int], tuple[Any, Any, Any]]
    tx: Callable[[Any, int, SimpleNamespace], optax.GradientTransformation]
    rate: float
    penalty: Callable[[Any], Any] | None = None
    fixed: tuple[str, ...] = ()


def config(rank=RANK, targets=QV) -> lora.LoRAConfig:
    """Scale 2, and the classifier in full."""
    head = ["classifier/kernel", "classifier/bias"]
    return lora.LoRAConfig(rank=rank, alpha=2 * rank, targets=targets, full=head)


def plain(rank=RANK):
    def start(task, seed):
        params = task.params(seed)
        return params, lora.init(jax.random.key(seed), params, config(rank), task.survey), {}

    return start


def only(**own):
    """No factors: leaves that are trained in full."""

    def start(task, seed):
        params = task.params(seed)
        own_config = lora.LoRAConfig(rank=1, targets=(), **own)
        return params, lora.init(jax.random.key(seed), params, own_config, task.survey), {}

    return start


def whole(task, seed):
    return {}, task.params(seed), {}


def dora(task, seed):
    params, adapters, _ = plain()(task, seed)
    return params, lora.methods.dora(params, adapters), {}


def with_frozen(init, **own):
    def start(task, seed):
        params = task.params(seed)
        return params, *init(jax.random.key(seed), params, config(**own), task.survey)

    return start


def new_base(init):
    """`init` of (parameters, adapters, task) gives (base', adapters)."""

    def start(task, seed):
        params, adapters, _ = plain()(task, seed)
        return *init(params, adapters, task), {}

    return start


def same_base(init):
    def start(task, seed):
        params, adapters, _ = plain()(task, seed)
        return params, init(params, adapters, task, jax.random.key(seed + 100)), {}

    return start


adam = lambda rate, *_: optax.adam(rate)


def before_adam(tx):
    return lambda rate, *_: optax.chain(tx, optax.adam(rate))


def adalora(rate, steps, task):
    return lora.optim.adalora(
        optax.adam(rate), target_rank=RANK, steps=steps, tinit=steps // 8, tfinal=steps // 2,
        interval=max(steps // 16, 1),
    )  # fmt: skip


# name -> arm
ARMS = {
    "full fine-tuning": Arm(whole, adam, 3e-4),
    "GaLore": Arm(
        whole,
        lambda rate, steps, task: lora.optim.galore(rate, rank=64, targets=task.linears),
        1e-3,
    ),
    "head only": Arm(only(full=["classifier/kernel", "classifier/bias"]), adam, 1e-2),
    "BitFit": Arm(only(full="classifier/kernel", bias="all"), adam, 3e-3),
    "LoRA": Arm(plain(), adam, 3e-3),
    "LoRA+": Arm(plain(), lambda rate, *_: lora.optim.lora_plus(optax.adam, rate, ratio=4), 2e-3),
    "LoRA-FA": Arm(
        plain(2 * RANK), lambda rate, *_: lora.optim.lora_fa(optax.adam(rate)), 3e-3, fixed=("a",)
    ),
    "DoRA": Arm(dora, adam, 3e-3),
    "VeRA": Arm(
        with_frozen(functools.partial(lora.methods.init_vera, rank=1472), targets="all-linear"),
        adam,
        1e-2,
    ),
    "LoRA-XS": Arm(with_frozen(lora.methods.init_lora_xs, rank=78), adam, 1e-3),
    "AdaLoRA": Arm(
        with_frozen(lambda *args: (lora.methods.init_adalora(*args), {}), rank=RANK * 3 // 2),
        adalora,
        1e-2,
        lambda trained: 1e-3 * lora.methods.orthogonality(trained),
    ),
    "PiSSA": Arm(new_base(lambda p, ad, task: lora.methods.pissa(p, ad)), adam, 1e-3),
    "OLoRA": Arm(new_base(lambda p, ad, task: lora.methods.olora(p, ad)), adam, 1e-3),
    "CorDA": Arm(
        new_base(lambda p, ad, task: lora.methods.corda(p, ad, task.moments(), mode="instruction")),
        adam,
        1e-3,
    ),
    "LoRA-GA": Arm(
        new_base(lambda p, ad, task: lora.methods.lora_ga(p, ad, task.gradients(p))), adam, 1e-3
    ),
    "LoRA-One": Arm(
        same_base(lambda p, ad, task, _: lora.methods.lora_one(ad, task.gradients(p))),
        adam,
        3e-3,
    ),
    "EVA": Arm(
        same_base(lambda p, ad, task, _: lora.methods.eva(ad, task.moments(), rho=1)), adam, 3e-3
    ),
    "orthogonal": Arm(
        same_base(lambda p, ad, task, key: lora.methods.orthogonal(key, ad)), adam, 3e-3
    ),
    "Riemannian": Arm(plain(), before_adam(lora.optim.riemannian(1e-2)), 3e-3),
    "LoRA-Pro": Arm(plain(), before_adam(lora.optim.lora_pro()), 3e-3),
    "LoRA-RITE": Arm(plain(), lambda rate, *_: lora.optim.lora_rite(rate), 3e-3),
    "LoRA-Muon": Arm(
        plain(), lambda rate, *_: lora.optim.lora_muon(rate, other=optax.adam(3e-3)), 1e-1
    ),
}  # fmt: skip
