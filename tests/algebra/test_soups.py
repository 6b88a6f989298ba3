"""Merging methods, each against a dense reference in float64 that was written from its paper."""

import dataclasses
import functools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from common import assert_close, examples, fails, noisy, tolerance
from hypothesis import given
from hypothesis import strategies as st

import lora_jax as lora
from lora_jax._core.paths import flatten
from lora_jax._nodes.node import is_node
from lora_jax.algebra import _elementwise
from lora_jax.algebra._svd import range_svd

KEY = jax.random.key(0)
PARAMS = {
    "dense": {"kernel": jnp.zeros((12, 20)), "bias": jnp.ones(20)},
    "heads": jnp.zeros((4, 6, 12)),  # (heads, width, in): the input is the last axis
    "experts": jnp.zeros((3, 10, 14)),
    "conv": jnp.zeros((3, 3, 4, 8)),
    "table": jnp.ones((9, 8)),
}
RULES = (
    lora.Rule("heads", in_axes=(2,), out_axes=(0, 1)),
    lora.Rule("experts", in_axes=(1,), out_axes=(2,), batch_axes=(0,)),
    lora.Rule("conv", in_axes=(0, 1, 2), out_axes=(3,)),
)
CONFIG = lora.LoRAConfig(
    rank=3, alpha=6, targets=["dense", "heads", "experts", "conv"], rules=RULES
)
CONFIGS = {
    "all": CONFIG,
    "some": dataclasses.replace(CONFIG, rank=2, targets=["dense", "experts"], rules=RULES[1:2]),
    "full": dataclasses.replace(CONFIG, full="bias", rows={"table": [1, 3]}),
    "other rows": dataclasses.replace(CONFIG, full="bias", rows={"table": [3, 5]}),
}


@functools.cache
def make(seed, kind="all", dtype="float32"):
    config = dataclasses.replace(CONFIGS[kind], dtype=jnp.dtype(dtype))
    build = lambda key: noisy(lora.init(key, PARAMS, config), key=seed, scale=1.0)
    return jax.jit(build)(jax.random.key(seed))


def zoo(*kinds, dtype="float32"):
    """Three trees of other ranks and targets, that disagree in most signs."""
    kinds = kinds or ("all", "some", "all")
    return [make(i, kind, dtype) for i, kind in enumerate(kinds, 1)]


def pick(trees, *names):
    return [{n: tree[n] for n in names if n in tree} for tree in trees]


def dense(tree):
    """{path: the change of the leaf} in float64, by NumPy; rows that are not trained are NaN."""
    out, bases = {}, flatten(PARAMS)
    for path, node in flatten(tree, is_leaf=is_node).items():
        base = np.asarray(bases[path], np.float64)
        arrays = [np.asarray(x, np.float64) for x in jax.tree.leaves(node)]
        if isinstance(node, lora.LoRA):
            g, size = node.geometry, base.shape
            order = (*g.batch_axes, *g.in_axes, *g.out_axes)
            n, i, o = g.sizes(size)
            x = node.scale * arrays[0].reshape(n, i, -1) @ arrays[1].reshape(n, -1, o)
            out[path] = x.reshape([size[d] for d in order]).transpose(np.argsort(order))
        elif isinstance(node, lora.Full):
            out[path] = arrays[0] - base
        else:
            out[path] = np.full(base.shape, np.nan)
            out[path][list(node.index)] = arrays[0] - base[list(node.index)]
    return out


def trim(vector, density, per_weight=False):
    """Keeps the top share by magnitude; NaN, what is not of the vector, as zero."""

    def cut(arrays):
        sizes = np.sort(np.concatenate([np.abs(x[~np.isnan(x)]) for x in arrays]))
        return sizes[-max(1, round(density * len(sizes)))] * (1 - 1e-6)

    out = {}
    for path, x in vector.items():
        weights = x if path == "experts" else x[None]
        limits = [cut([w]) if per_weight else cut(vector.values()) for w in weights]
        kept = [np.where(np.abs(w) >= limit, w, 0) for w, limit in zip(weights, limits)]
        out[path] = np.stack(kept).reshape(x.shape)
    return out


def elect(vectors):
    """The mean, element by element, of those that have the sign of the sum."""
    out = {}
    for path in dict.fromkeys(p for v in vectors for p in v):
        stack = np.nan_to_num(np.stack([v[path] for v in vectors if path in v]))
        agree = (np.sign(stack) == np.sign(stack.sum(0))) & (stack != 0)
        out[path] = np.where(agree, stack, 0).sum(0) / np.maximum(agree.sum(0), 1)
    return out


def add(vectors):
    paths = dict.fromkeys(p for v in vectors for p in v)
    return {p: sum(np.nan_to_num(v[p]) for v in vectors if p in v) for p in paths}


def times(vectors, weights):
    return [{p: w * x for p, x in v.items()} for v, w in zip(vectors, weights)]


def assert_updates(tree, want, dtype=jnp.float32, factor=64):
    got = dense(tree)
    assert got.keys() == want.keys()
    for path, w in want.items():
        atol = tolerance(dtype, factor) * max(np.abs(w).max(), 1)
        np.testing.assert_allclose(np.nan_to_num(got[path]), w, rtol=0, atol=atol, err_msg=path)


def matrices(path, x):
    """(n, in, out) of a leaf."""
    order = {"heads": (2, 0, 1)}.get(path)
    x = x if order is None else x.transpose(order)
    inner = {"heads": 12, "conv": 36, "experts": 10, "dense/kernel": 12}[path]
    return x.reshape(3 if path == "experts" else 1, inner, -1)


@pytest.mark.parametrize(
    "dtype, per_weight",
    [
        ("float32", False),
        ("float32", True),
        pytest.param("bfloat16", False, marks=pytest.mark.slow),
    ],
)
def test_ties(dtype, per_weight):
    """Trim, elect, merge, of several geometries, ranks and targets."""
    trees, weights = zoo(dtype=dtype), [1.0, 0.7, -0.5]
    trees = trees if dtype == "float32" else pick(trees, "heads", "experts")
    vectors = [trim(v, 0.3, per_weight) for v in times([dense(t) for t in trees], weights)]
    got, kept = lora.algebra.ties(trees, weights, density=0.3, per_weight=per_weight, base=PARAMS)
    assert all(type(n) is lora.Full for n in jax.tree.leaves(got, is_leaf=is_node))
    assert_updates(got, elect(vectors))
    assert set(map(float, kept.values())) == {1.0}
    pruned, _ = lora.algebra.prune(trees, weights, density=0.3, per_weight=per_weight, base=PARAMS)
    assert_updates(pruned, add(vectors))


def test_trim_is_of_the_whole_vector_or_of_each_weight():
    """A leaf of large elements takes the whole share, unless each weight has its own."""
    one = make(1)
    one = {**one, "conv": lora.algebra.scaled({"conv": one["conv"]}, 1e4)["conv"]}
    share = lambda tree: {p: np.mean(x != 0) for p, x in dense(tree).items()}
    whole = share(lora.algebra.prune([one], density=0.2, base=PARAMS)[0])
    size = sum(x.size for x in dense(one).values())
    assert whole.pop("conv") == round(0.2 * size) / 288 and set(whole.values()) == {0}
    apart = share(lora.algebra.prune([one], density=0.2, per_weight=True, base=PARAMS)[0])
    assert apart == {"conv": 58 / 288, "dense/kernel": 48 / 240, "heads": 58 / 288, "experts": 0.2}


def test_passes():
    """Subspace iteration comes as close to the best of a rank as its singular values allow."""
    trees = pick(zoo(), "heads", "experts")
    exact, best = lora.algebra.ties(trees, density=0.3, rank=2)
    rough, less = lora.algebra.ties(trees, density=0.3, rank=2, passes=4)
    assert_close(less, best, factor=1024)
    assert_updates(rough, dense(exact), factor=4096)
    stacked = rand.normal(KEY, (2, 60, 70)) ** 3  # wider than the subspace
    u, s, v = range_svd(stacked, 5, 0)
    better = range_svd(stacked, 5, 4)[1]
    most = np.linalg.svd(stacked, compute_uv=False)[:, :5]
    gaps = most - s[:, :5], most - better[:, :5]
    assert s.shape == (2, 15) and gaps[0].min() > 0.5
    assert -1e-4 < gaps[1].min() and gaps[1].max() < gaps[0].min() / 4
    np.testing.assert_allclose(u.mT @ u, np.tile(np.eye(15), (2, 1, 1)), atol=1e-5)
    np.testing.assert_allclose((u * s[:, None]) @ v, u @ (u.mT @ stacked), atol=1e-3)


@given(
    values=st.lists(
        st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
        | st.sampled_from([0.0, 1.0]),
        min_size=20,
        max_size=20,
    ),
    density=st.floats(0.01, 1.0),
)
@examples(12)
def test_the_cut_is_an_element(values, density):
    """The magnitude that is found digit by digit is the one that sorting finds."""
    x = np.array(values, np.float32)
    one = jnp.ones((1,))
    parts = [_elementwise.Part(jnp.asarray(v)[None, :, None], one) for v in (x[:5], x[5:])]
    want = np.sort(np.abs(x))[-max(1, round(density * 20))]
    assert np.asarray(_elementwise._cut(parts, density)) == want
    stack = _elementwise.Part(jnp.asarray(x).reshape(2, 5, 2), jnp.ones((2,)))
    want = np.sort(np.abs(x.reshape(2, 10)), -1)[:, -max(1, round(density * 10))]
    each = np.asarray(_elementwise._cut([stack], density, per_weight=True))
    np.testing.assert_array_equal(each, want)


def test_the_cut_in_float64():
    with jax.enable_x64(True):
        x = rand.normal(KEY, (1, 101, 1), jnp.float64)
        part = _elementwise.Part(x, jnp.ones((1,), jnp.float64))
        assert _elementwise._cut([part], 0.5).item() == np.sort(np.abs(x).ravel())[-50]


def test_equal_magnitudes_are_kept_together():
    node = lora.LoRA(jnp.ones((4, 1)), jnp.array([[2.0, -2.0]]), 1.0, lora.Geometry((0,), (1,)))
    got, _ = lora.algebra.ties([{"w": node}], density=0.25, base={"w": jnp.zeros((4, 2))})
    np.testing.assert_array_equal(got["w"].value, np.tile([2.0, -2.0], (4, 1)))


def test_ties_at_a_rank():
    """The best of a rank, of the dense result; the share that is kept is its singular values'."""
    trees = pick(zoo(), "heads", "experts")
    want = elect([trim(dense(t), 0.3) for t in trees])
    got, kept = lora.algebra.ties(trees, density=0.3, rank=4)
    more, enough = lora.algebra.ties(trees, density=0.3, energy=0.8)
    best = {}
    for path, x in want.items():
        u, s, v = np.linalg.svd(matrices(path, x), full_matrices=False)
        shares = (np.cumsum(s**2, -1) / np.sum(s**2, -1, keepdims=True)).min(0)
        assert float(kept[path]) == pytest.approx(shares[3], abs=1e-5)
        node = flatten(more, is_leaf=is_node)[path]
        assert node.rank == 1 + np.argmax(shares >= 0.8) and float(enough[path]) >= 0.8
        best[path] = (u[..., :4] * s[:, None, :4]) @ v[:, :4]
    for path, x in dense(got).items():
        np.testing.assert_allclose(matrices(path, x), best[path], atol=1e-4)
        node = flatten(got, is_leaf=is_node)[path]
        assert node.rank == 4 and node.scale == 1.0
    assert_updates(
        lora.algebra.ties(trees, density=0.3, rank=40)[0], want, factor=256
    )  # padded: all of it


def test_what_is_trained_in_full():
    """There the task vector is the difference from the base, of rows, of those that a tree has."""
    trees = pick(zoo("full", "some", "other rows"), "dense", "table")
    vectors = [trim(dense(t), 0.4) for t in trees]
    got, _ = lora.algebra.ties(trees, density=0.4, base=PARAMS)
    assert_updates(got, elect(vectors))
    assert got["table"].index == (1, 3, 5)
    low, kept = lora.algebra.ties(trees, density=0.4, rank=2, base=PARAMS)
    kinds = {p: type(n).__name__ for p, n in flatten(low, is_leaf=is_node).items()}
    assert kinds.pop("dense/bias") == "Full" and kinds.pop("table") == "Rows"
    assert set(kinds.values()) == {"LoRA"} and float(kept["table"]) == 1.0
    some = {p: elect(vectors)[p] for p in ("dense/bias", "table")}
    assert_updates({"dense": {"bias": low["dense"]["bias"]}, "table": low["table"]}, some)
    rows = [t for t in pick(trees, "table") if t]  # no low-rank leaf among them
    assert_updates(
        lora.algebra.knots(rows, density=1.0, base=PARAMS), elect([dense(t) for t in rows])
    )
    for call in (lambda: lora.algebra.ties(trees, rank=2), lambda: lora.algebra.knots(trees)):
        with fails(r"(?s)'dense/bias': is a Full.*base=params.*'table': is a Rows"):
            call()


def test_identities():
    one, two = pick([make(1), make(2, "some")], "experts")
    d, nothing = dense(one), {p: 0 * x for p, x in dense(one).items()}
    exact = dict(base=PARAMS)
    assert_updates(lora.algebra.ties([one], density=1, **exact)[0], d)
    assert_updates(lora.algebra.ties([one] * 3, density=1, **exact)[0], d)  # the mean, not the sum
    assert_updates(lora.algebra.ties([one] * 3, density=0.2, **exact)[0], trim(d, 0.2))
    assert_updates(lora.algebra.ties([one], [0.4], density=1, **exact)[0], times([d], [0.4])[0])
    assert_updates(lora.algebra.ties([one, lora.algebra.scaled(one, -1.0)], **exact)[0], nothing)
    both = lora.algebra.combine([one, two], [0.5, -2.0])
    assert_updates(lora.algebra.prune([one, two], [0.5, -2.0], density=1, **exact)[0], dense(both))
    assert_updates(
        lora.algebra.dare(KEY, [one, two], [0.5, -2.0], rate=0.0, **exact)[0], dense(both)
    )
    assert_updates(lora.algebra.knots([one, two], [0.5, -2.0], how="sum"), dense(both), factor=256)
    assert_updates(lora.algebra.knots([one], density=1), d, factor=256)
    assert_updates(lora.algebra.knots([one] * 3, density=1), d, factor=256)
    assert_updates(lora.algebra.knots([one, one], [1.0, -1.0]), nothing)


def test_weights_are_of_the_task_vectors():
    """By leaf and layer too: as if the adapters had been scaled before."""
    one, two = pick([make(1), make(2, "some")], "dense", "experts")
    by_leaf = {p: 0.5 for p in dense(one)} | {"experts": jnp.array([1.0, -2.0, 0.3])}
    for merge in (
        lora.algebra.ties,
        functools.partial(lora.algebra.dare, KEY, how="ties", rate=0.5),
    ):
        got, _ = merge([one, two], [by_leaf, 2.0], base=PARAMS)
        want, _ = merge(
            [lora.algebra.scaled(one, by_leaf), lora.algebra.scaled(two, 2.0)], base=PARAMS
        )
        assert_close(got, want)


def test_dare():
    """Every element is zero or Δ / (1 − p), zeros with a share of p; draws are of path and place."""
    one, two = make(1), make(2, "some")
    got = dense(lora.algebra.dare(KEY, [one], rate=0.75, base=PARAMS)[0])
    zeros = np.concatenate([(x == 0).ravel() for x in got.values()])
    deviation = np.sqrt(0.75 * 0.25 / zeros.size)
    assert abs(zeros.mean() - 0.75) < 5 * deviation
    for path, x in dense(one).items():
        np.testing.assert_allclose(got[path], np.where(got[path] == 0, 0, 4 * x), atol=1e-4)
    dare = functools.partial(lora.algebra.dare, KEY, rate=0.75, base=PARAMS)
    alone = dense(dare([{"dense": one["dense"]}])[0])
    np.testing.assert_array_equal(alone["dense/kernel"], got["dense/kernel"])
    second = dense(dare([lora.algebra.scaled(one, 0.0), two])[0])
    assert_updates(dare([one, two])[0], add([got, second]))
    assert_updates(dare([one, two], how="ties")[0], elect([got, second]))
    same = dare([two, two])[0]["experts"].value  # drawn apart: some fall on one alone
    assert 0 < np.mean(np.isclose(same, 4 * dense(two)["experts"], atol=1e-5)) < 1
    assert (dense(lora.algebra.dare(jax.random.key(9), [one], rate=0.75, base=PARAMS)[0])["conv"]
            != got["conv"]).any()  # fmt: skip


def test_the_mean_of_dare_is_the_update():
    """An element's variance is Δ²·p / (1 − p): the mean of m keys is within six deviations."""
    one, m, p = {"experts": make(1)["experts"]}, 500, 0.9
    drop = lambda key: lora.algebra.dare(key, [one], rate=p, base=PARAMS)[0]["experts"].value
    mean = jax.jit(lambda keys: jnp.mean(jax.lax.map(drop, keys), 0))(jax.random.split(KEY, m))
    delta = dense(one)["experts"]
    bound = 6 * np.abs(delta) * np.sqrt(p / (1 - p) / m)
    assert (np.abs(np.asarray(mean) - delta) <= bound + 1e-5).all()
    assert (np.abs(np.asarray(mean) - delta) > bound / 60).any()


def aligned(trees):
    """KnOTS as the paper has it: (out, in) updates side by side, their SVD; Σ·Vₖᵀ, and U."""
    parts, shared = [{} for _ in trees], {}
    vectors = [dense(t) for t in trees]
    for path in vectors[0]:
        have = [k for k, v in enumerate(vectors) if path in v]
        updates = [matrices(path, vectors[k][path]).swapaxes(1, 2) for k in have]
        ranks = sum(flatten(trees[k], is_leaf=is_node)[path].rank for k in have)
        rank = min(ranks, updates[0].shape[1])
        u, s, v = np.linalg.svd(np.concatenate(updates, 2), full_matrices=False)
        sv = np.split(s[:, :rank, None] * v[:, :rank], len(have), axis=2)
        shared[path] = u[:, :, :rank]
        for k, x in zip(have, sv):
            parts[k][path] = x if path == "experts" else x[0]
    return parts, shared


@pytest.mark.parametrize("per_weight, density", [(False, 1.0), (True, 0.3)])
def test_knots(density, per_weight):
    """Against the SVD of dense updates; nothing of it is dense here, and the rank is Σ rₖ."""
    trees, weights = zoo(), [1.0, 0.7, -0.5]
    parts, shared = aligned(trees)
    parts = times(parts, weights)
    options = dict(density=density, per_weight=per_weight)
    for how, merge in (("ties", elect), ("prune", add)):
        got = lora.algebra.knots(trees, weights, how=how, **options)
        want = merge([trim(v, density, per_weight) for v in parts])
        for path, x in dense(got).items():
            full = (shared[path] @ want[path].reshape(shared[path].shape[0], -1, x.size
                    // shared[path].shape[0] // shared[path].shape[1])).swapaxes(1, 2)  # fmt: skip
            atol = tolerance(jnp.float32, 512) * np.abs(full).max()
            np.testing.assert_allclose(matrices(path, x), full, atol=atol, err_msg=path)
    ranks = {p: n.rank for p, n in flatten(got, is_leaf=is_node).items()}
    assert ranks == {"dense/kernel": 8, "heads": 6, "experts": 8, "conv": 6}
    b = got["experts"].b
    np.testing.assert_allclose(b @ b.mT, np.tile(np.eye(8), (3, 1, 1)), atol=1e-5)


def test_knots_drops():
    """What an adapter has in the shared directions; the mean over keys is the sum of updates."""
    two = [{"dense": {"kernel": make(i)["dense"]["kernel"]}} for i in (1, 2)]
    want = dense(lora.algebra.combine(two))["dense/kernel"]
    drop = lambda key: lora.algebra.knots(two, how="dare", rate=0.5, key=key)["dense"]["kernel"]
    product = lambda node: node.a @ node.b
    each = jax.jit(lambda keys: jax.lax.map(lambda k: product(drop(k)), keys))
    each = np.asarray(each(jax.random.split(KEY, 400)))
    error = np.abs(each.mean(0) - want)
    assert (error <= 6 * each.std(0) / 20).all() and error.max() > 0
    elected = lora.algebra.knots(two, how="dare_ties", rate=0.5, key=KEY)["dense"]["kernel"]
    assert 0.2 < np.mean(np.asarray(elected.a) == 0) < 0.35  # a quarter is dropped of both


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ties", "prune", "dare", "knots"])
def test_jit(name):
    """Under jit as without; traced weights and keys."""
    trees = pick(zoo("full", "some", "other rows"), "table", "experts")

    def merge(trees, weights, key, base):
        if name == "knots":
            return lora.algebra.knots(trees, weights, density=0.3, base=base)
        if name == "dare":
            return lora.algebra.dare(key, trees, weights, rate=0.5, how="ties", base=base)
        return getattr(lora.algebra, name)(trees, weights, density=0.3, rank=3, base=base)

    args = (trees, jnp.array([1.0, 0.7, -0.5]), jax.random.PRNGKey(3), PARAMS)
    got, want = jax.jit(merge)(*args), merge(*args)
    if name != "knots":
        (got, kept), (want, expected) = got, want
        assert_close(kept, expected)
    assert_updates(got, {p: np.nan_to_num(x) for p, x in dense(want).items()}, factor=512)


def test_weights_can_be_learned():
    """The gradient of a weight is ⟨∂loss/∂W, what is left of Δ⟩, and no SVD is differentiated."""
    trees = pick(zoo(), "experts")
    left = [dense(lora.algebra.prune([t], density=0.3, base=PARAMS)[0]) for t in trees]

    def loss(weights, merge):
        return sum(
            jnp.sum(n.value**2) / 2 for n in jax.tree.leaves(merge(weights), is_leaf=is_node)
        )

    prune = lambda w: lora.algebra.prune(trees, w, density=0.3, base=PARAMS)[0]
    w = jnp.array([0.5, -1.0, 2.0])
    total = add(times(left, w))
    want = [sum(np.sum(total[p] * x) for p, x in v.items()) for v in left]
    grads = jax.jit(jax.grad(lambda w: loss(w, prune)))(w)
    np.testing.assert_allclose(grads, want, rtol=1e-4)
    dense_of = lambda w: lora.merge(PARAMS, lora.algebra.knots([trees[0]] * 2, w, how="sum"))
    grads = jax.jit(jax.grad(lambda w: sum(jnp.sum(x**2) for x in jax.tree.leaves(dense_of(w)))))
    norm = sum(np.sum(x**2) for x in dense(trees[0]).values())
    np.testing.assert_allclose(grads(jnp.array([1.0, 2.0])), [6 * norm] * 2, rtol=1e-4)


def test_one_leaf_at_a_time(monkeypatch):
    """At most one update is dense at any moment."""
    alive, most = [], []
    whole = _elementwise.vector

    def counting(part):
        out = whole(part)
        if not isinstance(out, jax.core.Tracer):
            alive.append(weakref.ref(out))
            most.append(sum(ref() is not None for ref in alive))
        return out

    monkeypatch.setattr(_elementwise, "vector", counting)
    lora.algebra.ties(zoo(), density=0.3, rank=2)
    assert max(most) == 3 and len(most) == 3 * (4 + 2 + 4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Other(lora.LoRA):
    """A node that is more than its product."""


def other():
    node = make(1)["heads"]
    fields = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    return {"deep": {"heads": Other(**fields)}}


HUGE = {
    "w": lora.LoRA(
        jax.ShapeDtypeStruct((2**16, 1), jnp.float32),
        jax.ShapeDtypeStruct((1, 2**15), jnp.float32),
        1.0,
        lora.Geometry((0,), (1,)),
    )
}


@pytest.mark.parametrize("call, match", [
    (lambda: lora.algebra.ties([make(1)]), r"of full rank; say what is wanted: rank=16 or energy=0.9.*base=params"),
    (lambda: lora.algebra.ties([make(1)], rank=2, energy=0.5), r"found rank=2, energy=0.5: lora.algebra.ties\(.*rank=8\) or"),
    (lambda: lora.algebra.ties(None, rank=2), "expected several adapters, found NoneType"),
    (lambda: lora.algebra.ties([make(1)], 0.5, rank=2), "expected a list of weights, found float"),
    (lambda: lora.algebra.prune([make(1)], [None], density=0.5, rank=2), "weights\\[0\\] is None"),
    (lambda: lora.algebra.ties([make(1)], rank=2, per_weight=3), "per_weight=3: expected True or False"),
    (lambda: lora.algebra.dare(KEY, [make(1)], how=["sum"], rank=2), r"how=\['sum'\]: expected one of"),
    (lambda: lora.algebra.dare(jax.random.split(KEY), [make(1)], rank=2), r"found \(2,\) keys: lora.algebra.dare\(keys\[0\], \["),
    (lambda: lora.algebra.prune([make(1)], density=0.5, rank=0), "found rank=0"),
    (lambda: lora.algebra.dare(KEY, [make(1)], energy=1.5), "energy=1.5"),
    (lambda: lora.algebra.ties([make(1)], rank=2.5), "found rank=2.5"),
    (lambda: lora.algebra.ties([make(1)], rank=2, passes=1.5), "passes=1.5"),
    (lambda: lora.algebra.ties([make(1)], rank=2, density="1"), "density=1: expected the share"),
    (lambda: lora.algebra.ties([make(1)], rank=2, passes=-1), "passes=-1: expected a number >= 0"),
    (lambda: lora.algebra.ties([make(1)], base=PARAMS, passes=2), "passes=2: .* found rank=None"),
    (lambda: lora.algebra.ties([make(1)], density=0.0, rank=2), r"density=0.0: expected the share to keep, in \(0, 1\]"),
    (lambda: lora.algebra.prune([make(1)], density=1.1, rank=2), "density=1.1"),
    (lambda: lora.algebra.knots([make(1)], density=-1), "density=-1"),
    (lambda: lora.algebra.dare(KEY, [make(1)], rate=1.0, rank=2), r"rate=1.0: expected the probability .* in \[0, 1\)"),
    (lambda: lora.algebra.dare(KEY, [make(1)], rate=-0.1, rank=2), "rate=-0.1"),
    (lambda: lora.algebra.dare(KEY, [make(1)], how="mean", rank=2), "how='mean': expected one of 'sum', 'ties'"),
    (lambda: lora.algebra.dare(0, [make(1)], rank=2), "expected a PRNG key, found int"),
    (lambda: lora.algebra.knots([make(1)], how="mean"), "how='mean': expected one of 'sum', 'prune', 'ties'"),
    (lambda: lora.algebra.knots([make(1)], how="dare"), "how='dare' draws at random: .*key="),
    (lambda: lora.algebra.ties([], rank=2), "expected one weight for each of 0 adapters, found 0"),
    (lambda: lora.algebra.ties([make(1)], [1.0, 2.0], rank=2), "expected one weight for each of 1 adapters, found 2"),
    (lambda: lora.algebra.ties([{}], rank=2), "found an empty tree"),
    (lambda: lora.algebra.ties([{}, make(1)], rank=2), "found an empty tree"),
    (lambda: lora.algebra.prune([make(1), {}], density=0.5, rank=2), "found an empty tree"),
    (lambda: lora.algebra.dare(KEY, [make(1), {}], rank=2), "found an empty tree"),
    (lambda: lora.algebra.knots([{}, make(1)]), "found an empty tree"),
    (lambda: lora.algebra.ties(make(1), rank=2), r"expected several adapters, found one tree: lora.algebra.ties\(\[first"),
    (lambda: lora.algebra.ties([make(1), PARAMS], rank=2), "(?s)'conv' is a ArrayImpl; expected a LoRA, Full or Rows.*'table'"),
    (lambda: lora.algebra.knots([other()]), "'deep/heads' is a Other; expected a LoRA, Full or Rows"),
    (lambda: lora.algebra.prune([other()], density=0.5, rank=2), "'deep/heads' is a Other"),
    (lambda: lora.algebra.ties([make(1)], [{"heads": 1.0}], rank=2), "the weights have none for 'conv'"),
    (lambda: lora.algebra.ties([make(1)], [jnp.ones(3)], rank=2), r"'conv': a weight of shape \(3,\); expected a number"),
    (lambda: lora.algebra.ties([{"w": make(1)["heads"]}, {"w": make(1)["experts"]}], rank=2), r"'w': found LoRA of \(4, 6, 12\), LoRA of \(3, 10, 14\)"),
    (lambda: lora.algebra.ties([{"w": make(1)["heads"]}], base=PARAMS), r"'w': the base has no such leaf of \(4, 6, 12\)"),
    (lambda: lora.algebra.ties([{"heads": make(1)["conv"]}], rank=2, base=PARAMS), r"'heads': of \(3, 3, 4, 8\), but the base has \(4, 6, 12\)"),
    (lambda: jax.jit(lambda t: lora.algebra.ties([t], energy=0.5))(make(1)), "not under jit; pass rank="),
    (lambda: jax.eval_shape(lambda t: lora.algebra.ties([t], rank=1), HUGE), "2,147,483,648 elements .* merge outside of jit"),
])  # fmt: skip
def test_errors(call, match):
    with fails(match):
        call()


@pytest.mark.slow
def test_more_elements_than_int32_counts(monkeypatch):
    """A leaf is counted in parts, each of which fits, whatever its elements: all may be zeros."""
    found = jax.eval_shape(
        lambda x: _elementwise._digits(x, jnp.zeros(1, "uint32"), np.int32(16)),
        jax.ShapeDtypeStruct((1, 2**17, 2**15), jnp.float32),
    )
    assert found.shape == (1, 3, 2**16)
    x = rand.normal(KEY, (2, 7, 13))
    one = {"w": lora.Full(x)}
    want = lora.algebra.prune([one], density=0.3, base={"w": jnp.zeros(x.shape)})[0]["w"].value
    monkeypatch.setattr(_elementwise, "COUNTED", 50)
    jax.clear_caches()
    got = lora.algebra.prune([one], density=0.3, base={"w": jnp.zeros(x.shape)})[0]["w"].value
    assert jnp.array_equal(got, want) and int((got != 0).sum()) == round(0.3 * x.size)


def test_a_number_in_full():
    base, one = {"s": jnp.float32(1.0)}, {"s": lora.Full(jnp.float32(3.0))}
    assert lora.algebra.ties([one], [0.5], base=base)[0]["s"].value == 2.0
