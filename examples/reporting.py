"""What the example scripts share: a table of results, and a plot."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def format_table(head, rows) -> str:
    """Aligned columns; fractions with three digits, counts with thousands separated."""

    def text(x):
        if isinstance(x, float):
            return f"{x:.3f}" if abs(x) < 2 else f"{x:,.0f}"
        return f"{x:,}" if isinstance(x, int) else str(x)

    cells = [list(map(text, row)) for row in [head, *rows]]
    width = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, width)) for row in cells)


def plot(path: Path, curves: dict[str, list[float]], window: int = 8) -> Path:
    """Training losses as a PNG, smoothed over `window` steps."""
    from matplotlib.figure import Figure  # no pyplot: no display is needed

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for name, losses in curves.items():
        axes.plot(np.convolve(losses, np.ones(window) / window, "valid"), label=name)
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss (mean of {window} steps)")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return path
