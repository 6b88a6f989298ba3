"""The time to trace, lower and compile a step, and how often that happens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import llama
import numpy as np
from by_hand import CASES, lowering_ratio, lowering_times, steps
from measure import seconds, table

import lora_jax as lora

DEPTHS = {"2 layers": 2, "8 layers": 8, "24 layers": 24, "24 layers scanned": 24}
UNROLLED = (24, 50, 100, 200)
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
    models = [(str(n), n, lambda f: f) for n in UNROLLED]
    models += [(f"{n} under one jax.checkpoint", n, jax.checkpoint) for n in UNROLLED[:2]]
    of_base = [
        (name, *map("{:.2f}".format, _of_base(n, min(repeats, 7), wrap)))
        for name, n, wrap in models
    ]
    lowering = table(("case", "model", "trace and lower", "compile"), rows)
    unrolled = table(("layers without names", "ours / base", "by hand / base"), of_base)
    return "\n\n".join((lowering, unrolled, note))


def _of_base(layers: int, repeats, wrap=lambda f: f) -> tuple[float, float]:
    """Trace and lower x + tanh(x·W), unrolled: the gradient of our adapters, and of adapters by
    hand, over that of all W. `wrap`: of the layer."""

    def model(ws, x, dense=lambda x, w: x @ w):
        layer = wrap(lambda x, w: x + jnp.tanh(dense(x, w)))
        for w in ws:
            x = layer(x, w)
        return x.sum()

    def by_hand(adapters, ws, x):
        dense = lambda x, w: x @ w[0] + 2.0 * ((x @ w[1]) @ w[2])
        return model([(w, *ab) for w, ab in zip(ws, adapters)], x, dense)

    adapted = lora.adapt(model)
    ours = lambda adapters, ws, x: adapted(lora.bind(ws, adapters), x)
    ws, x = [jnp.ones((64, 64))] * layers, jnp.ones((1024, 64))
    hand_adapters = [(jnp.ones((64, 4)), jnp.ones((4, 64)))] * layers
    config = lora.LoRAConfig(rank=4, alpha=8.0, targets="*")
    adapters = lora.init(jax.random.key(0), ws, config)
    grad = lambda f: jax.jit(jax.value_and_grad(f))
    base, ours, hand = lowering_times(
        [
            (grad(model), (ws, x)),
            (grad(ours), (adapters, ws, x)),
            (grad(by_hand), (hand_adapters, ws, x)),
        ],
        repeats,
    )
    return ours / base, hand / base


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
