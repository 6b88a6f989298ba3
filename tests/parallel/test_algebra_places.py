"""Algebra and initialisers over devices: results lie where `shardings` says, and no device gathers a
weight; the same functions where shardings are part of types."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from common import assert_close, noisy
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax.algebra._svd import spread_svd

CONFIG = lora.LoRAConfig(rank=4, alpha=8, targets=["up", "experts"],
                         rules=[lora.Rule("experts", in_axes=(1,), out_axes=(2,), batch_axes=(0,))])  # fmt: skip
SPECS = {"up": P("d", None), "experts": P(None, None, "d")}
PARAMS = {"up": rand.normal(jax.random.key(0), (16, 32)),
          "experts": rand.normal(jax.random.key(1), (3, 24, 16))}  # fmt: skip
ONE, TWO = (noisy(lora.init(jax.random.key(0), PARAMS, CONFIG), key=k, scale=1.0) for k in (1, 2))
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}

# name -> adapters of (params, two adapter trees)
CALLS = {
    "resize": lambda p, one, two: lora.algebra.resize(one, 2),
    "resize to more": lambda p, one, two: lora.algebra.resize(one, 6),
    "ties": lambda p, one, two: lora.algebra.ties([one, two], rank=2)[0],
    "ties by passes": lambda p, one, two: lora.algebra.ties([one, two], rank=2, passes=3)[0],
    "knots": lambda p, one, two: lora.algebra.knots([one, two]),
    "combine": lambda p, one, two: lora.algebra.combine([one, two], [0.3, 0.5]),
    "pissa": lambda p, one, two: lora.methods.pissa(p, one)[1],
    "pissa by passes": lambda p, one, two: lora.methods.pissa(p, one, niter=4)[1],
    "dora": lambda p, one, two: lora.methods.dora(p, one),
    "init_lora_xs": lambda p, one, two: lora.methods.init_lora_xs(jax.random.key(0), p, CONFIG)[0],
    "init_lora_xs's vectors": lambda p, one, two: lora.methods.init_lora_xs(
        jax.random.key(0), p, CONFIG
    )[1],
}


def spread(kind):
    """The parameters and adapters over eight devices."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(KINDS[kind],))
    params = {p: jax.device_put(w, NamedSharding(mesh, SPECS[p])) for p, w in PARAMS.items()}
    place = lambda ad: jax.tree.map(jax.device_put, ad, lora.parallel.shardings(params, ad))
    return params, place(ONE), place(TWO)


def update(node):
    """Δ in fp64; of a DoRA, and of singular vectors, all that there is."""
    if type(node) is not lora.LoRA:
        return [np.asarray(x, np.float64) for x in jax.tree.leaves(node)]
    a, b = (np.asarray(x, np.float64) for x in node.geometry.pair(node.a, node.b))
    return node.scale * a @ b


def apart(path, rank=4):
    """σ₁² / (σᵣ² − σᵣ₊₁²): by so much rounding in WᵀW turns the first r singular vectors of a leaf."""
    g = lora.select(PARAMS, CONFIG)[path].geometry
    squares = np.linalg.svd(np.asarray(g.matrices(PARAMS[path])), compute_uv=False) ** 2
    return max(s[0] / (s[rank - 1] - s[rank]) for s in squares)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_results_lie_as_shardings_says(name, kind):
    args = spread(kind)
    got, want = CALLS[name](*args), CALLS[name](PARAMS, ONE, TWO)
    where = lora.parallel.shardings(args[0], got)
    for x, sharding in zip(jax.tree.leaves(got), jax.tree.leaves(where), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.shape, x.sharding, sharding)
    assert got.keys() == want.keys()
    for path in want:
        of_base = name.startswith(("pissa", "init_lora_xs"))
        factor = 64 * max(4, apart(path)) if of_base else 256
        assert_close(update(got[path]), update(want[path]), factor=factor)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers(kind):
    params, one, two = spread(kind)
    got, want = (lora.algebra.compare(*x).leaves for x in ((one, two), (ONE, TWO)))
    for path in want:
        for name in ("norms", "cosine", "output_angles"):
            assert_close(getattr(got[path], name), getattr(want[path], name), factor=1024)
    got, want = (lora.algebra.learned(*x).leaves for x in ((params, one), (PARAMS, ONE)))
    for path in want:
        for name in ("norm", "base_norm", "singular_values"):
            assert_close(getattr(got[path], name), getattr(want[path], name), factor=256)


@pytest.mark.parametrize(
    "spec", [P(None, "d", None), P(None, None, "d"), P("d", None, None), P(None, "d", "e")]
)
def test_no_weight_is_gathered(spec):
    """In the compiled program all that is sent is smaller than the part of a weight on a device."""
    n, shape, rank = 8, (256, 512), 4
    mesh = jax.make_mesh((4, 2), ("d", "e"), axis_types=(AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((n, *shape), jnp.float32, sharding=NamedSharding(mesh, spec))
    text = jax.jit(spread_svd, static_argnums=1).lower(x, rank).compile().as_text()
    sent = re.findall(
        r"= \(?f32\[([\d,]+)\]\S* (?:all-gather|all-reduce|all-to-all|collective)", text
    )
    assert sent or spec[0] == "d"
    assert max((np.prod([*map(int, s.split(","))]) for s in sent), default=0) <= n * 512 * (
        2 * rank + 16
    )


@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("shape", [(2, 20, 30), (1, 40, 24)])
def test_spread_svd_is_the_svd(shape, decay):
    """Where its width is all that there is; but for what is below 10⁻⁴ of the largest."""
    keys = jax.random.split(jax.random.key(3))
    u, v = (jnp.linalg.qr(rand.normal(k, (shape[0], d, d)))[0] for k, d in zip(keys, shape[1:]))
    k = min(shape[1:])
    s = jnp.exp(-decay * jnp.arange(k, dtype=jnp.float32))
    x = jnp.matmul(u[..., :k] * s, v[..., :k].mT, precision="highest")
    u, s, v = spread_svd(x, k)
    want = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    lost = 1e-4
    np.testing.assert_allclose(s, want, atol=lost, rtol=0)
    for rank in (1, 3, 8, k):
        left = np.asarray(x, np.float64) - (
            np.asarray(u * s[:, None], np.float64)[..., :rank] @ np.asarray(v, np.float64)[:, :rank]
        )
        best = want[:, rank] if rank < k else 0
        assert (np.linalg.norm(left, 2, (-2, -1)) <= best * 1.001 + lost).all()


@pytest.mark.parametrize("how", ["combine", "ties"])
def test_leaves_in_full_and_rows_where_shardings_are_types(how):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    normal = lambda i, *shape: rand.normal(jax.random.key(i), shape)
    rows = lambda i, *index: lora.Rows(normal(i, 2, 4), index, 8)
    base = {"w": normal(0, 6, 4), "t": normal(1, 8, 4)}
    trees = [{"w": lora.Full(normal(k, 6, 4)), "t": rows(k + 2, k, 5)} for k in (2, 3)]

    def call(base, trees):
        if how == "combine":
            return lora.algebra.combine(trees, [0.5, 2.0], base=base)
        return lora.algebra.ties(trees, [0.5, 2.0], base=base)[0]

    put = lambda path: NamedSharding(mesh, P("x", "y") if path == "w" else P(None, "y"))
    lie = lambda tree: {p: jax.device_put(x, put(p)) for p, x in tree.items()}
    got, want = call(lie(base), [*map(lie, trees)]), call(base, trees)
    assert_close(jax.tree.map(np.asarray, got), want)
