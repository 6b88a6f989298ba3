"""The bytes of a training step by arithmetic: as the arrays have them, and as a paper does."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rand
from common import fails
from figures import apart
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
    params = jax.tree.map(lambda x: rand.normal(KEY, x.shape), shapes)
    chosen = lora.select(params, lora.LoRAConfig(targets=["layers/*/kernel"], rules=STACKED))
    base = lora.quant.quantize(params, chosen, double=True)
    config = lora.LoRAConfig(rank=2, targets=["q_proj", "up"], rules=STACKED)
    return base, lora.init(KEY, params, config)


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


def test_errors():
    shape = lambda n: jax.ShapeDtypeStruct((n, 4), "float32")
    w, config = {"w": shape(8)}, lora.LoRAConfig(rank=2, targets="w")
    adapters = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, config), w)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    odd = jax.ShapeDtypeStruct((9, 4), "float32", sharding=NamedSharding(mesh, P("fsdp")))
    memory, tx = lora.parallel.memory, optax.adam(1e-3)
    for args, more, match in (
        (({}, None), {}, "expected parameters"),
        (({"w": 1}, None), {}, "expected parameters"),
        ((w, adapters, 5), {}, "expected an optax transformation, found a int"),
        ((w, adapters, tx), {"shardings": 5}, "the shardings are of another tree"),
        ((w, adapters, tx), {"forecast": 5}, "expected a forecast, found a int"),
        (({"w": odd}, None), {}, r"do not divide among their devices:(?s:.*)'w' \(9, 4\) at P"),
    ):
        with fails(match):
            memory(*args, **more)
    with fails("expected a function, found a int"):
        lora.parallel.forecast(5)


def test_full_fine_tuning():
    """Gradients and state are of the parameters; as a step's arguments have them, sharded too."""
    params, tx = llama(layers=2, d=64, hidden=128, vocab=256), optax.adam(1e-3)
    size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    found = lora.parallel.memory(params, None, tx)
    parts = {name: part.total for name, part in found.parts.items()}
    state = size(jax.eval_shape(tx.init, params))
    assert list(parts.values()) == [size(params), 0, 0, size(params), state]
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    at = NamedSharding(mesh, P("fsdp"))
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
                          {"a": params["head"], "b": params["embed"]})  # fmt: skip
    sharded = lora.parallel.memory(placed, None, optax.sgd(1.0, momentum=0.9)).parts
    assert all(
        sharded[n].total == 8 * sharded[n].device for n in ("base", "gradients", "optimizer")
    )
    base = quantised(params, ["layers/*/kernel"])
    with fails(r"trains the parameters, and 'layers/.*' is quantised: .*dequantize\(params\)"):
        lora.parallel.memory(base, None, tx)


def forecast(temporaries, devices=1):
    return lora.parallel.Forecast(
        "cpu", devices, 0, 0, 0, temporaries, 0, None, None, None, (), 0.0
    )


def test_activations_of_a_forecast():
    """The temporaries of a step hold the gradients; what is left is on each device."""
    params, tx = llama(layers=2, d=64, hidden=128, vocab=256), optax.adam(1e-3)
    plain = lora.parallel.memory(params, None, tx)
    gradients = plain.parts["gradients"].device
    found = lora.parallel.memory(params, None, tx, forecast=forecast(gradients + 1000, 4))
    more = found.parts["activations"]
    assert (more.total, more.device, found.device - plain.device) == (4000, 1000, 1000)
    assert "activations" in str(found) and "activations" not in str(plain)
    none = lora.parallel.memory(params, None, tx, forecast=forecast(gradients - 1))
    assert none.parts["activations"].device == 0
    with fails("a step that does not fit"):
        lora.parallel.memory(params, None, tx, forecast=forecast(None))


@functools.cache
def ways():
    shapes, tx = llama(layers=4, d=256, hidden=512, vocab=1024), optax.adam(1e-3)
    config = lora.LoRAConfig(rank=8, targets=["layers/*/kernel"], rules=STACKED)
    adapters = jax.eval_shape(lambda p: lora.init(KEY, p, config), shapes)
    base = quantised(shapes, ["layers/*/kernel"], double=True)
    each = functools.partial(lora.parallel.memory, optimizer=tx)
    return {
        "LoRA": each(shapes, adapters),
        "QLoRA": each(base, adapters),
        "full": each(shapes, None),
    }


def test_a_stacked_bar_for_each_way(tmp_path):
    """The lengths of a bar's parts are its bytes, and its number their sum."""
    one, *_ = found = [*ways().values()]
    figure = one.plot(
        tmp_path / "memory.png", beside={k: v for k, v in ways().items() if k != "LoRA"}
    )
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["LoRA", "QLoRA", "full"]
    lengths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    legend = [t.get_text() for t in figure.legends[0].get_texts()]
    assert legend == ["base", "constants", "adapters", "gradients", "optimizer"]
    np.testing.assert_allclose(
        lengths, [[m.parts[p].device / 1e6 for m in found] for p in legend], rtol=1e-6
    )
    ends = [bar.get_x() + bar.get_width() for bar in axes.containers[-1]]
    np.testing.assert_allclose(ends, [m.device / 1e6 for m in found], rtol=1e-6)
    assert {f"{m.device / 1e6:.3g} MB" for m in found} <= {t.get_text() for t in axes.texts}
    apart(figure)
    assert (tmp_path / "memory.png").read_bytes()[1:4] == b"PNG"


def test_a_bar_says_what_it_leaves_out():
    memories = {"base": lora.parallel.memory(llama(2, 64, 128, 256), None)}
    known = dataclasses.replace(
        ways()["QLoRA"],
        parts=ways()["QLoRA"].parts | {"activations": memories["base"].parts["base"]},
    )
    figure = known.plot(beside=memories)
    shown = [t.get_text() for t in figure.axes[0].texts]
    assert sum("+ activations" in t for t in shown) == 1
    apart(figure)


@pytest.mark.parametrize("name", ["LoRA", "QLoRA", "full"])
def test_names_of_bars_and_notebooks(name):
    found = ways()[name]
    assert [t.get_text() for t in found.plot().axes[0].get_yticklabels()] == [name]
    assert str(found) in found._repr_html_() and "data:image/png;base64," in found._repr_html_()
    with fails(f"two bars would have the name '{name}': found.plot"):
        found.plot(beside=ways())


def test_what_is_no_adapter():
    with fails("expected adapters"):
        lora.parallel.memory({"w": jnp.ones(2)}, {"w": jnp.ones(2)})


def test_an_optimiser_of_8_bits():
    """flashoptim-jax on the adapters of a quantised base: a quarter of Adam's state, its loss."""
    from flashoptim_jax import flash_adamw

    key = jax.random.key(0)
    params = {f"layer_{i}": rand.normal(jax.random.key(i), (64, 64)) / 8 for i in range(2)}
    base = lora.quant.quantize(params, "*")
    start = lora.init(key, base, lora.LoRAConfig(rank=8, alpha=8, targets="*"))
    apply = lora.adapt(lambda p, x: jnp.tanh(x @ p["layer_0"]) @ p["layer_1"])
    x = rand.normal(key, (32, 64))
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
