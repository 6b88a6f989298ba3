"""One device = eight, in every way that people spread a step; only what is adapter-sized travels."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import parallel
import pytest
import rand
from common import tolerance
from jax.sharding import PartitionSpec as P

import lora_jax as lora


@pytest.fixture(autouse=True)
def optax_promotes():
    """optax itself mixes types, as `beta ** count`."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", parallel.MODES)
def test_equals_one_device(name):
    """The losses of five steps, and the adapters after them; and no gradient is weight-sized."""
    case_name, mode = parallel.MODES[name]
    case = parallel.CASES[case_name]()
    losses, adapters, compiled = mode(case)
    want_losses, want, _ = parallel.reference(case_name)
    assert losses[0] != losses[-1]
    assert parallel.difference(losses, want_losses) < tolerance(jnp.float32, 16)
    assert parallel.difference(adapters, want) < tolerance(jnp.float32, 256)  # Adam divides
    moved = parallel.difference(adapters, jax.device_get(case.adapters))
    assert moved > 1e-2
    reduced = parallel.reductions(compiled)
    assert reduced and parallel.weight_sized(case, reduced) == []
    if "pmap" not in name:  # which names no argument, and stacks its outputs
        assert_the_base_is_an_argument(case, compiled)


CUT_BLOCK = "shard_map, gathering", "nf4"  # by hand a device gets 32 of 64 columns
IN_CI = {
    ("jit, FSDP × TP", "int8"),
    ("jit, explicit", "nf4"),
    ("jit, explicit FSDP", "nf4"),
}  # and shard_map and pmap in tests/_quantized/test_quantized.py and tests/_quantized/test_quantized_uses.py
BOTH = [(name, f) for name in parallel.MODES for f in parallel.DOUBLE if (name, f) != CUT_BLOCK]


@pytest.mark.parametrize(
    "name, format",
    [pytest.param(*of, marks=() if of in IN_CI else pytest.mark.slow) for of in BOTH],
)
def test_a_quantised_base_equals_one_device(name, format):
    """On the same codes. What is gathered of a weight is its codes, and no float of its size."""
    case_name, mode = parallel.MODES[name]
    case = parallel.in_codes(case_name, format)
    losses, adapters, compiled = mode(case)
    want_losses, want, _ = parallel.reference(case_name, format)
    assert parallel.difference(losses, want_losses) < tolerance(jnp.float32, 64)
    assert parallel.difference(adapters, want) < tolerance(jnp.float32, 1024)
    assert parallel.difference(adapters, jax.device_get(case.adapters)) > 1e-2
    floats = parallel.sent(compiled, "all-gather", "all-to-all", types="f32")
    assert parallel.weight_sized(case, floats) == []
    assert parallel.weight_sized(case, parallel.reductions(compiled)) == []
    gathers = any(word in name for word in ("FSDP", "slices", "gathering"))
    codes = parallel.sent(compiled, "all-gather", types="u8 s8")
    packed = 2 if format == "nf4" else 1
    assert bool(parallel.weight_sized(case, codes, packed)) == gathers
    if gathers or "TP" in name:  # of each weight a device has a part, and of its constants
        _, _, base, _ = compiled.input_shardings[0]
        weights = [
            q for q in jax.tree.leaves(base, is_leaf=parallel.quantized) if parallel.quantized(q)
        ]
        assert weights and not any(q.codes.is_fully_replicated for q in weights)
        assert not all(q.constants.is_fully_replicated for q in weights)


def assert_the_base_is_an_argument(case, compiled):
    """It is neither returned nor copied; adapters and state give their memory to the new ones."""
    memory = compiled.memory_analysis()
    trained = jax.tree.leaves((case.adapters, parallel.TX.init(case.adapters)))
    slack = 8 * (len(trained) + 4)  # the loss, and a pointer for each array
    most = sum(x.nbytes for x in trained) + slack
    assert 0 < memory.alias_size_in_bytes <= memory.output_size_in_bytes <= most
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes <= slack
    text = compiled.as_text()
    base = re.findall(r"(%\S+) = \S+ parameter\(\d+\).*op_name=\"params\[", text)
    assert len(base) == len(jax.tree.leaves(case.params))
    assert not [name for name in base if f" copy({name})" in text]


@pytest.mark.parametrize("name", ["jit, FSDP × TP", "jit, explicit", "shard_map, gathering"])
def test_full_fine_tuning_is_weight_sized(name):
    """So the test above can fail."""
    case_name, mode = parallel.MODES[name]
    case = parallel.CASES[case_name]()
    _, _, compiled = mode(case, full=True)
    assert parallel.weight_sized(case, parallel.reductions(compiled))


def test_the_gradient_that_is_too_large():
    """JAX's trap, not ours: under shard_map the gradient of replicated adapters is summed already.
    The mean of the losses, differentiated, is right; a mean of the gradients changes nothing."""
    params = {"w": jnp.eye(4)}
    adapters = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets="w"))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    x = rand.normal(jax.random.key(1), (8, 4))
    fn = lora.adapt(lambda p, x: jnp.mean((x @ p["w"]) ** 2))
    loss = lambda ad, x: fn(lora.bind(params, ad), x)
    mean = lambda x: jax.lax.pmean(x, "d")
    spread = lambda f: jax.jit(jax.shard_map(
        f, mesh=parallel.mesh_of((8,), ("d",)), in_specs=(P(), P("d")), out_specs=P()))  # fmt: skip
    want = jax.grad(loss)(adapters, x)
    right = spread(jax.grad(lambda ad, x: mean(loss(ad, x))))(adapters, x)
    wrong = spread(lambda ad, x: jax.tree.map(mean, jax.grad(loss)(ad, x)))(adapters, x)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, right, want)
    jax.tree.map(lambda w, g: close(w, 8 * g), wrong, want)
