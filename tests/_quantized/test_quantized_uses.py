"""A quantised base under every transformation, in every place where weights go, for every method."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from common import adapted, assert_close, fails, noisy, value_and_grad
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_adapt import TRANSFORMS
from test_adapt import X as SIX
from test_repeats import stack

import lora_jax as lora
from lora_jax._core.einsum import contract
from lora_jax._quantized import dot as _quantized_dot
from lora_jax._quantized.dot import halves
from lora_jax._quantized.make import quantized

KEY = jax.random.key(0)
normal = lambda i, *shape: rand.normal(jax.random.fold_in(KEY, i), shape) / 8
X = normal(0, 2, 5, 64)
W = normal(1, 64, 128)


@functools.cache
def of_a_model():
    """(adapters, ours, dense) of two adapted weights and a frozen one in between, all quantised."""
    formats = {"w": ("nf4", True), "u": ("int8", False), "v": ("nf4", False)}
    shapes = {"w": (6, 64), "u": (6, 64), "v": (64, 4)}
    q = {n: quantized(normal(i, *shapes[n]), f, double=d) for i, (n, (f, d)) in enumerate(formats.items())}  # fmt: skip
    fn = lambda p, x: (jnp.tanh(x @ p["w"]) * (x @ p["u"])) @ p["v"]
    plain = lora.quant.dequantize(q)
    f, adapters = adapted(fn, plain, SIX, targets=["w", "v"])
    ours = lambda ad, x=SIX: f(lora.bind(q, ad), x)
    return adapters, ours, lambda ad, x=SIX: fn(lora.merge(plain, ad), x)


IN_CI = {"hessian-vector product", "vmap over adapters", "scan over steps", "export"}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in IN_CI else pytest.mark.slow) for n in TRANSFORMS]
)
def test_transformations_compose(name):
    adapters, ours, dense = of_a_model()
    transform = TRANSFORMS[name]
    assert_close(transform(ours)(adapters), transform(dense)(adapters), factor=512)


METHODS = {
    "dora": lambda p, c: lora.methods.dora(p, lora.init(KEY, p, c)),
    "vera": lambda p, c: lora.methods.init_vera(KEY, p, c),
    "lora_xs": lambda p, c: lora.methods.init_lora_xs(KEY, p, c),
    "adalora": lambda p, c: (lora.methods.init_adalora(KEY, p, c), None),
    "full": lambda p, c: lora.init(KEY, p, dataclasses.replace(c, targets="v", full="w")),
}
CI = {"dora", "vera"}  # the second with arrays that are shared


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in CI else pytest.mark.slow) for n in METHODS]
)
def test_every_method(name):
    """As on the dequantised base."""
    q = {"w": quantized(W, "nf4", double=True), "v": quantized(W.T, "int8")}
    plain = lora.quant.dequantize(q)
    fn = lora.adapt(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"])
    made = METHODS[name](q, lora.LoRAConfig(rank=2, targets=["w"]))
    adapters, frozen = made if isinstance(made, tuple) else (made, None)
    adapters = noisy(adapters)
    factors = (
        (lambda ad: lora.methods.factors(ad, frozen)) if isinstance(made, tuple) else lambda ad: ad
    )
    run = lambda base: value_and_grad(lambda ad: fn(lora.bind(base, factors(ad)), X))(adapters)
    assert_close(run(q), run(plain), factor=512)


@pytest.mark.parametrize(
    "wrap", [lambda f: f, pytest.param(nnx.jit, marks=pytest.mark.slow)], ids=["plain", "jit"]
)
def test_an_nnx_module(wrap):
    """Its kernels in codes; what the call changes is written back."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(64, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs))
    fn = lambda m, x: m(x)
    survey = lora.survey(fn, model, X)
    q = lora.quant.quantize(model, "kernel", survey=survey)
    config = lora.LoRAConfig(rank=2, targets="kernel")
    adapters = noisy(lora.init(KEY, model, config, survey))
    bound, merged = lora.bind(q, adapters), lora.merge(lora.quant.dequantize(q), adapters)
    assert_close(lora.adapt(wrap(fn))(bound, X), fn(merged, X))
    statistics = lambda m: nnx.to_pure_dict(nnx.state(m, nnx.BatchStat))
    assert_close(statistics(bound), statistics(merged))


def test_repeated_layers_and_dropout():
    """Layers that are transformed once, each with its own codes and masks."""
    fn, params = stack([1.0, 1.0])
    q = {name: jax.tree.map(quantized, layer) for name, layer in params.items()}
    plain = lora.quant.dequantize(q)
    f, adapters = adapted(fn, plain, X[..., :8], targets="w", dropout=0.5)
    run = lambda base, **key: jax.jit(lambda ad: f(lora.bind(base, ad, **key), X[..., :8]))(
        adapters
    )
    got = run(q, dropout_key=KEY)
    assert_close(got, run(plain, dropout_key=KEY), factor=512)
    assert not np.allclose(got, run(q), atol=1e-3)


# ------------------------------------------------------------------ between devices
def mesh(*shape, names=("d",), kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


Q = {"w": quantized(W, "nf4"), "v": quantized(W, "int8")}


def by_hand(rows, columns, spec, psum):
    """The model itself maps over devices; its weights are cut, or gathered where they are used."""
    whole = lambda w, axis: lax.all_gather(w, "d", axis=axis, tiled=True)

    def fn(p, x):
        w = p["w"] if rows is None else whole(p["w"], rows)
        v = p["v"] if columns is None else whole(p["v"], columns)
        y = x @ w + x @ v
        return lax.psum(y, "d") if psum else y

    specs = {"w": spec, "v": spec}
    x, out = (P(None, None, "d"), P()) if psum else (P(), P(None, None, "d"))
    if rows is not None:
        x, out = P("d"), P("d")
    return jax.shard_map(fn, mesh=mesh(2), in_specs=(specs, x), out_specs=out)


def test_moved_codes_that_must_be_read_to_be_sent():
    """Reshaped codes are no codes of what is gathered: an array, of a leaf without an adapter."""
    q = {"w": quantized(W[:, :64], "nf4"), "v": W.T}

    def fn(p, x):
        def body(w, x):
            w = lax.all_gather(w.reshape(64, 8, 8), "d", axis=0, tiled=True)
            return x @ w.reshape(64, 64)

        return (
            jax.shard_map(body, mesh=mesh(1), in_specs=(P(), P()), out_specs=P(), check_vma=False)(
                p["w"], x
            )
            @ p["v"].T
        )

    plain = lora.quant.dequantize(q)
    f, adapters = adapted(fn, plain, X, targets="v")
    assert_close(f(lora.bind(q, adapters), X), fn(lora.merge(plain, adapters), X), factor=512)


@pytest.mark.parametrize(
    "how", [(None, None, P("d", None), True), (None, None, P(None, "d"), False), (0, 0, P("d"), 0),
            (1, 1, P(None, "d"), False)], ids=["rows", "columns", "gathered", "gathered columns"],
)  # fmt: skip
def test_inside_a_shard_map(how):
    """A device's part is its codes; what is gathered are codes."""
    fn, plain = by_hand(*how), lora.quant.dequantize(Q)
    f, adapters = adapted(fn, plain, X, targets="w")
    ours = lambda ad: f(lora.bind(Q, ad), X)
    got, want = (value_and_grad(run)(adapters) for run in (ours, lambda ad: fn(lora.merge(plain, ad), X)))  # fmt: skip
    assert_close(got[1], want[1])
    assert_close(got[0], want[0], factor=256)
    jaxpr = jax.make_jaxpr(jax.grad(lambda ad: jnp.sum(ours(ad))))(adapters)
    entering = [v.aval for e in jaxpr.eqns if e.primitive.name == "shard_map" for v in e.invars]
    types = {str(a.dtype) for a in entering if a.size >= W.size // 2}
    assert types == {"uint8", "int8"}, types


def test_a_block_is_not_cut_by_hand():
    """Where the codes come in as they were cut, to an adapted function inside of a shard_map."""
    q = {"w": quantized(W[:, :64], "nf4")}
    fn = jax.shard_map(
        lambda q, x: lora.adapt(lambda p, x: x @ p["w"])(lora.bind(q, None), x), mesh=mesh(2),
        in_specs=({"w": dataclasses.replace(q["w"], codes=P(None, "d"), constants=P())}, P()), out_specs=P(None, None, "d"),
    )  # fmt: skip
    with fails(r"codes \(64, 16\) and constants \(64, 1\) of 'nf4' are not.*between blocks of 64"):
        fn(q, X)


def test_a_block_that_is_cut_is_read_first():
    """Half of a block on each device: the weight is read before it is cut."""
    q = {"w": quantized(W[:, :64], "nf4")}
    fn = jax.shard_map(
        lambda p, x: x @ p["w"], mesh=mesh(2), in_specs=({"w": P(None, "d")}, P()), out_specs=P(None, None, "d"),
    )  # fmt: skip
    got = jax.jit(lambda q: lora.adapt(fn)(lora.bind(q, None), X))(q)
    assert_close(got, X @ lora.quant.dequantize(q)["w"])


@pytest.mark.parametrize("move", [lambda w: w, lambda w: w.T], ids=["as it is", "transposed"])
def test_a_constraint_is_one_of_codes(move):
    """FSDP as a model writes it: what the compiler gathers are codes."""
    where = NamedSharding(mesh(2), P(None, None))
    fn = lambda p, x: x @ move(lax.with_sharding_constraint(move(p["w"]), where))
    specs = {n: q.specs(P("d")) for n, q in Q.items()}
    spread = jax.device_put(Q, jax.tree.map(lambda s: NamedSharding(where.mesh, s), specs))
    f, adapters = adapted(fn, lora.quant.dequantize(Q), X, targets="w")
    run = jax.jit(lambda ad, q: f(lora.bind(q, ad), X))
    want = jax.jit(lambda ad: fn(lora.merge(lora.quant.dequantize(Q), ad), X))(adapters)
    text = run.lower(adapters, spread).compile().as_text()
    assert "u8[64,64]" in text and " all-gather(" in text
    assert not [
        line for line in text.splitlines() if " all-gather(" in line and "f32[64,128]" in line
    ]
    assert_close(run(adapters, spread), want)


def test_gathered_says_what_it_cannot():
    with fails(r"no leaf is quantised: lora.quant.gathered\(jax.device_put"):
        lora.quant.gathered({"w": W}, "d")
    with fails(r"(?s)quantised leaves on a mesh with fsdp.*'w' lies at"):
        lora.quant.gathered({"w": quantized(W)}, "fsdp")


def test_where_its_arrays_go():
    """Constants as the codes; quantised twice, along the first axis; even alone, with a mesh."""
    two = mesh(2, 4, names=("d", "t"))
    of = lambda q, *spec: [tuple(s) for s in jax.tree.leaves(q.specs(P(*spec), two))]
    stacked = quantized(normal(3, 2, 64, 256), "nf4", stack=1)
    assert of(stacked, None, "d", "t") == [(None, "d", "t"), (None, "d", "t")]
    assert of(stacked.transposed((0, 2, 1)), None, "t", "d") == of(stacked, None, "d", "t")
    assert of(quantized(W, "int8"), "d", "t") == [("d", "t"), (None, "t")]
    assert of(quantized(W, "nf4"), "d", "t") == [("d", "t"), ("d", None)]  # two blocks
    double = quantized(normal(4, 512, 128), "nf4", double=True)
    assert of(double, "d", "t") == [("d", "t"), ("d", None), ("d",), ()]


# ------------------------------------------------------------------ what TPUs do
@pytest.mark.parametrize(
    "moved, xl, wl, out",
    [
        (None, "tei", "eio", "teo"),
        pytest.param(None, "teo", "eio", "tei", marks=pytest.mark.slow),
        ((2, 0, 1), "teo", "oei", "eit"),
        (None, "to", "eio", "toei"),
    ],
)
def test_products_in_halves(moved, xl, wl, out):
    """With the numbers at even places and those at odd ones: the product."""
    q = quantized(normal(5, 4, 64, 192), "nf4", double=True, stack=1)
    q = q if moved is None else q.transposed(moved)
    x = normal(6, *({"t": 5, "e": 4, "i": 64, "o": 192}[d] for d in xl))
    got = jax.jit(lambda x, q: halves(x, xl, q, wl, out))(x, q)
    assert_close(got, contract(x, xl, q.value(), wl, out))


@pytest.mark.parametrize(
    "format, double",
    [
        ("nf4", True),
        pytest.param("int8_block", False, marks=pytest.mark.slow),
        pytest.param("int8", False, marks=pytest.mark.slow),
    ],
)
def test_a_table_by_rows(format, double, monkeypatch):
    """A head that is tied to its embedding: the product, the gradient of its input, and no array of
    the table's size."""
    monkeypatch.setattr(_quantized_dot, "LARGE", 2**15)
    monkeypatch.setattr(_quantized_dot, "PART", 2**13)
    q = {"w": quantized(normal(7, 512, 64), format, double=double)}
    ids = jnp.array([[1, 5, 511], [0, 2, 3]])
    fn = lambda p, x: jnp.tanh(p["w"][ids] + x) @ p["w"].T
    x, plain = normal(8, 2, 3, 64), lora.quant.dequantize(q)
    ours = value_and_grad(lambda x: lora.adapt(fn)(lora.bind(q, None), x))
    assert_close(ours(x), value_and_grad(lambda x: fn(plain, x))(x), factor=256)
    compiled = jax.jit(lambda q, x: lora.adapt(fn)(lora.bind(q, None), x)).lower(q, x).compile()
    assert "f32[128,64]" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < plain["w"].nbytes
    f, adapters = adapted(fn, plain, x, targets="w")
    got, want = (value_and_grad(run)(adapters) for run in (
        lambda ad: f(lora.bind(q, ad), x), lambda ad: fn(lora.merge(plain, ad), x)))  # fmt: skip
    assert_close(got, want, factor=512)


@pytest.mark.parametrize(
    "format, fill",
    [("nf4", None), ("nf4", 7.0), ("int8_block", 0.0), ("mxfp4", 0.0), ("int8", 0.0)],
)
def test_rows_out_of_bounds_are_what_the_look_up_fills_in(format, fill):
    """In a table in codes as in a plain one, of one axis of indices or of two."""
    q = {"w": quantized(normal(9, 4, 3, 64), format)}
    plain, i = lora.quant.dequantize(q), jnp.array([[1, 4], [-9, 3]])
    for fn in (
        lambda p: p["w"].at[i].get(mode="fill", fill_value=fill),
        lambda p: p["w"].at[i, i].get(mode="fill", fill_value=fill),
        lambda p: p["w"].at[i].get(mode="clip"),
    ):
        got, want = lora.adapt(fn)(lora.bind(q, None)), fn(plain)
        # Rows that are read alone may be rounded otherwise than those of a whole table.
        np.testing.assert_allclose(got, want, rtol=4 * np.finfo(np.float32).eps)


@pytest.mark.parametrize(
    "move",
    [
        lambda w: w.swapaxes(0, 1).astype(jnp.bfloat16).swapaxes(0, 1),
        lambda w: w.transpose(2, 0, 1).transpose(1, 0, 2),
    ],
    ids=["there and back", "a detour"],
)
def test_a_stack_that_was_moved_and_came_back(move):
    """A scan slices codes where all moves together leave the stack in front."""
    q = {"w": quantized(normal(10, 3, 64, 64), stack=1)}
    fn = lambda p, x: lax.scan(lambda x, w: (x @ w.astype(x.dtype), None), x, move(p["w"]))[0]
    ours = lambda x: lora.adapt(fn)(lora.bind(q, None), x)
    assert_close(ours(X), fn(lora.quant.dequantize(q), X), factor=64)
    assert "u8[64,32]" in str(jax.make_jaxpr(ours)(X))


def test_a_scan_along_an_axis_that_shares_its_constants():
    """It is an in axis: the constants have it with size 1, and are no stack."""
    q = quantized(normal(0, 3, 6, 5), "int8", in_axes=(0,))
    fn = lambda p, x: jax.lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1]
    x = normal(1, 4, 6)
    got = lora.adapt(fn)(lora.bind({"w": q}, None), x)
    assert_close(got, fn({"w": q.value()}, x))
