"""A quantised base: the codes of bitsandbytes, read at the point of use, nothing else kept."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rand
from common import adapted, assert_close, fails, noisy, value_and_grad
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_adapt import USES, W, X
from zoo import IDS, Transformer

import lora_jax as lora
from lora_jax._quantized import formats, weight
from lora_jax._quantized.encode import encode, pack
from lora_jax._quantized.formats import FORMATS, NF4, decode, dynamic_map, unpack
from lora_jax._quantized.make import quantized

KEY = jax.random.key(0)
# (mean squared error on N(0, 1), largest |w - ŵ| as a part of the block's largest)
FIGURES = {"nf4": (0.00846, 0.151904), "int4": (0.01159, 1 / 14)}


@pytest.mark.parametrize("name", FIGURES)
def test_errors_on_a_normal_distribution(name):
    """The figures of arXiv:2305.14314's data type, and of symmetric 4-bit integers."""
    w = rand.normal(KEY, (2**15, 64))
    codes, constants = encode(FORMATS[name], w)
    read = decode(FORMATS[name], codes, constants, jnp.float32)
    mse, worst = FIGURES[name]
    assert abs(jnp.mean((w - read) ** 2) / mse - 1) < 0.01
    assert jnp.max(jnp.abs(w - read) / constants[:, None]) <= worst * (1 + 1e-5)


def test_errors_of_a_leaf_of_zeros():
    params = {"w": jnp.zeros((8, 64))}
    q = lora.quant.quantize(params, "w")
    assert lora.quant.errors(params, q) == {"w": 0.0}
    assert lora.quant.errors(params, lora.quant.quantize({"w": jnp.ones((8, 64))}, "w")) == {
        "w": np.inf
    }
    assert np.isnan(lora.quant.errors({"w": params["w"] * jnp.nan}, q)["w"])


def test_the_largest_error_of_nf4_is_attained():
    """Half way between the two levels that are furthest apart, the last but one and the last."""
    gaps = np.diff(NF4)
    i = int(np.argmax(gaps))
    w = jnp.zeros(64).at[0].set(1.0).at[1].set((NF4[i] + NF4[i + 1]) / 2)
    codes, constants = encode(FORMATS["nf4"], w)
    error = jnp.abs(decode(FORMATS["nf4"], codes, constants, jnp.float32) - w)[1]
    np.testing.assert_allclose(error, gaps.max() / 2, rtol=1e-6)
    np.testing.assert_allclose(gaps.max() / 2, 0.151904, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_codes_round_trip_exactly(name):
    """What was read is stored as it was: every code of every format."""
    fmt = FORMATS[name]
    if fmt.levels is None:
        codes = jnp.arange(-127, 128).astype(fmt.dtype) if "int" in name else None
        if codes is None:
            codes = jax.lax.bitcast_convert_type(jnp.arange(0, 127, dtype=jnp.uint8), fmt.dtype)
    else:
        codes = jnp.arange(len(fmt.levels), dtype=jnp.uint8)
    constant = jnp.asarray(0.5).astype(jnp.float8_e8m0fnu if fmt.power else jnp.float32)
    values = decode(fmt, codes, constant, jnp.float32)
    again, found = encode(fmt, values)
    np.testing.assert_array_equal(found.astype(jnp.float32), constant.astype(jnp.float32))
    np.testing.assert_array_equal(again.astype(jnp.float32), codes.astype(jnp.float32))
    if fmt.bits == 4:
        codes = jnp.tile(codes, 16)[:64].reshape(4, 16)
        np.testing.assert_array_equal(unpack(pack(codes)), codes)


def test_equal_to_bitsandbytes():
    """Codes, constants and values of bitsandbytes 0.50.2 on a CPU, to the bit; its map of 8 bits."""
    golden = np.load(__file__.replace("_quantized/test_quantized.py", "data/bitsandbytes_nf4.npz"))
    q = quantized(jnp.asarray(golden["w"]), "nf4")
    np.testing.assert_array_equal(np.asarray(q.codes).reshape(-1), golden["codes"].reshape(-1))
    np.testing.assert_array_equal(np.asarray(q.constants).reshape(-1), golden["absmax"])
    np.testing.assert_array_equal(q.value(), golden["read"])
    np.testing.assert_array_equal(dynamic_map(), golden["map"])
    double = quantized(jnp.asarray(golden["w"]), "nf4", double=True)
    # Its search for the nearest of 256 values is off by one now and then, ours is not.
    codes = np.asarray(double.constants).reshape(-1)[: golden["codes8"].size]
    far = np.abs(codes.astype(int) - golden["codes8"].reshape(-1))
    assert far.max() <= 1 and (far == 0).mean() > 0.99
    np.testing.assert_allclose(
        double.value(), golden["read8"], atol=2e-2 * np.abs(golden["w"]).max()
    )


@pytest.mark.parametrize(
    "shape, format, double, bits",
    [
        ((4096, 4096), "nf4", False, 4.5),
        ((4096, 4096), "nf4", True, 4.127),
        ((32, 512, 512), "nf4", True, 4.127),
        ((4096, 4096), "int8", False, 8 + 32 / 4096),
        ((4096, 4096), "mxfp4", False, 4.25),
        ((8, 256, 512), "nvfp4", False, 4.5 + 32 / 2**17),
        ((100, 100), "nf4", False, 4 * 1.28 + 64 / 100),
    ],
)
def test_bits_for_each_parameter(shape, format, double, bits):
    make = functools.partial(quantized, format=format, double=double, stack=len(shape) - 2)
    q = jax.eval_shape(make, jax.ShapeDtypeStruct(shape, "float32"))
    assert abs(q.bits - bits) < 1e-3


CHOSEN = {
    "matmul", "transposed", "ragged experts", "look-up and head", "scan", "conv 2d dilated",
    "picked experts", "vmap over weights", "weight on the left", "reshaped",
}  # fmt: skip


@pytest.mark.parametrize(
    "name, format",
    [
        pytest.param(n, f, marks=() if n in CHOSEN and f == "nf4" else pytest.mark.slow)
        for n in sorted(USES)
        for f in ("nf4", "int8")
    ],
)
def test_equals_the_dequantised_base(name, format):
    """With an adapter and without one: outputs and gradients."""
    fn, w, x = USES[name]
    q = {"w": quantized(w, format, double=format == "nf4")}
    plain = lora.quant.dequantize(q)
    f, adapters = adapted(fn, plain, x, targets="w", strict=False)
    got, want = (
        value_and_grad(run)(adapters)
        for run in (
            lambda ad: f(lora.bind(q, ad), x),
            lambda ad: fn(lora.merge(plain, ad), x),
        )
    )
    assert_close(got[1], want[1])
    assert_close(got[0], want[0], factor=256)
    frozen = jax.jit(lambda q, x: lora.adapt(fn)(lora.bind(q, None), x))(q, x)
    assert_close(frozen, fn(plain, x))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e5m2"])
@pytest.mark.parametrize(
    "format, double", [(f, False) for f in FORMATS if f != "mxfp4"] + [("nf4", True)]
)
def test_constants_of_any_floating_type(format, double, dtype):
    """As a tree of floats that is cast has them: read as what they are, in fp32."""
    q = quantized(rand.normal(KEY, (2, 8, 128)), format, double=double, stack=1)
    floats = lambda x: x.dtype == jnp.float32
    cast = lambda x: x.astype(dtype) if floats(x) else x
    got = jax.tree.map(cast, q)
    want = jax.tree.map(lambda x: cast(x).astype(x.dtype), q)
    assert any(map(floats, jax.tree.leaves(q)))
    np.testing.assert_array_equal(got.value(), want.value())


@pytest.mark.slow
def test_gradient_of_the_input_through_frozen_weights():
    q = {"w": quantized(W, "nf4"), "v": quantized(W.T, "int8")}
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]
    f, plain = lora.adapt(fn), lora.quant.dequantize(q)
    loss = lambda run: lambda x: jnp.sum(jnp.sin(run(x)))
    ours, dense = loss(lambda x: f(lora.bind(q, None), x)), loss(lambda x: fn(plain, x))
    for transform in (
        jax.grad,
        jax.jacfwd,
        lambda g: lambda x: jax.vmap(jax.grad(g))(jnp.stack([x, 2 * x])),
    ):
        assert_close(transform(ours)(X), transform(dense)(X), factor=256)


def model(scanned):
    net = Transformer(scanned)
    params = net.init(KEY, IDS)["params"]
    return params, lambda params, ids: net.apply({"params": params}, ids)


@pytest.mark.parametrize(
    "scanned, method",
    [pytest.param(False, None, marks=pytest.mark.slow), (True, lora.methods.dora)],
)
def test_a_model(scanned, method):
    """All linear leaves and the table quantised, some adapted; scanned layers one by one."""
    params, apply = model(scanned)
    survey = lora.survey(apply, params, IDS)
    kinds = {p for p, leaf in survey.leaves.items() if leaf.kind in ("linear", "embedding")}
    q = lora.quant.quantize(params, [*sorted(kinds)], survey=survey, double=True)
    plain = lora.quant.dequantize(q)
    f, adapters = adapted(apply, plain, IDS, targets=["query/kernel", "up/kernel"], method=method)
    got, want = (
        value_and_grad(run)(adapters)
        for run in (
            lambda ad: f(lora.bind(q, ad), IDS),
            lambda ad: apply(lora.merge(plain, ad), IDS),
        )
    )
    assert_close(got[1], want[1], factor=256)
    assert_close(got[0], want[0], factor=2048)
    # The survey, and what is chosen of it, are those of the plain parameters.
    assert str(lora.survey(apply, q, IDS)) == str(survey)
    assert_close(lora.merge(q, adapters), lora.merge(plain, adapters))


def test_nothing_dequantised_is_kept():
    """The compiled step of eight layers holds one dequantised weight or two, not eight; and what it
    takes as arguments is 4.127 bits for each parameter."""
    n, d = 8, 256
    params = {f"w{i}": rand.normal(jax.random.fold_in(KEY, i), (d, d)) / 16 for i in range(n)}

    def fn(p, x):
        for i in range(n):
            x = jnp.tanh(x @ p[f"w{i}"])
        return x

    x = jnp.ones((4, d))
    config = lora.LoRAConfig(rank=2, targets=["w0", "w3"])
    adapters = lora.init(KEY, params, config)
    q = lora.quant.quantize(params, "w*", double=True)
    loss = lambda ad, q: jnp.sum(lora.adapt(fn)(lora.bind(q, ad), x))
    memory = jax.jit(jax.grad(loss)).lower(adapters, q).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 3.5 * d * d * 4
    small = sum(v.nbytes for v in jax.tree.leaves(adapters))
    bits = 8 * (memory.argument_size_in_bytes - small) / (n * d * d)
    assert abs(bits - 4.127) < 0.01


def test_a_scan_reads_one_layer():
    """No array of the stack's shape in the compiled program, but codes."""
    stack = rand.normal(KEY, (8, 128, 128)) / 16
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    survey = lora.survey(fn, {"w": stack}, jnp.ones((4, 128)))
    q = lora.quant.quantize({"w": stack}, "w", survey=survey, double=True)
    adapters = noisy(lora.init(KEY, {"w": stack}, lora.LoRAConfig(rank=2, targets="w"), survey))
    loss = lambda ad, q: jnp.sum(lora.adapt(fn)(lora.bind(q, ad), jnp.ones((4, 128))))
    text = jax.jit(jax.grad(loss)).lower(adapters, q).compile().as_text()
    assert not re.search(r"(f32|bf16|u8)\[8,128,128\]", text) and "u8[8,128,64]" in text


def test_sharded():
    """Codes, constants and adapters on eight devices, as on one."""
    params, apply = model(True)
    survey = lora.survey(apply, params, IDS)
    q = lora.quant.quantize(params, "all-linear", "int8", survey=survey)
    f, adapters = adapted(apply, params, IDS, targets=["query/kernel", "up/kernel", "down/kernel"])
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spec = lambda x: P(*[None] * (x.ndim - 1), "model" if x.shape[-1] % 4 == 0 else None)
    placed = jax.device_put(q, jax.tree.map(lambda x: NamedSharding(mesh, spec(x)), q))
    spread = jax.device_put(adapters, lora.parallel.shardings(placed, adapters))
    assert spread["layers"]["up"]["kernel"].b.sharding.spec[-1] == "model"
    loss = jax.jit(jax.value_and_grad(lambda ad, q: jnp.sum(jnp.sin(f(lora.bind(q, ad), IDS)))))
    assert_close(loss(spread, placed), loss(adapters, q), factor=512)


@pytest.mark.parametrize("how", ["shard_map", "pmap", "explicit batch", "slots"])
def test_other_ways_to_spread(how):
    """The base's codes on every device, examples and their gradients spread."""
    w = rand.normal(KEY, (2, 12, 64)) / 4
    q = {"w": quantized(w, "nf4"), "v": quantized(w[0].T, "int8")}
    fn = lambda p, x: jnp.tanh(x @ p["w"][0] + x @ p["w"][1]) @ p["v"]
    x = rand.normal(KEY, (8, 5, 12))
    f, adapters = adapted(fn, lora.quant.dequantize(q), x, targets="w")
    loss = lambda ad, q, x: jnp.mean(jnp.sin(f(lora.bind(q, ad), x)))
    want = jax.jit(jax.value_and_grad(loss))(adapters, q, x)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    step = jax.value_and_grad(lambda ad, q, x: jax.lax.pmean(loss(ad, q, x), "d"))
    if how == "shard_map":
        specs = dict(mesh=mesh, in_specs=(P(), P(), P("d")), out_specs=P())
        assert_close(jax.jit(jax.shard_map(step, **specs))(adapters, q, x), want, factor=256)
    elif how == "pmap":
        each = jax.value_and_grad(loss)
        mean = lambda *args: jax.tree.map(lambda v: jax.lax.pmean(v, "d"), each(*args))
        got = jax.pmap(mean, axis_name="d", in_axes=(None, None, 0))(adapters, q, x[:, None])
        assert_close(jax.tree.map(lambda v: v[0], got), want, factor=256)
    elif how == "explicit batch":
        mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
        with jax.set_mesh(mesh):
            everywhere = jax.device_put((adapters, q), NamedSharding(mesh, P()))
            spread = jax.device_put(x, NamedSharding(mesh, P("d")))
            assert_close(jax.jit(jax.value_and_grad(loss))(*everywhere, spread), want, factor=256)
    else:
        stacked = lora.algebra.stack([adapters, jax.tree.map(lambda v: -v, adapters)])
        one = lambda i, x: f(lora.bind(q, lora.algebra.choose(stacked, i)), x)
        got = jax.vmap(one)(jnp.zeros(8, int), x)
        assert_close(got, f(lora.bind(q, adapters), x), factor=256)


def test_training_saving_restoring(tmp_path):
    import orbax.checkpoint as ocp

    params, apply = model(True)
    survey = lora.survey(apply, params, IDS)
    q = lora.quant.quantize(params, "all-linear", survey=survey)
    config = lora.LoRAConfig(rank=2, targets="query/kernel")
    adapters = lora.init(KEY, q, config, survey)
    f, tx = lora.adapt(apply), optax.sgd(0.1)

    @jax.jit
    def step(adapters, state):
        grads = jax.grad(lambda ad: jnp.sum(jnp.sin(f(lora.bind(q, ad), IDS))))(adapters)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(adapters, updates), state

    trained, state = step(*step(adapters, tx.init(adapters)))
    with ocp.CheckpointManager(tmp_path) as manager:
        lora.checkpoint.save(manager, 1, trained, base=q, config=config, state=state)
        manager.wait_until_finished()
    back = lora.checkpoint.restore(tmp_path, base=q)
    jax.tree.map(np.testing.assert_array_equal, back.adapters, trained)
    other = lora.quant.quantize(params, "all-linear", "int8", survey=survey)
    with fails("float32 as nf4"):
        lora.checkpoint.restore(tmp_path, base=other)


def test_orbax_keeps_a_base_in_codes(tmp_path):
    """Of every format, spread over devices: bits and shardings."""
    import orbax.checkpoint as ocp

    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    w = rand.normal(KEY, (64, 128))
    base = {name: quantized(w, name) for name in FORMATS} | {"2": quantized(w, double=True)}
    place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
    base = {k: jax.tree.map(place, q, q.specs(P("d", None), mesh)) for k, q in base.items()}
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "base", base)
        saver.wait_until_finished()
        back = saver.restore(tmp_path / "base", jax.tree.map(ocp.utils.to_shape_dtype_struct, base))
    assert jax.tree.structure(back) == jax.tree.structure(base)
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(base)):
        assert got.dtype == want.dtype and got.sharding == want.sharding
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_leaf_by_leaf():
    """From shapes and a reader: never more than one leaf at once."""
    values = {"a": {"w": W}, "b": W.T, "norm": jnp.ones(6)}
    shapes = jax.eval_shape(lambda: values)
    read = []

    def load(path):
        read.append(path)
        return {"a/w": W, "b": W.T, "norm": jnp.ones(6)}[path]

    got = lora.quant.quantize(shapes, ["a/w", "b"], load=load)
    assert_close(
        lora.quant.dequantize(got), lora.quant.dequantize(lora.quant.quantize(values, ["a/w", "b"]))
    )
    assert read == ["a/w", "b", "norm"]


def test_what_reads_a_quantised_base():
    """The singular vectors of LoRA-XS, the empty slot of a stack, PLoP's norms: those of its
    values. An initialiser cannot take anything out of codes."""
    params = {"w": rand.normal(jax.random.key(0), (32, 16)), "v": jnp.ones((16, 2))}
    small = lora.quant.quantize(params, "w", "int8")
    values = lora.quant.dequantize(small)
    config = lora.LoRAConfig(rank=2, targets="w")
    adapters = lora.init(jax.random.key(1), params, config)
    xs = lambda p: lora.methods.init_lora_xs(jax.random.key(1), p, config)
    assert_close(xs(small), xs(values))
    full = lora.init(jax.random.key(1), params, lora.LoRAConfig(rank=2, targets="v", full="w"))
    for one in (lora.methods.dora(small, adapters), full):
        assert_close(lora.algebra.stack([one], base=small), lora.algebra.stack([one], base=values))
    fn, x = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], jnp.ones((3, 32))
    survey, moments = (
        lora.survey(fn, params, x),
        lora.methods.second_moments(fn, values, adapters, x),
    )
    scores = [lora.methods.propose(p, survey, moments=moments).scores for p in (small, values)]
    assert scores[0] == scores[1]
    with fails("(?s)quantised.*'w'.*first the initialiser"):
        lora.methods.pissa(small, adapters)


def test_other_nodes_on_a_quantised_base():
    """Rows of a table and leaves trained in full start from what is read."""
    table = rand.normal(KEY, (10, 64))
    q = lora.quant.quantize({"table": table, "w": W}, ["table"], double=True)
    config = lora.LoRAConfig(rank=2, targets=["w"], rows={"table": [1, 3]})
    fn = lambda p, ids: p["table"][ids][:, :6] @ p["w"]
    adapters = noisy(lora.init(KEY, q, config))
    ids = jnp.array([0, 1, 3, 5])
    want = fn(lora.merge(q, adapters), ids)
    assert_close(lora.adapt(fn)(lora.bind(q, adapters), ids), want)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: lora.quant.quantize({"w": W}, "w", "nf5"), "format='nf5': expected one of nf4"),
        (lambda: lora.quant.quantize({"w": W}, "v"), "'v' matches no leaf"),
        (lambda: lora.quant.quantize({"w": W[0]}, "w"), r"cannot quantise|ambiguous|axes"),
        (lambda: lora.quant.quantize({"w": W}, "w", "int8", double=True), "a constant per channel"),
        (
            lambda: lora.quant.quantize({"w": W}, "w", "mxfp4", double=True),
            "are of 8 bits without it",
        ),
        (
            lambda: lora.quant.quantize({"w": W}, "w", "nvfp4", double=True),
            "'nvfp4' are of 8 bits without it",
        ),
        (
            lambda: lora.quant.quantize(lora.quant.quantize({"w": W}, "w"), "w"),
            "quantised already:\n  - 'w'",
        ),
    ],
)
def test_errors(call, match):
    with fails(match):
        call()


@pytest.mark.parametrize(
    "format, double", [("nf4", True), ("int8", False), ("mxfp4", False), ("nvfp4", False)]
)
def test_merging_into_codes_again(format, double):
    """As quantising what was merged; leaves without an adapter are the same arrays."""
    params = {"w": rand.normal(KEY, (3, 64, 64)), "v": jnp.eye(64), "norm": jnp.ones(4)}
    rule = lora.Rule("w", batch_axes=(0,), in_axes=(1,), out_axes=(2,))
    config = lora.LoRAConfig(rank=2, targets=["w"], rules=[rule])
    both = lora.select(params, lora.LoRAConfig(targets=["w", "v"], rules=[rule]))
    q = lora.quant.quantize(params, both, format, double=double)
    adapters = noisy(lora.init(KEY, q, config))
    merged, again = lora.merge(q, adapters), lora.merge(q, adapters, requantize=True)
    assert again["v"] is q["v"] and again["norm"] is params["norm"]
    want = lora.quant.quantize(merged, lora.select(merged, config), format, double=double)["w"]
    jax.tree.map(np.testing.assert_array_equal, again["w"], want)
    error = lora.quant.errors(merged, again)["w"]
    assert 0.1 < error / lora.quant.errors(params, q)["w"] < 2
    given = lora.merge(jax.tree.map(jnp.copy, q), adapters, donate=True, requantize=True)
    jax.tree.map(np.testing.assert_array_equal, given["w"], again["w"])


@pytest.mark.parametrize(
    "use",
    [
        lambda q: X @ q,
        lambda q: q @ X.mT,
        lambda q: jnp.sum(q),
        lambda q: q.T,
        lambda q: q[0],
        lambda q: q.astype(jnp.bfloat16),
        lambda q: lora.adapt(lambda p, x: x @ p["w"])({"w": q}, X),  # not bound
    ],
)
def test_a_quantised_weight_is_no_array(use):
    with fails(
        r"(?s)Quantized\(\(6, 6\).*lora.bind\(params, adapters\).*lora.quant.dequantize\(params\)"
    ):
        use(quantized(W, "nf4"))


def test_each_weight_is_read_once_where_a_step_is_lowered(monkeypatch):
    """Of one platform alone, and once for all layers of one shape: forward, and for the gradient."""
    read, halved = [], []
    original = formats.read
    monkeypatch.setattr(weight, "read", lambda *a: read.append(1) or original(*a))
    monkeypatch.setattr(weight.Quantized, "each_half", lambda *a: halved.append(1))
    names = [f"w{i}" for i in range(5)]
    params = {n: rand.normal(jax.random.key(0), (192, 192)) for n in names}
    fn = lambda p, x: functools.reduce(lambda x, n: jnp.tanh(x @ p[n]), names, x)
    x = jnp.ones((7, 192))
    f, ad = adapted(fn, params, x, targets=names, plan="factored")
    base = lora.quant.quantize(params, names)
    step = jax.jit(jax.grad(lambda ad, base: jnp.sum(f(lora.bind(base, ad), x))))
    text = step.lower(ad, base).as_text()
    assert (len(read), len(halved)) == (2, 0)
    assert "stablehlo.case" not in text
