"""Every misuse is an error that names the leaf and shows the corrected call; no case is silent."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import assert_close, fails, noisy
from flax import linen as nn
from flax import nnx
from jax.experimental import pallas as pl

import lora_jax as lora

KEY = jax.random.key(0)
X = jnp.ones((2, 8))
PARAMS = {
    "up": {"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)},
    "down": {"kernel": jnp.ones((6, 8))},
}
CONFIG = lora.LoRAConfig(rank=2, targets=["up", "down"])
ADAPTERS = lora.init(KEY, PARAMS, CONFIG)


def with_(**settings):
    return lora.LoRAConfig(**{"rank": 2, "targets": ["up", "down"]} | settings)


def fn(p, x):
    return jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"]) @ p["down"]["kernel"]


def test_one_error_class():
    assert issubclass(lora.LoRAError, ValueError)


# ---------------------------------------------------------------- configuration


def test_config_collects_all_failures():
    with fails(
        r"(?s)rank=0.*alpha=nan.*dropout=1.*Rule\('q'\): rank=-1.*init='x'.*bias='some'.*dtype"
    ) as e:
        lora.LoRAConfig(
            rank=0,
            alpha=float("nan"),
            dropout=1,
            init="x",
            bias="some",
            dtype=jnp.int32,
            rules=[lora.Rule("q", rank=-1)],
        )
    assert "LoRAConfig(rank=8, alpha=16" in str(e.value)


@pytest.mark.parametrize(("config", "match"), [
    (dict(targets="q_proj"), r"(?s)targets: 'q_proj' matches no leaf; nearest: .*up/kernel"),
    (dict(targets="Up"), r"nearest: up/"),
    (dict(targets=["up", "x", "y"]), r"(?s)'x' matches no leaf.*'y' matches no leaf"),
    (dict(targets="up", exclude="zz"), r"exclude: 'zz' matches no leaf"),
    (dict(targets="up", full="zz"), r"full: 'zz' matches no leaf"),
    (dict(targets="up", rows={"zz": [0]}), r"rows: 'zz' matches no leaf"),
    (dict(targets="up", rules=[lora.Rule("zz")]), r"rule 'zz' matches no adapted leaf"),
    (dict(targets="up", rank=7), r"'up/kernel' \(8, 6\): rank 7 exceeds min\(in=8, out=6\).*Rule\('up/kernel', rank=6\)"),
    (dict(targets="up", full="up/kernel"), r"'up/kernel' is claimed by targets and full"),
    (dict(targets="down", bias="adapted"), r"bias='adapted', but no leaf is named 'bias'"),
    (dict(targets="up", rows={"down": [0, 9]}), r"'down/kernel' has rows 0 to 5"),
    (dict(targets="up/bias"), r"'up/bias' \(6,\): which axes are in and out is ambiguous; pass a survey"),
    (dict(targets="all-linear"), r"needs to know how the function uses each leaf"),
    (dict(targets="up", rules=[lora.Rule("up", in_axes=(0, 1), out_axes=(1,))]), r"must name each of the 2 axes once"),
])  # fmt: skip
def test_select(config, match):
    with fails(match):
        lora.init(KEY, PARAMS, lora.LoRAConfig(**{"rank": 2, **config}))


def test_ambiguous_axes_without_a_function():
    params = {"heads": jnp.ones((8, 2, 4))}
    config = lora.LoRAConfig(rank=2, targets="heads")
    with fails(r"'heads' \(8, 2, 4\): which axes .* lora.survey\(model.apply"):
        lora.init(KEY, params, config)
    survey = lora.survey(lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["heads"]), params, X)
    assert lora.init(KEY, params, config, survey)["heads"].a.shape == (8, 2)


def test_leaves_that_cannot_be_adapted():
    params = {
        "w": jnp.ones((4, 4), jnp.int8),
        "k": jax.random.split(KEY, 4).reshape(2, 2),
        "s": jnp.ones((4, 4)),
    }
    with fails(r"(?s)'k' \(2, 2\) is of type key.*'w' \(4, 4\) is of type int8"):
        lora.init(KEY, params, lora.LoRAConfig(rank=2, targets=["w", "k"]))
    survey = lora.survey(lambda p, x: x * p["s"], params, jnp.ones((4, 4)))
    with fails(r"'s' \(4, 4\) is used by no contraction, convolution or look-up \(mul\)"):
        lora.init(KEY, params, lora.LoRAConfig(rank=2, targets=["s"]), survey)


def test_wrong_kinds_of_arguments():
    with fails("expected a LoRAConfig or Targets, found dict"):
        lora.init(KEY, PARAMS, {"rank": 2})
    with fails("expected a PRNG key, found int"):
        lora.init(0, PARAMS, CONFIG)
    with fails("expected a Survey, found function"):
        lora.init(KEY, PARAMS, CONFIG, fn)
    with fails("the survey has no leaves 'up/"):
        lora.init(
            KEY,
            PARAMS,
            CONFIG,
            lora.survey(lambda p, x: x @ p["other"], {"other": jnp.ones((8, 8))}, X),
        )
    with fails(r"'up/kernel': expected \(8, 2\), found \(2, 8\)"):
        lora.init(
            KEY,
            PARAMS,
            lora.LoRAConfig(rank=2, targets="up", init=lambda k, s, d: jnp.ones(s[::-1], d)),
        )


# ---------------------------------------------------------------- bind and merge


@pytest.mark.parametrize("verb", [lora.bind, lora.merge, lora.unmerge])
def test_adapters_of_another_model(verb):
    other = {"up": {"kernel": jnp.ones((8, 7))}, "Down": {"kernel": jnp.ones((6, 8))}}
    adapters = lora.init(KEY, other, lora.LoRAConfig(rank=2, targets=["up", "Down"]))
    with fails(
        r"(?s)'Down/kernel' is adapted, but .* nearest: down/kernel.*"
        r"'up/kernel': the leaf has shape \(8, 6\); expected b of \(2, 6\), found \(2, 7\)"
    ):
        verb(PARAMS, adapters)


@pytest.mark.parametrize("verb", [lora.bind, lora.merge])
def test_trees_in_the_wrong_place(verb):
    with fails(r"expected adapters, found parameters.* lora.init\(key, params, config\)"):
        verb(PARAMS, PARAMS)
    with fails("expected adapters, found an empty tree"):
        verb(PARAMS, {})
    with fails(r"'down/kernel' is a ArrayImpl, not an adapter"):
        verb(PARAMS, {"up": ADAPTERS["up"], "down": PARAMS["down"]})
    with fails(r"bound already \(2 leaves, first 'down/kernel'\)"):
        verb(lora.bind(PARAMS, ADAPTERS), ADAPTERS)


def test_missing_adapters():
    """Adapters of fewer leaves than the configuration selects: `Targets.check` lists both sides."""
    targets = lora.select(PARAMS, CONFIG)
    targets.check(ADAPTERS)
    with fails(r"'down/kernel' has no adapter"):
        targets.check({"up": ADAPTERS["up"]})
    with fails(r"(?s)'down/kernel' .* is not a target.*'up/kernel': expected rank 3, found 2"):
        lora.select(PARAMS, lora.LoRAConfig(rank=3, targets="up")).check(ADAPTERS)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_merge_refuses_what_is_not_finite(bad):
    adapters = jax.tree.map(lambda x: x.at[0].set(bad), ADAPTERS)
    with fails(r"(?s)'down/kernel' \(6, 8\) holds NaN or infinity.*'up/kernel'"):
        lora.merge(PARAMS, adapters)


def test_merge_of_shapes():
    shapes = jax.eval_shape(lambda: PARAMS)
    with fails(r"jax.eval_shape\(lora.merge"):
        lora.merge(shapes, ADAPTERS)


# ---------------------------------------------------------------- adapt


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="up")(x)


class Table(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Embed(10, 6, name="up")(x.astype(jnp.int32))


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, name="up")(x[None])


class Conv(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(6, (3,), name="up")(x[None])


@pytest.mark.parametrize("model", [Dense, Table, Heads, Conv])
@pytest.mark.parametrize("jit", [False, True])
def test_adapt_forgotten(model, jit):
    model = model()
    params = model.init(KEY, X)
    survey = lora.survey(model.apply, params, X)
    bound = lora.bind(
        params,
        lora.init(
            KEY,
            params,
            lora.LoRAConfig(rank=1, targets="query" if isinstance(model, Heads) else "up"),
            survey,
        ),
    )
    apply = jax.jit(model.apply) if jit else model.apply
    with fails(r"used as an array.*`apply = lora.adapt\(model.apply\)`"):
        apply(bound, X)


def test_adapt_forgotten_nnx_and_operators():
    model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    bound = lora.bind(model, lora.init(KEY, model, lora.LoRAConfig(rank=2, targets="kernel")))
    with fails("'kernel' was used as an array"):
        bound(X)
    weight = lora.bind(PARAMS, ADAPTERS)["up"]["kernel"]
    for use in (lambda w: X @ w, lambda w: w @ X.T, lambda w: w + 1, lambda w: w.T, lambda w: w[0],
                lambda w: jnp.sin(w), lambda w: np.asarray(w), lambda w: w.astype(jnp.bfloat16),
                lambda w: jnp.einsum("bd,dk", X, w)):  # fmt: skip
        with fails("'up/kernel' was used as an array"):
            use(weight)


def bound_and(f):
    return lora.adapt(f), lora.bind(PARAMS, ADAPTERS)


@pytest.mark.parametrize(("f", "match"), [
    (lambda p, x: fn(p, x) + jnp.sum(p["up"]["kernel"]), r"'up/kernel' \(8, 6\) is materialised by `reduce_sum` at .*test_errors.py:\d+"),
    (lambda p, x: x @ (p["up"]["kernel"] * jnp.eye(8, 6)) @ p["down"]["kernel"], "'up/kernel'.*`mul`"),
    (lambda p, x: x @ (p["up"]["kernel"] @ p["down"]["kernel"]), "'up/kernel'.*`dot_general`"),
    (lambda p, x: x @ p["up"]["kernel"], r"'down/kernel' \(6, 8\) is never used"),
    (lambda p, x: x @ PARAMS["up"]["kernel"] @ PARAMS["down"]["kernel"], "(?s)'down/kernel'.*never used.*'up/kernel'"),
    (lambda p, x: fn(p, x) @ jnp.sort(p["up"]["kernel"]), "sort"),
    (lambda p, x: jax.lax.scan(lambda w, _: (w * 2.0, x @ w), p["up"]["kernel"], length=2)[1] @ p["down"]["kernel"], "`scan carry`"),
    (lambda p, x: (fn(p, x), p["up"]["kernel"].T), "`output`"),
    (lambda p, x: jax.jit(lambda w: jnp.linalg.norm(w))(p["up"]["kernel"]) + fn(p, x), "'up/kernel'.*materialised"),
    (lambda p, x: opaque(x, p["up"]["kernel"]) @ p["down"]["kernel"], "'up/kernel'.*`custom_vjp_call`"),
])  # fmt: skip
def test_strict(f, match):
    adapted, bound = bound_and(f)
    with fails(match) as e:
        adapted(bound, X)
    assert "lora.adapt(fn, strict=False)" in str(e.value)
    with fails(match):
        jax.jit(adapted)(bound, X)
    with fails(match):
        jax.grad(lambda ad: jnp.sum(jax.tree.leaves(adapted(lora.bind(PARAMS, ad), X))[0]))(
            ADAPTERS
        )


@jax.custom_vjp
def opaque(x, w):
    return x @ w


opaque.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, 2 * r[0].T @ g))


def test_not_strict_is_exact_and_reported():
    def f(p, x):
        norm = jnp.sqrt(jnp.sum(p["up"]["kernel"] ** 2))
        return opaque(x, p["up"]["kernel"]) / norm

    adapters = noisy(ADAPTERS)
    bound, merged = lora.bind(PARAMS, adapters), lora.merge(PARAMS, adapters)
    got = lora.adapt(f, strict=False)(bound, X)
    np.testing.assert_allclose(got, f(merged, X), rtol=1e-5)
    coverage = lora.coverage(f, bound, X)
    assert coverage.materialised == ("up/kernel",) and coverage.unused == ("down/kernel",)
    assert {u.primitive for u in coverage.uses["up/kernel"]} == {"integer_pow", "custom_vjp_call"}
    assert "1 materialised, 1 unused" in str(coverage)
    # a custom rule keeps its own derivative (twice the true one here), through the materialised weight
    g = lambda p: jnp.sum(opaque(X, p["up"]["kernel"]))
    ours = jax.grad(lambda ad: lora.adapt(g, strict=False)(lora.bind(PARAMS, ad)))(adapters)
    dense = jax.grad(lambda ad: g(lora.merge(PARAMS, ad)))(adapters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, dense)


@pytest.mark.parametrize("through", [lambda p: p, jax.jit(lambda p: p)], ids=["", "jit"])
def test_what_a_function_returns_is_an_array(through):
    """A weight that is returned as it came is what `merge` makes; its gradient too."""
    adapters = noisy(ADAPTERS)
    f = lora.adapt(lambda p, x: (fn(p, x), through(p)))
    _, same = f(lora.bind(PARAMS, adapters), X)
    assert_close(same, lora.merge(PARAMS, adapters))
    total = lambda tree: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(tree))
    ours = jax.grad(lambda ad: total(f(lora.bind(PARAMS, ad), X)[1]))(adapters)
    assert_close(ours, jax.grad(lambda ad: total(lora.merge(PARAMS, ad)))(adapters))


def test_bound_parameters_print_whatever_tree_map_made_of_them():
    """Shapes, dtypes, shardings or nothing: no attribute of an array is there to ask for."""
    coded = lora.quant.quantize({"q": jnp.ones((64, 64))}, "q")
    bound = lora.bind({**PARAMS, **coded}, ADAPTERS)
    assert repr(bound["up"]["kernel"]).startswith("AdaptedWeight('up/kernel', shape=")
    assert repr(bound["q"]) == "Coded('q', shape=(64, 64), dtype=float32)"
    for of in (jnp.shape, lambda x: x.dtype.name, lambda x: x.sharding, lambda x: None):
        shown = repr(jax.tree.map(of, bound))
        assert "AdaptedWeight('up/kernel', base=" in shown and "Coded('q', base=" in shown


def test_abstract_arguments():
    shapes = jax.eval_shape(lambda: PARAMS)
    coverage = lora.coverage(
        fn, lora.bind(shapes, ADAPTERS), jax.ShapeDtypeStruct((3, 8), jnp.float32)
    )
    assert coverage.low_rank == ("down/kernel", "up/kernel")


# ---------------------------------------------------------------- opaque primitives


def kernel_call(x, w):
    """x·w by a Pallas kernel, interpreted: nothing can be known of its inside."""

    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x, w)


def test_pallas_kernels_get_the_materialised_weight():
    f = lambda p, x: kernel_call(x, p["up"]["kernel"]) @ p["down"]["kernel"]
    adapters = noisy(ADAPTERS)
    bound = lora.bind(PARAMS, adapters)
    with fails(r"'up/kernel' \(8, 6\) is materialised by `pallas_call`"):
        lora.adapt(f)(bound, X)
    got = lora.adapt(f, strict=False)(bound, X)
    np.testing.assert_allclose(got, f(lora.merge(PARAMS, adapters), X), rtol=1e-5)


# ---------------------------------------------------------------- what was once silent


def test_full_leaf_that_nothing_uses():
    f = lambda p, x: x @ p["up"]["kernel"]
    survey = lora.survey(f, PARAMS, X)
    config = lora.LoRAConfig(rank=2, targets="up", full="down")
    with fails(r"full: 'down/kernel' is not used by the function"):
        lora.init(KEY, PARAMS, config, survey)


def test_two_bound_trees_are_told_apart():
    """A policy and a reference of one model: the reference that is never used is named."""
    bound = lora.bind(PARAMS, ADAPTERS)
    with fails(r"'up/kernel \(tree 2\)' .* is never used"):
        lora.adapt(lambda p, q, x: fn(p, x))(bound, bound, X)
    both = lora.adapt(lambda p, q, x: fn(p, x) - fn(q, x))(bound, bound, X)
    np.testing.assert_array_equal(both, jnp.zeros_like(both))


def test_all_linear_names_kernels_that_it_cannot_adapt():
    def f(p, x):
        x = jnp.tanh(x @ (p["up"]["kernel"] / jnp.linalg.norm(p["up"]["kernel"], axis=0)))
        return x @ p["down"]["kernel"] + x.sum(-1, keepdims=True)  # no head: two ways lead out

    survey = lora.survey(f, PARAMS, X)
    with fails(r"'up/kernel' \(8, 6\) is used by no contraction"):
        lora.select(PARAMS, lora.LoRAConfig(rank=2), survey)
    config = lora.LoRAConfig(rank=2, exclude="up/kernel")
    assert list(lora.select(PARAMS, config, survey)) == ["down/kernel"]


def test_all_linear_of_a_head_alone():
    survey = lora.survey(lambda p, x: x @ p["up"]["kernel"], PARAMS, X)
    with fails("but the output head up/kernel; name it in targets"):
        lora.select(PARAMS, lora.LoRAConfig(rank=2), survey)


def test_survey_of_another_shape():
    other = {**PARAMS, "up": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
    survey = lora.survey(lambda p, x: x @ p["up"]["kernel"], other, X)
    with fails(r"'up/kernel' has shape \(8, 6\), but \(8, 4\) in the survey"):
        lora.select(PARAMS, lora.LoRAConfig(rank=2, targets="up"), survey)


def test_a_path_that_begins_another():
    params = {"k": jnp.ones((4, 4)), "k/scale": jnp.ones(4)}
    for config in (lora.LoRAConfig(rank=2, targets="k", full="scale"),):
        with fails(r"'k/scale' and another path"):
            lora.init(KEY, params, config)


def test_bound_parameters_sliced_outside_of_the_transform():
    params = {"w": jnp.ones((3, 8, 8))}
    rule = lora.Rule("w", in_axes=(1,), out_axes=(2,), batch_axes=(0,))
    adapters = lora.init(KEY, params, lora.LoRAConfig(rank=2, targets="w", rules=[rule]))
    layer = lora.adapt(lambda p, x: x @ p["w"])
    step = lambda x, p: (layer(p, x), None)
    with fails(r"'w' has 2 axes here and 3 where it was bound.*Adapt the function that holds"):
        jax.lax.scan(step, X, lora.bind(params, adapters))


# ---------------------------------------------------------------- this call, corrected

STACKED = lora.algebra.stack([ADAPTERS, ADAPTERS])
MODEL = nnx.Linear(8, 6, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("call", "match"), [
    (lambda: lora.bind(PARAMS, ADAPTERS, dropout_key=3), r"dropout_key=jax.random.key\(3\)"),
    (lambda: lora.bind({"params": PARAMS, "n": X}, ADAPTERS), r'lora.bind\(variables\["params"\], adapters\)'),
    (lambda: lora.merge(PARAMS, {"params": ADAPTERS}), r'lora.merge\(\{"params": params\}, adapters\)'),
    (lambda: lora.bind(PARAMS, STACKED), r"(?s)a stack, a \(3, 6, 2\).*lora.algebra.choose\(adapters, 0\)"),
    (lambda: lora.algebra.choose(ADAPTERS, 0), r"(?s)has no slots.*lora.algebra.stack\(\[...\]"),
    (lambda: lora.bind(PARAMS, jax.tree.map(lambda x: x[0], ADAPTERS)), "without lora.algebra.choose"),
    (lambda: lora.init(PARAMS, CONFIG, lora.survey(fn, PARAMS, X)), "the key is missing: lora.init"),
    (lambda: lora.init(PARAMS, CONFIG), r"the key is missing: lora.init\(jax.random.key\(0\), params, config\)"),
    (lambda: lora.init(KEY, PARAMS), r"found NoneType: lora.init\(key, params, lora.LoRAConfig"),
    (lambda: lora.survey(fn, PARAMS, X)["k"], r"holds them: lora.survey\(fn, params, x\)"),
    (lambda: lora.init(KEY, PARAMS, lora.survey(fn, PARAMS, X), CONFIG), r"found Survey: lora.init\(key, params, config, survey\)"),
    (lambda: lora.survey(nnx.Linear(8, 6, rngs=nnx.Rngs(0)), X), r"the module Linear: lora.survey\(lambda model, x"),
    (lambda: lora.survey(Dense(), X), r"the module Dense: lora.survey\(model.apply"),
    (lambda: lora.survey(PARAMS, X), "expected a function of parameters, found dict"),
    (lambda: lora.survey(fn, ADAPTERS, X), "expected parameters, found adapters: lora.survey"),
    (lambda: lora.survey(fn, PARAMS, X)[0], "no leaves '0'"),
    (lambda: lora.coverage(MODEL, X), r"found the module Linear: lora.coverage\(lambda model, x: model\(x\), bound, x\)"),
    (lambda: lora.coverage(PARAMS, X), r"found dict: lora.coverage\(lambda params, x: ..., bound"),
    (lambda: lora.adapt(MODEL.__call__), r"the __call__ of one Linear: lora.adapt\(lambda model, x: model\(x\)\), or lora.attach"),
    (lambda: lora.adapt(Dense()), r"the module Dense: lora.adapt\(model.apply\)"),
    (lambda: lora.adapt(fn, strict="no"), r"strict='no': expected True or False: lora.adapt\(fn, strict=True\)"),
    (lambda: lora.merge(PARAMS, ADAPTERS, donate="no"), r"donate='no': expected True or False: lora.merge\(params, adapters, donate=True\)"),
    (lambda: lora.select(CONFIG, PARAMS), r"found dict: lora.select\(params, config\)"),
    (lambda: lora.select(PARAMS, lora.survey(fn, PARAMS, X), CONFIG), r"found Survey: lora.select\(params, config, survey\)"),
    (lambda: lora.select(ADAPTERS, CONFIG), "expected parameters, found adapters: lora.select"),
    (lambda: lora.select(KEY, CONFIG), "matches no leaf; nearest: the tree is one array"),
    (lambda: lora.select(PARAMS, CONFIG)["q"], "no adapted leaf 'q'; nearest: "),
    (lambda: lora.init(KEY, Dense(), CONFIG), r"found a Linen module: params = model.init\(key, x\)\['params'\], then lora.init"),
    (lambda: lora.init(CONFIG, PARAMS, KEY), r"found PRNGKeyArray: lora.init\(key, params, config\)"),
    (lambda: lora.init(nnx.Rngs(0), PARAMS, CONFIG), r"found Rngs: lora.init\(rngs\(\), params, config\)"),
    (lambda: lora.init(KEY, PARAMS, with_(init=lambda shape: 0)), "failed with TypeError(?s:.*)it is called as init"),
    (lambda: lora.bind(PARAMS, CONFIG), "expected adapters, found a LoRAConfig"),
    (lambda: lora.bind(ADAPTERS, PARAMS), r"found adapters: lora.bind\(params, adapters\)"),
    (lambda: lora.bind(PARAMS, ADAPTERS["down"]), r'a part of this tree: lora.bind\(params\["down"\], adapters\)'),
    (lambda: lora.bind(PARAMS, [ADAPTERS, ADAPTERS]), r"holds this one: lora.bind\(params, adapters\[0\]\)"),
    (lambda: lora.merge(MODEL, {"q": ADAPTERS["up"]}), r'lora.merge\(model, adapters\["q"\]\)'),
    (lambda: lora.bind(nnx.Dict(up=MODEL), ADAPTERS["up"]), r'lora.bind\(model\["up"\], adapters\)'),
    (lambda: lora.LoRAConfig(["q", "v"]), r"rank=\['q', 'v'\](?s:.*)LoRAConfig\(rank=8, targets=\['q', 'v'\]\)"),
    (lambda: lora.LoRAConfig(use_dora=True), r"'use_dora' is lora.methods.dora\(params, adapters\) here"),
    (lambda: lora.LoRAConfig(init="pissa"), "'pissa' is lora.methods.pissa, after lora.init"),
    (lambda: lora.LoRAConfig.from_json(None), r"found 'None': lora.LoRAConfig.from_json"),
    (lambda: lora.LoRAConfig(r=4, lora_alpha=2, target_modules=["q"]), r"(?s)'r' is 'rank' here.*LoRAConfig\(rank=4, alpha=2, targets=\['q'\]\)"),
    (lambda: lora.LoRAConfig(ranc=4), "no 'ranc'; nearest: rank"),
    (lambda: lora.LoRAConfig(rules=lora.Rule("q")), r"expected a list, rules=\[Rule"),
    (lambda: lora.LoRAConfig(targets=[]), "nothing would be adapted"),
    (lambda: lora.LoRAConfig(rank=None, alpha=None, targets=None, full=5), "(?s)rank=None.*alpha=None.*targets=None.*full=5"),
    (lambda: lora.LoRAConfig(rank=True, alpha=0), "(?s)rank=True: expected an integer.*alpha=0"),
    (lambda: lora.LoRAConfig(rank="4", alpha=10**400, targets="q"), r"LoRAConfig\(rank=4, alpha=16, targets='q'\)"),
    (lambda: lora.LoRAConfig(rank=4.0), r"rank=4.0: expected an integer >= 1\nlora.LoRAConfig\(rank=4\)"),
    (lambda: lora.LoRAConfig(rank=4, dropout=1.0), r"LoRAConfig\(rank=4, dropout=0.1\)"),
    (lambda: lora.LoRAConfig(rules={"q": 2}), r"LoRAConfig\(rules=\[lora.Rule\('q', rank=2\)\]\)"),
    (lambda: lora.LoRAConfig(rules={lora.Rule("q"), lora.Rule("v")}), "rules=.*: expected a list"),
    (lambda: lora.LoRAConfig(rules=[lora.Rule("q", rank="2")]), r"rules=\[lora.Rule\(pattern='q', rank=2\)\]"),
    (lambda: lora.LoRAConfig(targets={"q": 2}), r"LoRAConfig\(targets=\['q'\]\)"),
    (lambda: lora.LoRAConfig(targets=[nnx.Linear]), "targets=.*: expected one or several patterns"),
    (lambda: lora.LoRAConfig(targets=[re.compile(b"q")]), "targets=.*: expected one or several patterns"),
    (lambda: lora.LoRAConfig(rows={"e": []}), r"rows=\{'e': \[\]\}: expected"),
    (lambda: lora.LoRAConfig(4, 8, rank=4), "multiple values for argument 'rank'"),
    (lambda: lora.LoRAConfig(dtype="float4_e2m1fn"), r"LoRAConfig\(dtype='float32'\)"),
    (lambda: lora.Rule(rank=4), "missing a required argument: 'pattern'"),
    (lambda: lora.LoRAConfig(rank_stabilized=True).scale(-1), "rank=-1: expected an integer >= 1"),
    (lambda: lora.init(jax.random.split(KEY, 2), PARAMS, CONFIG), r"found \(2,\) keys: lora.init\(keys\[0\]"),
    (lambda: lora.init(np.int64(3), PARAMS, CONFIG), r"found int64: lora.init\(jax.random.key\(3\)"),
    (lambda: lora.init(jnp.zeros(4, jnp.uint32), PARAMS, CONFIG), "wrap_key_data\\(words, impl='rbg'\\)"),
    (lambda: lora.init(KEY, PARAMS, with_(init=jax.nn.initializers.orthogonal)), r"init=jax.nn.initializers.orthogonal\(\)"),
    (lambda: lora.init(KEY, PARAMS, with_(init=lambda k, s, d: jnp.ones(s, "int32"))), "expected float32, found int32"),
    (lambda: lora.init(KEY, jax.eval_shape(lambda: PARAMS), with_(targets="down", full="up/kernel")), "(?s)shapes and no values:.*'up/kernel'.*jax.eval_shape"),
    (lambda: lora.init(KEY, PARAMS, with_(dtype="float64")), r"jax_enable_x64.*LoRAConfig\(dtype='float32'\)"),
    (lambda: lora.init(KEY, {"up": PARAMS["down"]}, lora.select(PARAMS, CONFIG)), "(?s)'down/kernel': expected .* no such leaf.*'up/kernel': expected"),
    (lambda: lora.methods.init_vera(KEY, {"w": X}, lora.select(PARAMS, CONFIG)), "found no such leaf\\nlora.methods.init_vera"),
    (lambda: lora.select(PARAMS, with_(targets=lambda path: True)), "a pattern that is a function failed at 'down/kernel': TypeError"),
    (lambda: lora.select(PARAMS, with_(exclude="kernel")), "nothing is left to train"),
    (lambda: lora.select(PARAMS, with_(full="all-linear")), "that is for `targets` alone"),
    (lambda: lora.select({}, CONFIG), "found dict without arrays: lora.select"),
    (lambda: lora.select(PARAMS, with_(rules=[lora.Rule("*"), lora.Rule("up", rank=1)])), "rule 'up' holds nowhere"),
    (lambda: lora.select(PARAMS, with_(rules=[lora.Rule("up", in_axes=(0,), out_axes=(3,))])), r"out_axes=\(3,\)"),
    (lambda: lora.select({"e": jnp.ones((4, 3)), **PARAMS}, with_(rows={"e": [1], "e*": [2]})), "two patterns name rows of 'e'"),
    (lambda: lora.optim.adalora(None, target_rank=2, steps=float("nan"), tinit=1, tfinal=1), "steps=nan: expected an integer"),
    (lambda: lora.algebra.put(STACKED, 1.5, ADAPTERS), "number 1.5: expected 0 to 1"),
])  # fmt: skip
def test_the_call_that_was_meant(call, match):
    with fails(match):
        call()


@pytest.mark.parametrize(("pattern", "meant"), [
    ("all", "'all-linear'"), ("up,down", r"\['up', 'down'\]"), (".*up", r"re.compile\('.\*up'\)"),
    ("up|down", r"\['up', 'down'\] or re.compile\('up\|down'\)"),
])  # fmt: skip
def test_patterns_that_mean_another_kind(pattern, meant):
    with fails(f"did you mean {meant}"):
        lora.select(PARAMS, lora.LoRAConfig(rank=2, targets=pattern))
