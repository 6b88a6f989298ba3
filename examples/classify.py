"""One epoch of fine-tuning, whatever is trained; a linear probe; and predictions.

Each has a bar that counts tokens, padding left out. It says while XLA compiles, and its clock
starts after that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
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
    tokens: int  # per second, compilation left out
    memory: int  # bytes: arguments, results and temporaries of the compiled step


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@contextlib.contextmanager
def compiled(name: str, f: Callable, batches: Batches, *args):
    """({shape of ids: f(*args, *batch) compiled for it}, a bar): `bar.update(mask.sum())`."""
    tokens = sum(int(mask.sum()) for _, mask, _ in batches)
    with tqdm(total=tokens, desc=f"{name}: compiling…", unit=" tokens", unit_scale=True) as bar:
        one = {batch[0].shape: batch for batch in batches}
        lowered = [jax.jit(f).lower(*args, *batch) for batch in one.values()]
        with ThreadPoolExecutor() as pool:  # all lengths at once; what JAX has compiled, it keeps
            fs = dict(zip(one, pool.map(lambda f: f.compile(), lowered)))
        bar.set_description(name, refresh=False)
        bar.reset()
        yield fs, bar


def fit(name: str, arm: Arm, params, batches: Batches, rate: float) -> Trained:
    """One epoch of AdamW, a tenth of it warm-up, then a cosine to zero."""
    n = len(batches)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, n // 10, n)
    tx = optax.adamw(schedule, weight_decay=0.01)

    def step(tree, state, params, ids, mask, labels):
        loss = lambda tree: cross_entropy(arm.logits(params, tree, ids, mask), labels)
        value, grads = jax.value_and_grad(loss)(tree)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, value

    tree, state, losses = arm.trained, tx.init(arm.trained), []
    with compiled(name, step, batches, tree, state, params) as (steps, bar):
        for batch in batches:
            tree, state, value = steps[batch[0].shape](tree, state, params, *batch)
            losses.append(float(value))
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update(int(batch[1].sum()))
        tokens = round(bar.n / bar.format_dict["elapsed"])
    return Trained(tree, losses, tokens, max(map(_memory, steps.values())))


def _memory(compiled) -> int:
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes


def fit_probe(head, x, y, rate: float, updates=200):
    """Adam on a linear head over features x [N, D], labels y [N]: the whole set a step."""
    tx = optax.adam(rate)

    def step(carry, _):
        tree, state = carry
        grads = jax.grad(lambda h: cross_entropy(x @ h["kernel"] + h["bias"], y))(tree)
        changes, state = tx.update(grads, state)
        return (optax.apply_updates(tree, changes), state), None

    (head, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=updates))((head, tx.init(head)))
    return head


def over(name: str, f: Callable, params, batches: Batches) -> np.ndarray:
    """f(params, ids, mask, labels) of all batches, one after another."""
    out = []
    with compiled(name, f, batches, params) as (fs, bar):
        for batch in batches:
            out.append(jax.device_get(fs[batch[0].shape](params, *batch)))
            bar.update(int(batch[1].sum()))
    return np.concatenate(out)


def predict(name: str, apply: Callable, params, batches: Batches) -> np.ndarray:
    """The classes that a model's `apply` finds most likely."""
    classes = lambda p, ids, mask, _: apply({"params": p}, ids, mask).argmax(-1)
    return over(name, classes, params, batches)


def labels_of(batches: Batches) -> np.ndarray:
    return np.concatenate([labels for *_, labels in batches])
