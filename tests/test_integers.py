"""Every integer that a public function takes: one of any library, or a LoRAError."""

import inspect
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import fails

import lora_jax as lora
from lora_jax import algebra, methods, optim, quant

W = {"w": np.random.default_rng(0).standard_normal((6, 4)).astype("float32")}
CONFIG = lora.LoRAConfig(rank=2, targets="w")
CODES = {"w": np.random.default_rng(1).standard_normal((4, 64)).astype("float32")}


def start(params=W):
    ones = lambda *shape: np.ones(shape, "float32")
    i, o = params["w"].shape
    return {"w": lora.LoRA(ones(i, 2), ones(2, o), 1.0, lora.Geometry((0,), (1,)))}


def key():
    return jax.random.key(0)


def loss(params):
    return jnp.sum((jnp.eye(6) @ params["w"]) ** 2)


def traced(fn, *args, **kwargs):
    """The shapes that a call gives: nothing is compiled."""
    return jax.eval_shape(lambda *args: fn(*args, **kwargs), *args)


def experts(x):
    params = {"up": jnp.zeros((4, 64, 256)), "router": jnp.zeros((64, 4))}
    fn = lambda p, x: (
        (x @ p["router"]) * jnp.einsum("ebi,eio->beo", jnp.stack([x] * 4), p["up"]).sum(2)
    )
    return methods.propose(params, lora.survey(fn, params, jnp.ones((3, 64))), active_experts=x)


def schedule(**numbers):
    given = {"steps": 9, "tinit": 1, "tfinal": 1, "interval": 1} | numbers
    nodes = {"w": methods.AdaLoRA(W["w"], np.ones(4), W["w"].T, geometry=lora.Geometry((0,), (1,)))}
    tx = optim.adalora(optax.sgd(0.1), target_rank=1, **given)
    return traced(lambda ad: tx.update(ad, tx.init(ad), ad), nodes)


def step(tx, tree=W):
    return traced(lambda x: tx.update(x, tx.init(x), x), tree)


CALLS = {
    "resize rank": lambda x: traced(algebra.resize, start(), rank=x),
    "ties rank": lambda x: traced(algebra.ties, [start()], rank=x),
    "ties passes": lambda x: traced(algebra.ties, [start()], rank=2, passes=x),
    "prune rank": lambda x: traced(algebra.prune, [start()], density=0.5, rank=x),
    "prune passes": lambda x: traced(algebra.prune, [start()], density=0.5, rank=2, passes=x),
    "dare rank": lambda x: traced(algebra.dare, key(), [start()], rank=x),
    "dare passes": lambda x: traced(algebra.dare, key(), [start()], rank=2, passes=x),
    "put index": lambda x: traced(
        lambda ad: algebra.put(algebra.stack([ad], capacity=4), x, ad), start()
    ),
    "init_vera rank": lambda x: traced(methods.init_vera, key(), W, config=CONFIG, rank=x),
    "low_rank_gradients rank": lambda x: traced(
        lambda w: methods.low_rank_gradients(loss, w, start(), rank=x), W
    ),
    "low_rank_gradients passes": lambda x: traced(
        lambda w: methods.low_rank_gradients(loss, w, start(), passes=x), W
    ),
    "pissa niter": lambda x: traced(methods.pissa, W, start(), niter=x),
    "propose active_experts": lambda x: experts(x).config.rank,
    "adalora steps": lambda x: schedule(steps=x, tinit=0, tfinal=0),
    "adalora tinit": lambda x: schedule(tinit=x),
    "adalora tfinal": lambda x: schedule(tfinal=x),
    "adalora interval": lambda x: schedule(interval=x),
    "galore rank": lambda x: step(optim.galore(0.1, rank=x)),
    "galore update_proj_gap": lambda x: step(optim.galore(0.1, rank=2, update_proj_gap=x)),
    "scale_by_galore rank": lambda x: step(optim.scale_by_galore(rank=x)),
    "scale_by_galore update_proj_gap": lambda x: step(optim.scale_by_galore(2, update_proj_gap=x)),
    "loftq iterations": lambda x: traced(
        quant.loftq, CODES, start(CODES), targets="w", iterations=x
    ),
    "LoRAConfig rank": lambda x: lora.LoRAConfig(rank=x, targets="w").rank,
    "Rule rank": lambda x: lora.LoRAConfig(rules=[lora.Rule("w", rank=x)]).rules[0].rank,
}

# Tried by the tests of their own functions: several axes, slots, and real numbers of tokens.
ELSEWHERE = {"propose tokens", "choose index", "stack capacity", "stack rank", "by_slot capacity",
             "join slot", "leave slot", "adapt static_argnums", "coverage static_argnums",
             "Rule in_axes", "Rule out_axes", "Rule batch_axes", "LoRAConfig rows"}  # fmt: skip

ODD = [10**30, -(10**30), 2**63, np.uint64(2**64 - 1), -1, True, np.True_, 4.0, 2.5, np.float32(2),
       float("nan"), float("inf"), "4", b"4", 1j, [2], (2,), {}, np.array([2]), Fraction(2),
       np.timedelta64(2, "s"), object(), int]  # fmt: skip
# An integer to `LoRAConfig`; the leaves say whether they have such a rank.
LARGE = ("LoRAConfig rank", "Rule rank", "propose active_experts")


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_all_are_here():
    """Those that are made for the user (results, nodes) take no arguments of his."""
    found = set()
    for room in (lora, algebra, methods, optim, quant):
        for name in dir(room):
            f = getattr(room, name)
            if name.startswith("_") or not (
                inspect.isfunction(f) or name in ("LoRAConfig", "Rule")
            ):
                continue
            for p in inspect.signature(f).parameters.values():
                if re.search(r"\bint\b", str(p.annotation)):
                    found.add(f"{name} {p.name}")
    assert found == {*CALLS} | ELSEWHERE


@pytest.mark.parametrize("name", CALLS)
def test_odd_integers(name):
    for x in [*ODD, jnp.array(True)]:
        if not (name in LARGE and isinstance(x, int | np.uint64) and x > 1):
            with fails("expected|made of arrays|slot"):
                CALLS[name](x)


@pytest.mark.parametrize("name", CALLS)
def test_integers_of_any_library(name):
    want = CALLS[name](2)
    for x in (np.int64(2), np.uint8(2), np.array(2), jnp.int32(2)):
        # AdaLoRA's schedule is fixed: an array is refused, see tests/optim/test_adalora.py.
        if not ("adalora" in name and isinstance(x, jax.Array)):
            jax.tree.map(np.testing.assert_array_equal, CALLS[name](x), want)


def test_an_integer_that_is_not_printed():
    with fails("rank=an integer of 16610 bits"):
        algebra.resize(start(), 10**5000)
    with fails("update_proj_gap=an integer of 16610 bits: expected an integer >= 1, less than 2"):
        optim.galore(0.1, update_proj_gap=10**5000)


@pytest.mark.parametrize("make", [optim.lora_rite, optim.lora_muon, optim.galore])
def test_rates_of_any_library(make):
    """−1 · uint8(2) overflows, and a Fraction is multiplied with no array."""
    tree = W if make is optim.galore else start()
    for x in (np.uint8(2), np.float16(2), Fraction(2), np.float64(2), 2):
        step(make(x, weight_decay=x * 0), tree)


@pytest.mark.parametrize("odd", [4.0, "1", None, True, (0, 1.5), ("0",), np.timedelta64(1, "s")])
@pytest.mark.parametrize(
    "call",
    [
        lambda x: lora.adapt(loss, static_argnums=x),
        lambda x: lora.coverage(loss, W, static_argnums=x),
        lambda x: lora.parallel.forecast(loss, W, donate_argnums=x),
    ],
    ids=["adapt", "coverage", "forecast"],
)
def test_numbers_of_arguments(call, odd):
    with fails(r"argnums=.*: expected an integer, or several: (static|donate)_argnums=\(1,\)"):
        call(odd)


def test_numbers_of_arguments_of_any_library():
    fn = lora.adapt(lambda p, x, n: (x @ p["w"]) * n, static_argnums=np.int64(2))
    assert fn(lora.bind(W, start()), jnp.ones((1, 6)), 2).shape == (1, 4)


@pytest.mark.parametrize("names", [4, (1,), [None]])
def test_names_of_arguments(names):
    with fails(r'static_argnames=.*: expected a name, or several: static_argnames=\("train",\)'):
        lora.adapt(loss, static_argnames=names)


@pytest.mark.parametrize("axes", ["0", (0.5,), (None,), [0], 0])
def test_axes_of_a_geometry(axes):
    with fails(r"geometry=.*: expected axes, such as lora.Geometry\(\(0,\), \(1,\)\)"):
        lora.LoRA(np.ones((6, 2)), np.ones((2, 4)), 1.0, lora.Geometry(axes, (1,)))


def test_a_survey_is_of_paths():
    survey = lora.survey(loss, W)
    assert [*survey] == ["w"] and len(survey) == 1 and "w" in survey


@pytest.mark.parametrize("index", [np.timedelta64(1, "s"), np.array([1], "m8[s]")])
def test_an_interval_of_time_is_no_slot(index):
    with fails("expected integers as an index, found timedelta64"):
        lora.algebra.choose(lora.algebra.stack([start()]), index)


def test_a_stack_is_of_arrays():
    broken = jax.tree.map(lambda x: "x", start())
    with fails("'w' holds what is no array"):
        lora.algebra.stack([broken])
