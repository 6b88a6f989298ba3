"""Trains LoRA adapters at length: sharded, checkpointed, preempted and resumed. Made to be copied.

    python examples/train.py                                # SmolLM2-135M on film reviews
    python examples/train.py --model tiny --out runs/tiny   # no download
    python examples/train.py --mesh data=2,fsdp=4,tp=2 --dtype bfloat16 --accumulate 4
    python examples/train.py --distributed                  # in each process of a cluster

The same command again goes on from the directory's last checkpoint. SIGTERM saves one and leaves
with status 143 (SIGINT: 130); on one device the adapters are in the end, bit for bit, those of a
run that was not stopped. Beside it: `tasks.py`, what is learned; `cluster.py`, devices and batches.

Expected (2 CPU cores, busy with other work too; fp32, seed 0; 2026-11-23; 256 held-out reviews):

    step  0   loss 5.67   perplexity 289    accuracy 0.04
    step 60   loss 0.41   perplexity 1.50   accuracy 0.84

seven seconds a step, of 16 reviews and 2.4M trained parameters.
"""

import argparse
import functools
import sys
import time
from pathlib import Path

import fetch
import grain
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from cluster import BATCH, Stop, batches, make_log, make_mesh, place
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from reporting import options, whole
from tasks import TASKS

import lora_jax as lora


def flags():
    parser = options(__doc__)
    flag = parser.add_argument
    flag("--model", choices=TASKS, default="smollm2", help="and its data")
    flag("--cache", type=Path, default=fetch.CACHE, help="downloads are kept here")
    flag("--directory", "--out", type=Path, default=Path("runs/train"), help="what is written")
    flag("--steps", type=whole(), default=60, help="updates")
    flag("--batch", type=whole(), default=16, help="examples of an update, over all devices")
    flag("--accumulate", type=whole(), default=1, help="parts of a batch, one after the other")
    flag("--length", type=whole(), default=48, help="tokens of an example")
    flag("--rank", type=whole(), default=8, help="of the adapters")
    flag("--alpha", type=float, default=16.0)
    flag("--dropout", type=float, default=0.05)
    flag("--targets", nargs="+", default=["all-linear"])
    flag("--learning-rate", type=float, default=1e-3, help="the highest, after a tenth of the run")
    flag("--clip", type=float, default=1.0, help="largest norm of a gradient")
    flag("--dtype", choices=["float32", "bfloat16"], default="float32", help="of base and model")
    flag("--remat", action=argparse.BooleanOptionalAction, default=True, help="recompute layers")
    flag("--log-every", type=whole(), default=10, help="steps")
    flag("--eval-every", type=whole(), default=30, help="steps")
    flag("--save-every", type=whole(), default=20, help="steps")
    flag("--seed", type=int, default=0)
    flag("--mesh", help="data=2,fsdp=2,tp=2; by default data=<all devices>")
    flag("--distributed", action="store_true", help="one of several processes")
    flag("--coordinator", help="host:port of process 0; Slurm, TPU pods, etc. need none of these")
    flag("--processes", type=int)
    flag("--process", type=int)
    return parser.parse_args()


def make_steps(model, tx, mesh, adapters_at, state_at, accumulate):
    """(update, sums): a training step and, of a batch, [loss, hits, weight]; both compiled."""
    apply = lora.adapt(model.apply)
    everywhere = NamedSharding(mesh, P())

    def loss_and_hits(adapters, params, batch, key=None):
        """Sums over the batch, by weight, in fp32."""
        bound = lora.bind(params, adapters, dropout_key=key)
        logits = apply({"params": bound}, batch["ids"][:, :-1]).astype(jnp.float32)  # [B, T, V]
        answers, weights = batch["ids"][:, 1:], batch["weights"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, answers)
        return jnp.sum(loss * weights), jnp.sum((logits.argmax(-1) == answers) * weights)

    def parts(x):  # [B, ...] -> [accumulate, B/accumulate, ...], and no row changes its device
        x = x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, *BATCH)))

    # A loop in the step, not optax.MultiSteps: so one part may have more to learn than another, a
    # step is an update, and no checkpoint falls into the middle of one. Either way each part sends
    # the gradients of the adapters between devices, and no larger ones.
    @functools.partial(
        jax.jit, donate_argnums=(0, 1), out_shardings=(adapters_at, state_at, everywhere)
    )
    def update(adapters, state, params, batch, key, step):
        def add(sums, part):
            grad = jax.value_and_grad(loss_and_hits, has_aux=True)
            return jax.tree.map(jnp.add, sums, grad(adapters, params, *part)), None

        weights = batch["weights"] / batch["weights"].sum()  # the loss is the mean of the batch
        batch = jax.tree.map(parts, batch | {"weights": weights})
        keys = jax.random.split(jax.random.fold_in(key, step), accumulate)
        zeros = (jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, adapters)
        ((loss, hits), grads), _ = jax.lax.scan(add, zeros, (batch, keys))
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, (loss, hits, optax.global_norm(grads))

    @functools.partial(jax.jit, out_shardings=everywhere)
    def sums(adapters, params, batch):
        return jnp.stack([*loss_and_hits(adapters, params, batch), batch["weights"].sum()])

    return update, sums


def main():
    args = flags()
    if args.distributed:  # before anything else touches a device
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    mesh = make_mesh(args.mesh)
    stop = Stop(mesh)
    rows = args.accumulate * mesh.shape["data"] * mesh.shape["fsdp"]
    if args.batch % rows:
        raise SystemExit(f"--batch {args.batch}: expected a multiple of {rows}, parts × devices")
    dtype = jnp.dtype(args.dtype)
    task = TASKS[args.model](args.length, args.seed, args.cache, dtype=dtype, remat=args.remat)

    # The base is frozen, in the model's dtype. Adapters and optimiser: fp32, made where they stay.
    params = place(task.params, mesh, dtype)
    ids = jax.ShapeDtypeStruct((args.batch, args.length), jnp.int32)
    survey = lora.survey(task.model.apply, {"params": params}, ids)
    config = lora.LoRAConfig(args.rank, args.alpha, args.targets, dropout=args.dropout)
    targets = lora.select(params, config, survey)
    adapters_at = lora.parallel.shardings(params, targets)
    key = jax.jit(lambda: jax.random.key(args.seed), out_shardings=NamedSharding(mesh, P()))()
    adapters = jax.jit(lambda p: lora.init(key, p, targets), out_shardings=adapters_at)(params)

    rate = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, warmup_steps=max(args.steps // 10, 1), decay_steps=args.steps
    )
    tx = optax.chain(optax.clip_by_global_norm(args.clip), optax.adamw(rate))
    empty = jax.eval_shape(tx.init, adapters)
    state_at = lora.parallel.state_shardings(empty, adapters, adapters_at)
    state = jax.jit(tx.init, out_shardings=state_at)(adapters)
    update, sums = make_steps(task.model, tx, mesh, adapters_at, state_at, args.accumulate)

    def evaluate(step):
        """On all held-out examples that fill a batch."""
        test = batches(grain.MapDataset.source(task.test), args.batch, mesh)
        loss, hits, n = sum(sums(adapters, params, batch) for batch in test)
        log(step, "eval", loss=loss / n, perplexity=jnp.exp(loss / n), accuracy=hits / n)

    log = make_log(args.directory)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=3, save_interval_steps=args.save_every, cleanup_tmp_directories=True
    )
    directory = (args.directory / "checkpoints").absolute()
    with ocp.CheckpointManager(directory, options=options) as manager:
        # The position in the data is the number of examples used, by all processes. Unlike the
        # state of an iterator it stays right with another number of them, another mesh or batch.
        start, used, status = 0, 0, 0
        base = lora.checkpoint.fingerprint(params)
        if manager.latest_step() is not None:
            like = {"optimiser": state, "key": key}
            found = lora.checkpoint.restore(manager, adapters, base=base, config=config, state=like)
            start, used, adapters = found.step, found.data["examples"], found.adapters
            state, key = found.state["optimiser"], found.state["key"]
        train = grain.MapDataset.source(task.train).shuffle(seed=args.seed).repeat()
        data = batches(train, args.batch, mesh, used)

        if start in (0, args.steps):
            evaluate(start)
        clock, since = time.perf_counter(), start
        for step in range(start + 1, args.steps + 1):
            adapters, state, metrics = update(adapters, state, params, next(data), key, step)
            used += args.batch
            status = stop.status()
            last = status > 0 or step == args.steps
            lora.checkpoint.save(
                manager, step, adapters, base=base, config=config, data={"examples": used},
                state={"optimiser": state, "key": key}, force=last,
            )  # fmt: skip
            if step % args.log_every == 0 or step == start + 1 or last:
                loss, accuracy, norm = jax.device_get(metrics)  # waits for the step
                speed = (step - since) * args.batch * args.length / (time.perf_counter() - clock)
                log(step, "train", loss=loss, accuracy=accuracy, gradient_norm=norm,
                    learning_rate=rate(step - 1), tokens_per_second=speed)  # fmt: skip
                clock, since = time.perf_counter(), step
            if status:
                break  # the scheduler may give us seconds
            if step % args.eval_every == 0 or last:
                evaluate(step)
                clock, since = time.perf_counter(), step
        manager.wait_until_finished()
        if jax.process_index() == 0:
            print(f"checkpoint {manager.latest_step()} in {manager.directory}")
    sys.exit(status)


if __name__ == "__main__":
    main()
