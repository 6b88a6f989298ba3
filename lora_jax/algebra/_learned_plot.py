"""The figure of what adapters have learned: target × layer, and spectra. It needs matplotlib."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import TextToPath
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation, blended_transform_factory

from lora_jax._core.fold import natural
from lora_jax.algebra._learned_cells import Cell, cells_of, short_names

# Perceptually uniform: equal steps of the value look equal.
MAP = "viridis"

# A heat map of at most so many cells has a number in each.
WRITTEN = 48

# An axis has at most so many labels, and the legend.
ROWS, COLUMNS, NAMED = 120, 48, 24

# Points of the labels of rows; inches of a row, and of the figure at most.
FONT, ROW, WIDEST, HIGHEST = 8, 0.24, 24, 40
DPI = 120
CENTRE = dict(ha="center", va="center")

# Ticks are multiples of these.
STEPS = [1, 2, 5, 10]

# Where the largest value is so many times the smallest, a scale is logarithmic.
SPREAD = 10

# Below this share of σ₁, a singular value is fp32's rounding and is not drawn.
FLOOR = 1e-6


def figure(leaves: Mapping[str, Any]) -> Figure:
    """The figure of {path: `Change`}."""
    relative = any(c.ratio is not None for c in leaves.values())
    cells = [c for path in natural(leaves) for c in cells_of(path, leaves[path], relative)]
    in_layers = {c.target for c in cells if c.layer is not None}
    # Stable: those in layers first, each group in the order of the model.
    targets = sorted(dict.fromkeys(c.target for c in cells), key=lambda t: t not in in_layers)
    names = dict(zip(targets, short_names(targets, in_layers)))
    layers = sorted({c.layer for c in cells if c.layer is not None})
    low_rank = {c.target for c in cells if c.spectra is not None}
    ranks = [c.rank for c in leaves.values() if c.kind == "lora"]
    panels = [("size", "‖ΔW‖ / ‖W‖" if relative else "‖ΔW‖", targets)]
    if ranks:
        shown = [t for t in targets if t in low_rank or not in_layers]
        panels.append(("effective", f"effective rank of ΔW (of {max(ranks)})", shown))
    # In the panel with most cells, so that those below each other are alike.
    written = max(len(rows) for *_, rows in panels) * len(layers) <= WRITTEN
    out, axes, right = _panels(panels, names, len(layers), written)
    for panel, (key, title, rows) in zip(axes, panels):
        value = {(c.target, c.layer): getattr(c, key) for c in cells}
        labels = [names[t] for t in rows]
        if in_layers:
            # What stands outside of the layers is as wide as all of them.
            grid = [[value.get((t, i if t in in_layers else None), np.nan) for i in layers]
                    for t in rows]  # fmt: skip
            across = [t not in in_layers for t in rows]
            last = panel is axes[-1]
            grid, zero = np.array(grid), key == "size"
            _heat_map(panel, grid, across, labels, layers, title, zero, last, written)
        else:
            _bars(panel, [value[t, None] for t in rows], labels, title, panel is axes[0])
    if right is not None:
        _spectra(right, cells, names)
    return out


def _panels(
    panels: Sequence[tuple[str, str, Sequence[str]]],
    names: Mapping[str, str],
    layers: int,
    written: bool,
) -> tuple[Figure, list[Axes], Axes | None]:
    """The figure with axes for each panel, heat maps one below the other, bars side by side; and
    for the spectra, where there are any."""
    spectra = len(panels) > 1
    label = max(_width(n) for n in names.values()) / 72
    if layers:
        rows = [len(targets) for *_, targets in panels]
        # A column is wider where a number is written in it.
        column = 0.46 if written else 0.24 if layers <= COLUMNS else 0.13
        width = min(max(column * layers + 0.9, 3.6), WIDEST - 5)
        height = ROW * sum(rows) + 0.35 * len(rows) + 0.4
        out = _figure(label + width + (5 if spectra else 0), height)
        grid = out.add_gridspec(
            len(rows), 1 + spectra, width_ratios=[label + width, 4.6][: 1 + spectra],
            height_ratios=[n + 1 for n in rows],
        )  # fmt: skip
        axes = [out.add_subplot(grid[i, 0]) for i in range(len(rows))]
        return out, axes, out.add_subplot(grid[:, 1]) if spectra else None
    # Names stand beside the first panel alone.
    widths = [3.2] * len(panels) + [4.6] * spectra
    out = _figure(label + sum(widths), ROW * len(names) + 0.8)
    *axes, last = [
        out.add_subplot(x) for x in out.add_gridspec(1, len(widths), width_ratios=widths)
    ]
    return out, axes if spectra else [*axes, last], last if spectra else None


def _figure(width: float, height: float) -> Figure:
    out = Figure((min(width, WIDEST + 8), min(max(height, 3.2), HIGHEST)), dpi=DPI)
    out.set_layout_engine("constrained", wspace=0.04)
    return out


def _heat_map(
    axes: Axes, grid: np.ndarray, across: Sequence[bool], names: Sequence[str],
    layers: Sequence[int], title: str, from_zero: bool, last: bool, written: bool,
) -> None:  # fmt: skip
    """Rows are targets, columns are layers; what there is not stays grey."""
    norm, (rows, columns) = _scale(grid, from_zero), grid.shape
    shown = axes.imshow(grid, MAP, norm, aspect="auto", interpolation="nearest")
    # imshow draws nothing for NaN: this shows through.
    axes.set_facecolor("0.92")
    _rows(axes, names)
    step = math.ceil(columns / COLUMNS)
    labels = [str(i) for i in layers[::step]] if last else []
    axes.set_xticks(range(0, columns, step) if last else [], labels, fontsize=FONT)
    axes.set_xlabel("layer" if last else "", fontsize=9)
    # White lines between the cells, but for a cell as wide as the row.
    axes.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, color="white", linewidth=0.6)
    for i, whole in enumerate(across):
        if not whole:
            axes.vlines(np.arange(1, columns) - 0.5, i - 0.5, i + 0.5, color="white", linewidth=0.6)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.tick_params(length=0)
    axes.set_title(title, fontsize="medium", loc="left")
    axes.spines[:].set_visible(False)
    # Inches, whatever the width of the cells: beside them, and as high.
    wide = axes.get_window_extent().width / DPI
    beside = axes.inset_axes((1.008, 0, 0.12 / max(wide, 1), 1))
    bar = axes.figure.colorbar(shown, cax=beside)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=FONT)
    if isinstance(norm, LogNorm):
        axes.set_title(f"{title} (log scale)", fontsize="medium", loc="left")
        low, high = norm.vmin or 1, norm.vmax or 1
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.yaxis.set_major_formatter("{x:g}")
    else:
        bar.ax.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    for (i, j), x in np.ndenumerate(grid):
        # One number for a cell as wide as the row.
        if across[i] and j != (columns - 1) // 2:
            continue
        if math.isinf(x) or ((across[i] or written) and not math.isnan(x)):
            # Viridis begins dark.
            dark = math.isfinite(x) and norm(x) < 0.6
            at, color = (columns - 1) / 2 if across[i] else j, "white" if dark else "black"
            axes.text(at, i, _text(x), color=color, fontsize=7, **CENTRE)


def _bars(axes: Axes, values: Sequence, names: Sequence[str], title: str, first: bool) -> None:
    """Where there are no layers: a bar for each leaf, from the top on."""
    at, finite = np.arange(len(names)), np.array([x if math.isfinite(x) else 0.0 for x in values])
    axes.barh(at, finite, color=colormaps[MAP](0.35), height=0.7)
    for y, x, length in zip(at, values, finite):
        if not math.isnan(x):
            axes.annotate(
                _text(x), (length, y), (3, 0), textcoords="offset points", va="center", fontsize=7
            )
    _rows(axes, names if first else [])
    # Upside down: the first leaf is on top. Room for six, so that a bar stays a bar.
    spare = max(6 - len(names), 0) / 2
    axes.set_ylim(len(names) - 0.5 + spare, -0.5 - spare)
    axes.set_xlim(0, 1.18 * (finite.max() or 1))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axes.set_title(title, fontsize="medium", loc="left")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=FONT)
    axes.spines[["top", "right"]].set_visible(False)


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Names beside the rows; what stands before the last / once for all rows below each other."""
    step = math.ceil(len(names) / ROWS) or 1
    # Whole where nothing is shared, or where there are more than can be read: each k-th.
    split = [n.rpartition("/") if step == 1 else ("", "", n) for n in names]
    if len({group for group, *_ in split}) == len(names):
        split = [("", "", n) for n in names]
    axes.set_yticks(range(0, len(names), step), [x for *_, x in split[::step]], fontsize=FONT)
    beside = 8 + max((_width(x) for *_, x in split), default=0)
    left = axes.figure.dpi_scale_trans
    for group, run in itertools.groupby(enumerate(split), lambda x: x[1][0]):
        (first, _), *rest = run
        if not group:
            continue
        at = (first + first + len(rest)) / 2
        axes.annotate(
            group, (0, at), (-beside - 5, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="center", fontsize=FONT,
        )  # fmt: skip
        if rest:
            shift = ScaledTranslation(-(beside + 1) / 72, 0, left)
            at = blended_transform_factory(axes.transAxes, axes.transData) + shift
            ends = [first - 0.35, first + len(rest) + 0.35]
            axes.add_line(
                Line2D([0, 0], ends, transform=at, clip_on=False, color="0.6", linewidth=1)
            )


def _width(text: str) -> float:
    """Points that a label takes."""
    font = FontProperties(size=FONT)
    return TextToPath().get_text_width_height_descent(text, font, ismath=False)[0]


def _spectra(axes: Axes, cells: Sequence[Cell], names: Mapping[str, str]) -> None:
    """σ / σ₁ against the index: a faint line for each weight, a bold one the targets' median."""
    curves: dict[str, list[np.ndarray]] = {}
    for c in cells:
        for s in () if c.spectra is None else c.spectra:
            if s[0] > 0:
                curves.setdefault(c.target, []).append(s / s[0])
    axes.set_title("spectrum of ΔW", fontsize="medium", loc="left")
    axes.set_xlabel("index of the singular value", fontsize=9)
    axes.set_ylabel("σ / σ₁", fontsize=9)
    axes.tick_params(labelsize=FONT)
    axes.spines[["top", "right"]].set_visible(False)
    if not curves:
        axes.text(0.5, 0.5, "every ΔW of low rank is zero", transform=axes.transAxes, **CENTRE)
        axes.set(xticks=[], yticks=[])
        return
    longest = max(len(s) for of in curves.values() for s in of)
    faint = min(max(40 / sum(map(len, curves.values())), 0.08), 0.35)
    for color, (target, lines) in zip(_colors(len(curves)), curves.items()):
        # (weights, k); a line ends where NaN begins.
        padded = np.full((len(lines), longest), np.nan)
        for row, s in zip(padded, lines):
            row[: len(s)] = np.where(s > FLOOR, s, np.nan)
        at = np.arange(1, longest + 1)
        if len(lines) > 1:
            axes.plot(at, padded.T, color=color, linewidth=0.5, alpha=faint)
        # nanmedian warns of a column without a number.
        there = ~np.isnan(padded).all(0)
        middle = np.nanmedian(padded[:, there], 0)
        marker = dict(marker="o" if longest <= 16 else None, markersize=3, zorder=3)
        axes.plot(at[there], middle, color=color, linewidth=1.8, label=names[target], **marker)
    lowest = min(s[s > FLOOR].min() for of in curves.values() for s in of)
    axes.set_yscale("log")
    axes.set_ylim(min(0.8 * lowest, 0.1), 1.2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if lowest > 0.005 else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlim(0.5, longest + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.grid(color="0.92")
    if axes.get_window_extent().height > 5.4 * DPI:
        axes.set(box_aspect=1.5, anchor="N")
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) == 1:
        return
    title = None if len(labels) <= NAMED else f"{NAMED} of {len(labels)}"
    at = dict(bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    named = dict(handles=handles[:NAMED], labels=labels[:NAMED], title=title, fontsize=7)
    axes.legend(loc="upper left", frameon=False, **named, **at)


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


def _colors(n: int) -> np.ndarray:
    if n <= 10:
        return colormaps["tab10"](np.arange(n))
    return colormaps["turbo"](np.linspace(0.03, 0.97, n))


def _text(x: float) -> str:
    return "∞" if math.isinf(x) else f"{x:.3g}"
