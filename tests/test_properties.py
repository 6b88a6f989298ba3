"""Shape logic, over random shapes: a weight may be moved in any way and stays what it is."""

import jax
import jax.numpy as jnp
import numpy as np
import rand
from common import examples, fails
from hypothesis import assume, given
from hypothesis import strategies as st

import lora_jax as lora
from lora_jax._core.geometry import blocks_of
from lora_jax._core.paths import flatten, nest

shapes = st.lists(st.integers(1, 4), min_size=0, max_size=5).map(tuple)
MOVES = ["transpose", "split", "merge", "slice", "rev", "pad1", "scale"]


@st.composite
def moves(draw):
    """A weight's shape, the kind of each axis (in, out, batch), moves of it, and a seed for them."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    kinds = draw(st.lists(st.sampled_from("iob"), min_size=len(shape), max_size=len(shape)))
    steps = draw(st.lists(st.sampled_from(MOVES), max_size=5))
    return shape, "".join(kinds), steps, draw(st.integers(0, 2**31))


def joinable(shape, kinds):
    """The axes that can be joined with the next one: both of one kind, or one of size 1."""
    return [i for i in range(len(shape) - 1) if kinds[i] == kinds[i + 1] or 1 in shape[i : i + 2]]


def joined(x, kinds, axis):
    """The array and the kinds of its axes after `axis` and the next one are made one."""
    kept = kinds[axis] if x.shape[axis] > 1 else kinds[axis + 1]
    shape = (*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return x.reshape(shape), kinds[:axis] + kept + kinds[axis + 2 :]


def move(x, kinds, steps, rng):
    """Applies moves chosen by `rng`; the same for equal seeds and shapes. No axes of two kinds are
    joined. Returns the array and the kinds of its axes."""
    for step in steps:
        if step == "transpose":
            order = rng.permutation(x.ndim)
            x, kinds = x.transpose(order), "".join(kinds[i] for i in order)
        elif step == "split":
            axis = int(rng.integers(x.ndim))
            n = next((k for k in (2, 3) if x.shape[axis] % k == 0), 1)
            x = x.reshape(*x.shape[:axis], n, x.shape[axis] // n, *x.shape[axis + 1 :])
            kinds = kinds[:axis] + kinds[axis] + kinds[axis:]
        elif step == "merge" and (axes := joinable(x.shape, kinds)):
            x, kinds = joined(x, kinds, axes[int(rng.integers(len(axes)))])
        elif step == "slice":
            x = x[tuple(slice(int(rng.integers(n)), None) for n in x.shape)]
        elif step == "rev":
            x = x[::-1]
        elif step == "pad1":
            x, kinds = x[:, None], kinds[:1] + "b" + kinds[1:]
        elif step == "scale":
            x = x * 0.5
    return x, kinds


def weighed(shape, kinds, seed):
    """(parameters, adapters, input) of one weight."""
    axes = {k: tuple(i for i, c in enumerate(kinds) if c == k) for k in "iob"}
    geometry = lora.Geometry(axes["i"], axes["o"], axes["b"])
    a, b = geometry.factor_shapes(shape, 2)
    keys = jax.random.split(jax.random.key(seed), 4)
    node = lora.LoRA(rand.normal(keys[0], a), rand.normal(keys[1], b), 0.7, geometry)
    return (
        {"w": rand.normal(keys[2], shape)},
        {"w": node},
        rand.normal(keys[3], (256, 3)),
    )


def contracted(w, x):
    return jnp.tensordot(x[: w.shape[0]], w, ((0,), (0,)))


@examples(20)
@given(moves())
def test_any_movement_of_a_weight(case):
    """It stays in low rank: strict mode refuses nothing."""
    shape, kinds, steps, seed = case
    params, adapters, x = weighed(shape, kinds, seed)
    run = lambda p, x: contracted(move(p["w"], kinds, steps, np.random.default_rng(seed))[0], x)
    want = run(lora.merge(params, adapters), x)
    got = lora.adapt(run)(lora.bind(params, adapters), x)
    np.testing.assert_allclose(got, want, atol=2e-4 * max(1.0, float(jnp.abs(want).max())))


@examples(8)
@given(moves())
def test_a_reshape_that_joins_axes_of_two_kinds(case):
    """Rows with columns is the one that no factors follow: refused by name, or materialised where
    allowed. With an axis of a stack the rank is as many times larger."""
    shape, kinds, steps, seed = case
    params, adapters, x = weighed(shape, kinds, seed)

    def run(p, x):
        w, now = move(p["w"], kinds, steps, np.random.default_rng(seed))
        mixed = sorted(set(range(w.ndim - 1)) - set(joinable(w.shape, now)))
        assume(mixed)
        two.append({*now[mixed[0] : mixed[0] + 2]})
        return contracted(joined(w, now, mixed[0])[0], x)

    two = []
    want = run(lora.merge(params, adapters), x)
    bound = lora.bind(params, adapters)
    if refused := two[0] == {"i", "o"}:
        with fails("'w' .* is materialised by `reshape`"):
            lora.adapt(run)(bound, x)
    got = lora.adapt(run, strict=not refused)(bound, x)
    np.testing.assert_allclose(got, want, atol=2e-4 * max(1.0, float(jnp.abs(want).max())))


@given(shapes, shapes)
def test_blocks_of_a_reshape(a, b):
    size = int(np.prod(a, dtype=int))
    b = (
        (*b, size // max(int(np.prod(b, dtype=int)), 1))
        if size % max(int(np.prod(b, dtype=int)), 1) == 0
        else (size,)
    )
    blocks = blocks_of(a, b)
    assert [d for old, _ in blocks for d in old] == list(range(len(a)))
    assert [d for _, new in blocks for d in new] == list(range(len(b)))
    for old, new in blocks:
        assert np.prod([a[d] for d in old], dtype=int) == np.prod([b[d] for d in new], dtype=int)


names = st.text("abc_", min_size=1, max_size=3)
trees = st.recursive(
    st.just(0), lambda t: st.dictionaries(names, t, min_size=1, max_size=3), max_leaves=8
)


@given(trees.filter(lambda t: t != 0))
def test_paths_name_every_leaf_once(tree):
    flat = flatten(tree)
    assert nest(flat) == tree and len(flat) == len(jax.tree.leaves(tree))


@given(
    st.dictionaries(names, st.tuples(st.integers(2, 6), st.integers(2, 6)), min_size=1, max_size=5),
    st.integers(1, 2),
)
def test_counts_follow_from_shapes(leaves, rank):
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in leaves.items()}
    config = lora.LoRAConfig(rank=rank, targets="*")
    targets = lora.select(params, config)
    assert targets.parameters == sum(rank * sum(s) for s in leaves.values())
    adapters = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, config), params)
    assert sum(x.size for x in jax.tree.leaves(adapters)) == targets.parameters
