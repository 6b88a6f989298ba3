"""What a person at a terminal sees: tables with rules, and a bar. Elsewhere all is plain text."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Generator, Iterable
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
    """Prints a table with rules, its names folded if need be, and what all rows have in common said
    once below it; False if it is none, or too wide even so."""
    head, dashes, *rows = (*block.split("\n"), "")
    spans = [m.span() for m in re.finditer("-+", dashes)]
    if not re.fullmatch("-+(  -+)*", dashes):
        return False
    # Only where a table is drawn.
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    lines = [line.ljust(len(dashes)) for line in (head, *rows[:-1])]
    columns = [[line[start:stop] for line in lines] for start, stop in spans]
    # Spaces: three characters a column, and one at the edge.
    needs = lambda of: min(len(of[0][0]), NARROW) + sum(len(c[0]) + 3 for c in of[1:]) + 4
    alike = []
    if needs(columns) > console.width and len(lines) > 2:
        alike = [c for c in columns[1:] if len({*c[1:]}) == 1]
        columns = [c for c in columns if c not in alike]
    if needs(columns) > console.width:
        return False
    ruled = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for i, cells in enumerate(columns):
        side: Any = "right" if all(c == c.strip().rjust(len(c)) for c in cells) else "left"
        style, folds = ("cyan", False) if i == 0 else (None, True)
        ruled.add_column(
            cells[0].strip(), justify=side, style=style, no_wrap=folds, overflow="fold"
        )
    # Names may have brackets, which are no markup.
    for row in zip(*(c[1:] for c in columns)):
        ruled.add_row(*map(_plain, row))
    console.print(ruled)
    if alike:
        echo("each: " + ", ".join(f"{c[0].strip()} {c[1].strip()}" for c in alike))
    return True


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text.strip())


@contextlib.contextmanager
def merging() -> Generator[tuple[Callable, Callable], None, None]:
    """A bar on stderr that is gone when the work is done: `progress` and `starts` of `merge_files`,
    which do nothing where no person sees it."""
    # In a log the bar would be a line a step.
    if not sys.stderr.isatty():
        yield (nothing := lambda *_: None), nothing
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
        task = bar.add_task("merging", total=None, tensor="")
        yield (
            lambda done, total: bar.update(task, completed=done, total=total),
            lambda name, number, of: bar.update(task, tensor=f"{number}/{of} {name}"),
        )
