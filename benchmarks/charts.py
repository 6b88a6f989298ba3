"""The charts of the docs, drawn from the figures that the docs print.

    python benchmarks/charts.py     # docs/methods.png and docs/weak_scaling.png, in seconds

Nothing is measured: `methods.py` and `ahead_of_time.py --weak-scaling` do that, print the tables
of the docs and draw what is here. A table is read as it stands, so that picture and page agree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOCS = Path(__file__).parent.parent / "docs"
COSTS = ("TFLOPs", "GB accessed", "GB in collectives")
PEAK, HBM = "peak GiB", 15.75  # of v5e, what a program may use, as its compiler says
ARMS = {"lora": ("LoRA", "tab:blue", "o"), "full": ("full fine-tuning", "tab:orange", "s")}


def methods(rows: Sequence[tuple[str, float, float, int]], data: str, seeds: int) -> Figure:
    """(method, mean, standard deviation, trained parameters) as dots with bars, the best on top.

    LoRA and full fine-tuning, where they are among them, are lines to compare with.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = sorted(rows, key=lambda row: row[1])
    figure = Figure((7, 0.26 * len(rows) + 1.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    means = {name: mean for name, mean, *_ in rows}
    for name, color in (("LoRA", "tab:blue"), ("full fine-tuning", "tab:orange")):
        if name in means:
            label = f"{name}, {means[name]:.3f}"
            axes.axvline(means[name], color=color, linewidth=1, linestyle="--", label=label)
    for y, (name, mean, sd, _) in enumerate(rows):
        known = {"LoRA": "tab:blue", "full fine-tuning": "tab:orange"}
        axes.errorbar(mean, y, xerr=sd, fmt="o", capsize=2, markersize=4, linewidth=1.2,
                      color=known.get(name, "0.35"))  # fmt: skip
    axes.set_yticks(range(len(rows)), [f"{name}  {count:,}" for name, *_, count in rows])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.tick_params(labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_xlabel(f"test accuracy, mean ± standard deviation of {seeds} seeds", fontsize=9)
    figure.suptitle(f"{data}; beside each name: trained parameters", x=0.01, ha="left", fontsize=9)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower right", fontsize=8, frameon=False)
    return figure


def weak_scaling(rows: Sequence[dict], what: str) -> Figure:
    """A panel for each cost, from 0 on: a step scales where its line lies on the dashed one."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure((10, 3.4), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(COSTS) + 1)
    chips = sorted({row["chips"] for row in rows})
    for panel, cost in zip(panels, (*COSTS, PEAK)):
        for arm, (name, color, marker) in ARMS.items():
            points = [(r["chips"], r[cost]) for r in rows if r["arm"] == arm and r[cost]]
            if not points:
                continue
            if cost != PEAK:
                panel.axhline(points[0][1], color=color, linewidth=1, linestyle="--", alpha=0.6)
            panel.plot(*zip(*points), color=color, marker=marker, markersize=4, label=name)
            # Hollow: it does not fit.
            much = [point for point in points if cost == PEAK and point[1] > HBM]
            panel.plot([x for x, _ in much], [y for _, y in much], marker, color=color, mfc="white")
        if cost == PEAK:
            panel.axhline(HBM, color="0.3", linewidth=1, linestyle="--")
            panel.annotate(f"a chip has {HBM}", (chips[-1], HBM), (0, 3), ha="right", fontsize=8,
                           textcoords="offset points")  # fmt: skip
        highest = max((r[cost] for r in rows if r[cost]), default=1)
        panel.set_xscale("log", base=2)
        panel.set(ylim=(0, 1.18 * highest), xlim=(chips[0] / 1.4, chips[-1] * 1.4))
        panel.set_xticks(chips, map(str, chips))
        panel.set_title(cost, loc="left", fontsize=9)
        panel.set_xlabel("chips", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        panel.grid(axis="y", color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(loc="lower right", fontsize=8, frameon=False)
    title = f"{what}; counted by XLA, per chip and step. Dashed: what the fewest chips take"
    figure.suptitle(title, x=0.005, ha="left", fontsize=10)
    return figure


def table(page: str, first: str) -> list[list[str]]:
    """The rows of the Markdown table of a page whose head begins with these columns."""
    lines = iter((DOCS / page).read_text().splitlines())
    cells = lambda line: [cell.strip() for cell in line.strip("|").split("|")]
    head = re.compile(r"\|\s*" + r"\s*\|\s*".join(map(re.escape, first.split(" | "))) + r"\s*\|")
    next(line for line in lines if head.match(line))
    next(lines)  # the rule below the head
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(cells(line))
    return rows


def recorded_methods() -> Figure:
    """The figure of docs/results/methods.md."""
    rows = []
    for name, accuracy, count, *_ in table("results/methods.md", "method | test accuracy"):
        mean, sd = map(float, accuracy.split(" ± "))
        rows.append((name, mean, sd, int(count.replace(",", ""))))
    data = "Film reviews (1,000 test snippets), all-MiniLM-L6-v2"
    return methods(rows, data, seeds=3)


def recorded_weak_scaling() -> Figure:
    """The figure of docs/scaling.md."""
    rows = []
    for chips, arm, *costs, _ in table("scaling.md", "chips | arm | TFLOPs"):
        values = [None if x == "–" else float(x) for x in costs]
        rows.append({"chips": int(chips), "arm": arm.lower(), **dict(zip((*COSTS, PEAK), values))})
    return weak_scaling(rows, "7B shape, FSDP on TPU v5e, 256 tokens a chip")


if __name__ == "__main__":
    recorded_methods().savefig(DOCS / "methods.png")
    recorded_weak_scaling().savefig(DOCS / "weak_scaling.png")
