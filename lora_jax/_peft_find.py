"""Finds the leaf of each torch parameter, from a table or by names and shapes; never guesses."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax._errors import LoRAError, raise_all
from lora_jax._paths import nearest
from lora_jax._peft_blocks import Block, LeafInfo, block, layouts
from lora_jax._peft_layers import Experts, NewRows, Update
from lora_jax._peft_map import Entry

SHOWN = 20  # failures
WEIGHTS = ("kernel", "weight", "embedding", "scale", "w", "table")
TABLE = 'mapping={r"model\\.layers\\.(\\d+)\\.self_attn\\.q_proj": "layers_{1}/attn/query/kernel"}'


class Finder:
    """Finds the blocks of torch parameters, and collects what cannot be found.

    Args:
      leaves: {path: `LeafInfo`}.
      given: {torch name, or regular expression for it: leaf, or list of leaves}. The name is a
        parameter's, or a module's for its weight; the leaf may use the groups, `{1}` or `{name}`,
        and an index, "layers/q/kernel[{1}]". None: found by names and shapes.
    """

    def __init__(self, leaves: dict[str, LeafInfo], given: Mapping[str, Any] | None):
        self.leaves, self.given = leaves, given
        self.tokens = {path: _tokens(path.split("/")) for path in leaves}
        self.by_end: dict[str, list[str]] = {}  # the leaves whose names, or modules', end so
        for path, tokens in self.tokens.items():
            for end in {tokens[-1], *tokens[-2:-1]}:
                self.by_end.setdefault(end, []).append(path)
        self.failures: list[str] = []

    def update(self, update: Update) -> tuple[Entry, Update] | None:
        """The entry, and the update as the leaf has it: turned where the leaf is also a table."""

        def way(blocks):
            tied = len(blocks) == 1 and blocks[0].leaf.tied and update.kind == "linear"
            return update.turned() if tied else update

        def problem(blocks):
            return _update_problem(way(blocks), blocks)

        experts = f", {update.batch} experts" if update.batch > 1 else ""
        what = f"a low-rank update, in {update.n_in}, out {update.n_out}{experts}"
        blocks = self._one(update.name, problem, what)
        if blocks is None:
            return None
        found = way(blocks)
        kind, shape = update.kind, None
        if kind == "conv":
            shape = (found.n_out, found.n_in // math.prod(found.window), *found.window)
        elif found.e and blocks[0].leaf.kind == "conv":  # AdaLoRA's A is flat
            kind, shape = "conv", (found.n_out, *blocks[0].sizes(blocks[0].leaf.in_axes))
        return Entry(update.name, blocks, kind, None, shape, found.swapped), found

    def value(
        self,
        name: str,
        shape: tuple[int, ...],
        conv1d: Sequence[str] | None = None,
        *,
        needed: bool = True,
        fan_in_fan_out: bool = False,
    ) -> Entry | None:
        """A parameter in full, or one of which only the shape is known.

        A square matrix fits as (out, in) and as (in, out): `conv1d` names the modules for which it
        is the latter. Where it is None, a matrix is a Linear's, unless `fan_in_fan_out` says that
        there are others; of a stack (of experts) it is not known: an error if it is `needed`.
        """

        def problem(blocks):
            return None if layouts(shape, blocks) else f"of shape {shape}, does not fit"

        blocks = self._one(name, problem, f"of shape {shape}")
        if not blocks:
            return None
        fits = layouts(shape, blocks)
        if len(fits) > 1 and blocks[0].leaf.kind == "embedding":
            fits = ["in_out"]
        elif len(fits) > 1 and conv1d is None and (fan_in_fan_out or blocks[0].n_batch > 1):
            fits = [None]
            module = name.removesuffix(".weight").rpartition(".")[2]
            if needed:
                self.failures.append(
                    f"'{name}' {shape} is square, and may be stored as (out, in), as torch's Linear"
                    f", or as (in, out), as GPT-2's Conv1D; say which: conv1d=[] or "
                    f"conv1d=['{module}']"
                )
        elif len(fits) > 1:
            module = "." + name.removesuffix(".weight")
            fits = ["in_out" if any(module.endswith("." + c) for c in conv1d or ()) else "out_in"]
        return Entry(name, blocks, "value", fits[0], shape)

    def rows(self, rows: NewRows) -> Entry | None:
        """A table of which rows are new: (rows, features), not a part of a leaf."""

        def problem(blocks):
            leaf = blocks[0].leaf
            if len(blocks) > 1 or len(leaf.shape) != 2 or blocks[0].shape != leaf.shape:
                return "not a table of (rows, features)"
            if leaf.geometry and not leaf.tied and leaf.kind == "linear" and leaf.in_axes == (0,):
                return (
                    f"a kernel (in, out) {leaf.shape}, whose columns are torch's rows; rows can be "
                    "trained of a table only: train this module in full in PEFT (modules_to_save)"
                )
            if leaf.shape[1] != rows.shape[1] or max(rows.index, default=0) >= leaf.shape[0]:
                return f"a table of {leaf.shape}"
            return None

        highest = max(rows.index, default=0)
        blocks = self._one(rows.name, problem, f"rows up to {highest} of {rows.shape[1]} features")
        return blocks and Entry(rows.name, blocks, "rows")

    def experts(self, found: Experts, order=None, along=None) -> list[tuple[Entry, Update]]:
        """Which parameter each pair of tensors is: the one assignment that the leaves allow.

        What A runs along is the same for all of a module. Up to PEFT 0.18 it is the parameter's
        first axis, from 0.19.1 on its last, or the inputs where the module says `is_transposed`;
        so the file does not say it, and the shapes must, or the caller: `along`.
        """
        turns = {None: (False, True), "in": (False,), "out": (True,)}
        if along not in turns:
            raise LoRAError(f"experts_a={along!r}: expected 'in' or 'out'")
        ways = [way for turn in turns[along] for way in self._ways(found.pairs, (), turn)]
        if order is not None:  # innermost first; the pairs are outermost first
            ways = [way for way in ways if _descending(way, list(order))]
        if len(ways) == 1:
            return ways[0][::-1]
        names = dict.fromkeys(p for pair in found.pairs for p in pair)
        sizes = ", ".join(
            f"{u.batch} of {u.n_in} by {u.n_out}" for p in found.pairs for u in list(p.values())[:1]
        )
        self.failures.append(
            f"'{found.module}' ({', '.join(names)}; {sizes}): "
            + (
                f"{len(ways)} ways to assign its tensors fit, and the file does not say which: "
                f"load_peft(..., experts={list(names)}, in the order of the torch module's "
                "parameters, experts_a='in'), or 'out' where PEFT's lora_A runs along the outputs: "
                "see load_peft"
                if ways
                else "no leaves have these names and sizes; where the experts' axis is not one of "
                "a stack in the survey, load_peft(folder, params, targets) with targets = "
                "lora.select(params, config, survey) and a Rule(..., batch_axes=(0,)) in config"
            )
        )
        return []

    def _ways(self, pairs: Sequence[Mapping[str, Update]], used: tuple[str, ...], turn: bool):
        if not pairs:
            yield []
            return
        for parameter, update in pairs[0].items():
            if parameter in used:
                continue
            update = update.turned() if turn else update
            fits = [
                [c for c in group if not _update_problem(update, c)]
                for group in self._candidates(update.name)
            ]
            blocks = next((f for f in fits if f), [])
            if len(blocks) == 1:
                entry = Entry(update.name, blocks[0], "experts", swapped=turn)
                for way in self._ways(pairs[1:], (*used, parameter), turn):
                    yield [(entry, update), *way]

    def _one(self, name: str, problem, what: str) -> tuple[Block, ...] | None:
        """The only blocks that fit; anything else is a failure that lists the candidates."""
        groups = self._candidates(name)
        tried = []
        for candidates in groups:
            fit = [c for c in candidates if problem(c) is None]
            if len(fit) == 1:
                return fit[0]
            if fit:
                several = "; ".join(", ".join(map(str, c)) for c in fit[:5])
                self.failures.append(f"'{name}' ({what}) may be: {several}")
                return None
            tried += [f"{', '.join(map(str, c))}: {problem(c)}" for c in candidates]
        few = len(self.failures) < SHOWN  # the rest is only counted
        near = nearest(name.rpartition(".")[0].replace(".", "/"), self.leaves, 3) if few else ()
        self.failures.append(
            f"'{name}' ({what}): "
            + ("; ".join(tried[:3]) or f"no leaf of that name; nearest: {', '.join(near)}")
        )
        return None

    def _candidates(self, name: str) -> list[list[tuple[Block, ...]]]:
        """Lists of blocks, the better kind of match first."""
        if self.given is not None:
            found = self._given(name)
            if found is None and name.endswith(".bias"):
                found = self._bias(name)
            return [[found]] if found else [[]]
        exact, ends = [], []
        ends_of = {t for part in name.split(".")[-3:] for t in _tokens([part])}
        paths = dict.fromkeys(p for t in sorted(ends_of) for p in self.by_end.get(t, ()))
        for path in paths:
            leaf = self.leaves[path]
            for score, index in _matches(name, path, self.tokens[path]):
                if index is None:
                    (exact if score == 2 else ends).append(
                        (Block(leaf, (None,) * len(leaf.shape)),)
                    )
                elif (b := _at(leaf, index)) is not None:
                    (exact if score == 2 else ends).append((b,))
        return [exact, ends]

    def _given(self, name: str) -> tuple[Block, ...] | None:
        """What the table says of a parameter, by its module's name or its own."""
        names = [name.removesuffix(".weight"), name]
        exact = next((n for n in names if n in self.given), None)
        table = self.given.items() if exact is None else [(re.escape(exact), self.given[exact])]
        found = {}
        for key, value in table:
            try:
                hit = next((h for n in names if (h := re.fullmatch(key, n))), None)
                if hit:
                    texts = (value,) if isinstance(value, str) else tuple(value)
                    groups = [hit[0], *(x or "" for x in hit.groups())]
                    found[tuple(t.format(*groups, **hit.groupdict()) for t in texts)] = key
            except (re.error, IndexError, KeyError, ValueError, TypeError, AttributeError) as e:
                raise LoRAError(
                    f"mapping: {key!r}: {value!r} is not a regular expression and a leaf, or list "
                    f"of leaves, with its groups ({e!r}): {TABLE}"
                ) from None
        try:
            if len(found) > 1:
                raise LoRAError(f"the keys {', '.join(map(repr, found.values()))} all match it")
            return tuple(block(t, self.leaves) for t in next(iter(found))) if found else None
        except LoRAError as e:
            self.failures.append(f"'{name}': {e}")
            return None

    def _bias(self, name: str) -> tuple[Block, ...] | None:
        """The bias beside the kernel that the table gives for this module."""
        kernels = self._given(name.removesuffix(".bias") + ".weight") or ()
        out = []
        for k in kernels:
            path = "/".join([*k.leaf.path.split("/")[:-1], "bias"])
            if path not in self.leaves or k.leaf.geometry is None:
                return None
            leaf = self.leaves[path]
            index = tuple(i for d, i in enumerate(k.index) if d not in k.leaf.geometry.in_axes)
            if len(index) != len(leaf.shape):
                return None
            out.append(Block(leaf, index))
        return tuple(out) or None


def _descending(way, order: list[str]) -> bool:
    names = [entry.name.rpartition(".")[2] for entry, _ in way]
    at = [order.index(n) for n in names if n in order]
    return at == sorted(at, reverse=True)


def _update_problem(update: Update, blocks: Sequence[Block]) -> str | None:
    for b in blocks:
        if b.leaf.geometry is None and b.leaf.kind != "?":
            return (
                f"{b.leaf.shape}, used by no product: the survey gives it no axes; merge the "
                "adapter in PEFT (merge_and_unload) and load the merged weights"
            )
        if b.leaf.geometry is None:
            return f"{b.leaf.shape}, its axes are not known: pass a survey of the function"
        if b.n_in != update.n_in or b.n_batch != update.batch:
            sizes = f"in {b.n_in}, out {b.n_out}"
            return f"{b.leaf.shape}, {sizes}" + (f", {b.n_batch} stacked" * (b.n_batch > 1))
        if b.leaf.kind != "conv" and math.prod(update.window) > 1:
            return f"{b.leaf.shape}, not used by a convolution"
        if b.leaf.kind == "conv" and update.kind != "conv" and not update.e and _window(b) > 1:
            return f"{b.leaf.shape}, a convolution, whose inputs are in an order of their own"
        if b.leaf.dilated and _window(b) > 1:
            return (
                f"{b.leaf.shape}, a dilated convolution: PEFT's A is not dilated, so that no "
                "update of the kernel is what it computes; train it in full (modules_to_save)"
            )
    n_out = sum(b.n_out for b in blocks)
    return None if n_out == update.n_out else f"out {n_out}"


def _window(b: Block) -> int:
    return b.n_in // b.sizes(b.leaf.in_axes[:1])[0]


def _tokens(parts: Sequence[str]) -> tuple[str, ...]:
    """Names in a common spelling: lower case, a number at the end apart."""
    out: list[str] = []
    for part in parts:
        found = re.fullmatch(r"(.*?)_?(\d+)", part.lower())
        out += [t for t in found.groups() if t] if found else [part.lower()]
    return tuple(out)


def _matches(name: str, path: str, tokens: tuple[str, ...]):
    """(2 for the same names or 1 for one that ends with the other, position in a stack or None)."""
    module, _, last = name.rpartition(".")
    leaf = path.rpartition("/")[2].lower()
    if last == "bias":
        if leaf not in ("bias", "b"):
            return
    elif last == "weight":
        if leaf not in WEIGHTS:
            return
    else:
        module = name
    stem = tokens[:-1] if leaf in (*WEIGHTS, "bias", "b") else tokens
    parts = module.split(".") if module else []
    if score := _same(_tokens(parts), stem):
        yield score, None
    for i, part in enumerate(parts):
        if part.isdigit() and (score := _same(_tokens(parts[:i] + parts[i + 1 :]), stem)):
            yield score, int(part)


def _same(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    if a == b:
        return 2
    n = min(len(a), len(b))
    rest = a[:-n] if len(a) > n else b[:-n]
    return int(n > 0 and a[-n:] == b[-n:] and not any(t.isdigit() for t in rest))


def _at(leaf: LeafInfo, i: int) -> Block | None:
    """Position i of a stacked leaf."""
    axes = leaf.geometry.batch_axes if leaf.geometry else (0,) * (len(leaf.shape) > 1)
    if not axes or i >= leaf.shape[axes[0]]:
        return None
    return Block(leaf, tuple(i if d == axes[0] else None for d in range(len(leaf.shape))))


def finish(finder: Finder, what: str) -> None:
    """Raises what could not be found."""
    raise_all(
        f"{what}: no leaf, or more than one, for these torch parameters:",
        finder.failures[:SHOWN]
        + ([f"and {len(finder.failures) - SHOWN} more"] if len(finder.failures) > SHOWN else []),
        f"say which leaf it is: {TABLE}",
    )
