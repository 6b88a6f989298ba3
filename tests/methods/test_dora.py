"""DoRA: direction and magnitude, against the formula of the paper on dense weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from common import GEOMETRIES, adapted, assert_close, assert_equals_dense, fails, noisy
from jax.sharding import PartitionSpec as P
from test_adapt import USES, W, X
from zoo import IDS, Transformer

import lora_jax as lora
from lora_jax._core.geometry import RANK
from lora_jax._nodes.adapters import _down, _down_in_parts

# Rows joined again: nobody can tell that the parts' gains are one, so the weight is materialised.
JOINED = {"concatenated rows", "concatenated in a jit"}


# Those in which a gain goes a way of its own; the others are slow only as there are many.
OWN_WAYS = {
    "matmul", "transposed", "einsum from heads", "ragged experts", "look-up and head",
    "conv grouped", "concatenated columns", "concatenated rows", "scan", "picked experts",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in OWN_WAYS else pytest.mark.slow) for n in sorted(USES)]
)
def test_equals_merged(name):
    fn, w, x = USES[name]
    strict = name not in JOINED
    assert_equals_dense(fn, {"w": w}, x, targets="w", method=lora.methods.dora, strict=strict)


def node(w, geometry, scale=1.5, rank=2, dtype=jnp.float32):
    """Noisy factors and magnitudes of a weight."""
    a, b = (jnp.zeros(s, dtype) for s in geometry.factor_shapes(w.shape, rank))
    adapters = lora.methods.dora({"w": w}, noisy({"w": lora.LoRA(a, b, scale, geometry)}, 3, 0.3))
    return noisy(adapters, 4, 0.3)["w"]


def formula(n, w):
    """m · V / ‖V‖ over the in axes, by NumPy in fp64, and V."""
    g, size = n.geometry, n.geometry.sizes(w.shape)
    a, b = (np.asarray(x, np.float64) for x in (n.a, n.b))
    delta = a.reshape(size[0], size[1], n.rank) @ b.reshape(size[0], n.rank, size[2])
    order = (*g.batch_axes, *g.in_axes, *g.out_axes)
    v = np.asarray(w, np.float64).transpose(order).reshape(size) + n.scale * delta
    m = np.asarray(n.magnitude, np.float64).reshape(size[0], 1, size[2])
    out = m * v / np.linalg.norm(v, axis=1, keepdims=True)
    return out.reshape([w.shape[d] for d in order]).transpose(np.argsort(order))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_formula(name):
    shape, geometry = GEOMETRIES[name]
    w = rand.normal(jax.random.key(0), shape)
    n = node(w, geometry)
    merged = lora.merge({"w": w}, {"w": n})["w"]
    assert_close(merged, jnp.asarray(formula(n, w), jnp.float32))
    found = jnp.linalg.norm(merged.transpose(  # the magnitude is the norm of what is merged
        (*geometry.batch_axes, *geometry.out_axes, *geometry.in_axes)
    ).reshape(*n.magnitude.shape, -1), axis=-1)  # fmt: skip
    assert_close(found, jnp.abs(n.magnitude))


def test_the_norm_has_no_gradient():
    """Section 4.3: dV is g · dW', as if the norm were a number."""
    w, x = W, X
    n = node(w, lora.Geometry((0,), (1,)))

    def ours(n):
        y = lora.adapt(lambda p, x: x @ p["w"])(lora.bind({"w": w}, {"w": n}), x)
        return jnp.sum(jnp.sin(y))

    def paper(n):
        v = w + n.scale * n.a @ n.b
        norm = jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0))
        return jnp.sum(jnp.sin(x @ (n.magnitude * v / norm)))

    assert_close(jax.grad(ours)(n), jax.grad(paper)(n), factor=256)


@pytest.mark.parametrize("scanned", [pytest.param(False, marks=pytest.mark.slow), True])
def test_initially_the_base(scanned):
    model = Transformer(scanned)
    params = model.init(jax.random.key(0), IDS)["params"]
    apply = lambda params, ids: model.apply({"params": params}, ids)
    _, adapters = adapted(apply, params, IDS)
    fresh = lora.init(
        jax.random.key(0), params, lora.LoRAConfig(rank=2), lora.survey(apply, params, IDS)
    )
    assert_close(*(
        jax.jit(lora.adapt(apply))(lora.bind(params, ad), IDS)
        for ad in (fresh, lora.methods.dora(params, fresh))
    ))  # fmt: skip
    # So do adapters that are trained already: the magnitudes are those of W + sAB.
    assert_close(
        *(lora.merge(params, ad) for ad in (adapters, lora.methods.dora(params, adapters)))
    )


@pytest.mark.parametrize("scanned", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_model(scanned):
    model = Transformer(scanned)
    params = model.init(jax.random.key(0), IDS)["params"]
    apply = lambda params, ids: model.apply({"params": params}, ids)
    assert_equals_dense(apply, params, IDS, method=lora.methods.dora, factor=256)


def test_a_small_gain_is_not_rounded_away():
    """In bf16 1.001 is 1; y + 0.001·y is not y for every second y or so, and is right on average."""
    w = rand.normal(jax.random.key(0), (64, 64)).astype(jnp.bfloat16)
    x = rand.normal(jax.random.key(1), (256, 64)).astype(jnp.bfloat16)
    config = lora.LoRAConfig(rank=2, targets="w")
    n = lora.methods.dora({"w": w}, lora.init(jax.random.key(2), {"w": w}, config))["w"]
    n = lora.DoRA(n.a, n.b, n.scale, n.geometry, magnitude=n.magnitude * 1.003)
    fn = lambda p, x: x @ p["w"]
    y = lora.adapt(fn)(lora.bind({"w": w}, {"w": n}), x).astype(jnp.float32)
    base = fn({"w": w}, x).astype(jnp.float32)
    assert abs(jnp.vdot(y, base) / jnp.vdot(base, base) - 1.003) < 5e-4


@pytest.mark.parametrize(
    "shape, axes",
    [((3, 6, 5), ((1,), (0, 2))), ((3, 8, 16), ((2,), (1,), (0,))), ((6, 4, 5), ((0, 2), (1,)))],
)
@pytest.mark.parametrize("jit", [True, False])
def test_norms_in_bf16(shape, axes, jit):
    """XLA's CPU backend has no product of bf16 with a result in fp32 for some of these layouts."""
    w = rand.normal(jax.random.key(0), shape).astype(jnp.bfloat16)
    g = lora.Geometry(*axes)
    a, b = (jnp.ones(s, jnp.bfloat16) for s in g.factor_shapes(shape, 2))
    make = jax.jit(lora.methods.dora) if jit else lora.methods.dora
    m = make({"w": w}, {"w": lora.LoRA(a, b, 0.5, g)})["w"].magnitude
    v = np.asarray(w, np.float64) + 1.0  # 0.5 · 2
    assert_close(m, np.linalg.norm(v, axis=axes[0] if len(axes[0]) > 1 else axes[0][0]), m.dtype, 2)


def test_inside_shard_map():
    """A part of a leaf has no norm; the whole leaf may be bound outside."""
    fn = lambda p, x: x @ p["w"]
    adapters = {"w": node(W, lora.Geometry((0,), (1,)))}
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    shard = functools.partial(jax.shard_map, mesh=mesh, out_specs=P("d"))
    inside = lambda p, ad, x: lora.adapt(fn)(lora.bind(p, ad), x)
    want = fn(lora.merge({"w": W}, adapters), X)
    whole = shard(inside, in_specs=(P(), P(), P("d")))({"w": W}, adapters, X)
    assert_close(whole, want)
    with fails(r"'w' varies over the mesh axes d: of a part of it there is no norm"):
        specs = {"w": lora.DoRA(P("d"), P(), 1.5, adapters["w"].geometry, magnitude=P())}
        shard(inside, in_specs=(P("d"), specs, P("d")))({"w": W}, adapters, X)


def test_a_stack_with_none():
    fn, adapters = lambda p, x: x @ p["w"], [
        {"w": node(W, lora.Geometry((0,), (1,)), rank=r)} for r in (2, 3)
    ]  # fmt: skip
    stacked = lora.algebra.stack(adapters, base={"w": W}, capacity=3)
    each = jax.vmap(lambda ad, x: lora.adapt(fn)(lora.bind({"w": W}, ad), x))
    got = each(
        jax.vmap(lora.algebra.choose, (None, 0))(stacked, jnp.array([1, -1, 0])),
        jnp.stack([X[0]] * 3),
    )
    trees = [lora.merge({"w": W}, adapters[1]), {"w": W}, lora.merge({"w": W}, adapters[0])]
    assert_close(got, jnp.stack([fn(p, X[0]) for p in trees]))
    with fails("is a DoRA, and an empty slot holds the base's values"):
        lora.algebra.stack(adapters)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda p, ad: lora.unmerge(p, ad), "'w' was scaled"),
        (lambda p, ad: lora.algebra.combine([ad, ad]), "'w' is a DoRA"),
        (lambda p, ad: lora.algebra.resize(ad, 1), "'w' is a DoRA"),
        (lambda p, ad: lora.algebra.compare(ad, ad), "'w' is a DoRA"),
        (lambda p, ad: lora.bind({"w": p["w"][:, :3]}, ad), "the leaf has shape"),
        (
            lambda p, ad: lora.bind(p, {"w": noisy_magnitude(ad["w"], (3,))}),
            r"expected magnitude of \(6,\), found \(3,\)",
        ),
    ],
)
def test_errors(call, match):
    with fails(match):
        call({"w": W}, {"w": node(W, lora.Geometry((0,), (1,)))})


def noisy_magnitude(n, shape):
    return lora.DoRA(n.a, n.b, n.scale, n.geometry, magnitude=jnp.ones(shape))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["matrix", "experts", "to heads"])
def test_merged_into_a_base_of_16_bits_is_rounded_once(name, dtype):
    """The norms are those of fp32 adapters, whatever the base's type: each element of the merged
    weight is the nearest number of that type, but for what fp32 loses."""
    shape, geometry = GEOMETRIES[name]
    shape = tuple(8 * n for n in shape)
    w = rand.normal(jax.random.key(0), shape).astype(dtype)
    n = node(w, geometry, scale=3.0)
    want = formula(n, w)
    got = np.asarray(lora.merge({"w": w}, {"w": n})["w"], np.float64)
    half = np.asarray(np.spacing(np.abs(want).astype(w.dtype)), np.float64) / 2
    assert (np.abs(got - want) <= half + np.abs(want).max() * 2.0**-21).all()


def test_norms_read_a_base_in_bf16_as_it_is():
    """On GPUs and TPUs no copy of W in fp32 is made, and nothing of A in fp32 is lost."""
    w = rand.normal(jax.random.key(0), (64, 48)).astype(jnp.bfloat16)
    a = jnp.linspace(1 / 3, 7 / 9, 64 * 4).reshape(64, 4) ** 9
    dims = ((0, RANK), (0, 1), (RANK, 1))
    (got,), (want,) = (f(a, w, dims=dims) for f in (_down_in_parts, _down))
    assert_close(got, want)
    exact = np.asarray(a, np.float64).T @ np.asarray(w, np.float64)
    off = lambda x: np.abs(np.asarray(x, np.float64) - exact).max()
    assert off(got) <= 2 * off(want)
    n = node(w, lora.Geometry((0,), (1,)))
    bound = lambda ad: lora.bind({"w": w}, {"w": ad})["w"].gain.value
    text = jax.export.export(jax.jit(bound), platforms=["cuda"])(n).mlir_module()
    assert "64x48xf32" not in text.split("stablehlo.dot_general")[1]


def test_complex_weights_are_refused():
    """Their norm is no sum of squares: magnitudes were off, and complex, in silence."""
    draw = lambda *shape: np.ones(shape, "complex64") * (1 + 2j)
    params = {"w": draw(4, 3)}
    node = lora.LoRA(*map(jnp.asarray, (draw(4, 2), draw(2, 3))), 1.0, lora.Geometry((0,), (1,)))
    with fails("'w' is complex"):
        lora.methods.dora(params, {"w": node})
    for call in (lora.bind, lora.merge):
        with fails("'w': DoRA's magnitudes are of real weights"):
            call(params, {"w": node.with_magnitude(jnp.ones(3))})
