"""What the example scripts share: a table of results, a plot, and an adapter as one file."""

from __future__ import annotations

from pathlib import Path

import jax
import matplotlib
import numpy as np
import safetensors.numpy

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt


def format_table(head, rows) -> str:
    """Aligned columns; fractions with three digits, counts with thousands separated."""

    def text(x):
        if isinstance(x, float):
            return f"{x:.3f}" if abs(x) < 2 else f"{x:,.0f}"
        return f"{x:,}" if isinstance(x, int) else str(x)

    cells = [list(map(text, row)) for row in [head, *rows]]
    width = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, width)) for row in cells)


def save_adapter(path: Path, adapters) -> Path:
    """The arrays of an adapter tree, by their paths, as safetensors."""
    leaves = jax.tree_util.tree_leaves_with_path(adapters)
    names = ["/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in p) for p, _ in leaves]
    arrays = {name: jax.device_get(x) for name, (_, x) in zip(names, leaves)}
    safetensors.numpy.save_file(arrays, path)
    return path


def plot(path: Path, curves: dict[str, list[float]], window: int = 8) -> Path:
    """Training losses as a PNG, smoothed over `window` steps."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, losses in curves.items():
        axes.plot(np.convolve(losses, np.ones(window) / window, "valid"), label=name)
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss (mean of {window} steps)")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path
