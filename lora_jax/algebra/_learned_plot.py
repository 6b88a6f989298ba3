"""The figure of what adapters have learned: layer × target, and spectra. It needs matplotlib."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

# The parts of a path that say a layer: layers_3, layers3, 3.
NUMBERED = re.compile(r"(.*?)(\d+)")

# Perceptually uniform: equal steps of the value look equal.
MAP = "viridis"

# A heat map of at most so many cells has a number in each.
WRITTEN = 48

# The legend names at most so many targets.
NAMED = 24

# Where the largest value is so many times the smallest, a scale is logarithmic.
SPREAD = 30

# Below this share of σ₁, a singular value is fp32's rounding and is not drawn.
FLOOR = 1e-6


@dataclasses.dataclass(frozen=True)
class Cell:
    """One target in one layer; `spectra` (m, k) of the weights in it, or None."""

    target: str
    layer: int | None
    size: float
    effective: float
    spectra: np.ndarray | None


def figure(leaves: Mapping[str, Any]) -> Figure:
    """The figure of {path: `Change`}."""
    relative = any(c.ratio is not None for c in leaves.values())
    cells = [cell for path, change in leaves.items() for cell in cells_of(path, change, relative)]
    in_layers = {c.target for c in cells if c.layer is not None}
    # Stable: those in layers first, each group in the order of the model.
    targets = sorted(dict.fromkeys(c.target for c in cells), key=lambda t: t not in in_layers)
    rows: list = sorted({c.layer for c in cells if c.layer is not None})
    # One more row, "no layer", for what stands outside of the layers, such as the head.
    rows += [None] if len(in_layers) < len(targets) else []
    names = short_names(targets, in_layers)
    ranks = [c.rank for c in leaves.values() if c.kind == "lora"]
    titles = (
        "‖ΔW‖ / ‖W‖" if relative else "‖ΔW‖",
        f"effective rank of ΔW (of {max(ranks)})" if ranks else "effective rank of ΔW",
    )
    if in_layers:
        # Inches: a column is wider where a number is written in it.
        wide = 0.45 if len(rows) * len(targets) <= WRITTEN else 0.32
        width, height = wide * len(targets) + 1.8, 0.24 * len(rows) + 0.09 * max(map(len, names))
    else:
        width, height = 3.2 + 0.07 * max(map(len, names)), 0.26 * len(targets)
    width, height = min(max(width, 3.6), 24), min(max(height + 1, 3.4), 14 if in_layers else 40)
    out = Figure((2 * width + 5, height), dpi=120)
    out.set_layout_engine("constrained", wspace=0.04)
    *panels, right = out.subplots(1, 3, width_ratios=[width, width, 3.6])
    for axes, title, key in zip(panels, titles, ("size", "effective")):
        value = {(c.layer, c.target): getattr(c, key) for c in cells}
        if in_layers:
            grid = [[value.get((row, t), np.nan) for t in targets] for row in rows]
            _heat_map(axes, np.array(grid), rows, names, title, key == "size")
        else:
            _bars(axes, [value[None, t] for t in targets], names, title)
    # The first panel says it.
    panels[1].set_ylabel("")
    _spectra(right, cells, dict(zip(targets, names)))
    if height > 7:
        right.set(box_aspect=1.6, anchor="N")
    return out


def cells_of(path: str, change: Any, relative: bool) -> Iterable[Cell]:
    """One for each layer of a leaf."""
    target, layer = layer_of(path, bool(change.stack))
    if layer is not None or not change.stack:
        groups = [(layer, slice(None))]
    else:
        # The n weights lie in C order, so those of one index of the first axis are adjacent.
        each = len(change.norm) // change.stack[0]
        groups = [(i, slice(i * each, (i + 1) * each)) for i in range(change.stack[0])]
    for layer, which in groups:
        size = np.linalg.norm(change.norm[which])
        if relative:
            base = None if change.base_norm is None else np.linalg.norm(change.base_norm[which])
            # As `Change.ratio`, for the weights of the cell together.
            size = np.nan if base is None else size / base if base else math.inf if size else 0.0
        s = change.singular_values[which] if change.kind == "lora" else None
        effective = np.nan if s is None else change.effective_rank[which].mean()
        yield Cell(target, layer, float(size), float(effective), s)


def layer_of(path: str, stacked: bool) -> tuple[str, int | None]:
    """The path without the number of its layer, and that number.

    The first numbered part counts that is a block: neither the leaf nor the module that holds it.
    Where there is none, a stack counts along its axis, and the rest by the first number of all.

    >>> layer_of("layers_3/attn/q_2/kernel", False), layer_of("layers/mlp/wi_0/kernel", True)
    (('layers_*/attn/q_2/kernel', 3), ('layers/mlp/wi_0/kernel', None))
    >>> layer_of("Dense_1/kernel", False), layer_of("head/kernel", False)
    (('Dense_*/kernel', 1), ('head/kernel', None))
    """
    parts = path.split("/")
    # In a stack the last two parts, module and leaf, are no layer: the axis is.
    for i in range(len(parts) - (2 if stacked else 0)):
        if (found := NUMBERED.fullmatch(parts[i])) is not None:
            name, number = found.groups()
            return "/".join([*parts[:i], f"{name}*", *parts[i + 1 :]]), int(number)
    return path, None


def short_names(targets: Sequence[str], in_layers: Collection[str]) -> list[str]:
    """The targets without the parts that those in layers share, and what most of them end with, as
    far as they still differ.

    >>> layered = ["model/layers/*/mlp/up/kernel", "model/layers/*/q/kernel"]
    >>> short_names([*layered, "head/bias"], layered)
    ['mlp/up', 'q', 'head/bias']
    """
    # The leaf's own name is never cut from the front.
    alike = [t.split("/")[:-1] for t in in_layers or targets]
    shared = 0
    while all(len(p) > shared for p in alike) and len({p[shared] for p in alike}) == 1:
        shared += 1
    cut = lambda t: t.split("/", shared)[-1] if t in in_layers or not in_layers else t
    names = _distinct([cut(t) for t in targets], targets)
    (last, count), *_ = Counter(n.rpartition("/")[2] for n in names).most_common(1)
    # Most end alike, in "kernel" say.
    if 2 * count >= len(names):
        names = _distinct([n.removesuffix(f"/{last}") for n in names], names)
    return names


def _distinct(names: Sequence[str], otherwise: Sequence[str]) -> list[str]:
    fine = len(names) > 1 and len({*names}) == len(names)
    return list(names if fine else otherwise)


def _heat_map(
    axes: Axes, grid: np.ndarray, rows: Sequence, names: Sequence[str], title: str, from_zero: bool
) -> None:
    """Rows are layers, columns are targets; what there is not stays grey."""
    norm = _scale(grid, from_zero)
    shown = axes.imshow(grid, MAP, norm, aspect="auto", interpolation="nearest")
    # imshow draws nothing for NaN: this shows through.
    axes.set_facecolor("0.92")
    labels = ["no layer" if r is None else str(r) for r in rows]
    flat = len(names) * max(map(len, names)) <= 40
    _ticks(axes.set_xticks, names, 72, rotation=0 if flat else 90)
    _ticks(axes.set_yticks, labels, 64)
    # Minor ticks lie between the cells, for the white lines of the grid.
    axes.set_xticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize="medium")
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(shown, ax=axes, pad=0.02, fraction=0.06, aspect=30, anchor=(0, 1))
    bar.set_label(title + (" (log scale)" if isinstance(norm, LogNorm) else ""))
    bar.outline.set_visible(False)
    for (i, j), x in np.ndenumerate(grid):
        if math.isinf(x) or (grid.size <= WRITTEN and not math.isnan(x)):
            # Viridis begins dark.
            dark = math.isfinite(x) and norm(x) < 0.6
            color = "white" if dark else "black"
            axes.text(j, i, _text(x), ha="center", va="center", color=color, fontsize=7)


def _bars(axes: Axes, values: Sequence, names: Sequence[str], title: str) -> None:
    """Where there are no layers: a bar for each leaf, from the top on."""
    at, finite = np.arange(len(names)), np.array([x if math.isfinite(x) else 0.0 for x in values])
    axes.barh(at, finite, color=colormaps[MAP](0.35), height=0.7)
    for y, x, length in zip(at, values, finite):
        if not math.isnan(x):
            axes.annotate(
                _text(x), (length, y), (3, 0), textcoords="offset points", va="center", fontsize=7
            )
    _ticks(axes.set_yticks, names, 150)
    # Upside down: the first leaf is on top.
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 1.18 * (finite.max() or 1))
    axes.set_xlabel(title)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _spectra(axes: Axes, cells: Sequence[Cell], names: Mapping[str, str]) -> None:
    """σ / σ₁ against the index: a faint line for each weight, a bold one the targets' median."""
    curves: dict[str, list[np.ndarray]] = {}
    for c in cells:
        for s in () if c.spectra is None else c.spectra:
            if s[0] > 0:
                curves.setdefault(c.target, []).append(s / s[0])
    axes.set_title("spectrum of ΔW", fontsize="medium")
    axes.set_xlabel("index of the singular value")
    axes.set_ylabel("σ / σ₁")
    axes.spines[["top", "right"]].set_visible(False)
    if not curves:
        axes.text(
            0.5,
            0.5,
            "every ΔW of low rank is zero",
            ha="center",
            va="center",
            transform=axes.transAxes,
        )
        axes.set(xticks=[], yticks=[])
        return
    longest = max(len(s) for of in curves.values() for s in of)
    for color, (target, lines) in zip(_colors(len(curves)), curves.items()):
        # (weights, k); a line ends where NaN begins.
        padded = np.full((len(lines), longest), np.nan)
        for row, s in zip(padded, lines):
            row[: len(s)] = np.where(s > FLOOR, s, np.nan)
        at = np.arange(1, longest + 1)
        if len(lines) > 1:
            axes.plot(at, padded.T, color=color, linewidth=0.5, alpha=0.35)
        # nanmedian warns of a column without a number.
        there = ~np.isnan(padded).all(0)
        middle = np.nanmedian(padded[:, there], 0)
        axes.plot(
            at[there],
            middle,
            color=color,
            linewidth=1.8,
            label=names[target],
            marker="o" if longest <= 16 else None,
            markersize=3,
        )
    lowest = min(s[s > FLOOR].min() for of in curves.values() for s in of)
    axes.set_yscale("log")
    axes.set_ylim(min(0.8 * lowest, 0.1), 1.2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if lowest > 0.005 else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlim(0.5, longest + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.grid(color="0.92")
    handles, labels = axes.get_legend_handles_labels()
    title = None if len(labels) <= NAMED else f"{NAMED} of {len(labels)}"
    axes.legend(
        handles[:NAMED],
        labels[:NAMED],
        title=title,
        loc="upper left",
        fontsize=7,
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0,
        frameon=False,
    )


def _scale(grid: np.ndarray, from_zero: bool) -> Normalize:
    known = grid[np.isfinite(grid)]
    positive = known[known > 0]
    if not len(positive):
        return Normalize(0, 1)
    low, high = positive.min(), positive.max()
    if from_zero and high > SPREAD * low:
        return LogNorm(low, high)
    # An effective rank is at least 1: its colours need not begin at 0.
    return Normalize(0.0, high) if from_zero else Normalize(math.ceil(known.min()) - 1, high)


def _ticks(place: Callable, labels: Sequence[str], most: int, **kwargs: Any) -> None:
    """A label for each, or for each k-th where there are more than can be read."""
    step = math.ceil(len(labels) / most)
    place(
        range(0, len(labels), step), labels[::step], fontsize=8 if len(labels) > 8 else 9, **kwargs
    )


def _colors(n: int) -> np.ndarray:
    if n <= 10:
        return colormaps["tab10"](np.arange(n))
    return colormaps["turbo"](np.linspace(0.03, 0.97, n))


def _text(x: float) -> str:
    return "∞" if math.isinf(x) else f"{x:.3g}"
