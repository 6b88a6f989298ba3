"""One adapter for each example, of 64: `python benchmarks/many.py`.

A Llama-style model of two layers (d = 512, feed-forward 1408), rank 8 on all linears; the time of a
forward pass as a ratio to the base model's, medians of interleaved rounds in one process.
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
import llama
from measure import in_turns, ratio, table

import lora_jax as lora

SHAPES = ((8, 1), (8, 128), (64, 1))
COUNT, RANK = 64, 8


def arms(batch: int, length: int):
    """{name: a compiled call without arguments}."""
    model = llama.Llama(llama.Config(width=512, hidden=1408, heads=8, layers=2, dtype=jnp.float32))
    ids = jax.random.randint(jax.random.key(0), (batch, length), 0, 256)
    params = jax.jit(model.init)(jax.random.key(1), ids)["params"]
    config = lora.LoRAConfig(rank=RANK, targets=llama.ALL)
    survey = lora.survey(model.apply, {"params": params}, ids)
    zoo = []
    for i in range(COUNT):
        fresh = lora.init(jax.random.key(i), params, config, survey)
        zoo.append(jax.tree.map(lambda x: x + 0.01, fresh))
    stacked = lora.algebra.stack(zoo)
    index = jax.random.randint(jax.random.key(2), (batch,), 0, COUNT)
    apply = lora.adapt(model.apply)

    def each(stacked, params, ids, index):
        def one(number, ids):
            adapters = lora.algebra.choose(stacked, number)
            return apply({"params": lora.bind(params, adapters)}, ids[None])[0]

        return jax.vmap(one)(index, ids)

    def shared(adapters, params, ids):
        return apply({"params": lora.bind(params, adapters)}, ids)

    calls = {
        "base": (lambda params, ids: model.apply({"params": params}, ids), params, ids),
        "one for all": (shared, zoo[0], params, ids),
        "one for each": (each, stacked, params, ids, index),
    }
    compiled = {n: (jax.jit(f).lower(*args).compile(), args) for n, (f, *args) in calls.items()}
    return {n: functools.partial(_waited, f, args) for n, (f, args) in compiled.items()}


def _waited(f, args):
    for _ in range(5):
        jax.block_until_ready(f(*args))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    rows = []
    for batch, length in SHAPES:
        times = in_turns(arms(batch, length), rounds)
        rows.append((f"{batch} × {length}", *(ratio(t, times["base"]) for t in times.values())))
    print(table(["batch × length", "base", "one for all", "one for each"], rows))
