"""Saved = restored, to the bit and wherever; and whatever is not what was saved is one clear error."""

import dataclasses
import enum
import functools
import json
import os
import random
import re
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import rand
from common import assert_close, examples, fails, noisy
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax._nodes.node import is_node
from lora_jax.checkpoint._describe import (
    config_from_json,
    config_to_json,
    node_from_json,
    node_to_json,
)
from lora_jax.checkpoint._directory import crc32
from lora_jax.checkpoint._fingerprint import checksums

KEY = jax.random.key(0)
PARAMS = {
    "up": {"kernel": rand.normal(KEY, (16, 32)), "bias": jnp.zeros(32)},
    "down": {"kernel": rand.normal(KEY, (32, 16))},
    "table": rand.normal(KEY, (10, 16)),
}
CONFIG = lora.LoRAConfig(
    rank=2, alpha=8, targets=["up", "down"], full="up/bias", rows={"table": [1, 4]}
)
TX = optax.adam(1e-2)


def make(config=CONFIG, params=PARAMS, key=KEY):
    return lora.init(key, params, config)


def trained(config=CONFIG):
    """Adapters and state with no zero in them."""
    adapters = noisy(make(config))
    return adapters, noisy_state(TX.init(adapters))


def noisy_state(state):
    def noise(x):
        return x + (jnp.arange(x.size).reshape(x.shape) / 7 + 3).astype(x.dtype)

    return jax.tree.map(noise, state)


def manager(path, **options):
    return ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(**options))


def saved(path, adapters=None, step=5, **kwargs):
    """The path, with one checkpoint in it."""
    adapters = trained()[0] if adapters is None else adapters
    with manager(path) as m:
        assert lora.checkpoint.save(
            m, step, adapters, **{"base": PARAMS, "config": CONFIG, **kwargs}
        )
    return path


def assert_same(got, want):
    """The same structure, types, values to the bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert type(g) is type(w)
        if isinstance(w, jax.Array):
            assert g.dtype == w.dtype and g.committed == w.committed and g.sharding == w.sharding
            if jax.dtypes.issubdtype(w.dtype, jax.dtypes.prng_key):
                assert jax.random.key_impl(g) == jax.random.key_impl(w)
                g, w = jax.random.key_data(g), jax.random.key_data(w)
        np.testing.assert_array_equal(g, w)


# ---------------------------------------------------------------- saved = restored


def test_round_trip(tmp_path):
    adapters, opt = trained()
    state = {"opt": opt, "key": jax.random.key(3, impl="rbg"), "old": jax.random.PRNGKey(4), "epoch": 7,
             "name": "a run", "done": True, "host": np.arange(3), "average": (jnp.float32(0.5), np.float64(0.1)),
             "empty": jnp.zeros((0, 3)), "a.b": {"c": jnp.ones(2)}, "a": {"b.c": jnp.zeros(2)}}  # fmt: skip
    data = {"next": 12, "shards": [1, 2.5, None, "x"]}
    with manager(tmp_path) as m:
        assert lora.checkpoint.save(
            m,
            5,
            adapters,
            base=PARAMS,
            config=CONFIG,
            state=state,
            data=data,
            metrics={"loss": 0.25},
        )
        m.wait_until_finished()
        like = jax.tree.map(
            lambda x: (
                x
                if isinstance(x, str | bool)
                else x * 0
                if not hasattr(x, "dtype") or x.dtype.name[:3] != "key"
                else x
            ),
            state,
        )
        got = lora.checkpoint.restore(m, make(), base=PARAMS, config=CONFIG, state=like)
    assert_same(got.adapters, adapters)
    assert_same(got.state, state)
    assert (got.step, got.data, got.metrics) == (5, data, {"loss": 0.25})
    assert got.base == lora.checkpoint.fingerprint(PARAMS)
    assert config_to_json(got.config) == config_to_json(CONFIG)


def test_adapters_alone_need_nothing_but_the_directory(tmp_path):
    """The checkpoint says what is in it: no configuration, no target, no optimiser."""
    adapters, opt = trained()
    saved(tmp_path, adapters, state=opt)
    got = lora.checkpoint.restore(tmp_path, base=PARAMS)
    assert_same(got.adapters, adapters)
    assert got.state is None
    got = lora.checkpoint.restore(str(tmp_path), base=None)
    assert_same(got.adapters, adapters)


def test_the_base_is_not_in_it(tmp_path):
    params = {"w": rand.normal(KEY, (1024, 1024))}
    adapters = make(lora.LoRAConfig(rank=2, targets="w"), params)
    saved(tmp_path, adapters, base=params, config=None)
    size = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    assert size < 10 * sum(x.nbytes for x in jax.tree.leaves(adapters)) < params["w"].nbytes // 20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_types_of_adapters(tmp_path, dtype):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    adapters, opt = trained(config)
    saved(tmp_path, adapters, config=config, state=opt)
    got = lora.checkpoint.restore(
        tmp_path, make(config), base=PARAMS, config=config, state=TX.init(make(config))
    )
    assert_same((got.adapters, got.state), (adapters, opt))


def test_the_step_may_donate_what_is_being_saved(tmp_path):
    """Saves in the background hold copies."""
    adapters, _ = trained()
    step = jax.jit(lambda t: jax.tree.map(lambda x: x * 1.5 + 1, t), donate_argnums=0)
    wants = {}
    with manager(tmp_path) as m:
        for i in range(1, 8):
            wants[i] = jax.device_get(adapters)
            host = np.full(1000, i)
            lora.checkpoint.save(m, i, adapters, base=PARAMS, state={"host": host})
            host[:] = -1
            adapters = step(adapters)
        m.wait_until_finished()
        for i, want in wants.items():
            got = lora.checkpoint.restore(m, base=None, step=i, state={"host": host})
            jax.tree.map(np.testing.assert_array_equal, got.adapters, want)
            assert (got.state["host"] == i).all()


def test_the_options_are_orbax_s_own(tmp_path):
    adapters, _ = trained()
    with manager(
        tmp_path,
        max_to_keep=2,
        save_interval_steps=10,
        best_fn=lambda m: m["loss"],
        best_mode="min",
    ) as m:
        done = [
            lora.checkpoint.save(m, i, adapters, base=PARAMS, metrics={"loss": abs(i - 20)})
            for i in range(0, 45, 5)
        ]
        assert done == [i % 10 == 0 for i in range(0, 45, 5)]
        assert lora.checkpoint.save(m, 45, adapters, base=PARAMS, metrics={"loss": 0.0}, force=True)
        m.wait_until_finished()
        assert sorted(m.all_steps()) == [20, 45] and m.best_step() in (20, 45)
        assert lora.checkpoint.restore(m, base=PARAMS, step=20).metrics == {"loss": 0.0}


def test_linen_boxes_and_nnx_modules_as_the_base(tmp_path):
    boxed = jax.tree.map(lambda x: nn.Partitioned(x, names=(None,) * x.ndim), PARAMS)
    adapters, _ = trained()
    saved(tmp_path / "a", adapters, base=boxed)
    assert_same(lora.checkpoint.restore(tmp_path / "a", base=PARAMS).adapters, adapters)
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    adapters = lora.init(KEY, model, lora.LoRAConfig(rank=2, targets="kernel"))
    saved(tmp_path / "b", adapters, base=model, config=None)
    assert_same(lora.checkpoint.restore(tmp_path / "b", base=model).adapters, adapters)


def mesh(*shape):
    return jax.make_mesh(shape, ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)


SPECS = {
    "up": {"kernel": P("fsdp", "tp"), "bias": P("tp")},
    "down": {"kernel": P("tp", "fsdp")},
    "table": P(None, "fsdp"),
}


def on(mesh, tree=PARAMS):
    return jax.device_put(tree, jax.tree.map(lambda s: NamedSharding(mesh, s), SPECS))


@pytest.mark.parametrize("before, after", [((2, 4), (4, 2)), ((8, 1), (1, 2)), ((1, 1), (2, 4))])
def test_onto_another_mesh(tmp_path, before, after):
    adapters, opt = trained()
    old = on(mesh(*before))
    where = lora.parallel.shardings(old, adapters)
    saved(tmp_path, jax.device_put(adapters, where), base=old,
          state=jax.device_put(opt, lora.parallel.state_shardings(opt, adapters, where)))  # fmt: skip
    new = on(mesh(*after))
    where = lora.parallel.shardings(new, adapters)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), (adapters, opt),
                            (where, lora.parallel.state_shardings(opt, adapters, where)))  # fmt: skip
    got = lora.checkpoint.restore(tmp_path, abstract[0], base=new, config=CONFIG, state=abstract[1])
    jax.tree.map(np.testing.assert_array_equal, (got.adapters, got.state), (adapters, opt))
    jax.tree.map(
        lambda x, a: x.sharding == a.sharding or pytest.fail("placed elsewhere"),
        (got.adapters, got.state),
        abstract,
    )
    alone = lora.checkpoint.restore(
        tmp_path, base=new
    ).adapters  # and the adapters alone where the base is
    assert jax.tree.leaves(jax.tree.map(lambda x: x.sharding, alone)) == jax.tree.leaves(where)


# ---------------------------------------------------------------- a bigger rank


@pytest.mark.parametrize("placed", [False, True])
def test_grow(tmp_path, placed):
    """The product is the same, alpha / rank as well; the new directions can learn."""
    adapters, opt = trained()
    saved(tmp_path, adapters, state=opt)
    config = dataclasses.replace(CONFIG, rank=5, alpha=10, targets=["up", "down"])
    params = on(mesh(2, 4)) if placed else PARAMS
    like = make(config, params, jax.random.key(9))
    if placed:
        like = jax.device_put(like, lora.parallel.shardings(params, like))
    got = lora.checkpoint.restore(
        tmp_path, like, base=params, config=config, state=TX.init(like), rank="grow"
    )
    assert jax.tree.structure(got.state) == jax.tree.structure(TX.init(got.adapters))
    up = got.adapters["up"]["kernel"]
    assert (up.rank, up.scale) == (5, 4.0)
    np.testing.assert_array_equal(up.a[:, :2], adapters["up"]["kernel"].a)
    np.testing.assert_array_equal(up.a[:, 2:], like["up"]["kernel"].a[:, 2:])
    assert not np.any(up.b[2:]) and np.all(up.a)
    if placed:
        assert [x.sharding for x in jax.tree.leaves(got.adapters)] == [
            x.sharding for x in jax.tree.leaves(like)
        ]
    want = lora.merge(PARAMS, adapters)
    assert_close(jax.device_get(lora.merge(params, got.adapters)), jax.device_get(want))
    moments = got.state[0].mu["up"]["kernel"]
    np.testing.assert_array_equal(moments.a[:, :2], opt[0].mu["up"]["kernel"].a)
    assert not np.any(moments.a[:, 2:]) and got.state[0].count == opt[0].count
    grads = jax.grad(
        lambda ad: sum(jnp.sum(x**2) for x in jax.tree.leaves(lora.merge(params, ad)))
    )(got.adapters)
    assert np.any(grads["up"]["kernel"].b[2:])
    with jax.numpy_dtype_promotion("standard"):
        TX.update(grads, got.state)


def test_grow_an_embedding(tmp_path):
    """There it is B that is drawn, and A that is zero."""
    params = {"table": jnp.ones((10, 8))}
    fn = lambda p, ids: p["table"][ids]
    survey = lora.survey(fn, params, jnp.array([1]))
    small, large = (
        lora.init(KEY, params, lora.LoRAConfig(rank=r, targets="table"), survey) for r in (2, 4)
    )
    small = noisy(small)
    saved(tmp_path, small, base=params, config=None)
    got = lora.checkpoint.restore(tmp_path, large, base=params, rank="grow").adapters
    assert not np.any(got["table"].a[:, 2:]) and np.all(got["table"].b[2:])
    assert_close(lora.merge(params, got), lora.merge(params, small))


def test_a_grown_run_goes_on(tmp_path):
    """With the configuration that growing returns: its alpha is scale · rank."""
    adapters, opt = trained()
    saved(tmp_path / "small", adapters, state=opt)
    config = dataclasses.replace(CONFIG, rank=5, alpha=10, init="gaussian")
    large = make(config)
    got = lora.checkpoint.restore(
        tmp_path / "small", large, base=PARAMS, config=config, state=TX.init(large), rank="grow"
    )
    assert (got.config.rank, got.config.alpha) == (5, 20.0)
    with fails(
        r"(?s)not that of these adapters:.*'down/kernel': rank, scale and dropout \(5, 2.0, 0.0\).*found \(5, 4.0"
    ):
        saved(tmp_path / "large", got.adapters, config=config)
    saved(tmp_path / "large", got.adapters, config=got.config, state=got.state)
    like = make(got.config)
    again = lora.checkpoint.restore(
        tmp_path / "large", like, base=PARAMS, config=got.config, state=TX.init(like)
    )
    assert_same((again.adapters, again.state), (got.adapters, got.state))


def test_grow_without_a_lora_keeps_the_configuration(tmp_path):
    config = lora.LoRAConfig(targets=(), full="up/bias")
    adapters = lora.init(KEY, PARAMS, config)
    with ocp.CheckpointManager(tmp_path) as manager:
        lora.checkpoint.save(manager, 1, adapters, base=PARAMS, config=config)
    found = lora.checkpoint.restore(tmp_path, adapters, base=PARAMS, rank="grow")
    assert (found.config.rank, found.config.alpha) == (config.rank, config.alpha)


def test_grow_with_ranks_of_their_own(tmp_path):
    """Rules become a rule for each leaf; host memory grows as well, and nothing but ranks does."""
    rules = [lora.Rule("down", rank=1, alpha=3)]
    config = dataclasses.replace(CONFIG, rules=rules)
    adapters = noisy(make(config))
    state = {"host": jax.device_get(TX.init(adapters)), "losses": np.ones(3)}
    saved(tmp_path, adapters, config=config, state=state)
    big = dataclasses.replace(CONFIG, rank=4, rules=[lora.Rule("down", rank=3)])
    large = make(big)
    like = {"host": jax.device_get(TX.init(large)), "losses": np.ones(3)}
    got = lora.checkpoint.restore(tmp_path, large, base=PARAMS, config=big, state=like, rank="grow")
    assert got.state["host"][0].mu["up"]["kernel"].a.shape == (16, 4)
    assert isinstance(got.state["host"][0].mu["up"]["kernel"].a, np.ndarray)
    assert {r.pattern: (r.rank, r.alpha) for r in got.config.rules} == {
        "down/kernel": (3, 9.0),
        "up/kernel": (4, 16.0),
    }
    lora.select(PARAMS, got.config).check(got.adapters)
    with fails(r"state: 'losses' was saved as float64\(3,\), found float64\(5,\)"):
        lora.checkpoint.restore(
            tmp_path, large, base=PARAMS, state={**like, "losses": np.ones(5)}, rank="grow"
        )
    with fails("rank='grow' needs the larger adapters"):
        lora.checkpoint.restore(tmp_path, base=PARAMS, rank="grow")
    with fails("'down/kernel': of its new part, a and b is not zero; expected one"):
        lora.checkpoint.restore(tmp_path, noisy(large), base=PARAMS, rank="grow")


# ---------------------------------------------------------------- trees of other kinds


def test_an_nnx_model_with_random_state(tmp_path):
    """Keys, counters and statistics change with each call, and are no part of what a base is."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(8, 8, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dropout(self.linear(x)))

    model = Model(nnx.Rngs(0))
    adapters = lora.init(KEY, model, lora.LoRAConfig(rank=2, targets="kernel"))
    saved(tmp_path, adapters, base=lora.checkpoint.fingerprint(model, content=True), config=None)
    model(jnp.ones((2, 8)))
    got = lora.checkpoint.restore(
        tmp_path, adapters, base=lora.checkpoint.fingerprint(model, content=True)
    )
    assert_same(got.adapters, adapters)
    assert_same(lora.checkpoint.restore(tmp_path, base=model).adapters, adapters)


def test_a_train_state(tmp_path):
    """Its step is an int before the first step under jit, and an array after it."""
    fresh = TrainState.create(apply_fn=None, params=make(), tx=TX)
    with jax.numpy_dtype_promotion("standard"):
        run = jax.jit(lambda s: s.apply_gradients(grads=s.params))(fresh)
    saved(tmp_path / "a", run.params, state=run)
    got = lora.checkpoint.restore(tmp_path / "a", fresh.params, base=PARAMS, state=fresh).state
    assert got.step == 1 and type(got.step) is int
    assert_same(got.opt_state, run.opt_state)
    saved(tmp_path / "b", fresh.params, state=fresh)
    got = lora.checkpoint.restore(tmp_path / "b", fresh.params, base=PARAMS, state=run).state
    assert got.step.dtype == run.step.dtype and got.step == 0
    with fails("state: 'k' was saved as a int, found a bool"):
        saved(tmp_path / "c", state={"k": 3})
        lora.checkpoint.restore(tmp_path / "c", base=PARAMS, state={"k": True})


def test_memory_of_the_host(tmp_path):
    """Adapters that are offloaded are saved, and restored, where they are."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    adapters = jax.device_put(trained()[0], sharding)
    saved(tmp_path, adapters)
    got = lora.checkpoint.restore(tmp_path, adapters, base=PARAMS)
    jax.tree.map(np.testing.assert_array_equal, got.adapters, adapters)


def test_wide_arrays_of_the_host():
    """Their 64 bits count, in 32-bit mode too."""
    for x, y in (
        (np.array([0.1]), np.array([0.1 + 1e-12])),
        (np.array([1]), np.array([1 + 2**33])),
        (np.array([1.0 + 0.1j]), np.array([1.0 + (0.1 + 1e-12) * 1j])),
        (np.array([0.1 + 1.0j]), np.array([0.1 + 1e-12 + 1.0j])),
        (np.array([0.1 + 1.0j], np.complex64), np.array([0.2 + 1.0j], np.complex64)),
    ):
        assert checksums({"x": x}) != checksums({"x": y})
        with jax.enable_x64(True):
            assert checksums({"x": x}) == checksums({"x": jnp.asarray(x)})
        assert checksums({"x": x}) == checksums({"x": x.copy()})
    assert checksums({"x": np.zeros((0, 3))}) == {"x": "0" * 16}


def test_a_state_of_shapes_goes_beside_the_adapters(tmp_path):
    adapters, opt = trained()
    saved(tmp_path, adapters, state=opt)
    new = on(mesh(2, 4))
    where = lora.parallel.shardings(new, adapters)
    adapters = jax.device_put(adapters, where)
    got = lora.checkpoint.restore(
        tmp_path, adapters, base=new, state=jax.eval_shape(TX.init, adapters)
    )
    assert [x.sharding for x in jax.tree.leaves(got.state[0].mu)] == jax.tree.leaves(where)
    half = {**new, "up": {**PARAMS["up"], "kernel": new["up"]["kernel"]}}
    with fails(r"(?s)on no device in particular, and others are placed:.*'up/bias'"):
        lora.checkpoint.restore(tmp_path, base=half)


def test_metrics_and_steps_of_other_types(tmp_path):
    adapters, _ = trained()
    with manager(tmp_path, best_fn=lambda m: m["loss"]) as m:
        assert lora.checkpoint.save(
            m, jnp.int32(1), adapters, base=PARAMS, metrics={"loss": jnp.float32(0.5)}
        )
        assert lora.checkpoint.save(
            m, np.int64(2), adapters, base=PARAMS, metrics={"loss": np.float32(0.25)}
        )
        m.wait_until_finished()
        assert m.best_step() == 1 and lora.checkpoint.restore(
            m, base=PARAMS, step=np.int64(2)
        ).metrics == {"loss": 0.25}
        for call, match in (
            (
                lambda: lora.checkpoint.save(m, 3, adapters, base=PARAMS, metrics={"loss": "x"}),
                "expected numbers, {'loss': 0.5}",
            ),
            (
                lambda: lora.checkpoint.save(m, -3, adapters, base=PARAMS),
                "step=-3: expected an integer from 0 on",
            ),
            (
                lambda: lora.checkpoint.save(m, 3, adapters, base=PARAMS, config={"rank": 2}),
                "expected a LoRAConfig or Targets, found dict",
            ),
            (
                lambda: lora.checkpoint.save(
                    m, 3, adapters, base=PARAMS, state={"s": np.array(["a"])}
                ),
                r"state: 's' is <U1\(1,\)",
            ),
            (
                lambda: lora.checkpoint.fingerprint(jax.eval_shape(lambda: PARAMS), content=True),
                "content=True needs arrays, found shapes",
            ),
        ):
            with fails(match):
                call()


def test_sets_of_targets_have_one_order():
    one, two = (
        lora.LoRAConfig(targets=set(names)) for names in (["up", "down", "q"], ["q", "down", "up"])
    )
    assert config_to_json(one)["targets"] == config_to_json(two)["targets"] == ["down", "q", "up"]


# ---------------------------------------------------------------- what is not what was saved

OTHER = {**PARAMS, "down": {"kernel": jnp.zeros((32, 8))}, "extra": jnp.zeros(2)}


def train_state(adapters):
    return TrainState.create(apply_fn=None, params=adapters, tx=TX)


def other_state():
    return {"opt": TX.init(make()), "ema": jnp.zeros(3)}


@pytest.mark.parametrize("call, match", [
    (lambda m: lora.checkpoint.restore(m, make(), base=OTHER), r"(?s)is of something else:.*base: 'down/kernel': expected float32\(32, 16\), found float32\(32, 8\).*base: 'extra' is not expected.*lora.checkpoint.restore\(manager"),
    (lambda m: lora.checkpoint.restore(m, make(), base={"params": PARAMS}), r"'down/kernel' is 'params/down/kernel' in the base .*pass the inner tree"),
    (lambda m: lora.checkpoint.restore(m, train_state(make()), base=PARAMS), "found a TrainState: pass state.params"),
    (lambda m: lora.checkpoint.restore(m, make(), base={k: PARAMS[k] for k in ("up", "down")}), "base: 'table' is missing"),
    (lambda m: lora.checkpoint.restore(m, make(), base=jax.tree.map(lambda x: x.astype("bfloat16"), PARAMS)), r"(?s)base: 'down/kernel': expected float32\(32, 16\), found bfloat16.*'up/kernel'"),
    (lambda m: lora.checkpoint.restore(m, make(), base=PARAMS, config=dataclasses.replace(CONFIG, alpha=4, dropout=0.5)), r"(?s)config: alpha=8 was saved, found 4.*config: dropout=0.0 was saved, found 0.5"),
    (lambda m: lora.checkpoint.restore(m, make(dataclasses.replace(CONFIG, rank=3)), base=PARAMS), r"(?s)adapters: 'up/kernel': a \['float32', \[16, 2\]\] was saved, found \['float32', \[16, 3\]\].*scale 4.0 was saved, found 2.66"),
    (lambda m: lora.checkpoint.restore(m, make(dataclasses.replace(CONFIG, alpha=2)), base=PARAMS), "adapters: 'down/kernel': scale 4.0 was saved, found 1.0"),
    (lambda m: lora.checkpoint.restore(m, make(lora.LoRAConfig(rank=2, alpha=8, targets=["up"], bias="all")), base=PARAMS), r"(?s)adapters: 'down/kernel/a' was saved, but is not expected.*'table/value' was saved"),
    (lambda m: lora.checkpoint.restore(m, make(dataclasses.replace(CONFIG, full=["up/bias", "down"], targets="up")), base=PARAMS), r"(?s)'down/kernel': .*kind lora was saved, found full"),
    (lambda m: lora.checkpoint.restore(m, make(), base=PARAMS, state=other_state()), r"(?s)state: '0/count' was saved, but is not expected.*state: 'ema' was not saved"),
    (lambda m: lora.checkpoint.restore(m, make(), base=PARAMS, state=(*TX.init(make())[:1], 3.0)), "state: '1' was not saved"),
    (lambda m: lora.checkpoint.restore(m, make(), base=PARAMS, state=optax.adam(1e-2, mu_dtype="bfloat16").init(make())), r"state: '0/mu/down/kernel/a' was saved as float32\(32, 2\), found bfloat16\(32, 2\)"),
    (lambda m: lora.checkpoint.restore(m, PARAMS, base=PARAMS), "adapters: 'down/kernel' is a ArrayImpl, not an adapter"),
    (lambda m: lora.checkpoint.restore(m, make(), base=PARAMS, step=4), r"no checkpoint 4 in .*; there are \[5\]"),
    (lambda m: lora.checkpoint.restore(m, make(), base=PARAMS, rank="pad"), "rank='pad': expected 'exact' or 'grow'"),
    (lambda m: lora.checkpoint.restore(m, make(dataclasses.replace(CONFIG, rank=1)), base=PARAMS, rank="grow"), "'down/kernel': rank 2 was saved, found 1; a rank can only grow"),
    (lambda m: lora.checkpoint.restore(m, jax.eval_shape(lambda: make(dataclasses.replace(CONFIG, rank=4))), base=PARAMS, rank="grow"), "'down/kernel': to grow, pass arrays"),
    (lambda m: lora.checkpoint.restore(5, base=PARAMS), "expected an orbax CheckpointManager or a directory, found int"),
    (lambda m: lora.checkpoint.restore("/nowhere/at/all", base=PARAMS), "there is no directory '/nowhere/at/all'"),
])  # fmt: skip
def test_restoring_into_something_else(tmp_path, call, match):
    adapters, opt = trained()
    saved(tmp_path, adapters, state=opt)
    before = contents(tmp_path)
    with manager(tmp_path) as m, fails(match):
        call(m)
    assert contents(tmp_path) == before


def test_the_same_step_again(tmp_path):
    """As a run does that saves by interval, and once more as it leaves."""
    adapters, opt = trained()
    with manager(tmp_path) as m:
        assert lora.checkpoint.save(m, 5, adapters, base=PARAMS, state=opt)
        assert not lora.checkpoint.save(m, 5, adapters, base=PARAMS, state=opt, force=True)
        for other in ({"state": TX.init(adapters)}, {"state": opt, "data": 1}):
            with fails("step 5 is not after the latest"):
                lora.checkpoint.save(m, 5, adapters, base=PARAMS, **other, force=True)


@pytest.mark.parametrize("call, match", [
    (lambda m, ad: lora.checkpoint.save(m, 5, noisy(ad), base=PARAMS), "step 5 is not after the latest in .*, 5; nothing was saved"),
    (lambda m, ad: lora.checkpoint.save(m, 3, ad, base=PARAMS, force=True), "step 3 is not after the latest"),
    (lambda m, ad: lora.checkpoint.save(m, 6, ad, base=OTHER), r"the adapters do not belong to these parameters:(?s:.)*'down/kernel'.*\(32, 8\)"),
    (lambda m, ad: lora.checkpoint.save(m, 6, PARAMS, base=PARAMS), "expected adapters, found parameters"),
    (lambda m, ad: lora.checkpoint.save(m, 6, ad, base={"params": PARAMS}), r"is 'params/down/kernel' in the base .*pass the inner tree, base=variables\['params'\]"),
    (lambda m, ad: lora.checkpoint.save(m, 6, train_state(ad), base=PARAMS), r"found a TrainState: pass state.params, .*save\(manager, step, state.params, .*state=state\)"),
    (lambda m, ad: lora.checkpoint.save(m, 6, ad, base=PARAMS, data={"x": jnp.ones(2)}), "data cannot be saved as JSON .*arrays and keys go into state="),
    (lambda m, ad: lora.checkpoint.save(m, 6, ad, base=PARAMS, state={"x": object(), "y": 1j}), r"(?s)cannot be saved:.*state: 'x' is object.*state: 'y' is complex"),
    (lambda m, ad: lora.checkpoint.save(m.directory, 6, ad, base=PARAMS), "expected an orbax CheckpointManager, found"),
    (lambda m, ad: lora.checkpoint.save(m, 6, ad, base=PARAMS, state={"a/b": 1, "a": {"b": 2}}), r"have one path:.*\n.*'a/b' \(2 leaves\)"),
])  # fmt: skip
def test_saving_what_cannot_be_saved(tmp_path, call, match):
    adapters, _ = trained()
    saved(tmp_path, adapters)
    before = contents(tmp_path)
    with manager(tmp_path) as m, fails(match):
        call(m, adapters)
    assert contents(tmp_path) == before


def test_a_manager_that_cannot_write(tmp_path):
    """Orbax skips the step, and says so on its log alone."""
    adapters, _ = trained()
    saved(tmp_path, adapters)
    before = contents(tmp_path)
    with manager(tmp_path) as closed:
        pass
    with ocp.CheckpointManager(
        tmp_path, options=ocp.CheckpointManagerOptions(read_only=True)
    ) as reads:
        for m, what in ((closed, "is closed"), (reads, "only reads")):
            for force in (False, True):
                with fails(f"the manager of .* {what}.*nothing was saved; open one that writes"):
                    lora.checkpoint.save(m, 6, adapters, base=PARAMS, force=force)
        assert lora.checkpoint.restore(reads, base=PARAMS).step == 5
    assert contents(tmp_path) == before


class Mode(enum.IntEnum):
    ON = 1


DELETED = jax.random.key(0)
DELETED.delete()
NO_FILE = {
    "enum": Mode.ON,  # a number would come back
    "order": np.ones(2, np.dtype("f4").newbyteorder()),
    "masked": np.ma.masked_array([1.0, 2.0], [0, 1]),
    "long": np.ones(2, np.longdouble),
    "uint4": np.ones(2, "uint4"),
    "float4": jnp.ones(2, "float4_e2m1fn"),
    "complex": 1j,
    "donated": DELETED,
    "object": np.array([None]),
}


def test_what_no_file_holds(tmp_path):
    """Refused before it is written, by name: none comes back as something else."""
    adapters, _ = trained()
    gone = jnp.ones((16, 32))
    gone.delete()
    save, print_of = lora.checkpoint.save, lora.checkpoint.fingerprint
    with manager(tmp_path) as m:
        with fails("(?s)" + ".*".join(f"state: '{name}' is" for name in sorted(NO_FILE))):
            save(m, 1, adapters, base=PARAMS, state=NO_FILE)
        with fails("(?s)have been donated or deleted:.*'up/kernel'"):
            save(m, 1, adapters, base={**PARAMS, "up": {**PARAMS["up"], "kernel": gone}})
        for call in (
            lambda: jax.jit(lambda ad: save(m, 1, ad, base=PARAMS))(adapters),
            lambda: jax.jit(lambda base: save(m, 1, adapters, base=base))(PARAMS),
            lambda: jax.jit(lambda: print_of(PARAMS).content)(),
        ):
            with fails("(save|call it) outside of jax.jit"):
                call()
        for data, metrics, step, match in (
            ({1: "a", "1": "b"}, None, 1, "two keys of a dict are one as text"),
            (nested(10**5), None, 1, "data cannot be saved as JSON .*recursion"),
            (None, {1: 1, "1": 2}, 1, "expected numbers"),
            (None, {"loss": 10**400}, 1, "expected numbers"),
            (None, None, True, "step=True: expected an integer"),
        ):
            with fails(match):
                save(m, step, adapters, base=PARAMS, data=data, metrics=metrics)
        for base in (None, 5):
            with fails("expected parameters as the base, found a (NoneType|int): lora.checkpoint"):
                save(m, 1, adapters, base=base)
        for nothing in (None, 1.0, "a"):
            with fails("the adapter of 'down/kernel' holds what is no array"):
                save(m, 1, jax.tree.map(lambda x, y=nothing: y, adapters), base=PARAMS)
        with fails(r"lora.checkpoint.save\(manager, step, adapters, base=params\[\"m\"\]\)"):
            save(m, 1, adapters, base={"m": PARAMS})
        assert m.latest_step() is None


def nested(depth):
    return functools.reduce(lambda x, _: [x], range(depth), 0)


def test_numbers_are_read_as_others_where_nothing_is_lost(tmp_path):
    zero = lambda dtype: jnp.zeros((), dtype)
    state = {"f": 1.5, "i": 7, "big": 2**40, "neg": -1, "af": jnp.array(1.5), "ai": jnp.array(7)}
    saved(tmp_path, state=state)
    restored = lambda like: lora.checkpoint.restore(tmp_path, make(), base=PARAMS, state=like)
    fits = {"f": zero("float32"), "i": zero("int8"), "big": 0, "neg": 0, "af": 0.0, "ai": 0}
    assert restored(fits).state == {**state, "af": 1.5, "ai": 7}
    for name, like in (
        ("f", zero("int32")), ("i", zero("float32")), ("big", zero("int32")), ("i", zero(bool)),
        ("neg", zero("uint32")), ("af", 0), ("ai", 0.0), ("ai", True), ("f", object()),
    ):  # fmt: skip
        with fails(f"state: '{name}' was saved as a .*, found (an? )?"):
            restored({**fits, name: like})
    with fails("expected a LoRAConfig or Targets, found dict"):
        saved(tmp_path / "bare", config=None)
        lora.checkpoint.restore(tmp_path / "bare", make(), base=PARAMS, config={"rank": 2})


def test_words_of_less_than_a_byte():
    """Of each of the 16 numbers of float4_e2m1fn another checksum."""
    codes = jnp.arange(16, dtype="uint8").astype("uint4")
    numbers = jax.lax.bitcast_convert_type(codes, "float4_e2m1fn")
    found = checksums({str(i): x[None] for i, x in enumerate(numbers)})
    assert len({*found.values()}) == 16


def contents(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_the_values_of_the_base_count(tmp_path):
    """As they were saved, wherever they lie; left out on request, on either side, or of shapes."""
    other = {**PARAMS, "up": {**PARAMS["up"], "bias": PARAMS["up"]["bias"].at[3].set(1e-30)}}
    print_of = lora.checkpoint.fingerprint
    saved(tmp_path / "with")
    for base in (PARAMS, on(mesh(2, 4)), print_of(PARAMS), jax.device_get(PARAMS)):
        lora.checkpoint.restore(tmp_path / "with", base=base)
    for base in (other, print_of(other), jax.device_get(other)):
        with fails("base: 'up/bias': has other values"):
            lora.checkpoint.restore(tmp_path / "with", base=base)
    for base in (print_of(other, content=False), jax.eval_shape(lambda: other), None):
        lora.checkpoint.restore(tmp_path / "with", base=base)
    saved(tmp_path / "without", base=print_of(PARAMS, content=False))
    lora.checkpoint.restore(tmp_path / "without", base=other)


def test_the_values_of_a_quantised_base_count(tmp_path):
    base, other = (lora.quant.quantize({"w": w}, "w") for w in (jnp.eye(64), 2 * jnp.eye(64)))
    saved(tmp_path, make(lora.LoRAConfig(rank=2, targets="w"), base), base=base, config=None)
    lora.checkpoint.restore(tmp_path, base=base)
    with fails("base: 'w': has other values"):
        lora.checkpoint.restore(tmp_path, base=other)


def test_the_base_is_read_once_a_run(tmp_path, monkeypatch):
    """Its arrays do not change; NumPy's do."""
    read = []
    take = lora.checkpoint.fingerprint
    count = lambda x, **kw: (read.append(0) if not kw else None, take(x, **kw))[1]
    monkeypatch.setattr("lora_jax.checkpoint._fingerprint.fingerprint", count)
    adapters, host = trained()[0], jax.device_get(PARAMS)
    with manager(tmp_path) as m:
        for step in range(1, 4):
            lora.checkpoint.save(m, step, adapters, base={**PARAMS})
        assert len(read) == 1
        lora.checkpoint.save(m, 4, adapters, base={**PARAMS, "table": PARAMS["table"] * 2})
        assert len(read) == 2
        for step in range(5, 7):
            lora.checkpoint.save(m, step, adapters, base=host)
        assert len(read) == 4
        m.wait_until_finished()
    with fails("base: 'table': has other values"):
        lora.checkpoint.restore(tmp_path, base=PARAMS, step=4)


def test_a_copied_step(tmp_path):
    saved(tmp_path)
    shutil.copytree(tmp_path / "5", tmp_path / "6")
    with fails("checkpoint 6 in .* is step 5 by its own description: it was copied or renamed"):
        lora.checkpoint.restore(tmp_path, base=PARAMS)
    assert lora.checkpoint.restore(tmp_path, base=PARAMS, step=5).step == 5


def test_a_directory_without_a_checkpoint(tmp_path):
    with fails("there is no complete checkpoint in"):
        lora.checkpoint.restore(tmp_path, base=PARAMS)
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
    with fails("there is no complete checkpoint in"):
        lora.checkpoint.restore(tmp_path, base=PARAMS)


def test_checkpoints_of_something_else(tmp_path):
    """They are not read, and, as a manager tidies up, nothing is saved beside them."""
    with manager(tmp_path) as m:
        m.save(1, args=ocp.args.Composite(state=ocp.args.StandardSave({"a": jnp.ones(3)})))
    before = contents(tmp_path)
    with manager(tmp_path, max_to_keep=1) as m:
        with fails("checkpoint 1 in .* cannot be read .*not one of lora_jax's"):
            lora.checkpoint.restore(m, base=PARAMS)
        with fails(r"holds checkpoints of something else, or a damaged one \(step 1\)"):
            lora.checkpoint.save(m, 2, trained()[0], base=PARAMS)
    assert contents(tmp_path) == before
    with manager(tmp_path / "json") as m:
        m.save(1, args=ocp.args.Composite(lora=ocp.args.JsonSave({"hello": 1})))
    with fails("is not one of lora_jax's: its description has no format"):
        lora.checkpoint.restore(tmp_path / "json", base=PARAMS)


def test_a_newer_format(tmp_path):
    saved(tmp_path)
    file = tmp_path / "5" / "lora" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2, "unheard": "of"}))
    with fails("has format 2; this version reads up to 1: pip install -U lora_jax"):
        lora.checkpoint.restore(tmp_path, base=PARAMS)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 1}))
    with fails("is damaged: its description is not what was written"):
        lora.checkpoint.restore(tmp_path, base=PARAMS)


def test_a_record_that_no_save_wrote(tmp_path):
    """With a checksum of its own: whatever stands in it, an error of ours."""
    saved(tmp_path, state=TX.init(make()))
    file = tmp_path / "5" / "lora" / "metadata"
    good = json.loads(file.read_text())

    def places(x, at=()):
        yield at
        for key in x if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else ():
            yield from places(x[key], (*at, key))

    rng, found = random.Random(0), {"error": 0, "read": 0}
    small = {n: good[n] for n in ("base", "nodes", "adapters", "state", "config", "content")}
    for at in rng.sample([at for at in places(small) if at], 25):
        record = json.loads(json.dumps(good))
        *parents, last = at
        holder = functools.reduce(lambda x, key: x[key], parents, record)
        holder[last] = rng.choice([None, -1, 1.5, "x", [], {}, [1, 2], {"a": 1}, True])
        file.write_text(json.dumps(record | {"crc32": crc32(record)}))
        for like in (make(), None):
            try:
                lora.checkpoint.restore(tmp_path, like, base=PARAMS)
                found["read"] += 1
            except lora.LoRAError:
                found["error"] += 1
    assert found["error"] > 15


def damaged(path, rng):
    """Truncates, empties, removes or flips a bit of one file; says what was done."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size)
    file = rng.choice(files)
    data = bytearray(file.read_bytes())
    kind = rng.choice(["truncated", "emptied", "removed", "flipped", "flipped", "flipped"])
    if kind == "flipped":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        data = data[: rng.randrange(len(data)) if kind == "truncated" else 0]
    file.unlink()
    if kind != "removed":
        file.write_bytes(data)
    return f"{kind} {file.relative_to(path)}"


# Orbax leaves event loops and threads behind where a file is damaged.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_damage_is_found(tmp_path):
    """Whatever happens to a file: an error of ours, or, where nothing was lost, the same values."""
    adapters, opt = trained()
    saved(tmp_path / "good", adapters, state=opt)
    rng, outcomes = random.Random(0), []
    for i in range(60):
        path = tmp_path / str(i)
        shutil.copytree(tmp_path / "good", path)
        what = damaged(path, rng)
        try:
            got = lora.checkpoint.restore(
                path, make(), base=PARAMS, config=CONFIG, state=TX.init(make())
            )
        except lora.LoRAError as e:
            assert re.search("damaged|there is no complete checkpoint", str(e)), (what, str(e))
            outcomes.append("error")
        else:
            assert_same((got.adapters, got.state), (adapters, opt))
            assert "lora/metadata" not in what, what
            outcomes.append("harmless")
        shutil.rmtree(path)
    assert "error" in outcomes  # about one in four: which files there are is not ours to say


def test_every_bit_of_an_array_counts():
    """One flipped bit anywhere changes the checksum."""
    x = np.array(rand.normal(KEY, (5, 7)))
    want = checksums({"x": x})
    words = x.view(np.uint32)
    for position in np.ndindex(x.shape):
        bit = np.uint32(1 << (sum(position) * 5 % 32))
        words[position] ^= bit
        assert checksums({"x": x}) != want
        words[position] ^= bit
    assert checksums({"x": x}) == want
    assert checksums({"x": -x}) != want and checksums({"x": x[::-1]}) != want
    assert checksums({"x": x.T.copy()}) != want


@given(
    data=st.data(),
    dtype=st.sampled_from(["float32", "bfloat16", "int32", "int8", "bool", "float8_e4m3fn"]),
)
@examples(10)
def test_checksums_do_not_know_of_shardings(data, dtype):
    shape = tuple(data.draw(st.lists(st.sampled_from([8, 16]), min_size=1, max_size=3)))
    x = rand.normal(jax.random.key(data.draw(st.integers(0, 99))), shape).astype(dtype)
    names = data.draw(st.permutations(["fsdp", "tp", None, None]))[: len(shape)]
    spread = jax.device_put(x, NamedSharding(mesh(2, 4), P(*names)))
    assert checksums({"x": x}) == checksums({"x": spread}) == checksums({"x": np.asarray(x)})


def test_descriptions():
    """Nodes and configurations go through JSON unchanged; functions are named, and not made again."""
    for node in jax.tree.leaves(make(), is_leaf=is_node):
        back = node_from_json(json.loads(json.dumps(node_to_json(node))))
        assert jax.tree.structure(back) == jax.tree.structure(node)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(back)] == [
            (x.shape, x.dtype) for x in jax.tree.leaves(node)
        ]
    config = lora.LoRAConfig(
        rank=4, targets=["q", re.compile("v.*", re.I)], exclude="head", full=["norm"], dtype="bfloat16",
        rules=[lora.Rule("q", rank=2, in_axes=(0,), out_axes=(1, 2))], rows={"table": np.arange(3)}, bias="adapted",
    )  # fmt: skip
    as_json = json.loads(json.dumps(config_to_json(config)))
    assert config_to_json(config_from_json(as_json)) == as_json
    assert (
        lora.select(PARAMS, config_from_json(config_to_json(CONFIG))).lora
        == lora.select(PARAMS, CONFIG).lora
    )
    config = config_to_json(lora.LoRAConfig(targets=lambda path, x: True))
    assert config["targets"] == [
        {"function": "test_checkpoint.test_descriptions.<locals>.<lambda>"}
    ]
    assert config_from_json(config) is None


def test_a_damaged_latest_does_not_hide_the_others(tmp_path):
    adapters, _ = trained()
    with manager(tmp_path) as m:
        for step in (1, 2):
            lora.checkpoint.save(m, step, adapters, base=PARAMS)
    os.truncate(tmp_path / "2" / "lora" / "metadata", 10)
    with fails(r"checkpoint 2 in .* cannot be read .*Other steps there: \[1\]"):
        lora.checkpoint.restore(tmp_path, base=PARAMS)
    assert_same(lora.checkpoint.restore(tmp_path, base=PARAMS, step=1).adapters, adapters)
