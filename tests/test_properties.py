"""Shape logic, over random shapes: a weight may be moved in any way and stays what it is."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax as lora
from lora_jax._core.paths import flatten, nest
from lora_jax._interpret.moves import _blocks

shapes = st.lists(st.integers(1, 4), min_size=0, max_size=5).map(tuple)
few = settings(max_examples=16, deadline=None, derandomize=True)


@st.composite
def moves(draw):
    """A weight, its geometry, and a list of moves that ends in a contraction with everything."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    kinds = draw(st.lists(st.sampled_from("iob"), min_size=len(shape), max_size=len(shape)))
    steps = draw(
        st.lists(
            st.sampled_from(["transpose", "split", "merge", "slice", "rev", "pad1", "scale"]),
            max_size=5,
        )
    )
    return shape, "".join(kinds), steps, draw(st.integers(0, 2**31))


def move(x, steps, rng):
    """Applies moves chosen by `rng`; the same for equal seeds and shapes."""
    for step in steps:
        if step == "transpose":
            x = x.transpose(rng.permutation(x.ndim))
        elif step == "split":
            axis = int(rng.integers(x.ndim))
            n = next((k for k in (2, 3) if x.shape[axis] % k == 0), 1)
            x = x.reshape(*x.shape[:axis], n, x.shape[axis] // n, *x.shape[axis + 1 :])
        elif step == "merge" and x.ndim > 1:
            axis = int(rng.integers(x.ndim - 1))
            x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        elif step == "slice":
            x = x[tuple(slice(int(rng.integers(n)), None) for n in x.shape)]
        elif step == "rev":
            x = x[::-1]
        elif step == "pad1":
            x = x[:, None] if x.ndim else x
        elif step == "scale":
            x = x * 0.5
    return x


@few
@given(moves())
def test_any_movement_of_a_weight(case):
    shape, kinds, steps, seed = case
    axes = {k: tuple(i for i, c in enumerate(kinds) if c == k) for k in "iob"}
    w = jax.random.normal(jax.random.key(seed), shape)
    geometry = lora.Geometry(axes["i"], axes["o"], axes["b"])
    a, b = geometry.factor_shapes(shape, 2)
    keys = jax.random.split(jax.random.key(seed + 1))
    node = lora.LoRA(jax.random.normal(keys[0], a), jax.random.normal(keys[1], b), 0.7, geometry)

    def fn(p, x):
        w = move(p["w"], steps, np.random.default_rng(seed))
        return jnp.tensordot(x[: w.shape[0]], w, ((0,), (0,))), w.shape

    x = jax.random.normal(jax.random.key(seed + 2), (256, 3))
    params, adapters = {"w": w}, {"w": node}
    run = lambda p, x: fn(p, x)[0]
    want = run(lora.merge(params, adapters), x)
    got = lora.adapt(run, strict=False)(lora.bind(params, adapters), x)
    np.testing.assert_allclose(got, want, atol=2e-4 * max(1.0, float(jnp.abs(want).max())))


@few
@given(shapes, shapes)
def test_blocks_of_a_reshape(a, b):
    size = int(np.prod(a, dtype=int))
    b = (
        (*b, size // max(int(np.prod(b, dtype=int)), 1))
        if size % max(int(np.prod(b, dtype=int)), 1) == 0
        else (size,)
    )
    blocks = _blocks(a, b)
    assert [d for old, _ in blocks for d in old] == list(range(len(a)))
    assert [d for _, new in blocks for d in new] == list(range(len(b)))
    for old, new in blocks:
        assert np.prod([a[d] for d in old], dtype=int) == np.prod([b[d] for d in new], dtype=int)


names = st.text("abc_", min_size=1, max_size=3)
trees = st.recursive(
    st.just(0), lambda t: st.dictionaries(names, t, min_size=1, max_size=3), max_leaves=8
)


@few
@given(trees.filter(lambda t: t != 0))
def test_paths_name_every_leaf_once(tree):
    flat = flatten(tree)
    assert nest(flat) == tree and len(flat) == len(jax.tree.leaves(tree))


@few
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
