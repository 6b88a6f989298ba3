"""Training through the rounding that merging into codes brings: the same function afterwards."""

import functools
import itertools
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from common import assert_close, fails, noisy, tolerance
from flax import nnx
from jax.extend.core import Literal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax._quantized.formats import FORMATS
from lora_jax._quantized.make import in_codes, rounded

KEY = jax.random.key(0)


def normal(seed, *shape):
    """Numbers of few bits, so that W + s·A·B is the same in whatever order it is summed."""
    x = rand.normal(jax.random.key(seed), shape)
    return jnp.round(x * 32) / 32


X = normal(5, 6, 64)
PARAMS = {"up": normal(1, 64, 96), "down": normal(2, 64, 96), "norm": jnp.ones(96)}
NET = lambda p, x: (jnp.tanh(x @ p["up"]) * p["norm"]) @ p["down"].T


def started(params, fn, *args, targets=("up", "down"), **config):
    survey = lora.survey(fn, lora.quant.dequantize(params), *args)
    config = lora.LoRAConfig(rank=2, alpha=4, targets=list(targets), **config)
    adapters = lora.init(KEY, params, config, survey)
    return jax.tree.map(lambda x: jnp.round(noisy(x, scale=0.5) * 8) / 8, adapters)


def loss(y):
    return jnp.sum(jnp.sin(y.astype(jnp.float32)))


def straight_through(q, fn, params, adapters, *args):
    """The definition: Q(W + s·A·B) forward, and the gradient of W + s·A·B."""
    merged = lora.merge(params, adapters)
    w = {k: m + jax.lax.stop_gradient(v - m) for (k, m), v in zip(merged.items(), q.values())}
    return fn(w, *args)


def each(*cases, ci):
    """All cases; those that are not in `ci` by night."""
    return [pytest.param(*c, marks=() if c in ci else pytest.mark.slow) for c in cases]


DTYPES = list(itertools.product(FORMATS, ["float32", "bfloat16"]))
CASES = [
    *((format, dtype, dtype == "bfloat16") for format, dtype in DTYPES),
    *(("nf4", dtype, dtype == "float32") for dtype in ("bfloat16", "float16", "float32")),
]
CI = {("nf4", "bfloat16"), ("nvfp4", "float32"), ("fp8", "bfloat16"), ("int8_block", "float32")}


@pytest.mark.parametrize(
    "format, dtype, coded",
    each(*CASES, ci={("nf4", "float32", True), ("nvfp4", "float32", False),
                     ("int8", "float32", False), ("fp8_block", "bfloat16", True)}),
)  # fmt: skip
def test_the_function_is_kept_by_merging(format, dtype, coded):
    """Outputs, and the gradients of factors and input by the definition, written by hand."""
    base, X = jax.tree.map(lambda x: x.astype(dtype), (PARAMS, globals()["X"]))
    base = lora.quant.quantize(base, ["up", "down"], format) if coded else base
    adapters = started(base, NET, X)
    f = lora.adapt(NET, merge_aware=format)
    ours = lambda ad, x: f(lora.bind(base, ad), x)
    merged = lora.merge(base, adapters, requantize=True if coded else format)
    assert all(merged[k].format == format for k in ("up", "down"))
    assert merged["norm"] is base["norm"]
    plain = lora.quant.dequantize(merged)
    both = jax.jit(lambda ad, x: (ours(ad, x), jax.grad(lambda *a: loss(ours(*a)), (0, 1))(ad, x)))
    got, grads = both(adapters, X)
    assert_close(got, NET(plain, X), dtype)
    assert_close(jax.jit(lambda x: lora.adapt(NET)(lora.bind(merged, None), x))(X), got, dtype)
    if dtype == "float32":  # below that, gradients are of what each product rounds
        by_hand = lambda ad, x: loss(straight_through(plain, NET, base, ad, x))
        assert_close(grads, jax.grad(by_hand, (0, 1))(adapters, X), factor=512)
    lost = NET(lora.merge(base, adapters), X)
    assert np.abs(lost - got).max() > 1e-3  # rounding is seen


@pytest.mark.parametrize("format, dtype", each(*DTYPES, ci=CI))
def test_any_numbers(format, dtype):
    """What a product meets is what is stored: on all but a few, that sums in another order carry
    over the middle of two levels, and there the next one. The last block is not full."""
    params = {"w": rand.normal(KEY, (40, 72)).astype(dtype)}
    adapters = noisy(lora.init(KEY, params, lora.LoRAConfig(rank=3, targets="w")), scale=0.3)
    f = lora.adapt(lambda p, x: x @ p["w"], merge_aware=format)
    met = jax.jit(lambda ad: f(lora.bind(params, ad), jnp.eye(40, dtype=dtype)))(adapters)
    merged = lora.merge(params, adapters)["w"]
    kept = lora.merge(params, adapters, requantize=format)["w"].value()
    met, merged, kept = (np.asarray(w, np.float64) for w in (met, merged, kept))
    other = np.abs(met - kept) > 4 * tolerance(dtype, 1) * np.abs(kept)
    assert other.mean() < 0.01
    error = np.abs(met - merged) - np.abs(kept - merged)  # neither is nearer
    assert (np.abs(error[other]) <= 4 * tolerance(dtype, 1) * np.abs(merged[other])).all()


def without_casts(jaxpr, *args):
    """A function of floats, where no cast to a narrower float rounds, as XLA may have it."""
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    wide = lambda x: x.astype(jnp.float32) if is_float(x) else x
    env = dict(zip(jaxpr.jaxpr.constvars + jaxpr.jaxpr.invars, [*jaxpr.consts, *args]))
    read = lambda v: jnp.asarray(v.val, v.aval.dtype) if isinstance(v, Literal) else env[v]
    for eqn in jaxpr.jaxpr.eqns:
        xs = [wide(read(v)) for v in eqn.invars]
        if eqn.primitive.name == "convert_element_type" and is_float(eqn.outvars[0].aval):
            outs = [xs[0] if is_float(xs[0]) else xs[0].astype(jnp.float32)]
        elif "jaxpr" in eqn.params:
            outs = without_casts(eqn.params["jaxpr"], *xs)
        else:
            outs = eqn.primitive.bind(*xs, **eqn.primitive.get_bind_params(eqn.params))
            outs = outs if eqn.primitive.multiple_results else [outs]
        env |= zip(eqn.outvars, outs)
    return [read(v) for v in jaxpr.jaxpr.outvars]


@pytest.mark.parametrize("format, dtype", each(*DTYPES, ci=CI))
def test_it_is_rounded_where_casts_are_left_out(format, dtype):
    """XLA may leave out a cast to a narrower float and back; then what is read where it is made,
    in training, would not be what was stored."""
    how = dict(in_axes=(-2,), stack=0)
    w = rand.normal(KEY, (32, 128)).at[3].multiply(1e-3)
    jaxpr = jax.make_jaxpr(lambda w: rounded(w.astype(dtype), format, **how, double=False))(w)
    (got,) = without_casts(jaxpr, w)
    np.testing.assert_array_equal(
        got.astype(dtype), in_codes(w.astype(dtype), format, **how).value()
    )


def test_forward_and_reverse_are_one_derivative():
    adapters = started(PARAMS, NET, X)
    f = lora.adapt(NET, merge_aware="nf4")
    ours = lambda ad, x: f(lora.bind(PARAMS, ad), x)
    to = jax.tree.map(jnp.cos, (adapters, X))
    y, tangent = jax.jvp(ours, (adapters, X), to)
    _, back = jax.vjp(ours, adapters, X)
    dot = lambda a, b: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))
    assert_close(dot(back(jnp.sin(y)), to), dot(jnp.sin(y), tangent), factor=1024)


@pytest.mark.parametrize("coded", [False, True])
def test_over_several_devices(coded):
    """A base spread as by FSDP and by tensors, in arrays or in codes: as on one device."""
    base = lora.quant.quantize(PARAMS, ["up", "down"], "nvfp4") if coded else PARAMS
    adapters = started(base, NET, X)
    f = lora.adapt(NET, merge_aware="nvfp4")
    step = jax.jit(jax.value_and_grad(lambda ad, p, x: loss(f(lora.bind(p, ad), x)), (0, 2)))
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
    spread = {
        k: jax.tree.map(place, w, w.specs(P("fsdp", "tp"), mesh)) if isinstance(w, lora.quant.Quantized)
        else place(w, P("fsdp", "tp") if w.ndim == 2 else P())
        for k, w in base.items()
    }  # fmt: skip
    ours = jax.device_put(adapters, lora.parallel.shardings(spread, adapters))
    assert_close(step(ours, spread, place(X, P())), step(adapters, base, X), factor=512)


@pytest.mark.parametrize("method", ["vera", "lora_xs"])
def test_other_methods(method):
    """Whose factors are made of fewer numbers."""
    config = lora.LoRAConfig(rank=2, targets=["up", "down"])
    start, frozen = getattr(lora.methods, f"init_{method}")(KEY, PARAMS, config)
    start = noisy(start, scale=0.5)
    adapters = lora.methods.factors(start, frozen)
    got = jax.jit(lambda ad: lora.adapt(NET, merge_aware="int8")(lora.bind(PARAMS, ad), X))(
        adapters
    )
    stored = lora.quant.dequantize(lora.merge(PARAMS, adapters, requantize="int8"))
    # a number near the middle of two levels may fall to either side
    error = np.abs(got - NET(stored, X))
    assert error.mean() < 0.05 * np.abs(got - NET(lora.merge(PARAMS, adapters), X)).mean()


LAYERS = normal(3, 3, 64, 64)


@pytest.mark.parametrize(
    "format, coded, how",
    each(
        *(
            (*of, how)
            for of in (("nf4", True), ("nvfp4", False), ("int8", True), ("fp8", False))
            for how in ("scan", "scan and remat", "transposed scan")
        ),
        ci={
            ("nf4", True, "scan and remat"),
            ("nvfp4", False, "scan"),
            ("int8", True, "transposed scan"),
        },
    ),
)
def test_layers_of_a_scan(format, coded, how):
    """One layer at a time, under jit, scan and remat; the same as layer by layer, merged."""
    step = lambda x, w: (jnp.tanh(x @ (w.T if "transposed" in how else w)), None)
    step = jax.checkpoint(step) if "remat" in how else step
    fn = lambda p, x: jax.lax.scan(step, x, p["w"])[0]
    params = {"w": LAYERS}
    chosen = lora.select(params, lora.LoRAConfig(rank=2, targets="w"), lora.survey(fn, params, X))
    base = lora.quant.quantize(params, chosen, format) if coded else params
    adapters = started(base, fn, X, targets=["w"])
    f = lora.adapt(fn, merge_aware=format)
    ours = lambda ad, x: f(lora.bind(base, ad), x)
    got = jax.jit(lambda ad, x: (ours(ad, x), jax.grad(lambda *a: loss(ours(*a)), (0, 1))(ad, x)))
    got = got(adapters, X)
    plain = lora.quant.dequantize(lora.merge(base, adapters, requantize=format))
    by_hand = lambda ad, x: straight_through(plain, fn, base, ad, x)
    want = by_hand(adapters, X), jax.grad(lambda *a: loss(by_hand(*a)), (0, 1))(adapters, X)
    assert_close(got[0], want[0])
    assert_close(got[1], want[1], factor=512)


@pytest.mark.parametrize("which", ["inputs", "adapters"])
def test_under_vmap(which):
    """A batch of inputs; an adapter for each of them."""
    adapters = started(PARAMS, NET, X)
    f = lora.adapt(NET, merge_aware="nf4")
    one = lambda ad, x: jax.grad(lambda ad: loss(f(lora.bind(PARAMS, ad), x)))(ad)
    x = jnp.stack([X, X + 1])
    if which == "inputs":
        got, each = jax.vmap(one, (None, 0))(adapters, x), [adapters, adapters]
    else:
        each = [adapters, jax.tree.map(lambda a: 2 * a, adapters)]
        got = jax.vmap(one)(jax.tree.map(lambda *a: jnp.stack(a), *each), x)
    want = [one(ad, v) for ad, v in zip(each, x)]
    assert_close(got, jax.tree.map(lambda *a: jnp.stack(a), *want), factor=512)


def test_one_weight_at_a_time():
    """Of twelve layers, neither what is merged nor what is rounded is there all at once."""
    n, d = 12, 256
    params = {f"w{i:02}": normal(i, d, d) for i in range(n)}
    fn = lambda p, x: functools.reduce(lambda x, w: jnp.tanh(x @ w), p.values(), x)
    x = normal(40, 8, d)
    base = lora.quant.quantize(params, list(params), "nf4")
    adapters = started(base, fn, x, targets=params)
    run = lambda f: jax.jit(jax.grad(lambda ad, base: loss(f(lora.bind(base, ad), x))))
    temp = lambda f: run(f).lower(adapters, base).compile().memory_analysis().temp_size_in_bytes
    aware = temp(lora.adapt(fn, merge_aware="nf4"))
    weight = 4 * d * d
    assert aware < temp(lora.adapt(fn, plan="merged")) + 4 * weight
    assert aware < 6 * weight < n * weight


def test_training_lowers_the_loss_that_is_deployed():
    """Gradient descent on a target: what is merged into codes has the loss that was trained."""
    base = lora.quant.quantize(PARAMS, ["up", "down"], "int4")
    config = lora.LoRAConfig(rank=4, targets=["up", "down"])
    start = lora.init(KEY, base, config, lora.survey(NET, PARAMS, X))
    target = NET(PARAMS, X)
    error = lambda y: jnp.mean((y - target) ** 2)
    f = lora.adapt(NET, merge_aware="int4")

    @jax.jit
    def step(ad):
        grads = jax.grad(lambda ad: error(f(lora.bind(base, ad), X)))(ad)
        return jax.tree.map(lambda a, g: a - 0.01 * g / (1e-6 + jnp.abs(g).max()), ad, grads)

    ad = start
    for _ in range(60):
        ad = step(ad)
    deployed = lora.adapt(NET)(lora.bind(lora.merge(base, ad, requantize=True), None), X)
    trained, before = error(f(lora.bind(base, ad), X)), error(NET(lora.quant.dequantize(base), X))
    # to a rounding: a number half way between two levels may fall to either side
    assert abs(error(deployed) - trained) < 0.02 * trained
    assert error(deployed) < 0.9 * before, (error(deployed), before)


def test_a_small_update_does_not_arrive_on_the_levels():
    """docs/howto/merge_aware.md, which base: on arrays and on 8 bits the right share of numbers crosses."""
    params = {"w": rand.normal(KEY, (128, 128))}
    u = 0.01 * rand.normal(jax.random.key(1), (128, 128))
    g = lora.Geometry((0,), (1,))
    node = lambda u: {"w": lora.LoRA(u, jnp.eye(128), 1.0, g)}
    stored = lambda base, u: lora.merge(base, node(u), requantize="nf4")["w"].value()
    for format, low, high in ((None, 0.9, 1.1), ("int8_block", 0.9, 1.1), ("nf4", 0, 0.1)):
        base = lora.quant.quantize(params, "w", format) if format else params
        moved = stored(base, u) - stored(base, jnp.zeros_like(u))
        assert low <= jnp.vdot(moved, u) / jnp.vdot(u, u) <= high, format


def call(
    fn=NET, params=PARAMS, targets=("up", "down"), merge_aware="nf4", key=None, make=None,
    door=None, given=None, **adapt,
):  # fmt: skip
    adapters = started(params, fn, X, targets=targets, dropout=0.1 if key is not None else 0.0)
    adapters = make(params, adapters) if make else adapters
    bound = lora.bind(given or params, adapters, dropout_key=key)
    if door is not None:
        return door(fn, bound, X, merge_aware=merge_aware, **adapt)
    return lora.adapt(fn, merge_aware=merge_aware, **adapt)(bound, X)


INTEGERS = PARAMS | {"up": jnp.ones((64, 96), "int8")}  # by hand: `init` takes none
ERRORS = {
    "format": (dict(merge_aware="nf5"), "merge_aware='nf5': expected one of nf4"),
    "type": (dict(merge_aware=True), "merge_aware=True: expected one of nf4"),
    "plan": (dict(plan="merged"), "plan='merged' with merge_aware='nf4'"),
    "dropout": (dict(key=KEY), "(?s)'down' has dropout 0.1.*'up' has dropout"),
    "dora": (dict(make=lora.methods.dora), "'down' is scaled by a magnitude"),
    "rows": (
        dict(make=lambda p, ad: {"up": lora.Rows(jnp.ones((1, 96)), (3,), 64)}),
        "'up' has rows that are trained by themselves",
    ),
    "some tokens": (
        dict(make=lambda p, ad: lora.algebra.choose(lora.algebra.stack([ad]), 0, jnp.ones(6, bool))),
        "(?s)'down' is adapted for some tokens alone.*'up' is adapted",
    ),
    "integers": (
        dict(fn=lambda p, x: x @ p["up"].astype("float32"), targets=("up",), given=INTEGERS),
        "'up': the leaf is of int8, to which an update in floats would be rounded",
    ),
    "look-up": (
        dict(fn=lambda p, x: p["up"][jnp.arange(6)] + x @ p["up"], targets=("up",)),
        "(?s)for matrix products.*'up' is used by gather",
    ),
    "look-up in a product": (
        dict(fn=lambda p, x: p["up"][jnp.arange(6)] @ p["up"].T, targets=("up",)),
        "(?s)for matrix products.*'up' is used by gather",
    ),
    "sum": (
        dict(fn=lambda p, x: x @ (p["up"] + p["down"]), strict=False),
        "(?s)for matrix products.*'up'",
    ),
    "convolution": (
        dict(fn=lambda p, x: jax.lax.conv(x[:, :, None, None], p["up"], (1, 1), "VALID"),
             params={"up": normal(1, 96, 64, 1, 1)}, targets=("up",)),
        "(?s)for matrix products.*'up' is used by conv_general_dilated",
    ),
}  # fmt: skip


@pytest.mark.parametrize("door", ["adapt", "coverage"])
@pytest.mark.parametrize("name", ERRORS)
def test_errors(name, door):
    given, match = ERRORS[name]
    if door == "coverage":
        given = {k: v for k, v in given.items() if k != "strict"} | dict(door=lora.coverage)
    with fails(match):
        call(**given)


class Doors(nnx.Module):
    """The net as NNX has it, and as Linen has it."""

    def __init__(self, up, down):
        self.up, self.down = nnx.Param(up), nnx.Param(down)

    def __call__(self, x):
        return NET({"up": self.up[...], "down": self.down[...], "norm": PARAMS["norm"]}, x)


class LinenDoors(nn.Module):
    @nn.compact
    def __call__(self, x):
        up, down = (self.param(n, nn.initializers.zeros, (64, 96)) for n in ("up", "down"))
        return NET({"up": up, "down": down, "norm": PARAMS["norm"]}, x)


def test_every_door_is_the_same():
    """`adapt`, `attach` of NNX and of Linen: outputs and gradients; `coverage` tells the plan."""
    params = {k: PARAMS[k] for k in ("up", "down")}
    fn = lambda p, x: NET({**p, "norm": PARAMS["norm"]}, x)
    adapters = started(params, fn, X)
    how = dict(merge_aware="nf4")
    both = lambda run: jax.value_and_grad(lambda ad: loss(run(ad)))(adapters)
    want = both(lambda ad: lora.adapt(fn, **how)(lora.bind(params, ad), X))
    linen = lora.attach(LinenDoors(), **how)
    assert_close(both(lambda ad: linen.apply({"params": lora.bind(params, ad)}, X)), want)
    model = Doors(**params)
    assert_close(both(lambda ad: lora.attach(model, ad, **how)(X)), want)
    stored = lora.merge(*lora.detach(lora.attach(model, adapters, **how)), requantize="nf4")
    assert_close(loss(lora.adapt(lambda m, x: m(x))(lora.bind(stored, None), X)), want[0])
    found = lora.coverage(fn, lora.bind(params, adapters), X, **how)
    assert {u.plan.split(",")[0] for uses in found.uses.values() for u in uses} == {"merge-aware"}


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_errors_of_the_doors(name):
    """What is refused, and the call that was made, corrected."""
    params = {k: PARAMS[k] for k in ("up", "down")}
    adapters = started(params, lambda p, x: NET({**p, "norm": PARAMS["norm"]}, x), X)
    model = Doors(**params)
    make = lambda **how: (
        lora.attach(model, adapters, rngs=nnx.Rngs(0), **how)
        if name == "nnx"
        else lora.attach(LinenDoors(), **how)
    )
    with fails("merge_aware='nf5': expected one of nf4"):
        make(merge_aware="nf5")
    with fails(r"lora.attach\((model, adapters|module), merge_aware='nf4'\)"):
        make(merge_aware="nf4", plan="beside")


@pytest.mark.parametrize("given", ["nf5", None, 1, ["nf4"], np.float32(4)])
def test_errors_of_merging(given):
    adapters = started(PARAMS, NET, X)
    with fails(r"requantize=.*: expected one of nf4, .*, True \(each in its own\) or False"):
        lora.merge(PARAMS, adapters, requantize=given)


def test_leaves_that_no_format_holds():
    adapters = started(PARAMS, NET, X)
    with fails("'up': the leaf is of int8, to which an update in floats would be rounded"):
        lora.merge(INTEGERS, adapters, requantize="nf4")
    with jax.enable_x64(True), fails("'up' .* holds NaN or infinity after merging"):
        wide = PARAMS | {"up": PARAMS["up"].astype("float64").at[0, 0].set(1e300)}
        lora.merge(wide, adapters, requantize="nf4")


def of_method(name):
    """The adapters of a method, on `up` alone."""
    config = lora.LoRAConfig(rank=2, alpha=4, targets="up")
    if name in ("VeRA", "LoRAXS"):
        start = {"VeRA": lora.methods.init_vera, "LoRAXS": lora.methods.init_lora_xs}[name]
        tree, frozen = start(KEY, {"up": PARAMS["up"]}, config)
        return lora.methods.factors(noisy(tree, scale=0.5), frozen)
    lora_ = noisy(lora.init(KEY, PARAMS, config), scale=0.5)
    make = {
        "LoRA": lambda: lora_,
        "DoRA": lambda: noisy(lora.methods.dora(PARAMS, lora_)),
        "AdaLoRA": lambda: noisy(lora.methods.init_adalora(KEY, PARAMS, config), scale=0.5),
        "Full": lambda: {"up": lora.Full(PARAMS["up"] + 0.01)},
        "Rows": lambda: {"up": lora.Rows(jnp.ones((1, 96)), (3,), 64)},
        "Full and LoRA": lambda: lora_ | {"norm": lora.Full(jnp.full(96, 1.5))},
    }
    return make[name]()


NODES = ["LoRA", "VeRA", "LoRAXS", "AdaLoRA", "DoRA", "Full", "Rows", "Full and LoRA"]
REFUSED = {"DoRA": "is scaled by a magnitude", "Rows": "has rows that are trained"}
BASES = ["arrays", "nf4", "nf4 twice", "int8", "fp8_block", "qwix", "transposed"]


def base_of(kind):
    if kind == "arrays":
        return PARAMS
    if kind == "transposed":  # as torch has it, and read only
        q = lora.quant.quantize({"w": PARAMS["up"].T}, "w", "int8_block")["w"]
        return PARAMS | {"up": q.transposed((1, 0))}
    if kind == "qwix":
        scale = jnp.abs(PARAMS["up"]).max(0, keepdims=True) / 127
        codes = jnp.round(PARAMS["up"] / scale).astype("int8")
        array = SimpleNamespace(qvalue=codes, scale=scale, zero_point=None, qtype=jnp.int8)
        return PARAMS | {"up": lora.quant.from_qwix(array)}
    return lora.quant.quantize(PARAMS, "up", kind.split()[0], double="twice" in kind)


@pytest.mark.parametrize(
    "node, kind, format",
    each(
        *itertools.product(NODES, BASES, ["nf4", "int8"]),
        ci={(n, "arrays", "nf4") for n in NODES if n != "LoRA"}
        | {("Full", "nf4 twice", "nf4"), ("Rows", "int8", "nf4")}
        | {("LoRA", b, "nf4") for b in ("nf4 twice", "int8", "transposed")},
    ),
)
def test_what_is_stored_is_what_was_trained(node, kind, format):
    """Of each node on each base: to one rounding of what a product met, or refused by name."""
    base, adapters = base_of(kind), of_method(node)
    met = lambda: lora.adapt(lambda p, x: (x @ p["up"]) * p["norm"], merge_aware=format)(
        lora.bind(base, adapters), jnp.eye(64)
    )
    stored = lora.merge(base, adapters, requantize=format)
    if node in REFUSED:
        with fails(f"'up' {REFUSED[node]}"):
            met()
    else:
        got = lora.quant.dequantize(stored)
        want, up = np.asarray(met()), np.asarray(got["up"] * got["norm"])
        # by another order of sums a few cross the middle of two levels
        assert (np.abs(want - up) > 1e-5 * np.abs(up).max()).mean() < 0.01
    if node in ("Full", "Rows"):  # as trained, whatever else is in codes
        np.testing.assert_array_equal(stored["up"], lora.merge(base, adapters)["up"])
    else:
        assert stored["up"].format == format and stored["up"].double == (
            kind == "nf4 twice" == format + " twice"
        )
    if kind not in ("arrays", "qwix", "transposed"):
        again = lora.merge(base, adapters, requantize=True)["up"]
        assert node in ("Full", "Rows") or again.format == base["up"].format


def test_a_weight_that_is_returned_is_what_is_deployed():
    fn = lambda p, x: (x @ p["up"], p["up"])
    adapters = started(PARAMS, fn, X, targets=["up"])
    y, w = lora.adapt(fn, merge_aware="nf4")(lora.bind(PARAMS, adapters), X)
    stored = lora.merge(PARAMS, adapters, requantize="nf4")["up"].value()
    np.testing.assert_array_equal(w, stored)
    assert_close(y, X @ stored)
