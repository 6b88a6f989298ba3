"""The figure of what training takes of memory: a stacked bar for each way. It needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# What is frozen is grey; what is trained, and what that brings along, has a colour.
COLORS = {
    "base": "0.6",
    "constants": "0.8",
    "adapters": "tab:blue",
    "gradients": "tab:orange",
    "optimizer": "tab:green",
    "activations": "tab:purple",
}

# A part has its number where it takes at least this share of the axis.
WRITTEN = 0.07


def figure(memories: Mapping[str, Any]) -> Figure:
    """The figure of {name: `Memory`}: bytes on the device that holds most."""
    totals = [m.device for m in memories.values()]
    most = max(*totals, 1)
    unit, size = next(
        (u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)) if most >= s
    )
    out = Figure((7.5, 1.5 + 0.42 * len(memories)), dpi=120)
    out.set_layout_engine("constrained")
    axes = out.add_subplot()
    # What no bar has is not in the legend.
    parts = [
        p for p in COLORS if any(p in m.parts and m.parts[p].device for m in memories.values())
    ]
    left = [0.0] * len(memories)
    for part in parts:
        widths = [
            m.parts[part].device / size if part in m.parts else 0.0 for m in memories.values()
        ]
        axes.barh(range(len(left)), widths, left=left, color=COLORS[part], label=part, height=0.66)
        for y, (x, width) in enumerate(zip(left, widths)):
            if width * size > WRITTEN * most:
                axes.text(
                    x + width / 2, y, f"{width:.3g}", ha="center", va="center", fontsize=7,
                    color="black" if part in ("base", "constants") else "white",
                )  # fmt: skip
        left = [x + width for x, width in zip(left, widths)]
    # A bar beside others says what it leaves out.
    less = [m for m in memories.values() if "activations" in parts and "activations" not in m.parts]
    for y, (x, memory) in enumerate(zip(left, memories.values())):
        text = f"{x:.3g} {unit}{' + activations' if memory in less else ''}"
        axes.annotate(
            text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=8,
            fontweight="bold",
        )  # fmt: skip
    axes.set_yticks(range(len(left)), [*memories], fontsize=9)
    room = 1.34 if less else 1.14
    axes.set(xlim=(0, room * most / size), ylim=(len(left) - 0.5, -0.5))
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    several = any(m.device != m.total for m in memories.values())
    axes.set_xlabel(f"{unit} on the device that holds most" if several else unit, fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    out.legend(loc="outside upper center", ncols=len(parts), fontsize=8, frameon=False,
               handlelength=1, columnspacing=1.2)  # fmt: skip
    return out
