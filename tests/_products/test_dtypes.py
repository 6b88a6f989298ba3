"""Every pair of types of activations and weights, and of the result: right, or refused by name.

What is right is computed by NumPy in double precision from the same numbers. The tolerance is that
of the coarsest type among the weight, the result and the one in which x·A is made.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import fails, tolerance
from jax import lax

import lora_jax as lora
from lora_jax._core.einsum import meeting

TYPES = {
    "bf16": jnp.bfloat16,
    "fp16": jnp.float16,
    "fp32": jnp.float32,
    "fp64": jnp.float64,
    "e4m3": jnp.float8_e4m3fn,
    "e5m2": jnp.float8_e5m2,
    "int8": jnp.int8,
    "c64": jnp.complex64,
}
FLOATS = [name for name in TYPES if name not in ("int8", "c64")]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def is_complex(dtype):
    return jnp.issubdtype(dtype, jnp.complexfloating)


def numbers(shape, dtype, seed):
    """Small multiples of 1/4, exact in every type; of 1 for integers."""
    rng = np.random.default_rng(seed)
    v = rng.integers(-4, 5, shape) / (1 if jnp.issubdtype(dtype, jnp.integer) else 4)
    if is_complex(dtype):
        v = v + 1j * rng.integers(-4, 5, shape) / 4
    return v.astype(dtype)


def node(geometry, shape, seed=2, scale=0.5):
    a, b = (
        np.random.default_rng(seed + i).standard_normal(s, np.float32)
        for i, s in enumerate(geometry.factor_shapes(shape, 2))
    )
    return lora.LoRA(a, b, scale, geometry)


def dense(a, b, geometry, shape, scale=0.5):
    """s·A·B in double precision."""
    a, b = geometry.pair(np.asarray(a, np.float64), np.asarray(b, np.float64))
    return np.asarray(geometry.leaf(scale * np.einsum("nir,nro->nio", a, b), shape))


def wide(x):
    return np.asarray(x).astype(complex if is_complex(x.dtype) else float)


def coarsest(*dtypes):
    return max(dtypes, key=lambda t: float(jnp.finfo(t).eps))


def assert_right(got, want, dtype):
    got, top = wide(got), max(np.abs(want).max(), 1.0)
    np.testing.assert_allclose(got / top, want / top, atol=tolerance(dtype, 8), rtol=0)


def check(fn, exact, x, w, geometry, plan, used=None):
    """Value, and gradient of x, A and B of fn(p, x), against exact(x, W'): NumPy's, linear in each.
    `used` is the type of the weight in the product; the factors are of fp32.

    The cotangent is random; JAX's convention for complex numbers is linear, without conjugates.
    """
    ad = {"w": node(geometry, w.shape)}
    base = {"w": w}
    call = lora.adapt(fn, plan=plan)
    run = lambda ad, x: call(lora.bind(base, ad), x)
    differentiable = jnp.issubdtype(x.dtype, jnp.inexact)

    @jax.jit
    def all_of(ad, x, ct):
        if not differentiable:
            y, back = jax.vjp(lambda ad: run(ad, x), ad)
            return y, (*back(ct), None)
        y, back = jax.vjp(run, ad, x)
        return y, back(ct)

    shape = jax.eval_shape(run, ad, x)
    ct = numbers(shape.shape, shape.dtype, 5)
    y, (d_ad, dx) = all_of(ad, x, ct)
    assert y.dtype == shape.dtype
    xs, ws, g = wide(x), wide(w), wide(ct)
    a, b = ad["w"].a, ad["w"].b
    effective = ws + dense(a, b, geometry, w.shape)
    met = coarsest(meeting(x.dtype, used or w.dtype, y.dtype), jnp.float32)
    dtype = coarsest(met, w.dtype, y.dtype) if plan == "merged" else coarsest(met, y.dtype)
    assert_right(y, exact(xs, effective), dtype)
    # the derivative along a direction of A, of B and of x, each by Re⟨g, ·⟩
    for name, moved in (("a", "b"), ("b", "a")):
        t = np.random.default_rng(9).standard_normal(getattr(ad["w"], name).shape)
        pair = {name: t, moved: getattr(ad["w"], moved)}
        want = np.sum(g * exact(xs, dense(pair["a"], pair["b"], geometry, w.shape))).real
        got = np.sum(wide(getattr(d_ad["w"], name)) * t)
        size = np.sum(np.abs(g)) * max(1.0, np.abs(xs).max()) * 8
        np.testing.assert_allclose(got / size, want / size, atol=tolerance(met, 8))
    if dx is not None:
        t = wide(numbers(x.shape, x.dtype, 11))
        want, got = np.sum(g * exact(t, effective)), np.sum(wide(dx) * t)
        if not is_complex(x.dtype):
            want = want.real
        size = np.sum(np.abs(g)) * 8
        limit = coarsest(dtype, x.dtype)
        np.testing.assert_allclose(got / size, want / size, atol=tolerance(limit, 8))


MATRIX = lora.Geometry((0,), (1,))
PLANS = ("factored", "merged")


def pairs(few):
    """(weight, type of the result, plan): all, or for each weight the results in turn."""
    every = list(itertools.product(FLOATS, [None, *TYPES], PLANS))
    return every[::7] if few else every


def each(activation, cases, one):
    """one(x's type, w's type, ...) for each case; what fails is named."""
    for weight, *case in cases:
        try:
            one(TYPES[activation], TYPES[weight], *case)
        except AssertionError as e:
            raise AssertionError(f"{activation} by {weight}, {case}: {e}") from e


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("activation", TYPES)
def test_matrix_products(activation, few):
    def one(x, w, preferred, plan):
        x, w = numbers((4, 6), x, 0), numbers((6, 5), w, 1)
        kept = None if preferred is None else TYPES[preferred]
        dot = functools.partial(
            lax.dot_general, dimension_numbers=(((1,), (0,)), ((), ())), preferred_element_type=kept
        )
        try:
            y = jax.eval_shape(dot, x, w)
        except TypeError:  # JAX's own refusal
            return
        fn = lambda p, x: dot(x, p["w"])
        if jnp.issubdtype(y.dtype, jnp.integer) or is_complex(x.dtype) > is_complex(y.dtype):
            bound = lora.bind({"w": w}, {"w": node(MATRIX, w.shape)})
            with fails(f"'w' .*dot_general of {x.dtype} and {w.dtype} to {y.dtype}"):
                lora.adapt(fn, plan=plan)(bound, x)
            want = fn(lora.merge({"w": w}, {"w": node(MATRIX, w.shape)}), x)
            np.testing.assert_array_equal(lora.adapt(fn, strict=False)(bound, x), want)
        else:
            check(fn, lambda x, w: x @ w, x, w, MATRIX, plan)

    each(activation, pairs(few), one)


def test_fourier_layer():
    """Complex activations by a real weight, forth and back: real outside."""
    layer = lambda p, x: jnp.fft.irfft(
        jnp.einsum("bfd,de->bfe", jnp.fft.rfft(x, axis=1), p["w"]), axis=1
    )
    exact = lambda x, w: np.fft.irfft(np.fft.rfft(x, axis=1) @ w, axis=1)
    x, w = numbers((2, 8, 6), jnp.float32, 0), numbers((6, 5), jnp.float32, 1)
    for plan in PLANS:
        check(layer, exact, x, w, MATRIX, plan)


@pytest.mark.parametrize("activation", [n for n in TYPES if n != "int8"])
def test_convolutions(activation):
    """Both operands are of one type, which the weight is cast to."""
    geometry = lora.Geometry((0, 1), (2,))

    def one(x, w, preferred):
        def fn(p, x):
            w = p["w"].astype(x.dtype)
            return lax.conv_general_dilated(
                x, w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"),
                preferred_element_type=preferred and TYPES[preferred],
            )  # fmt: skip

        exact = lambda x, w: sum(x[:, i : i + 3] @ w[i] for i in range(2))
        x, w = numbers((2, 4, 3), x, 0), numbers((2, 3, 5), w, 1)
        check(fn, exact, x, w, geometry, "factored", x.dtype)

    eight = activation in ("e4m3", "e5m2")
    each(activation, [("fp32", None), ("bf16", "fp32" if eight else None)], one)


@pytest.mark.parametrize("activation", TYPES)
def test_experts(activation):
    geometry = lora.Geometry((1,), (2,), (0,))

    def one(x, w):
        fn = lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([1, 3], jnp.int32))
        exact = lambda x, w: np.concatenate([x[:1] @ w[0], x[1:] @ w[1]])
        x, w = numbers((4, 3), x, 0), numbers((2, 3, 5), w, 1)
        check(fn, exact, x, w, geometry, "factored")

    each(activation, [("fp32",), ("e4m3",)], one)


@pytest.mark.parametrize("table", FLOATS)
def test_look_ups(table):
    """Rows are in the table's type: 8-bit floats are rounded once."""
    w, ids = numbers((7, 6), TYPES[table], 1), np.array([3, 0, 6, 3])
    ad = {"w": node(MATRIX, w.shape)}
    rows = lora.adapt(lambda p, ids: p["w"][ids])(lora.bind({"w": w}, ad), ids)
    assert rows.dtype == w.dtype
    want = (wide(w) + dense(ad["w"].a, ad["w"].b, MATRIX, w.shape))[ids]
    assert_right(rows, want, w.dtype)


@pytest.mark.parametrize("activation", TYPES)
def test_gains(activation):
    """DoRA's gain, on what a product sums and on what it gives."""
    x, w = numbers((4, 6), TYPES[activation], 0), numbers((6, 6), jnp.float32, 1)
    ad = lora.methods.dora({"w": w}, {"w": node(MATRIX, w.shape)})
    ad = jax.tree.map(lambda v: v * 1.25, ad)
    merged = wide(lora.merge({"w": w}, ad)["w"])
    for fn, exact in (
        (lambda p, x: lax.dot(x, p["w"]), merged),
        (lambda p, x: lax.dot(x, p["w"].T), merged.T),
    ):
        y = lora.adapt(fn)(lora.bind({"w": w}, ad), x)
        assert_right(y, wide(x) @ exact, coarsest(y.dtype, w.dtype))


def test_an_algorithm_for_the_models_types():
    """One for 8-bit floats is none for the branch: its products take the default."""
    x, w = (numbers(s, jnp.float8_e4m3fn, 0) for s in ((4, 6), (6, 5)))
    algorithm = lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32
    fn = lambda p, x: lax.dot(x, p["w"], precision=algorithm, preferred_element_type=jnp.float32)
    ad = {"w": node(MATRIX, w.shape)}
    run = lambda ad, x: lora.adapt(fn)(lora.bind({"w": w}, ad), x)
    out = jax.jit(jax.grad(lambda ad, x: run(ad, x).sum())).trace(ad, x)
    groups = [e.params["group"] for e in jax.make_jaxpr(run)(ad, x).eqns if "group" in e.params]
    assert [(g.precision, g.members[0].precision) for g in groups] == [(None, algorithm)]
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(out.out_info))
