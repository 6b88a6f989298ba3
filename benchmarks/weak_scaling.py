"""Weak scaling on paper: what each chip computes, moves and sends as chips are added.

A 7B-shaped model, fully sharded (FSDP alone), one sequence of 256 tokens on each chip of v5e. XLA
counts the FLOPs and bytes of a loop's body once, and the compiled loops are over the layers. So on
16 chips each step is compiled a second time, with two layers in the body of its scan: what is added
is a layer's part, and every other layer's is added to the figures of all sizes. (With the tokens of
a chip constant, a layer takes the same on each chip whatever their number.)
"""

from __future__ import annotations

from charts import COSTS
from pod import SHAPES, step

import lora_jax as lora

CHIPS = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
ARMS = ("lora", "full")
LENGTH, MEASURED = 256, 16


def weak_scaling(layers: int | None = None) -> list[dict]:
    """A row for each number of chips and arm, all per chip and step."""
    shape = SHAPES["7b"] | ({"layers": layers} if layers else {})
    rest = {arm: _other_layers(arm, shape) for arm in ARMS}
    rows = []
    for chips in CHIPS:
        for arm in ARMS:
            plan = _plan(arm, chips, shape)
            costs = dict.fromkeys(COSTS)
            if plan.flops is not None:  # else refused for want of memory: no program, no costs
                flops, accessed = rest[arm]
                values = (
                    (plan.flops + flops) / 1e12,
                    (plan.bytes_accessed + accessed) / 1e9,
                    plan.collective_bytes / 1e9,
                )
                costs = {k: float(f"{v:.4g}") for k, v in zip(COSTS, values)}
            peak = {"peak GiB": round(plan.peak / 2**30, 2), "fits": plan.fits}
            rows.append({"chips": chips, "arm": arm} | costs | peak)
            print(rows[-1], flush=True)
    return rows


def _plan(arm: str, chips: int, shape: dict) -> lora.parallel.Forecast:
    mesh = lora.parallel.topology_mesh(f"v5e:{CHIPS[chips]}", fsdp=chips, tp=1)
    f, args, options = step(arm, mesh, (chips, LENGTH), shape)
    return lora.parallel.forecast(f, *args, **options)


def _other_layers(arm: str, shape: dict) -> tuple[float, float]:
    """FLOPs and bytes accessed of all layers but the one which XLA counts."""
    one, two = (_plan(arm, MEASURED, shape | {"unroll": n}) for n in (1, 2))
    others = shape["layers"] - 1
    return others * (two.flops - one.flops), others * (two.bytes_accessed - one.bytes_accessed)
