"""Paths that differ in numbers alone as one: layers/{0..23}/attn/q; and the order of numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

V = TypeVar("V", bound=Hashable)

# A part of a path that ends with a number: layers_3, layers3, 3.
NUMBERED = re.compile(r"(.*?)([0-9]+)")


@dataclasses.dataclass(frozen=True)
class Folded:
    """All paths of one choice for each part; the choices of a part differ in their number alone.

    >>> found = Folded((("layers",), ("0", "1", "2", "5"), ("q",)))
    >>> str(found), len(found), [*found][-1]
    ('layers/{0..2,5}/q', 4, 'layers/5/q')
    """

    parts: tuple[tuple[str, ...], ...]

    def __iter__(self) -> Iterator[str]:
        return map("/".join, itertools.product(*self.parts))

    def __len__(self) -> int:
        return math.prod(map(len, self.parts))

    def __str__(self) -> str:
        return "/".join(map(choice, self.parts))


def fold(rows: Mapping[str, V]) -> list[tuple[Folded, V]]:
    """{path: value} with the paths of equal values, that differ in numbers alone, as one.

    The paths of what comes out are those of `rows`, each once. Where a path has several numbers,
    the last is folded first, then what is alike after that.

    >>> rows = {"h/0/q": 4, "h/1/q": 4, "h/2/q": 8, "head": 4}
    >>> [(str(path), value) for path, value in fold(rows)]
    [('h/{0,1}/q', 4), ('h/2/q', 8), ('head', 4)]
    """
    found = [(tuple((s,) for s in p.split("/")), rows[p]) for p in natural(rows)]
    for i in reversed(range(max((len(parts) for parts, _ in found), default=0))):
        groups: dict[Hashable, tuple[list[str], tuple, V]] = {}
        for parts, value in found:
            own = parts[i] if i < len(parts) else ()
            # What has no number there is a group of its own: no two paths are the same.
            key = (parts[:i], *map(_stem, own), parts[i + 1 :], value)
            groups.setdefault(key, ([], parts, value))[0].extend(own)
        found = [
            ((*parts[:i], tuple(own), *parts[i + 1 :]) if own else parts, value)
            for own, parts, value in groups.values()
        ]
    return [(Folded(parts), value) for parts, value in found]


def natural(paths: Iterable[str]) -> list[str]:
    """Paths in their own order, but those that differ in numbers alone in that of the numbers.

    >>> natural(["h_0/w", "h_1/w", "h_10/w", "h_2/w", "a"])
    ['h_0/w', 'h_1/w', 'h_2/w', 'h_10/w', 'a']
    """
    return ["/".join(p) for p in _natural([tuple(p.split("/")) for p in paths])]


def _natural(paths: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    below: dict[str | None, list] = {}
    for path in paths:
        below.setdefault(path[0] if path else None, []).append(path[1:])
    alike: dict[Hashable, list] = {}
    for name in below:
        alike.setdefault(None if name is None else _stem(name), []).append(name)
    # Each name gives way to the one that is next among those like it.
    following = {stem: iter(sorted(names, key=_number)) for stem, names in alike.items()}
    order = [next(following[None if n is None else _stem(n)]) for n in below]
    return [
        path
        for name in order
        for path in ([()] if name is None else [(name, *p) for p in _natural(below[name])])
    ]


def folded(
    head: Sequence[str], *sections: Sequence[tuple], summed: str = ""
) -> tuple[tuple[str, ...], list[tuple]]:
    """Head and rows of a table whose first column is a path, folded within each section.

    Only rows that agree in all columns fold. Where any do, a second column counts the paths, and
    the column `summed` is of all of them together.
    """
    found = [x for rows in sections for x in fold({row[0]: row[1:] for row in rows})]
    if all(len(path) == 1 for path, _ in found):
        return tuple(head), [(str(path), *cells) for path, cells in found]
    rows = [
        (str(p), len(p), *(c * len(p) if n == summed else c for n, c in zip(head[1:], cells)))
        for p, cells in found
    ]
    return (head[0], "count", *head[1:]), rows


def _stem(name: str) -> Hashable:
    """What names that differ in their number alone share; the name itself where it has none."""
    if (found := NUMBERED.fullmatch(name)) is None:
        return name
    stem, digits = found.groups()
    # 01 is no 1: numbers with zeros before them are alike if they are of one length.
    return stem, len(digits) if digits[0] == "0" < digits else 0


def _number(name: str | None) -> int:
    found = NUMBERED.fullmatch(name or "")
    return int(found[2]) if found else 0


def choice(names: Sequence[str]) -> str:
    """["h_0", "h_1", "h_2", "h_5"] as "h_{0..2,5}", and one name as it is."""
    if len(names) == 1:
        return names[0]
    found = [m.groups() for name in names if (m := NUMBERED.fullmatch(name))]
    runs: list[list[str]] = []
    for _, digits in sorted(found, key=lambda x: int(x[1])):
        if runs and int(digits) == int(runs[-1][-1]) + 1:
            runs[-1].append(digits)
        else:
            runs.append([digits])
    text = ",".join(f"{r[0]}..{r[-1]}" if len(r) > 2 else ",".join(r) for r in runs)
    return f"{found[0][0]}{{{text}}}"
