"""Stacks of adapters over devices, bases in a host's memory, and shardings inside of jit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from common import GEOMETRIES, assert_close, examples, fails, noisy
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora

KEY = jax.random.key(0)
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
MESH = {k: jax.make_mesh((8,), ("d",), axis_types=(kind,)) for k, kind in KINDS.items()}
CONFIG = lora.LoRAConfig(rank=2, targets="up", full="bias", rows={"table": [1, 2]})
PARAMS = {"up": rand.normal(KEY, (16, 32)), "bias": jnp.ones(32), "table": jnp.ones((8, 16))}
SPECS = {"up": P("d", None), "bias": P("d"), "table": P(None, "d")}
ADAPTERS = [noisy(lora.init(KEY, PARAMS, CONFIG), key=k, scale=1.0) for k in (1, 2)]


def spread(kind="auto", **memory):
    at = {p: NamedSharding(MESH[kind], spec, **memory) for p, spec in SPECS.items()}
    return jax.device_put(PARAMS, at)


def node_of(kind, g, shape, rank=2):
    """Shapes of a node of this kind."""
    array = lambda s: jax.ShapeDtypeStruct(s, "float32")
    a, b = map(array, g.factor_shapes(shape, rank))
    batch = a.shape[: len(g.batch_axes)]
    out = (*batch, *b.shape[len(batch) + 1 :])
    own = dict(geometry=g, shape=shape)
    return {
        "LoRA": lambda: lora.LoRA(a, b, 1.0, g),
        "DoRA": lambda: lora.LoRA(a, b, 1.0, g).with_magnitude(array(out)),
        "AdaLoRA": lambda: lora.methods.AdaLoRA(a, array((*batch, rank)), b, geometry=g),
        "VeRA": lambda: lora.methods.VeRA(array((*batch, rank)), array(out), **own),
        "LoRAXS": lambda: lora.methods.LoRAXS(array((*batch, rank, rank)), **own),
        "Full": lambda: lora.Full(array(shape)),
        "Rows": lambda: lora.Rows(array((2, *shape[1:])), (0, 1), shape[0]),
    }[kind]()


@given(data=st.data())
@examples(60)
def test_slots_are_whole(data):
    """Each array of a stack, or a stack of stacks, is split as one adapter's is, after the slots."""
    kind = data.draw(st.sampled_from("LoRA DoRA AdaLoRA VeRA LoRAXS Full Rows".split()))
    ndim = 2 if kind == "Rows" else data.draw(st.integers(2, 4))
    part = data.draw(st.permutations(range(ndim)))
    i, o = sorted(data.draw(st.lists(st.integers(1, ndim - 1), min_size=2, max_size=2)))
    g = lora.Geometry(tuple(part[:i]), tuple(part[i : (o if i < o else ndim)]),
                      tuple(part[o:] if i < o else ()))  # fmt: skip
    shape, spec = (8,) * ndim, P(*data.draw(st.permutations(["d"] + [None] * (ndim - 1))))
    slots = data.draw(st.sampled_from([(), (8,), (3,), (8, 8)]))
    one = node_of(kind, g, shape)
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*slots, *x.shape), x.dtype), one)
    mesh = MESH["auto"]
    base = jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, spec))
    want, got = (lora.parallel.shardings({"w": base}, {"w": x})["w"] for x in (one, stacked))
    specs = lora.parallel.shardings(
        {"w": spec, "other": P()},
        {"w": stacked, "other": jax.tree.map(lambda x: jax.ShapeDtypeStruct((*slots, *x.shape), x.dtype),
                                             node_of("LoRA", lora.Geometry((0,), (1,)), (8, 8)))},
    )["w"]  # fmt: skip
    arrays = jax.tree.leaves(stacked)
    for x, w, s, p in zip(arrays, *map(jax.tree.leaves, (want, got, specs)), strict=True):
        assert s.spec == P(*(None,) * len(slots), *w.spec) == p
        assert len(s.spec) == len(x.shape)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_stack_lies_as_shardings_says(name):
    """`stack` of placed adapters, whatever the axes of the leaf are."""
    shape, g = GEOMETRIES[name][:2]
    shape = tuple(n if n % 8 == 0 else 8 * n for n in shape)
    params = {"w": jax.device_put(jnp.ones(shape), NamedSharding(MESH["auto"], P("d")))}
    a, b = (jnp.ones(s) for s in g.factor_shapes(shape, 2))
    node = {"w": lora.LoRA(a, b, 1.0, g)}
    node = jax.device_put(node, lora.parallel.shardings(params, node))
    stacked = lora.algebra.stack([node, node], capacity=7)
    where = lora.parallel.shardings(params, stacked)
    for x, s in zip(jax.tree.leaves(stacked), jax.tree.leaves(where), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim)
    jax.device_put(stacked, where)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new", ["beside the base", "on no device", "on one device"])
def test_stack_and_put(new, kind):
    """They go where the stack is, and the numbers are those of one device."""
    params = spread(kind)
    where = lora.parallel.shardings(params, ADAPTERS[0])
    one = jax.device_put(ADAPTERS[0], where)
    two = {
        "beside the base": lambda: jax.device_put(ADAPTERS[1], where),
        "on no device": lambda: ADAPTERS[1],
        "on one device": lambda: jax.device_put(ADAPTERS[1], jax.devices()[0]),
    }[new]()
    make = lambda p, one, two: lora.algebra.put(
        lora.algebra.stack([one, two], capacity=4, base=p), 2, two
    )
    got, want = make(params, one, two), make(PARAMS, *ADAPTERS)
    got = lora.algebra.put(got, 0, None)
    want = lora.algebra.put(want, 0, None)
    assert_close(got, want)
    for x, s in zip(*map(jax.tree.leaves, (got, lora.parallel.shardings(params, got)))):
        assert x.sharding.is_equivalent_to(s, x.ndim)
    if new != "on one device":
        put = jax.jit(lora.algebra.put)
        assert_close(put(got, jnp.int32(1), two), lora.algebra.put(want, 1, ADAPTERS[1]))
    chosen = lora.algebra.choose(got, 2)
    assert_close(lora.merge(params, chosen), lora.merge(PARAMS, lora.algebra.choose(want, 2)))


def test_shardings_inside_jit():
    """Where the compiler decides, nothing is known of the base; where types say it, all is."""
    ad = {"up": ADAPTERS[0]["up"]}
    found = []
    run = jax.jit(lambda p: found.append(lora.parallel.shardings(p, ad)["up"].a.spec))
    with fails(
        r"'up': is traced, and the compiler decides how it lies along d: call shardings out"
    ):
        run(spread())
    run(spread("explicit"))
    jax.jit(lambda p: found.append(lora.parallel.shardings(SPECS, ad)["up"].a))(spread())
    assert found == [P("d", None)] * 2


def test_the_meshs_own_names_stand_for_themselves():
    """With rules for other names, in boxes and specs; a rule for one of them goes first."""
    g = lora.Geometry((1,), (2,), (0,))
    node = {"w": node_of("LoRA", g, (4, 8, 16))}
    mesh = jax.make_mesh((2, 2, 2), ("d", "e", "f"), axis_types=(AxisType.Auto,) * 3)

    def spec(*names, rules=(("layers", None),)):
        box = nn.LogicallyPartitioned(jnp.ones((4, 8, 16)), names=names)
        trees = [{"w": P(*names)}] + [{"w": box}] * all(isinstance(n, str | None) for n in names)
        found = {
            lora.parallel.shardings(t, node, mesh=mesh, rules=list(rules))["w"].a.spec
            for t in trees
        }
        assert len(found) == 1
        return found.pop()

    assert spec("layers", "d", None) == P(None, "d", None)
    assert spec("layers", ("d", "e"), "f") == P(None, ("d", "e"), None)
    assert spec("unknown", "d", "e") == P(None, "d", None)
    assert spec("layers", "d", "e", rules=[("layers", "f"), ("d", None)]) == P("f", None, None)
    assert spec("layers", "d", "x", rules=[("layers", "e"), ("d", "f")]) == P("e", "f", None)
    with fails(r"'w': P[a-zA-Z]*\('d', 'd', None\): .*more than once"):
        spec("d", "d", None)


def on_one_device(**memory):
    return jax.device_put(PARAMS, SingleDeviceSharding(jax.devices()[0], **memory))


@pytest.mark.parametrize("base", [spread, on_one_device])
def test_a_base_on_the_host(base):
    """The numbers of a base on devices, and results on the host again; adapters are on devices."""
    params, there = base(memory_kind="pinned_host"), base()
    kinds = lambda tree: {x.sharding.memory_kind for x in jax.tree.leaves(tree)}
    where = lora.parallel.shardings(params, ADAPTERS[0])
    assert {s.memory_kind for s in jax.tree.leaves(where)} == {"device"}
    adapters = jax.device_put(ADAPTERS[0], where)
    ups = {"up": adapters["up"]}
    dora = lora.methods.dora(params, ups)
    assert_close(dora, lora.methods.dora(there, ups))
    host = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    put = jax.jit(lambda x: jax.device_put(x, host))  # JAX 0.10.0 leaves it on a CPU's device
    wraps = [lambda f: f, jax.jit][: 1 + (kinds(put(jnp.ones(2))) == {"pinned_host"})]
    for call, ad in ((lora.merge, adapters), (lora.merge, dora), (lora.unmerge, ups)):
        for run in (wrap(call) for wrap in wraps):
            got = run(params, ad)
            assert kinds(got) == {"pinned_host"}
            got = jax.device_put(got, jax.tree.map(lambda x: x.sharding, there))
            assert_close(got, call(there, ad))
    init = lambda p: lora.init(KEY, p, CONFIG)
    assert kinds(init(params)) == {"device"}
    assert_close(init(params), init(there))
    stacked = lora.algebra.stack([adapters], base=params)
    assert_close(stacked, lora.algebra.stack([adapters], base=there))
    rest, pissa = lora.methods.pissa(params, ups)
    assert kinds(rest) == {"pinned_host"} and kinds(pissa) == {"device"}
    lora.merge(params, adapters, donate=True)
    assert all(x.is_deleted() for x in params.values())


def looked_up(p, x, ids):
    return p["table"].at[ids].get(out_sharding=P("d", None, None))


def convolved(p, x, ids):
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(
        x, p["kernel"], (1,), "SAME", dimension_numbers=numbers, out_sharding=P("d", None, None)
    )


LEAVES = {  # of shardings in types: (function, shape, how it is adapted)
    "table": (looked_up, (16, 8), dict(targets=(), rows={"table": [2, 5]})),
    "kernel": (convolved, (3, 8, 16), dict(
        targets="kernel", rules=[lora.Rule("kernel", in_axes=(0, 1), out_axes=(2,))])),
}  # fmt: skip


@pytest.mark.parametrize("along", [-2, -1])
@pytest.mark.parametrize("name", LEAVES)
def test_explicit_tables_and_kernels(name, along):
    """Look-ups by rows and convolutions, with the leaf along any axis: init, merge, a gradient."""
    fn, shape, config = LEAVES[name]
    spec = [None] * len(shape)
    spec[along] = "d"
    at = lambda x, *spec: jax.device_put(x, NamedSharding(MESH["explicit"], P(*spec)))
    plain = {name: rand.normal(KEY, shape)}
    params = {name: at(plain[name], *spec)}
    x = at(rand.normal(KEY, (8, 12, 8)), "d")
    ids = at(jnp.arange(24).reshape(8, 3) % 16, "d")
    with jax.sharding.set_mesh(MESH["explicit"]):
        adapters = noisy(lora.init(KEY, params, lora.LoRAConfig(rank=2, **config)))
        adapters = jax.device_put(adapters, lora.parallel.shardings(params, adapters))
        run = lora.adapt(fn)
        ours = lambda ad, p: jnp.sum(jnp.sin(run(lora.bind(p, ad), x, ids)))
        dense = lambda ad, p: jnp.sum(jnp.sin(fn(lora.merge(p, ad), x, ids)))
        got, want = (jax.jit(jax.grad(f))(adapters, params) for f in (ours, dense))
        assert_close(got, want, factor=256)
        merged = lora.merge(params, adapters)[name]
    assert merged.sharding.is_equivalent_to(params[name].sharding, len(shape))
    assert_close(np.asarray(merged), np.asarray(lora.merge(plain, jax.device_get(adapters))[name]))


def test_arrays_that_were_donated():
    """They are named; a second merge that donates its base ended the process."""
    gone = lambda tree: jax.tree.map(lambda x: (x := x + 0, x.delete())[0], tree)
    params, adapters = spread(), ADAPTERS[0]
    spent = {**params, "up": jax.device_put(PARAMS["up"], params["up"].sharding)}
    lora.merge(spent, adapters, donate=True)
    lost = gone(adapters)
    stacked = lora.algebra.stack(ADAPTERS, base=PARAMS)
    calls = [
        lambda: lora.merge(spent, adapters, donate=True),
        lambda: lora.bind(spent, adapters),
        lambda: lora.quant.quantize(spent, "up"),
        lambda: lora.quant.dequantize({"up": gone(lora.quant.quantize(PARAMS, "up")["up"])}),
        lambda: lora.methods.dora(spent, adapters),
    ]
    for call in calls:
        with fails("(?s)donated or deleted.*'up'"):
            call()
    calls = [
        lambda: lora.bind(params, lost),
        lambda: lora.algebra.scaled(lost, 2.0),
        lambda: lora.algebra.put(stacked, 0, lost),
        lambda: lora.algebra.choose(gone(stacked), 0),
    ]
    for call in calls:
        with fails("(?s)donated or deleted.*'up/a'"):
            call()


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_codes_on_the_host(format):
    """What is made of them, and they of an array there, is of the same numbers, and there."""
    base = {"up": PARAMS["up"], "other": PARAMS["up"] + 1}
    where = NamedSharding(MESH["auto"], P("d", None))
    host = where.with_memory_kind("pinned_host")
    made = lora.quant.quantize(jax.device_put(base, host), ["up", "other"], format)
    codes = lora.quant.quantize(jax.device_put(base, where), ["up", "other"], format)
    adapters = {"up": ADAPTERS[0]["up"]}
    adapters = jax.device_put(adapters, lora.parallel.shardings(codes, adapters))
    calls = [
        lambda q: q,
        lora.quant.dequantize,
        *(lambda q, r=r: lora.merge(q, adapters, requantize=r) for r in (False, True)),
    ]
    for call in calls:
        got, want = call(made), call(codes)
        assert_close(got, want, factor=0)
        kinds = lambda tree: {x.sharding.memory_kind for x in jax.tree.leaves(tree)}
        assert (kinds(got), kinds(want)) == ({"pinned_host"}, {"device"})


@pytest.mark.parametrize("kind", ["slots", "dora"])
def test_explicit_columns(kind):
    """A weight cut along its inputs, or outputs by the axis of the batch: what acts on the columns
    of the result lies as that does."""
    mesh = jax.make_mesh((2, 4), ("f", "t"), axis_types=(AxisType.Explicit,) * 2)
    params = {"up": PARAMS["up"], "down": PARAMS["up"].T}
    config = lora.LoRAConfig(rank=2, targets=["up", "down"])
    adapters = noisy(lora.init(KEY, params, config), scale=0.5)
    if kind == "dora":
        adapters = lora.methods.dora(params, adapters)
    x, index = rand.normal(KEY, (8, 16)), jnp.array([0, 1, -1, 1, 0, 0, -1, 1])

    def fn(p, x, at=lambda *spec: None):
        h = jnp.einsum("bi,io->bo", x, p["up"], out_sharding=at("f", "t"))
        return jnp.einsum("bi,io->bo", jnp.tanh(h), p["down"], out_sharding=at("f", None))

    def loss(adapters, params, x, index, **at):
        if kind == "slots":
            adapters = lora.algebra.choose(adapters, index)
        return jnp.sum(
            jnp.sin(lora.adapt(lambda p, x: fn(p, x, **at))(lora.bind(params, adapters), x))
        )

    at = lambda *spec: NamedSharding(mesh, P(*spec))
    placed = jax.device_put(params, {"up": at("f", "t"), "down": at("t", "f")})
    own = jax.device_put(adapters, lora.parallel.shardings(placed, adapters))
    if kind == "slots":
        own, adapters = (lora.algebra.stack([a, a], capacity=3) for a in (own, adapters))
    want = jax.jit(jax.value_and_grad(loss))(adapters, params, x, index)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(lambda *args: loss(*args, at=at)))
        got = step(own, placed, jax.device_put(x, at("f")), jax.device_put(index, at("f")))
    assert_close(jax.device_get(got), jax.device_get(want), factor=256)
    for x, like in zip(jax.tree.leaves(got[1]), jax.tree.leaves(own), strict=True):
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim)


PLACES = {  # functions of adapters, which lie in a host's memory or on an Explicit mesh
    "combine": lambda p, a, b, s: lora.algebra.combine([a, b], [0.5, 2.0], base=p),
    "resize": lambda p, a, b, s: lora.algebra.resize(a, 1),
    "ties": lambda p, a, b, s: lora.algebra.ties([a, b], density=0.5, base=p)[0],
    "dare": lambda p, a, b, s: lora.algebra.dare(KEY, [a, b], base=p)[0],
    "stack": lambda p, a, b, s: lora.algebra.stack([a, b], base=p),
    "choose": lambda p, a, b, s: lora.algebra.choose(s, 1),
    "put": lambda p, a, b, s: lora.algebra.put(s, 0, b),
    "dora": lambda p, a, b, s: lora.methods.dora(p, a),
    "merge": lambda p, a, b, s: lora.merge(p, a),
    "compare": lambda p, a, b, s: str(lora.algebra.compare(a, b)),
    "learned": lambda p, a, b, s: str(lora.algebra.learned(p, a)),
}


@pytest.mark.parametrize("where", ["host", "explicit"])
@pytest.mark.parametrize("name", PLACES)
def test_adapters_elsewhere(name, where):
    """The numbers of one device. What is made of adapters in a host's memory is on the devices, the
    stack of `put` where it lay; on a mesh each factor may be cut along its own first axis."""
    call, host = PLACES[name], where == "host"
    trees = [*ADAPTERS, lora.algebra.stack(ADAPTERS, base=PARAMS, capacity=7)]
    want = call(PARAMS, *trees)
    if host:
        params, at = PARAMS, lambda x: SingleDeviceSharding(x.device, memory_kind="pinned_host")
    else:
        axis = lambda x: next((i for i, n in enumerate(x.shape) if n % 8 == 0), None)
        cut = lambda x: P(*("d" if i == axis(x) else None for i in range(x.ndim)))
        params, at = spread(where), lambda x: NamedSharding(MESH[where], cut(x))
    got = call(params, *(jax.device_put(t, jax.tree.map(at, t)) for t in trees))
    if isinstance(want, str):
        assert got == want
        return
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(got)}
    assert kinds == {"pinned_host" if host and name == "put" else "device"}
    assert_close(jax.device_get(got), jax.device_get(want), factor=64)
