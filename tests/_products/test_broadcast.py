"""Weights with an axis that no factor runs along: broadcast, or of size 1."""

import jax
import jax.numpy as jnp
import pytest
import rand
from common import assert_close, value_and_grad
from jax import lax

import lora_jax as lora

X = rand.normal(jax.random.key(0), (4, 2, 6))
MATRIX = lora.Geometry((0,), (1,))


def compare(fn, shape, geometry, x, plan="auto"):
    """The adapted function, its gradient and that of x equal the merged one's."""
    keys = jax.random.split(jax.random.key(1), 3)
    a, b = (rand.normal(k, s) for k, s in zip(keys, geometry.factor_shapes(shape, 2)))
    params = {"w": rand.normal(keys[2], shape)}
    f = lora.adapt(fn, plan=plan)
    both = {"ad": {"w": lora.LoRA(a, b, 0.5, geometry)}, "x": x}
    want = value_and_grad(lambda v: fn(lora.merge(params, v["ad"]), v["x"]))(both)
    got = value_and_grad(lambda v: f(lora.bind(params, v["ad"]), v["x"]))(both)
    assert_close(got, want, factor=256)


CONTRACTED = {
    "broadcast": lambda p, x: jnp.einsum("bgd,gdf->bf", x, jnp.broadcast_to(p["w"], (2, 6, 5))),
    "transposed": lambda p, x: jnp.einsum("bgd,gfd->bf", x, jnp.broadcast_to(p["w"].T, (2, 5, 6))),
    "of size 1": lambda p, x: jnp.tensordot(x[..., None], p["w"][:, None], 2),
    "beside another": lambda p, x: CONTRACTED["broadcast"](p, x) + x[:, 0] @ p["w"],
}


@pytest.mark.parametrize("plan", ["factored", "merged"])
@pytest.mark.parametrize("name", CONTRACTED)
def test_contracted(name, plan):
    compare(CONTRACTED[name], (6, 5), MATRIX, X, plan)


@pytest.mark.parametrize("name", CONTRACTED)
def test_contracted_by_slot(name):
    """An adapter for each example: what the example alone gives with it."""
    fn, slots = CONTRACTED[name], [1, 0, -1, 1]
    params = {"w": rand.normal(jax.random.key(1), (6, 5))}
    draw = lambda i: [rand.normal(jax.random.key(i + k), s) for k, s in enumerate([(6, 2), (2, 5)])]
    stacked = lora.algebra.stack([{"w": lora.LoRA(*draw(i), 0.5, MATRIX)} for i in (2, 4)])

    def alone(stacked):
        of = lambda k: lora.merge(params, lora.algebra.choose(stacked, k)) if k >= 0 else params
        return jnp.concatenate([fn(of(k), X[i : i + 1]) for i, k in enumerate(slots)])

    # positions: (4, 2) of "of size 1", else (4,)
    index = jnp.array(slots).reshape((4, 1) if name == "of size 1" else 4)
    choose = lambda stacked: lora.bind(params, lora.algebra.choose(stacked, index))
    got = value_and_grad(lambda stacked: lora.adapt(fn)(choose(stacked), X))(stacked)
    assert_close(got, value_and_grad(alone)(stacked), factor=256)


def test_an_output_that_no_factor_runs_along():
    """The derivative has the axis as well, where the adapters alone change."""
    fn = lambda p, x: jnp.einsum("bd,gdf->gbf", x[:, 0], jnp.broadcast_to(p["w"], (3, 6, 5)))
    ad = {"w": lora.LoRA(jnp.ones((6, 2)), jnp.ones((2, 5)), 0.5, MATRIX)}
    params = {"w": jnp.ones((6, 5))}
    value = lambda f, of: lambda ad: jnp.sum(jnp.sin(f(of(params, ad), X)).ravel())
    want = jax.jit(jax.grad(value(fn, lora.merge)))(ad)
    assert_close(jax.jit(jax.grad(value(lora.adapt(fn), lora.bind)))(ad), want, factor=256)


def picked(w, at, mode="fill", fill_value=0):
    return w.at[jnp.array(at)].get(mode=mode, fill_value=fill_value)


OUT_OF_BOUNDS = {
    "of a stack": lambda p, x: jnp.einsum(
        "bgd,gdf->bf", x, picked(jnp.broadcast_to(p["w"], (3, 6, 5)), [3, -1])),
    "of a stack, clipped": lambda p, x: jnp.einsum(
        "bgd,gdf->bf", x, picked(jnp.broadcast_to(p["w"], (3, 6, 5)), [3, 1], "clip")),
    "along the last axis": lambda p, x: jnp.einsum(
        "bgd,dfg->bf", x, jnp.broadcast_to(p["w"][..., None], (6, 5, 3)).at[..., jnp.array([5, 0])]
        .get(mode="fill", fill_value=2)),
    "with rows": lambda p, x: jnp.sin(jnp.broadcast_to(p["w"], (3, 6, 5)).at[
        jnp.array([0, 3, 1, 5, 2]), jnp.array([5, 1, 2, 0, 7])].get(mode="fill", fill_value=1)),
}  # fmt: skip


@pytest.mark.parametrize("name", OUT_OF_BOUNDS)
def test_indexed_out_of_bounds(name):
    """What is filled has no update."""
    compare(OUT_OF_BOUNDS[name], (6, 5), MATRIX, X)


@pytest.mark.parametrize(
    "geometry",
    [
        lora.Geometry((0,), (2,), (1,)),
        lora.Geometry((0, 1), (2,)),
        lora.Geometry((0,), (1, 2)),
        lora.Geometry((1,), (2,), (0,)),
    ],
)
def test_depthwise_kernel(geometry):
    """The axis of size 1 may be called anything."""

    def conv(p, x):
        return lax.conv_general_dilated(
            x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=6
        )

    compare(conv, (3, 1, 12), geometry, X)
