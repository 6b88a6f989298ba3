"""Convolutions: a ConvNet that reads upright digits learns to read them turned by 90 degrees.

LoRA of rank 4 on all four kernels: 3×3, depthwise, pointwise and strided. scikit-learn's digits
need no download. The base is untouched: without the adapter it reads upright digits as before.

    python examples/digits_convnet.py            # --help for the options

Expected (seed 0, 500 test digits; about 30 s on two cores):

    upright, base 0.99   turned, base 0.07   turned, LoRA 0.97   turned, full fine-tuning 0.97
    upright, without the adapter 0.99        upright, after full fine-tuning 0.59
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from models.convnet import ConvNet
from reporting import format_table, options, whole
from sklearn.datasets import load_digits
from tqdm import tqdm

import lora_jax as lora


def main():
    parser = options(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--rank", type=whole(), default=4, help="of the adapters")
    parser.add_argument("--steps", type=whole(), default=300, help="of training")
    args = parser.parse_args()

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    x, y = digits.images[order, ..., None].astype(np.float32) / 16, digits.target[order]
    turned = np.ascontiguousarray(np.rot90(x, 1, (1, 2)))
    train, test = slice(500, None), slice(0, 500)

    model = ConvNet()
    variables = model.init(jax.random.key(args.seed), x[:1])
    params, stats = variables["params"], variables["batch_stats"]

    def pretrain_loss(trained, batch):
        params, stats = trained
        logits, new = model.apply({"params": params, "batch_stats": stats}, batch[0], train=True,
                                  mutable=["batch_stats"])  # fmt: skip
        return cross_entropy(logits, batch[1]), new["batch_stats"]

    params, stats = pretrain(pretrain_loss, params, stats, (x[train], y[train]), args.seed)

    apply = lora.adapt(model.apply)

    def full_loss(params, base, batch):
        return cross_entropy(model.apply({**base, "params": params}, batch[0]), batch[1])

    def lora_loss(adapters, base, batch):
        bound = {**base, "params": lora.bind(base["params"], adapters)}
        return cross_entropy(apply(bound, batch[0]), batch[1])

    base = {"params": params, "batch_stats": stats}
    survey = lora.survey(model.apply, base, x[:1])
    targets = lora.select(params, lora.LoRAConfig(rank=args.rank, alpha=2 * args.rank), survey)
    print(targets)
    adapters = lora.init(jax.random.key(args.seed), params, targets)
    data = (turned[train], y[train])
    adapters = train_on(lora_loss, adapters, base, data, 1e-2, args.steps, args.seed, "LoRA")
    tuned = train_on(full_loss, params, base, data, 3e-3, args.steps, args.seed, "full fine-tuning")
    merged = lora.merge(params, adapters)

    def accuracy(params, x):
        logits = model.apply({"params": params, "batch_stats": stats}, x[test])
        return float((logits.argmax(-1) == y[test]).mean())

    count = lambda t: sum(v.size for v in jax.tree.leaves(t))
    rows = [
        ("base", accuracy(params, x), accuracy(params, turned), 0),
        ("LoRA, merged", accuracy(merged, x), accuracy(merged, turned), count(adapters)),
        ("full fine-tuning", accuracy(tuned, x), accuracy(tuned, turned), count(tuned)),
    ]
    print(format_table(("", "upright", "turned", "trained"), rows))


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def pretrain(loss, params, stats, data, seed, steps=200):
    """Adam on the parameters; the batch statistics follow."""
    tx = optax.adam(3e-3)
    state = tx.init(params)

    @jax.jit
    def step(params, stats, state, batch):
        value_and_grad = jax.value_and_grad(lambda p: loss((p, stats), batch), has_aux=True)
        (_, stats), grads = value_and_grad(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), stats, state

    for batch in batches(data, steps, seed, "pretraining"):
        params, stats, state = step(params, stats, state, batch)
    return params, stats


def train_on(loss, trained, base, data, rate, steps, seed, name):
    """Adam with a cosine to zero on `trained`, any tree, beside the frozen `base`."""
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))
    state = tx.init(trained)

    @jax.jit
    def step(trained, state, base, batch):
        updates, state = tx.update(jax.grad(loss)(trained, base, batch), state)
        return optax.apply_updates(trained, updates), state

    for batch in batches(data, steps, seed, name):
        trained, state = step(trained, state, base, batch)
    return trained


def batches(data, steps, seed, name, size=128):
    rng = np.random.default_rng(seed)
    for _ in tqdm(range(steps), desc=f"{name:16}"):
        i = rng.integers(0, len(data[0]), size)
        yield tuple(jnp.asarray(v[i]) for v in data)


if __name__ == "__main__":
    main()
