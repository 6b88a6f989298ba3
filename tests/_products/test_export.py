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
