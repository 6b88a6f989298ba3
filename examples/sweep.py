"""A sweep of eight adapters over one frozen base in one step: rates, ranks, alphas, seeds, data.

A small transformer reads upright digits; adapters learn to read them turned. The step is compiled
once for all of them, and each becomes what it would have become alone, at its own rank and scale:

* ranks: `lora.algebra.stack` pads to the largest with zeros. Where A and B are both zero, so are
  their gradients and Adam's updates: the padding stays zero. Noisy gradients would need a mask.
* alphas: the scale alpha / rank is an argument of the loss (`lora.algebra.scaled`), out of every
  optimiser's reach. The learning rate is an argument of the step.

    python examples/sweep.py            # --help for the options

Expected (seed 0; two cores, under a minute when idle). Accuracy on turned digits, by setting:
    0.89 0.63 0.61 0.81 0.74 0.86 0.88 0.67, and at most 3e-06 away from the run alone;
    a step takes 0.44 times (0.37–0.47) as long for each adapter as its step alone
"""

import collections
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits_convnet import cross_entropy, train_on
from models.reader import Reader
from reporting import format_table, options, whole
from sklearn.datasets import load_digits

import lora_jax as lora

Setting = collections.namedtuple("Setting", "turns rate rank alpha seed")
SWEEP = [  # turns by 90 degrees; the seed is the first adapter's and that of the examples' order
    Setting(1, 1e-3, 8, 16, 0),
    Setting(1, 3e-4, 8, 16, 0),
    Setting(1, 1e-3, 1, 2, 0),
    Setting(1, 1e-3, 4, 8, 0),
    Setting(1, 1e-3, 8, 4, 0),
    Setting(1, 1e-3, 8, 16, 1),
    Setting(2, 1e-3, 8, 16, 0),
    Setting(3, 5e-4, 2, 6, 2),
]
BATCH, TEST, ROUNDS = 8, 400, 40
model = Reader()
adapted = lora.adapt(model.apply)


def step(adapters, state, params, batch, rate, scale=None):
    """One step of one adapter. `scale` is traced; None: the adapters' own, static."""

    def loss(adapters):
        adapters = adapters if scale is None else lora.algebra.scaled(adapters, scale)
        return cross_entropy(adapted({"params": lora.bind(params, adapters)}, batch[0]), batch[1])

    value, grads = jax.value_and_grad(loss)(adapters)
    updates, state = optax.adam(rate).update(grads, state)
    return optax.apply_updates(adapters, updates), state, value


init = optax.adam(0.0).init
alone, together = jax.jit(step), jax.jit(jax.vmap(step, in_axes=(0, 0, None, 0, 0, 0)))


def run(step, adapters, state, params, batches, *settings):
    for batch in zip(*batches):
        adapters, state, loss = step(adapters, state, params, batch, *settings)
    return adapters, loss


def data(seed, steps, pretraining=200):
    """The base, each adapter's first value, its batches (steps, B, ...), and the test digits."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x.reshape(-1, 8, 8)[order].astype(np.float32) / 16, y[order].astype(np.int32)
    params = jax.jit(model.init)(jax.random.key(seed), x[:1])["params"]
    loss = lambda p, _, batch: cross_entropy(model.apply({"params": p}, batch[0]), batch[1])
    params = train_on(
        loss, params, None, (x[TEST:], y[TEST:]), 3e-3, pretraining, seed, "pretraining"
    )
    survey = lora.survey(model.apply, {"params": params}, x[:1])
    firsts, streams = [], []
    for s in SWEEP:
        config = lora.LoRAConfig(rank=s.rank, alpha=s.alpha)
        firsts.append(lora.init(jax.random.key(s.seed), params, config, survey))
        i = np.random.default_rng(s.seed).integers(TEST, len(x), (steps, BATCH))
        streams.append((np.rot90(x, s.turns, (1, 2))[i], y[i]))
    turned = np.stack([np.rot90(x[:TEST], s.turns, (1, 2)) for s in SWEEP])
    return params, firsts, streams, (turned, y[:TEST])


def start(firsts):
    """All adapters, padded to one rank, (8, ...), and their state; rates and scales, (8,)."""
    many = jax.tree.map(lambda x: x[:-1], lora.algebra.stack(firsts))  # without the empty slot
    rates, scales = zip(*((s.rate, s.alpha / s.rank) for s in SWEEP))
    return many, jax.vmap(init)(many), jnp.array(rates), jnp.array(scales)


def own(many, i, first):
    """The i-th adapter as it would be alone: without its padding, its scale its own."""
    leaves, structure = jax.tree.flatten(first)
    cut = [x[i][tuple(map(slice, y.shape))] for x, y in zip(jax.tree.leaves(many), leaves)]
    return jax.tree.unflatten(structure, cut)


def difference(one, two):
    """The largest, relative to the largest value of each array."""
    both = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return max(float(abs(a - b).max() / abs(b).max()) for a, b in both)


def main():
    parser = options(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the base")
    parser.add_argument("--steps", type=whole(), default=300, help="of training")
    args = parser.parse_args()
    params, firsts, streams, (turned, labels) = data(args.seed, args.steps)
    many, state, rates, scales = start(firsts)
    batches = [np.stack(part, 1) for part in zip(*streams)]  # (steps, 8, B, ...)
    trained, losses = run(together, many, state, params, batches, rates, scales)

    read = lambda ad, scale, x: adapted(
        {"params": lora.bind(params, lora.algebra.scaled(ad, scale))}, x
    )
    logits = jax.jit(jax.vmap(read))(trained, scales, turned)
    rows, ones = [], []
    for i, (s, first) in enumerate(zip(SWEEP, firsts)):
        ones.append((first, init(first), params, [part[0] for part in streams[i]], rates[i]))
        result, _ = run(alone, *ones[i][:3], streams[i], rates[i])
        right = float((logits[i].argmax(-1) == labels).mean())
        off = difference(own(trained, i, first), result)
        rows.append((*s._replace(rate=f"{s.rate:g}"), float(losses[i]), right, f"{off:.0e}"))
    print(format_table((*Setting._fields, "loss", "accuracy", "difference from alone"), rows))

    first = many, state, params, [part[0] for part in batches], rates, scales
    calls = lambda: together(*first), lambda: [alone(*one) for one in ones]
    times = np.zeros((ROUNDS, 2))
    for i, k in np.ndindex(times.shape):  # in turns
        begin = time.perf_counter()
        jax.block_until_ready(calls[k]())
        times[i, k] = time.perf_counter() - begin
    low, ratio, high = np.percentile(times[:, 0] / times[:, 1], (25, 50, 75))
    print(
        "ms a step and adapter: {:.2f} together, {:.2f} alone".format(*np.median(times, 0) / 8e-3)
    )
    print(f"ratio {ratio:.2f} ({low:.2f}–{high:.2f}): median and quartiles of {ROUNDS} rounds")


if __name__ == "__main__":
    main()
