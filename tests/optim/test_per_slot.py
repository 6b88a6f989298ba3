"""Tenants of one stack end as they would have alone: late, paused, of other ranks and rates."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from common import fails, noisy

import lora_jax as lora


@pytest.fixture(autouse=True)
def as_optax_has_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


KEY, D, CAPACITY = jax.random.key(0), 6, 4
PARAMS = {
    "up": jax.random.normal(KEY, (D, 8)) / 2,
    "layers": jax.random.normal(KEY, (2, 8, 8)) / 3,
    "down": jax.random.normal(KEY, (8, 3)) / 3,
    "bias": jnp.zeros(3),
}


def fn(p, x):
    x, _ = jax.lax.scan(
        lambda x, w: (x + jnp.tanh(x @ w), None), jnp.tanh(x @ p["up"]), p["layers"]
    )
    return x @ p["down"] + p["bias"]


SURVEY, APPLY = lora.survey(fn, PARAMS, jnp.ones((1, D))), lora.adapt(fn)


def tenant(seed, rank, alpha, targets=("up", "layers", "down"), **kwargs):
    config = lora.LoRAConfig(rank=rank, alpha=alpha, targets=[*targets], **kwargs)
    return noisy(lora.init(jax.random.key(seed), PARAMS, config, SURVEY), key=seed, scale=0.3)


TENANTS = [
    tenant(1, 2, 4),
    tenant(2, 3, 1, full="bias"),
    tenant(3, 1, 5, ("layers",)),
]
SETTINGS = [(3e-2, 0.5), (1e-2, 5.0), (5e-3, 1e9)]  # learning rates and clips
SEEN = [range(100), range(7, 100), (*range(3, 11), *range(25, 100, 2))]  # steps


def examples(i, step):
    x = jax.random.normal(jax.random.fold_in(jax.random.key(i), step), (2 + i % 2, D))
    return x, jnp.sin(x[:, :3] * (i + 1))


def loss(adapters, x, y):
    return jnp.mean((APPLY(lora.bind(PARAMS, adapters), x) - y) ** 2, -1)


def clipped(learning_rate, clip):
    schedule = optax.cosine_decay_schedule(1.0, 30)
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(learning_rate, weight_decay=0.1),
        optax.scale_by_schedule(schedule),
    )


TX = optax.inject_hyperparams(clipped)(learning_rate=1e-2, clip=1.0)


def alone(i, steps):
    adapters, state = TENANTS[i], TX.init(TENANTS[i])
    state.hyperparams.update(zip(("learning_rate", "clip"), map(jnp.float32, SETTINGS[i])))

    @jax.jit
    def step(adapters, state, x, y):
        grads = jax.grad(lambda ad: jnp.mean(loss(ad, x, y)))(adapters)
        updates, state = TX.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state

    for k in steps:
        adapters, state = step(adapters, state, *examples(i, k))
    return adapters, state


def start():
    stacked = lora.algebra.stack([TENANTS[1]], capacity=CAPACITY, rank=4, base=PARAMS)
    return stacked, lora.optim.per_slot(TX).init(stacked)


BATCH = 7


@jax.jit
def mixed(stacked, state, slots, x, y):
    def total(stacked):
        one = lambda i, x, y: loss(lora.algebra.choose(stacked, i), x[None], y[None])[0]
        means, active = lora.optim.by_slot(jax.vmap(one)(slots, x, y), slots, CAPACITY)
        return means.sum(), active

    grads, active = jax.grad(total, has_aux=True)(stacked)
    updates, state = lora.optim.per_slot(TX).update(grads, state, stacked, active=active)
    return optax.apply_updates(stacked, updates), state


def batch(who, step):
    """The examples of those who train in a step; others of the base fill the batch."""
    slots, rows = [], []
    for i in who:
        rows.append(examples(i, step))
        slots += [i] * len(rows[-1][0])
    x, y = (jnp.concatenate(part) for part in zip(*rows))
    more = BATCH - len(slots)
    pad = lambda v: jnp.pad(v, ((0, more), (0, 0)), constant_values=3.0)
    return jnp.array(slots + [-1] * more), pad(x), pad(y)


def hyper(state, i):
    set_ = {
        name: state.inner.hyperparams[name].at[i].set(value)
        for name, value in zip(("learning_rate", "clip"), SETTINGS[i])
    }
    return state._replace(inner=state.inner._replace(hyperparams=set_))


@pytest.mark.parametrize("steps", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_each_ends_as_it_would_alone(steps):
    """They join late and pause; two leave in the middle and come back with their state."""
    which = range(len(TENANTS))
    stacked, state = start()
    counted = jax.jit(chex.assert_max_traces(mixed.__wrapped__, 1))
    for k in range(steps):
        for i in which:
            if SEEN[i][0] == k:
                stacked, state = lora.optim.join(TX, stacked, state, i, TENANTS[i])
                state = hyper(state, i)
        if k == 8:
            adapters, own = lora.optim.leave(TX, stacked, state, 0)
            stacked, state = lora.optim.join(TX, stacked, state, 0, TENANTS[2])  # another tenant
            stacked, state = lora.optim.join(TX, stacked, state, 0, adapters, own)
        who = [i for i in which if k in SEEN[i]]
        stacked, state = counted(stacked, state, *batch(who, k))
    for i in which:
        want, own = alone(i, [k for k in SEEN[i] if k < steps])
        got, state_of = lora.optim.leave(TX, stacked, state, i)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        chex.assert_trees_all_close(got, want, atol=1e-5, rtol=1e-5)
        chex.assert_trees_all_close(state_of, own, atol=1e-5, rtol=1e-5)
        moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), got, TENANTS[i])
        assert max(jax.tree.leaves(moved)) > 1e-3
    empty = lora.algebra.choose(stacked, -1)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(empty))


@pytest.mark.parametrize(
    "tx", [optax.sgd(0.1, momentum=0.9), optax.lion(1e-2), optax.contrib.schedule_free_adamw(1e-2),
           optax.adagrad(0.1), optax.MultiSteps(optax.adam(1e-2), 2)],
    ids=["sgd", "lion", "schedule-free", "adagrad", "accumulated"],
)  # fmt: skip
def test_other_optimisers(tx):
    """Those that look at each element alone; state that is a copy of the adapters, as well."""
    adapters = lora.methods.dora(PARAMS, tenant(4, 2, 3, ("down", "up")))
    stacked = lora.algebra.stack([adapters], capacity=2, rank=3, base=PARAMS)
    slots = lora.optim.per_slot(tx)
    stacked, state = lora.optim.join(tx, stacked, slots.init(stacked), 1, adapters)
    own = tx.init(adapters)
    data = examples(0, 0)
    objective = lambda ad: jnp.mean(loss(ad, *data))
    one = jax.jit(lambda ad, own: tx.update(jax.grad(objective)(ad), own, ad))
    picked = lambda st: objective(lora.algebra.choose(st, 1))
    every = jax.jit(lambda st, own: slots.update(jax.grad(picked)(st), own, st))
    for _ in range(4):
        updates, own = one(adapters, own)
        adapters = optax.apply_updates(adapters, updates)
        updates, state = every(stacked, state)
        stacked = optax.apply_updates(stacked, updates)
    got, got_state = lora.optim.leave(tx, stacked, state, 1)
    chex.assert_trees_all_close((got, got_state), (adapters, own), atol=1e-5, rtol=1e-5)


def test_nothing_is_changed_by_what_does_not_fit():
    stacked, state = start()
    join = functools.partial(lora.optim.join, TX, stacked, state)
    with fails(r"number 4: expected 0 to 3"):
        join(4, TENANTS[0])
    with fails(r"number -1: expected 0 to 3"):
        join(-1, TENANTS[0])
    with fails(r"(?s)'up'.*rank of at most 4, found 5"):
        join(0, tenant(1, 5, 4, ("up", "layers")))
    with fails(r"'other' is no leaf of the stack"):
        join(0, {"other": TENANTS[0]["up"]})
    with fails(r"(?s)not that of these adapters.*expected \(.*found \("):
        join(0, TENANTS[0], TX.init(tenant(1, 3, 4)))
    with fails(r"slot 4: expected 0 to 3"):
        lora.optim.leave(TX, stacked, state, 4)
    update = lora.optim.per_slot(TX).update
    for active in (jnp.ones(5, bool), jnp.ones(3, bool), jnp.ones(4)):
        with fails(r"active: expected 4 booleans, found"):
            update(stacked, state, stacked, active=active)
    with fails(r"expected a stack, found arrays with"):
        lora.optim.per_slot(TX).init(TENANTS[0])


def test_checkpoints(tmp_path):
    """One slot as a run of its own, and all of them as orbax has any tree."""
    stacked, state = start()
    stacked, state = lora.optim.join(TX, stacked, state, 2, TENANTS[2])
    adapters, own = lora.optim.leave(TX, stacked, state, 2)
    with ocp.CheckpointManager(tmp_path / "one") as manager:
        lora.checkpoint.save(manager, 1, adapters, base=PARAMS, state=own)
    found = lora.checkpoint.restore(tmp_path / "one", base=PARAMS, state=own)
    again = lora.optim.join(TX, stacked, state, 2, found.adapters, found.state)
    chex.assert_trees_all_close(again, (stacked, state), rtol=1e-6)  # B / s · s
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "all", (stacked, state))
        checkpointer.wait_until_finished()
        chex.assert_trees_all_equal(
            checkpointer.restore(tmp_path / "all", (stacked, state)), (stacked, state)
        )
