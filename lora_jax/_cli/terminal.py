"""What a person at a terminal sees: tables with rules, and a bar. Elsewhere all is plain text."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Generator, Iterable
from typing import Any

import typer

# What the first column of a table, names, is folded to at least.
NARROW = 24


def say(*blocks: str) -> None:
    """Prints texts on stdout. One that is a table, as `_core.table` makes them, has rules where a
    person sees it and the terminal is wide enough."""
    for block in blocks:
        if not (sys.stdout.isatty() and _ruled(block)):
            echo(block)


def echo(text: str, err: bool = False) -> None:
    """Prints a text. What a stranger's file may have in it that is no sign, such as what moves a
    terminal's cursor, or that has no bytes, is escaped."""
    shown = (c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    typer.echo("".join(shown), err=err)


def one_line(text: str) -> str:
    r"""A text of which a stranger's file has a part.

    >>> one_line("task_type: A\nB")
    'task_type: A\\nB'
    """
    return text.replace("\n", "\\n")


def _ruled(block: str) -> bool:
    """Prints a table with rules, its names folded if need be; False if it is none, or too wide."""
    head, dashes, *rows = (*block.split("\n"), "")
    spans = [m.span() for m in re.finditer("-+", dashes)]
    if not re.fullmatch("-+(  -+)*", dashes):
        return False
    # Only where a table is drawn.
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console, names = Console(), spans[0][1]
    # Rules and spaces: two characters a column, and as many at the edges.
    if len(dashes) - names + min(names, NARROW) + 2 > console.width:
        return False
    ruled = Table(box=box.SIMPLE_HEAD, header_style="bold")
    lines = [line.ljust(len(dashes)) for line in (head, *rows[:-1])]
    for i, (start, stop) in enumerate(spans):
        cells = [line[start:stop] for line in lines]
        side: Any = "right" if all(c == c.strip().rjust(stop - start) for c in cells) else "left"
        style, folds = ("cyan", False) if i == 0 else (None, True)
        ruled.add_column(
            cells[0].strip(), justify=side, style=style, no_wrap=folds, overflow="fold"
        )
    for line in lines[1:]:
        # Names may have brackets, which are no markup.
        ruled.add_row(*(_plain(line[start:stop]) for start, stop in spans))
    console.print(ruled)
    return True


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text.strip())


class Bar:
    """How far a merge is, on stderr; nothing at all where no person sees it."""

    def __init__(self, bar: Any = None):
        self._bar = bar
        self._task = bar and bar.add_task("merging", total=None, tensor="")

    def bytes(self, done: int, total: int) -> None:
        """So many bytes are written."""
        if self._bar:
            self._bar.update(self._task, completed=done, total=total)

    def tensor(self, name: str, number: int, of: int) -> None:
        """This tensor is merged next."""
        if self._bar:
            self._bar.update(self._task, tensor=f"{number}/{of} {name}")


@contextlib.contextmanager
def merging() -> Generator[Bar, None, None]:
    """A bar that is gone when the work is done."""
    # In a log the bar would be a line a step.
    if not sys.stderr.isatty():
        yield Bar()
        return
    # Only where a bar is drawn.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    # Names are cut, not folded: a second line would make the bar jump.
    name = TextColumn(
        "{task.fields[tensor]}",
        markup=False,
        table_column=Column(no_wrap=True, overflow="ellipsis"),
    )
    columns: Iterable[str | ProgressColumn] = (
        "{task.description}", BarColumn(20), DownloadColumn(), TimeRemainingColumn(), name,
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield Bar(bar)
