"""Finds the leaf of each torch parameter, from a table or by names and shapes; never guesses."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lora_jax._core.errors import SHOWN, LoRAError, raise_all
from lora_jax._core.paths import nearest
from lora_jax.peft._blocks import Block, LeafInfo, block, layouts
from lora_jax.peft._mapping import BIASES, TABLE, Entry, looked_up
from lora_jax.peft._names import WRAPPERS, Names, is_head, tokens_of
from lora_jax.peft._parts import NewRows, Update
from lora_jax.peft._settings import MERGE

# Last names of a weight, which its module's name stands for.
WEIGHTS = ("kernel", "weight", "embedding", "scale", "w", "table")


class Finder:
    """Finds the blocks of torch parameters, and collects what cannot be found.

    Args:
      leaves: {path: `LeafInfo`}.
      given: {torch name, or regular expression for it: leaf, or list of leaves}. The name is a
        parameter's, or a module's for its weight; the leaf may use the groups, `{1}` or `{name}`,
        and an index, "layers/q/kernel[{1}]". What it does not name is found by names and shapes.
      flat: the names have "_" in the place of dots, as kohya's.
      part: the name of the model that they are of, which a leaf may have before it.
    """

    def __init__(
        self,
        leaves: dict[str, LeafInfo],
        given: Mapping[str, Any] | None,
        flat: bool = False,
        part: str | None = None,
    ):
        self.leaves, self.given, self.flat = leaves, given, flat
        self.wrappers = WRAPPERS.union(() if part is None else {part})
        self.modules, self.parameters = Names(), Names()
        for path in leaves:
            tokens = tokens_of(path.split("/"), flat)
            self.parameters.add(tokens, path)
            last = path.rpartition("/")[2].lower()
            self.modules.add(tokens[:-1] if last in (*WEIGHTS, *BIASES) else tokens, path)
        self.tied = [path for path, leaf in leaves.items() if leaf.tied]
        self.near: list[str] = []  # why leaves with the name of what is looked for are not it
        self.far: list[tuple[Block, ...]] = []  # of that name, but for the part of the model
        self.failures: list[str] = []

    def update(self, update: Update) -> tuple[Entry, Update] | None:
        """The entry, and the update as the leaf has it: turned where the leaf is also a table."""

        def way(blocks: Sequence[Block]) -> Update:
            # The leaf is the table (rows, features), of which a head has the rows as outputs.
            tied = len(blocks) == 1 and blocks[0].leaf.tied and update.kind == "linear"
            # What the tensors do not say is the size of the leaf.
            known = all(b.leaf.geometry for b in blocks)
            n_in, n_out = (blocks[0].n_in, sum(b.n_out for b in blocks)) if known else (0, 0)
            n_in, n_out = (n_out, n_in) if tied else (n_in, n_out)
            found = dataclasses.replace(
                update, n_in=update.n_in or n_in, n_out=update.n_out or n_out
            )
            return found.turned() if tied else found

        def problem(blocks: Sequence[Block]) -> str | None:
            return _update_problem(way(blocks), blocks)

        experts = f", {update.batch} experts" if update.batch > 1 else ""
        sizes = f"in {update.n_in or '?'}, out {update.n_out or '?'}"
        what = f"{'an' if update.flat else 'a low-rank'} update, {sizes}{experts}"
        blocks = self._one(update.name, problem, what)
        if blocks is None:
            return None
        found = way(blocks)
        # torch's (out, in, *window), for the file that is written again.
        kind, shape = update.kind, None
        if kind == "conv":
            shape = (found.n_out, found.n_in // math.prod(found.window), *found.window)
        elif found.flat and blocks[0].leaf.kind == "conv":
            kind, shape = "conv", (found.n_out, *blocks[0].sizes(blocks[0].leaf.in_axes))
        return Entry(update.name, blocks, kind, None, shape, found.swapped), found

    def value(
        self, name: str, shape: tuple[int, ...], in_out: bool | None = False, needed: bool = True
    ) -> Entry | None:
        """A parameter in full, or one of which only the shape is known.

        A square matrix fits as (out, in) and as (in, out), which `in_out` says, see `Orders`. Where
        it says nothing, the entry has no layout, and it is an error if that is `needed`.
        """

        def problem(blocks: Sequence[Block]) -> str | None:
            if layouts(shape, blocks):
                return None
            table = len(shape) == 2 and (is_head(name) or "emb" in name.lower())
            have = blocks[0].leaf.shape
            if table and len(blocks) == 1 and shape[1] in have and len(have) == 2:
                rows = math.prod(have) // shape[1]
                if shape[0] > rows:
                    return _resized(have, rows, shape[0])
            return f"of shape {shape}, does not fit"

        blocks = self._one(name, problem, f"of shape {shape}")
        if not blocks:
            return None
        fits = layouts(shape, blocks)
        leaf = blocks[0].leaf
        # Where all sizes above 1 differ, only one order of them fits.
        large = [n for n in shape if n > 1]
        unsure = leaf.kind == "?" and leaf.geometry is None and len(large) > len(set(large))
        if unsure and leaf.path.rpartition("/")[2].lower() not in BIASES:
            fits = [None]
            if needed:
                self.failures.append(f"'{name}' {shape}: {_unknown(leaf)}")
        # torch's tables are (rows, features), as Flax's.
        elif len(fits) > 1 and leaf.kind == "embedding":
            fits = ["in_out"]
        elif len(fits) > 1 and in_out is None:
            fits = [None]
            module = name.removesuffix(".weight").rpartition(".")[2]
            if needed:
                self.failures.append(
                    f"'{name}' {shape} is square, and may be stored as (out, in), as torch's Linear"
                    f", or as (in, out), as GPT-2's Conv1D; say which: conv1d=[] or "
                    f"conv1d=['{module}']"
                )
        elif len(fits) > 1:
            fits = ["in_out" if in_out else "out_in"]
        return Entry(name, blocks, "value", fits[0], shape)

    def rows(self, rows: NewRows) -> Entry | None:
        """A table of which rows are new: (rows, features), not a part of a leaf."""

        def problem(blocks: Sequence[Block]) -> str | None:
            leaf = blocks[0].leaf
            if len(blocks) > 1 or len(leaf.shape) != 2 or blocks[0].shape != leaf.shape:
                return "not a table of (rows, features)"
            if leaf.geometry and not leaf.tied and leaf.kind == "linear" and leaf.in_axes == (0,):
                return (
                    f"a kernel (in, out) {leaf.shape}, whose columns are torch's rows; rows can be "
                    "trained of a table only: train this module in full in PEFT (modules_to_save)"
                )
            if leaf.shape[1] == rows.shape[1] and highest >= leaf.shape[0]:
                return _resized(leaf.shape, leaf.shape[0], highest + 1)
            return None if leaf.shape[1] == rows.shape[1] else f"a table of {leaf.shape}"

        highest = max(rows.index, default=0)
        blocks = self._one(rows.name, problem, f"rows up to {highest} of {rows.shape[1]} features")
        return Entry(rows.name, blocks, "rows") if blocks else None

    def expert(self, update: Update, swapped: bool) -> tuple[Entry, Update] | None:
        """The entry of one parameter of a module of experts, if one leaf fits it best."""
        update = update.turned() if swapped else update
        # The better kind of match first: where one fits, a worse one is not looked at.
        for group in self._candidates(update.name):
            fits = [c for c in group if not _update_problem(update, c)]
            if len(fits) == 1:
                return Entry(update.name, fits[0], "experts", swapped=swapped), update
            if fits:
                break
        return None

    def _one(
        self, name: str, problem: Callable[[Sequence[Block]], str | None], what: str
    ) -> tuple[Block, ...] | None:
        """The only blocks that fit; anything else is a failure that lists the candidates."""
        groups, tried = self._candidates(name), []
        if not groups:
            return None
        for candidates in groups:
            fit = [c for c in candidates if problem(c) is None]
            if len(fit) == 1:
                return fit[0]
            if fit:
                several = "; ".join(", ".join(map(str, c)) for c in fit[:5])
                self.failures.append(f"'{name}' ({what}) may be: {several}")
                return None
            tried += [f"{', '.join(map(str, c))}: {problem(c)}" for c in candidates]
        # What fits but is of another part of the model is shown, and never taken.
        far = [", ".join(map(str, c)) for c in self.far if problem(c) is None]
        if far and not tried:
            self.failures.append(
                f"'{name}' ({what}) may be: {'; '.join(far[:5])}, but the names begin otherwise, "
                "as those of another part of a model"
            )
            return None
        tried += self.near
        # The rest is only counted.
        few = len(self.failures) < SHOWN
        near = nearest(name.rpartition(".")[0].replace(".", "/"), self.leaves, 3) if few else ()
        self.failures.append(
            f"'{name}' ({what}): "
            + ("; ".join(tried[:3]) or f"no leaf of that name; nearest: {', '.join(near)}")
        )
        return None

    def _candidates(self, name: str) -> list[list[tuple[Block, ...]]]:
        """Lists of blocks, the better kind of match first; none if the table is wrong about it."""
        exact, ends = [], []
        self.near, self.far = [], []
        if self.given is not None:
            found = self._given(name)
            if found is None and name.endswith(".bias"):
                found = self._bias(name)
            if found is not None:
                return [[found]] if found else []
        module, _, last = name.rpartition(".")
        # In kohya's names every dot has become an underscore.
        parts = re.split(
            r"[._]" if self.flat else r"\.", module if last in ("weight", "bias") else name
        )
        parts = parts if parts != [""] else []
        places = [i for i, part in enumerate(parts) if part.isdecimal()]
        # A number that no leaf has in its name is a place in a stack: of layers, of experts in
        # them.
        for left_out in itertools.chain(*(itertools.combinations(places, n) for n in range(3))):
            rest = [part for i, part in enumerate(parts) if i not in left_out]
            at = [int(parts[i]) for i in left_out]  # of a stack; of layers and of experts in them
            for first, path in self._named(tokens_of(rest, self.flat), last):
                leaf = self.leaves[path]
                found = _at(leaf, at)
                if found is not None:
                    passed = self.wrappers.issuperset(first)
                    kind = exact if not first else ends if passed else self.far
                    kind.append((found,))
                elif len(leaf.shape) > 1:
                    self.near.append(_no_stack(leaf, at[-1]))
        # A head without a leaf is the only table that is also multiplied by.
        if not exact and not ends and len(self.tied) == 1 and is_head(name):
            leaf = self.leaves[self.tied[0]]
            ends.append((Block(leaf, (None,) * len(leaf.shape)),))
        return [exact, ends]

    def _named(self, tokens: tuple[str, ...], last: str) -> Iterator[tuple[tuple[str, ...], str]]:
        """(first names that one side lacks, leaf) of those that may be a parameter of this kind."""
        if last not in ("weight", "bias"):
            yield from dict.fromkeys([*self.modules.find(tokens), *self.parameters.find(tokens)])
            return
        for first, path in self.modules.find(tokens):  # a weight may have the module's own name
            if (path.rpartition("/")[2].lower() in BIASES) == (last == "bias"):
                yield first, path

    def _given(self, name: str) -> tuple[Block, ...] | None:
        """What the table says of a parameter: nothing is None, and () a failure."""
        try:
            found = looked_up(self.given or {}, name)
            return None if found is None else tuple(block(t, self.leaves) for t in found)
        except LoRAError as e:
            # Once: experts are looked up for each way to assign them.
            if (text := f"'{name}': {e}") not in self.failures:
                self.failures.append(text)
            return ()

    def _bias(self, name: str) -> tuple[Block, ...] | None:
        """The bias beside the kernel that the table gives for this module."""
        kernels = self._given(name.removesuffix(".bias") + ".weight") or ()
        out = []
        for k in kernels:
            path = "/".join([*k.leaf.path.split("/")[:-1], "bias"])
            if path not in self.leaves or k.leaf.geometry is None:
                return None
            leaf = self.leaves[path]
            # The axes of the bias are those of its kernel without the inputs.
            index = tuple(i for d, i in enumerate(k.index) if d not in k.leaf.geometry.in_axes)
            if len(index) != len(leaf.shape):
                return None
            out.append(Block(leaf, index))
        return tuple(out) or None


def _unknown(leaf: LeafInfo) -> str:
    """What to do where nothing says in which order the axes of a leaf are."""
    return (
        f"{leaf.shape}, its axes are not known: its name is none of Flax, and the shape fits more "
        "than one order; pass a survey of the function: "
        "lora.peft.load(..., survey=lora.survey(fn, params, x))"
    )


def _resized(have: tuple[int, ...], rows: int, want: int) -> str:
    return (
        f"{have}, of {rows:,} rows, but torch's has {want:,}, as tokens were added: give the leaf "
        f"{want} rows"
    )


def _no_stack(leaf: LeafInfo, i: int) -> str:
    """Why position i of a leaf is not one of a stack's."""
    g = leaf.geometry
    if g is not None and g.batch_axes:
        return f"{leaf.path} {leaf.shape}: a stack of {leaf.shape[g.batch_axes[0]]}, without {i}"
    axes = "" if g is None else f" (in {g.in_axes}, out {g.out_axes})"
    return (
        f"{leaf.path} {leaf.shape}{axes} has no batch axis, and the file has one module for each "
        f"of a stack; give it one: lora.Rule('{leaf.path}', batch_axes=(0,), in_axes=(1,), "
        "out_axes=(2,)) in a LoRAConfig, and lora.select(params, config, survey) in the survey's "
        "place"
    )


def _update_problem(update: Update, blocks: Sequence[Block]) -> str | None:
    for b in blocks:
        if b.leaf.geometry is None and b.leaf.kind != "?":
            return f"{b.leaf.shape}, used by no product: the survey gives it no axes; {MERGE}"
        if b.leaf.geometry is None and len(b.leaf.shape) > 2:
            one = next((i for i in b.index if isinstance(i, int)), None)
            return _unknown(b.leaf) if one is None else _no_stack(b.leaf, one)
        if b.leaf.geometry is None:
            return _unknown(b.leaf)
        # Before other sizes: tokens that were added are the usual reason, with a way on of their
        # own.
        if len(blocks) == 1 and b.leaf.shape == b.shape:
            pairs = ((b.n_in, update.n_in), (b.n_out, update.n_out))
            (rows, want), rest = pairs if update.kind == "embedding" else pairs[::-1]
            head = update.kind == "linear" and is_head(update.name)
            if (update.kind == "embedding" or head) and rest[0] == rest[1] and want > rows:
                return _resized(b.leaf.shape, rows, want)
        # Not out: the blocks share the outputs, and their sum is compared below.
        if b.n_in != update.n_in or b.n_batch != update.batch:
            sizes = f"in {b.n_in}, out {b.n_out}"
            return f"{b.leaf.shape}, {sizes}" + (f", {b.n_batch} stacked" * (b.n_batch > 1))
        if b.leaf.kind != "conv" and math.prod(update.window) > 1:
            return f"{b.leaf.shape}, not used by a convolution"
        # A window of one position has no order that could be another.
        if b.leaf.kind == "conv" and update.kind != "conv" and not update.flat and _window(b) > 1:
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


def _at(leaf: LeafInfo, at: Sequence[int]) -> Block | None:
    """A position in a leaf that is stacked so many times, from the outermost stack on."""
    rank = len(leaf.shape)
    # Any axis but the last may be of a stack, where the leaf's are not known.
    axes = leaf.geometry.batch_axes if leaf.geometry else tuple(range(rank - 1))
    if len(axes) < len(at) or any(i >= leaf.shape[d] for d, i in zip(axes, at)):
        return None
    place = dict(zip(axes, at))
    return Block(leaf, tuple(place.get(d) for d in range(rank)))


def finish(finder: Finder, what: str) -> None:
    """Raises what could not be found."""
    raise_all(
        f"{what}: no leaf, or more than one, for these torch parameters:",
        finder.failures,
        f"say which leaf it is: {TABLE}",
    )
