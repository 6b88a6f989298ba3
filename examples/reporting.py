"""What the example scripts share: flags, a table of results, and a plot."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        none = action.default is None or action.default is False
        return action.help if none else super()._get_help_string(action)


def options(doc: str) -> argparse.ArgumentParser:
    """A parser that shows the first line of a script's docstring, and each flag's default."""
    return argparse.ArgumentParser(description=doc.split("\n")[0], formatter_class=Defaults)


def whole(most: int | None = None) -> Callable[[str], int]:
    """The type of a flag: a number from 1 on, so that others are refused before anything runs."""

    def number(text: str) -> int:
        n = int(text)
        if n < 1 or (most and n > most):
            wanted = f"1 to {most:,}" if most else "1 or more"
            raise argparse.ArgumentTypeError(f"{n}: expected {wanted}")
        return n

    return number


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
