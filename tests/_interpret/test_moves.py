"""Linear maps that act on one side of a weight keep it in low rank; for the rest the error says
why."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from common import assert_close, assert_equals_dense, examples, fails, value_and_grad
from hypothesis import given
from hypothesis import strategies as st
from random_functions import outcome

import lora_jax as lora

KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "w": rand.normal(KEYS[0], (6, 5)),
    "u": rand.normal(KEYS[1], (6, 5)),
    "square": rand.normal(KEYS[2], (6, 6)),
}
X = rand.normal(KEYS[3], (7, 6))
COLUMN, ROW = jnp.arange(5.0) - 2.5, jnp.arange(6.0) - 2.5
TWICE = lambda x: jnp.concatenate([x, x], 1)
OUTSIDE = jnp.array([0, 3, 1, 5])


def filled(w):
    """Along an axis that neither factor has, with zeros for what is out of bounds."""
    return jnp.broadcast_to(w, (3, 6, 5)).at[OUTSIDE].get(mode="fill", fill_value=0)


MOVES = {
    "split": lambda p, x: [x @ w for w in jnp.split(p["w"], [2], 1)],
    "concatenated outputs": lambda p, x: x @ jnp.concatenate([p["w"], p["u"]], 1),
    "concatenated inputs": lambda p, x: TWICE(x) @ jnp.concatenate([p["w"], p["u"]], 0),
    "stacked": lambda p, x: jnp.einsum("ti,iko->kto", x, jnp.stack([p["w"], p["u"]], 1)),
    "stacked and scanned": lambda p, x: jax.lax.scan(
        lambda _, w: (0, x @ w), 0, jnp.stack([p["w"], p["u"]])
    )[1],
    "padded": lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 2)), constant_values=1.0),
    "repeated": lambda p, x: x @ jnp.repeat(p["w"], 2, 1),
    "repeated inputs": lambda p, x: jnp.repeat(x, 2, 1) @ jnp.repeat(p["w"], 2, 0),
    "tiled": lambda p, x: x @ jnp.tile(p["w"], (1, 3)),
    "scaled columns": lambda p, x: x @ (p["w"] * COLUMN),
    "scaled rows": lambda p, x: x @ (p["w"] / ROW[:, None]),
    "masked columns": lambda p, x: x @ jnp.where(COLUMN > 0, p["w"], 0),
    "a constant added": lambda p, x: x @ (p["w"] + jnp.eye(6, 5)),
    "a leaf added": lambda p, x: x @ (p["w"] - p["u"]),
    "symmetric": lambda p, x: x @ ((p["square"] + p["square"].T) / 2),
    "centred": lambda p, x: x @ (p["w"] - p["w"].mean(0)),
    "a choice": lambda p, x: x @ jax.lax.select(jnp.sum(x) > 0, p["w"], p["u"]),
    "vmap of cond": lambda p, x: jax.vmap(
        lambda x: jax.lax.cond(x[0] > 0, lambda x: x @ p["w"], lambda x: x @ p["u"], x)
    )(x),
    "filled": lambda p, x: jnp.einsum("ti,kio->kto", x, filled(p["w"])),
    "padded with its edge": lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 1)), mode="edge"),
    "stacked and joined": lambda p, x: x @ jnp.stack([p["w"], p["u"]], 1).reshape(6, 10),
    "stacked and averaged": lambda p, x: x @ jnp.stack([p["w"], p["u"]]).mean(0),
    "block diagonal": lambda p, x: TWICE(x) @ jnp.kron(jnp.eye(2), p["w"]),
    "a kernel of several": lambda p, x: conv(jnp.stack([p["w"], p["u"]]), x[None]),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves_on_one_side_are_low_rank(name):
    fn = MOVES[name]
    kinds = {u: leaf.kind for u, leaf in lora.survey(fn, PARAMS, X).leaves.items()}
    used = [u for u, kind in kinds.items() if kind in ("linear", "conv")]
    assert used
    params = {u: PARAMS[u] for u in used}
    assert_equals_dense(fn, params, X, targets=used)


FILLED = {
    "product": lambda w, x: x[:, : w.shape[0]] @ w,
    "rows": lambda w, x: jnp.tanh(w[IDS]),
    "elements": lambda w, x: x[0, 0] * w.at[OUTSIDE, IDS].get(mode="fill", fill_value=2.0),
}


@pytest.mark.parametrize("units", [0, 1])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("use", FILLED)
def test_what_is_out_of_bounds_has_no_gain(use, axis, units):
    """DoRA, with units along the axis that is filled, or along the other one."""
    w = PARAMS["w"]
    taken = lambda w: jnp.take(w, OUTSIDE + 1, axis, mode="fill", fill_value=1.0)
    fn = lambda p: FILLED[use](taken(p["w"]), X)
    geometry = lora.Geometry((1 - units,), (units,))
    a, b = (rand.normal(k, s) for k, s in zip(KEYS, geometry.factor_shapes(w.shape, 2)))
    node = lora.LoRA(a, b, 0.5, geometry).with_magnitude(jnp.arange(1.0, 1 + w.shape[units]))
    want = fn(lora.merge({"w": w}, {"w": node}))
    assert_close(lora.adapt(fn)(lora.bind({"w": w}, {"w": node})), want)


@pytest.mark.parametrize("units", [0, 1])
def test_what_is_out_of_bounds_has_no_gradient(units):
    """Rows that are filled with NaN, and replaced: DoRA's gradient is that of the rest."""
    geometry = lora.Geometry((1 - units,), (units,))
    a, b = (rand.normal(k, s) for k, s in zip(KEYS, geometry.factor_shapes((6, 5), 2)))
    node = lora.LoRA(a, b, 0.5, geometry).with_magnitude(jnp.arange(1.0, 1 + (6, 5)[units]))
    params = {"w": PARAMS["w"]}

    def fn(p):
        rows = jnp.take(p["w"], OUTSIDE + 1, axis=0)
        return jnp.where((OUTSIDE < 5)[:, None], rows, 0)

    got = value_and_grad(lambda ad: lora.adapt(fn)(lora.bind(params, ad)))({"w": node})
    want = value_and_grad(lambda ad: fn(lora.merge(params, ad)))({"w": node})
    assert_close(got, want, factor=256)


STACKS = {
    "unstacked": lambda w, x: [x @ part for part in jnp.unstack(w[:, 0])],
    "summed": lambda w, x: x @ w[:, 0].sum(0),
    "mixed": lambda w, x: x @ (jax.nn.softmax(x[0, :3])[:, None, None] * w[:, 0]).sum(0),
    "side by side": lambda w, x: x @ w[:, 0].transpose(1, 0, 2).reshape(6, 15),
    "one below the other": lambda w, x: jnp.tile(x, 3) @ w[:, 0].reshape(18, 5),
    "vmapped kernels": lambda w, x: jax.vmap(lambda w: conv(w, x[None]))(w),
    "vmapped kernels and inputs": lambda w, x: jax.vmap(lambda w, x: conv(w, x[None, None]))(
        w, x[:3]
    ),
}


@pytest.mark.parametrize("geometry", [((1, 2), (3,), (0,)), ((1, 2), (0, 3)), ((0, 1, 2), (3,))])
@pytest.mark.parametrize("name", STACKS)
def test_a_stack_of_weights_made_one(name, geometry):
    """Its axis in both factors, or in one of them."""
    geometry = lora.Geometry(*geometry)
    params = {"w": rand.normal(KEYS[0], (3, 2, 6, 5))}
    a, b = (rand.normal(k, s) for k, s in zip(KEYS, geometry.factor_shapes((3, 2, 6, 5), 2)))
    adapters = {"w": lora.LoRA(a, b, 0.5, geometry)}
    fn = lambda p: STACKS[name](p["w"], X)
    run = value_and_grad(lambda ad: lora.adapt(fn)(lora.bind(params, ad)))
    try:
        got = run(adapters)
    except (
        lora.LoRAError
    ) as e:  # the axis is in one factor, and what it is joined with in the other
        assert not geometry.batch_axes and re.search(
            "joins an axis|summed along the axes of b|all axes", str(e)
        )
        return
    assert_close(got, value_and_grad(lambda ad: fn(lora.merge(params, ad)))(adapters), factor=256)


STOP = jax.lax.stop_gradient
IDS = jnp.array([1, 3, 3, 0])
INSIDE = {
    "jit": lambda f, w: jax.jit(f)(w),
    "jit that moves it": lambda f, w: jax.jit(lambda w: jax.jit(jnp.transpose)(f(w).T))(w),
    "checkpoint": lambda f, w: jax.checkpoint(f)(w),
    "scan": lambda f, w: jax.lax.scan(lambda c, _: (c + f(w), None), 0 * f(w), None, 2)[0],
    "scan of a stack": lambda f, w: jax.lax.map(f, jnp.stack([w, 2 * w])),
    "cond": lambda f, w: jax.lax.cond(jnp.sum(X) < 1e9, f, lambda w: 0 * f(w), w),
}
STOPPED = {
    "a target network": lambda p, x: (x @ p["w"], x @ STOP(p["w"])),
    "a target network in a jit": lambda p, x: (x @ p["w"], jax.jit(jnp.dot)(x, STOP(p["w"].T).T)),
    "one half": lambda p, x: (x @ STOP(p["w"][:, :2]), x @ p["w"][:, 2:]),
    "straight through": lambda p, x: x @ (p["w"] + STOP(3 * p["w"] - p["w"])),
    "rows": lambda p, x: p["w"][IDS] + 2 * STOP(p["w"][IDS]),
    "rows alone": lambda p, x: STOP(p["w"][IDS]) + x[:4] @ p["u"],
    **{
        f"inside of a {name}": lambda p, x, run=run: (
            x @ p["w"],
            run(lambda w: x @ STOP(w), p["w"]),
        )
        for name, run in INSIDE.items()
    },
}


@pytest.mark.parametrize("name", STOPPED)
def test_what_is_stopped_is_a_constant(name):
    params = {k: PARAMS[k] for k in ("wu" if "alone" in name else "w")}
    assert_equals_dense(STOPPED[name], params, X, targets=list(params))


def test_rounded_straight_through():
    """As quantisation-aware training does; the sum itself, for the rounding."""
    fn = lambda p, x: x @ (p["w"] + STOP(jnp.round(8 * p["w"]) / 8 - p["w"]))
    geometry = lora.Geometry((0,), (1,))
    adapters = {"w": lora.LoRA(jnp.ones((6, 2)), jnp.ones((2, 5)), 0.5, geometry)}
    params = {"w": PARAMS["w"]}
    got = value_and_grad(lambda ad: lora.adapt(fn, strict=False)(lora.bind(params, ad), X))
    want = value_and_grad(lambda ad: fn(lora.merge(params, ad), X))
    assert_close(got(adapters), want(adapters), factor=256)


@pytest.mark.parametrize("run", [None, "jit", "checkpoint", "scan", "cond"])
def test_the_base_is_stopped_and_the_adapter_trains(run):
    run = INSIDE.get(run, lambda f, w: f(w.T.T))
    fn = lambda p, x: run(lambda w: x @ STOP(w), p["w"])
    plain = lambda p, x: run(lambda w: x @ w, p["w"])
    params = {"w": PARAMS["w"]}
    adapters = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets="w"))
    loss = lambda fn: lambda ad: jnp.sum(lora.adapt(fn)(lora.bind(params, ad), X) ** 2)
    got, want = (jax.grad(loss(f))(adapters)["w"] for f in (fn, plain))
    assert_close(got, want)
    assert jnp.abs(got.b).max() > 0


OWN_JVP, OWN_VJP = jax.custom_jvp(lambda w: 2 * w), jax.custom_vjp(lambda w: 2 * w)
OWN_JVP.defjvp(lambda p, t: (2 * p[0], 2 * t[0]))
OWN_VJP.defvjp(lambda w: (2 * w, ()), lambda _, d: (2 * d,))

REFUSED = {
    "mul.*scaled along the axes of both factors": lambda w: w * X[:6, :5],
    "mul.*a product of two weights": lambda w: w * w,
    "add.*an array that inputs enter": lambda w: w + X[:6, :5],
    "reduce_sum.*summed along the axes of both": lambda w: w - w.sum(),
    "custom_jvp_call.*a derivative rule of its own": lambda w: OWN_JVP(w),
    "custom_vjp_call.*a derivative rule of its own": lambda w: OWN_VJP(w),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_the_error_says_why(reason):
    params = {"w": PARAMS["w"]}
    known = lora.Survey({"w": lora.survey(lambda p, x: x @ p["w"], params, X)["w"]})
    adapters = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets="w"), known)
    fn = lambda p, x, other: other @ REFUSED[reason](p["w"])
    if "inputs" in reason:
        fn = lambda p, x, other: other @ (p["w"] + x[:6, :5])
    with fails(f"'w' .* is materialised by `{reason}"):
        lora.adapt(fn)(lora.bind(params, adapters), X, X)


LOOK_UPS = {
    "vmapped": lambda p, ids: jax.vmap(lambda i: p["e"][i])(ids),
    "scanned": lambda p, ids: jax.lax.scan(lambda c, i: (c, p["e"][i]), 0, ids)[1],
    "one": lambda p, ids: jnp.tanh(p["e"][ids[0]]),
    "convolved": lambda p, ids: jax.lax.conv_general_dilated(
        p["e"][ids[None]], jnp.ones((3, 5, 2)), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOK_UPS)
def test_look_ups(name):
    fn, params = LOOK_UPS[name], {"e": PARAMS["w"]}
    ids = jnp.array([1, 3, 3, 0])
    leaf = lora.survey(fn, params, ids)["e"]
    assert (leaf.kind, leaf.geometry) == ("embedding", lora.Geometry((0,), (1,)))
    assert_equals_dense(fn, params, ids, targets="e")


def test_trained_rows_come_out_as_they_are():
    """Not as W + (v − W), of which large W would leave little."""
    table = jnp.full((8, 4), 1e3)
    rows = 1e-3 * rand.normal(KEYS[0], (2, 4))
    ad = {"e": lora.Rows(rows, (2, 5), 8)}
    run = lora.adapt(lambda p, ids: p["e"][ids])
    got = run(lora.bind({"e": table}, ad), jnp.array([5, 1, 2]))
    np.testing.assert_array_equal(got, jnp.stack([rows[1], table[1], rows[0]]))
    grads = jax.grad(lambda ad: jnp.sum(run(lora.bind({"e": table}, ad), jnp.array([5, 5]))))(ad)
    np.testing.assert_array_equal(grads["e"].value, jnp.array([[0.0] * 4, [2.0] * 4]))


TABLES = {
    "one below the other": lambda p: jnp.concatenate([p["e"], p["e2"]]),
    "padded": lambda p: jnp.pad(p["e"], ((0, 4), (0, 0))),
    "with others below": lambda p: jnp.concatenate([p["e"], jnp.ones((4, 4))]),
    "beside others": lambda p: jnp.pad(p["e"], ((0, 4), (0, 3)), constant_values=1e3),
    "beside an array": lambda p: jnp.concatenate([p["e"], jnp.ones((8, 3))], 1),
    "beside itself": lambda p: jnp.concatenate([p["e"], p["e"][::-1]], 1),
}


@pytest.mark.parametrize("name", TABLES)
def test_trained_rows_of_joined_tables(name):
    rows = 1e-3 * rand.normal(KEYS[0], (3, 4))
    params = {"e": jnp.full((8, 4), 1e3), "e2": jnp.full((4, 4), 1e3)}
    ad = {"e": lora.Rows(rows[:2], (2, 5), 8), "e2": lora.Rows(rows[2:], (1,), 4)}
    ad = ad if "one" in name else {"e": ad["e"]}
    fn = lambda p, ids: TABLES[name](p)[ids]
    ids = jnp.arange(TABLES[name](params).shape[0])
    got = lora.adapt(fn)(lora.bind(params, ad), ids)
    want = fn(lora.merge(params, ad), ids)
    if "beside" in name:  # W + (v − W) there
        np.testing.assert_allclose(got, want, atol=1e-3)
    else:
        np.testing.assert_array_equal(got, want)


@examples(12)
@given(st.integers(0, 2**31))
def test_random_functions(seed):
    what, said = outcome(seed)
    assert what in ("right", "refused", "invalid"), said


@pytest.mark.parametrize("alphas", [(3.0, 3.0), (3.0, 5.0)], ids=["one scale", "two"])
def test_joined_weights_of_one_scale_keep_it(alphas):
    """Else each A is multiplied by its own, as an equation before the product."""
    fn = lambda p, x: x @ jnp.concatenate([p["w"], p["u"]], 1)
    p = {k: PARAMS[k] for k in "wu"}
    ad = {}
    for name, alpha in zip("wu", alphas):
        config = lora.LoRAConfig(rank=1, alpha=alpha, targets=name)
        node = lora.init(jax.random.key(1), p, config, lora.survey(fn, p, X))[name]
        ad[name] = lora.LoRA(node.a, node.b + 1.0, node.scale, node.geometry)
    ours = lambda ad: lora.adapt(fn)(lora.bind(p, ad), X)
    assert_close(ours(ad), fn(lora.merge(p, ad), X))
    found = [e.primitive.name for e in jax.make_jaxpr(ours)(ad).eqns]
    assert found.count("mul") == (0 if alphas[0] == alphas[1] else 2)


def test_a_scale_of_many_steps():
    """A value that is an operand twice is followed once: 400 times c = c + c is no 2⁴⁰⁰ steps, and
    no recursion of that depth."""

    def fn(p, x):
        c = p["c"]
        for _ in range(400):
            c = c + c
        return x @ (p["w"] * c)

    config = lora.LoRAConfig(rank=2, targets="w")
    adapters = lora.init(KEYS[0], {"w": PARAMS["w"]}, config)
    bound = lora.bind({"w": PARAMS["w"], "c": COLUMN}, adapters)
    assert lora.coverage(fn, bound, X).low_rank == ("w",)


def conv(p, x):
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x, p, (1,), "SAME", dimension_numbers=numbers)


WITHOUT_ELEMENTS = {
    "outputs": lambda p, x: x @ p["w"][:, :0],
    "inputs": lambda p, x: x[:, :0] @ p["w"][:0],
    "tokens": lambda p, x: x[:0] @ p["w"],
    "a part": lambda p, x: [x @ w for w in jnp.split(p["w"], [0, 2], 1)],
    "joined": lambda p, x: x @ jnp.concatenate([p["w"][:, :0], p["w"]], 1),
    "padded": lambda p, x: x @ jnp.pad(p["w"][:, :0], ((0, 0), (1, 2))),
    "scaled": lambda p, x: x @ (p["w"][:, :0] * jnp.ones(0)),
    "a batch": lambda p, x: jnp.einsum("ti,gio->gto", x, jnp.broadcast_to(p["w"], (0, 6, 5))),
    "a kernel": lambda p, x: conv(p["w"][None, :, :0], x[None]),
    "no window": lambda p, x: conv(p["w"][None], x[None, :0]),
}


@pytest.mark.parametrize("name", WITHOUT_ELEMENTS)
def test_without_elements(name):
    fn, params = WITHOUT_ELEMENTS[name], {"w": PARAMS["w"]}
    a, b = jnp.ones((6, 2)), jnp.ones((2, 5))
    adapters = {"w": lora.LoRA(a, b, 0.5, lora.Geometry((0,), (1,)))}
    value = lambda f, of: (
        lambda ad: sum(jax.tree.leaves(jax.tree.map(jnp.sum, f(of(params, ad), X))))
    )
    want = jax.grad(value(fn, lora.merge))(adapters)["w"]
    got = jax.grad(value(lora.adapt(fn), lora.bind))(adapters)["w"]
    np.testing.assert_allclose(got.a, want.a, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.b, want.b, rtol=1e-4, atol=1e-4)
    assert lora.survey(fn, params, X)["w"].kind in ("linear", "conv")


def test_a_leaf_without_elements_is_left_out():
    params = {"none": jnp.zeros((0, 5)), "w": PARAMS["w"], "head": jnp.ones((5, 2))}
    fn = lambda p, x: (x @ p["w"] + x[:, :0] @ p["none"]) @ p["head"]
    survey = lora.survey(fn, params, X)
    targets = lora.select(params, lora.LoRAConfig(rank=2), survey)
    assert [*targets] == ["w"] and targets.left["none"] == "without elements"
    with fails(r"'none' \(0, 5\) has no elements: exclude=\['none'\]"):
        lora.select(params, lora.LoRAConfig(rank=2, targets=["none", "w"]), survey)
