"""A small training run with checkpoints, to be started, killed and started again by the tests.

Prints `step loss checksum-of-adapters` for each step, and goes on from the latest checkpoint.
"""

import argparse
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax.checkpoint._fingerprint import checksums

SPECS = {"up": P("fsdp", "tp"), "down": P("tp", "fsdp")}
SHAPES = {"up": (16, 64), "down": (64, 16)}


def make(key):
    keys = jax.random.split(key, len(SHAPES))
    return {n: jax.random.normal(k, s) / 4 for k, (n, s) in zip(keys, SHAPES.items())}


def loss(p, x, key):
    noise = 1 + 0.1 * jax.random.normal(key, x.shape)
    y = jnp.tanh((x * noise) @ p["up"]) @ p["down"]
    return jnp.mean((y - jnp.sin(x)) ** 2)


def flags():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--until", type=int, help="stop early, after this step")
    parser.add_argument("--mesh", type=int, nargs=2, default=(1, 1))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--die-after", type=int, help="SIGKILL to itself after this step")
    return parser.parse_args()


def end_with(parent):
    """A run that nobody waits for is in the way of others."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main():
    args = flags()
    threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
    if args.processes > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{args.port}", args.processes, args.process, initialization_timeout=60
        )

    mesh = jax.make_mesh(tuple(args.mesh), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    on = lambda specs: jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
    params = jax.jit(make, out_shardings=on(SPECS))(jax.random.key(0))
    config = lora.LoRAConfig(rank=4, targets=["up", "down"])
    targets = lora.select(params, config)
    where = lora.parallel.shardings(params, targets)
    start = jax.jit(lambda key: lora.init(key, params, targets), out_shardings=where)
    adapters = start(jax.random.key(1))
    tx = optax.adamw(optax.cosine_decay_schedule(1e-2, args.steps), eps=1e-4)
    states = lora.parallel.state_shardings(jax.eval_shape(tx.init, adapters), adapters, where)
    state = jax.jit(tx.init, out_shardings=states)(adapters)
    everywhere = NamedSharding(mesh, P())
    key = jax.jit(lambda: jax.random.key(2), out_shardings=everywhere)()
    adapted = lora.adapt(loss)

    def update(adapters, state, params, x, key):
        f = lambda adapters: adapted(lora.bind(params, adapters), x, key)
        value, grads = jax.value_and_grad(f)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    update = jax.jit(update, donate_argnums=(0, 1), out_shardings=(where, states, everywhere))
    options = ocp.CheckpointManagerOptions(max_to_keep=3, cleanup_tmp_directories=True)
    with ocp.CheckpointManager(os.path.abspath(args.directory), options=options) as manager:
        base, step = lora.checkpoint.fingerprint(params, content=True), 0
        if manager.latest_step() is not None:
            found = lora.checkpoint.restore(
                manager, adapters, base=base, config=config, state={"opt": state, "key": key}
            )
            step, adapters, state, key = (
                found.step,
                found.adapters,
                found.state["opt"],
                found.state["key"],
            )
            assert found.data == {"next": step}
        print("ready", step, flush=True)
        while step < (args.until or args.steps):
            x = np.random.default_rng(step).normal(size=(16, 16)).astype(np.float32)
            x = jax.make_array_from_callback(x.shape, on(P("fsdp")), lambda i, x=x: x[i])
            key, now = jax.random.split(key)
            adapters, state, value = update(adapters, state, params, x, now)
            step += 1
            lora.checkpoint.save(
                manager, step, adapters, base=base, config=config,
                state={"key": key, "opt": state}, data={"next": step},
            )  # fmt: skip
            if step == args.die_after:
                manager.wait_until_finished()
                os.kill(os.getpid(), signal.SIGKILL)
            sums = checksums({str(i): x for i, x in enumerate(jax.tree.leaves(adapters))})
            print(step, float(value), "".join(sums.values()), flush=True)


if __name__ == "__main__":
    main()
