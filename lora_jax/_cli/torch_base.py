"""Where the parameters of a PEFT folder are in a torch base model: its names, shapes and axes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_jax._cli.torch_adapter import (
    EXPERTS_OUT_IN,
    IN_OUT,
    OUT_IN,
    TorchAdapter,
    entry,
    torch_shape,
)
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.geometry import Geometry
from lora_jax._core.paths import nearest
from lora_jax.peft._experts import ways
from lora_jax.peft._mapping import Entry, looked_up
from lora_jax.peft._names import is_head, is_wrapper
from lora_jax.peft._orders import Orders
from lora_jax.peft._parts import Experts, NewRows, Update, Value

# (experts, in, out)
EXPERTS_IN_OUT = Geometry((1,), (2,), (0,))


def on_base(
    adapter: TorchAdapter,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    tied: Sequence[str] = (),
    conv1d: Sequence[str] | None = None,
    experts: Sequence[str] | None = None,
    experts_a: str | None = None,
    mapping: Mapping[str, Any] | None = None,
) -> TorchAdapter:
    """The adapter with every parameter found in the base: its name there, its shape, its axes.

    Args:
      adapter: from `open_torch`.
      shapes: {name: shape} of the base's tensors; see `_rename`.
      tied: tables of the base that are its output head as well.
      conv1d: see `Orders`.
      experts: as in `lora.peft.load`.
      experts_a: which axis of their weights (experts, first, last) lora_A runs along, where shapes
        do not say it: "last" since PEFT 0.19.1, but "first" where the module `is_transposed`; up
        to 0.19.0 it is "first".
      mapping: {torch name of the adapter, or regular expression: name in the base}, of a parameter
        or of a module for its weight.

    Raises:
      LoRAError: parameters that the base does not have, or that do not fit; all of them are listed.
    """
    place = _Placing(adapter, shapes, tied, conv1d, mapping or {})
    for u in adapter.parsed.updates:
        place.update(u)
    for group in adapter.parsed.experts:
        place.experts(group, experts, experts_a)
    for v in adapter.parsed.values:
        place.value(v)
    for r in adapter.parsed.rows:
        place.rows(r)
    raise_all(f"{adapter.file.folder}: does not fit this base:", place.failures)
    return dataclasses.replace(adapter, parts=place.parts)


class _Placing:
    def __init__(
        self,
        adapter: TorchAdapter,
        shapes: Mapping[str, tuple[int, ...]],
        tied: Sequence[str],
        conv1d: Sequence[str] | None,
        mapping: Mapping[str, Any],
    ):
        self.mapping = mapping
        self.adapter, self.shapes, self.tied = adapter, shapes, tied
        self.failures: list[str] = []
        self.parts: dict[str, tuple[Entry, Any]] = {}
        parsed = adapter.parsed
        names = [x.name for x in (*parsed.updates, *parsed.values, *parsed.rows)]
        names += [f"{g.module}.{p}" for g in parsed.experts for p in g.parameters]
        self.rename = _rename(names, shapes)
        self.far = _far(names, shapes)
        self.orders = Orders(shapes, conv1d, adapter.config.fan_in_fan_out)

    def find(self, name: str, what: str) -> tuple[str, tuple[int, ...]] | None:
        """(the base's name, shape) of a parameter."""
        own = self.named(name)
        if own in self.shapes:
            return own, tuple(self.shapes[own])
        # It is not there: what is likely to be meant, the most telling reason last.
        module = own.rpartition(".")[0]
        near = [n for n in self.shapes if n.startswith(module + ".")] or nearest(own, self.shapes)
        hint = f"nearest: {', '.join(near[:3])}"
        if f"{module}.qweight" in self.shapes:
            hint = "its weight is quantised there; merge into the base in full precision"
        elif self.tied and own.endswith(".weight"):
            hint += (
                f"; if it is the head, it is tied to '{self.tied[0]}' there: untie it first "
                "(tie_word_embeddings=False, save_pretrained)"
            )
        elif what == "saved in full":
            hint += "; if the module was added for training, save the base with it first"
        far = self.far.get(name)
        if far is not None:
            hint = (
                f"'{far}' has that name but for how it begins, as another part of a model has; if "
                f"it is that one: lora.peft.load(..., mapping={{{name!r}: {far!r}}})"
            )
        self.failures.append(f"'{name}' ({what}) is not in the base; {hint}")
        return None

    def named(self, name: str) -> str:
        """The base's name: what the caller says, or the same but for a first name."""
        found = looked_up(self.mapping, name)
        if found is None:
            return self.rename(name)
        if len(found) != 1:
            raise LoRAError(
                f"mapping: '{name}' is {found}, expected one tensor of the base, as text"
            )
        # The table may name a module: then the parameter has its own last name there.
        return found[0] if found[0] in self.shapes else f"{found[0]}.{name.rpartition('.')[2]}"

    def add(
        self,
        name: str,
        own: str,
        shape: tuple[int, ...],
        geometry: Geometry | None,
        kind: str,
        what: Update | Value | NewRows,
    ) -> None:
        if own in self.parts:
            self.failures.append(f"'{own}' is changed in two ways, by {name}")
        # Head and embedding are one tensor of the base: a change of one would be of both.
        if own in self.tied and not isinstance(what, NewRows) and not self.adapter.config.tying:
            self.failures.append(
                f"'{own}' is the embedding and the head, but the file changes {name} alone; untie "
                "them in the base, or train with ensure_weight_tying in PEFT"
            )
        self.parts[own] = entry(name, own, shape, geometry, kind), what

    def update(self, u: Update) -> None:
        found = self.find(u.name, f"low-rank, in {u.n_in}, out {u.n_out}")
        if found is None:
            return
        own, shape = found
        expected, geometry = torch_shape(self.adapter.file, u)
        fits = [geometry] if shape == expected else []
        if u.kind == "linear" and shape == expected[::-1]:
            fits += [IN_OUT]
        # A square Linear: (out, in) or (in, out).
        if len(fits) == 2:
            fits = [self._square(own, shape)]
        if not fits:
            or_so = f" or {expected[::-1]}" if u.kind == "linear" else ""
            return self.failures.append(
                f"'{u.name}': the update is of a weight {expected}{or_so}; '{own}' is {shape}"
                + _resized(u.name, shape, expected)
            )
        if fits[0] is not None:
            self.add(u.name, own, shape, fits[0], u.kind, u)

    def _square(self, own: str, shape: tuple[int, ...]) -> Geometry | None:
        """How a square weight lies."""
        in_out = self.orders.in_out(own)
        if in_out is None:
            module = own.removesuffix(".weight").rpartition(".")[2]
            self.failures.append(
                f"'{own}' {shape} is square, and the base has weights stored as (out, in), as "
                "torch's Linear, and as (in, out), as GPT-2's Conv1D; say which modules are "
                f"Conv1D: --conv1d {module}, or --conv1d none"
            )
            return None
        return IN_OUT if in_out else OUT_IN

    def experts(self, group: Experts, order: Sequence[str] | None, along: str | None) -> None:
        """The one assignment of pairs to parameters that the shapes allow."""
        # What lora_A may run along, as the caller says, or else as the version of PEFT does.
        axes = {None: ("last", "first"), "first": ("first",), "last": ("last",)}
        places = {p: self.find(f"{group.module}.{p}", "experts") for p in group.parameters}
        found = {p: place for p, place in places.items() if place is not None}
        if len(found) < len(places):
            return
        version = self.adapter.config.version
        if along is None and version is not None and version < (0, 19, 1):
            along = "first"
        fits = [
            way
            for axis in axes[along]
            for way in ways(group, functools.partial(_expert, found, axis), order)
        ]
        # Ways that agree on the parameter and the axes of each tensor are one.
        if len({tuple((p, place[1]) for p, place in way) for way in fits}) != 1:
            shapes = ", ".join(f"{p} {f[1]}" for p, f in found.items())
            return self.failures.append(
                f"'{group.module}' ({group.sizes}; in the base {shapes}): "
                + (
                    "several ways to assign its tensors fit, and the file does not say which: "
                    "--experts gate_up_proj,down_proj in the order of the torch module's "
                    "parameters, and --experts-a last, or first where the module is_transposed"
                    if fits
                    else "the sizes do not fit"
                )
            )
        for p, (u, geometry) in fits[0]:
            own, shape = found[p]
            self.add(u.name, own, shape, geometry, "experts", u)

    def value(self, v: Value) -> None:
        found = self.find(v.name, "saved in full")
        if found is None:
            return
        own, shape = found
        if shape != v.shape:
            more = _resized(v.name, shape, v.shape)
            self.failures.append(f"'{v.name}' {v.shape} is saved in full; '{own}' is {shape}{more}")
        self.add(v.name, own, shape, None, "value", v)

    def rows(self, r: NewRows) -> None:
        highest = max(r.index, default=0)
        found = self.find(r.name, f"rows up to {highest} of {r.shape[1]} features")
        if found is None:
            return
        own, shape = found
        if len(shape) != 2 or shape[1] != r.shape[1] or highest >= shape[0]:
            self.failures.append(
                f"'{r.name}': rows up to {highest} of {r.shape[1]} features; '{own}' is {shape}"
                + _resized(r.name, shape, (highest + 1, r.shape[1]))
            )
        self.add(r.name, own, shape, None, "rows", r)


def _expert(
    found: Mapping[str, tuple[str, tuple[int, ...]]], axis: str, parameter: str, u: Update
) -> tuple[Update, Geometry] | None:
    """The update and its axes, where lora_A runs along the first or the last axis behind the
    experts', if these sizes fit."""
    shape = found[parameter][1]
    if len(shape) == 2:
        return (u, OUT_IN) if shape == (u.n_out, u.n_in) and u.batch == 1 else None
    sizes = (u.n_in, u.n_out) if axis == "first" else (u.n_out, u.n_in)
    if shape != (u.batch, *sizes):
        return None
    return u, EXPERTS_IN_OUT if axis == "first" else EXPERTS_OUT_IN


def _resized(name: str, have: tuple[int, ...], want: tuple[int, ...]) -> str:
    """What to do where the adapter was trained with more tokens than the base has."""
    table = "emb" in name.lower() or is_head(name)
    if not table or have[1:] != want[1:] or len(have) != 2 or want[0] <= have[0]:
        return ""
    return f"; tokens were added: resize the base to {want[0]} rows"


def _rename(names: Sequence[str], shapes: Mapping[str, Any]) -> Callable[[str], str]:
    """From the adapter's names to the base's: as they are, or all of them with one first name less
    or more, which must be one that stands for the whole model."""
    ways = [lambda name: name]
    ways += [way for first, way in _ways(names, shapes) if is_wrapper([first])]
    hits = [sum(n in shapes or way(n) in shapes for n in names) for way in ways]
    best = [way for way, n in zip(ways, hits) if n == max(hits)]
    # Names as they are win where others do as well; of several others none is known to be meant.
    one = best[0] if len({tuple(map(way, names)) for way in best}) == 1 else ways[0]
    return lambda name: name if name in shapes or one(name) not in shapes else one(name)


def _far(names: Sequence[str], shapes: Mapping[str, Any]) -> dict[str, str]:
    """{adapter's name: a name in the base} of what may be in another part of the model."""
    ways = _ways(names, shapes)
    return {n: way(n) for first, way in ways for n in names if n != way(n) and way(n) in shapes}


def _ways(
    names: Sequence[str], shapes: Mapping[str, Any]
) -> list[tuple[str, Callable[[str], str]]]:
    """(first name, a function that takes it off a name of the adapter, or puts it before one)."""
    ways: list[tuple[str, Callable[[str], str]]] = []
    for first in sorted({n.partition(".")[0] for n in names}):
        ways.append((first, lambda name, first=first: name.removeprefix(first + ".")))
    for first in sorted({n.partition(".")[0] for n in shapes}):
        ways.append((first, lambda name, first=first: f"{first}.{name}"))
    return ways
