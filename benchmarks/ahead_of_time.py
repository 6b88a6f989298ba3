"""A 7B-shaped LoRA step for TPUs and GPUs that are not there: `python benchmarks/ahead_of_time.py`.

The compilers are the real ones (`pip install 'jax[tpu]'`, and `jax-cuda12-plugin` of JAX's own
version), so memory and collectives per chip are real; nothing is executed. Ours against LoRA
written by hand: scanned and rematerialised layers, bf16 base, fp32 adapters of rank 16 on all
linears, Adam, 256 tokens a sequence.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import re
import time

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
import jax.numpy as jnp
import llama
import optax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lora

P = PartitionSpec
SHAPE = dict(vocab=32000, width=4096, hidden=11008, heads=32, layers=32)
RANK = 16


# What XLA asks of a GPU that is not there; the figures of an H100 SXM, from XLA's gpu_specs.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  memory_bandwidth: 3352320000000 device_memory_size: 84978434048
}
"""


def topology(name: str):
    """`v5e:2x2`, or `h100:1x1x8`: hosts, partitions and GPUs of each."""
    kind, shape = name.split(":")
    if kind != "h100":
        return topologies.get_topology_desc(platform="tpu", topology_name=name)
    return topologies.get_topology_desc(
        platform="cuda", topology_name=kind, topology=shape, target_config=H100
    )


def spec(path, x) -> PartitionSpec:
    """Kernels (layers, in, out) over fsdp and tp as in Megatron-LM; adapters on every chip."""
    if x.ndim < 2 or min(x.shape[-2:]) < 1024:
        return P()
    inward = any(f"'{name}'" in jax.tree_util.keystr(path) for name in ("o", "down", "embed"))
    return P(*[None] * (x.ndim - 2), *(("tp", "fsdp") if inward else ("fsdp", "tp")))


def step(mesh, by_hand: bool, layers: int, tokens):
    """(function, shapes with shardings): the gradient of the adapters, and Adam."""
    config = llama.Config(
        **{**SHAPE, "layers": layers}, scan=True, dtype=jnp.bfloat16, rank=RANK, scale=2.0
    )
    model = llama.Llama(config)
    hand = llama.Llama(dataclasses.replace(config, by_hand=llama.ALL))
    ids = jax.ShapeDtypeStruct(tokens, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    if by_hand:
        variables = jax.eval_shape(hand.init, jax.random.key(0), ids)
        adapters = variables["lora"]

        def loss(adapters, params, ids):
            return llama.loss(hand.apply({"params": params, "lora": adapters}, ids), ids)
    else:
        survey = lora.survey(model.apply, {"params": params}, ids)
        lora_config = lora.LoRAConfig(rank=RANK, alpha=2.0 * RANK, targets=llama.ALL)
        adapters = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, lora_config, survey))
        apply = lora.adapt(model.apply)

        def loss(adapters, params, ids):
            return llama.loss(apply({"params": lora.bind(params, adapters)}, ids), ids)

    opt = optax.adam(1e-4)

    def update(adapters, state, params, ids):
        value, grads = jax.value_and_grad(loss)(adapters, params, ids)
        updates, state = opt.update(grads, state)
        return optax.apply_updates(adapters, updates), state, value

    state = jax.eval_shape(opt.init, adapters)
    place = lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec(path, x))
        ),
        tree,
    )
    ids = jax.ShapeDtypeStruct(tokens, jnp.int32, sharding=NamedSharding(mesh, P("fsdp")))
    return jax.jit(update, donate_argnums=(0, 1)), (*map(place, (adapters, state, params)), ids)


def collectives(text: str) -> dict[str, int]:
    """{kind of collective: bytes of the largest}."""
    width = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}
    text = re.sub(r"/\*.*?\*/", "", text)
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    largest: dict[str, int] = collections.defaultdict(int)
    for shape, kind in re.findall(rf"= (\(.*?\)|\S+) ({kinds})(?:-start)?\(", text):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape):
            size = width.get(dtype, 4)
            for d in dims.split(","):
                size *= int(d or 1)
            largest[kind] = max(largest[kind], size)
    return dict(largest)


def report(name: str, layers: int, tokens) -> None:
    td = topology(name)
    chips = len(td.devices)
    mesh = topologies.make_mesh(td, (2, chips // 2), ("fsdp", "tp"))
    print(f"\n{name}, {chips} chips, {layers} layers, tokens {tokens}, jax {jax.__version__}")
    for label, by_hand in (("ours", False), ("by hand", True)):
        f, args = step(mesh, by_hand, layers, tokens)
        start = time.perf_counter()
        compiled = f.lower(*args).compile()
        m = compiled.memory_analysis()
        live = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        gib = lambda n: f"{n / 2**30:.3f} GiB"
        print(
            f"{label:8} peak {gib(live + m.temp_size_in_bytes)} (arguments "
            f"{gib(m.argument_size_in_bytes)}, temp {gib(m.temp_size_in_bytes)}), "
            f"compiled in {time.perf_counter() - start:.0f} s"
        )
        cost = compiled.cost_analysis() or {}
        print(" " * 9 + f"bytes accessed {cost.get('bytes accessed', float('nan')):.4g}, ", end="")
        print("largest collectives in MiB", {
            k: round(v / 2**20, 2) for k, v in collectives(compiled.as_text()).items()
        })  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("topology", nargs="*", default=["v5e:2x2"])
    parser.add_argument("--layers", type=int, default=SHAPE["layers"])
    parser.add_argument("--tokens", type=int, nargs=2, default=(4, 256))
    arguments = parser.parse_args()
    for name in arguments.topology:
        report(name, arguments.layers, tuple(arguments.tokens))
