"""Our training step and the one with LoRA written into the modules by hand, as a pair.

For the tests, which compare XLA's own figures of the two, and for the time to trace and lower them.
"""

from __future__ import annotations

import dataclasses
import gc
import time

import jax
import jax.numpy as jnp
import llama
import numpy as np

import lora_jax as lora

CASES = {
    "q,v r=8": (("q", "v"), 8),
    "all linears r=16": (llama.ALL, 16),
}


def steps(targets, rank, tokens=(2, 512), **kwargs):
    """(our step, its arguments), (the hand-written one, its arguments): gradients of adapters."""
    size = dict(width=512, hidden=1408, heads=8)
    config = llama.Config(**{**size, **kwargs}, rank=rank, scale=2.0)
    hand_config = dataclasses.replace(config, by_hand=targets)
    model, hand = llama.Llama(config), llama.Llama(hand_config)
    ids = jax.random.randint(jax.random.key(0), tokens, 0, config.vocab)
    params = model.init(jax.random.key(1), ids)["params"]
    survey = lora.survey(model.apply, {"params": params}, ids)
    lora_config = lora.LoRAConfig(rank=rank, alpha=2.0 * rank, targets=targets)
    adapters = lora.init(jax.random.key(2), params, lora_config, survey)
    adapters = jax.tree.map(
        lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), adapters
    )
    apply = lora.adapt(model.apply)

    def ours(adapters, params, ids):
        logits = apply({"params": lora.bind(params, adapters)}, ids)
        return llama.loss(logits, ids)

    def by_hand(adapters, params, ids):
        return llama.loss(hand.apply({"params": params, "lora": adapters}, ids), ids)

    as_hand = jax.tree.map(
        lambda n: {"a": n.a, "b": n.b}, adapters, is_leaf=lambda x: isinstance(x, lora.LoRA)
    )
    as_hand = _without_kernel(as_hand)
    value_and_grad = lambda f: jax.jit(jax.value_and_grad(f))
    return (value_and_grad(ours), (adapters, params, ids)), (
        value_and_grad(by_hand),
        (as_hand, params, ids),
    )


def _without_kernel(tree):
    if set(tree) == {"kernel"}:
        return tree["kernel"]
    return {k: _without_kernel(v) for k, v in tree.items()}


def lowering_ratio(targets, rank, repeats=7, **kwargs):
    """Processor time to trace and lower our step, over the hand-written's, interleaved.

    Without garbage collection, as in `timeit`: it falls into either at random.
    """
    ours, hand = lowering_times(steps(targets, rank, **kwargs), repeats)
    return ours / hand


def lowering_times(pairs, repeats=7) -> list[float]:
    """Median processor time to trace and lower each of some (jitted function, its arguments)."""
    times = [[] for _ in pairs]
    for _ in range(repeats):
        for (f, args), spent in zip(pairs, times):
            jax.clear_caches()
            gc.collect()
            gc.disable()
            start = time.process_time()
            f.lower(*args)
            spent.append(time.process_time() - start)
            gc.enable()
    return [float(np.median(spent)) for spent in times]
