"""Sums, ranks and extractions of updates, each against dense matrices in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rand
from common import assert_close, examples, fails, noisy, tolerance
from hypothesis import given
from hypothesis import strategies as st

import lora_jax as lora
from lora_jax._core.paths import flatten
from lora_jax._nodes.node import is_node

KEY = jax.random.key(0)
PARAMS = {
    "dense": {"kernel": jnp.zeros((12, 20)), "bias": jnp.ones(20)},
    "heads": jnp.zeros((12, 4, 6)),
    "layers": jnp.zeros((3, 10, 14)),
    "table": jnp.ones((9, 8)),
}
RULES = [
    lora.Rule("heads", in_axes=(0,), out_axes=(1, 2)),
    lora.Rule("layers", in_axes=(1,), out_axes=(2,), batch_axes=(0,)),
]
CONFIG = lora.LoRAConfig(rank=3, alpha=6, targets=["dense", "heads", "layers"], rules=RULES)


def make(seed, config=CONFIG):
    return noisy(lora.init(jax.random.key(seed), PARAMS, config), key=seed, scale=1.0)


def updates(adapters):
    """{path: Δ} in float64, by NumPy."""
    out = {}
    for path, node in flatten(adapters, is_leaf=is_node).items():
        assert isinstance(node, lora.LoRA)
        n, i, o = node.geometry.sizes(node.shape)
        a, b = (np.asarray(x, np.float64) for x in (node.a, node.b))
        out[path] = node.scale * a.reshape(n, i, -1) @ b.reshape(n, -1, o)
    return out


def assert_updates(adapters, want, factor=64):
    got = updates(adapters)
    assert got.keys() == want.keys()
    for path, w in want.items():
        np.testing.assert_allclose(
            got[path], w, rtol=0, atol=tolerance(jnp.float32, factor) * np.abs(w).max()
        )


def test_combine_is_a_sum_of_updates():
    """Exactly, with other ranks, scales and targets; and not the product of sums."""
    wide = dataclasses.replace(CONFIG, rank=5, targets=["dense", "heads"], rules=RULES[:1])
    one, two = make(1), make(2, wide)
    mixed = lora.algebra.combine([one, two], [0.5, -2.0])
    a, b = updates(one), updates(two)
    assert_updates(mixed, {p: 0.5 * a[p] - 2 * b.get(p, 0) for p in a})
    assert mixed["dense"]["kernel"].rank == 8 and mixed["layers"].rank == 3
    node = make(1)["dense"]["kernel"]
    other = make(3)["dense"]["kernel"]
    wrong = dataclasses.replace(node, a=node.a + other.a, b=node.b + other.b)
    right = updates(lora.algebra.combine([{"w": node}, {"w": other}]))["w"]
    assert np.linalg.norm(updates({"w": wrong})["w"] - right) > 0.5 * np.linalg.norm(right)


def test_scaled():
    one = make(1)
    assert_updates(lora.algebra.scaled(one, -1.0), {p: -d for p, d in updates(one).items()})
    for path, nothing in updates(
        lora.algebra.combine([one, lora.algebra.scaled(one, -1.0)])
    ).items():
        assert np.abs(nothing).max() < 1e-6 * np.abs(updates(one)[path]).max()


def test_weights_by_leaf_and_layer_can_be_learned():
    """The gradient of a weight is ⟨∂loss/∂W, Δ⟩; of a stack, layer by layer."""
    one = {"layers": make(1)["layers"]}
    target = rand.normal(KEY, (3, 10, 14))

    def loss(weights):
        merged = lora.merge(PARAMS, lora.algebra.combine([one], [{"layers": weights}]))["layers"]
        return jnp.sum((merged - target) ** 2)

    w = jnp.array([0.5, -1.0, 2.0])
    delta = updates(one)["layers"]
    grads = jax.jit(jax.grad(loss))(w)
    want = [2 * np.sum((w[i] * delta[i] - np.asarray(target[i])) * delta[i]) for i in range(3)]
    np.testing.assert_allclose(grads, want, rtol=1e-4)


def test_a_mixture_is_learned():
    """LoraHub, LoRA Soups: through combine, bind and adapt, gradients of the weights alone find
    those that made the data, for each leaf and layer."""
    draw = lambda i, *shape: rand.normal(jax.random.fold_in(KEY, i), shape) / 3
    params = {"layers": draw(0, 3, 8, 8), "head": draw(1, 8, 5)}
    x = draw(2, 64, 8)

    def fn(p, x):
        x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["layers"])
        return x @ p["head"]

    survey = lora.survey(fn, params, x)
    config = lora.LoRAConfig(rank=2, targets=["layers", "head"])
    init = lambda i: noisy(lora.init(jax.random.key(i), params, config, survey), key=i, scale=0.3)
    trees, apply = [init(1), init(2)], lora.adapt(fn)
    known = [
        {"layers": jnp.array([0.7, -0.4, 1.2]), "head": jnp.array(0.5)},
        {"layers": jnp.array([0.3, 0.9, -0.6]), "head": jnp.array(-0.8)},
    ]
    y = fn(lora.merge(params, lora.algebra.combine(trees, known)), x)

    def loss(weights):
        return jnp.mean(
            (apply(lora.bind(params, lora.algebra.combine(trees, weights)), x) - y) ** 2
        )

    tx, start = optax.adam(0.05), jax.tree.map(jnp.zeros_like, known)

    def step(carry, _):
        weights, state = carry
        updates, state = tx.update(jax.grad(loss)(weights), state)
        return (optax.apply_updates(weights, updates), state), None

    steps = jax.jit(lambda carry: jax.lax.scan(step, carry, length=600)[0])
    with jax.numpy_dtype_promotion("standard"):  # optax
        found, _ = steps((start, tx.init(start)))
    assert loss(start) > 0.01
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(known)):
        np.testing.assert_allclose(got, want, atol=1e-3)


def test_combine_what_is_trained_in_full():
    """There the update is the difference from the base; rows that one of them has alone stay."""
    config = lora.LoRAConfig(
        rank=2, targets="dense/kernel", full="dense/bias", rows={"table": [1, 3]}
    )
    one = make(1, config)
    two = make(2, dataclasses.replace(config, rows={"table": [3, 5]}))
    got = lora.merge(PARAMS, lora.algebra.combine([one, two], [0.5, 2.0], base=PARAMS))
    a, b = lora.merge(PARAMS, one), lora.merge(PARAMS, two)
    want = jax.tree.map(lambda w, x, y: w + 0.5 * (x - w) + 2.0 * (y - w), PARAMS, a, b)
    assert_close(got, want)
    with fails(r"(?s)'dense/bias': is a Full.*base=params.*'table': is a Rows"):
        lora.algebra.combine([one, two])
    with fails(r"'table': of \(.*\), but the base has \("):
        lora.algebra.combine([one, two], base=PARAMS | {"table": PARAMS["table"][:, 1:]})
    with fails(r"'table': of \(.*\), but the base has a str there"):
        lora.algebra.combine([one, two], base=PARAMS | {"table": "table"})


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 7])
def test_resize_is_the_best_of_its_rank(rank):
    one = make(1)
    want = {}
    for path, d in updates(one).items():
        u, s, v = np.linalg.svd(d, full_matrices=False)
        want[path] = (u[:, :, :rank] * s[:, None, :rank]) @ v[:, :rank]
    got = lora.algebra.resize(one, rank)
    assert_updates(got, want)
    assert {n.rank for n in jax.tree.leaves(got, is_leaf=is_node)} == {rank}
    assert_updates(jax.jit(lambda ad: lora.algebra.resize(ad, rank))(one), want)


def test_resize_by_energy():
    """The smallest rank that keeps the share, in each weight of a stack."""
    one = make(1)
    for share in (0.5, 0.9, 0.999, 1.0):
        small = lora.algebra.resize(one, energy=share)
        for path, d in updates(one).items():
            s = np.linalg.svd(d, compute_uv=False)
            kept = np.cumsum(s**2, -1) / np.sum(s**2, -1, keepdims=True)
            rank = next(r for r in range(1, 4) if (kept[:, r - 1] >= share - 1e-6).all())
            assert flatten(small, is_leaf=is_node)[path].rank == rank
    assert lora.algebra.resize(lora.algebra.combine([one, one]), energy=1.0)["layers"].rank == 3


def test_extract():
    """An update of low rank is found again; one that is not, as well as its singular values say."""
    one = make(1)
    tuned = lora.merge(PARAMS, one)
    targets = lora.select(PARAMS, CONFIG)
    got, kept = lora.algebra.extract(PARAMS, tuned, targets)
    targets.check(got)
    assert_updates(got, updates(one), 256)
    assert set(kept.values()) == {1.0}
    full = jax.tree.map(lambda x: x + rand.normal(KEY, x.shape), PARAMS)
    got, kept = lora.algebra.extract(PARAMS, full, targets, drop=True)
    s = np.linalg.svd(
        np.asarray(full["dense"]["kernel"] - PARAMS["dense"]["kernel"]), compute_uv=False
    )
    assert kept["dense/kernel"] == pytest.approx(np.sum(s[:3] ** 2) / np.sum(s**2), abs=1e-5)
    more, kept = lora.algebra.extract(PARAMS, full, targets, energy=0.9, drop=True)
    assert all(0.9 - 1e-5 <= k < 1 for k in kept.values()) and more["dense"]["kernel"].rank > 3
    assert_updates(
        lora.algebra.extract(PARAMS, PARAMS, targets)[0],
        {p: 0 * d for p, d in updates(one).items()},
    )


@pytest.mark.slow
def test_extract_also_what_is_trained_in_full():
    config = dataclasses.replace(CONFIG, full="dense/bias", rows={"table": [2]})
    one = make(1, config)
    tuned = lora.merge(PARAMS, one)
    got, _ = lora.algebra.extract(PARAMS, tuned, lora.select(PARAMS, config))
    assert_close(lora.merge(PARAMS, got), tuned, factor=256)
    with fails(r"(?s)changed, and are no targets:.*'dense/bias'.*'table'.*drop=True"):
        lora.algebra.extract(PARAMS, tuned, lora.select(PARAMS, CONFIG))


def test_extract_of_a_leaf_that_is_nan_before_and_after():
    """What did not change is not lost, whatever it is."""
    nan = {"w": jnp.eye(4), "u": jnp.array([1.0, jnp.nan])}
    targets = lora.select(nan, lora.LoRAConfig(rank=1, targets="w"))
    assert lora.algebra.extract(nan, nan, targets)[1] == {"w": 1.0}
    with fails("(?s)these changed, and are no targets:.*'u'"):
        lora.algebra.extract(nan, nan | {"u": jnp.array([jnp.nan, jnp.nan])}, targets)


def test_compare():
    """Norms, cosines and angles against dense matrices."""
    one, two = make(1), make(2, dataclasses.replace(CONFIG, rank=5))
    found = lora.algebra.compare(one, two)
    a, b = updates(one), updates(two)
    for path, leaf in found.leaves.items():
        norm = lambda d: np.linalg.norm(d, axis=(1, 2))
        np.testing.assert_allclose(leaf.norms, [norm(a[path]), norm(b[path])], rtol=1e-5)
        cosine = np.sum(a[path] * b[path], (1, 2)) / norm(a[path]) / norm(b[path])
        np.testing.assert_allclose(leaf.cosine, cosine, atol=1e-5)
        for n in range(len(a[path])):
            for angles, x, y in ((leaf.input_angles, a[path][n], b[path][n]),
                                 (leaf.output_angles, a[path][n].T, b[path][n].T)):  # fmt: skip
                q, p = (np.linalg.svd(m)[0][:, :r] for m, r in ((x, 3), (y, 5)))
                want = np.degrees(
                    np.arccos(np.clip(np.linalg.svd(q.T @ p, compute_uv=False), -1, 1))
                )
                np.testing.assert_allclose(angles[n], want, atol=0.05)
    same = lora.algebra.compare(one, lora.algebra.scaled(one, 3.0)).leaves["layers"]
    np.testing.assert_allclose(same.cosine, 1, atol=1e-5)
    assert np.abs(same.input_angles).max() < 1e-3
    zero = lora.algebra.compare(one, lora.init(KEY, PARAMS, CONFIG)).leaves["layers"]
    assert np.all(zero.cosine == 0) and np.all(zero.norms[1] == 0)
    some = lora.algebra.compare(one, {"dense": one["dense"]})
    assert some.first == ("heads", "layers") and "in the first alone: heads, layers" in str(some)
    assert "dense/kernel" in str(some) and "1" in str(some)


@pytest.mark.slow
def test_compare_only_directions_that_exist():
    """A zero update has none, one of cancelling factors either; of a stack, each weight has its
    own; angles are those of the space, whatever the rank of the factors."""
    g = lora.Geometry((1,), (2,), (0,))
    x, y = (np.linalg.qr(np.random.default_rng(i).normal(size=(9, 6)))[0] for i in (0, 1))

    def node(*pairs):
        """A weight for each pair of columns of x and y, of factors of rank 4."""
        wide = lambda m: np.pad(m, [(0, 0), (0, 4 - m.shape[1])])
        a = np.stack([wide(x[:, list(p)]) for p, _ in pairs])
        b = np.stack([wide(y[:, list(q)]).T for _, q in pairs])
        return {"w": lora.LoRA(jnp.float32(a), jnp.float32(b), 1.0, g)}

    one = node(((0, 1), (0, 1)), ((0, 1, 2), (0, 1, 2)), ((), ()))
    two = node(((1, 2), (0, 1)), ((2,), (3,)), ((0,), (0,)))
    for first, second in ((one, two), (two, one)):
        found = lora.algebra.compare(first, second)
        leaf, nan = found.leaves["w"], np.nan
        want = [[0, 90, nan, nan], [0, nan, nan, nan], [nan] * 4]
        np.testing.assert_allclose(leaf.input_angles, want, atol=1e-3)
        want = [[0, 0, nan, nan], [90, nan, nan, nan], [nan] * 4]
        np.testing.assert_allclose(leaf.output_angles, want, atol=1e-3)
        assert "0.0° to 45.0°" in str(found) and "45.0° to 45.0°" in str(found)
    # [u, u]·[v; −v] is rounding.
    u, v = x[None, :, :1] * 1.1, y[None, :, :1].mT * 0.3
    a, b = np.concatenate([u, u], -1), np.concatenate([v, -v], 1)
    none = {"w": lora.LoRA(jnp.float32(a), jnp.float32(b), 1.0, g)}
    found = lora.algebra.compare(none, node(((0,), (0,))))
    assert np.isnan(found.leaves["w"].input_angles).all() and "none" in str(found)


@given(data=st.data())
@examples(5)
def test_any_combination(data):
    """Σ w·Δ for any ranks, dtypes and weights; resized to its own rank it is the same."""
    n = data.draw(st.integers(1, 4))
    ranks = [data.draw(st.integers(1, 4)) for _ in range(n)]
    weights = [data.draw(st.sampled_from([-2.0, -0.5, 0.0, 1.0, 3.0])) for _ in range(n)]
    trees = [make(i, dataclasses.replace(CONFIG, rank=r)) for i, r in enumerate(ranks)]
    mixed = lora.algebra.combine(trees, weights)
    deltas = [updates(t) for t in trees]
    want = {p: sum(w * d[p] for w, d in zip(weights, deltas)) for p in deltas[0]}
    largest = {p: max(np.abs(w * d[p]).max() for w, d in zip(weights, deltas)) for p in want}
    for tree in (mixed, lora.algebra.resize(mixed, sum(ranks))):
        for path, got in updates(tree).items():
            np.testing.assert_allclose(got, want[path], rtol=0, atol=1e-4 * max(largest[path], 1))


def uneven():
    return lora.LoRA(jnp.ones((4, 3)), jnp.ones((2, 2)), 1.0, lora.Geometry((0,), (1,)))


def test_weights_of_any_library_and_kind():
    """One weight means the same however it is written; adapters of NumPy are taken as well."""
    trees = [make(1), make(2)]
    want = lora.algebra.combine(trees, [2.0, -1.0])
    numpy = jax.tree.map(lambda x: np.asarray(x, np.float64), trees)
    for some, two in ((trees, (np.int8(2), jnp.float32(-1))), (trees, np.array([2.0, -1.0])),
                       (trees, iter([2, np.array(-1.0)])), (numpy, (jnp.int32(2), -1))):  # fmt: skip
        for one, other in zip(
            jax.tree.leaves(lora.algebra.combine(some, two)), jax.tree.leaves(want)
        ):
            np.testing.assert_allclose(one, other, rtol=1e-6)


def test_an_update_without_factors():
    none = {"w": lora.LoRA(jnp.ones((4, 0)), jnp.ones((0, 2)), 1.0, lora.Geometry((0,), (1,)))}
    assert lora.algebra.resize(none, energy=0.5)["w"].rank == 1
    assert "none" in str(lora.algebra.compare(none, none))


def test_complex_adapters():
    """Norms and cosines are those of the real and imaginary parts; what needs an order is refused."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=(*shape, 2)) @ [1, 1j], "complex64")
    one, two = ({"w": lora.LoRA(draw(6, 2), draw(2, 5), 1.5, lora.Geometry((0,), (1,)))}
                for _ in range(2))  # fmt: skip
    base, (x, y) = {"w": draw(6, 5)}, (lora.algebra.combine([n])["w"] for n in (one, two))
    x, y = (np.asarray(n.a, "complex128") @ np.asarray(n.b, "complex128") for n in (x, y))
    size = np.linalg.norm
    found = lora.algebra.compare(one, two)
    assert "w" in str(found)
    want = np.vdot(x, y).real / size(x) / size(y)
    np.testing.assert_allclose(found.leaves["w"].cosine, [want], atol=1e-5)
    same = lora.algebra.compare(one, lora.algebra.scaled(one, -2.0)).leaves["w"]
    np.testing.assert_allclose(same.cosine, [-1], atol=1e-5)
    np.testing.assert_allclose([same.input_angles, same.output_angles], 0, atol=1e-3)
    moved = lora.algebra.learned(base, one).leaves["w"]
    np.testing.assert_allclose(
        [moved.norm, moved.base_norm], [[size(x)], [size(base["w"])]], rtol=1e-5
    )
    full = lora.algebra.learned(base, {"w": lora.Full(jnp.ones((6, 5)))}).leaves["w"]
    np.testing.assert_allclose(full.norm, [size(1 - base["w"])], rtol=1e-5)
    for call in (
        lambda: lora.algebra.ties([one, two], rank=2),
        lambda: lora.algebra.prune([one, two], density=0.5, base=base),
        lambda: lora.algebra.dare(KEY, [one, two], rank=2),
        lambda: lora.algebra.knots([one, two]),
    ):
        with fails("'w': is complex; its sum is lora.algebra.combine"):
            call()


@pytest.mark.parametrize("stack", [(0,), (2, 0)])
def test_a_stack_of_no_weights(stack):
    """Such as the experts of a device that has none: nothing to keep, to count or to print."""
    n = len(stack)
    geometry = lora.Geometry((n,), (n + 1,), tuple(range(n)))
    node = lora.LoRA(jnp.ones((*stack, 4, 2)), jnp.ones((*stack, 2, 3)), 1.0, geometry)
    one = {"experts": node}
    assert lora.algebra.resize(one, energy=0.9)["experts"].rank == 1
    for how in (dict(rank=2), dict(energy=0.9)):
        merged, kept = lora.algebra.ties([one, one], **how)
        assert merged["experts"].shape == node.shape and kept["experts"] == 1
    assert "experts" in str(lora.algebra.compare(one, one))
    found = lora.algebra.learned({"experts": jnp.ones(node.shape)}, one)
    assert "experts" in str(found)
    found.plot()


@pytest.mark.parametrize("call, match", [
    (lambda: lora.algebra.combine([]), "expected one weight for each of 0 adapters, found 0"),
    (lambda: lora.algebra.combine([make(1)], [1.0, 2.0]), "expected one weight for each of 1 adapters, found 2"),
    (lambda: lora.algebra.combine([PARAMS]), "expected adapters, as from lora.init, found ArrayImpl"),
    (lambda: lora.algebra.combine([make(1)], [{"dense/kernel": 1.0}]), "the weights have none for 'heads'; there are dense/kernel"),
    (lambda: lora.algebra.combine(make(1)), r"expected several adapters, found one tree: lora.algebra.combine\(\[first"),
    (lambda: lora.algebra.combine(5), "expected several adapters, found int"),
    (lambda: lora.algebra.combine([make(1)], 1.0), "expected a list of weights, found float"),
    (lambda: lora.algebra.combine([make(1)], ["1"]), "weights\\[0\\] is '1': expected a finite number"),
    (lambda: lora.algebra.combine([make(1)] * 3, [None, 1j, 10**400]), r"(?s)weights\[0\] is None.*\[1\] is 1j.*\[2\] is 1000"),
    (lambda: lora.algebra.combine([make(1)], [dict.fromkeys(make(1), 1.0) | {"dens": 1.0}]), "weights\\[0\\] has one for 'dens', which no adapter has"),
    # (rank,) would multiply the rows of B.
    (lambda: lora.algebra.combine([{"w": make(1)["dense"]["kernel"]}], [jnp.ones(make(1)["dense"]["kernel"].rank)]), "'w': a weight of shape .*expected a number"),
    (lambda: lora.algebra.resize({"w": uneven()}, 1), r"'w': the leaf has shape \(4, 2\); expected b of \(3, 2\), found \(2, 2\)"),
    (lambda: lora.algebra.resize(jax.eval_shape(lambda: make(1)), 1), "shapes and no values"),
    (lambda: jax.jit(lambda p: lora.algebra.extract(p, p, lora.select(PARAMS, CONFIG)))(PARAMS), "found traced ones"),
    (lambda: lora.algebra.extract(PARAMS, PARAMS, CONFIG), "expected Targets, found LoRAConfig"),
    (lambda: lora.algebra.extract({}, {}, lora.select(PARAMS, CONFIG)), "these targets do not fit the parameters"),
    (lambda: lora.algebra.combine([{"w": make(1)["dense"]["kernel"]}, {"w": make(1)["layers"]}]), r"'w': found LoRA of \(12, 20\), LoRA of \(3, 10, 14\)"),
    (lambda: lora.algebra.resize(make(1)), "expected a rank >= 1 or an energy in .*found rank=None, energy=None"),
    (lambda: lora.algebra.resize(make(1), 2, energy=0.5), "found rank=2, energy=0.5"),
    (lambda: lora.algebra.resize(make(1), 0), "found rank=0"),
    (lambda: lora.algebra.resize(make(1), 2.5), "found rank=2.5"),
    (lambda: lora.algebra.resize(make(1), energy=np.nan), "energy=nan"),
    (lambda: lora.algebra.resize(make(1), energy=1.5), "energy=1.5"),
    (lambda: jax.jit(lambda ad: lora.algebra.resize(ad, energy=0.5))(make(1)), "depends on values: not under jit; pass rank="),
    (lambda: lora.algebra.extract(PARAMS, {"w": 1}, lora.select(PARAMS, CONFIG)), "(?s)not one model before and after:.*'dense/bias' is in one tree alone"),
    (lambda: lora.algebra.extract(PARAMS, PARAMS, lora.select(PARAMS, CONFIG), energy=0.0), "energy=0.0: expected a share"),
    (lambda: lora.algebra.compare({"w": make(1)["dense"]["kernel"]}, {"w": make(1)["layers"]}), r"'w': \(12, 20\) with Geometry"),
])  # fmt: skip
def test_errors(call, match):
    with fails(match):
        call()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@given(st.lists(st.sampled_from([1.0, -1.0, 0.0, 0.5, -4.0, 0.3, 1 / 3, 1.7]), min_size=1, max_size=3),
       st.sampled_from([1.0, 0.25, 1.5]), st.integers(0, 99))  # fmt: skip
def test_combine_rounds_once(dtype, weights, scale, seed):
    """In any type: w·s·B is exact, or in fp32 and rounded once there; A is as it was."""
    g = lora.Geometry((0,), (1,))
    normal = lambda i, shape: rand.normal(jax.random.key(seed + i), shape).astype(dtype)
    nodes = [
        lora.LoRA(normal(k, (6, 2)), normal(k + 9, (2, 5)), scale, g) for k in range(len(weights))
    ]
    mixed = lora.algebra.combine([{"w": n} for n in nodes], weights)["w"]
    exact = lambda x: np.asarray(x, np.float64)
    want = np.concatenate([w * scale * exact(n.b) for n, w in zip(nodes, weights)])
    np.testing.assert_array_equal(exact(mixed.a), np.concatenate([exact(n.a) for n in nodes], -1))
    np.testing.assert_allclose(exact(mixed.b), want, rtol=2.01 * 2.0**-24, atol=0)
    if mixed.b.dtype != jnp.float32:
        np.testing.assert_array_equal(exact(mixed.b), want)
    if dtype == jnp.bfloat16 and {*weights} <= {1.0, -1.0, 0.0, 0.5, -4.0} and scale != 1.5:
        assert mixed.b.dtype == dtype  # no more memory than it needs


@given(st.lists(st.floats(-2, 2, width=16), min_size=1, max_size=3), st.integers(0, 99))
def test_combine_of_leaves_in_full_and_by_rows_rounds_once(weights, seed):
    normal = lambda i, shape: rand.normal(jax.random.key(seed + i), shape).astype(jnp.bfloat16)
    base = {"full": normal(0, (6, 5)), "rows": normal(1, (9, 4))}
    trees = [{"full": lora.Full(normal(k + 2, (6, 5))), "rows": lora.Rows(normal(k + 9, (2, 4)), (1, 7), 9)}
             for k in range(len(weights))]  # fmt: skip
    out = lora.algebra.combine(trees, weights, base=base)
    for path, start in (("full", base["full"]), ("rows", base["rows"][jnp.array([1, 7])])):
        start = np.asarray(start, np.float64)
        moves = [
            w * (np.asarray(t[path].value, np.float64) - start) for t, w in zip(trees, weights)
        ]
        want = start + sum(moves)
        size = np.abs(start) + sum(map(np.abs, moves))
        error = np.abs(np.asarray(out[path].value, np.float64) - want)
        assert (error <= np.abs(want) * 2.0**-8 * (1 + 1e-3) + size * 2.0**-20).all()
