"""Group relative policy optimisation (arXiv:2402.03300) of adapters on a tiny Llama.

The base has learnt to answer each of six digits x with x, x + 1, … or x + 4, whichever. The
verifier wants x + 1: the reward is the share of digits that are right. There is one copy of the
base: with the adapters it samples, through a cache of keys and values, and is trained; without, in
the same program, it is the reference. For meshes, and for a server, see docs/rl.md.

    python examples/grpo.py          # --help for the options

Expected (seed 0; two cores, about a minute when idle): the reward goes from 0.20, which is chance,
    to above 0.9 in 60 steps; the sampler's log-probabilities are the trainer's to about 1e-5.
"""

import jax
import jax.numpy as jnp
import optax
from digits_convnet import train_on
from models.llama import Llama, LlamaConfig, empty_cache, sample
from reporting import options, whole
from tqdm import tqdm

import lora_jax as lora

DIGITS, BAR, CHOICES, WANTED = 6, 10, 5, 1
PROMPTS, GROUP = 16, 16  # prompts of a step, and answers to each
CLIP, BETA = 0.2, 0.01  # of the ratio, and the weight of the divergence from the reference
config = LlamaConfig(11, 64, 128, 2, 4, 2, 1e4)
model = Llama(config)
adapted = lora.adapt(model.apply)
tx = optax.adam(5e-3)


def prompts(key, n):
    """(n, 7) tokens: digits and a bar."""
    digits = jax.random.randint(key, (n, DIGITS), 0, 10)
    return jnp.concatenate([digits, jnp.full((n, 1), BAR)], 1)


def verify(asked, answers):
    """(B,), the share of digits that are as wanted: asked (B, 7), answers (B, 6)."""
    return (answers == (asked[:, :DIGITS] + WANTED) % 10).mean(-1)


def log_probabilities(apply, params, asked, answers):
    """(B, 6), of each token of the answers."""
    ids = jnp.concatenate([asked, answers], 1)
    logits = apply({"params": params}, ids)[:, DIGITS:-1]
    return jnp.take_along_axis(jax.nn.log_softmax(logits), answers[..., None], -1)[..., 0]


def pretrained(seed, examples=16384):
    asked_key, key = jax.random.split(jax.random.key(seed + 1))
    asked = prompts(asked_key, examples)
    answers = (asked[:, :DIGITS] + jax.random.randint(key, (examples, DIGITS), 0, CHOICES)) % 10
    params = jax.jit(model.init)(jax.random.key(seed), asked[:1])["params"]
    loss = lambda p, _, batch: -log_probabilities(model.apply, p, *batch).mean()
    return train_on(loss, params, None, (asked, answers), 3e-3, 300, seed, "the base")


def rollout(adapters, params, asked, key):
    """Answers (B, 6), and the sampler's log-probability of each token."""
    cache = empty_cache(config, len(asked), asked.shape[1] + DIGITS)
    return sample(adapted, lora.bind(params, adapters), asked, cache, DIGITS, key)


def loss_fn(adapters, params, asked, answers, sampled, advantages):
    """One program for both policies: `params` is one argument, adapted here and plain there."""
    policy = log_probabilities(adapted, lora.bind(params, adapters), asked, answers)
    reference = log_probabilities(model.apply, params, asked, answers)
    ratio = jnp.exp(policy - sampled)
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantages)
    off = reference - policy
    divergence = jnp.exp(off) - off - 1  # from above zero, without bias
    return (BETA * divergence - gain).mean(), (divergence.mean(), jnp.abs(policy - sampled).max())


@jax.jit
def step(adapters, state, params, key):
    """One step; the rewards' mean, the divergence, and how far trainer and sampler are apart."""
    asked_key, key = jax.random.split(key)
    asked = jnp.repeat(prompts(asked_key, PROMPTS), GROUP, 0)
    answers, sampled = rollout(adapters, params, asked, key)
    rewards = verify(asked, answers)
    groups = rewards.reshape(PROMPTS, GROUP)
    advantages = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, keepdims=True) + 1e-4)
    batch = asked, answers, sampled, advantages.reshape(-1, 1)
    grads, (divergence, off) = jax.grad(loss_fn, has_aux=True)(adapters, params, *batch)
    updates, state = tx.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state, (rewards.mean(), divergence, off)


def main():
    parser = options(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--steps", type=whole(), default=60, help="of training")
    args = parser.parse_args()
    params = pretrained(args.seed)
    key = jax.random.key(args.seed)
    survey = lora.survey(model.apply, {"params": params}, prompts(key, 1))
    adapters = lora.init(key, params, lora.LoRAConfig(rank=8, alpha=16), survey)
    state, rewards, apart = tx.init(adapters), [], 0.0
    for i in (bar := tqdm(range(args.steps), "grpo")):
        adapters, state, found = step(adapters, state, params, jax.random.fold_in(key, i))
        reward, divergence, off = map(float, found)
        rewards.append(reward)
        apart = max(apart, off)
        bar.set_postfix_str(f"reward {reward:.2f}, divergence {divergence:.2f}")
    asked = prompts(jax.random.key(args.seed + 999), 256)
    for name, own in {
        "the base": jax.tree.map(jnp.zeros_like, adapters),
        "tuned": adapters,
    }.items():
        answers, _ = rollout(own, params, asked, key)
        print(f"{name}: reward {float(verify(asked, answers).mean()):.2f} on prompts of its own")
    print(f"sampler and trainer: log-probabilities at most {apart:.0e} apart")


if __name__ == "__main__":
    main()
