"""Weights with shardings in their types (`AxisType.Explicit`): moved and used as without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from common import assert_close, fails, noisy, value_and_grad
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora

KEYS = jax.random.split(jax.random.key(0), 2)
MATRIX, STACK = lora.Geometry((0,), (1,)), lora.Geometry((1,), (2,), (0,))
KERNEL = lora.Geometry((0, 1), (2,))


def conv(p, x, groups):
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        x, p["w"], (1,), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def mapped(p, x, specs, out):
    local = lambda w, x: lax.psum(x @ w, "t") if specs[0][0] else x @ w
    return jax.shard_map(local, in_specs=specs, out_specs=out)(p["w"], x)


# name -> (function, shape of the weight, its geometry and spec, shape of the input and its spec)
USES = {
    "outputs mapped": (
        lambda p, x: mapped(p, x, (P(None, "t"), P("d", None)), P("d", "t")),
        (8, 4), MATRIX, P(None, "t"), (4, 8), P("d", None)),
    "inputs mapped": (
        lambda p, x: mapped(p, x, (P("t", None), P("d", "t")), P("d", None)),
        (8, 4), MATRIX, P("t", None), (4, 8), P("d", "t")),
    "experts summed": (
        lambda p, x: x @ p["w"].sum(0), (2, 8, 4), STACK, P("t", None, None), (4, 8), P("d", None)),
    "experts side by side": (
        lambda p, x: x @ p["w"].transpose(1, 0, 2).reshape(8, 8),
        (2, 8, 4), STACK, P("t", None, None), (4, 8), P("d", None)),
    "reduced": (
        lambda p, x: x @ jax.sharding.reshard(p["w"], P(None, "t", reduced={"d"})),
        (8, 4), MATRIX, P("d", "t"), (4, 8), P("d", None)),
    "masked inputs": (
        lambda p, x: x @ jnp.where(jnp.arange(8)[:, None] > 3, p["w"], 3.0),
        (8, 4), MATRIX, P(None, "t"), (4, 8), P("d", None)),
    "scaled inputs": (
        lambda p, x: x @ (p["w"] * jnp.arange(8.0)[:, None]),
        (8, 4), MATRIX, P(None, "t"), (4, 8), P("d", None)),
    "less their mean": (
        lambda p, x: x @ (p["w"] - p["w"].mean(1, keepdims=True)),
        (8, 4), MATRIX, P(None, "t"), (4, 8), P("d", None)),
    "a grouped convolution": (
        lambda p, x: conv(p, x, 2), (3, 4, 4), KERNEL, P(), (4, 9, 8), P("d", None, None)),
    "a depthwise convolution": (
        lambda p, x: conv(p, x, 8), (3, 1, 16), KERNEL, P(), (4, 9, 8), P("d", None, None)),
}  # fmt: skip


@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize("name", USES)
def test_equals_one_device(name, placed):
    """`placed`: whether the adapters lie as `shardings` says, or on every device whole. On one
    device: JAX's own gradient of a grouped kernel is wrong where the batch is sharded."""
    fn, shape, geometry, spec, x_shape, x_spec = USES[name]
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(AxisType.Explicit,) * 2)
    params, x = {"w": rand.normal(KEYS[0], shape)}, rand.normal(KEYS[1], x_shape)
    factors = (jnp.zeros(s) for s in geometry.factor_shapes(shape, 2))
    adapters = noisy({"w": lora.LoRA(*factors, 0.5, geometry)}, scale=1.0)
    alone = (lambda p, x: x @ p["w"]) if "mapped" in name or name == "reduced" else fn
    want = value_and_grad(lambda ad: alone(lora.merge(params, ad), x))(adapters)
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        params, x, adapters = {"w": put(params["w"], spec)}, put(x, x_spec), put(adapters, P())
        if placed:
            adapters = jax.device_put(adapters, lora.parallel.shardings(params, adapters))
        got = value_and_grad(lambda ad: lora.adapt(fn)(lora.bind(params, ad), x))(adapters)
    assert_close(*(jax.tree.map(np.asarray, v) for v in (got, want)), factor=256)


@pytest.mark.parametrize("kind", ["reduced", "unreduced"])
def test_a_leaf_of_which_a_sum_is_not_made(kind):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    node = lora.LoRA(jnp.zeros((8, 2)), jnp.zeros((2, 4)), 1.0, MATRIX)

    def calls(w):
        there = jax.sharding.reshard(w, P(None, None, **{kind: {"d"}}))
        for call in (lora.bind, lora.merge, lora.parallel.shardings):
            with fails(f"'w'.* is {kind} along d; expected a leaf that is whole there"):
                call({"w": there}, {"w": node})
        return w

    with jax.set_mesh(mesh):
        jax.eval_shape(
            calls, jax.ShapeDtypeStruct((8, 4), "float32", sharding=NamedSharding(mesh, P()))
        )
