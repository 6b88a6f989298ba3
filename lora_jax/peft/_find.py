"""Finds the leaf of each torch parameter, from a table or by names and shapes; never guesses."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax._core.errors import SHOWN, LoRAError, raise_all
from lora_jax._core.paths import nearest
from lora_jax.peft._blocks import Block, LeafInfo, block, layouts
from lora_jax.peft._mapping import BIASES, Entry
from lora_jax.peft._parts import NewRows, Update

WEIGHTS = ("kernel", "weight", "embedding", "scale", "w", "table")


TABLE = 'mapping={r"model\\.layers\\.(\\d+)\\.self_attn\\.q_proj": "layers_{1}/attn/query/kernel"}'


class _Names:
    """Leaves by their names in tokens: found by the same name, a longer one or a shorter one.

    What is left out at the beginning of the longer one holds no number.
    """

    def __init__(self):
        self.exact: dict[tuple[str, ...], list[str]] = {}
        self.ends: dict[tuple[str, ...], list[str]] = {}

    def add(self, tokens: tuple[str, ...], path: str) -> None:
        self.exact.setdefault(tokens, []).append(path)
        for i in range(1, len(tokens)):
            if tokens[i - 1].isdigit():
                break
            self.ends.setdefault(tokens[i:], []).append(path)

    def find(self, tokens: tuple[str, ...]):
        """(2 for the same name or 1 for a part of it, leaf)."""
        yield from ((2, path) for path in self.exact.get(tokens, ()))
        yield from ((1, path) for path in self.ends.get(tokens, ()))
        for i in range(1, len(tokens)):
            if tokens[i - 1].isdigit():
                break
            yield from ((1, path) for path in self.exact.get(tokens[i:], ()))


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
        self.modules, self.parameters = _Names(), _Names()
        for path in leaves:
            tokens = _tokens(path.split("/"))
            self.parameters.add(tokens, path)
            last = path.rpartition("/")[2].lower()
            self.modules.add(tokens[:-1] if last in (*WEIGHTS, *BIASES) else tokens, path)
        self.tied = [path for path, leaf in leaves.items() if leaf.tied]
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

    def expert(self, update: Update, swapped: bool) -> tuple[Entry, Update] | None:
        """The entry of one parameter of a module of experts, if one leaf fits it best."""
        update = update.turned() if swapped else update
        for group in self._candidates(update.name):
            fits = [c for c in group if not _update_problem(update, c)]
            if fits:
                alone = len(fits) == 1
                return (
                    (Entry(update.name, fits[0], "experts", None, None, swapped), update)
                    if alone
                    else None
                )
        return None

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
        module, _, last = name.rpartition(".")
        parts = (module if last in ("weight", "bias") else name).split(".")
        parts = parts if parts != [""] else []
        places = [i for i, part in enumerate(parts) if part.isdigit()]
        for i in (None, *places):
            rest = parts if i is None else parts[:i] + parts[i + 1 :]
            for score, path in self._named(_tokens(rest), last):
                leaf = self.leaves[path]
                whole = Block(leaf, (None,) * len(leaf.shape))
                found = whole if i is None else _at(leaf, int(parts[i]))
                if found is not None:
                    (exact if score == 2 else ends).append((found,))
        if not exact and not ends and len(self.tied) == 1 and is_head(name):
            leaf = self.leaves[self.tied[0]]
            ends.append((Block(leaf, (None,) * len(leaf.shape)),))
        return [exact, ends]

    def _named(self, tokens: tuple[str, ...], last: str):
        """(score, leaf) of the leaves that may be a parameter of this kind."""
        if last not in ("weight", "bias"):
            yield from dict.fromkeys([*self.modules.find(tokens), *self.parameters.find(tokens)])
            return
        kind = WEIGHTS if last == "weight" else BIASES
        for score, path in self.modules.find(tokens):
            if path.rpartition("/")[2].lower() in kind:
                yield score, path

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


def is_head(name: str) -> bool:
    """Whether torch's name is a head's, which has no leaf of its own where it is the embedding."""
    module, _, last = name.rpartition(".")
    return last == "weight" and "head" in module.rpartition(".")[2]


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
        finder.failures,
        f"say which leaf it is: {TABLE}",
    )
