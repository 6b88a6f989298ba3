"""Times of things that are run in turns, bytes that they access, and tables of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import numpy as np

# The environment to compile in for devices that are not there, to be set before JAX is imported.
AHEAD = {
    "JAX_PLATFORMS": "cpu",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def seconds(run: Callable) -> float:
    start = time.perf_counter()
    out = run()
    spent = time.perf_counter() - start
    del out  # to free it takes time too, which is not the run's
    return spent


def in_turns(runs: dict[str, Callable], repeats: int) -> dict[str, np.ndarray]:
    """Seconds of each run in each round, after one that is not counted.

    Each round has an order of its own, so that no run always comes after the same other one.
    """
    times = {name: np.zeros(repeats) for name in runs}
    for run in runs.values():
        run()
    names, rng = list(runs), np.random.default_rng(0)
    gc.collect()
    gc.disable()
    for i in range(repeats):
        for name in rng.permutation(names):
            times[name][i] = seconds(runs[name])
    gc.enable()
    return times


def ratio(times, reference) -> str:
    """Median, and in brackets the quartiles, of the paired ratios."""
    low, median, high = np.percentile(times / reference, (25, 50, 75))
    return f"{median:.2f} ({low:.2f}–{high:.2f})"


def accessed(compiled) -> float | None:
    """Bytes accessed, the body of a loop once; of XLA's own analysis of the compiled program."""
    if found := (compiled.cost_analysis() or {}).get("bytes accessed"):
        return found
    # The CUDA compiler gives none ahead of time. Imported here: JAX reads `AHEAD` when it starts.
    import jax
    from jaxlib import _jax

    (module,) = compiled.runtime_executable().hlo_modules()
    return _jax.hlo_module_cost_analysis(jax.devices()[0].client, module).get("bytes accessed")


def table(header, rows) -> str:
    """A table in Markdown."""
    cells = [[str(x) for x in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(x.ljust(n) for x, n in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (n + 2) for n in widths) + "|")
    return "\n".join(lines)
