"""optax: frozen leaves get no state and no update; LoRA+; invariances of the parametrisation."""

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rand
from common import assert_close, fails, noisy

import lora_jax as lora

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def optax_promotes():
    """optax itself mixes types, as `beta ** count`."""
    with jax.numpy_dtype_promotion("standard"):
        yield


PARAMS = {
    "table": rand.normal(KEY, (10, 8)),
    "up": {"kernel": rand.normal(KEY, (8, 6)), "bias": jnp.zeros(6)},
}
IDS = jnp.array([1, 2, 3])


def fn(p, ids):
    return jnp.tanh(p["table"][ids] @ p["up"]["kernel"] + p["up"]["bias"])


def make(**kwargs):
    survey = lora.survey(fn, PARAMS, IDS)
    config = lora.LoRAConfig(**{"rank": 2, "targets": ["up", "table"], **kwargs})
    return lora.init(KEY, PARAMS, config, survey)


def loss(params):
    return jnp.sum(lora.adapt(fn)(params, IDS) ** 2)


def test_labels():
    adapters = make(bias="all")
    labels = lora.optim.labels({"params": PARAMS, "adapters": adapters})
    assert set(jax.tree.leaves(labels["params"])) == {"frozen"}
    ad = labels["adapters"]
    assert (ad["table"].a, ad["table"].b) == ("embedding_a", "embedding_b")
    assert (ad["up"]["kernel"].a, ad["up"]["kernel"].b, ad["up"]["bias"].value) == (
        "a",
        "b",
        "full",
    )
    rows = lora.init(KEY, PARAMS, lora.LoRAConfig(rank=2, targets="up", rows={"table": [1]}))
    assert lora.optim.labels(rows)["table"].value == "rows"


def test_one_tree():
    """Base and adapters in one tree: no state for the base, an update of exactly zero."""
    tree = {"params": PARAMS, "adapters": noisy(make())}
    tx = lora.optim.trained_only(optax.adamw(1e-2, weight_decay=0.1))
    state = tx.init(tree)
    n = sum(x.size for x in jax.tree.leaves(tree["adapters"]))
    assert sum(x.size for x in jax.tree.leaves(state)) == 2 * n + 1
    grads = jax.grad(lambda t: loss(lora.bind(t["params"], t["adapters"])))(tree)
    assert not any(np.any(g) for g in jax.tree.leaves(grads["params"]))
    updates, _ = tx.update(grads, state, tree)
    new = optax.apply_updates(tree, updates)
    jax.tree.map(np.testing.assert_array_equal, new["params"], PARAMS)
    assert all(
        np.any(a != b)
        for a, b in zip(jax.tree.leaves(new["adapters"]), jax.tree.leaves(tree["adapters"]))
    )


@pytest.mark.parametrize("tx", [
    optax.adamw(1e-2), optax.sgd(1e-4, momentum=0.9), optax.lion(1e-3), optax.adafactor(1e-2),
    optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    optax.MultiSteps(optax.adam(1e-2), 2), optax.contrib.schedule_free_adamw(1e-2),
    optax.masked(optax.adam(1e-2), lambda t: jax.tree.map(lambda x: x.ndim == 2, t)),
], ids=range(8))  # fmt: skip
def test_any_optimiser_works_on_the_adapters(tx):
    adapters = make()
    state, first = tx.init(adapters), loss(lora.bind(PARAMS, adapters))

    @jax.jit
    def step(adapters, state):
        grads = jax.grad(lambda ad: loss(lora.bind(PARAMS, ad)))(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state

    for _ in range(6):
        adapters, state = step(adapters, state)
    assert loss(lora.bind(PARAMS, adapters)) < first
    scales = [
        n.scale for n in jax.tree.leaves(adapters, is_leaf=lambda x: isinstance(x, lora.LoRA))
    ]
    assert scales == [8.0, 8.0]  # out of reach of the optimiser and of weight decay


def test_lora_plus():
    adapters = noisy(make(bias="all"))
    grads = jax.tree.map(jnp.ones_like, adapters)
    tx = lora.optim.lora_plus(optax.sgd, 0.5, ratio=16, embedding_learning_rate=0.125)
    updates, _ = tx.update(grads, tx.init(adapters), adapters)
    up, table = updates["up"], updates["table"]
    for got, want in [(up["kernel"].a, -0.5), (up["kernel"].b, -8.0), (up["bias"].value, -0.5),
                      (table.a, -0.125), (table.b, -0.125)]:  # fmt: skip
        np.testing.assert_array_equal(got, np.full(got.shape, want))
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    tx = lora.optim.lora_plus(optax.sgd, schedule, ratio=4)
    updates, state = tx.update(grads, tx.init(adapters), adapters)
    updates, _ = tx.update(grads, state, adapters)
    np.testing.assert_allclose(updates["up"]["kernel"].b, -3.6, rtol=1e-6)


@pytest.mark.parametrize(("p", "q"), [(2.0, 4.0), (0.5, 8.0)])
def test_adam_invariance(p, q):
    """α→α/(pq), A₀→pA₀, lr_A→p·lr_A, lr_B→q·lr_B leaves the trajectory of the weights unchanged
    ("LoRA Without Regret", Schulman et al. 2025, on the parametrisation; Adam with ε = 0)."""
    adapters = make(targets="up")

    def trajectory(p, q):
        ad = jax.tree.map(
            lambda n: dataclasses.replace(n, a=n.a * p, scale=n.scale / (p * q)),
            adapters,
            is_leaf=lambda x: isinstance(x, lora.LoRA),
        )
        make = lambda lr: optax.adam(lr, eps=0.0, eps_root=1e-30)
        tx = optax.partition({"a": make(1e-2 * p), "b": make(1e-2 * q)}, lora.optim.labels)
        state, out = tx.init(ad), []

        @jax.jit
        def step(ad, state):
            grads = jax.grad(lambda ad: loss(lora.bind(PARAMS, ad)))(ad)
            updates, state = tx.update(grads, state, ad)
            return optax.apply_updates(ad, updates), state

        for _ in range(10):
            ad, state = step(ad, state)
            out.append(lora.merge(PARAMS, ad)["up"]["kernel"])
        return jnp.stack(out)

    reference = trajectory(1.0, 1.0)
    assert np.abs(reference[-1] - PARAMS["up"]["kernel"]).max() > 0.1
    assert_close(trajectory(p, q), reference)


def test_train_state_and_accumulation():
    """Gradients of micro-batches add up to the batch's, as adapter-sized trees."""
    adapters = noisy(make())
    f = lora.adapt(fn)
    one = lambda ad, ids: jnp.sum(f(lora.bind(PARAMS, ad), ids) ** 2)
    micro = [jax.grad(one)(adapters, i[None]) for i in IDS]
    assert_close(jax.tree.map(lambda *g: sum(g), *micro), jax.grad(one)(adapters, IDS))


# What each optimiser must be given, and what is no number of its own.
NEEDED = {
    "tx": optax.sgd(0.1), "make": optax.sgd, "learning_rate": 0.1, "target_rank": 2, "steps": 20,
}  # fmt: skip
# The numbers of what goes with `per_slot` are slots, see its tests.
NUMBERS = [
    (name, p.name)
    for name in lora.optim.__all__
    if name not in ("join", "leave", "by_slot")
    for p in inspect.signature(getattr(lora.optim, name)).parameters.values()
    if re.search("float|int|ScalarOrSchedule", str(p.annotation))
]


@pytest.mark.parametrize("name, argument", NUMBERS)
def test_numbers_are_checked(name, argument):
    """Each number of each optimiser: also integers and floats of other libraries, never NaN."""
    make = getattr(lora.optim, name)
    parameters = inspect.signature(make).parameters
    given = {k: x for k, x in NEEDED.items() if k in parameters}
    whole = "int" in str(parameters[argument].annotation)
    for bad in (np.nan, np.inf, -1, True, "1", 1j, jnp.ones(2), *([2.5, None] if whole else [])):
        with fails(rf"(?s)\b{argument}=.*lora.optim"):
            make(**given | {argument: bad})
    good = given.get(argument, parameters[argument].default)
    kinds = [np.int64] if whole else [np.float32, np.float64]
    kinds += [] if name == "adalora" else [jnp.asarray]
    for kind in kinds if good is not None else ():
        make(**given | {argument: kind(good)})


@pytest.mark.parametrize("call, match", [
    (lambda: lora.optim.lora_plus(optax.adam(1e-3), 1e-4), r"make=.*: lora.optim.lora_plus\(optax.adam, 1e-4\)"),
    (lambda: lora.optim.lora_fa(optax.adam), r"found the function adam: lora.optim.lora_fa\("),
    (lambda: lora.optim.trained_only(optax.adam), "found the function adam: lora.optim.trained_only"),
    (lambda: lora.optim.adalora(optax.adam, target_rank=2, steps=9), "found the function adam: lora.optim.adalora"),
    (lambda: lora.optim.lora_rite(1e-3, other=optax.adam), "found the function adam: lora.optim.lora_rite"),
    (lambda: lora.optim.lora_muon(1e-3, other=3), "found int: lora.optim.lora_muon"),
    (lambda: lora.optim.lora_muon(10.0, weight_decay=0.1), "(?s)expected less than 1.*lora.optim.lora_muon"),
    (lambda: lora.optim.lora_pro(x=["zero"]), r"x=\['zero'\]: expected one of"),
    (lambda: lora.optim.lora_muon(1e-3).init({"w": lora.LoRA(jnp.ones((2, 1)), jnp.ones((1, 2)), 0.0, lora.Geometry((0,), (1,)))}), "scale 0 has no gradient"),
])  # fmt: skip
def test_the_call_that_was_meant(call, match):
    with fails(match):
        call()


def test_galore_of_complex_weights_is_adam():
    """A complex gradient has no real Gram matrix; and its conjugate is not forgotten."""
    params = {"w": jnp.ones((3, 4), jnp.complex64) * (1 + 2j)}
    loss = lambda p: jnp.sum(jnp.abs(p["w"] - 3j) ** 2)
    grads = jax.tree.map(jnp.conj, jax.grad(loss)(params))
    txs = lora.optim.galore(0.1, rank=2), optax.adam(0.1)
    got, want = (tx.update(grads, tx.init(params), params)[0]["w"] for tx in txs)
    assert_close([got.real, got.imag], [want.real, want.imag])
