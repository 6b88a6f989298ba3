"""What a quantised base costs in bytes accessed and in temporaries, by XLA's own analysis.

A linear layer (4096, 11008) on 256 rows, and a training step of a Llama of two layers, LoRA of rank
16 on all linears, base in bf16 or in codes. The figures are the compiler's, so they are the same in
every run; for TPUs and GPUs that are not there, too, see docs/scaling.md:

    python benchmarks/quantized_bytes.py                # the CPU
    python benchmarks/quantized_bytes.py v5e:2x2 h100:1x1x1   # ahead of time
"""

from __future__ import annotations

import math
import os
import sys

from measure import AHEAD, accessed, table

os.environ |= AHEAD

import cases
import jax
import jax.numpy as jnp
import llama
from jax.sharding import SingleDeviceSharding

import lora_jax as lora

BASES = {
    "bf16": None,
    "INT8": dict(format="int8"),
    "NF4": dict(format="nf4"),
    "NF4, double": dict(format="nf4", double=True),
}
MEGA = 1e6
KEY = jax.random.key(0)


def linear():
    """(function, parameters, input, targets)."""
    params = {"w": jax.ShapeDtypeStruct((4096, 11008), jnp.bfloat16)}
    return lambda p, x: x @ p["w"], params, jax.ShapeDtypeStruct((256, 4096), jnp.bfloat16), ["w"]


def two_layers():
    model = llama.Llama(llama.Config(**cases.SIZE, dtype=jnp.bfloat16))
    ids = jax.ShapeDtypeStruct(cases.TOKENS, jnp.int32)
    params = jax.eval_shape(model.init, KEY, ids)["params"]
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    return lambda p, ids: model.apply({"params": p}, ids), params, ids, list(llama.ALL)


def programs(make):
    """(base, program, function, arguments): the forward pass; and the gradients of adapters and, of
    the linear layer, of its input."""
    fn, params, x, targets = make()
    survey = lora.survey(fn, params, x)
    config = lora.LoRAConfig(rank=16, targets=targets)
    adapters = jax.eval_shape(lambda: lora.init(KEY, params, config, survey))
    apply = lora.adapt(fn)
    forward = lambda ad, base, x: apply(lora.bind(base, ad), x)
    loss = lambda ad, base, x: jnp.sum(forward(ad, base, x).astype(jnp.float32) ** 2)
    step = jax.value_and_grad(loss, (0, 2) if jnp.issubdtype(x.dtype, jnp.floating) else 0)
    for name, how in BASES.items():
        base = params
        if how is not None:
            quantize = lambda p, how=how: lora.quant.quantize(p, targets, survey=survey, **how)
            base = jax.eval_shape(quantize, params)
        for program, f in (("forward", forward), ("step", step)):
            yield name, program, f, (adapters, base, x)


def row(f, args, device) -> tuple[str, ...]:
    """Megabytes: of arguments, accessed, temporaries."""
    where = SingleDeviceSharding(device)
    at = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    compiled = jax.jit(f).lower(*jax.tree.map(at, args)).compile()
    memory = compiled.memory_analysis()
    sizes = memory.argument_size_in_bytes, accessed(compiled), memory.temp_size_in_bytes
    return tuple("–" if n is None else f"{n / MEGA:,.1f}" for n in sizes)


def device_of(name: str):
    if name == "cpu":
        return jax.devices()[0]
    return lora.parallel.topology_mesh(
        name, d=math.prod(map(int, name.split(":")[1].split("x")))
    ).devices.flat[0]


def main() -> None:
    print(f"jax {jax.__version__}; megabytes")
    for name in sys.argv[1:] or ["cpu"]:
        device = device_of(name)
        for make in (linear, two_layers):
            rows = [
                (base, program, *row(f, args, device)) for base, program, f, args in programs(make)
            ]
            head = ("base", "program", "arguments", "accessed", "temporaries")
            print(f"\n{device.device_kind}, {make.__name__}\n\n{table(head, rows)}", flush=True)


if __name__ == "__main__":
    main()
