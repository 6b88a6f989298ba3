"""Runs of equations that repeat are traced once; what comes out is the same program."""

import contextlib
import itertools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from by_hand import steps
from common import adapted, assert_close, assert_equals_dense, examples
from hypothesis import given
from hypothesis import strategies as st

import lora_jax as lora
from lora_jax._core import compat as _compat
from lora_jax._interpret import interpreter as _interpret
from lora_jax._interpret import repeats as _repeats

KEY = jax.random.key(0)
LAYER = {"w": 0.3 * rand.normal(KEY, (8, 8)), "v": 0.3 * rand.normal(KEY, (8, 8))}


def layer(p, x, c=1.0):
    h = jnp.tanh(x @ p["w"]) * jax.nn.sigmoid(x @ p["w"].T) + c
    return x + jnp.sin(h) @ p["v"] / jnp.sqrt(1.0 + jnp.sum(h * h, -1, keepdims=True))


def stack(constants, name="layer"):
    def fn(p, x):
        for i, c in enumerate(constants):
            with jax.named_scope(f"{name}_{i}") if name else contextlib.nullcontext():
                x = layer(p[str(i)], x, c)
        return x

    return fn, {str(i): LAYER for i in range(len(constants))}


def kinds(fn, *args):
    """For each layer of the function, the number of the first one that it equals."""
    jaxpr, _ = _compat.live(jax.make_jaxpr(fn)(*args))
    repeats, firsts = _repeats.Repeats(jaxpr), []
    for scope, run in itertools.groupby(jaxpr.eqns, _compat.scopes):
        if scope:
            run = list(run)
            found = repeats.first(run)
            firsts.append(found[1].eqns if found else run)
    return [next(i for i, f in enumerate(firsts) if f is first) for first in firsts]


X = rand.normal(KEY, (3, 8))


def test_layers_under_numbered_scopes_are_one():
    assert kinds(*stack([1.0] * 4), X) == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "constants,want", [((1.0, 2.0, 1.0, 2.0), [0, 1, 0, 1]), ((1.0, 2.0, 3.0), [0, 1, 2])]
)
def test_layers_that_differ_are_not(constants, want):
    assert kinds(*stack(constants), X) == want


def test_lines_tell_layers_apart():
    """Each equation keeps the line of the user's code that made it."""

    def fn(p, x):
        with jax.named_scope("one"):
            x = layer(p["0"], x)
        with jax.named_scope("two"):
            x = layer(p["1"], x)
        return x

    assert kinds(fn, {"0": LAYER, "1": LAYER}, X) == [0, 1]


def test_shapes_and_reads_tell_layers_apart():
    """The second layer gives one value more, the third is of another width."""

    def fn(p, x):
        kept = []
        for i in range(4):
            with jax.named_scope(f"layer_{i}"):
                h = jnp.tanh(x @ p[str(i)]["w"])
                kept.append(h)
                x = layer(p[str(i)], x) + h
        return x, kept[1]

    assert kinds(fn, {str(i): LAYER for i in range(4)}, X) == [0, 1, 0, 0]
    fn, params = stack([1.0] * 4)
    wide = lambda p, x: (fn(p, x), fn(p, jnp.concatenate([x, x])))
    assert kinds(wide, params, X) == [0, 0, 0, 0, 4, 4, 4, 4]


@pytest.mark.slow
@examples(12)
@given(
    st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=2, max_size=6),
    st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_equals_dense(constants, which):
    """Whatever layers are alike, and whichever of them are adapted."""
    fn, params = stack(constants)
    targets = [f"{i}/{'w' if flag else 'v'}" for i, flag in zip(params, which)]
    assert_equals_dense(fn, params, X, targets=targets)


@pytest.mark.parametrize("outer", ["jit", "checkpoint", "vmap"])
def test_under_transformations(outer):
    fn, params = stack([1.0] * 3)
    transform = {
        "jit": jax.jit,
        "checkpoint": jax.checkpoint,
        "vmap": lambda f: jax.vmap(f, in_axes=(None, 0)),
    }[outer]
    assert_equals_dense(transform(fn), params, X, targets=["0/w", "1/w", "2/w", "2/v"])


def test_each_layer_keeps_its_own_name():
    fn, params = stack([1.0] * 3)
    f, ad = adapted(fn, params, X, targets=["w", "v"])
    text = jax.jit(jax.grad(lambda ad: jnp.sum(f(lora.bind(params, ad), X)))).lower(ad)
    names = re.findall(r"(layer_\d)[^\"]*/(\w+)\"", text.as_text(debug_info=True))
    per_layer = [Counter(op for scope, op in names if scope == f"layer_{i}") for i in range(3)]
    assert {*per_layer[0]} == {*per_layer[1]} == {*per_layer[2]} > {"dot_general", "sin"}


def test_no_call_is_left_behind():
    """Remat policies, and who reads the jaxpr, see the layers' own equations."""
    fn, params = stack([1.0] * 3)
    f, ad = adapted(fn, params, X, targets=["w", "v"])
    jaxpr = jax.make_jaxpr(lambda ad: f(lora.bind(params, ad), X))(ad)
    assert not re.search(r"name=(run|bind)", str(jaxpr))
    assert str(jaxpr).count("adapted_product") == 3 * 2  # w and w.T are of one input


def test_each_layer_is_covered_and_has_its_own_dropout():
    fn, params = stack([1.0] * 3)
    config = lora.LoRAConfig(rank=2, targets=["w", "v"], dropout=0.5)
    ad = lora.init(KEY, params, config)
    ad = jax.tree.map(lambda x: jnp.full_like(x, 0.1), ad)
    bound = lora.bind(params, ad, dropout_key=KEY)
    coverage = lora.coverage(fn, bound, X)
    assert coverage.low_rank == tuple(f"{i}/{n}" for i in range(3) for n in "vw")
    assert all(len(uses) == (2 if p[-1] == "w" else 1) for p, uses in coverage.uses.items())

    def masks(p, x):  # layers apart, so that each shows its own masks
        outs = []
        for i in range(3):
            with jax.named_scope(f"layer_{i}"):
                outs.append(layer(p[str(i)], x))
        return jnp.stack(outs)

    assert kinds(masks, params, X) == [0, 0, 0]
    outs = lora.adapt(masks)(bound, X)
    assert not np.allclose(outs[0], outs[1]) and not np.allclose(outs[1], outs[2])
    still = lora.adapt(masks)(lora.bind(params, ad), X)  # it is the masks that differ
    np.testing.assert_allclose(still[0], still[1], rtol=1e-6)


def test_the_program_is_the_same_as_without(monkeypatch):
    """XLA's figures and the gradients of the training step, with and without sharing the trace."""
    config = dict(targets=("q", "v", "down"), rank=4, width=64, hidden=96, heads=4, layers=4)
    (shared, args), _ = steps(**config, tokens=(2, 32))
    once = shared.lower(*args).compile()
    grads = once(*args)
    monkeypatch.setattr(_repeats.Repeats, "first", lambda self, run: None)
    (plain, args), _ = steps(**config, tokens=(2, 32))
    each = plain.lower(*args).compile()
    for figure in ("flops", "bytes accessed"):
        np.testing.assert_allclose(
            once.cost_analysis()[figure], each.cost_analysis()[figure], rtol=1e-6
        )
    assert once.memory_analysis().temp_size_in_bytes == each.memory_analysis().temp_size_in_bytes
    assert_close(jax.tree.leaves(grads), jax.tree.leaves(each(*args)))


@pytest.mark.parametrize("name", ["layer", None])
def test_work_does_not_grow_with_the_layers(monkeypatch, name):
    """Beside the equations of the weights; whether or not the layers have names."""
    evaluated = []
    original = _interpret.Interpreter.evaluate
    monkeypatch.setattr(
        _interpret.Interpreter, "evaluate", lambda self, e: evaluated.append(e) or original(self, e)
    )
    counts = []
    for n in (3, 16):
        fn, params = stack([1.0] * n, name)
        f, ad = adapted(fn, params, X, targets=["w", "v"])
        evaluated.clear()
        jax.jit(f).lower(lora.bind(params, ad), X)
        counts.append(sum(e.primitive.name not in ("dot_general", "transpose") for e in evaluated))
    assert counts[0] == counts[1] > 0


def test_layers_under_one_checkpoint_are_interpreted_once(monkeypatch):
    """JAX keeps one program for all calls of it; each call has its weights, names and masks."""
    body = jax.checkpoint(layer)

    def fn(p, x):
        outs = [x]
        for i in range(len(p)):
            outs.append(body(p[str(i)], x))
        return jnp.stack(outs)

    params = {str(i): LAYER for i in range(4)}
    assert_equals_dense(fn, params, X, targets=["0/w", "1/w", "1/v", "2/w", "3/w"])
    f, ad = adapted(fn, params, X, targets=["w", "v"])
    evaluated = []
    original = _interpret.Interpreter.evaluate
    monkeypatch.setattr(
        _interpret.Interpreter, "evaluate", lambda self, e: evaluated.append(e) or original(self, e)
    )
    program = jax.make_jaxpr(lambda ad: f(lora.bind(params, ad), X))(ad)
    assert len(evaluated) == len({id(e) for e in evaluated}) > 0  # three of four are not run again
    held = [e.params["jaxpr"] for e in program.eqns if e.primitive.name in _compat.REMAT]
    assert len(held) == 4 and len({*map(id, held)}) == 1
    coverage = lora.coverage(fn, lora.bind(params, ad), X)
    assert coverage.low_rank == tuple(f"{i}/{n}" for i in range(4) for n in "vw")
    config = lora.LoRAConfig(rank=2, targets=["w", "v"], dropout=0.5)
    dropped = lora.init(KEY, params, config)
    dropped = jax.tree.map(lambda x: jnp.full_like(x, 0.1), dropped)
    outs = f(lora.bind(params, dropped, dropout_key=KEY), X)
    assert not np.allclose(outs[1], outs[2]) and not np.allclose(outs[2], outs[3])
    still = f(lora.bind(params, dropped), X)
    np.testing.assert_allclose(still[1], still[3], rtol=1e-6)
