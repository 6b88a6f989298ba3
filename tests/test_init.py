"""init: distributions, keys by path, dtypes; bind, merge and unmerge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from common import assert_close, noisy
from flax import linen as nn
from flax import serialization
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lora

KEY = jax.random.key(0)
PARAMS = {
    "q": {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)},
    "v": {"kernel": jnp.ones((64, 48))},
}


def test_kaiming_uniform_as_peft_and_loralib():
    a = lora.init(KEY, {"q": jnp.ones((400, 500))}, lora.LoRAConfig(rank=64, targets="q"))["q"]
    assert a.a.shape == (400, 64) and a.b.shape == (64, 500)
    bound = 1 / 20  # 1/√fan_in
    assert np.abs(a.a).max() <= bound and np.abs(a.a).max() > 0.999 * bound
    np.testing.assert_allclose(np.std(a.a), bound / np.sqrt(3), rtol=0.02)
    assert not np.any(a.b)


def test_gaussian_and_function():
    config = lora.LoRAConfig(rank=64, targets="q", init="gaussian")
    a = lora.init(KEY, {"q": jnp.ones((400, 500))}, config)["q"].a
    np.testing.assert_allclose(np.std(a), 1 / 64, rtol=0.02)
    config = lora.LoRAConfig(rank=2, targets="q", init=nn.initializers.constant(3.0))
    assert np.all(np.asarray(lora.init(KEY, {"q": jnp.ones((4, 5))}, config)["q"].a) == 3)


def test_embeddings_the_other_way_round():
    params = {"table": jnp.ones((50, 8))}
    survey = lora.survey(lambda p, i: p["table"][i], params, jnp.arange(3))
    node = lora.init(KEY, params, lora.LoRAConfig(rank=4, targets="table"), survey)["table"]
    assert not np.any(node.a) and np.std(node.b) > 0.5 and node.embedding


def test_values_depend_on_key_and_path_alone():
    one = lora.init(KEY, PARAMS, lora.LoRAConfig(rank=4, targets="q"))
    two = lora.init(KEY, PARAMS, lora.LoRAConfig(rank=4, targets=["v", "q"]))
    np.testing.assert_array_equal(one["q"]["kernel"].a, two["q"]["kernel"].a)
    assert not np.array_equal(two["q"]["kernel"].a, two["v"]["kernel"].a)
    again = lora.init(jax.random.PRNGKey(0), PARAMS, lora.LoRAConfig(rank=4, targets="q"))
    np.testing.assert_array_equal(one["q"]["kernel"].a, again["q"]["kernel"].a)
    # a value written down: it must not change between processes or releases
    np.testing.assert_allclose(one["q"]["kernel"].a[0, 0], -0.01306602, rtol=1e-5)


def test_dtype_and_jit():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    for dtype in (jnp.float32, jnp.bfloat16):
        config = lora.LoRAConfig(rank=4, targets=["q", "v"], dtype=dtype)
        adapters = lora.init(KEY, params, config)
        assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype(dtype)}
    jitted = jax.jit(lambda p: lora.init(KEY, p, config))(params)
    jax.tree.map(np.testing.assert_array_equal, jitted, adapters)


def test_stacked_layers_differ():
    params = {"w": jnp.ones((3, 8, 6))}
    rule = lora.Rule("w", in_axes=(1,), out_axes=(2,), batch_axes=(0,))
    node = lora.init(KEY, params, lora.LoRAConfig(rank=2, targets="w", rules=[rule]))["w"]
    assert node.a.shape == (3, 8, 2) and node.b.shape == (3, 2, 6) and node.shape == (3, 8, 6)
    assert not np.array_equal(node.a[0], node.a[1])


def make(dtype=jnp.float32, **kwargs):
    params = jax.tree.map(lambda x: rand.normal(KEY, x.shape).astype(dtype), PARAMS)
    config = lora.LoRAConfig(rank=4, alpha=2, targets=["q", "v"], **kwargs)
    return params, noisy(lora.init(jax.random.key(1), params, config))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_merge_is_fp32_rounded_once(dtype):
    params, adapters = make(dtype)
    merged = lora.merge(params, adapters)
    node = adapters["q"]["kernel"]
    exact = np.asarray(params["q"]["kernel"], np.float64) + 0.5 * (
        np.asarray(node.a, np.float64) @ np.asarray(node.b, np.float64)
    )
    got = np.asarray(merged["q"]["kernel"], np.float64)
    assert merged["q"]["kernel"].dtype == dtype
    assert (
        np.abs(got - exact).max() <= 0.51 * float(jnp.finfo(dtype).eps) * np.abs(exact).max() + 1e-6
    )
    assert merged["q"]["bias"] is params["q"]["bias"]
    assert jax.tree.structure(merged) == jax.tree.structure(params)


def test_merge_unmerge_and_the_base_is_kept():
    params, adapters = make()
    before = jax.tree.map(np.array, params)
    merged = lora.merge(params, adapters)
    assert_close(lora.unmerge(merged, adapters), params)
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_merge_keeps_boxes_types_and_shardings():
    params, adapters = make()
    host = jax.tree.map(np.asarray, params)
    assert isinstance(lora.merge(host, adapters)["q"]["kernel"], np.ndarray)
    boxed = jax.tree.map(lambda x: nn.Partitioned(x, ("d",) * x.ndim), params)
    merged = lora.merge(boxed, adapters)["q"]["kernel"]
    assert isinstance(merged, nn.Partitioned) and merged.names == ("d", "d")
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("d"))
    sharded = jax.device_put(params, sharding)
    out = lora.merge(sharded, adapters)
    assert out["q"]["kernel"].sharding == sharding
    assert_close(out, lora.merge(params, adapters))


def test_merge_donates():
    params, adapters = make()
    want = lora.merge(params, adapters)
    assert_close(lora.merge(params, adapters, donate=True), want)
    assert params["q"]["kernel"].is_deleted() and not params["q"]["bias"].is_deleted()


def test_merge_under_jit_and_eval_shape():
    params, adapters = make()
    assert_close(jax.jit(lora.merge)(params, adapters), lora.merge(params, adapters))
    shapes = jax.eval_shape(lora.merge, params, adapters)
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, params)


def test_also_trained_leaves():
    """Biases, leaves in full and rows: in the same tree, with the same bind and merge."""
    params = {
        "table": rand.normal(KEY, (9, 4)),
        "l": {"kernel": jnp.eye(4), "bias": jnp.ones(4)},
        "norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
        "head": {"kernel": jnp.ones((4, 3))},
    }

    def fn(p, ids):
        x = p["table"][ids] * p["norm"]["scale"] + p["norm"]["bias"]
        x = x @ p["l"]["kernel"] + p["l"]["bias"]
        return jnp.tanh(x) @ p["head"]["kernel"], x @ p["table"].T

    ids = jnp.array([[1, 7], [8, 3]])
    survey = lora.survey(fn, params, ids)
    config = lora.LoRAConfig(
        rank=2,
        targets="l",
        bias="adapted",
        full=["head", "norm/scale"],
        rows={"table": [7, 8]},
        dtype=jnp.float32,
    )
    targets = lora.select(params, config, survey)
    assert set(targets.full) == {"l/bias", "head/kernel", "norm/scale"}
    assert targets.parameters == 2 * 8 + 4 + 12 + 4 + 8
    adapters = lora.init(KEY, params, targets)
    f = lora.adapt(fn)
    np.testing.assert_array_equal(f(lora.bind(params, adapters), ids)[0], fn(params, ids)[0])
    adapters = noisy(adapters)
    got, want = f(lora.bind(params, adapters), ids), fn(lora.merge(params, adapters), ids)
    assert_close(got, want)
    np.testing.assert_array_equal(
        lora.merge(params, adapters)["table"][7], adapters["table"].value[0]
    )
    loss = lambda run: lambda ad: sum(jnp.sum(jnp.sin(y)) for y in run(ad))
    assert_close(
        jax.grad(loss(lambda ad: f(lora.bind(params, ad), ids)))(adapters),
        jax.grad(loss(lambda ad: fn(lora.merge(params, ad), ids)))(adapters),
        factor=256,
    )
    everywhere = lora.select(params, lora.LoRAConfig(rank=2, targets="l", bias="all"), survey)
    assert set(everywhere.full) == {"l/bias", "norm/bias"}
    with pytest.raises(lora.LoRAError, match="'table' was trained in full"):
        lora.unmerge(lora.merge(params, adapters), adapters)


def test_adapters_hold_arrays_only():
    _, adapters = make(dropout=0.1)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(adapters))
    assert len(jax.tree.leaves(adapters)) == 4


@pytest.mark.parametrize("init", [lora.init, lora.methods.init_adalora])
def test_flax_serialization(init):
    adapters = noisy(init(KEY, PARAMS, lora.LoRAConfig(rank=4, targets=["q/kernel", "v"])))
    like = jax.tree.map(jnp.zeros_like, adapters)
    back = serialization.from_bytes(like, serialization.to_bytes(adapters))
    assert jax.tree.structure(back) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, back, adapters)
    other = init(KEY, PARAMS, lora.LoRAConfig(rank=3, targets=["q/kernel", "v"]))
    with pytest.raises(lora.LoRAError, match=r"expected shape .* found .*: another rank or leaf"):
        serialization.from_bytes(like, serialization.to_bytes(other))
