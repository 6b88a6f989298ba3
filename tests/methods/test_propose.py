"""Proposals: what is counted is counted right, and what is chosen is what the data say."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from common import examples, fails
from hypothesis import given
from hypothesis import strategies as st

import lora_jax as lora
from lora_jax._core.paths import nest
from lora_jax.methods._propose import _feature_norms, module_type


def normal(i, *shape):
    return rand.normal(jax.random.fold_in(jax.random.key(8), i), shape)


PARAMS = {
    f"layers_{i}": {"up": {"kernel": normal(i, 96, 64)}, "down": {"kernel": normal(9 + i, 64, 96)}}
    for i in range(2)
} | {"head": normal(20, 96, 4)}
X = normal(21, 40, 96)


def fn(p, x):
    for i in range(2):
        layer = p[f"layers_{i}"]
        x = x + jnp.tanh(x @ layer["up"]["kernel"]) @ layer["down"]["kernel"]
    return x @ p["head"]


SURVEY = lora.survey(fn, PARAMS, X)
TARGETS = lora.select(PARAMS, lora.LoRAConfig(rank=1), SURVEY)


def test_defaults():
    found = lora.methods.propose(PARAMS, SURVEY, full_learning_rate=2e-5)
    config = found.config
    assert (config.rank, config.alpha, config.targets) == (32, 32.0, "all-linear")
    assert found.learning_rate == pytest.approx(2e-4) and not found.scores
    targets = lora.select(PARAMS, config, SURVEY)
    assert len(targets) == 4 and "head" not in targets
    assert {t.scale for t in targets.lora.values()} == {1.0}
    text = str(found)
    assert "all linear layers but the head, 4 leaves" in text and "learning rate 0.0002" in text
    assert lora.methods.propose(PARAMS, SURVEY).learning_rate is None
    counted = lora.methods.propose(PARAMS, SURVEY, tokens=jnp.int32(4000))
    assert counted == lora.methods.propose(PARAMS, SURVEY, tokens=4000)
    with fails("found traced ones"):
        jax.jit(lambda g: lora.methods.propose(PARAMS, SURVEY, gradients=g).scores)(PARAMS)


@examples(40)
@given(st.integers(1, 10**9))
def test_the_rank_holds_the_data(tokens):
    """The smallest power of two with 2 bits for each parameter, 1 for each token; none where the
    adapters would not be smaller than the weights."""
    found = lora.methods.propose(PARAMS, SURVEY, tokens=tokens)
    if found.config is None:  # rank 64 and more: 64 · (96 + 64) > 96 · 64
        assert tokens > 2 * 32 * 4 * (96 + 64) and "no adapters: of rank 64" in str(found)
        return
    parameters = lora.select(PARAMS, found.config, SURVEY).parameters
    assert 2 * parameters >= tokens
    assert found.config.rank == 1 or parameters < tokens  # half the rank would not do
    assert math.log2(found.config.rank).is_integer()


def test_small_leaves_have_rules_and_the_same_scale():
    """An adapter is always smaller than its leaf: with less rank, or it is left out."""
    params = {"wide": normal(0, 128, 128), "narrow": normal(1, 128, 4), "thin": normal(3, 128, 1),
              "head": normal(2, 128, 9)}  # fmt: skip
    net = lambda p, x: (
        jnp.tanh(x @ p["wide"]) @ p["head"]
        * jnp.sum(jnp.sin(x @ p["narrow"])) * jnp.sum(jnp.cos(x @ p["thin"]))
    )  # fmt: skip
    survey = lora.survey(net, params, jnp.ones((5, 128)))
    found = lora.methods.propose(params, survey)
    targets = lora.select(params, found.config, survey)
    # 3 · (128 + 4) < 128 · 4 < 4 · (128 + 4), and 8 · (128 + 9) < 128 · 9
    assert {p: t.rank for p, t in targets.lora.items()} == {"head": 8, "wide": 32, "narrow": 3}
    assert targets["narrow"].scale == targets["wide"].scale == 1.0
    assert "left out, smaller than any adapter: thin" in str(found)
    g = {p: jnp.ones(x.shape) for p, x in params.items()}
    chosen = lora.methods.propose(params, survey, gradients=g, keep=1.0).config.targets
    assert {*chosen} == {"wide", "narrow", "head"}


@examples(12)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3),
       st.integers(1, 10**6))  # fmt: skip
def test_adapters_are_smaller_than_the_weights_or_none(shapes, tokens):
    params = {f"w{i}": jnp.ones(shape) for i, shape in enumerate(shapes)}
    params |= {f"to{i}": jnp.ones((shape[1], 2)) for i, shape in enumerate(shapes)}
    of = lambda p, x: sum(
        jnp.tanh(x[:, :n] @ p[f"w{i}"]) @ p[f"to{i}"] for i, (n, _) in enumerate(shapes)
    )
    net = lambda p, x: of(p, x) @ p["head"]
    params["head"] = jnp.ones((2, 3))
    survey = lora.survey(net, params, jnp.ones((5, 40)))
    for options in ({}, {"tokens": tokens}):
        found = lora.methods.propose(params, survey, **options)
        if found.config is None:
            assert str(found).startswith("- no adapters") and len(found.reasons) == 1
        else:
            targets = lora.select(params, found.config, survey)
            assert all(t.parameters < math.prod(t.shape) for t in targets.lora.values())


def test_experts_that_stand_beside_each_other():
    """Unrolled experts have their router found as well, by their numbers."""
    experts = {f"{i}": {"w1": normal(i, 64, 96), "w2": normal(9 + i, 96, 64)} for i in range(3)}
    params = {"layers_0": {"moe": {"gate": {"kernel": normal(20, 64, 3)}, "experts": experts}},
              "head": normal(21, 64, 5)}  # fmt: skip

    def net(p, x):
        moe = p["layers_0"]["moe"]
        sent = jax.nn.softmax(x @ moe["gate"]["kernel"])
        each = [jnp.tanh(x @ e["w1"]) @ e["w2"] for e in moe["experts"].values()]
        return sum(sent[:, i : i + 1] * y for i, y in enumerate(each)) @ p["head"]

    survey = lora.survey(net, params, jnp.ones((5, 64)))
    found = lora.methods.propose(params, survey, active_experts=2)
    targets = lora.select(params, found.config, survey)
    assert len(targets) == 6 and {t.rank for t in targets.lora.values()} == {16}
    assert "routers left out: layers_*/moe/gate/kernel" in str(found)


def test_routers_are_left_out_and_experts_share_the_rank():
    params = {
        "up": normal(0, 128, 128), "router": normal(1, 128, 4), "experts": normal(2, 4, 128, 48),
        "head": normal(3, 48, 4), "gate_proj": normal(4, 128, 128),
    }  # fmt: skip

    def net(p, x):
        x = jnp.tanh(x @ p["up"])
        x = x * jax.nn.silu(x @ p["gate_proj"])
        sent = jax.nn.softmax(x @ p["router"]).T[..., None] * x  # (experts, tokens, features)
        return jnp.einsum("etd,edf->etf", sent, p["experts"]).sum(0) @ p["head"]

    survey = lora.survey(net, params, jnp.ones((5, 128)))
    found = lora.methods.propose(params, survey, active_experts=2)
    targets = lora.select(params, found.config, survey)
    assert {p: t.rank for p, t in targets.lora.items()} == {
        "up": 32, "gate_proj": 32, "experts": 16
    }  # fmt: skip
    assert {t.scale for t in targets.lora.values()} == {1.0}
    assert "routers left out: router" in str(found)
    assert "2 serve a token, each at rank 16" in str(found)
    assert "router" not in lora.select(params, lora.methods.propose(params, survey).config, survey)
    with fails("no router beside a stack"):
        lora.methods.propose(PARAMS, SURVEY, active_experts=2)


def test_feature_norms():
    """The score is that of the definition, with random weights drawn; the lowest is chosen."""
    x = X * jnp.exp(normal(5, 96))
    aligned = jnp.outer(x.T @ x @ jnp.ones(96), jnp.ones(64))  # one direction, in which x is large
    params = PARAMS | {
        f"layers_{i}": {**PARAMS[f"layers_{i}"], "up": {"kernel": aligned}} for i in range(2)
    }
    moments = lora.methods.second_moments(fn, params, TARGETS, x)
    found = lora.methods.propose(params, SURVEY, moments=moments)
    assert list(found.scores) == ["layers_*/down/kernel", "layers_*/up/kernel"]
    assert found.config.targets == ("layers_*/down/kernel",)
    assert {*lora.select(params, found.config, SURVEY)} == {
        "layers_0/down/kernel", "layers_1/down/kernel"
    }  # fmt: skip
    norms = []
    for w in (aligned, PARAMS["layers_0"]["up"]["kernel"]):
        drawn = np.random.default_rng(0).normal(size=(200, *w.shape))
        drawn *= np.linalg.norm(w) / np.sqrt(w.size)
        usual = np.sqrt(np.mean(np.sum((np.asarray(x) @ drawn) ** 2, (1, 2))))
        norms.append(np.linalg.norm(x @ w) / usual)
    only = dataclasses.replace(TARGETS, lora={"w": TARGETS["layers_0/up/kernel"]})
    for w, want in zip((aligned, PARAMS["layers_0"]["up"]["kernel"]), norms):
        c = lora.methods.second_moments(lambda p, x: x @ p["w"], {"w": w}, only, x)
        score = _feature_norms({"w": w}, only.lora, c)["w"]
        assert score == pytest.approx(want, rel=0.05)
    assert norms[0] > 1.5 and abs(norms[1] - 1) < 0.2


def test_gradient_norms():
    """Full and low-rank gradients give the same order; what the loss does not see comes last."""
    loss = lambda p, x: jnp.mean(jnp.sin(fn(p, x)[:, :1]))
    dull = PARAMS | {  # inputs of `down` that are next to nothing
        f"layers_{i}": {**PARAMS[f"layers_{i}"], "up": {"kernel": 1e-4 * normal(i, 96, 64)}}
        for i in range(2)
    }
    full = jax.jit(jax.grad(loss))(dull, X)
    few = jax.jit(lambda p: lora.methods.low_rank_gradients(loss, p, TARGETS, X, rank=4))(dull)
    for gradients in (full, few):
        found = lora.methods.propose(dull, SURVEY, gradients=gradients)
        assert found.config.targets == ("layers_*/up/kernel",)
        g = full["layers_0"]["up"]["kernel"], full["layers_1"]["up"]["kernel"]
        want = np.mean([np.sum(np.square(x)) for x in g]) / (96 + 64)
        assert found.scores["layers_*/up/kernel"] == pytest.approx(want, rel=0.3)
    outer = lora.survey(lambda p, x: fn(p["params"], x), {"params": dull}, X)
    assert (
        lora.methods.propose(dull, outer, gradients=full).config == found.config
    )  # paths are params'
    assert len(lora.methods.propose(dull, SURVEY, gradients=full, keep=1.0).config.targets) == 2


def test_a_type_means_its_own_leaves():
    """Where the glob of a type means leaves of others as well, the paths are named."""
    params = {"b1": normal(1, 8, 8), "b1x": {"b2": normal(2, 8, 8)}, "head": normal(3, 8, 2)}
    net = lambda p, x: jnp.tanh(jnp.tanh(x @ p["b1"]) @ p["b1x"]["b2"]) @ p["head"]
    survey = lora.survey(net, params, jnp.ones((3, 8)))
    targets = lora.select(params, lora.LoRAConfig(rank=1), survey)
    for first, other in (("b1", "b1x/b2"), ("b1x/b2", "b1")):
        g = {first: jnp.ones((8, 8)), other: jnp.zeros((8, 8))}
        config = lora.methods.propose(params, survey, gradients=nest(g), tokens=9).config
        assert [*lora.select(params, config, survey)] == [first]
    assert [*targets] == ["b1", "b1x/b2"] and module_type("b1x/b2") == "b*x/b*"


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(tokens=0), "tokens=0: expected a number >= 1"),
        (dict(full_learning_rate=0.0), "full_learning_rate=0.0: expected a finite number > 0"),
        (dict(active_experts=0), "active_experts=0: expected an integer >= 1"),
        (dict(keep=0.0), r"keep=0.0: expected a share in \(0, 1\]"),
        (dict(moments={}, gradients={}), "two ways to choose"),
        (dict(moments={}), "'layers_0/up/kernel' has none"),
        (
            dict(
                gradients=jax.tree.map(
                    jnp.zeros_like,
                    PARAMS | {"layers_0": PARAMS["layers_1"] | {"up": {"kernel": X}}},
                )
            ),
            r"'layers_0/up/kernel' of \(96, 64\), found \(40, 96\)",
        ),
        (
            dict(gradients=jax.tree.map(lambda x: x * np.nan, PARAMS)),
            "NaN or infinity, of the leaves:\n  - 'layers_0/",
        ),
        (dict(gradients={"head": jnp.ones(3)}), "these leaves have no gradient:\n  - 'layers_0/"),
    ],
)
def test_errors(options, match):
    with fails(match):
        lora.methods.propose(PARAMS, SURVEY, **options)
