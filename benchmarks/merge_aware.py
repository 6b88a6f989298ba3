"""What merging into codes costs in accuracy: plain QLoRA, LoftQ, and training merge-aware.

An MLP that reads scikit-learn's digits upright learns to read them turned by 90 degrees, by LoRA on
a base in few bits, or on one in fp32. Then the adapter is merged and stored in that format. Test
accuracy before merging (as trained) and after (as deployed), seeds 0, 1 and 2.

    python benchmarks/merge_aware.py             # --help for the options
"""

from __future__ import annotations

import argparse
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import lora_jax as lora

WIDTHS = (64, 256, 256, 10)
TARGETS = ["w0", "w1"]


def model(params: dict, x: jax.Array) -> jax.Array:
    for i in range(len(WIDTHS) - 2):
        x = jax.nn.relu(x @ params[f"w{i}"] + params[f"b{i}"])
    return x @ params["w2"] + params["b2"]


def fit(loss, trained, data, rate, steps, seed):
    """(what was trained by Adam with a cosine to zero, seconds of processor time a step)."""
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(trained, state, batch):
        updates, state = tx.update(jax.grad(loss)(trained, batch), state)
        return optax.apply_updates(trained, updates), state

    state, rng = tx.init(trained), np.random.default_rng(seed)
    for i in range(steps):
        rows = rng.integers(0, len(data[0]), 128)
        trained, state = step(trained, state, tuple(jnp.asarray(v[rows]) for v in data))
        if i == 9:  # compiled
            start = time.process_time()
    jax.block_until_ready(trained)
    return trained, (time.process_time() - start) / (steps - 10)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def run(
    seed: int, format: str, rank: int, steps: int, rate: float
) -> dict[str, tuple[float, float, float]]:
    """{method: (accuracy as trained, as deployed, milliseconds a step)}."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    upright, y = digits.images[order].astype(np.float32) / 16, digits.target[order]
    turned = np.ascontiguousarray(np.rot90(upright, 1, (1, 2))).reshape(len(y), -1)
    upright, train, test = upright.reshape(len(y), -1), slice(500, None), slice(0, 500)
    keys = jax.random.split(jax.random.key(seed), len(WIDTHS))
    params = {}
    for i, (n, m) in enumerate(itertools.pairwise(WIDTHS)):
        params |= {f"w{i}": jax.random.normal(keys[i], (n, m)) * (2 / n) ** 0.5}
        params |= {f"b{i}": jnp.zeros(m)}
    dense = lambda p, batch: cross_entropy(model(p, batch[0]), batch[1])
    params, _ = fit(dense, params, (upright[train], y[train]), 3e-3, 300, seed)

    survey = lora.survey(model, params, upright[:1])
    config = lora.LoRAConfig(rank=rank, alpha=2 * rank, targets=TARGETS)
    chosen = lora.select(params, config, survey)
    base = lora.quant.quantize(params, chosen, format)
    start = lora.init(keys[-1], base, config, survey)
    fitted = lora.quant.loftq(params, start, chosen, format)
    aware = dict(merge_aware=format)
    arms = {
        "QLoRA": (base, start, {}),
        "LoftQ": (*fitted, {}),
        "merge-aware": (base, start, aware),
        "LoRA on fp32": (params, start, {}),
        "merge-aware on fp32": (params, start, aware),
    }
    data, found = (turned[train], y[train]), {}
    accuracy = lambda logits: float((logits.argmax(-1) == y[test]).mean())
    for name, (base, adapters, how) in arms.items():
        apply = lora.adapt(model, **how)
        loss = lambda ad, batch, apply=apply, base=base: cross_entropy(
            apply(lora.bind(base, ad), batch[0]), batch[1]
        )
        adapters, seconds = fit(loss, adapters, data, rate, steps, seed)
        trained = apply(lora.bind(base, adapters), turned[test])
        stored = lora.merge(base, adapters, requantize=format)
        deployed = lora.adapt(model)(lora.bind(stored, None), turned[test])
        found[name] = accuracy(trained), accuracy(deployed), 1e3 * seconds
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--formats", nargs="+", default=["nf4", "nvfp4", "int4"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=1e-2)
    args = parser.parse_args()
    for format in args.formats:
        runs = [run(seed, format, args.rank, args.steps, args.rate) for seed in range(args.seeds)]
        for name in runs[0]:
            each = np.array([r[name] for r in runs])
            (a, b, ms), (sa, sb, _) = each.mean(0), each.std(0, ddof=min(1, len(runs) - 1))
            seeds = ", ".join(f"{x:.3f}" for x in each[:, 1])
            print(
                f"{format:6} {name:19} trained {a:.3f} ± {sa:.3f}   deployed {b:.3f} ± {sb:.3f} "
                f"({seeds})   {ms:.2f} ms a step",
                flush=True,
            )


if __name__ == "__main__":
    main()
