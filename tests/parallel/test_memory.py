"""The bytes of a training step by arithmetic: as the arrays have them, and as a paper does."""

import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from common import fails
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora

KEY = jax.random.key(0)


def llama(layers, d, hidden, vocab, dtype="bfloat16"):
    """Shapes of a Llama with scanned layers."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, dtype)
    stack = lambda *s: {"kernel": shape(layers, *s)}
    attention = {name: stack(d, d) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    mlp = {"gate": stack(d, hidden), "up": stack(d, hidden), "down": stack(hidden, d)}
    norms = {name: {"scale": shape(layers, d)} for name in ("before", "after")}
    return {
        "embed": {"embedding": shape(vocab, d)},
        "layers": {"attention": attention, "mlp": mlp, **norms},
        "norm": {"scale": shape(d)},
        "head": {"kernel": shape(d, vocab)},
    }


STACKED = [lora.Rule("layers/*", batch_axes=(0,), in_axes=(1,), out_axes=(2,))]


def quantised(shapes, targets, **options):
    chosen = lora.select(shapes, lora.LoRAConfig(targets=targets, rules=STACKED))
    return jax.eval_shape(lambda p: lora.quant.quantize(p, chosen, **options), shapes)


def test_65b_parameters_in_33_6_gb():
    """65.2B parameters in 33.6 GB, of 10⁹ bytes: every matrix in NF4 with double quantisation, the
    embedding and the head as well, norms in 16 bits."""
    shapes = llama(layers=80, d=8192, hidden=22016, vocab=32000)
    base = quantised(shapes, ["layers/*/kernel", "head/kernel", "embed/embedding"], double=True)
    found = lora.parallel.memory(base, None)
    assert 65.2e9 < found.parameters < 65.3e9 and 33.6e9 < found.total < 33.7e9
    assert abs(8 * found.total / found.parameters - 4.127) < 1e-3
    plain = lora.parallel.memory(quantised(shapes, ["layers/*/kernel"], double=True), None)
    assert plain.total > found.total


@functools.cache
def small():
    shapes = llama(layers=2, d=64, hidden=128, vocab=256, dtype="float32")
    params = jax.tree.map(lambda x: jax.random.normal(KEY, x.shape), shapes)
    chosen = lora.select(params, lora.LoRAConfig(targets=["layers/*/kernel"], rules=STACKED))
    base = lora.quant.quantize(params, chosen, double=True)
    config = lora.LoRAConfig(rank=2, targets=["q_proj", "up"], rules=STACKED)
    return base, lora.init(KEY, params, config)


@pytest.mark.long
def test_the_bytes_of_arrays():
    base, adapters = small()
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    tx = optax.adam(1e-3)
    for wrap in (lambda x: x, lambda x: jax.eval_shape(lambda: x)):
        found = lora.parallel.memory(wrap(base), wrap(adapters), tx)
        parts = {name: part.total for name, part in found.parts.items()}
        assert parts["base"] + parts["constants"] == size(base)
        assert parts["adapters"] == parts["gradients"] == size(adapters)
        assert parts["optimizer"] == size(tx.init(adapters)) and found.device == found.total
        assert sum(b + c for *_, b, c in found.leaves.values()) == size(base)
    lines = str(found).splitlines()
    assert lines[-2].split() == ["all", *2 * [f"{found.total / 1e6:,.2f}"]]


@pytest.mark.long
def test_of_one_device():
    """As the shards that device 0 holds, and as XLA says of the arguments of a step."""
    base, adapters = small()
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spec = lambda x: P(*[None] * (x.ndim - 1), "model") if x.shape[-1] % 4 == 0 else P()
    base = jax.device_put(base, jax.tree.map(lambda x: NamedSharding(mesh, spec(x)), base))
    at = lora.parallel.shardings(base, adapters)
    placed, tx = jax.device_put(adapters, at), optax.adam(1e-3)
    state = jax.eval_shape(tx.init, adapters)
    on_state = lora.parallel.state_shardings(state, adapters, at)
    found = lora.parallel.memory(base, adapters, tx, shardings=at)
    local = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    assert found.parts["base"].device + found.parts["constants"].device == local(base)
    assert found.parts["adapters"].device == local(placed) < found.parts["adapters"].total
    assert found.device < found.total
    assert lora.parallel.memory(base, placed, tx) == found
    step = jax.jit(lambda base, ad, state: 0, in_shardings=(None, at, on_state), keep_unused=True)
    compiled = step.lower(base, adapters, state).compile()
    want = math.fsum(found.parts[n].device for n in ("base", "constants", "adapters", "optimizer"))
    assert compiled.memory_analysis().argument_size_in_bytes == want


@pytest.mark.parametrize(
    "call", [lambda: lora.parallel.memory({}, None), lambda: lora.parallel.memory({"w": 1}, None)]
)
def test_errors(call):
    with fails("expected parameters"):
        call()


def test_what_is_no_adapter():
    with fails("expected adapters"):
        lora.parallel.memory({"w": jnp.ones(2)}, {"w": jnp.ones(2)})


@pytest.mark.long
def test_an_optimiser_of_8_bits():
    """flashoptim-jax on the adapters of a quantised base: a quarter of Adam's state, its loss."""
    from flashoptim_jax import flash_adamw

    key = jax.random.key(0)
    params = {f"layer_{i}": jax.random.normal(jax.random.key(i), (64, 64)) / 8 for i in range(2)}
    base = lora.quant.quantize(params, "*")
    start = lora.init(key, base, lora.LoRAConfig(rank=8, alpha=8, targets="*"))
    apply = lora.adapt(lambda p, x: jnp.tanh(x @ p["layer_0"]) @ p["layer_1"])
    x = jax.random.normal(key, (32, 64))
    loss = lambda ad: jnp.mean((apply(lora.bind(base, ad), x) - jnp.sin(x)) ** 2)
    flash = flash_adamw(
        3e-3, weight_decay=0.0, fused=False, master_weight_bits=None
    )  # unfused: CPU
    adam = optax.adamw(3e-3, weight_decay=0.0)

    def update(ad, state):
        updates, state = adam.update(jax.grad(loss)(ad), state, ad)
        return optax.apply_updates(ad, updates), state

    losses = []
    for tx, step in ((adam, update), (flash, lambda ad, s: flash.step(ad, s, jax.grad(loss)(ad)))):
        adapters, state, step = start, tx.init(start), jax.jit(step)
        with jax.numpy_dtype_promotion("standard"):  # flashoptim's own types mix
            for _ in range(40):
                adapters, state = step(adapters, state)
        losses.append(float(loss(adapters)))
    assert losses[1] == pytest.approx(losses[0], rel=0.01) and losses[0] < 0.9 * loss(start)
    whole, small = (
        lora.parallel.memory(base, start, tx).parts["optimizer"] for tx in (adam, flash)
    )
    assert small.total < 0.28 * whole.total
    specs = jax.tree.map(lambda _: P("d"), start)
    found = lora.parallel.state_shardings(flash.init(start), start, specs)
    assert found.mu["layer_0"].a == (P("d"), P()) and found.count == P()  # codes, constants
