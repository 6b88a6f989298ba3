"""The time to trace, lower and compile a step, and how often that happens."""

from __future__ import annotations

import jax
import llama
import numpy as np
from by_hand import CASES, lowering_ratio, steps
from measure import seconds, table

DEPTHS = {"2 layers": 2, "8 layers": 8, "24 layers": 24, "24 layers scanned": 24}
SWAPS = 10


def compiling(repeats) -> str:
    """The table; every cell our time over the hand-written one's, and the count below it."""
    rows = []
    for case, (targets, rank) in CASES.items():
        for name, layers in DEPTHS.items():
            kwargs = dict(layers=layers, scan="scanned" in name)
            lowering = lowering_ratio(targets, rank, min(repeats, 7), **kwargs)
            compilation = _compilation_ratio(targets, rank, min(repeats, 5), **kwargs)
            rows.append((case, name, f"{lowering:.2f}", f"{compilation:.2f}"))
    traces, compilations = _swaps()
    note = (
        f"{SWAPS} swaps of adapters of equal shape under one jit: {traces} trace, {compilations} "
        "XLA compilation"
    )
    return table(("case", "model", "trace and lower", "compile"), rows) + "\n\n" + note


def _compilation_ratio(targets, rank, repeats, **kwargs) -> float:
    pairs = steps(targets, rank, **kwargs)
    ratios = []
    for _ in range(repeats):
        spent = []
        for f, args in pairs:
            jax.clear_caches()
            lowered = f.lower(*args)
            spent.append(seconds(lowered.compile))
        ratios.append(spent[0] / spent[1])
    return float(np.median(ratios))


def _swaps() -> tuple[int, int]:
    """(traces, compilations) while a jitted step gets one adapter tree after the other."""
    (step, (adapters, *rest)), _ = steps(llama.ALL, 16)
    trees = [jax.tree.map(lambda x, i=i: x + i, adapters) for i in range(SWAPS)]
    traces, compilations = [], []

    @jax.jit
    def counted(*args):
        traces.append(1)
        return step(*args)

    def listen(event, duration, **kwargs):
        if event.endswith("backend_compile_duration"):
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    for tree in trees:
        jax.block_until_ready(counted(tree, *rest))
    return len(traces), len(compilations)
