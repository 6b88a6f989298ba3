"""Which part of which leaf each tensor of a base model is: all of both, or an error.

The leaf of a tensor is found as that of an adapter's is, by `Finder`.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core.errors import raise_all
from lora_jax._core.nnx import state_of
from lora_jax._core.paths import flatten, nearest
from lora_jax._survey import Survey
from lora_jax._targets import Targets
from lora_jax.peft._blocks import Block, LeafInfo, to_leaf
from lora_jax.peft._file import DTYPES, Stored
from lora_jax.peft._find import Finder
from lora_jax.peft._mapping import TABLE, Entry, TorchMapping, as_table, leaf_infos
from lora_jax.peft._names import is_head
from lora_jax.peft._orders import Orders
from lora_jax.peft._safetensors import Base, called, tied_tables

# Failures of each side that are shown first.
EACH = 10

# What a base does not store that ties it to its table.
HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Piece:
    """One of the blocks of a tensor."""

    entry: Entry
    place: int
    tensor: Stored

    @property
    def block(self) -> Block:
        return self.entry.blocks[self.place]

    def value(self, into: np.ndarray | None = None) -> np.ndarray:
        """What the block holds, in the block's shape, a view of the tensor; see `Stored.read`."""
        tensor = self.tensor.read(into)
        return to_leaf(tensor, self.entry.layout, self.entry.blocks)[self.place]


@dataclasses.dataclass(frozen=True)
class Placed:
    """A base model and the leaves of a tree, which fit each other.

    Attributes:
      entries: {tensor: its place}; a head that is a copy of a table has the table's.
      pieces: {leaf: what fills it}, each part once.
      tied: (leaf of a head that the base does not store, tensor of the table that it is).
    """

    base: Base
    entries: Mapping[str, Entry]
    pieces: Mapping[str, Sequence[Piece]]
    tied: tuple[Entry, str] | None = None


def placed(
    base: Base,
    params: Any,
    survey: Survey | Targets | None,
    *,
    mapping: Mapping[str, Any] | TorchMapping | None = None,
    conv1d: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    call: str = "lora.peft.load_base",
) -> Placed:
    """Finds the place of every tensor of a base, for `lora.peft.load_base` or the other `call`; its
    errors of places are raised here."""
    infos = leaf_infos(params, survey)
    leaves = flatten(state_of(params))
    # No tensor is a leaf of integers, such as a counter.
    finder = Finder({p: x for p, x in infos.items() if is_float(leaves[p])}, as_table(mapping))
    if isinstance(mapping, TorchMapping):
        # Its names are the base's own.
        rename = None
    tensors = called(base.tensors, ignore, rename, base.path)
    placing = _Placing(base, finder, conv1d, tensors, call)
    for name in placing.tensors:
        placing.tensor(name)
    placing.heads()
    unfilled = [
        f"leaf '{path}' {x.dtype}: not floating-point, and a shape alone; pass its value, or of an "
        "NNX module the parameters: graph, params, rest = nnx.split(model, nnx.Param, ...)"
        for path, x in leaves.items()
        if isinstance(x, jax.ShapeDtypeStruct) and not is_float(x)
    ]
    return placing.placed(unfilled)


def is_float(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


class _Placing:
    def __init__(
        self,
        base: Base,
        finder: Finder,
        conv1d: Sequence[str] | None,
        tensors: Mapping[str, tuple[str, Stored]],
        call: str,
    ):
        self.base, self.finder, self.tensors, self.call = base, finder, tensors, call
        self.orders = Orders({n: t.shape for n, (_, t) in tensors.items()}, conv1d)
        self.entries: dict[str, Entry] = {}  # by the name in the file, as `Placed`'s
        self.pieces: dict[str, list[Piece]] = {path: [] for path in finder.leaves}
        self.homeless: dict[str, str] = {}  # heads without a leaf, and what the finder says of them
        self.wrong: list[str] = []

    def find(self, name: str, tensor: Stored) -> Entry | None:
        return self.finder.value(name, tensor.shape, self.orders.in_out(name))

    def tensor(self, name: str) -> None:
        own, tensor = self.tensors[name]
        if tensor.type not in DTYPES:
            self.finder.failures.append(
                f"'{own}' {tensor.shape} is {tensor.type}, expected one of {', '.join(DTYPES)}"
            )
            return
        entry = self.find(name, tensor)
        if entry is not None:
            self.add(dataclasses.replace(entry, name=own), tensor)
        # Where the model ties it: when all tables have their place.
        elif is_head(name):
            self.homeless[name] = self.finder.failures.pop()

    def add(self, entry: Entry, tensor: Stored) -> None:
        self.entries[entry.name] = entry
        for i, b in enumerate(entry.blocks):
            # A tied leaf is filled by the first of its two tensors, and the second has to be equal.
            first = next(iter(self.pieces[b.leaf.path]), None)
            if not (b.leaf.tied and first and first.block == b):
                self.pieces[b.leaf.path].append(Piece(entry, i, tensor))
            elif not _same(first.tensor, tensor):
                table, head = sorted((first.entry.name, entry.name), key=is_head)
                self.wrong.append(_untied(table, head, b.leaf.path))

    def heads(self) -> None:
        """A head that has no leaf is to be a copy of the table that it is tied to."""
        for name, failure in self.homeless.items():
            own, head = self.tensors[name]
            tables = [
                n
                for n, entry in self.entries.items()
                if entry.shape == head.shape and len(head.shape) == 2 and not is_head(n)
                if len(entry.blocks) == 1
            ]
            # By the numbers: config.json may say nothing of it.
            copy = next((n for n in tables if _same(self.base.tensors[n], head)), None)
            if copy is not None:
                self.entries[own] = dataclasses.replace(self.entries[copy], name=own)
            elif tables:
                path = self.entries[tables[0]].blocks[0].leaf.path
                self.wrong.append(_untied(tables[0], own, path))
            else:
                self.finder.failures.append(failure)

    def head_of_table(self) -> tuple[Entry, str] | None:
        """The leaf of a head that the base does not store, as it is a table's copy."""
        # Not one that the caller leaves out: its head is left out with it.
        kept = {own for own, _ in self.tensors.values()}
        tables = [name for name in tied_tables(self.base) if name in kept]
        if len(tables) != 1 or any(is_head(n) for n in self.tensors):
            return None
        before = len(self.finder.failures)
        entry = self.find(HEAD, self.base.tensors[tables[0]])
        # That the base has this head is a guess: if it is wrong, nothing was asked.
        del self.finder.failures[before:]
        if entry is None or any(self.pieces[b.leaf.path] for b in entry.blocks):
            return None
        for i, b in enumerate(entry.blocks):
            self.pieces[b.leaf.path].append(Piece(entry, i, self.base.tensors[tables[0]]))
        return entry, tables[0]

    def placed(self, unfilled: list[str]) -> Placed:
        tied = self.head_of_table()
        for path, pieces in self.pieces.items():
            unfilled += self._covered(self.finder.leaves[path], pieces)
        unused = self.finder.failures
        fixes = [f"say which leaf a tensor is: {TABLE}"] * bool(unused)
        if unused:
            # By its name in the file, as `ignore` looks at names before `rename`.
            name = next((own for own, _ in self.tensors.values() if own not in self.entries), "")
            fixes.append(f"or leave tensors out: {self.call}(..., ignore=[r'{re.escape(name)}'])")
        elif unfilled:
            fixes.append("leave leaves that the folder does not have out of `params`")
        # Some of each: a tensor without a leaf and a leaf without a tensor often belong together.
        sides = [*self.wrong, *unused[:EACH], *unfilled[:EACH], *unused[EACH:], *unfilled[EACH:]]
        raise_all(
            f"{self.base.path} and these parameters do not fit each other:",
            sides,
            ", ".join(fixes),
        )
        return Placed(self.base, self.entries, self.pieces, tied)

    def _covered(self, leaf: LeafInfo, pieces: Sequence[Piece]) -> Iterator[str]:
        """Parts of a leaf that no tensor is, or two."""
        if not pieces:
            near = nearest(leaf.path.replace("/", "."), self.tensors, 2)
            yield f"leaf '{leaf.path}' {leaf.shape}: no tensor is it; nearest: {', '.join(near)}"
            return
        # Cells between all ends of blocks along each axis, each of which is to be filled once.
        ranges = [[s.indices(n)[:2] for s, n in zip(p.block.slices, leaf.shape)] for p in pieces]
        cuts = [sorted({0, n, *itertools.chain(*on)}) for n, on in zip(leaf.shape, zip(*ranges))]
        count = np.zeros([len(c) - 1 for c in cuts], int)
        for each in ranges:
            at = tuple(
                slice(bisect.bisect_left(c, start), bisect.bisect_left(c, stop))
                for c, (start, stop) in zip(cuts, each)
            )
            if (count[at] > 0).any():
                others = [p.entry.name for p, r in zip(pieces, ranges) if _overlap(r, each)]
                yield f"leaf '{leaf.path}': {' and '.join(others[:3])} fall on the same part of it"
                return
            count[at] += 1
        if (count == 0).any():
            cell = np.argwhere(count == 0)[0]
            # The first empty cell, as a block.
            part = tuple(
                None if len(c) == 2 else int(c[i]) if c[i + 1] - c[i] == 1 else (c[i], c[i + 1])
                for i, c in zip(cell, cuts)
            )
            yield (
                f"leaf '{leaf.path}' {leaf.shape}: no tensor is {Block(leaf, part)}, one of "
                f"{int((count == 0).sum())} parts of it that are not filled"
            )


def _overlap(one: Sequence[tuple[int, int]], two: Sequence[tuple[int, int]]) -> bool:
    return all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(one, two))


def _same(one: Stored, two: Stored) -> bool:
    """Whether two tensors hold the same numbers."""
    if one.shape != two.shape:
        return False
    a, b = one.read(), two.read()
    if one.dtype != two.dtype:
        # fp32 holds both.
        a, b = a.astype(np.float32), b.astype(np.float32)
    return np.array_equal(a, b)


def _untied(table: str, head: str, path: str) -> str:
    return (
        f"'{head}' differs from '{table}', but the model has one leaf for both, '{path}': the base "
        "is untied and the model tied, whose outputs would be others; give the model a head of its "
        "own"
    )
