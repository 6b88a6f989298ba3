"""Parameters in qwix's arrays: the values of qwix, and adapters that train on them."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from common import assert_close, fails, installed, noisy, value_and_grad

import lora_jax as lora

KEY = jax.random.key(0)
needs_qwix = pytest.mark.skipif(not installed("qwix"), reason="needs qwix")


def qarray(qvalue, scale, zero_point=None, qtype=None):
    """What is read of a QArray, without qwix."""
    qtype = qvalue.dtype if qtype is None else qtype
    return SimpleNamespace(qvalue=qvalue, scale=scale, zero_point=zero_point, qtype=qtype)


def by_hand(q):
    """(qvalue − zero_point) · scale, each number of a tile repeated, in the scale's type."""
    values = jnp.asarray(q.qvalue).astype(jnp.float32)
    if q.qtype == "nf4":
        values = jnp.asarray(lora._quantized.formats.NF4)[values.astype(int)]
    whole = lambda x: x
    for d in range(q.qvalue.ndim):
        n = lambda x, d=d: q.qvalue.shape[d] // x.shape[d]
        whole = lambda x, d=d, n=n, before=whole: jnp.repeat(before(x), n(x), d)
    w = values.astype(q.scale.dtype)
    if q.zero_point is not None:
        w = w - whole(q.zero_point.astype(jnp.float32)).astype(w.dtype)
    return w * whole(q.scale)


def some(dtype, shape, tiles, zero=False, scale="float32", qtype=None):
    k = jax.random.split(KEY, 3)
    if "float" in dtype:
        codes = (2 * rand.normal(k[0], shape)).astype(dtype)
    else:
        low, high = {"int8": (-128, 128), "int4": (-8, 8), "uint4": (0, 16)}[dtype]
        codes = jax.random.randint(k[0], shape, low, high).astype(dtype)
    constants = jax.random.uniform(k[1], tiles, minval=0.1).astype(scale)
    zeros = jax.random.randint(k[2], tiles, -5, 6).astype(dtype) if zero else None
    return qarray(codes, constants, zeros, qtype)


KINDS = {
    "channelwise": functools.partial(some, "int8", (64, 32), (1, 32)),
    "whole": functools.partial(some, "int8", (64, 32), (1, 1), scale="bfloat16"),
    "tiles": functools.partial(some, "int8", (64, 32), (4, 32), scale="bfloat16"),
    "tiles of both axes": functools.partial(some, "int8", (64, 32), (4, 8)),
    "zero points": functools.partial(some, "int8", (64, 32), (4, 32), zero=True, scale="bfloat16"),
    "int4": functools.partial(some, "int4", (64, 32), (4, 32), zero=True, scale="bfloat16"),
    "int4, odd": functools.partial(some, "int4", (64, 33), (1, 33)),
    "int3": functools.partial(some, "int4", (64, 32), (1, 32), qtype="int3"),
    "nf4": functools.partial(some, "uint4", (64, 32), (4, 32), qtype="nf4", scale="bfloat16"),
    "fp8": functools.partial(some, "float8_e4m3fn", (64, 32), (1, 32)),
    "mxfp8": functools.partial(some, "float8_e4m3fn", (64, 32), (2, 32), qtype="mxfp8"),
    "mxfp4": functools.partial(
        some, "float4_e2m1fn", (64, 32), (2, 32), qtype="mxfp4", scale="bfloat16"
    ),
}


def check(q, values):
    """Values to the bit; trained on as on what they stand for, used both ways round."""
    base, plain = lora.quant.from_qwix({"w": q}), {"w": values}
    assert base["w"].shape == values.shape and base["w"].dtype == values.dtype
    np.testing.assert_array_equal(jax.jit(lambda b: b.value())(base["w"]), values)
    fn = lambda p, x: (jnp.tanh(x @ p["w"]) @ p["w"].T).astype(jnp.float32)
    x = rand.normal(KEY, (5, values.shape[0])).astype(values.dtype)
    adapters = noisy(lora.init(KEY, plain, lora.LoRAConfig(rank=2, targets="w")))
    got, want = (value_and_grad(lambda ad, p=p: lora.adapt(fn)(lora.bind(p, ad), x))(adapters)
                 for p in (base, plain))  # fmt: skip
    assert_close(got, want, dtype=values.dtype, factor=8)
    to_x = lambda p: jax.grad(lambda x: jnp.sum(jnp.sin(lora.adapt(fn)(lora.bind(p, None), x))))(x)
    plain_to_x = jax.grad(lambda x: jnp.sum(jnp.sin(fn(plain, x))))(x)
    assert_close(to_x(base), plain_to_x, dtype=values.dtype, factor=8)


@pytest.mark.parametrize("name", KINDS)
def test_values_are_those_of_the_definition(name):
    q = KINDS[name]()
    base = lora.quant.from_qwix(q)
    np.testing.assert_array_equal(base.value(), by_hand(q))
    four = name.startswith(("int4", "int3", "nf4", "mxfp4"))
    assert base.codes.nbytes == -(-q.qvalue.shape[1] // (2 if four else 1)) * 64
    with fails("only read"):
        node = lora.init(KEY, {"w": by_hand(q)}, lora.LoRAConfig(rank=2, targets="w"))
        lora.merge({"w": base}, node, requantize=True)


@pytest.mark.parametrize("name", ["zero points", "nf4"])
def test_training(name):
    q = KINDS[name]()
    check(q, by_hand(q))


def test_scanned_layers_and_trees_that_hold_them():
    """Stacked arrays are sliced in their codes; what is around a QArray is taken off."""
    q = some("int8", (3, 32, 32), (3, 4, 32), zero=True)
    aux = SimpleNamespace(array=q, how=None)
    base = lora.quant.from_qwix({"w": aux, "norm": jnp.ones(4)})
    assert base["w"].sliceable and base["norm"].shape == (4,)
    plain = {"w": by_hand(q)}
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    x = rand.normal(KEY, (5, 32))
    adapters = noisy(
        lora.init(KEY, plain, lora.LoRAConfig(rank=2, targets="w"), lora.survey(fn, plain, x))
    )
    got, want = (value_and_grad(lambda ad, p=p: lora.adapt(fn)(lora.bind(p, ad), x))(adapters)
                 for p in ({"w": base["w"]}, plain))  # fmt: skip
    assert_close(got, want)
    whole = lora.quant.from_qwix(some("int8", (3, 32, 32), (1, 4, 32)))
    assert not whole.sliceable  # one constant for all layers


BAD = {
    "tiles": (lambda: qarray(jnp.ones((64, 32), "int8"), jnp.ones((3, 32))), r"scale \(3, 32\) does not stand"),
    "axes": (lambda: qarray(jnp.ones((64, 32), "int8"), jnp.ones(32)), r"scale \(32,\) does not stand"),
    "codes": (lambda: qarray(jnp.ones((4, 4), "int32"), jnp.ones((1, 4))), "codes of int32; expected int4"),
    "qtype": (lambda: qarray(jnp.ones((4, 4), "int8"), jnp.ones((1, 4)), None, "int9"), "'int9' is none"),
    "nf4": (lambda: qarray(jnp.ones((4, 4), "int8"), jnp.ones((1, 4)), None, "nf4"), "'nf4' has uint4"),
    "uint4": (lambda: qarray(jnp.ones((4, 4), "uint4"), jnp.ones((1, 4))), "codes of uint4; expected"),
    "scale": (lambda: qarray(jnp.ones((4, 4), "int8"), jnp.ones((1, 4), "int32")), "a scale of int32"),
    "zero": (lambda: qarray(jnp.ones((4, 4), "int8"), jnp.ones((1, 4)), jnp.ones((1, 4))), "zero_point of fl"),
    "nan": (lambda: qarray(jnp.ones((4, 4), "int8"), jnp.full((1, 4), jnp.nan)), "scale is not finite"),
    "shapes": (lambda: qarray(jax.ShapeDtypeStruct((4, 4), "int8"), jnp.ones((1, 4))), "jax.eval_shape"),
    "none": (lambda: qarray(None, None, None, jnp.int8), "no qvalue or no scale"),
    "no scale": (
        lambda: qarray(jnp.ones((4, 4), "int8"), None, jnp.ones((1, 4), "int8"), jnp.int8),
        "no qvalue or no scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    make, match = BAD[name]
    with fails(rf"(?s)cannot be kept in their codes:.*'a/w': .*{match}"):
        lora.quant.from_qwix({"a": {"w": make()}, "b": KINDS["int4"]()})


def test_without_a_qarray():
    with fails("no leaf is a QArray"):
        lora.quant.from_qwix({"w": jnp.ones((4, 4))})


@pytest.mark.slow
@needs_qwix
@pytest.mark.parametrize(
    "qtype, how, scale",
    [
        (t, h, s)
        for t, h, s in itertools.product(
            [jnp.int8, jnp.int4, "int3", "int6", "nf4", jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float4_e2m1fn],
            [dict(channelwise_axes=[1]), dict(channelwise_axes=[1], tiled_axes={0: 16}),
             dict(tiled_axes={0: 16, 1: 8}), dict()],
            ["float32", "bfloat16"],
        )
    ]
    + [(t, dict(channelwise_axes=[1], calibration_method="minmax"), s)
       for t in (jnp.int8, jnp.int4) for s in ("float32", "bfloat16")],
)  # fmt: skip
def test_equal_to_qwix(qtype, how, scale):
    import qwix

    w = rand.normal(KEY, (64, 32)).astype(scale)
    with jax.numpy_dtype_promotion("standard"):  # as qwix needs
        q = qwix.quantize(w, qtype, **how)
        want = qwix.dequantize(q)
    np.testing.assert_array_equal(lora.quant.from_qwix(q).value(), want)


@pytest.mark.slow
@needs_qwix
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_that_qwix_quantised():
    """Linen, by `quantize_params`: outputs and gradients as on what qwix dequantises."""
    import flax.linen as nn
    import qwix

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(16)(nn.tanh(nn.Dense(64)(x)))

    net, x = Net(), rand.normal(KEY, (5, 32))
    params = net.init(KEY, x)["params"]
    rules = [qwix.QuantizationRule(weight_qtype="nf4", tile_size=16)]
    abstract = jax.eval_shape(qwix.quantize_model(net, qwix.PtqProvider(rules)).init, KEY, x)[
        "params"
    ]
    theirs = qwix.quantize_params(params, abstract)
    base = lora.quant.from_qwix(theirs)
    aux = lambda a: hasattr(a, "how")
    plain = jax.tree.map(lambda a: qwix.dequantize(a.array) if aux(a) else a, theirs, is_leaf=aux)
    assert sum(isinstance(q, lora.quant.Quantized) for q in base["Dense_0"].values()) == 1
    call = lora.adapt(lambda p: net.apply({"params": p}, x))
    adapters = noisy(lora.init(KEY, plain, lora.LoRAConfig(rank=2, targets="kernel")))
    got, want = (
        value_and_grad(lambda ad, p=p: call(lora.bind(p, ad)))(adapters) for p in (base, plain)
    )
    assert_close(got, want)


@pytest.mark.skipif(not installed("aqt"), reason="needs aqtp")
@pytest.mark.parametrize("bits, dtype", [(8, "float32"), (4, "float32"), (8, "bfloat16")])
def test_a_tensor_of_aqt(bits, dtype):
    """The line of docs/quantized.md."""
    from aqt.jax.v2 import aqt_quantizer

    w = rand.normal(KEY, (64, 32)).astype(dtype)
    quantizer = aqt_quantizer.quantizer_make(bits, initialize_calibration=False)
    quantizer.init_calibration()
    q = quantizer.quant(w, calibration_axes=(0,))[0]
    as_qarray = lambda q: qarray(q.qvalue, q.scale[0])
    np.testing.assert_array_equal(lora.quant.from_qwix(as_qarray(q)).value(), q.dequant())
