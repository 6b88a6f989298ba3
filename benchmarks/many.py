"""One adapter for each example or token, of many: `python benchmarks/many.py`.

A Llama-style model of two layers (d = 512, feed-forward 1408), rank 8 on all linears; the time of a
forward pass as a ratio to the base model's, medians of interleaved rounds in one process. "By hand"
gathers each example's factors and multiplies by them in the model's own modules.

`--pod` compiles a training step of 64 tenants for 256 chips of a TPU v5e instead, which needs
libtpu and no TPU: 7B-shaped, rank 16, 64 examples of 256 tokens, each of its tenant.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import llama
import optax
import pod
from measure import in_turns, ratio, table

import lora_jax as lora

SHAPES = ((8, 1), (8, 128), (64, 1))
RANK, LAYERS = 8, 2
CONFIG = llama.Config(width=512, hidden=1408, heads=8, layers=LAYERS, dtype=jnp.float32)


def arms(batch: int, length: int, count: int):
    """{name: a compiled call without arguments}."""
    model = llama.Llama(CONFIG)
    ids = jax.random.randint(jax.random.key(0), (batch, length), 0, 256)
    params = jax.jit(model.init)(jax.random.key(1), ids)["params"]
    config = lora.LoRAConfig(rank=RANK, targets=llama.ALL)
    survey = lora.survey(model.apply, {"params": params}, ids)
    first = lora.init(jax.random.key(0), params, config, survey)
    # other values for each, without as many compiled initialisations
    zoo = [jax.tree.map(lambda x, i=i: x * (1 + i / count) + 0.01, first) for i in range(count)]
    stacked = jax.jit(lora.algebra.stack)(zoo)
    index = jax.random.randint(jax.random.key(2), (batch,), 0, count)
    apply = lora.adapt(model.apply)

    def by_vmap(stacked, params, ids, index):
        def one(number, ids):
            adapters = lora.algebra.choose(stacked, number)
            return apply({"params": lora.bind(params, adapters)}, ids[None])[0]

        return jax.vmap(one)(index, ids)

    def by_slot(stacked, params, ids, index):
        return shared(lora.algebra.choose(stacked, index), params, ids)

    def shared(adapters, params, ids):
        return apply({"params": lora.bind(params, adapters)}, ids)

    def by_hand(stacked, params, ids, index):
        own = dataclasses.replace(CONFIG, by_hand=llama.ALL, scale=1.0)
        factors = {
            layer: {
                name: {"a": node["kernel"].a[index], "b": node["kernel"].b[index]}
                for name, node in nodes.items()
            }
            for layer, nodes in stacked.items()
        }
        return llama.Llama(own).apply({"params": params, "lora": factors}, ids)

    calls = {
        "base": (lambda params, ids: model.apply({"params": params}, ids), params, ids),
        "one for all": (shared, zoo[0], params, ids),
        "for each, vmap": (by_vmap, stacked, params, ids, index),
        "for each": (by_slot, stacked, params, ids, index[:, None]),
        "by hand": (by_hand, stacked, params, ids, index),
        "for each token": (by_slot, stacked, params, ids, jnp.repeat(index[:, None], length, 1)),
    }
    compiled = {n: (jax.jit(f).lower(*args).compile(), args) for n, (f, *args) in calls.items()}
    return {n: functools.partial(_waited, f, args) for n, (f, args) in compiled.items()}


def _waited(f, args):
    for _ in range(5):
        jax.block_until_ready(f(*args))


def forecast(count: int = 64, tokens: tuple[int, int] = (64, 256)) -> lora.parallel.Forecast:
    mesh = lora.parallel.topology_mesh("v5e:16x16", fsdp=16, tp=16)
    shape = pod.SHAPES["7b"]
    _, (one, _, base, ids), _ = pod.step("lora", mesh, tokens, shape)
    config = llama.Config(
        **shape, scan=True, dtype=jnp.bfloat16, rank=pod.RANK, activations=ids.sharding
    )
    apply = lora.adapt(llama.Llama(config).apply)
    tx = lora.optim.per_slot(optax.adam(1e-4))
    stacked = jax.eval_shape(lambda tree: lora.algebra.stack([tree], capacity=count), one)
    where = lora.parallel.shardings(base, stacked)
    state = jax.eval_shape(tx.init, stacked)
    state_where = lora.parallel.state_shardings(state, stacked, where)
    slots = jax.ShapeDtypeStruct(tokens[:1], jnp.int32, sharding=ids.sharding)

    def step(stacked, state, base, ids, slots):
        def total(stacked):
            adapters = lora.algebra.choose(stacked, slots[:, None])
            logits = apply({"params": lora.bind(base, adapters)}, ids)[:, :-1]
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits.astype(jnp.float32), ids[:, 1:]
            )
            means, active = lora.optim.by_slot(losses.mean(-1), slots, count)
            return means.sum(), (means, active)

        grads, (means, active) = jax.grad(total, has_aux=True)(stacked)
        updates, state = tx.update(grads, state, stacked, active=active)
        return optax.apply_updates(stacked, updates), state, means

    return lora.parallel.forecast(
        step,
        pod.place(stacked, where),
        pod.place(state, state_where),
        base,
        ids,
        slots,
        donate_argnums=(0, 1),
        out_shardings=(where, state_where, None),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--slots", type=int, nargs="*", default=[64, 512])
    parser.add_argument("--pod", action="store_true")
    args = parser.parse_args()
    if args.pod:
        raise SystemExit(print(forecast()))
    rows = []
    for count in args.slots:
        for batch, length in SHAPES:
            times = in_turns(arms(batch, length, count), args.rounds)
            ratios = (ratio(t, times["base"]) for t in times.values())
            rows.append((count, f"{batch} × {length}", *ratios))
    print(table(["slots", "batch × length", *times], rows))
