"""Every method in one scanned and rematerialised model: jit, eight devices, checkpoints, merging.

A method is a start (base, trained tree, frozen tree) and an optimiser. Those that train trees of the
same shapes share the compiled gradient, so that a new one costs the tests its update alone.
"""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from common import assert_close, fails, noisy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from zoo import IDS, Transformer

import lora_jax as lora

KEY = jax.random.key(0)
NEXT = jnp.roll(IDS, -1, 1)


@functools.cache
def model():
    """The model, and what the starts are made of."""
    module = Transformer(True)
    params = jax.jit(module.init)(KEY, IDS)["params"]
    apply = lambda params, ids: module.apply({"params": params}, ids)
    survey = lora.survey(apply, params, IDS)
    config = lora.LoRAConfig(rank=2, alpha=3, targets=["query", "up"])
    targets = lora.select(params, config, survey)
    adapters = jax.jit(lambda: lora.init(KEY, params, targets))()
    return SimpleNamespace(
        apply=apply, adapted=lora.adapt(apply), plain=jax.jit(apply), params=params,
        survey=survey, targets=targets, adapters=adapters, noisy=noisy(adapters),
    )  # fmt: skip


def is_full(trained):
    return set(jax.tree.leaves(lora.optim.labels(trained))) == {"frozen"}  # parameters, no adapters


def logits(trained, base, frozen, ids):
    if is_full(trained):
        return model().apply(trained, ids)
    return model().adapted(lora.bind(base, lora.methods.factors(trained, frozen)), ids)


@functools.partial(jax.jit, static_argnames="wrt")
def gradients(trained, base, frozen, ids, following, wrt=(0, 1, 2)):
    """(loss, logits), and the gradients of all three trees."""

    def loss(*trees):
        y = logits(*trees, ids)
        return optax.softmax_cross_entropy_with_integer_labels(y, following).mean(), y

    return jax.value_and_grad(loss, wrt, has_aux=True)(trained, base, frozen)


@functools.cache
def of_base():
    """The gradients of all parameters, and the second moments of the targets' inputs."""
    m = model()
    full = gradients(m.params, {}, {}, IDS, NEXT, wrt=(0,))[1][0]
    return full, jax.jit(lambda p: lora.methods.second_moments(m.apply, p, m.targets, IDS))(
        m.params
    )


def adapters(m):
    return m.params, m.noisy, {}


def with_frozen(init):
    def start(m):
        trained, frozen = jax.jit(lambda p: init(KEY, p, m.targets))(m.params)
        return m.params, trained, frozen

    return start


def changed_base(init):
    def start(m):
        base, trained = jax.jit(lambda p, of: init(p, m.adapters, *of))(m.params, of_base())
        return base, trained, {}

    return start


def initialised(init):
    return lambda m: (m.params, jax.jit(lambda of: init(m.adapters, *of))(of_base()), {})


ADAM = optax.adam(1e-2, eps=1e-3)  # an eps at which a rounding stays one
LORA_XS = functools.partial(lora.methods.init_lora_xs, std=0.1)
# name -> (its start, its optimiser)
METHODS = {
    "lora": (adapters, ADAM),
    "dora": (lambda m: (m.params, jax.jit(lora.methods.dora)(m.params, m.noisy), {}), ADAM),
    "lora_plus": (adapters, lora.optim.lora_plus(functools.partial(optax.adam, eps=1e-3), 1e-2)),
    "lora_fa": (adapters, lora.optim.lora_fa(ADAM)),
    "lora_fa corrected": (adapters, lora.optim.lora_fa(ADAM, corrected=True)),
    "riemannian": (adapters, optax.chain(lora.optim.riemannian(), ADAM)),
    "lora_pro": (adapters, optax.chain(lora.optim.lora_pro(), ADAM)),
    "lora_rite": (adapters, lora.optim.lora_rite(1e-2)),
    "lora_muon": (adapters, lora.optim.lora_muon(1e-2)),
    "galore": (
        lambda m: (m.params, m.params, {}),
        lambda m: lora.optim.galore(1e-2, rank=2, eps=1e-3, targets=m.targets),
    ),
    "vera": (with_frozen(lora.methods.init_vera), ADAM),
    "lora_xs": (with_frozen(LORA_XS), ADAM),
    "adalora": (
        with_frozen(lambda *args: (lora.methods.init_adalora(*args), {})),
        lora.optim.adalora(ADAM, target_rank=1, steps=3, interval=1),
    ),
    "pissa": (changed_base(lambda p, ad, g, c: lora.methods.pissa(p, ad)), ADAM),
    "pissa, random": (changed_base(lambda p, ad, g, c: lora.methods.pissa(p, ad, niter=2)), ADAM),
    "olora": (changed_base(lambda p, ad, g, c: lora.methods.olora(p, ad)), ADAM),
    "orthogonal": (initialised(lambda ad, g, c: lora.methods.orthogonal(KEY, ad)), ADAM),
    "lora_ga": (changed_base(lambda p, ad, g, c: lora.methods.lora_ga(p, ad, g)), ADAM),
    "lora_one": (initialised(lambda ad, g, c: lora.methods.lora_one(ad, g)), ADAM),
    "eva": (initialised(lambda ad, g, c: lora.methods.eva(ad, c, rho=1)), ADAM),
    "corda": (
        changed_base(lambda p, ad, g, c: lora.methods.corda(p, ad, c, mode="instruction")),
        ADAM,
    ),
}  # fmt: skip


def on_eight(base, trained, frozen):
    """The three trees on a mesh: the base split, the others as the library says; and how."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    on = lambda spec: NamedSharding(mesh, spec)
    split = lambda x: on(P(*[None] * (x.ndim - 1), "model" if x.shape[-1] % 4 == 0 else None))
    placed = jax.device_put(base, jax.tree.map(split, base))
    if is_full(trained):
        where = jax.tree.map(split, trained)
    else:
        where = lora.parallel.shardings(placed, trained)
        last = jax.tree.leaves(where["layers"]["up"]["kernel"])[-1]  # along the leaf's out axis
        kind = type(trained["layers"]["up"]["kernel"])
        assert ("model" in last.spec) == (kind is not lora.methods.LoRAXS)  # which has none
    if frozen:  # VeRA's is of no leaf in particular
        as_base = set(frozen) != {"a", "b"}
        frozen = jax.device_put(
            frozen, lora.parallel.shardings(placed, frozen) if as_base else on(P())
        )
    return placed, jax.device_put(trained, where), frozen, where, on(P("data"))


def test_the_table_is_whole():
    """What the package offers of this kind is in the table; a new method belongs there, too."""
    not_methods = {"adapt", "adalora", "lora_jax"}
    offered = {n for n in lora.__all__ if n.startswith(("lora_", "init_")) and n not in not_methods}
    offered = {n.removeprefix("init_") for n in offered} | {
        "dora", "riemannian", "galore", "pissa", "olora", "orthogonal", "eva", "corda",
    }  # fmt: skip
    assert offered <= set(METHODS)


# One of each kind; the others are many, and each has tests of its own.
FIRST = {"lora", "dora", "galore", "vera", "adalora", "pissa"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FIRST else pytest.mark.slow) for n in METHODS]
)
def test_method(name, tmp_path):
    m = model()
    start, tx = METHODS[name]
    tx = tx(m) if name == "galore" else tx
    base, first, frozen = start(m)
    init = jax.jit(tx.init)

    @jax.jit
    @jax.numpy_dtype_promotion("standard")  # Adam's
    def update(trained, state, grads):
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    def step(trained, state, base, frozen, *batch):
        (value, y), (grads, *of_rest) = gradients(trained, base, frozen, *batch)
        assert all(not x.any() for x in jax.tree.leaves(of_rest))  # base and frozen: none
        return *update(trained, state, grads), value, y

    trained, state, value, y = step(first, init(first), base, frozen, IDS, NEXT)
    once = trained
    trained, state, after, _ = step(trained, state, base, frozen, IDS, NEXT)
    assert np.isfinite(after) and after < value
    fixed = {"a"} if name.startswith("lora_fa") else set()
    labels = jax.tree.leaves(lora.optim.labels(first))
    for label, x, z in zip(labels, *map(jax.tree.leaves, (first, trained))):
        assert np.array_equal(x, z) == (label in fixed), label

    # eight devices
    placed, spread, held, where, rows = on_eight(base, first, frozen)
    states = lora.parallel.state_shardings(jax.eval_shape(tx.init, first), first, where)
    state8 = jax.device_put(init(first), states)
    batch = jax.device_put((IDS, NEXT), rows)
    got, state8, value8, y8 = step(spread, state8, placed, held, *batch)
    assert len(jax.tree.leaves(got)[0].sharding.device_set) == 8
    assert_close((value8, y8), (value, y), factor=256)
    assert_close(got, once, factor=4096)

    # saved and restored, on eight devices: to the bit
    if is_full(got):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "full", (got, state8))
            checkpointer.wait_until_finished()
            back = checkpointer.restore(tmp_path / "full", (got, state8))
        jax.tree.map(np.testing.assert_array_equal, back, (got, state8))
        return
    kept = {"optimiser": state8, "frozen": held}
    with ocp.CheckpointManager(tmp_path) as manager:
        lora.checkpoint.save(manager, 1, got, base=placed, state=kept)
        manager.wait_until_finished()
        back = lora.checkpoint.restore(manager, got, base=placed, state=kept)
    assert jax.tree.structure(back.adapters) == jax.tree.structure(got)
    jax.tree.map(np.testing.assert_array_equal, back.adapters, got)
    jax.tree.map(np.testing.assert_array_equal, back.state, kept)

    # merged
    merged = lora.merge(base, lora.methods.factors(first, frozen))
    assert_close(m.plain(merged, IDS), y, factor=256)


@pytest.mark.parametrize(
    "call, argument, bad",
    [
        (lambda x: lora.methods.low_rank_gradients(None, None, None, rank=x), "rank", [0, 2.5, True]),
        (lambda x: lora.methods.low_rank_gradients(None, None, None, passes=x), "passes", [1.5, None]),
        (lambda x: lora.methods.lora_ga(None, None, None, gamma=x), "gamma", [0, np.nan, np.inf, "1"]),
        (lambda x: lora.methods.lora_one(None, None, gamma=x), "gamma", [-1, np.nan, np.inf, True]),
        (lambda x: lora.methods.eva(None, {}, rho=x), "rho", [np.nan, np.inf, 0.9, None]),
        (lambda x: lora.methods.corda(None, None, {}, mode="knowledge", damping=x), "damping", [0, np.nan]),
        (lambda x: lora.methods.pissa(None, None, niter=x), "niter", [2.5, -1, np.nan, True]),
        (lambda x: lora.methods.orthogonal(KEY, None, scale=x), "scale", [-1, np.nan, np.inf, "1"]),
        (lambda x: lora.methods.init_lora_xs(KEY, None, None, std=x), "std", [-1, np.nan, np.inf]),
        (lambda x: lora.methods.init_vera(KEY, None, None, rank=x), "rank", [0, 2.5, np.nan]),
        (lambda x: lora.methods.init_vera(KEY, None, None, d=x), "d", [np.nan, np.inf, None]),
        (lambda x: lora.methods.propose(None, None, tokens=x), "tokens", [0, np.nan, np.inf, True]),
        (lambda x: lora.methods.propose(None, None, full_learning_rate=x), "full_learning_rate", [0, np.nan]),
        (lambda x: lora.methods.propose(None, None, keep=x), "keep", [0, 1.5, np.nan, None]),
        (lambda x: lora.quant.loftq(None, None, None, iterations=x), "iterations", [0, 2.5, True]),
    ],
)  # fmt: skip
def test_numbers_are_checked(call, argument, bad):
    for x in bad:
        with fails(rf"\b{argument}={re.escape(repr(x))}: expected "):
            call(x)
