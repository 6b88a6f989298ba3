"""Initialisers: the identity that defines each, against NumPy in fp64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import assert_close, fails, noisy, tolerance
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_dora import GEOMETRIES
from zoo import IDS, Transformer

import lora_jax as lora
from lora_jax._activations import _ranks

RANK, SCALE = 2, 1.5


def normal(i, *shape):
    return jax.random.normal(jax.random.fold_in(jax.random.key(3), i), shape)


def of(name, dtype=jnp.float32, rank=RANK):
    """(params, adapters) of one leaf."""
    shape, geometry = GEOMETRIES[name]
    a, b = (jnp.zeros(s) for s in geometry.factor_shapes(shape, rank))
    return {"w": normal(0, *shape).astype(dtype)}, {"w": lora.LoRA(a, b, SCALE, geometry)}


def matrices(node, w):
    """A leaf as (n, in, out), in fp64."""
    g = node.geometry
    w = np.asarray(w, np.float64).transpose((*g.batch_axes, *g.in_axes, *g.out_axes))
    return w.reshape(g.sizes(node.shape))


def delta(node):
    n, i, o = node.geometry.sizes(node.shape)
    a, b = (np.asarray(x, np.float64) for x in (node.a, node.b))
    return node.scale * a.reshape(n, i, -1) @ b.reshape(n, -1, o)


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
    x = normal(9, n, rows, i) * jnp.exp(normal(10, n, 1, i))
    return {"w": x.mT @ x}


def loss(p):
    return sum(
        jnp.sum(jnp.sin(w + jnp.arange(w.size, dtype=w.dtype).reshape(w.shape))) for w in p.values()
    )


CHANGING = {
    "pissa": lambda p, ad, name: lora.pissa(p, ad),
    "olora": lambda p, ad, name: lora.olora(p, ad),
    "lora-ga": lambda p, ad, name: lora.lora_ga(p, ad, jax.grad(loss)(p)),
    "corda, instruction": lambda p, ad, name: lora.corda(p, ad, moment(name), mode="instruction"),
    "corda, knowledge": lambda p, ad, name: lora.corda(p, ad, moment(name), mode="knowledge"),
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("method", CHANGING)
def test_nothing_changes_at_first_and_the_way_back(method, name):
    """base' + s·A·B = W; and, trained, W + the converted = base' + s·A'·B' to 1e-6."""
    params, zero = of(name)
    base, start = jax.jit(lambda p: CHANGING[method](p, zero, name))(params)
    w, node = params["w"], start["w"]
    near(matrices(node, base["w"]) + delta(node), matrices(node, w), 16)
    assert np.abs(delta(node)).max() > 1e-3 and node.scale == SCALE and node.rank == RANK
    trained = noisy(start, scale=0.3)
    plain = lora.on_original(trained, start)["w"]
    want = matrices(node, base["w"]) + delta(trained["w"])
    got = matrices(node, w) + delta(plain)
    assert plain.rank == 2 * RANK
    assert np.abs(got - want).max() < 1e-6 * max(1, np.abs(delta(trained["w"])).max())


@pytest.mark.parametrize("method", CHANGING)
def test_a_base_in_bf16(method):
    """base' is rounded once: W is met to half a unit of the last place of base'."""
    params, zero = of("to heads", jnp.bfloat16)
    base, start = CHANGING[method](params, zero, "to heads")
    node = start["w"]
    assert base["w"].dtype == jnp.bfloat16 and node.a.dtype == jnp.float32
    rest = matrices(node, base["w"])
    error = np.abs(rest + delta(node) - matrices(node, params["w"]))
    assert (error <= np.abs(rest) * 2**-8 + 1e-5).all()


@pytest.mark.parametrize("name", GEOMETRIES)
def test_pissa_takes_the_largest(name):
    params, zero = of(name)
    base, start = lora.pissa(params, zero)
    node = start["w"]
    near(delta(node), best(matrices(node, params["w"]), RANK), 64)
    s = np.linalg.svd(matrices(node, params["w"]), compute_uv=False)
    left = np.linalg.svd(matrices(node, base["w"]), compute_uv=False)
    near(left[:, 0], s[:, RANK])
    a, b = (np.asarray(x, np.float64) for x in lora._algebra.matrices(node))
    near(np.linalg.norm(a / SCALE, axis=1), np.linalg.norm(b, axis=2))  # balanced


def test_randomised_pissa():
    """About as good as the SVD after a few iterations, and W = base' + s·A·B whatever they are."""
    u, v = (np.linalg.qr(np.asarray(normal(i, 60, 50)))[0] for i in (1, 2))
    s = 0.8 ** np.arange(50.0)
    w = jnp.asarray((u * s) @ v[:50].T, jnp.float32)
    config = lora.LoRAConfig(rank=4, targets="w")
    zero = lora.init(jax.random.key(0), {"w": w}, config)
    worst = []
    for niter in (0, 1, 4):
        base, start = lora.pissa({"w": w}, zero, niter=niter)
        near(matrices(start["w"], base["w"]) + delta(start["w"]), np.asarray(w, np.float64)[None])
        worst.append(np.linalg.norm(base["w"], 2) / s[4])
    assert worst[0] >= worst[1] >= worst[2] - 1e-6 and worst[2] < 1 + 1e-4
    again, _ = lora.pissa({"w": w}, zero, niter=4)
    np.testing.assert_array_equal(again["w"], base["w"])


@pytest.mark.parametrize("name", GEOMETRIES)
def test_olora(name):
    params, zero = of(name)
    base, start = lora.olora(params, zero)
    node, w = start["w"], matrices(start["w"], params["w"])
    b = matrices_of_b(node)
    near(b @ b.swapaxes(1, 2), np.broadcast_to(np.eye(RANK), (len(b), RANK, RANK)))
    # Q_r·R_r has the first r columns of Wᵀ as they are.
    near(delta(node)[:, :RANK], SCALE * w[:, :RANK])
    near(matrices(node, base["w"])[:, :RANK], (1 - SCALE) * w[:, :RANK])


def matrices_of_b(node):
    n, _, o = node.geometry.sizes(node.shape)
    return np.asarray(node.b, np.float64).reshape(n, -1, o)


def test_orthogonal():
    params = {"up": normal(0, 20, 30), "down": normal(1, 30, 20)}
    make = lambda *targets: lora.orthogonal(
        jax.random.key(1),
        lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=6, targets=targets)),
    )
    both = jax.jit(lambda: make("up", "down"))()
    for node in both.values():
        size = np.linalg.norm(node.a) * np.linalg.norm(node.b)
        assert np.linalg.norm(node.a @ node.b) < 1e-5 * size and size > 1
        assert np.linalg.matrix_rank(np.asarray(node.a)) == 3
        np.testing.assert_allclose(np.std(node.a), 0.1 / math.sqrt(2), rtol=0.3)
    assert_close(make("up")["up"], both["up"])  # another leaf changes nothing
    assert np.abs(both["up"].a - both["down"].a[:20]).max() > 0.1
    with fails("'up' has rank 3"):
        config = lora.LoRAConfig(rank=3, targets="up")
        lora.orthogonal(jax.random.key(1), lora.init(jax.random.key(0), params, config))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_first_step_of_lora_ga(name):
    """Theorem 3.1: gradient descent on A and B moves W along the best rank-2r part of G."""
    params, zero = of(name)
    g = jax.grad(loss)(params)
    base, start = lora.lora_ga(params, zero, g, gamma=4.0)
    steps = jax.grad(lambda ad: loss(lora.merge(base, ad)))(start)
    moved = lambda t: lora.merge(
        {"w": jnp.zeros_like(base["w"])}, jax.tree.map(lambda x, d: x - t * d, start, steps)
    )["w"]
    _, step = jax.jvp(moved, (0.0,), (1.0,))
    node = start["w"]
    out = node.geometry.sizes(node.shape)[2]
    full = matrices(node, g["w"])
    near(matrices(node, step), -(SCALE**2) * math.sqrt(out) / 4 * best(full, 2 * RANK), 256)
    # A random start moves it along another way.
    plain = noisy(zero, scale=1.0)["w"]
    a, b = (x / x.std() for x in (matrices_of_a(plain), matrices_of_b(plain)))
    other = a @ a.swapaxes(1, 2) @ full + full @ b.swapaxes(1, 2) @ b
    cosine = np.sum(other * best(full, 2 * RANK)) / np.linalg.norm(other)
    assert cosine < 0.98 * np.linalg.norm(best(full, 2 * RANK))


def matrices_of_a(node):
    n, i, _ = node.geometry.sizes(node.shape)
    return np.asarray(node.a, np.float64).reshape(n, i, -1)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("name", ["matrix", "experts", "convolution"])
def test_lora_one_is_a_step(name, normalized):
    params, zero = of(name)
    g = jax.grad(loss)(params)
    node = lora.lora_one(zero, g, gamma=8.0, normalized=normalized)["w"]
    full = matrices(node, g["w"])
    top = np.linalg.svd(full, compute_uv=False)[:, :1, None] if normalized else 1.0
    near(delta(node), -SCALE / 8 * best(full, RANK) / top)
    near(np.linalg.norm(matrices_of_a(node), axis=1), np.linalg.norm(matrices_of_b(node), axis=2))


# ---------------------------------------------------------------- gradients
def transformer(scanned):
    model = Transformer(scanned)
    params = model.init(jax.random.key(0), IDS)["params"]
    apply = lambda params, ids: model.apply({"params": params}, ids)
    survey = lora.survey(apply, params, IDS)
    return apply, params, lora.select(params, lora.LoRAConfig(rank=RANK), survey)


def flat(tree):
    return lora._paths.flatten(tree, is_leaf=lora._adapters.is_node)


def test_low_rank_gradients_of_a_scanned_model():
    """As near to the full gradient as anything of that rank; LoRA-GA takes either."""
    apply, params, targets = transformer(True)
    objective = lambda p, ids: jnp.mean(jnp.sin(apply(p, ids)))
    full = flat(jax.jit(jax.grad(objective))(params, IDS))
    find = lambda p: lora.low_rank_gradients(objective, p, targets, IDS)
    found = jax.jit(find)(params)
    for path, node in flat(found).items():
        g = matrices(node, full[path])
        assert node.rank == 2 * RANK and node.scale == 1.0
        rest, least = (np.linalg.norm(g - x, axis=(1, 2)) for x in (delta(node), best(g, 4)))
        assert (rest <= 1.001 * least + 1e-4 * np.linalg.norm(g)).all()
    zero = lora.init(jax.random.key(0), params, targets)
    one, two = (lora.lora_ga(params, zero, g)[1] for g in (found, jax.grad(objective)(params, IDS)))
    up = lambda ad: delta(ad["layers"]["down"]["kernel"])
    assert np.abs(np.abs(up(one)) - np.abs(up(two))).max() < 1e-2 * np.abs(up(two)).max()


def test_no_full_gradient_is_formed():
    params = {"w": jax.ShapeDtypeStruct((640, 320), jnp.float32)}
    targets = lora.select(params, lora.LoRAConfig(rank=2, targets="w"))
    objective = lambda p, x: jnp.sum(jnp.sin(x @ p["w"]))
    x = jax.ShapeDtypeStruct((8, 640), jnp.float32)
    step = lambda p, x: lora.low_rank_gradients(objective, p, targets, x)
    jaxpr = jax.make_jaxpr(step)(params, x)
    assert "f32[640,14]" in str(jaxpr) and "f32[640,320] =" not in str(jaxpr)
    full = jax.make_jaxpr(jax.grad(objective))(params, x)
    assert "f32[640,320] =" in str(full)  # or the test could not fail


# ---------------------------------------------------------------- moments
PARAMS = {
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


SURVEY = lora.survey(net, PARAMS, INPUT)
TARGETS = lora.select(PARAMS, lora.LoRAConfig(rank=RANK, targets=[*PARAMS]), SURVEY)


@pytest.fixture(scope="module")
def batches():
    """Two batches, C of each, and all rows that each leaf was multiplied with."""
    inputs = [INPUT, normal(31, 2, 9, 6)]
    find = jax.jit(lambda p, x: lora.second_moments(net, p, TARGETS, x))
    logs = [{}, {}]
    for x, log in zip(inputs, logs):
        net(PARAMS, x, log)
    rows = {p: np.concatenate([log[p][0] for log in logs], 1) for p in PARAMS}
    return inputs, [find(PARAMS, x) for x in inputs], rows


def summed(batches):
    return jax.tree.map(jnp.add, *batches[1])


def test_second_moments_are_those_of_the_rows(batches):
    found = summed(batches)
    assert found.keys() == PARAMS.keys()
    for path, x in batches[2].items():
        near(found[path], x.swapaxes(1, 2) @ x, 256)


def test_second_moments_scanned_and_spread():
    """Of a scanned model those of the loop; of a batch on eight devices those of one."""
    apply, params, targets = transformer(False)
    loop = jax.jit(lambda p: lora.second_moments(apply, p, targets, IDS))(params)
    scan, like, scanned_targets = transformer(True)
    layers = jax.tree.map(lambda *x: jnp.stack(x), params["layer_0"], params["layer_1"])
    stacked = {**{k: v for k, v in params.items() if k in like}, "layers": layers}
    find = jax.jit(lambda p, ids: lora.second_moments(scan, p, scanned_targets, ids))
    ids = jnp.tile(IDS, (4, 1))
    found = find(stacked, ids)
    for path, c in found.items():
        want = [loop[path.replace("layers", f"layer_{i}")][0] for i in range(2)]
        near(c, 4 * np.stack(want), 256)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = find(stacked, jax.device_put(ids, NamedSharding(mesh, P("d"))))
    assert_close(spread, found)


def test_what_no_output_depends_on_is_refused():
    fn = lambda p, x: jnp.argmax(x @ p["w"])
    params, zero = of("matrix")
    moments = lora.second_moments(fn, params, zero, normal(1, 4, 6))
    with fails("'w' has a moment that is zero or not finite"):
        lora.eva(zero, moments)
    flipped = lora.second_moments(lambda p, x: x @ p["w"].T, params, zero, normal(1, 4, 5))
    with fails("'w' has a moment that is zero"):  # the geometry says that it is used otherwise
        lora.eva(zero, flipped)
    table = {"w": dataclasses.replace(zero["w"], embedding=True)}
    with fails("'w' is a look-up table"):
        lora.second_moments(lambda p, i: p["w"][i], params, table, jnp.arange(3))


# ---------------------------------------------------------------- EVA
def test_eva_has_the_singular_vectors_of_all_rows(batches):
    zero = lora.init(jax.random.key(0), PARAMS, TARGETS)
    adapters = jax.jit(lambda m: lora.eva(zero, m, rho=1.0))(summed(batches))
    for path, x in batches[2].items():
        node = adapters[path]
        v = np.linalg.svd(x, full_matrices=False)[2][:, :RANK].swapaxes(1, 2)  # (n, in, r)
        overlap = np.abs(np.sum(v * matrices_of_a(node), 1))
        np.testing.assert_allclose(overlap, 1, atol=1e-4)
        assert node.rank == RANK and not node.b.any() and node.scale == zero[path].scale


def test_eva_spends_the_ranks_where_they_explain_most(batches):
    zero = lora.init(jax.random.key(0), PARAMS, TARGETS)
    adapters = lora.eva(zero, summed(batches))
    count = lambda ad: sum(n.rank * n.geometry.sizes(n.shape)[0] for n in flat(ad).values())
    ranks = {p: n.rank for p, n in adapters.items()}
    assert count(adapters) <= count(zero) and len(set(ranks.values())) > 1
    assert max(ranks.values()) == 2 * RANK
    assert_close(lora.merge(PARAMS, adapters), PARAMS)
    shares = {}
    for path, x in batches[2].items():
        s2 = np.linalg.svd(x, compute_uv=False) ** 2
        shares[path] = np.mean(s2 / s2.sum(-1, keepdims=True), 0)
    single = [p for p in PARAMS if p not in ("layers", "experts", "ragged")]
    kept = [shares[p][j] for p in single for j in range(ranks.get(p, 0))]
    left = [shares[p][j] for p in single for j in range(ranks.get(p, 0), 2 * RANK)]
    assert min(kept) > max(left) - 1e-6


@settings(max_examples=30, deadline=None)
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
@pytest.mark.parametrize("name", ["matrix", "experts", "stacked last", "convolution"])
def test_corda(name):
    """Of all updates of rank r, it leaves the least of ‖C·(W − Δ)‖; or has the smallest of it."""
    params, zero = of(name)
    c = np.asarray(moment(name)["w"], np.float64)
    i = c.shape[-1]
    c = c / (np.trace(c, axis1=1, axis2=2)[:, None, None] / i) + 0.01 * np.eye(i)
    w = matrices(zero["w"], params["w"])
    s = np.linalg.svd(c @ w, compute_uv=False)
    norm = lambda x: np.linalg.norm(c @ x, axis=(1, 2))
    big = delta(lora.corda(params, zero, moment(name), mode="instruction")[1]["w"])
    np.testing.assert_allclose(norm(w - big), np.sqrt(np.sum(s[:, RANK:] ** 2, 1)), rtol=1e-4)
    assert (norm(w - big) < 0.95 * norm(w - best(w, RANK))).any()  # PiSSA leaves more
    small = delta(lora.corda(params, zero, moment(name), mode="knowledge")[1]["w"])
    np.testing.assert_allclose(norm(small), np.sqrt(np.sum(s[:, -RANK:] ** 2, 1)), rtol=2e-2)
    scaled = {"w": 1e4 * moment(name)["w"]}
    near(delta(lora.corda(params, zero, scaled, mode="instruction")[1]["w"]), big, 1024)


# ---------------------------------------------------------------- models
@pytest.mark.parametrize("scanned", [False, True])
def test_a_model_begins_as_it_was(scanned):
    apply, params, _ = transformer(scanned)
    config = lora.LoRAConfig(rank=2, targets=["all-linear", "embedding"], full="bias")
    survey = lora.survey(apply, params, IDS)
    zero = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, config, survey))
    linear = {k: v for k, v in flat(zero).items() if isinstance(v, lora.LoRA)}
    zero = lora._paths.nest(linear)  # abstract: values are not read
    base, start = jax.jit(lambda p: lora.pissa(p, zero))(params)
    run = jax.jit(lora.adapt(apply))
    assert_close(run(lora.bind(base, start), IDS), apply(params, IDS), factor=256)
    assert "embedding" in start["embed"] and start["embed"]["embedding"].embedding
    changed = [k for k, v in flat(base).items() if (v != flat(params)[k]).any()]
    assert sorted(changed) == sorted(linear)


def test_other_leaves_and_modules_stay_what_they_are():
    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    x = normal(1, 3, 6)
    config = lora.LoRAConfig(rank=2, targets="kernel", full="bias")
    zero = lora.init(jax.random.key(0), model, config)
    base, start = lora.pissa(model, zero)
    assert isinstance(start["bias"], lora.Full) and (base.kernel[...] != model.kernel[...]).all()
    call = lora.adapt(lambda m, x: m(x))
    assert_close(call(lora.bind(base, start), x), model(x))
    assert isinstance(lora.on_original(start, start)["bias"], lora.Full)
    held = {"w": np.asarray(normal(2, 6, 4))}
    assert isinstance(
        lora.pissa(held, lora.init(jax.random.key(0), held, lora.LoRAConfig(targets="w", rank=2)))[
            0
        ]["w"],
        np.ndarray,
    )


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda p, ad: lora.pissa(p, p), "expected adapters, found"),
        (lambda p, ad: lora.pissa(p, ad, niter=-1), "expected niter >= 0 or None, found -1"),
        (lambda p, ad: lora.pissa({"v": p["w"]}, ad), "'w' is adapted, but the parameters have no"),
        (lambda p, ad: lora.pissa(p, lora.dora(p, ad)), "'w' is a DoRA"),
        (
            lambda p, ad: lora.olora(p, {"w": dataclasses.replace(ad["w"], scale=0.0)}),
            "'w' has scale 0.0",
        ),
        (lambda p, ad: lora.lora_ga(p, ad, {}), "'w' has none"),
        (lambda p, ad: lora.lora_ga(p, ad, {"w": p["w"].T}), r"expected one of \(6, 5\)"),
        (lambda p, ad: lora.lora_ga(p, ad, p, gamma=0.0), "gamma=0.0: expected it above 0"),
        (
            lambda p, ad: lora.lora_ga(p, of("matrix", rank=3)[1], p),
            "'w': 6 singular values are needed, it has 5",
        ),
        (lambda p, ad: lora.eva(ad, {}), "'w' has none"),
        (lambda p, ad: lora.eva(ad, {"w": jnp.ones((1, 5, 5))}), r"expected \(1, 6, 6\)"),
        (lambda p, ad: lora.eva(ad, moment("matrix"), rho=0.5), "rho=0.5: expected a number >= 1"),
        (
            lambda p, ad: jax.jit(lambda m: lora.eva(ad, m))(moment("matrix")),
            "not under jit; pass rho=1",
        ),
        (lambda p, ad: lora.corda(p, ad, moment("matrix"), mode="both"), "mode='both': expected"),
        (lambda p, ad: lora.on_original(ad, {"v": ad["w"]}), "'v' is in one of them alone"),
        (lambda p, ad: lora.low_rank_gradients(loss, p, ad, passes=0), "of at least 1, found None and 0"),
        (lambda p, ad: lora.second_moments(loss, {"w": p["w"].T}, ad), "is no leaf of the parameters"),
        (lambda p, ad: lora.second_moments(loss, p, p), "expected adapters or Targets"),
    ],
)  # fmt: skip
def test_errors(call, match):
    with fails(match):
        call(*of("matrix"))
