"""VeRA, LoRA-XS and AdaLoRA in a scanned model: devices, checkpoints, merging."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from common import assert_close
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_family import KEY, densely, made, methods
from zoo import IDS, Transformer

import lora_jax as lora


@functools.cache
def scanned():
    """A scanned and rematerialised model: (function, parameters, survey)."""
    model = Transformer(True)
    params = model.init(KEY, IDS)["params"]
    apply = lambda params, ids: model.apply({"params": params}, ids)
    return apply, params, lora.survey(apply, params, IDS)


TARGETS = ["query", "up"]


@methods
def test_scan_devices_checkpoint_merge(method, tmp_path):
    """A step of a scanned and rematerialised model, on one device and on eight, against the formula
    on dense weights; saved, restored and merged."""
    apply, params, survey = scanned()
    adapters, frozen = made(method, params, survey=survey, targets=TARGETS)
    f = lora.adapt(apply)
    tx = optax.adam(1e-2)

    def out(ad, params, frozen):
        return f(lora.bind(params, lora.factors(ad, frozen)), IDS)

    @jax.jit
    @jax.numpy_dtype_promotion("standard")  # Adam's
    def step(params, adapters, frozen, state):
        loss = lambda ad: (lambda y: (jnp.mean(jnp.sin(y)), y))(out(ad, params, frozen))
        grads, y = jax.grad(loss, has_aux=True)(adapters)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(adapters, updates), state, grads, y

    want, state, grads, y = step(params, adapters, frozen, tx.init(adapters))
    by_formula = lambda ad: (lambda y: (jnp.mean(jnp.sin(y)), y))(
        apply(densely(params, ad, frozen), IDS)
    )
    dense_grads, dense_y = jax.jit(jax.grad(by_formula, has_aux=True))(adapters)
    assert_close(y, dense_y, factor=256)
    assert_close(grads, dense_grads, factor=1024)
    merged = lora.merge(params, lora.factors(adapters, frozen))
    assert_close(merged, densely(params, adapters, frozen))

    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = lambda x: P(*[None] * (x.ndim - 1), "model" if x.shape[-1] % 4 == 0 else None)
    on = jax.tree.map(lambda x: NamedSharding(mesh, split(x)), params)
    placed = jax.device_put(params, on)
    where = lora.shardings(placed, adapters)
    spread = jax.device_put(adapters, where)
    if method == "lora_xs":
        frozen = jax.device_put(frozen, lora.shardings(placed, frozen))
        assert "model" in frozen["layers"]["up"]["kernel"].b.sharding.spec
    else:
        node = spread["layers"]["up"]["kernel"]
        assert "model" in (node.b if method == "vera" else node.q).sharding.spec
    got, state, _, sharded_y = step(placed, spread, frozen, tx.init(spread))
    assert_close(sharded_y, y, factor=256)
    assert_close(got, want, factor=4096)  # Adam divides by small numbers

    with ocp.CheckpointManager(tmp_path) as manager:
        kept = {"optimiser": state, "frozen": frozen}
        lora.save(manager, 1, got, base=params, state=kept)
        manager.wait_until_finished()
    back = lora.restore(tmp_path, base=params, state=kept)
    jax.tree.map(np.testing.assert_array_equal, back.adapters, got)
    jax.tree.map(np.testing.assert_array_equal, back.state["frozen"], frozen)
    assert jax.tree.structure(back.adapters) == jax.tree.structure(got)
