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
import os
import sys

from measure import AHEAD, in_turns, ratio, table

if {"--pod", "--ahead"} & {*sys.argv}:
    os.environ |= AHEAD

import jax
import jax.numpy as jnp
import llama
import optax
import pod
from jax.sharding import NamedSharding, PartitionSpec
from traffic import traffic

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
    args = stacked, params, ids, index
    compiled = {n: jax.jit(f).lower(*args).compile() for n, f in calls(CONFIG).items()}
    return {n: functools.partial(_waited, f, args) for n, f in compiled.items()}


def calls(config: llama.Config):
    """{name: a function of a stack, the base, tokens, and the slot of each example}."""
    model = llama.Llama(config)
    apply = lora.adapt(model.apply)

    def by_vmap(stacked, params, ids, index):
        def one(number, ids):
            adapters = lora.algebra.choose(stacked, number)
            return apply({"params": lora.bind(params, adapters)}, ids[None])[0]

        return jax.vmap(one)(index, ids)

    def shared(adapters, params, ids):
        return apply({"params": lora.bind(params, adapters)}, ids)

    def by_hand(stacked, params, ids, index):
        own = dataclasses.replace(config, by_hand=llama.ALL, scale=1.0)
        factors = {
            layer: {
                name: {"a": node["kernel"].a[index], "b": node["kernel"].b[index]}
                for name, node in nodes.items()
            }
            for layer, nodes in stacked.items()
        }
        return llama.Llama(own).apply({"params": params, "lora": factors}, ids)

    choose = lora.algebra.choose
    each_token = lambda ids, index: jnp.broadcast_to(index[:, None], ids.shape)
    return {
        "base": lambda _, params, ids, index: model.apply({"params": params}, ids),
        "one for all": lambda s, params, ids, _: shared(choose(s, 0), params, ids),
        "for each, vmap": by_vmap,
        "for each": lambda s, params, ids, i: shared(choose(s, i[:, None]), params, ids),
        "by hand": by_hand,
        "for each token": lambda s, p, ids, i: shared(choose(s, each_token(ids, i)), p, ids),
    }


def _waited(f, args):
    for _ in range(5):
        jax.block_until_ready(f(*args))


def ahead(name: str, tenants: int = 8, slots: int = 64) -> None:
    """Megabytes that one weight (4096, 4096) in bf16 moves with its adapters, by the compiler of a
    device that is not there: a forward pass of bf16 adapters, and a training step of fp32 ones."""
    d, rank = 4096, 16
    where = NamedSharding(lora.parallel.topology_mesh(name, d=1), PartitionSpec())
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype, sharding=where)
    moved = lambda f, *args: traffic(jax.jit(f).lower(*args).compile().as_text()) / 1e6
    axes = lora.Geometry((0,), (1,))
    factors = lambda *n, dtype: [shape(*n, *s, dtype=dtype) for s in ((d, rank), (rank, d))]
    node = lambda *n, dtype: {"w": lora.LoRA(*factors(*n, dtype=dtype), 1.0, axes)}
    fn = lora.adapt(lambda w, x: x @ w["w"])
    own = lambda node, w, x: fn(lora.bind({"w": w}, node), x)
    each = lambda node, w, x, i: own(lora.algebra.choose(node, i[:, None]), w, x)

    def by_hand(node, w, x, i=None):
        a, b = (v if i is None else v[i] for v in (node["w"].a, node["w"].b))
        return x @ w + (x @ a) @ b

    w, rows = shape(d, d), []
    for batch, length in SHAPES:
        x, i = shape(batch, length, d), shape(batch, dtype=jnp.int32)
        one, stacked = (node(*n, dtype=jnp.bfloat16) for n in ((), (slots + 1,)))
        found = {
            "base": moved(jnp.matmul, x, w),
            "one for all": moved(own, one, w, x),
            "one, by hand": moved(by_hand, one, w, x),
            "for each": moved(each, stacked, w, x, i),
            "by hand": moved(by_hand, stacked, w, x, i),
        }
        rows.append((f"{batch} × {length}", *(f"{n:.1f}" for n in found.values())))
    print(table(["batch × length", *found], rows), flush=True)

    def step(f, tx):
        def one(node, state, w, x, *i):
            total = lambda node, x: jnp.sum(f(node, w, x, *i).astype(jnp.float32) ** 2)
            grads, dx = jax.grad(total, (0, 1))(node, x)
            updates, state = tx.update(grads, state, node)
            return optax.apply_updates(node, updates), state, dx

        return one

    tx, rows = optax.adam(1e-4), []
    at = lambda x: shape(*x.shape, dtype=x.dtype)
    state = lambda tx, node: jax.tree.map(at, jax.eval_shape(tx.init, node))
    for length in (1, 16, 128, 1024):
        one, stacked = (node(*n, dtype=jnp.float32) for n in ((), (tenants + 1,)))
        solo = moved(step(own, tx), one, state(tx, one), w, shape(1, length, d))
        x, i = shape(tenants, length, d), shape(tenants, dtype=jnp.int32)
        many = lora.optim.per_slot(tx)
        together = moved(step(each, many), stacked, state(many, stacked), w, x, i)
        rows.append((length, f"{together:.1f}", f"{solo:.1f}", f"{together / tenants / solo:.2f}"))
    print(table(["tokens each", "together", "alone", f"together / {tenants} alone"], rows))


def training(apply, tx, count: int):
    """A step of a mixed batch: (stack, state, base, ids, slots) to (stack, state, losses)."""

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

    return step


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

    return lora.parallel.forecast(
        training(apply, tx, count),
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
    parser.add_argument("--ahead", nargs="+", metavar="TOPOLOGY", help="v5e:1x1 or h100:1x1x1")
    args = parser.parse_args()
    if args.pod:
        raise SystemExit(print(forecast()))
    for name in args.ahead or ():
        ahead(name)
    if args.ahead:
        raise SystemExit
    rows = []
    for count in args.slots:
        for batch, length in SHAPES:
            times = in_turns(arms(batch, length, count), args.rounds)
            ratios = (ratio(t, times["base"]) for t in times.values())
            rows.append((count, f"{batch} × {length}", *ratios))
    print(table(["slots", "batch × length", *times], rows))
