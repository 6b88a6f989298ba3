"""factored = dense, over every way a weight can be used and every transformation."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from common import adapted, assert_close, assert_equals_dense
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lora

K = jax.random.key(3)


def normal(i, *shape):
    return rand.normal(jax.random.fold_in(K, i), shape) / 2


X = normal(0, 2, 5, 6)  # (batch, time, features)
W = normal(1, 6, 6)
STACK = normal(2, 3, 6, 6)
IDS = jnp.array([[0, 3, 1], [2, 2, 5]])


@jax.custom_vjp
def odd_gradient(x):
    return x


odd_gradient.defvjp(lambda x: (x, None), lambda _, g: (3.0 * g,))


@jax.custom_jvp
def odd_tangent(x):
    return jnp.sin(x)


odd_tangent.defjvp(lambda p, t: (jnp.sin(p[0]), 2.0 * t[0]))


def while_loop(p, x):
    return lax.while_loop(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])), (0, x)
    )[1]


def carried(p, x):  # the weight rides along in the carry
    def body(carry, _):
        w, x = carry
        return (w, jnp.tanh(x @ w)), None

    return lax.scan(body, (p["w"], x), length=3)[0][1]


def returned_by_scan(p, x):
    y, ws = lax.scan(lambda c, w: (jnp.tanh(c @ w), w), x, p["w"])
    return y @ ws[1]


def moe(p, x):
    x = x.reshape(10, 6)
    return lax.ragged_dot(x, p["w"], jnp.array([2, 5, 3]))


def picked(p, x):  # each example has its own expert
    return jnp.einsum("btd,bdk->btk", x, p["w"][jnp.array([2, 0])])


def concatenated_scan(p, x):
    def layer(x, w):
        return jnp.tanh(x @ w), jnp.sum(x)

    return lax.scan(jax.checkpoint(layer), x, p["w"], reverse=True, unroll=2)


# name -> (function of (params, x), the weight, x)
USES = {
    "matmul": (lambda p, x: x @ p["w"], W, X),
    "weight on the left": (lambda p, x: jnp.einsum("dk,btd->kbt", p["w"], x), W, X),
    "transposed": (lambda p, x: x @ p["w"].T, W, X),
    "vector": (lambda p, x: x @ p["w"], W, normal(4, 6)),
    "einsum to heads": (lambda p, x: jnp.einsum("btd,dhk->bhtk", x, p["w"]), normal(5, 6, 2, 4), X),
    "einsum from heads": (
        lambda p, x: jnp.einsum("bthk,hkd->btd", x.reshape(2, 5, 2, 3), p["w"]), normal(6, 2, 3, 6), X),
    "per head": (
        lambda p, x: jnp.einsum("bthk,hkd->bthd", x.reshape(2, 5, 2, 3), p["w"]), normal(7, 2, 3, 4), X),
    "experts": (lambda p, x: jnp.einsum("etd,edk->etk", x[:, None][[0, 1, 0], 0], p["w"]), STACK, X),
    "every expert": (lambda p, x: jnp.einsum("btd,edk->btek", x, p["w"]), STACK, X),
    "ragged experts": (moe, STACK, X),
    "picked experts": (picked, STACK, X),
    "reshaped": (lambda p, x: x @ p["w"].reshape(6, 8), normal(8, 6, 2, 4), X),
    "split": (lambda p, x: jnp.einsum("btd,dhk->bthk", x, p["w"].reshape(6, 2, 4)), normal(9, 6, 8), X),
    "split and transposed": (
        lambda p, x: jnp.einsum("btd,hdk->bthk", x, p["w"].reshape(6, 2, 4).transpose(1, 0, 2)),
        normal(9, 6, 8), X),
    "squeezed": (lambda p, x: x @ p["w"][0], normal(10, 1, 6, 4), X),
    "broadcast": (
        lambda p, x: jnp.einsum("btd,bdk->btk", x, jnp.broadcast_to(p["w"], (2, 6, 6))), W, X),
    "sliced columns": (lambda p, x: (x @ p["w"][:, :2], x @ p["w"][:, 2:]), W, X),
    "sliced rows": (lambda p, x: x[..., :4] @ p["w"][2:], W, X),
    "concatenated columns": (
        lambda p, x: x @ jnp.concatenate([p["w"], jnp.ones((6, 2)), p["w"] * 2.0], axis=1), W, X),
    "concatenated rows": (
        lambda p, x: jnp.concatenate([x, x], -1) @ jnp.concatenate([p["w"], p["w"].T.T]), W, X),
    "concatenated in a jit": (
        lambda p, x: x @ jax.jit(lambda a, b: jnp.concatenate([a, b]))(p["w"][:2], p["w"][2:]), W, X),
    "permuted rows": (lambda p, x: x @ p["w"][jnp.array([2, 0, 1, 5, 4, 3])], W, X),
    "permuted columns": (lambda p, x: x @ p["w"][:, jnp.array([2, 0, 1, 5, 4, 3])], W, X),
    "reversed": (lambda p, x: x @ p["w"][::-1], W, X),
    "one of a stack": (lambda p, x: x @ p["w"][1] @ p["w"][2], STACK, X),
    "dynamically one of a stack": (
        lambda p, x: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), x), STACK, X),
    "scaled": (lambda p, x: x @ (-p["w"] * 0.5 / 3.0), W, X),
    "cast": (lambda p, x: x.astype(jnp.float32) @ p["w"].astype(jnp.float32), W, X),
    "used twice": (lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, W, X),
    "barrier": (lambda p, x: x @ lax.optimization_barrier((p["w"], x))[0], W, X),
    "look-up": (lambda p, ids: jnp.take(p["w"], ids, axis=0), W, IDS),
    "indexed look-up": (lambda p, ids: p["w"][ids] * 2.0, W, IDS),
    "look-up and head": (lambda p, ids: jnp.tanh(p["w"][ids]) @ p["w"].T, W, IDS),
    "look-up in a stack": (lambda p, ids: p["w"][1][ids], STACK, IDS),
    "look-up of heads": (lambda p, ids: p["w"][ids] + 1.0, normal(11, 6, 2, 3), IDS),
    "look-up clipped": (lambda p, ids: jnp.take(p["w"], ids + 3, axis=0, mode="clip"), W, IDS),
    "conv 1d": (
        lambda p, x: lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")),
        normal(12, 3, 6, 4), X),
    "conv 2d dilated": (
        lambda p, x: lax.conv_general_dilated(
            x.reshape(2, 5, 2, 3), p["w"], (2, 1), "SAME", rhs_dilation=(1, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC")), normal(13, 3, 2, 3, 4), X),
    "conv 2d of torch's layout": (
        lambda p, x: lax.conv_general_dilated(x.reshape(2, 3, 5, 2), p["w"], (1, 1), "VALID"),
        normal(14, 4, 3, 2, 2), X),
    "conv 3d": (
        lambda p, x: lax.conv_general_dilated(
            x.reshape(2, 5, 2, 3, 1), p["w"], (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")),
        normal(15, 2, 2, 3, 1, 4), X),
    "conv grouped": (
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2),
        normal(16, 3, 3, 4), X),
    "conv depthwise": (
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=6),
        normal(17, 3, 1, 12), X),
    "conv grouped, features first": (
        lambda p, x: lax.conv_general_dilated(
            x.transpose(2, 0, 1), p["w"], (1,), "SAME", dimension_numbers=("CNW", "OIW", "WCN"), feature_group_count=2),
        normal(16, 4, 3, 3), X),
    "conv transposed": (
        lambda p, x: lax.conv_transpose(x, p["w"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")),
        normal(18, 3, 6, 4), X),
    "jit": (lambda p, x: jax.jit(jnp.matmul)(x, p["w"]), W, X),
    "jit called twice": (lambda p, x: (f := jax.jit(lambda x, w: jnp.tanh(x @ w)))(f(x, p["w"]), p["w"]), W, X),
    "jit that moves": (lambda p, x: x @ jax.jit(lambda w: w.T)(p["w"]), W, X),
    "remat": (
        lambda p, x: jax.checkpoint(
            lambda x, w: jnp.tanh(x @ w), policy=jax.checkpoint_policies.dots_saveable)(x, p["w"]), W, X),
    "scan": (lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0], STACK, X),
    "scan, remat, reverse, unroll": (concatenated_scan, STACK, X),
    "scan over a constant": (
        lambda p, x: lax.scan(lambda c, _: (jnp.tanh(c @ p["w"]), None), x, length=3)[0], W, X),
    "scan that carries": (carried, W, X),
    "scan that returns": (returned_by_scan, STACK, X),
    "fori": (lambda p, x: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"]), x), W, X),
    "cond": (lambda p, x: lax.cond(x[0, 0, 0] < 9, lambda x: x @ p["w"], lambda x: x @ p["w"].T, x), W, X),
    "switch": (
        lambda p, x: lax.switch(jnp.int32(x[0, 0, 0] < 9) + 1, [lambda x: x, lambda x: -x, lambda x: x @ p["w"]], x),
        W, X),
    "vmap": (lambda p, x: jax.vmap(lambda x: x @ p["w"])(x), W, X),
    "vmap over weights": (lambda p, x: jax.vmap(jnp.matmul, (None, 0))(x, p["w"]), STACK, X),
    "custom_vjp beside": (lambda p, x: odd_gradient(x @ p["w"]) * 2.0, W, X),
    "custom_jvp beside": (lambda p, x: odd_tangent(x @ p["w"]), W, X),
    "inner gradient": (
        lambda p, x: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"])))(x), W, X),
}  # fmt: skip


# A plan is of dot_general alone; these differ in what comes before it.
PLANNED = {
    "matmul", "transposed", "einsum to heads", "einsum from heads", "weight on the left", "experts",
    "picked experts", "used twice", "concatenated columns", "scan", "remat", "vmap over weights",
}  # fmt: skip


@pytest.mark.parametrize(
    "name, plan",
    [(name, "auto") for name in sorted(USES)]
    + [
        pytest.param(name, plan, marks=() if name in PLANNED else pytest.mark.slow)
        for plan in ("factored", "merged", "beside")
        for name in sorted(USES)
    ],
)
def test_use_is_low_rank_and_equals_dense(name, plan):
    fn, w, x = USES[name]
    assert_equals_dense(fn, {"w": w}, x, targets="w", plan=plan)


@pytest.mark.parametrize("name", ["matmul", "scan", "remat", "cond", "jit", "conv 1d", "look-up"])
def test_eager_equals_jit(name):
    fn, w, x = USES[name]
    f, adapters = adapted(fn, {"w": w}, x, targets="w")
    bound = lora.bind({"w": w}, adapters)
    assert_close(f(bound, x), jax.jit(f)(bound, x))


def test_while_loop_equals_dense():
    f, adapters = adapted(while_loop, {"w": W}, X, targets="w")
    got = f(lora.bind({"w": W}, adapters), X)
    assert_close(got, while_loop(lora.merge({"w": W}, adapters), X))


@pytest.mark.parametrize(
    "name", ["matmul", "scan", "remat", "experts", "look-up and head", "conv 2d dilated"]
)
def test_initially_equal_to_the_bit(name):
    fn, w, x = USES[name]
    survey = lora.survey(fn, {"w": w}, x)
    adapters = lora.init(jax.random.key(1), {"w": w}, lora.LoRAConfig(rank=2, targets="w"), survey)
    bound = lora.bind({"w": w}, adapters)
    np.testing.assert_array_equal(lora.adapt(fn)(bound, x), fn({"w": w}, x))


def mlp(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


def gated(p, x):
    """Two products of one input, and one of their result."""
    return (jnp.tanh(x @ p["w"]) * (x @ p["u"])) @ p["v"]


GATED = {"u": normal(21, 6, 8), "v": normal(20, 8, 4), "w": normal(22, 6, 8)}


@pytest.fixture(params=["factored", "merged", "beside"])
def both(request):
    """(adapters, the adapted function of adapters, the dense one), for transformations."""
    f, adapters = adapted(gated, GATED, X, targets=["u", "v", "w"], plan=request.param)

    def ours(ad, x=X):
        return f(lora.bind(GATED, ad), x)

    def dense(ad, x=X):
        return gated(lora.merge(GATED, ad), x)

    return adapters, ours, dense


def scalar(f):
    return lambda ad: jnp.sum(jnp.sin(f(ad)))


def hvp(f):
    return lambda ad: jax.jvp(jax.grad(scalar(f)), (ad,), (ad,))[1]


TRANSFORMS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "grad": lambda f: jax.grad(scalar(f)),
    "jit of grad": lambda f: jax.jit(jax.grad(scalar(f))),
    "grad of jit": lambda f: jax.grad(scalar(jax.jit(f))),
    "value_and_grad": lambda f: jax.value_and_grad(scalar(f)),
    "jvp": lambda f: lambda ad: jax.jvp(f, (ad,), (ad,)),
    "linearize": lambda f: lambda ad: jax.linearize(f, ad)[1](ad),
    "jacfwd": lambda f: jax.jacfwd(scalar(f)),
    "hessian-vector product": hvp,
    "vmap over x": lambda f: lambda ad: jax.vmap(lambda x: f(ad, x))(X),
    "vmap over adapters": lambda f: lambda ad: jax.vmap(f)(jax.tree.map(lambda v: jnp.stack([v, 2 * v]), ad)),
    "scan over steps": lambda f: lambda ad: lax.scan(
        lambda ad, x: (jax.tree.map(lambda a, g: a - 0.01 * g, ad, jax.grad(scalar(f))(ad)), jnp.sum(x)),
        ad, X)[0],
    "checkpoint": lambda f: jax.grad(scalar(jax.checkpoint(f))),
    "while": lambda f: lambda ad: lax.while_loop(
        lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] + f(ad)), (0, f(ad)))[1],
    "cond": lambda f: lambda ad: lax.cond(jnp.sum(X) < 1e9, lambda a: f(a), lambda a: 0 * f(a), ad),
    "pmap": lambda f: lambda ad: jax.pmap(f, in_axes=(None, 0))(ad, X),
    "ahead of time": lambda f: lambda ad: jax.jit(f).lower(ad).compile()(ad),
    "export": lambda f: lambda ad: _exported(f, ad),
}  # fmt: skip


def _exported(f, adapters):
    leaves, treedef = jax.tree.flatten(adapters)
    exp = jax.export.export(jax.jit(lambda *xs: f(jax.tree.unflatten(treedef, xs))))(*leaves)
    return jax.export.deserialize(exp.serialize()).call(*leaves)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformations_compose(name, both):
    adapters, ours, dense = both
    transform = TRANSFORMS[name]
    assert_close(transform(ours)(adapters), transform(dense)(adapters), factor=256)


def mesh(*shape, names=("d",)):
    return jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


@pytest.mark.parametrize("inside", [False, True])
def test_shard_map(inside, both):
    adapters, ours, dense = both
    P = PartitionSpec
    data = mesh(2)
    if inside:  # the model itself maps over devices, with its weight sharded along the input
        fn = jax.shard_map(
            lambda p, x: lax.psum(x @ p["w"], "d"),
            mesh=data,
            in_specs=({"w": P("d", None)}, P(None, None, "d")),
            out_specs=P(),
        )
        assert_equals_dense(fn, {"w": W}, X, targets="w")
        return
    mapped = jax.shard_map(ours, mesh=data, in_specs=(P(), P("d")), out_specs=P("d"))
    assert_close(mapped(adapters, X), dense(adapters))
    grads = jax.grad(lambda ad: jnp.sum(jnp.sin(mapped(ad, X))))(adapters)
    assert_close(grads, jax.grad(scalar(dense))(adapters), factor=256)


def test_gathered_inside_shard_map():
    """Fully sharded data parallelism by hand: the weight is gathered where it is used."""
    P = PartitionSpec
    fn = jax.shard_map(
        lambda p, x: x @ lax.all_gather(p["w"], "d", axis=0, tiled=True),
        mesh=mesh(2),
        in_specs=({"w": P("d", None)}, P("d")),
        out_specs=P("d"),
    )
    assert_equals_dense(fn, {"w": W}, X, targets="w")


def test_sharding_constraint_is_kept():
    rows = NamedSharding(mesh(2), PartitionSpec("d", None))
    fn = lambda p, x: x @ lax.with_sharding_constraint(p["w"], rows)
    f, adapters = assert_equals_dense(fn, {"w": W}, X, targets="w")
    jaxpr = str(jax.make_jaxpr(lambda ad: f(lora.bind({"w": W}, ad), X))(adapters))
    assert jaxpr.count("sharding_constraint") == 3  # the base, A and B


def test_inner_jit_keeps_name_and_sharding():
    rows = NamedSharding(mesh(2), PartitionSpec("d", None))

    @functools.partial(jax.jit, in_shardings=(rows, None), keep_unused=True)
    def projection(w, x):
        return x @ w

    fn = lambda p, x: projection(p["w"], x)
    f, adapters = assert_equals_dense(fn, {"w": W}, X, targets="w")
    jaxpr = jax.make_jaxpr(lambda ad: f(lora.bind({"w": W}, ad), X))(adapters)
    (eqn,) = [e for e in jaxpr.eqns if e.primitive.name in ("jit", "pjit")]
    assert eqn.params["name"] == "projection" and eqn.params["keep_unused"]
    specs = [s.spec for s in eqn.params["in_shardings"] if isinstance(s, NamedSharding)]
    assert specs == [PartitionSpec("d", None), PartitionSpec("d", None), PartitionSpec(None, None)]


def test_inner_jit_is_lowered_once():
    @jax.jit
    def layer(x, w):
        return jnp.tanh(x @ w)

    params = {str(i): w for i, w in enumerate(STACK)}
    fn = lambda p, x: functools.reduce(layer, [p[k] for k in sorted(p)], x)
    f, adapters = assert_equals_dense(fn, params, X, targets=["0", "1", "2"])
    text = jax.jit(lambda ad: f(lora.bind(params, ad), X)).lower(adapters).as_text()
    assert len(re.findall(r"func.func private @layer", text)) == 1


def test_remat_policy_is_kept():
    policy = jax.checkpoint_policies.save_only_these_names("kept")

    def fn(p, x):
        body = lambda x, w: jnp.sin(checkpoint_name(jnp.sin(x @ w), "kept"))
        return jax.checkpoint(body, policy=policy, prevent_cse=False)(x, p["w"])

    f, adapters = assert_equals_dense(fn, {"w": W}, X, targets="w")
    jaxpr = jax.make_jaxpr(lambda ad: f(lora.bind({"w": W}, ad), X))(adapters)
    (params,) = [e.params for e in jaxpr.eqns if "policy" in e.params]
    assert params["policy"] is policy and not params["prevent_cse"]


def test_custom_rules_keep_their_own_derivative():
    """A flash-attention-style function inside the model: its backward is its own."""
    f, adapters = adapted(USES["custom_vjp beside"][0], {"w": W}, X, targets="w")
    grad = jax.grad(lambda ad: jnp.sum(f(lora.bind({"w": W}, ad), X)))(adapters)
    plain = lambda p, x: (x @ p["w"]) * 2.0
    g, _ = adapted(plain, {"w": W}, X, targets="w")
    want = jax.grad(lambda ad: jnp.sum(g(lora.bind({"w": W}, ad), X)))(adapters)
    assert_close(grad, jax.tree.map(lambda v: 3.0 * v, want))


@pytest.mark.parametrize("plan", ["factored", "merged"])
def test_no_gradient_of_a_frozen_weight(plan):
    """No sum over rows has a weight's shape, though the whole tree is bound: only A·B may."""
    big = {"w": normal(30, 6, 48), "v": normal(31, 48, 4)}
    f, adapters = adapted(mlp, big, X, targets=["w", "v"], plan=plan)

    def loss(tree):
        return jnp.sum(f(lora.bind(tree["base"], tree["adapters"]), X))

    jaxpr = jax.make_jaxpr(jax.grad(loss))({"base": big, "adapters": adapters})
    found = [
        (e.outvars[0].aval.shape, math.prod(e.invars[0].aval.shape[d] for d in dims[0][0]))
        for e in jaxpr.eqns
        if e.primitive.name == "dot_general"
        for dims in [e.params["dimension_numbers"]]
    ]
    weights = [summed for shape, summed in found if set(shape) in ({6, 48}, {48, 4})]
    assert weights == ([2] if plan == "merged" else [])  # for the gradient of v's input


def test_repeated_calls_do_not_trace_again():
    traces = []

    def fn(p, x, flag=True):
        traces.append(flag)
        return lax.scan(lambda c, w: (c @ w, None), x, p["w"])[0] if flag else x @ p["w"][0]

    f, adapters = adapted(fn, {"w": STACK}, X, targets="w")
    traces.clear()
    others = [jax.tree.map(jnp.sin, adapters), jax.tree.map(jnp.cos, adapters)]
    for other in [adapters, *others]:  # other values, same shapes
        f(lora.bind({"w": STACK}, other), X)
    assert traces == [True]
    f(lora.bind({"w": STACK}, adapters), X, flag=True)
    step = jax.jit(lambda ad: f(lora.bind({"w": STACK}, ad), X))
    for other in others:
        step(other)
    assert step._cache_size() == 1
    f(lora.bind({"w": STACK}, adapters), X[:1])
    assert len(traces) <= 4


def test_python_values_are_constants_of_the_trace():
    def fn(p, x, times, *, flip=False, name="tanh", power=None):
        for _ in range(times):
            x = getattr(jnp, name)(x @ (p["w"].T if flip else p["w"]))
        return x if power is None else x**power

    f, adapters = adapted(fn, {"w": W}, X, 1, targets="w")
    bound, merged = lora.bind({"w": W}, adapters), lora.merge({"w": W}, adapters)
    for args, kwargs in [((2,), {}), ((1,), dict(flip=True)), ((3,), dict(name="sin", power=2)),
                         ((True,), {}), ((1,), dict(flip=1))]:  # fmt: skip
        assert_close(f(bound, X, *args, **kwargs), fn(merged, X, *args, **kwargs))


def test_static_arguments():
    class Options:
        times = 2

    fn = lambda p, x, options, *, mode: x @ p["w"] * options.times * len(mode)
    survey = lora.survey(lambda p, x: x @ p["w"], {"w": W}, X)
    adapters = lora.init(jax.random.key(0), {"w": W}, lora.LoRAConfig(rank=2, targets="w"), survey)
    f = lora.adapt(fn, static_argnums=2, static_argnames="mode")
    got = f(lora.bind({"w": W}, adapters), X, Options(), mode=("a", "b"))
    assert_close(got, 4 * X @ W)
    with pytest.raises(lora.LoRAError, match="neither an array nor hashable"):
        f(lora.bind({"w": W}, adapters), X, Options(), mode=[set()])


def test_adapted_function_without_adapters_is_the_function():
    f = lora.adapt(gated)
    np.testing.assert_array_equal(f(GATED, X), gated(GATED, X))
    assert f.__name__ == "gated"


def test_closed_over_tracers():
    """Values of an outer transformation may be closed over."""
    f, adapters = adapted(gated, GATED, X, targets=["u", "v", "w"])

    def outer(scale):
        inner = lora.adapt(lambda p, x: scale * gated(p, x))
        return jnp.sum(inner(lora.bind(GATED, adapters), X))

    want = jnp.sum(f(lora.bind(GATED, adapters), X))
    assert_close(jax.grad(outer)(2.0), want)
    assert_close(jax.jit(jax.grad(outer))(2.0), want)
    assert_close(jax.vmap(outer)(jnp.arange(3.0)), jnp.arange(3.0) * want)


@pytest.mark.parametrize("base", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes(base, dtype):
    params = jax.tree.map(lambda v: v.astype(base), GATED)
    survey = lora.survey(gated, params, X.astype(base))
    config = lora.LoRAConfig(rank=2, targets=["u", "v", "w"], dtype=dtype)
    adapters = lora.init(jax.random.key(0), params, config, survey)
    assert {v.dtype for v in jax.tree.leaves(adapters)} == {jnp.dtype(dtype)}
    out = lora.adapt(gated)(lora.bind(params, adapters), X.astype(base))
    assert out.dtype == gated(params, X.astype(base)).dtype
    merged = lora.merge(params, adapters)
    assert jax.tree.map(lambda v: v.dtype, merged) == jax.tree.map(lambda v: v.dtype, params)
