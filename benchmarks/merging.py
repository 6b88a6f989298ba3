"""`lora.merge` of a large tree, against a plain copy of it.

Each way is a process of its own (`python benchmarks/merging.py donate`), as a peak cannot be taken
back.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from measure import ratio, seconds, table

import lora_jax as lora

LEAVES, WIDTH, RANK = 16, 4096, 16
WAYS = {
    "copy": lambda params, adapters: jax.tree.map(jnp.copy, params),
    "merge": lora.merge,
    "merge, donate=True": lambda params, adapters: lora.merge(params, adapters, donate=True),
}


def merging(repeats, leaves=LEAVES, width=WIDTH) -> str:
    rows = []
    for way in WAYS:
        command = [sys.executable, __file__, way, str(repeats), str(leaves), str(width)]
        out = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        rows.append((way, out["time"], f"{out['memory'] / out['tree']:.3f}"))
    note = (
        f"the tree: {leaves} leaves {width}×{width}, fp32, {out['tree'] / 1e9:.2f} GB; rank {RANK}"
    )
    header = ("way", "time / copy", "peak memory beyond the tree / the tree")
    return table(header, rows) + "\n\n" + note


def _memory(peak: bool) -> int:
    """Bytes of the device, or of this process where the device is the CPU."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use" if peak else "bytes_in_use"]
    with open("/proc/self/status") as f:
        status = dict(line.split(":", 1) for line in f)
    return int(status["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


def _measure(way, repeats, leaves, width):
    names = [f"layer_{i}" for i in range(leaves)]
    config = lora.LoRAConfig(rank=RANK, targets=names)
    make = lambda: {n: jnp.full((width, width), 0.5) for n in names}
    params = jax.block_until_ready(make())
    adapters = lora.init(jax.random.key(0), params, config)
    jax.block_until_ready(adapters)
    run = lambda way, params: jax.block_until_ready(WAYS[way](params, adapters))
    before = _memory(peak=False)
    tree = sum(x.nbytes for x in params.values())
    run(way, params)
    memory = _memory(peak=True) - before
    times = {"copy": np.zeros(repeats), way: np.zeros(repeats)}
    for i in range(repeats):
        for k in times:
            params = jax.block_until_ready(make())  # anew: donate=True takes it
            times[k][i] = seconds(functools.partial(run, k, params))
    print(json.dumps({"tree": tree, "memory": memory, "time": ratio(times[way], times["copy"])}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("repeats", type=int)
    parser.add_argument("leaves", type=int)
    parser.add_argument("width", type=int)
    _measure(**vars(parser.parse_args()))
