"""Tenants of one stack end as they would have alone: late, paused, of other ranks and rates."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import rand
from common import fails, noisy

import lora_jax as lora


@pytest.fixture(autouse=True)
def as_optax_has_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


KEY, D, CAPACITY = jax.random.key(0), 6, 4
PARAMS = {
    "up": rand.normal(KEY, (D, 8)) / 2,
    "layers": rand.normal(KEY, (2, 8, 8)) / 3,
    "down": rand.normal(KEY, (8, 3)) / 3,
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
    x = rand.normal(jax.random.fold_in(jax.random.key(i), step), (2 + i % 2, D))
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
           optax.adagrad(0.1), optax.MultiSteps(optax.adam(1e-2), 2),
           optax.chain(lora.optim.lora_pro(), optax.sgd(1e-3)), lora.optim.lora_rite(1e-3),
           lora.optim.lora_muon(1e-2), lora.optim.lora_fa(optax.sgd(1e-2), corrected=True)],
    ids=["sgd", "lion", "schedule-free", "adagrad", "accumulated", "pro", "rite", "muon", "fa"],
)  # fmt: skip
def test_other_optimisers(tx):
    """Those that look at each element alone, and those that know a rank and alpha; state that is a
    copy of the adapters, as well."""
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


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.add_decayed_weights(0.5), optax.clip_by_global_norm(0.1)),
        optax.contrib.dowg(1.0),
    ],
    ids=["decay", "distance"],
)
def test_what_a_tenant_lacks_is_in_no_norm(tx):
    """A slot holds the base's values in a leaf that is not trained."""
    params = {"w": PARAMS["up"], "bias": jnp.full(8, 3.0)}
    node = lora.LoRA(jnp.ones((D, 2)) / 4, jnp.ones((2, 8)) / 3, 1.5, lora.Geometry((0,), (1,)))
    full = {"w": node, "bias": lora.Full(params["bias"])}
    stacked = lora.algebra.stack([full], capacity=2, rank=3, base=params)
    slots, own, adapters = lora.optim.per_slot(tx), tx.init({"w": node}), {"w": node}
    # of a linear function of the update s·A·B, with s·B in the stack
    a, b = jnp.ones((D, 2)), jnp.ones((2, 8))
    grads = {"w": dataclasses.replace(node, a=a, b=node.scale * b)}

    @jax.jit
    def both(adapters, own, stacked):
        stacked, state = lora.optim.join(tx, stacked, slots.init(stacked), 1, adapters)
        zeros = jax.tree.map(jnp.zeros_like, stacked)
        more = dataclasses.replace(
            zeros["w"], a=zeros["w"].a.at[1, :, :2].set(a), b=zeros["w"].b.at[1, :2].set(b)
        )
        for _ in range(2):
            updates, own = tx.update(grads, own, adapters)
            adapters = optax.apply_updates(adapters, updates)
            updates, state = slots.update(zeros | {"w": more}, state, stacked)
            stacked = optax.apply_updates(stacked, updates)
        return (adapters, own), (stacked, state)

    want, there = both(adapters, own, stacked)
    got = lora.optim.leave(tx, *there, 1)
    chex.assert_trees_all_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_scale_in_fp64():
    with jax.enable_x64(True):
        node = lora.LoRA(jnp.ones((D, 3)), jnp.ones((3, 8)), 1 / 3, lora.Geometry((0,), (1,)))
        tx, stacked = optax.sgd(0.5), lora.algebra.stack([{"w": node}])
        slots = lora.optim.per_slot(tx)
        stacked, state = lora.optim.join(tx, stacked, slots.init(stacked), 0, {"w": node})
        updates, state = slots.update(jax.tree.map(jnp.ones_like, stacked), state, stacked)
        (got, _) = lora.optim.leave(tx, optax.apply_updates(stacked, updates), state, 0)
        np.testing.assert_allclose(got["w"].b, 1 - 0.5 / 3, rtol=1e-14)


def test_states_of_other_kinds():
    """A random key in it; arrays of NumPy, as after `jax.device_get`."""
    tx = optax.add_noise(0.1, 0.5, jax.random.key(3))
    adapters = {"bias": lora.Full(jnp.ones(3))}
    stacked = lora.algebra.stack([adapters], capacity=2, base=PARAMS)
    one = stacked, lora.optim.per_slot(tx).init(stacked)
    own = lora.optim.leave(tx, *lora.optim.join(tx, *one, 1, adapters), 1)[1]
    assert own.rng_key == jax.random.key(3)
    tx = optax.trace(0.9)
    one = stacked, lora.optim.per_slot(tx).init(stacked)
    want = lora.optim.join(tx, *one, 0, adapters)
    chex.assert_trees_all_equal(lora.optim.join(tx, *jax.device_get(one), 0, adapters), want)


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
    with fails(r"(?s)not that of these adapters.*expected float32 of \(.*found float32 of \("):
        join(0, TENANTS[0], TX.init(tenant(1, 3, 4)))
    with fails(r"slot 4: expected 0 to 3"):
        lora.optim.leave(TX, stacked, state, 4)
    with fails(r"slot 3 is empty: expected one that has adapters"):
        lora.optim.leave(TX, stacked, state, 3)
    update = lora.optim.per_slot(TX).update
    for active in (jnp.ones(5, bool), jnp.ones(3, bool), jnp.ones(4), [[True], [True, False]]):
        with fails(r"expected 4 booleans(, found|: .*inhomogeneous)"):
            update(stacked, state, stacked, active=active)
    with fails(r"(?s)expected a stack, found:.*'up' is a LoRA that has no slots"):
        lora.optim.per_slot(TX).init(TENANTS[0])
    smaller = jax.tree.map(lambda x: x[:, :2], stacked)
    with fails(r"(?s)not that of this stack.*mu\['up'\].a: expected \(5, "):
        update(smaller, state, smaller)
    spoilt = TX.init(TENANTS[0])
    spoilt.hyperparams["learning_rate"] = jnp.float32(jnp.nan)
    with fails(r"(?s)this state holds NaN:.*learning_rate"):
        lora.optim.join(TX, stacked, state, 0, TENANTS[0], spoilt)
    with fails(r"expected nothing, found a str"):
        lora.optim.join(TX, stacked, state, 0, TENANTS[0], "state")
    for tx in (None, "adam", optax.adam):
        with fails("expected an optimiser, such as optax.adam"):
            lora.optim.per_slot(tx)
        with fails("expected an optimiser, such as optax.adam"):
            lora.optim.join(tx, stacked, state, 0, TENANTS[0])
    for capacity in (0, -4, 4.0, None, True):
        with fails("capacity=.*expected an integer >= 1"):
            lora.optim.by_slot(jnp.ones(2), jnp.zeros(2, int), capacity)
    masked = optax.masked(TX, jax.tree.map(lambda _: True, stacked))
    own = lora.optim.per_slot(masked).init(stacked)
    with fails(r"(?s)does not take these adapters: .*as functions fit any tenant"):
        lora.optim.join(masked, stacked, own, 0, TENANTS[2])
    with fails(r"(?s)does not take these adapters: .*as functions fit any tenant"):
        lora.optim.per_slot(masked).init({"up": stacked["up"]})
    with fails(r"found float64 of \(2,\) and timedelta64"):
        lora.optim.by_slot([1.0, 2.0], np.ones(2, "m8[s]"), 4)
    for values in ("ab", [True, False], [[1.0], [1.0, 2.0]]):
        with fails(r"expected \(B,\) values and \(B,\) integers"):
            lora.optim.by_slot(values, [0, 1], 4)


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


@pytest.mark.parametrize("events", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_nothing_is_compiled_anew(events):
    """Joins, leaves and swaps at random, and a step after each; who is not there stays to the bit."""
    rng = np.random.default_rng(1)
    stacked, state = lora.optim.join(TX, *start(), 3, TENANTS[1])
    still = jax.tree.map(lambda x: x[3], (stacked, state))
    step = jax.jit(chex.assert_max_traces(mixed.__wrapped__, 1))
    # A trace for each structure of adapters, none for a slot.
    joined = lambda *args: lora.optim.join(TX, *args)
    join = jax.jit(chex.assert_max_traces(joined, len(TENANTS)))
    x, y = (jnp.concatenate(part) for part in zip(*(examples(i, 0) for i in range(3))))
    away = {i: (tenant, TX.init(tenant)) for i, tenant in enumerate(TENANTS)}
    there, seen, counts = {}, [0, 0, 0], dict.fromkeys(("join", "leave", "swap"), 0)
    while sum(counts.values()) < events:
        slot = int(rng.integers(3))
        i = int(rng.choice([*away, -1]))  # who comes; −1: nobody
        left = there.pop(slot, None)
        if left is not None:
            away[left] = lora.optim.leave(TX, stacked, state, slot)
        if i >= 0:
            stacked, state = join(stacked, state, jnp.int32(slot), *away.pop(i))
            there[slot] = i
        kind = {(1, 1): "swap", (1, 0): "leave", (0, 1): "join"}.get((left is not None, i >= 0))
        if kind is not None:
            counts[kind] += 1
        at = {i: slot for slot, i in there.items()}
        slots = jnp.repeat(jnp.array([at.get(i, -1) for i in range(3)]), jnp.array([2, 3, 2]))
        stacked, state = step(stacked, state, slots, x, y)
        for i in at:
            seen[i] += 1
    assert min(counts.values()) > events / 10
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[3], (stacked, state)), still)
    away |= {i: lora.optim.leave(TX, stacked, state, slot) for slot, i in there.items()}
    for i, (adapters, own) in away.items():
        assert int(own.count) == seen[i] > 0
        assert jax.tree.structure(adapters) == jax.tree.structure(TENANTS[i])


def test_one_that_diverges_harms_nobody():
    stacked, state = start()
    for i in (0, 1):
        stacked, state = lora.optim.join(TX, stacked, state, i, TENANTS[i])
    slots, x, y = batch((0, 1), 0)
    want = mixed(stacked, state, slots, x, y)
    got = mixed(stacked, state, slots, x.at[0].set(jnp.nan), y)  # an example of tenant 0
    for i in (1, 2, -1):
        own = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        chex.assert_trees_all_equal(own(got), own(want))
    assert np.isnan(got[0]["down"].b[0]).any()


def test_a_slot_that_is_traced():
    """One that there is not changes neither the stack nor the state."""
    stacked, state = start()
    join = jax.jit(lambda slot: lora.optim.join(TX, stacked, state, slot, TENANTS[0]))
    for slot in (-1, -2, CAPACITY, 99):
        chex.assert_trees_all_equal(join(slot), (stacked, state))
    want = lora.optim.join(TX, stacked, state, 2, TENANTS[0])
    chex.assert_trees_all_close(join(2), want, rtol=1e-6)


def test_what_belongs_to_something_else():
    stacked, state = start()
    slots, larger = lora.optim.per_slot(TX), lora.algebra.stack([TENANTS[1]], capacity=9, rank=4, base=PARAMS)  # fmt: skip
    for call in (
        lambda st, own: lora.optim.join(TX, st, own, 0, TENANTS[0]),
        lambda st, own: lora.optim.leave(TX, st, own, 0),
        lambda st, own: slots.update(st, own, st),
    ):
        with fails(r"expected a PerSlotState, found a InjectState"):
            call(stacked, state.inner)
        with fails(r"(?s)not that of this stack.*'up': slots in the stack 10, in the state 5"):
            call(larger, state)
        with fails(r"'up': slots in the stack none, in the state 5"):
            call({"down": stacked["down"]}, state)
    with fails(r"'up': slots in the stack 10, in the state 5"):
        slots.update(stacked, state, larger)
    other = optax.sgd(0.1)
    with fails(r"not of this optimiser"):
        lora.optim.join(other, stacked, state, 0, TENANTS[0])
    with fails(r"not of this optimiser"):
        lora.optim.leave(other, stacked, state, 0)
    factored = optax.adafactor(1e-2, min_dim_size_to_factor=2)  # not of rank 1, which is no matrix
    with fails(r"(?s)another state at the tenant's rank.*v_col.*in the stack \("):
        lora.optim.join(
            factored, stacked, lora.optim.per_slot(factored).init(stacked), 0, TENANTS[2]
        )
    with fails(r"found None; to empty a slot"):
        lora.optim.join(TX, stacked, state, 0, None)
    half = jax.tree.map(lambda x: x.astype(jnp.float16), TX.init(TENANTS[0]))
    with fails(r"(?s)not that of these adapters.*expected int32 of \(\), found float16"):
        lora.optim.join(TX, stacked, state, 0, TENANTS[0], half)
    with fails(r"under jax.jit they have no values"):
        jax.jit(lambda state: lora.optim.leave(TX, stacked, state, 0)[1])(state)


@pytest.mark.parametrize(
    "values, slots",
    [((3, 3), (3,)), ((3,), (1,)), ((), ()), ((3,), (3, 1))],
)
def test_by_slot_takes_one_number_for_each_example(values, slots):
    with fails(r"expected \(B,\) values and \(B,\) integers, found float32 of"):
        lora.optim.by_slot(jnp.ones(values), jnp.zeros(slots, jnp.int32), 3)
    with fails(r"found float32 of \(3,\) and float32 of \(3,\)"):
        lora.optim.by_slot(jnp.ones(3), jnp.zeros(3), 3)
    with jax.numpy_dtype_promotion("strict"):
        means, active = lora.optim.by_slot(jnp.ones(3), jnp.array([1, -1, 9], jnp.int8), 3)
    assert means.tolist() == [0, 1, 0] and active.tolist() == [False, True, False]
    for kind in (np.int64, np.uint64):  # of which JAX keeps 32 bits
        means, active = lora.optim.by_slot(
            [7.0, 1.0, 5.0], np.array([1 << 40, 1, 1 << 32], kind), 3
        )
        assert means.tolist() == [0, 1, 0] and active.tolist() == [False, True, False]


@pytest.mark.parametrize("along", ["axes", "slots"])
def test_a_stack_over_devices(along):
    """FSDP × TP: placed as before after each change, one program, and the values of one device."""
    flat = {"up": PARAMS["layers"][0], "down": PARAMS["layers"][1]}
    config = lora.LoRAConfig(rank=2, alpha=4, targets=["up", "down"])
    own = [noisy(lora.init(KEY, flat, config), key=i, scale=0.3) for i in range(3)]
    apply, tx = lora.adapt(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]), optax.sgd(0.1, 0.9)
    slots, capacity = lora.optim.per_slot(tx), 7
    x, which = rand.normal(KEY, (6, 8)), jnp.array([0, 0, 1, 1, 2, -1])

    def step(stacked, state, params):
        def total(stacked):
            one = lambda i, x: jnp.mean(
                apply(lora.bind(params, lora.algebra.choose(stacked, i)), x[None]) ** 2
            )
            means, active = lora.optim.by_slot(jax.vmap(one)(which, x), which, capacity)
            return means.sum(), active

        grads, active = jax.grad(total, has_aux=True)(stacked)
        updates, state = slots.update(grads, state, stacked, active=active)
        return optax.apply_updates(stacked, updates), state

    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    P = jax.sharding.PartitionSpec
    at = lambda *spec: jax.sharding.NamedSharding(mesh, P(*spec))
    params = jax.device_put(flat, {"up": at("fsdp", "tp"), "down": at("tp", "fsdp")})
    one = lora.algebra.stack(own[:1], capacity=capacity, rank=3)
    whole = jax.tree.map(lambda _: at(("fsdp", "tp")), one)
    where = lora.parallel.shardings(params, one) if along == "axes" else whole
    states = lora.parallel.state_shardings(jax.eval_shape(slots.init, one), one, where)
    one = one, slots.init(one)
    many = jax.device_put(one, (where, states))
    together = jax.jit(step, out_shardings=(where, states))
    solo = jax.jit(step)
    for i in (0, 1, 2, 1):  # tenant 1 has been trained on another device, with its state
        far = jax.device_put((own[i], tx.init(own[i])), jax.devices()[5 * (i == 1)])
        many = lora.optim.join(tx, *many, i, *far)
        one = lora.optim.join(tx, *one, i, own[i])
        placed = jax.tree.map(lambda x, w: x.sharding.is_equivalent_to(w, x.ndim), many, (where, states))  # fmt: skip
        assert all(jax.tree.leaves(placed))
        many, one = together(*many, params), solo(*one, flat)
    assert together._cache_size() == 1
    chex.assert_trees_all_close(jax.device_get(many), jax.device_get(one), atol=1e-5, rtol=1e-5)
    for i in range(3):
        pair = [jax.device_get(lora.optim.leave(tx, *t, i)) for t in (many, one)]
        chex.assert_trees_all_close(*pair, atol=1e-5, rtol=1e-5)


def test_a_tenant_from_another_device():
    """Nothing is on a mesh: `put` and `join` bring it to the device of the stack."""
    stacked, state = start()
    far = jax.device_put((TENANTS[0], TX.init(TENANTS[0])), jax.devices()[3])
    got = lora.optim.join(TX, stacked, state, 1, *far)
    chex.assert_trees_all_equal(got, lora.optim.join(TX, stacked, state, 1, TENANTS[0]))
