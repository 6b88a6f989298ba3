"""Eight tenants of one tiny Llama, trained in one step: each joins, pauses and leaves at will.

The base has learnt to repeat six digits. Tenant k learns to add k + 1 to each of them, with a rank,
an alpha and a learning rate of its own. Each batch mixes the examples of those who are there; the
step is compiled once. At the end one tenant is trained again, alone, and compared.

    python examples/tenants.py          # --help for the options

Expected (seed 0; two cores, about a minute when idle): at least 0.98 of the digits right for each
    tenant, and tenant 7 alone within 0.1 % of the largest value (Adam enlarges rounding).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits_convnet import train_on
from models.llama import Llama, LlamaConfig
from reporting import format_table, options, plot
from tqdm import tqdm

import lora_jax as lora

DIGITS, EACH, BAR = 6, 8, 10  # digits and examples of a tenant in a batch; the token between
TENANTS = [  # rank, alpha, learning rate, first step, last step, every so many steps
    (8, 16, 1e-2, 0, 200, 1),
    (4, 16, 1e-2, 0, 200, 1),
    (2, 8, 1e-2, 0, 120, 1),
    (8, 8, 1e-2, 30, 200, 1),
    (1, 4, 3e-2, 30, 200, 1),
    (4, 4, 2e-2, 60, 200, 1),
    (8, 32, 5e-3, 60, 200, 2),
    (2, 4, 2e-2, 0, 200, 3),
]
model = Llama(LlamaConfig(11, 64, 128, 2, 4, 2, 1e4))
adapted = lora.adapt(model.apply)
tx = optax.inject_hyperparams(optax.adam)(1e-2)  # of one tenant


def examples(tenant, step, n=EACH):
    """(n, 13) tokens: digits, a bar, the digits with tenant + 1 added; −1 is the base's task."""
    key = jax.random.fold_in(jax.random.key(tenant + 1), step)
    digits = jax.random.randint(key, (n, DIGITS), 0, 10)
    bar = jnp.full((n, 1), BAR)
    return jnp.concatenate([digits, bar, (digits + tenant + 1) % 10], 1)


def cross_entropy(logits, ids):
    """(n,): of the digits behind the bar; logits (n, 13, V)."""
    at = slice(DIGITS, -1)
    each = optax.softmax_cross_entropy_with_integer_labels(logits[:, at], ids[:, DIGITS + 1 :])
    return each.mean(-1)


def pretrained(seed):
    params = jax.jit(model.init)(jax.random.key(seed), examples(-1, 0))["params"]
    loss = lambda p, _, batch: cross_entropy(model.apply({"params": p}, batch[0]), batch[0]).mean()
    return train_on(loss, params, None, (examples(-1, 0, 8192),), 3e-3, 300, seed, "the base")


@jax.jit
def step(stacked, state, params, slots, ids):
    """One step of all who have examples: slots (B,), ids (B, 13). Returns each one's mean loss."""

    def total(stacked):
        bound = lambda slot: lora.bind(params, lora.algebra.choose(stacked, slot))
        one = lambda slot, ids: cross_entropy(
            adapted({"params": bound(slot)}, ids[None]), ids[None]
        )
        losses = jax.vmap(one)(slots, ids)[:, 0]
        means, active = lora.optim.by_slot(losses, slots, len(TENANTS))
        return means.sum(), (means, active)

    grads, (means, active) = jax.grad(total, has_aux=True)(stacked)
    updates, state = lora.optim.per_slot(tx).update(grads, state, stacked, active=active)
    return optax.apply_updates(stacked, updates), state, means


@jax.jit
def alone(adapters, state, params, ids):
    loss = lambda ad: cross_entropy(adapted({"params": lora.bind(params, ad)}, ids), ids).mean()
    updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
    return optax.apply_updates(adapters, updates), state


def start(params, k):
    """A tenant's first adapters, and its optimiser's state."""
    rank, alpha, rate, *_ = TENANTS[k]
    survey = lora.survey(model.apply, {"params": params}, examples(k, 0))
    adapters = lora.init(jax.random.key(k), params, lora.LoRAConfig(rank=rank, alpha=alpha), survey)
    state = tx.init(adapters)
    state.hyperparams["learning_rate"] = jnp.float32(rate)
    return adapters, state


def main():
    parser = options(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the base")
    parser.add_argument("--out", type=Path, default=Path("runs/tenants.png"), help="the picture")
    args = parser.parse_args()
    params = pretrained(args.seed)
    ranks = [tenant[0] for tenant in TENANTS]
    stacked = lora.algebra.stack([start(params, 0)[0]], capacity=len(TENANTS), rank=max(ranks))
    state = lora.optim.per_slot(tx).init(stacked)
    curves = {k: [] for k in range(len(TENANTS))}
    there = {k: range(*tenant[3:]) for k, tenant in enumerate(TENANTS)}
    for i in (bar := tqdm(range(200), "tenants")):
        for k in (k for k in there if there[k][0] == i):
            stacked, state = lora.optim.join(tx, stacked, state, k, *start(params, k))
        who = [k for k in curves if i in there[k]]
        ids = jnp.concatenate([examples(k, i) for k in curves])
        slots = jnp.repeat(jnp.array([k if k in who else -1 for k in curves]), EACH)
        stacked, state, means = step(stacked, state, params, slots, ids)
        for k in who:
            curves[k].append(float(means[k]))
        bar.set_postfix_str(" ".join(f"{k}:{curves[k][-1]:.2f}" for k in who))
    rows = []
    for k, (rank, alpha, rate, *_) in enumerate(TENANTS):
        adapters, _ = lora.optim.leave(tx, stacked, state, k)
        ids = examples(k, 9999, 200)
        logits = model.apply({"params": lora.merge(params, adapters)}, ids)
        right = (logits[:, DIGITS:-1].argmax(-1) == ids[:, DIGITS + 1 :]).mean()
        rows.append((f"+{k + 1}", rank, alpha, f"{rate:g}", len(curves[k]), float(right)))
    print(format_table(("task", "rank", "alpha", "rate", "steps", "digits right"), rows))
    own, own_state = start(params, 7)
    for i in there[7]:
        own, own_state = alone(own, own_state, params, examples(7, i))
    pairs = zip(jax.tree.leaves(own), jax.tree.leaves(adapters), strict=True)
    off = max(float(abs(x - y).max() / abs(x).max()) for x, y in pairs)
    print(f"tenant 7 alone: its adapters differ by {off:.0e} of the largest value")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print("losses:", plot(args.out, {f"+{k + 1}": np.array(v) for k, v in curves.items()}))


if __name__ == "__main__":
    main()
