"""Several PEFT folders of one base: their weighted sum as another one, and what two differ in."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax._adapters import DoRA, LoRA
from lora_jax._algebra import combine, resize
from lora_jax._cli_merge import replacing
from lora_jax._compare import Comparison, compare
from lora_jax._errors import LoRAError, raise_all
from lora_jax._peft_export import Export
from lora_jax._peft_layers import PREFIX
from lora_jax._peft_map import Entry, TorchMapping
from lora_jax._peft_parts import Experts, Update
from lora_jax._peft_save import write_folder
from lora_jax._soups import dare, knots, ties
from lora_jax._torch_tree import TorchAdapter, expert_names, norm, open_torch


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
) -> dict[str, int]:
    """Writes Σ wₖ·Δₖ of PEFT folders, or a soup of them, as one, without the base model.

    Args:
      out: a new folder.
      folders: of adapters of one base; what one of them does not adapt is zero in it.
      weights: one for each.
      rank, energy: as in `lora.resize`; None for the exact sum, whose ranks are the sums.
      method: "sum", "ties", "dare" or "knots"; see `lora.ties` and the others.
      density: the share of elements that stays; None for the method's default.
      seed: of what "dare" drops.
      uniform: one rank and alpha for all, as vLLM reads no patterns.
      dtype: of the tensors; None for fp32.
      ignore: settings of the configurations to pass over.

    Returns:
      {torch parameter: rank}.

    Raises:
      LoRAError: `out` exists, or something cannot be combined; all of that is listed.
    """
    adapters = [open_torch(folder, ignore) for folder in folders]
    raise_all("these adapters cannot be combined:", _unfit(adapters))
    trees = [a.low_rank() for a in adapters]
    mixed = _mixed(trees, weights, method, density, seed, {"rank": rank, "energy": energy})
    entries = {n: entry for a in reversed(adapters) for n, (entry, _) in a.parts.items()}
    nodes, mapping = _named_as_peft(mixed, entries, adapters)
    export = Export(nodes, mapping, True)
    export.run(uniform)
    settings = export.config(_shared(adapters, "base_model_name_or_path"), None)
    settings |= {k: _shared(adapters, k) for k in ("task_type", "revision")}
    settings["fan_in_fan_out"] = all(a.config.fan_in_fan_out for a in adapters)
    settings["ensure_weight_tying"] = adapters[0].config.tying
    modules = settings["target_modules"]
    if isinstance(modules, list) and not all("." in m for m in modules):
        settings["target_modules"] = "|".join(map(re.escape, modules))  # no other "….lin" is meant
    raise_all("the sum cannot be written for PEFT:", export.failures)
    tensors = {PREFIX + k: v for k, v in export.tensors.items()}
    tensors |= {t.key: a.file.read(t.key) for a in adapters for t in a.parsed.tables}
    low = lambda x: x if dtype is None else x.astype(dtype)
    tensors = {k: np.ascontiguousarray(low(v)) for k, v in tensors.items()}
    with replacing(Path(out)) as new:
        write_folder(new, tensors, settings)
    return {name: node.rank for name, node in nodes.items()}


def _mixed(trees, weights, method, density, seed, kept) -> dict[str, Any]:
    share = {} if density is None else {"density": density}
    if method == "ties":
        return ties(trees, weights, **share, **kept)[0]
    if method == "dare":
        rate = {} if density is None else {"rate": 1 - density}
        return dare(jax.random.key(seed), trees, weights, **rate, **kept)[0]
    mixed = knots(trees, weights, **share) if method == "knots" else combine(trees, weights)
    return mixed if set(kept.values()) == {None} else resize(mixed, **kept)


def _unfit(adapters: Sequence[TorchAdapter]) -> list[str]:
    """What cannot be combined without the base, or at all."""
    lines = []
    for a in adapters:
        lines += [f"{a.file.folder}: {line}" for line in a.unclear]
        if a.config.dora:
            lines.append(
                f"{a.file.folder}: is a DoRA, whose change is no sum of updates and depends on the "
                "base; merge it (lora-jax merge), and take lora.extract of what was merged"
            )
        for name, (entry, what) in a.parts.items():
            if not isinstance(what, Update):
                how = "is saved in full" if entry.kind == "value" else "has new rows"
                lines.append(
                    f"{a.file.folder}: '{name}' {how}; its change is known beside the base alone, "
                    "lora.combine(adapters, weights, base=params)"
                )
        if a.parsed.experts and (a.config.version or (0,)) < (0, 19, 1):
            lines.append(
                f"{a.file.folder}: adapters of experts lie otherwise before PEFT 0.19.1; load and "
                "save it in a newer PEFT"
            )
        if a.config.tying != adapters[0].config.tying:
            lines.append(f"{a.file.folder}: another ensure_weight_tying than the first")
    groups: dict[str, set] = {}
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
    return lines


def _named_as_peft(mixed: Mapping[str, Any], entries: Mapping[str, Entry], adapters):
    """The nodes and their mapping, with parameters of experts in their order, innermost first.

    Which of them is which is not known, and need not be: the file holds them by their depth.
    """
    groups: dict[str, Experts] = {g.module: g for a in adapters for g in a.parsed.experts}
    names = {n: n for n in mixed}
    for g in groups.values():
        inner_first = reversed(expert_names(g))
        names |= {n: f"{g.module}.{p}" for n, p in zip(inner_first, sorted(g.parameters))}
    order = sorted(mixed, key=lambda n: names[n])
    found = {}
    for n in order:
        (block,) = entries[n].blocks
        leaf = dataclasses.replace(block.leaf, path=names[n])
        block = dataclasses.replace(block, leaf=leaf)
        found[names[n]] = dataclasses.replace(entries[n], name=names[n], blocks=(block,))
    return {names[n]: mixed[n] for n in order}, TorchMapping(found)


def _shared(adapters: Sequence[TorchAdapter], name: str) -> Any:
    """A setting that all have, or None."""
    found = [a.file.config.get(name) for a in adapters]
    return found[0] if all(x == found[0] for x in found) else None


# Settings that say how a file was written; that choose modules, as the tensors show; and what the
# others are if they are absent.
NOT_COMPARED = ("auto_mapping", "peft_version", "inference_mode", "fan_in_fan_out")
CHOOSING = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save",
            "layers_to_transform", "layers_pattern", "trainable_token_indices")  # fmt: skip
DEFAULTS = {
    "bias": "none",
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "megatron_core": "megatron.core",
    "peft_type": "LORA",
    "qalora_group_size": 16,
}


@dataclasses.dataclass(frozen=True)
class Difference:
    """Two PEFT folders beside each other. Print it.

    Attributes:
      updates: the `Comparison` of the low-rank updates.
      distances: {torch parameter: what the two differ by} of what both have: of updates
        ‖Δ₁ − Δ₂‖ / max(‖Δ₁‖, ‖Δ₂‖), of the rest the largest difference of an element.
      first, second: parameters that are in one alone.
      config: {setting: (first, second)} of the settings that differ. Those that choose modules may
        say the same in other words; `equal` looks at the parameters instead.
      tolerance: what distance counts as none.
    """

    updates: Comparison
    distances: Mapping[str, float]
    first: tuple[str, ...]
    second: tuple[str, ...]
    config: Mapping[str, tuple[Any, Any]]
    tolerance: float

    @property
    def equal(self) -> bool:
        near = all(d <= self.tolerance for d in self.distances.values())
        return near and not (self.first or self.second or self.config.keys() - {*CHOOSING})

    def __str__(self):
        bare = dataclasses.replace(self.updates, first=(), second=())
        lines = [str(bare)] if self.updates.leaves else []
        if self.equal:
            lines = [f"equal: {len(self.distances)} parameters"]
        rest = {n: d for n, d in self.distances.items() if n not in self.updates.leaves}
        lines += [f"{n}: differs by up to {d:.4g}" for n, d in rest.items() if d > self.tolerance]
        for name, paths in (("first", self.first), ("second", self.second)):
            lines += [f"in the {name} alone: {', '.join(paths)}"] if paths else []
        lines += [f"config: {k}: {a!r} and {b!r}" for k, (a, b) in self.config.items()]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        likeness = {
            n: jax.tree.map(lambda x: x.tolist(), dataclasses.asdict(leaf))
            for n, leaf in self.updates.leaves.items()
        }
        finite = {n: d if np.isfinite(d) else None for n, d in self.distances.items()}
        rest = {"first": self.first, "second": self.second, "config": self.config}
        return {"equal": self.equal, "distances": finite, "updates": likeness, **rest}


def diff_folders(
    first: str | os.PathLike,
    second: str | os.PathLike,
    *,
    tolerance: float = 0.0,
    ignore: Sequence[str] = (),
) -> Difference:
    """What two PEFT folders of one base differ in; the base is not needed.

    Settings that are absent, null, false, empty or PEFT's default are one, and lists of names are
    sets; what PEFT notes about the writing is not compared.

    Args:
      first, second: the folders.
      tolerance: up to which distance two parameters are equal; see `Difference`.
      ignore: settings of the configurations to pass over.

    Raises:
      LoRAError: one of them cannot be read, or they are of different bases.
    """
    one, two = (open_torch(folder, ignore) for folder in (first, second))
    trees = [a.low_rank() for a in (one, two)]
    both = [n for n in one.parts if n in two.parts]
    common = [{n: t[n] for n in both if n in trees[0] and n in trees[1]} for t in trees]
    plain = [{n: x for n, x in t.items() if isinstance(x, LoRA)} for t in common]
    likeness = compare(*plain) if plain[0] and plain[1] else Comparison({}, (), ())
    distances = {n: _distance(one, two, n, common) for n in both}
    settings = [_settings(a) for a in (one, two)]
    keys = sorted((settings[0].keys() | settings[1].keys()) - {*ignore})
    pairs = {k: tuple(s.get(k) for s in settings) for k in keys}
    return Difference(
        likeness,
        distances,
        tuple(n for n in one.parts if n not in two.parts),
        tuple(n for n in two.parts if n not in one.parts),
        {k: pair for k, pair in pairs.items() if pair[0] != pair[1]},
        tolerance,
    )


def _settings(adapter: TorchAdapter) -> dict[str, Any]:
    """The settings that say something, lists of names sorted."""
    found = {k: v for k, v in adapter.file.config.items() if k not in NOT_COMPARED}
    return {
        k: sorted(v) if isinstance(v, list) and all(isinstance(x, str) for x in v) else v
        for k, v in found.items()
        if v is not False and v not in (None, [], {}, "") and v != DEFAULTS.get(k)
    }


def _distance(one: TorchAdapter, two: TorchAdapter, name: str, common) -> float:
    if name in common[0]:
        return _apart(name, *(tree[name] for tree in common))
    (entry, a), (other, b) = one.parts[name], two.parts[name]
    if entry.kind != other.kind or getattr(a, "index", ()) != getattr(b, "index", ()):
        return float("inf")
    keys = one.keys(name), two.keys(name)
    arrays = [[f.file.read(k).astype(np.float64) for k in ks] for f, ks in zip((one, two), keys)]
    if [x.shape for x in arrays[0]] != [x.shape for x in arrays[1]]:
        raise LoRAError(f"'{name}' has another shape in each; compare adapters of one base")
    return max(float(np.abs(x - y).max(initial=0)) for x, y in zip(*arrays))


def _apart(name: str, one: LoRA | DoRA, two: LoRA | DoRA) -> float:
    """What two updates differ by; of a DoRA also its magnitudes, ‖m₁ − m₂‖ / max(‖m₁‖, ‖m₂‖)."""
    if type(one) is not type(two):
        return float("inf")
    if (one.shape, one.geometry) != (two.shape, two.geometry):
        raise LoRAError(f"'{name}' has another shape in each; compare adapters of one base")
    if isinstance(one, LoRA):
        return _between(one, two)
    m, n = (np.asarray(x.magnitude, np.float64) for x in (one, two))
    size = max(np.linalg.norm(m), np.linalg.norm(n))
    plain = (LoRA(x.a, x.b, x.scale, x.geometry) for x in (one, two))
    return max(_between(*plain), float(np.linalg.norm(m - n) / size) if size else 0.0)


def _between(one: Any, two: Any) -> float:
    """‖Δ₁ − Δ₂‖ / max(‖Δ₁‖, ‖Δ₂‖) from the factors; 0 where these are equal."""
    a, b = np.asarray(one.a), np.asarray(one.b)
    if one.scale == two.scale and np.array_equal(a, two.a) and np.array_equal(b, two.b):
        return 0.0
    pair = [n.b * np.float32(sign * n.scale) for n, sign in ((one, 1), (two, -1))]
    between = dataclasses.replace(
        one,
        a=np.concatenate([a, np.asarray(two.a)], -1),
        b=np.concatenate(pair, len(one.geometry.batch_axes)),
        scale=1.0,
    )
    size = max(norm(one), norm(two))
    return norm(between) / size if size else 0.0
