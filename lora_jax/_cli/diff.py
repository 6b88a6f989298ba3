"""What two PEFT folders of one base differ in."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax._cli.terminal import one_line
from lora_jax._cli.torch_adapter import TorchAdapter, narrow, norm, open_torch
from lora_jax._core.errors import LoRAError
from lora_jax._nodes.adapters import DoRA, LoRA
from lora_jax.algebra._compare import Comparison, compare

# Settings that say how a file was written.
NOT_COMPARED = ("auto_mapping", "peft_version", "inference_mode", "fan_in_fan_out")

# Settings that choose modules, as the tensors show.
CHOOSING = (
    "target_modules target_parameters exclude_modules modules_to_save layers_to_transform "
    "layers_pattern trainable_token_indices"
).split()

# What the others are where they are absent.
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

    def blocks(self) -> list[str]:
        """A table, if there are updates, and the lines below it."""
        # What one has alone is said below, of all kinds of parameters.
        bare = dataclasses.replace(self.updates, first=(), second=())
        lines = [str(bare)] if self.updates.leaves else []
        if self.equal:
            lines = [f"equal: {len(self.distances)} parameters"]
        rest = {n: d for n, d in self.distances.items() if n not in self.updates.leaves}
        lines += [f"{n}: differs by up to {d:.4g}" for n, d in rest.items() if d > self.tolerance]
        for name, paths in (("first", self.first), ("second", self.second)):
            lines += [f"in the {name} alone: {', '.join(paths)}"] if paths else []
        settings = self.config.items()
        return lines + [one_line(f"config: {k}: {a!r} and {b!r}") for k, (a, b) in settings]

    def __str__(self):
        return "\n".join(self.blocks())

    def as_json(self) -> dict[str, Any]:
        likeness = {
            n: jax.tree.map(lambda x: x.tolist(), dataclasses.asdict(leaf))
            for n, leaf in self.updates.leaves.items()
        }
        # JSON has no infinity, which here means: of other kinds.
        finite = {n: d if np.isfinite(d) else None for n, d in self.distances.items()}
        rest = {"first": self.first, "second": self.second, "config": self.config}
        return {"equal": self.equal, "distances": finite, "updates": likeness, **rest}


def diff_folders(
    first: str | os.PathLike,
    second: str | os.PathLike,
    *,
    tolerance: float = 0.0,
    ignore: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
) -> Difference:
    """What two PEFT folders of one base differ in; the base is not needed.

    Settings that are absent, null, false, empty or PEFT's default are one, and lists of names are
    sets; what PEFT notes about the writing is not compared.

    Args:
      tolerance: up to which distance two parameters are equal; see `Difference`.
      ignore, rename: as in `inspect`.

    Raises:
      LoRAError: one of them cannot be read, or they are of different bases.
    """
    one, two = (
        open_torch(folder, (*ignore, "init_lora_weights"), rename) for folder in (first, second)
    )
    trees = [a.low_rank() for a in (one, two)]
    both = [n for n in one.parts if n in two.parts]
    # Low-rank in both; DoRA's have a distance, but no place in the comparison of updates.
    common = [{n: t[n] for n in both if n in trees[0] and n in trees[1]} for t in trees]
    plain = [{n: narrow(x) for n, x in t.items() if isinstance(x, LoRA)} for t in common]
    likeness = compare(*plain) if plain[0] and plain[1] else Comparison({}, (), ())
    distances = {n: _distance(one, two, n, common) for n in both}
    settings = [_settings(a) for a in (one, two)]
    keys = sorted((settings[0].keys() | settings[1].keys()) - {*ignore})
    pairs = {k: (settings[0].get(k), settings[1].get(k)) for k in keys}
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
        # Not `v not in (False, …)`: 0 would be equal to it, and is a setting.
        if v is not False and v not in (None, [], {}, "") and v != DEFAULTS.get(k)
    }


def _distance(
    one: TorchAdapter, two: TorchAdapter, name: str, common: Sequence[Mapping[str, Any]]
) -> float:
    if name in common[0]:
        return _apart(name, *(tree[name] for tree in common))
    (entry, a), (other, b) = one.parts[name], two.parts[name]
    # Another kind, or other rows: nothing to subtract.
    if entry.kind != other.kind or getattr(a, "index", ()) != getattr(b, "index", ()):
        return float("inf")
    keys = one.keys(name), two.keys(name)
    arrays = [[f.file.read(k).astype(np.float64) for k in ks] for f, ks in zip((one, two), keys)]
    shapes = [[x.shape for x in of] for of in arrays]
    if shapes[0] != shapes[1]:
        raise _other_shapes(name, *shapes)
    return max(float(np.abs(x - y).max(initial=0)) for x, y in zip(*arrays))


def _other_shapes(name: str, *shapes: Any) -> LoRAError:
    one, two = shapes
    return LoRAError(
        f"'{name}' has the shape {one} in the first adapter and {two} in the second; compare "
        "adapters of one base"
    )


def _apart(name: str, one: LoRA | DoRA, two: LoRA | DoRA) -> float:
    """What two updates differ by; of a DoRA also its magnitudes, ‖m₁ − m₂‖ / max(‖m₁‖, ‖m₂‖)."""
    if type(one) is not type(two):
        return float("inf")
    if (one.shape, one.geometry) != (two.shape, two.geometry):
        raise _other_shapes(name, one.shape, two.shape)
    if isinstance(one, LoRA) or isinstance(two, LoRA):
        return _between(one, two)
    m, n = (np.asarray(x.magnitude, np.float64) for x in (one, two))
    size = max(np.linalg.norm(m), np.linalg.norm(n))
    return max(_between(one, two), float(np.linalg.norm(m - n) / size) if size else 0.0)


def _between(one: Any, two: Any) -> float:
    """‖Δ₁ − Δ₂‖ / max(‖Δ₁‖, ‖Δ₂‖) from the factors; 0 where these are equal."""
    a, b = np.asarray(one.a), np.asarray(one.b)
    if one.scale == two.scale and np.array_equal(a, two.a) and np.array_equal(b, two.b):
        return 0.0
    # Δ₁ − Δ₂ = [A₁ A₂]·[s₁B₁; −s₂B₂], one update of rank r₁ + r₂.
    pair = [n.b * np.float32(sign * n.scale) for n, sign in ((one, 1), (two, -1))]
    between = dataclasses.replace(
        one,
        a=np.concatenate([a, np.asarray(two.a)], -1),
        b=np.concatenate(pair, len(one.geometry.batch_axes)),
        scale=1.0,
    )
    size = max(norm(one), norm(two))
    return norm(between) / size if size else 0.0
