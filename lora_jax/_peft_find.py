"""Finds the leaf of each torch parameter, from a table or by names and shapes; never guesses."""

from __future__ import annotations

import dataclasses
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

    def update(self, update: Update) -> Entry | None:
        def problem(blocks):
            return _update_problem(update, blocks)

        experts = f", {update.batch} experts" if update.batch > 1 else ""
        what = f"a low-rank update, in {update.n_in}, out {update.n_out}{experts}"
        blocks = self._one(update.name, problem, what)
        return blocks and Entry(update.name, blocks, update.kind)

    def value(self, name: str, shape: tuple[int, ...], in_out: bool | None = None) -> Entry | None:
        """A parameter in full, or one of which only the shape is known.

        A square matrix fits as (out, in) and as (in, out): `in_out` says which, None that it is
        not known.
        """

        def problem(blocks):
            return None if layouts(shape, blocks) else f"of shape {shape}, does not fit"

        blocks = self._one(name, problem, f"of shape {shape}")
        if not blocks:
            return None
        fits = layouts(shape, blocks)
        if len(fits) > 1 and blocks[0].leaf.kind == "embedding":
            fits = ["in_out"]
        elif len(fits) > 1 and (in_out is None or blocks[0].n_batch > 1):
            self.failures.append(
                f"'{name}' {shape} is square, and may be stored as (out, in), as torch's Linear, "
                "or as (in, out), as GPT-2's Conv1D; say which: conv1d=[] or conv1d=['c_proj']"
            )
        elif len(fits) > 1:
            fits = ["in_out" if in_out else "out_in"]
        return Entry(name, blocks, "value", fits[0], shape)

    def rows(self, rows: NewRows) -> Entry | None:
        """A table of which rows are new: (rows, features), not a part of a leaf."""

        def problem(blocks):
            leaf = blocks[0].leaf
            if len(blocks) > 1 or len(leaf.shape) != 2 or blocks[0].shape != leaf.shape:
                return "not a table of (rows, features)"
            if leaf.shape[1] != rows.shape[1] or max(rows.index, default=0) >= leaf.shape[0]:
                return f"a table of {leaf.shape}"
            return None

        highest = max(rows.index, default=0)
        blocks = self._one(rows.name, problem, f"rows up to {highest} of {rows.shape[1]} features")
        return blocks and Entry(rows.name, blocks, "rows")

    def experts(
        self, found: Experts, version: tuple[int, ...] | None, order=None, in_out=None
    ) -> list[tuple[Entry, Update]]:
        """Which parameter each pair of tensors is: the one assignment that the leaves allow.

        From PEFT 0.19.1 on A runs along the inputs; in 0.19.0 along the outputs; before, along the
        parameter's first axis, which `in_out` may say to be the inputs (True) or outputs (False).
        """
        roles = [(False, True)] if in_out is None else [(not in_out,), (in_out,)]
        if version is not None and version >= (0, 19):
            outputs = version == (0, 19, 0)
            roles = [(outputs,), (not outputs,)]
        names = found.parameters
        if order is not None:  # innermost first; the updates are outermost first
            names = tuple(p for p in reversed(order) if p in names)
        for role in roles:
            ways = list(self._ways(found.updates, names, found.module, role, order is not None))
            if ways:
                break
        if len(ways) == 1:
            return ways[0][::-1]
        sizes = ", ".join(f"{u.batch} of {u.n_in} by {u.n_out}" for u in found.updates)
        self.failures.append(
            f"'{found.module}' ({', '.join(found.parameters)}; {sizes}): "
            + (
                f"{len(ways)} ways to assign its tensors fit, and the file does not say which: "
                "load_peft(..., experts=['gate_up_proj', 'down_proj'], experts_in_out=...), in the "
                "order of the torch module's parameters, and whether they are (experts, in, out)"
                if ways
                else "no leaves have these names and sizes; where the experts' axis is not one of "
                "a stack in the survey, load_peft(folder, params, targets) with targets = "
                "lora.select(params, config, survey) and a Rule(..., batch_axes=(0,)) in config"
            )
        )
        return []

    def _ways(self, updates, parameters, module, roles, ordered):
        if not updates:
            yield []
            return
        for p in parameters[:1] if ordered else parameters:
            for swapped in roles:
                u = updates[0]
                u = dataclasses.replace(
                    u,
                    name=f"{module}.{p}",
                    swapped=swapped,
                    n_in=u.n_out if swapped else u.n_in,
                    n_out=u.n_in if swapped else u.n_out,
                )
                fits = [
                    [c for c in group if not _update_problem(u, c)]
                    for group in self._candidates(u.name)
                ]
                blocks = next((f for f in fits if f), [])
                if len(blocks) == 1:
                    rest = tuple(q for q in parameters if q != p)
                    for way in self._ways(updates[1:], rest, module, roles, ordered):
                        yield [(Entry(u.name, blocks[0], "experts"), u), *way]

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


def _update_problem(update: Update, blocks: Sequence[Block]) -> str | None:
    for b in blocks:
        if b.leaf.geometry is None:
            known = "used by no product" if b.leaf.kind != "?" else "its axes are not known"
            return f"{b.leaf.shape}, {known}: pass a survey of the function"
        if b.n_in != update.n_in or b.n_batch != update.batch:
            sizes = f"in {b.n_in}, out {b.n_out}"
            return f"{b.leaf.shape}, {sizes}" + (f", {b.n_batch} stacked" * (b.n_batch > 1))
        if (b.leaf.kind == "conv") < (update.kind == "conv"):
            return f"{b.leaf.shape}, not used by a convolution"
    n_out = sum(b.n_out for b in blocks)
    return None if n_out == update.n_out else f"out {n_out}"


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
