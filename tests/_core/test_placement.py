"""Parameters and adapters on different devices are refused, by name, where they meet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import fails
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora

KEY = jax.random.key(0)
CONFIG = lora.LoRAConfig(rank=2, targets=["up", "down"], full="bias", rows={"table": [1, 2]})
PARAMS = {
    "up": jnp.ones((16, 32)),
    "down": jnp.ones((32, 16)),
    "bias": jnp.ones(32),
    "table": jnp.ones((8, 16)),
    "scale": jnp.ones(16),  # without an adapter
}
TARGETS = lora.select(PARAMS, CONFIG)
DEVICES = np.array(jax.devices())
MESH = Mesh(DEVICES, "d")
HERE = NamedSharding(MESH, P("d"))
ELSEWHERE = {
    "one device": SingleDeviceSharding(DEVICES[0]),
    "half of them": NamedSharding(Mesh(DEVICES[:4], "d"), P("d")),
    "in another order": NamedSharding(Mesh(DEVICES[::-1], "d"), P("d")),
    "part of types": NamedSharding(
        jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,)), P("d")
    ),
}
CALLS = {
    "bind": lora.bind,
    "merge": lora.merge,
    "init": lambda p, ad: lora.init(KEY, p, TARGETS),
    "shardings": lora.parallel.shardings,
    "shardings of Targets": lambda p, ad: lora.parallel.shardings(p, TARGETS),
}


def spread(sharding=HERE, **other):
    """The parameters over the mesh, but for some; and adapters beside them, on no device yet."""
    params = {p: jax.device_put(x, sharding) for p, x in PARAMS.items()}
    return params | other, lora.init(KEY, PARAMS, TARGETS)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_leaf_that_lies_elsewhere(where, call):
    """Whether it has an adapter or not: `jax.jit` of them all would refuse it."""
    for path in PARAMS:
        params, adapters = spread()
        params[path] = jax.device_put(PARAMS[path], ELSEWHERE[where])
        with fails(
            rf"(?s)same devices.*'d': 8.*\n  - '{path}' is (on|at) .*params = jax.device_put"
        ):
            CALLS[call](params, adapters)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("make", [jnp.asarray, np.asarray])
def test_a_leaf_that_is_not_placed(make, call):
    """One with an adapter has to say where that lies; any other goes where it is needed."""
    for path in PARAMS:
        params, adapters = spread(**{path: make(PARAMS[path])})
        if path == "scale":
            CALLS[call](params, adapters)
            continue
        what = "a ndarray without a sharding" if make is np.asarray else "is on no device in part"
        if make is np.asarray and not call.startswith("shardings"):
            what = "is on no device in part"
        with fails(rf"'{path}': {what}|'{path}' {what}"):
            CALLS[call](params, adapters)


@pytest.mark.parametrize("call", ["bind", "merge"])
@pytest.mark.parametrize("where", ELSEWHERE)
def test_adapters_that_lie_elsewhere(where, call):
    params, adapters = spread()
    adapters["up"] = jax.device_put(adapters["up"], SingleDeviceSharding(DEVICES[0]))
    if where != "one device":
        adapters["down"] = jax.device_put(
            adapters["down"], NamedSharding(ELSEWHERE[where].mesh, P())
        )
        match = r"(?s)of 'down' is at .*of 'up' is on .*"
    else:
        match = r"(?s)  - the adapter of 'up' is on \S*:0\n"
    with fails(match + r"\n?adapters = jax.device_put\(adapters, lora.parallel.shardings\(params"):
        CALLS[call](params, adapters)
    adapters = jax.device_put(adapters, lora.parallel.shardings(params, adapters))
    CALLS[call](params, adapters)  # the corrected call


def test_what_jax_takes_is_taken():
    """Adapters and a base that are on no device yet, one mesh in two shapes, and what is traced."""
    params, adapters = spread()
    fn = lora.adapt(lambda p, x: x @ p["up"] + p["bias"], strict=False)
    x, want = jnp.ones((4, 16)), np.full((4, 32), 17.0)
    run = jax.jit(lambda p, ad: fn(lora.bind(p, ad), x))
    placed = jax.device_put(adapters, lora.parallel.shardings(params, adapters))
    other = NamedSharding(Mesh(DEVICES.reshape(2, 4), ("a", "b")), P("a"))
    for base in (params, PARAMS, jax.tree.map(np.asarray, PARAMS), spread(other)[0]):
        for ad in (adapters, placed):
            np.testing.assert_array_equal(run(base, ad), want)
            np.testing.assert_array_equal(fn(lora.bind(base, ad), x), want)
            np.testing.assert_array_equal(lora.merge(base, ad)["up"], PARAMS["up"])
    mixed = params | {"down": PARAMS["down"]}
    np.testing.assert_array_equal(run(mixed, adapters), want)  # as jit has placed it by then
