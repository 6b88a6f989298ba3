"""Symbolic shapes, Taylor mode, and dropout where shardings are part of types."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from common import assert_close, noisy
from jax import export, lax
from jax.experimental import jet
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lora

W = {
    "w": rand.normal(jax.random.key(0), (16, 32)),
    "v": rand.normal(jax.random.key(1), (16, 8)),
}
X = rand.normal(jax.random.key(2), (6, 16))
CONFIG = lora.LoRAConfig(rank=2, targets="*")
ADAPTERS = noisy(lora.init(jax.random.key(3), W, CONFIG))


def model(p, x):
    return jnp.sin(x @ p["w"]) @ p["w"].T @ p["v"] + x @ p["v"]


@pytest.mark.parametrize("plan", ["auto", "factored", "merged"])
def test_symbolic_shapes(plan):
    """Value and gradient; what depends on an unknown size is left factored."""
    call = lora.adapt(model, plan=plan)
    run = lambda ad, x: call(lora.bind(W, ad), x)
    both = jax.jit(lambda ad, x: (run(ad, x), jax.grad(lambda ad: jnp.sum(run(ad, x)))(ad)))
    types = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), ADAPTERS)
    (rows,) = export.symbolic_shape("rows")
    exported = export.export(both)(types, jax.ShapeDtypeStruct((rows, 16), jnp.float32))
    assert_close(exported.call(ADAPTERS, X), both(ADAPTERS, X))


def rows_in_vmap(p, x):
    ids = jnp.zeros(x.shape[:2], jnp.int32) + jnp.arange(x.shape[1]) % 3
    rows = jax.vmap(lambda i: p["table"][i])(ids.reshape(-1))
    return rows.reshape(*ids.shape, -1) @ p["w"] + x


def over_time(p, x):
    step = lambda h, x: (h := jnp.tanh(h @ p["u"] + x @ p["w"]), h)
    return lax.scan(step, jnp.zeros((x.shape[0], 4)), x.swapaxes(0, 1))[1]


def sorted_experts(p, x):
    x = x.reshape(-1, 4)
    return lax.ragged_dot(x, p["w"], jnp.array([0, 1, 0]) * x.shape[0])


ODD = {  # name -> (function, shapes of the weights)
    "rows in vmap": (rows_in_vmap, {"table": (5, 4), "w": (4, 4)}),
    "scan over time": (over_time, {"u": (4, 4), "w": (4, 4)}),
    "experts": (sorted_experts, {"w": (3, 4, 4)}),
}


@pytest.mark.parametrize(
    ("name", "kind"), [("rows in vmap", "lora"), ("scan over time", "dora"), ("experts", "dora")]
)
def test_symbolic_shapes_through_bytes(name, kind):
    """Symbolic batch and length, written and read back with its derivative."""
    fn, shapes = ODD[name]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {n: rand.normal(k, s, scale=0.5) for k, (n, s) in zip(keys, shapes.items())}
    x = rand.normal(jax.random.key(9), (2, 3, 4))
    survey = lora.survey(fn, params, x)
    adapters = noisy(lora.init(jax.random.key(1), params, CONFIG, survey))
    if kind == "dora":
        adapters = noisy(lora.methods.dora(params, adapters))
    leaves, tree = jax.tree.flatten(adapters)
    run = lambda leaves, x: lora.adapt(fn)(lora.bind(params, tree.unflatten(leaves)), x)
    types = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in leaves]
    b, t = export.symbolic_shape("b, t")
    out = export.export(jax.jit(run))(types, jax.ShapeDtypeStruct((b, t, 4), x.dtype))
    out = export.deserialize(out.serialize(vjp_order=1))
    merged = lambda leaves: fn(lora.merge(params, tree.unflatten(leaves)), x)
    assert_close(out.call(leaves, x), merged(leaves))
    slope = lambda f: jax.grad(lambda leaves: jnp.sum(jnp.sin(f(leaves))))(leaves)
    got, want = slope(lambda leaves: out.call(leaves, x)), slope(merged)
    assert_close(got, want, factor=256)


@pytest.mark.parametrize("plan", ["auto", "merged"])
def test_taylor_mode(plan):
    call = lora.adapt(model, plan=plan)
    series = ((X, jnp.cos(X)),)
    got = jet.jet(lambda x: call(lora.bind(W, ADAPTERS), x), (X,), series)
    want = jet.jet(lambda x: model(lora.merge(W, ADAPTERS), x), (X,), series)
    assert_close(got, want, factor=256)


def test_dropout_of_a_convolution_on_an_explicit_mesh():
    """The mask lies as the input does, and is that of one device."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    params = {"w": rand.normal(jax.random.key(4), (3, 16, 8))}
    x = rand.normal(jax.random.key(5), (4, 6, 16))

    def conv(p, x):
        dims = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=dims)

    config = lora.LoRAConfig(rank=2, targets="*", dropout=0.5)
    adapters = noisy(lora.init(jax.random.key(0), params, config, lora.survey(conv, params, x)))
    run = jax.jit(lambda p, ad, x: lora.adapt(conv)(lora.bind(p, ad, dropout_key=KEY), x))
    want = run(params, adapters, x)
    with jax.set_mesh(mesh):
        place = lambda v, *spec: jax.device_put(v, NamedSharding(mesh, PartitionSpec(*spec)))
        got = run(*jax.tree.map(place, (params, adapters)), place(x, "d"))
    assert got.sharding.spec[0] == "d"
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


KEY = jax.random.key(6)
