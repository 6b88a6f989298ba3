"""A base model on disk and a PEFT adapter, merged tensor by tensor into a new base model."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax._cli.torch_adapter import TorchAdapter, open_torch
from lora_jax._cli.torch_base import on_base
from lora_jax._core.errors import raise_all
from lora_jax._core.numbers import unequal
from lora_jax._merge import merge
from lora_jax.peft._file import DTYPES
from lora_jax.peft._parts import NewRows
from lora_jax.peft._safetensors import Base, open_base, tied_tables, write_copy


def merge_files(
    base: str | os.PathLike,
    adapter: str | os.PathLike,
    out: str | os.PathLike,
    *,
    keep_base: bool = False,
    ignore: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    starts: Callable[[str, int, int], None] = lambda name, number, of: None,
    **places: Any,
) -> tuple[TorchAdapter, list[Path]]:
    """Writes the base with the adapter's changes in it, one tensor at a time.

    Each sum is made in fp32 and rounded once to the base's type; what the adapter does not touch is
    copied byte for byte. `out` appears when it is complete, or not at all.

    Args:
      progress: is told (bytes written, bytes in all).
      starts: is told (tensor that is merged next, its number, how many there are).
      places: `conv1d`, `experts`, `experts_a` and `mapping` of `on_base`.

    Returns:
      (the adapter as it was placed, files of the base that were left out).
    """
    model = open_base(base)
    opened = open_torch(adapter, ignore, rename)
    placed = on_base(opened, model.shapes, tied=tied_tables(model), **places)
    # All that can fail has failed by here; from now on a tensor at a time is read, and written.
    _check(placed, model, keep_base)
    # {tensor: old value to new}; each is called when the copy comes to its place.
    numbers = itertools.count(1)

    def merged(name: str, value: np.ndarray) -> np.ndarray:
        starts(name, next(numbers), len(placed.parts))
        return merge({name: value}, {name: placed.node(name, value)})[name]

    changed = {n: functools.partial(merged, n) for n in placed.parts}
    return placed, write_copy(model, out, changed, progress)


def _check(placed: TorchAdapter, base: Base, keep_base: bool) -> None:
    """What would fail on the way fails before anything is written."""
    failures = [
        f"'{n}' is {base.tensors[n].type}, expected one of {', '.join(DTYPES)}; a quantised base "
        "cannot be merged into, take the one that it was made from"
        for n in placed.parts
        if base.tensors[n].type not in DTYPES
    ]
    read = placed.file.read
    failures += placed.parsed.unequal(placed.file)
    for name, (_, what) in placed.parts.items():
        # PEFT changes tied tables together, and a file of safetensors does not say that they are.
        failures += _copies(base, name) if isinstance(what, NewRows) else []
    names = {entry.name: n for n, (entry, _) in placed.parts.items()}
    # Read only where nothing else is wrong: tables are large.
    for table in () if keep_base or failures else placed.parsed.tables:
        name = names.get(table.name)
        if name is None:
            failures.append(f"'{table.key}' is a table of the base that is not adapted")
            continue
        own, stored = base.tensors[name].read(), read(table.key)
        if own.shape != stored.shape:
            differ = f"is of {stored.shape}, and '{name}' of the base of {own.shape}"
        elif rows := int(unequal(own, stored.astype(own.dtype)).any(-1).sum()):
            differ = f"{rows} rows differ from '{name}' of the base"
        else:
            continue
        failures.append(
            f"'{table.key}': {differ}; take the base that the adapter was trained on, or "
            "--keep-base"
        )
    raise_all(f"{placed.file.folder}: cannot be merged into {base.path}:", failures)


def _copies(base: Base, table: str) -> list[str]:
    """Other tensors that hold the values of a table of which rows change."""
    own, found = base.tensors[table], []
    for name, t in base.tensors.items():
        alike = name != table and (t.type, t.shape) == (own.type, own.shape)
        if alike and np.array_equal(t.read(), own.read()):
            found.append(
                f"'{name}' holds the values of '{table}', of which the adapter has new rows: if "
                "they are tied, PEFT changes both; leave it out of the base"
            )
    return found
