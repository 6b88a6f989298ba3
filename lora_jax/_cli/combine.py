"""Several PEFT folders of one base: their weighted sum as another one, and what two differ in."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax._cli.torch_adapter import TorchAdapter, expert_names, expert_ways, open_torch
from lora_jax._core.errors import raise_all
from lora_jax.algebra._combine import combine, resize
from lora_jax.algebra._soups import dare, knots, ties
from lora_jax.peft._export import Export
from lora_jax.peft._files import replacing
from lora_jax.peft._keys import PREFIX
from lora_jax.peft._mapping import Entry, TorchMapping
from lora_jax.peft._parts import Update
from lora_jax.peft._save import write_folder
from lora_jax.peft._settings import unknown

# {module of experts: (names by depth, orders of its parameters that all adapters allow)}, all of
# them from the outermost in.
Orders = dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]]


def combine_folders(
    out: str | os.PathLike,
    folders: Sequence[str | os.PathLike],
    weights: Sequence[float],
    *,
    rank: int | None = None,
    energy: float | None = None,
    method: str = "sum",
    density: float | None = None,
    seed: int = 0,
    uniform: bool = False,
    dtype: Any = None,
    ignore: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Writes Σ wₖ·Δₖ of PEFT folders, or a soup of them, as one, without the base model.

    What an adapter lacks is zero in it. The other arguments are those of the command.

    Returns:
      {torch parameter: rank}.

    Raises:
      LoRAError: `out` exists, or something cannot be combined; all of that is listed.
    """
    odd = [f"{f}: its weight is {w}" for f, w in zip(folders, weights) if not math.isfinite(w)]
    raise_all("the weights are to be finite, as in ADAPTER:0.5:", odd)
    adapters = [open_torch(folder, ignore, rename) for folder in folders]
    orders = _orders(adapters)
    raise_all("these adapters cannot be combined:", _unfit(adapters, orders))
    # Torch names are the leaves: flat trees of LoRA nodes, for the functions of `algebra`.
    trees = [a.low_rank() for a in adapters]
    mixed = _mixed(trees, weights, method, density, seed, {"rank": rank, "energy": energy})
    # Reversed, so that the first adapter that has a parameter says where it lies.
    entries = {n: entry for a in reversed(adapters) for n, (entry, _) in a.parts.items()}
    # One that several orders fit is any of them, unless PEFT has to be told which rank is whose.
    kinds = lambda names: {(mixed[n].rank, mixed[n].scale) for n in names}
    unknown_ranks = [
        f"'{module}': the adapters do not say which of its tensors are whose, and their ranks in "
        "the sum differ: --uniform"
        for module, (names, ways) in orders.items()
        if len(ways) > 1 and len(kinds(names)) > 1 and not uniform
    ]
    raise_all("the sum cannot be written for PEFT:", unknown_ranks)
    nodes, mapping = _named_as_peft(mixed, entries, orders)
    # Nodes to tensors, failures and settings, as `lora.peft.save` does it.
    export = Export(nodes, mapping, True)
    export.run(uniform)
    settings = export.config(_shared(adapters, "base_model_name_or_path"), None)
    settings |= {k: _shared(adapters, k) for k in ("task_type", "revision")}
    settings["fan_in_fan_out"] = all(a.config.fan_in_fan_out for a in adapters)
    settings["ensure_weight_tying"] = adapters[0].config.tying
    # PEFT takes the names of a list as endings. A text is a whole regular expression, in which no
    # other "….lin" is meant.
    modules = settings["target_modules"]
    if isinstance(modules, list) and not all("." in m for m in modules):
        settings["target_modules"] = "|".join(map(re.escape, modules))
    raise_all("the sum cannot be written for PEFT:", export.failures)
    tensors = {PREFIX + k: v for k, v in export.tensors.items()}
    # Tables of the base beside adapted embeddings: `_unfit` has found them to be equal.
    tensors |= {t.key: a.file.read(t.key) for a in adapters for t in a.parsed.tables}
    # Settings that the library does not know are kept where all agree on them.
    names = {k for a in adapters for k in unknown(a.file.config)}
    more = {k: _shared(adapters, k) for k in names}
    with replacing(Path(out)) as new:
        write_folder(new, tensors, settings, dtype=dtype or np.float32, more=more)
    return {name: node.rank for name, node in nodes.items()}


def _mixed(
    trees: Sequence[Mapping[str, Any]],
    weights: Sequence[float],
    method: str,
    density: float | None,
    seed: int,
    kept: Mapping[str, Any],
) -> dict[str, Any]:
    share: dict[str, Any] = {} if density is None else {"density": density}
    # These two give back the rank that is asked for; the others are exact, and are cut after it.
    if method == "ties":
        return ties(trees, weights, **share, **kept)[0]
    if method == "dare":
        rate: dict[str, Any] = {} if density is None else {"rate": 1 - density}
        return dare(jax.random.key(seed), trees, weights, **rate, **kept)[0]
    mixed = knots(trees, weights, **share) if method == "knots" else combine(trees, weights)
    return mixed if set(kept.values()) == {None} else resize(mixed, **kept)


def _unfit(adapters: Sequence[TorchAdapter], orders: Orders) -> list[str]:
    """What cannot be combined without the base, or at all."""
    lines = []
    for a in adapters:
        lines += [f"{a.file.folder}: {line}" for line in a.unclear]
        if a.config.dora:
            lines.append(
                f"{a.file.folder}: is a DoRA, whose change is no sum of updates and depends on the "
                "base; merge it (lora-jax merge), and in Python take lora.algebra.extract of both"
            )
        for name, (entry, what) in a.parts.items():
            if not isinstance(what, Update):
                how = "is saved in full" if entry.kind == "value" else "has new rows"
                lines.append(
                    f"{a.file.folder}: '{name}' {how}; its change is known beside the base alone: "
                    "in Python, lora.algebra.combine(adapters, weights, base=params)"
                )
        # Up to 0.19.0 lora_A runs along another axis of the experts' weights.
        if a.parsed.experts and (a.config.version or (0,)) < (0, 19, 1):
            lines.append(
                f"{a.file.folder}: adapters of experts lie otherwise before PEFT 0.19.1; load and "
                "save it in a newer PEFT"
            )
        if a.config.tying != adapters[0].config.tying:
            lines.append(f"{a.file.folder}: another ensure_weight_tying than the first")
    groups: dict[str, set] = {}
    # What must be the same in all: {module: sets of its adapted parameters}, {key: first table}.
    tables: dict[str, np.ndarray] = {}
    for a in adapters:
        for group in a.parsed.experts:
            groups.setdefault(group.module, set()).add(frozenset(group.parameters))
        for t in a.parsed.tables:
            table = a.file.read(t.key)
            if not np.array_equal(tables.setdefault(t.key, table), table):
                lines.append(f"{a.file.folder}: '{t.key}', the base's table, is another elsewhere")
    lines += [
        f"'{m}': each adapts other parameters of it: {', '.join(sorted(set().union(*found)))}"
        for m, found in groups.items()
        if len(found) > 1
    ]
    # Those that are unclear, or differ in their parameters, are named above.
    return lines or [
        f"'{m}': by their ranks its parameters stand in another order in each"
        for m, (_, ways) in orders.items()
        if not ways
    ]


def _named_as_peft(
    mixed: Mapping[str, Any], entries: Mapping[str, Entry], orders: Orders
) -> tuple[dict[str, Any], TorchMapping]:
    """The nodes and their mapping, with parameters of experts in their order, innermost first.

    Where ranks do not say which of them is which, it need not be known: the file holds them by
    their depth.
    """
    # {name by depth: module.parameter}, {name by depth: (module, depth)}.
    names, places = {n: n for n in mixed}, {n: (n, 0) for n in mixed}
    for module, (outer_first, ways) in orders.items():
        for depth, (n, p) in enumerate(reversed([*zip(outer_first, max(ways))])):
            names[n], places[n] = f"{module}.{p}", (module, depth)
    order = sorted(mixed, key=lambda n: places[n])
    found = {}
    for n in order:
        # Each torch parameter is a leaf of its own here, and so one block.
        (block,) = entries[n].blocks
        leaf = dataclasses.replace(block.leaf, path=names[n])
        block = dataclasses.replace(block, leaf=leaf)
        found[names[n]] = dataclasses.replace(entries[n], name=names[n], blocks=(block,))
    return {names[n]: mixed[n] for n in order}, TorchMapping(found)


def _orders(adapters: Sequence[TorchAdapter]) -> Orders:
    found: Orders = {}
    for group in (g for a in adapters for g in a.parsed.experts):
        own = [tuple(p for p, _ in way) for way in expert_ways(group)]
        names, known = found.get(group.module, (expert_names(group), own))
        found[group.module] = names, [o for o in known if o in own]
    return found


def _shared(adapters: Sequence[TorchAdapter], name: str) -> Any:
    """A setting that all have, or None."""
    found = [a.file.config.get(name) for a in adapters]
    return found[0] if all(x == found[0] for x in found) else None
