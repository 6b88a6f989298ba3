"""One epoch of fine-tuning, whatever is trained; a linear probe; and accuracy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

Batches = list  # of (ids [B, L], mask [B, L], labels [B]), in a few lengths L


class Arm(NamedTuple):
    """One way to train: the trained tree, its logits, and the plain parameters it ends in."""

    trained: Any
    logits: Callable  # (params, trained, ids, mask) -> [B, classes]
    finish: Callable  # (params, trained) -> params


class Trained(NamedTuple):
    tree: Any
    losses: list[float]
    seconds: float  # per step, compilation left out
    memory: int  # bytes: arguments, results and temporaries of the compiled step


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def fit(name: str, arm: Arm, params, batches: Batches, rate: float) -> Trained:
    """One epoch of AdamW, a tenth of it warm-up, then linearly to zero."""
    n = len(batches)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, n // 10, n)
    tx = optax.adamw(schedule, weight_decay=0.01)

    def step(tree, state, params, ids, mask, labels):
        loss = lambda tree: cross_entropy(arm.logits(params, tree, ids, mask), labels)
        value, grads = jax.value_and_grad(loss)(tree)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, value

    tree, state = arm.trained, tx.init(arm.trained)
    lower = jax.jit(step).lower
    steps = {b[0].shape: lower(tree, state, params, *b) for b in batches}
    steps = {shape: lowered.compile() for shape, lowered in steps.items()}
    losses, start = [], time.perf_counter()
    for batch in tqdm(batches, desc=f"{name:16}"):
        tree, state, value = steps[batch[0].shape](tree, state, params, *batch)
        losses.append(float(value))
    seconds = (time.perf_counter() - start) / n
    return Trained(tree, losses, seconds, max(map(_memory, steps.values())))


def _memory(compiled) -> int:
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes


def fit_probe(
    encode: Callable, params, head, batches: Batches, rate: float, updates=200
) -> Trained:
    """Adam on a linear head over frozen features, which are computed once: the whole set a step."""
    encode = jax.jit(encode)  # (params, ids, mask) -> [B, D]
    x = jnp.concatenate([encode(params, ids, mask) for ids, mask, _ in tqdm(batches, "probe")])
    y = np.concatenate([labels for *_, labels in batches])
    tx = optax.adam(rate)

    def step(tree, state, x, y):
        loss = lambda h: cross_entropy(x @ h["kernel"] + h["bias"], y)
        value, grads = jax.value_and_grad(loss)(tree)
        changes, state = tx.update(grads, state)
        return optax.apply_updates(tree, changes), state, value

    tree, state, losses = head, tx.init(head), []
    compiled = jax.jit(step).lower(tree, state, x, y).compile()
    start = time.perf_counter()
    for _ in range(updates):
        tree, state, value = compiled(tree, state, x, y)
        losses.append(float(value))
    return Trained(tree, losses, (time.perf_counter() - start) / updates, _memory(compiled))


def predict(apply: Callable, params, batches: Batches):
    """(predictions, labels) of a function (params, ids, mask) -> logits."""
    run = jax.jit(lambda params, ids, mask: apply({"params": params}, ids, mask).argmax(-1))
    found = [run(params, ids, mask) for ids, mask, _ in batches]
    return np.concatenate(found), np.concatenate([labels for *_, labels in batches])


def accuracy(apply: Callable, params, batches: Batches) -> float:
    found, labels = predict(apply, params, batches)
    return float((found == labels).mean())
