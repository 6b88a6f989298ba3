"""Initialisers: the identity that defines each, against NumPy in fp64."""

import dataclasses
import functools
import math
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import assert_close, examples, fails, noisy, peft_starts, tolerance
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from zoo import IDS, Transformer

import lora_jax as lora
from lora_jax._core.paths import flatten, nest
from lora_jax._nodes.node import is_node
from lora_jax.methods._from_inputs import _ranks

RANK, SCALE = 2, 1.5
GEOMETRIES = {
    "matrix": ((6, 5), lora.Geometry((0,), (1,))),
    "torch's": ((5, 6), lora.Geometry((1,), (0,))),
    "from heads": ((2, 3, 6), lora.Geometry((0, 1), (2,))),
    "stacked last": ((6, 5, 3), lora.Geometry((0,), (1,), (2,))),
    "convolution": ((3, 3, 4, 5), lora.Geometry((0, 1, 2), (3,))),
}


def normal(i, *shape):
    return jnp.asarray(np.random.default_rng(i).normal(size=shape), jnp.float32)


def of(name, dtype=jnp.float32, rank=RANK):
    """(params, adapters) of one leaf."""
    shape, geometry = GEOMETRIES[name]
    a, b = (jnp.zeros(s) for s in geometry.factor_shapes(shape, rank))
    w = normal(zlib.crc32(name.encode()), *shape).astype(dtype)
    return {"w": w}, {"w": lora.LoRA(a, b, SCALE, geometry)}


SHAPES = ("torch's", "from heads", "stacked last", "convolution")


def all_of(dtype=jnp.float32):
    """The same, of one leaf for each geometry."""
    pairs = {name: of(name, dtype) for name in SHAPES}
    return {n: p["w"] for n, (p, _) in pairs.items()}, {n: ad["w"] for n, (_, ad) in pairs.items()}


def matrices(node, w):
    """A leaf as (n, in, out), in fp64."""
    g = node.geometry
    w = np.asarray(w, np.float64).transpose((*g.batch_axes, *g.in_axes, *g.out_axes))
    return w.reshape(g.sizes(node.shape))


def factors(node):
    """A (n, in, r) and B (n, r, out), in fp64."""
    n, i, o = node.geometry.sizes(node.shape)
    a, b = (np.asarray(x, np.float64) for x in (node.a, node.b))
    return a.reshape(n, i, -1), b.reshape(n, -1, o)


def delta(node):
    a, b = factors(node)
    return node.scale * a @ b


def best(m, rank):
    u, s, v = np.linalg.svd(m, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


def near(got, want, factor=64, dtype=jnp.float32):
    np.testing.assert_allclose(
        got, want, rtol=0, atol=tolerance(dtype, factor) * max(np.abs(want).max(), 1e-30)
    )


def moment(name, rows=40):
    """C of random inputs that vary much in some directions and little in others."""
    shape, geometry = GEOMETRIES[name]
    n, i, _ = geometry.sizes(shape)
    rng = np.random.default_rng(9)
    x = rng.normal(size=(n, rows, i)) * np.exp(rng.normal(size=(n, 1, i)))
    return jnp.asarray(x.swapaxes(1, 2) @ x, jnp.float32)


def loss(p):
    count = lambda w: jnp.arange(w.size, dtype=w.dtype).reshape(w.shape)
    return sum(jnp.sum(jnp.sin(w + count(w)).astype(jnp.float32)) for w in p.values())


MOMENTS = {name: moment(name) for name in SHAPES}
CHANGING = {
    "pissa": lora.methods.pissa,
    "olora": lora.methods.olora,
    "lora-ga": lambda p, ad: lora.methods.lora_ga(p, ad, jax.grad(loss)(p), gamma=4.0),
    "instruction": lambda p, ad: lora.methods.corda(p, ad, MOMENTS, mode="instruction"),
    "knowledge": lambda p, ad: lora.methods.corda(p, ad, MOMENTS, mode="knowledge"),
}
PARAMS, ZERO = all_of()


@functools.cache
def begun(method):
    """(base', adapters) of all geometries."""
    return jax.jit(lambda p: CHANGING[method](p, ZERO))(PARAMS)


@pytest.mark.parametrize("method", CHANGING)
def test_nothing_changes_at_first_and_the_way_back(method):
    """base' + s·A·B = W; and, trained, W + the converted = base' + s·A'·B' to 1e-6."""
    base, start = begun(method)
    trained = noisy(start, scale=0.3)
    back = jax.jit(lora.methods.on_original)(trained, start)
    for name, node in start.items():
        w, rest = (matrices(node, p[name]) for p in (PARAMS, base))
        near(rest + delta(node), w, 16)
        assert np.abs(delta(node)).max() > 1e-3 and node.scale == SCALE and node.rank == RANK
        assert back[name].rank == 2 * RANK
        want, got = rest + delta(trained[name]), w + delta(back[name])
        assert np.abs(got - want).max() < 1e-6 * max(1, np.abs(delta(trained[name])).max())


@pytest.mark.parametrize("method", ["pissa", "lora-ga"])
def test_a_base_in_bf16(method):
    """base' is rounded once: W is met to half a unit of the last place of base'."""
    params, zero = all_of(jnp.bfloat16)
    base, start = jax.jit(lambda p: CHANGING[method](p, zero))(params)
    for name, node in start.items():
        assert base[name].dtype == jnp.bfloat16 and node.a.dtype == jnp.float32
        rest = matrices(node, base[name])
        error = np.abs(rest + delta(node) - matrices(node, params[name]))
        assert (error <= np.abs(rest) * 2**-8 + 1e-5).all()


@pytest.mark.parametrize("name", SHAPES)
def test_pissa_takes_the_largest(name):
    base, start = begun("pissa")
    node, w = start[name], matrices(ZERO[name], PARAMS[name])
    near(delta(node), best(w, RANK))
    s = np.linalg.svd(w, compute_uv=False)
    left = np.linalg.svd(matrices(node, base[name]), compute_uv=False)
    near(left[:, 0], s[:, RANK])
    a, b = factors(node)
    near(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=2))  # balanced


def test_randomised_pissa():
    """About as good as the SVD after a few iterations, and W = base' + s·A·B whatever they are."""
    u, v = (np.linalg.qr(np.asarray(normal(i, 60, 50)))[0] for i in (1, 2))
    s = 0.8 ** np.arange(50.0)
    w = jnp.asarray((u * s) @ v[:50].T, jnp.float32)
    config = lora.LoRAConfig(rank=4, targets="w")
    zero = lora.init(jax.random.key(0), {"w": w}, config)
    run = jax.jit(lambda w: [lora.methods.pissa({"w": w}, zero, niter=n) for n in (0, 1, 4)])
    worst = []
    for base, start in run(w):
        near(matrices(start["w"], base["w"]) + delta(start["w"]), np.asarray(w, np.float64)[None])
        worst.append(np.linalg.norm(base["w"], 2) / s[4])
    assert worst[0] >= worst[1] >= worst[2] - 1e-6 and worst[2] < 1 + 1e-4


@pytest.mark.parametrize("name", SHAPES)
def test_olora(name):
    base, start = begun("olora")
    node, w = start[name], matrices(ZERO[name], PARAMS[name])
    _, b = factors(node)
    near(b @ b.swapaxes(1, 2), np.broadcast_to(np.eye(RANK), (len(b), RANK, RANK)))
    # Q_r·R_r has the first r columns of Wᵀ as they are.
    near(delta(node)[:, :RANK], SCALE * w[:, :RANK])
    near(matrices(node, base[name])[:, :RANK], (1 - SCALE) * w[:, :RANK])


def test_orthogonal():
    params = {"up": normal(0, 20, 30), "down": normal(1, 30, 20)}
    make = lambda *targets: lora.methods.orthogonal(
        jax.random.key(1),
        lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=6, targets=targets)),
    )
    both, up = jax.jit(lambda: (make("up", "down"), make("up")))()
    for node in both.values():
        size = np.linalg.norm(node.a) * np.linalg.norm(node.b)
        assert np.linalg.norm(node.a @ node.b) < 1e-5 * size and size > 0.5
        assert np.linalg.matrix_rank(np.asarray(node.a)) == 3
        np.testing.assert_allclose(np.std(node.a), 0.1 / math.sqrt(2), rtol=0.3)
    assert_close(up["up"], both["up"])  # another leaf changes nothing
    assert np.abs(both["up"].a - both["down"].a[:20]).max() > 0.1
    with fails("'up' has rank 3"):
        config = lora.LoRAConfig(rank=3, targets="up")
        lora.methods.orthogonal(jax.random.key(1), lora.init(jax.random.key(0), params, config))


def test_the_first_step_of_lora_ga():
    """Gradient descent on A and B moves W along the best rank-2r part of G."""
    base, start = begun("lora-ga")

    @jax.jit
    def first(base, start):
        steps = jax.grad(lambda ad: loss(lora.merge(base, ad)))(start)
        moved = lambda t: lora.merge(base, jax.tree.map(lambda x, d: x - t * d, start, steps))
        return jax.jvp(moved, (0.0,), (1.0,))[1], jax.grad(loss)(PARAMS)

    step, g = first(base, start)
    for name, node in start.items():
        out = node.geometry.sizes(node.shape)[2]
        full = matrices(node, g[name])
        want = best(full, 2 * RANK)
        near(matrices(node, step[name]), -(SCALE**2) * math.sqrt(out) / 4 * want, 256)
        if min(full.shape[1:]) > 2 * RANK:
            assert np.linalg.norm(want) < 0.999 * np.linalg.norm(full)
        # Other factors of that size take another step.
        a, b = (np.linalg.qr(x)[0] for x in (np.asarray(normal(i, *f.shape)) for i, f in (
            (1, factors(node)[0]), (2, factors(node)[1].swapaxes(1, 2)))))  # fmt: skip
        other = a @ a.swapaxes(1, 2) @ full + full @ b @ b.swapaxes(1, 2)
        cosine = np.sum(other * want) / np.linalg.norm(other) / np.linalg.norm(want)
        assert cosine < 0.98


def test_lora_one_is_a_step():
    @jax.jit
    def run(p):
        g = jax.grad(loss)(p)
        return g, [lora.methods.lora_one(ZERO, g, gamma=8.0, normalized=x) for x in (False, True)]

    g, (plain, normalized) = run(PARAMS)
    for name, node in plain.items():
        full = matrices(node, g[name])
        top = np.linalg.svd(full, compute_uv=False)[:, :1, None]
        near(delta(node), -SCALE / 8 * best(full, RANK))
        near(delta(normalized[name]), -SCALE / 8 * best(full, RANK) / top)
        a, b = factors(node)
        near(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=2))


# ---------------------------------------------------------------- gradients
@functools.cache
def transformer(scanned):
    model = Transformer(scanned)
    params = jax.jit(model.init)(jax.random.key(0), IDS)["params"]
    apply = lambda params, ids: model.apply({"params": params}, ids)
    survey = lora.survey(apply, params, IDS)
    return apply, params, lora.select(params, lora.LoRAConfig(rank=RANK), survey)


def flat(tree):
    return flatten(tree, is_leaf=is_node)


def test_lora_ga_takes_either_gradient():
    """And passes make a random start exact, where rank + 10 is not all there is."""
    u, v = (np.linalg.qr(np.asarray(normal(i, 40, 30)))[0] for i in (1, 2))
    g = jnp.asarray((u * 0.7 ** np.arange(30.0)) @ v[:30].T, jnp.float32)
    params = {"w": jnp.zeros((40, 30))}
    objective = lambda p, x: jnp.vdot(x @ p["w"], x @ g)
    config = lora.LoRAConfig(rank=RANK, targets="w")
    zero = lora.init(jax.random.key(0), params, config)

    @jax.jit
    def run(params):
        find = functools.partial(
            lora.methods.low_rank_gradients, objective, params, zero, jnp.eye(40)
        )
        few, many = find(passes=1), find(passes=3)
        return few, many, [lora.methods.lora_ga(params, zero, x)[1] for x in (many, {"w": g})]

    few, many, (one, two) = run(params)
    want = best(np.asarray(g, np.float64), 4)
    errors = [np.linalg.norm(delta(x["w"]) - want) for x in (few, many)]
    assert errors[1] < 1e-4 < errors[0]
    for got, want in zip(factors(one["w"]), factors(two["w"])):
        near(np.abs(got), np.abs(want), 2**13)


def test_no_full_gradient_is_formed():
    params = {"w": jax.ShapeDtypeStruct((640, 320), jnp.float32)}
    targets = lora.select(params, lora.LoRAConfig(rank=2, targets="w"))
    objective = lambda p, x: jnp.sum(jnp.sin(x @ p["w"]))
    x = jax.ShapeDtypeStruct((8, 640), jnp.float32)
    step = lambda p, x: lora.methods.low_rank_gradients(objective, p, targets, x)
    large = re.compile(r"f32\[(640,320|320,640)\] = dot_general")
    assert not large.search(str(jax.make_jaxpr(step)(params, x)))
    assert large.search(str(jax.make_jaxpr(jax.grad(objective))(params, x)))


# ---------------------------------------------------------------- moments
LEAVES = {
    "q": normal(20, 6, 2, 3), "o": normal(21, 2, 3, 6), "experts": normal(22, 3, 6, 5),
    "layers": normal(23, 4, 6, 6) / 3, "conv": normal(24, 3, 6, 4), "left": normal(25, 7, 6),
    "ragged": normal(26, 2, 7, 3),
}  # fmt: skip
INPUT = normal(30, 2, 9, 6)
SIZES = jnp.array([12, 6])


def net(p, x, log=None):
    """Every kind of product; `log` is told what each leaf is multiplied with, as (n, rows, in)."""

    def tell(name, rows):
        if log is not None:
            log.setdefault(name, []).append(np.asarray(rows, np.float64))

    tell("q", x.reshape(1, -1, 6))
    h = jnp.tanh(jnp.einsum("btd,dhk->bthk", x, p["q"]))
    tell("o", h.reshape(1, -1, 6))
    x = x + jnp.einsum("bthk,hkd->btd", h, p["o"])
    layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    for w in p["layers"] if log is not None else ():
        tell("layers", x.reshape(1, -1, 6))
        x, _ = layer(x, w)
    if log is None:
        x, _ = lax.scan(layer, x, p["layers"])
    else:
        log["layers"] = [np.concatenate(log["layers"])]
    y = jnp.einsum("ebd,edf->ebf", jnp.stack([x[0], x[1], x[0] * x[1]]), p["experts"])
    tell("experts", jnp.stack([x[0], x[1], x[0] * x[1]]))
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    patches = jnp.stack([padded[:, i : i + 9] for i in range(3)], 2)  # (2, 9, 3, 6)
    tell("conv", patches[:, ::2].reshape(1, -1, 18))
    z = lax.conv_general_dilated(
        x, p["conv"], (2,), [(1, 1)], dimension_numbers=("NWC", "WIO", "NWC")
    )
    tell("left", x.reshape(1, -1, 6))
    t = jnp.einsum("od,btd->bto", p["left"], x)
    r = lax.ragged_dot(t.reshape(18, 7), p["ragged"], SIZES)
    first = (jnp.arange(18) < 12).astype(t.dtype)[:, None]
    tell("ragged", jnp.stack([t.reshape(18, 7) * first, t.reshape(18, 7) * (1 - first)]))
    return jnp.sum(y), z, jnp.argmax(t), r


SURVEY = lora.survey(net, LEAVES, INPUT)
TARGETS = lora.select(LEAVES, lora.LoRAConfig(rank=RANK, targets=[*LEAVES]), SURVEY)


@pytest.fixture(scope="module")
def batches():
    """Two batches, C of each, and all rows that each leaf was multiplied with."""
    inputs = [INPUT, normal(31, 2, 9, 6)]
    find = jax.jit(lambda p, x: lora.methods.second_moments(net, p, TARGETS, x))
    logs = [{}, {}]
    for x, log in zip(inputs, logs):
        net(LEAVES, x, log)
    rows = {p: np.concatenate([log[p][0] for log in logs], 1) for p in LEAVES}
    return inputs, [find(LEAVES, x) for x in inputs], rows


def summed(batches):
    return jax.tree.map(jnp.add, *batches[1])


def test_second_moments_are_those_of_the_rows(batches):
    found = summed(batches)
    assert found.keys() == LEAVES.keys()
    for path, x in batches[2].items():
        near(found[path], x.swapaxes(1, 2) @ x, 256)


def test_second_moments_of_bf16_are_added_up_in_fp32_also_batched():
    params, zero = of("matrix", jnp.bfloat16)
    x = normal(1, 2, 300, 6).astype(jnp.bfloat16)
    find = lambda x: lora.methods.second_moments(lambda p, x: x @ p["w"], params, zero, x)["w"]
    rows = np.asarray(x, np.float64)
    found = jax.jit(jax.vmap(find))(x)
    assert found.dtype == jnp.float32
    near(found[:, 0], rows.swapaxes(1, 2) @ rows)


@pytest.mark.parametrize("dtype", ["complex64", "int32"])
def test_second_moments_of_no_floating_point(dtype):
    params = {"w": jnp.ones((4, 3))}
    targets = lora.select(params, lora.LoRAConfig(rank=1, targets="w"))
    fn = lambda p, x: jax.lax.dot_general(x, p["w"].astype(dtype), (((1,), (0,)), ((), ())))
    if dtype == "int32":  # which meets a weight as it is
        fn = lambda p, x: jax.lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())))
    with fails(rf"'w' is multiplied by {dtype}.*exclude=\['w'\]"):
        lora.methods.second_moments(fn, params, targets, jnp.ones((2, 4), dtype))


def test_second_moments_scanned_and_spread():
    """A scanned model has those of the loop; a batch on eight devices has those of one."""
    apply, params, targets = transformer(False)
    loop = jax.jit(lambda p: lora.methods.second_moments(apply, p, targets, IDS))(params)
    scan, like, scanned_targets = transformer(True)
    layers = jax.tree.map(lambda *x: np.stack(x), params["layer_0"], params["layer_1"])
    stacked = {**{k: v for k, v in params.items() if k in like}, "layers": layers}
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    ids = jax.device_put(jnp.tile(IDS, (4, 1)), NamedSharding(mesh, P("d")))
    find = jax.jit(lambda p, ids: lora.methods.second_moments(scan, p, scanned_targets, ids))
    found = find(stacked, ids)
    for path, c in found.items():
        want = [loop[path.replace("layers", f"layer_{i}")][0] for i in range(2)]
        near(c, 4 * np.stack(want), 256)


def test_low_rank_gradients_of_every_kind_of_product():
    """As near to the full gradient as anything of that rank."""
    objective = lambda p, x: sum(jnp.sum(jnp.sin(y)) for y in net(p, x) if y.dtype == x.dtype)
    find = lambda p: lora.methods.low_rank_gradients(objective, p, TARGETS, INPUT, rank=3, passes=1)
    found, full = jax.jit(lambda p: (find(p), jax.grad(objective)(p, INPUT)))(LEAVES)
    for path, node in found.items():
        g = matrices(node, full[path])
        assert node.rank == 3 and node.scale == 1.0 and np.linalg.norm(g) > 0.1
        near(delta(node), best(g, 3), 1024)


def test_what_no_output_depends_on_is_refused():
    fn = lambda p, x: jnp.argmax(x @ p["w"])
    params, zero = of("matrix")
    moments = lora.methods.second_moments(fn, params, zero, normal(1, 4, 6))
    with fails("'w' has a moment that is zero or not finite"):
        lora.methods.eva(zero, moments)
    flipped = lora.methods.second_moments(lambda p, x: x @ p["w"].T, params, zero, normal(1, 4, 5))
    with fails("'w' has a moment that is zero"):  # the geometry says that it is used otherwise
        lora.methods.eva(zero, flipped)
    own = jax.custom_vjp(lambda w, x: x @ w)
    own.defvjp(lambda w, x: (x @ w, (w, x)), lambda wx, g: (wx[1].T @ g, g @ wx[0].T))
    hidden = lora.methods.second_moments(lambda p, x: own(p["w"], x), params, zero, normal(1, 4, 6))
    with fails("'w' has a moment that is zero"):  # the rule says nothing of what met the weight
        lora.methods.eva(zero, hidden)
    table = {"w": dataclasses.replace(zero["w"], embedding=True)}
    with fails("'w' is a look-up table"):
        lora.methods.second_moments(lambda p, i: p["w"][i], params, table, jnp.arange(3))


# ---------------------------------------------------------------- EVA
def test_eva_has_the_singular_vectors_of_all_rows(batches):
    zero = lora.init(jax.random.key(0), LEAVES, TARGETS)
    adapters = jax.jit(lambda m: lora.methods.eva(zero, m, rho=1.0))(summed(batches))
    for path, x in batches[2].items():
        node = adapters[path]
        v = np.linalg.svd(x, full_matrices=False)[2][:, :RANK].swapaxes(1, 2)  # (n, in, r)
        overlap = np.abs(np.sum(v * factors(node)[0], 1))
        np.testing.assert_allclose(overlap, 1, atol=1e-4)
        assert node.rank == RANK and not node.b.any() and node.scale == zero[path].scale


def test_eva_spends_the_ranks_where_they_explain_most(batches):
    zero = lora.init(jax.random.key(0), LEAVES, TARGETS)
    adapters = lora.methods.eva(zero, summed(batches))
    count = lambda ad: sum(n.rank * n.geometry.sizes(n.shape)[0] for n in flat(ad).values())
    ranks = {p: n.rank for p, n in adapters.items()}
    assert count(adapters) <= count(zero) and len(set(ranks.values())) > 1
    assert not any(n.b.any() for n in adapters.values())
    shares = {}
    for path, x in batches[2].items():
        s2 = np.linalg.svd(x, compute_uv=False) ** 2
        shares[path] = np.mean(s2 / s2.sum(-1, keepdims=True), 0)
    single = [p for p in LEAVES if p not in ("layers", "experts", "ragged")]
    kept = [shares[p][j] for p in single for j in range(ranks.get(p, 0))]
    left = [shares[p][j] for p in single for j in range(ranks.get(p, 0), 2 * RANK)]
    assert min(kept) > max(left) - 1e-6


def test_eva_is_that_of_peft():
    """PEFT takes the mean of the inputs out, and its SVD is one of random vectors in 4 passes."""
    stored = peft_starts()
    x = {n: stored[f"eva.{n}.x"] for n in "abc"}
    want = {n: stored[f"eva.{n}.a"] for n in "abc" if f"eva.{n}.a" in stored}
    params = {n: jnp.zeros((v.shape[1], 6)) for n, v in x.items()}
    start = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets=[*x]))
    moments = {n: np.cov(v.T, bias=True)[None] * len(v) for n, v in x.items()}
    found = lora.methods.eva(start, jax.tree.map(jnp.float32, moments))
    ranks = {n: node.rank for n, node in found.items()}
    assert ranks == {n: len(a) for n, a in want.items()} and len(set(ranks.values())) > 1
    for n, a in want.items():
        np.testing.assert_allclose(np.abs(np.sum(a.T * found[n].a, 0)), 1, atol=1e-3)


@examples(30)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=5),
       st.floats(1.1, 3.0), st.integers(0, 99))  # fmt: skip
def test_the_budget_is_kept(leaves, rho, seed):
    rng = np.random.default_rng(seed)
    nodes, shares = {}, {}
    for i, (n, rank) in enumerate(leaves):
        a, b = jnp.zeros((n, 9, rank)), jnp.zeros((n, rank, 8))
        nodes[f"{i}"] = lora.LoRA(a, b, 1.0, lora.Geometry((1,), (2,), (0,)))
        shares[f"{i}"] = np.sort(rng.dirichlet(np.ones(9)))[::-1]
    ranks = _ranks(shares, nodes, rho)
    size = {p: len(n.a) for p, n in nodes.items()}
    budget, spent = (
        sum(size[p] * r[p] for p in nodes) for r in ({p: n.rank for p, n in nodes.items()}, ranks)
    )
    assert spent <= budget
    assert all(0 <= r <= min(int(rho * nodes[p].rank), 8) for p, r in ranks.items())
    room = [p for p, r in ranks.items() if r < min(int(rho * nodes[p].rank), 8)]
    assert all(size[p] > budget - spent for p in room)  # nothing is left that would fit


# ---------------------------------------------------------------- CorDA
@pytest.mark.parametrize("name", SHAPES)
def test_corda(name):
    """In "instruction": no update of rank r leaves less of ‖C·(W − Δ)‖. "knowledge": none has less of ‖CΔ‖."""
    c = np.asarray(MOMENTS[name], np.float64)
    i = c.shape[-1]
    c = c / (np.trace(c, axis1=1, axis2=2)[:, None, None] / i) + 0.01 * np.eye(i)
    w = matrices(ZERO[name], PARAMS[name])
    s = np.linalg.svd(c @ w, compute_uv=False)
    norm = lambda x: np.linalg.norm(c @ x, axis=(1, 2))
    big, small = (delta(begun(mode)[1][name]) for mode in ("instruction", "knowledge"))
    np.testing.assert_allclose(norm(w - big), np.sqrt(np.sum(s[:, RANK:] ** 2, 1)), rtol=1e-4)
    assert (norm(w - big) < 0.95 * norm(w - best(w, RANK))).any()  # PiSSA leaves more
    np.testing.assert_allclose(norm(small), np.sqrt(np.sum(s[:, -RANK:] ** 2, 1)), rtol=2e-2)


def test_corda_looks_at_directions_alone():
    large = {name: 1e4 * c for name, c in MOMENTS.items()}
    other = jax.jit(lambda p: lora.methods.corda(p, ZERO, large, mode="instruction"))(PARAMS)[1]
    for name, node in begun("instruction")[1].items():
        near(delta(other[name]), delta(node), 1024)


# ---------------------------------------------------------------- models
def test_a_model_begins_as_it_was():
    apply, params, _ = transformer(True)
    config = lora.LoRAConfig(rank=2, targets=["all-linear", "embedding"], full="bias")
    survey = lora.survey(apply, params, IDS)
    zero = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, config, survey))
    linear = {k: v for k, v in flat(zero).items() if isinstance(v, lora.LoRA)}
    zero = nest(linear)  # abstract: values are not read

    @jax.jit
    def run(params):
        base, start = lora.methods.pissa(params, zero)
        return base, start, lora.adapt(apply)(lora.bind(base, start), IDS), apply(params, IDS)

    base, start, got, want = run(params)
    assert_close(got, want, factor=256)
    assert "embedding" in start["embed"] and start["embed"]["embedding"].embedding
    same = lambda x, y: np.array_equal(np.asarray(x), np.asarray(y))
    changed = [k for k, v in flat(base).items() if not same(v, flat(params)[k])]
    assert sorted(changed) == sorted(linear)


def test_other_leaves_and_modules_stay_what_they_are():
    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    x = normal(1, 3, 6)
    config = lora.LoRAConfig(rank=2, targets="kernel", full="bias")
    zero = lora.init(jax.random.key(0), model, config)
    base, start = lora.methods.pissa(model, zero)
    assert isinstance(start["bias"], lora.Full) and (base.kernel[...] != model.kernel[...]).all()
    call = lora.adapt(lambda m, x: m(x))
    assert_close(call(lora.bind(base, start), x), model(x))
    assert isinstance(lora.methods.on_original(start, start)["bias"], lora.Full)
    held = {"w": np.asarray(normal(2, 6, 4))}
    assert isinstance(
        lora.methods.pissa(
            held, lora.init(jax.random.key(0), held, lora.LoRAConfig(targets="w", rank=2))
        )[0]["w"],
        np.ndarray,
    )


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda p, ad: lora.methods.pissa(p, p), "expected adapters, found"),
        (lambda p, ad: lora.methods.pissa(p, ad, niter=-1), "niter=-1: expected an integer >= 0, or None"),
        (lambda p, ad: lora.methods.pissa({"v": p["w"]}, ad), "'w' is adapted, but the parameters have no"),
        (lambda p, ad: lora.methods.pissa(p, lora.methods.dora(p, ad)), "'w' is a DoRA"),
        (
            lambda p, ad: lora.methods.olora(p, {"w": dataclasses.replace(ad["w"], scale=0.0)}),
            "'w' has scale 0.0",
        ),
        (lambda p, ad: lora.methods.pissa(p, {}), r"empty tree: lora.methods.pissa\(params"),
        (lambda p, ad: lora.methods.pissa({"w": p["w"] * np.nan}, ad), r"(?s)NaN or infinity.*'w' of the base.*methods.pissa"),
        (lambda p, ad: lora.methods.olora(jax.eval_shape(lambda: p), ad), "(?s)shapes and no values:.*'w'"),
        (lambda p, ad: lora.methods.dora(jax.eval_shape(lambda: p), ad), "shapes and no values"),
        (lambda p, ad: lora.methods.dora({"w": p["w"] * np.nan}, ad), "'w' of the base"),
        (lambda p, ad: lora.methods.lora_ga(p, ad, {"w": p["w"] * np.inf}), "'w': it holds NaN or infinity"),
        (lambda p, ad: lora.methods.orthogonal(jax.random.split(jax.random.key(0)), ad), r"\(2,\) keys: lora.methods.orthogonal\(keys\[0\], adapters\)"),
        (lambda p, ad: lora.methods.lora_ga(p, ad, {}), "'w' has none"),
        (lambda p, ad: lora.methods.lora_ga(p, ad, {"w": p["w"].T}), r"expected one of \(6, 5\)"),
        (lambda p, ad: lora.methods.lora_ga(p, ad, p, gamma=0.0), "gamma=0.0: expected a finite number > 0"),
        (
            lambda p, ad: lora.methods.lora_ga(p, of("matrix", rank=3)[1], p),
            "'w': 6 singular values are needed, it has 5",
        ),
        (lambda p, ad: lora.methods.eva(ad, {}), "'w' has none"),
        (lambda p, ad: lora.methods.eva(ad, {"w": jnp.ones((1, 5, 5))}), r"expected \(1, 6, 6\)"),
        (lambda p, ad: lora.methods.eva(ad, {"w": moment("matrix")}, rho=0.5), "rho=0.5: expected a number >= 1"),
        (
            lambda p, ad: jax.jit(lambda m: lora.methods.eva(ad, m))({"w": moment("matrix")}),
            "not under jit; pass rho=1",
        ),
        (lambda p, ad: lora.methods.corda(p, ad, {"w": moment("matrix")}, mode="both"), "mode='both': expected"),
        (lambda p, ad: lora.methods.on_original(ad, {"v": ad["w"]}), "'v' is in one of them alone"),
        (lambda p, ad: lora.methods.low_rank_gradients(loss, p, ad, passes=0), "passes=0: expected an integer >= 1"),
        (lambda p, ad: lora.methods.second_moments(loss, {"w": p["w"].T}, ad), "is no leaf of the parameters"),
        (lambda p, ad: lora.methods.second_moments(loss, p, p), "expected adapters or Targets"),
    ],
)  # fmt: skip
def test_errors(call, match):
    with fails(match):
        call(*of("matrix"))
