"""Tables, as plain text and as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Aligned columns; numbers to the right."""
    cells = [tuple(head), *(tuple(_text(c) for c in row) for row in rows)]
    width = [max(len(row[i]) for row in cells) for i in range(len(head))]
    right = _numeric(head, rows)
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, width, right)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in width), *lines[1:]])


def html_table(head: Sequence[str], rows: Sequence[Sequence], *notes: str) -> str:
    """The same for a notebook, with lines of text below."""
    sides = ["right" if r else "left" for r in _numeric(head, rows)]
    line = lambda tag, cells: "".join(
        f'<{tag} style="text-align: {side}">{html.escape(_text(cell))}</{tag}>'
        for side, cell in zip(sides, cells)
    )
    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    below = "".join(f"<div>{html.escape(note)}</div>" for note in notes)
    return f"<table><thead><tr>{line('th', head)}</tr></thead><tbody>{body}</tbody></table>{below}"


def _numeric(head: Sequence[str], rows: Sequence[Sequence]) -> list[bool]:
    """Which columns are of numbers; an empty cell does not make text of one."""
    columns = [[row[i] for row in rows if row[i] != ""] for i in range(len(head))]
    return [bool(c) and all(isinstance(x, int | float) for x in c) for c in columns]


def _text(cell: Any) -> str:
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:g}"
    if isinstance(cell, tuple):
        return "(" + ", ".join(map(str, cell)) + ")" if cell else "-"
    return str(cell)
