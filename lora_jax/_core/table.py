"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Aligned columns; numbers to the right."""
    cells = [tuple(head), *(tuple(_text(c) for c in row) for row in rows)]
    width = [max(len(row[i]) for row in cells) for i in range(len(head))]
    # Empty cells do not make text of a column of numbers.
    numbers = [[r[i] for r in rows if r[i] != ""] for i in range(len(head))]
    right = [bool(c) and all(isinstance(x, int | float) for x in c) for c in numbers]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, width, right)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in width), *lines[1:]])


def _text(cell: Any) -> str:
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:g}"
    if isinstance(cell, tuple):
        return "(" + ", ".join(map(str, cell)) + ")" if cell else "-"
    return str(cell)
