"""Draws the pictures of docs/concepts: `python docs/pictures/concepts.py [folder]`.

Text and lines stand on a light card, so that they can be read on a dark page as well.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch

from lora_jax._products.plan import Costs

CARD, INK, SOFT = "#f7f9fc", "#1b2733", "#64748b"
BLUE, ORANGE, GREEN, RED, GREY = "#2563a8", "#c2570c", "#2f7d4f", "#b3261e", "#cbd5e1"
plt.rcParams.update({
    "font.size": 11, "svg.hashsalt": "lora_jax", "text.color": INK, "axes.edgecolor": SOFT,
    "axes.labelcolor": INK, "xtick.color": SOFT, "ytick.color": SOFT,
})  # fmt: skip


def canvas(width, height):
    """Axes in inches, from the lower left corner."""
    figure = plt.figure(figsize=(width, height), facecolor=CARD)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    return figure, ax


def box(ax, x, y, width, height, text, color=GREY, fill="white", size=11, mono=False):
    style = "round,pad=0,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch((x, y), width, height, style, ec=color, fc=fill, lw=1.4))
    ink = "white" if fill not in ("white", CARD) else INK
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink,
            fontsize=size, family="monospace" if mono else None)  # fmt: skip


def arrow(ax, start, end, color=SOFT, text="", above=0.13):
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.5})
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    ax.text(x, y + above, text, ha="center", va="center", color=color, fontsize=9.5)


def transform():
    """A function of two weights, equation by equation, and what is evaluated in its place."""
    figure, ax = canvas(8.6, 3.6)
    ax.text(0.25, 3.3, "your function, traced", weight="bold")
    ax.text(4.95, 3.3, "what adapt(fn) evaluates", weight="bold")
    rows = [
        ("h = dot_general(x, up)", "h = x·up + s·(x·A)·B", "use", BLUE),
        ("h = tanh(h)", "h = tanh(h)", "unchanged", SOFT),
        ("w = transpose(down)", "w = (downᵀ, Bᵀ, Aᵀ)", "move", GREEN),
        ("y = dot_general(h, w)", "y = h·w + s·(h·Bᵀ)·Aᵀ", "use", BLUE),
    ]
    for i, (left, right, how, color) in enumerate(rows):
        y = 2.55 - 0.78 * i
        box(ax, 0.25, y, 3.2, 0.55, left, mono=True)
        box(ax, 4.95, y, 3.4, 0.55, right, color=color)
        arrow(ax, (3.5, y + 0.27), (4.9, y + 0.27), color, how)
    return figure


def chips(ax, x, y, axes, width=0.78):
    """An array as its axes, colored by their part; returns where it ends."""
    for name, color in axes:
        box(ax, x, y, width - 0.06, 0.34, name, color=color, fill=color, size=9.5)
        x += width
    return x


def geometry():
    """Leaves with their axes by part, and the shapes of A and B that follow."""
    figure, ax = canvas(9.1, 4.1)
    i, o, b, r = (lambda n, c=c: (n, c) for c in (BLUE, ORANGE, GREEN, SOFT))
    rows = [
        ("a Dense", [i("in"), o("out")]),
        ("query, by heads", [i("in"), o("heads"), o("size")]),
        ("attention's out", [i("heads"), i("size"), o("out")]),
        ("scanned layers", [b("layers"), i("in"), o("out")]),
        ("experts", [b("experts"), i("in"), o("out")]),
        ("a convolution", [i("h"), i("w"), i("in"), o("out")]),
    ]
    for text, x in (("the leaf", 1.75), ("A", 5.05), ("B", 7.0)):
        ax.text(x, 3.78, text, weight="bold")
    for n, (name, axes) in enumerate(rows):
        y = 3.25 - 0.5 * n
        of = lambda color, axes=axes: [a for a in axes if a[1] == color]
        ax.text(0.25, y + 0.17, name, va="center", fontsize=10)
        chips(ax, 1.75, y, axes)
        small = 0.46 if len(of(BLUE)) > 2 else 0.62
        chips(ax, 5.05, y, [*of(GREEN), *of(BLUE), r("rank")], small)
        chips(ax, 7.0, y, [*of(GREEN), r("rank"), *of(ORANGE)], 0.62)
    for k, (text, color) in enumerate(
        (
            ("in: summed over", BLUE),
            ("out: in the result", ORANGE),
            ("batch: one A, one B each", GREEN),
        )
    ):
        box(ax, 0.25 + 2.5 * k, 0.2, 0.22, 0.22, "", color=color, fill=color)
        ax.text(0.55 + 2.5 * k, 0.31, text, va="center", fontsize=10)
    return figure


def strictness():
    """The three ends of an adapted leaf."""
    figure, ax = canvas(8.6, 3.3)
    box(ax, 0.25, 1.35, 1.75, 0.6, "an adapted leaf\nin the program")
    rows = [
        (2.45, "only products, and what moves it", "low rank", GREEN, "runs"),
        (
            1.35,
            "tanh(W), a custom_vjp, a sort …",
            "needs W + s·AB",
            RED,
            "error: leaf, primitive, line",
        ),
        (0.25, "no output depends on it", "unused", RED, "error: leaf"),
    ]
    for y, why, what, color, end in rows:
        arrow(ax, (2.0, 1.65), (2.55, y + 0.3))
        box(ax, 2.6, y, 2.75, 0.6, why, size=9.5)
        arrow(ax, (5.4, y + 0.3), (6.0, y + 0.3), color)
        box(ax, 6.05, y, 2.3, 0.6, f"{what}\n{end}", color=color, size=9.5)
    ax.text(8.35, 1.14, "strict=False: made whole, exact", fontsize=9, color=SOFT,
            ha="right", va="center")  # fmt: skip
    return figure


def plans():
    """What each way costs beyond the base's product, by the cost model: one 4096 × 4096 weight."""
    figure = plt.figure(figsize=(8.6, 3.7), facecolor=CARD)
    axes = figure.subplots(1, 2, sharey=True)
    rows, d, r = np.logspace(1, 4.6, 200), 4096, 16
    of = [Costs.of(t, d, [d], [r], 4) for t in rows]
    ways = {
        "forward pass": {"factored": "up", "merged": "merge", "beside": "join"},
        "gradient of x": {"factored": "down", "merged": "merge", "beside": "join_back"},
    }
    color = {"factored": BLUE, "merged": ORANGE, "beside": GREEN}
    for ax, (title, lines) in zip(axes, ways.items()):
        ax.set_facecolor(CARD)
        for way, name in lines.items():
            cost = np.array([getattr(c, name) for c in of]) / (2 * rows * d * d)
            ax.loglog(rows, cost, color=color[way], lw=2, label=way)
        ax.set(title=title, xlabel="T, rows of x", ylim=(3e-4, 30))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.axvline(d, color=SOFT, lw=1, ls=":")
        ax.text(d * 1.1, 8, "T = 4096", color=SOFT, fontsize=9.5)
    axes[0].set_ylabel("cost over the base product's FLOPs")
    axes[0].legend(frameon=False, loc="lower left")
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    form = "png" if len(sys.argv) > 1 else "svg"
    for draw in (transform, geometry, strictness, plans):
        # Without a date, so that the same picture is the same file.
        metadata = {"Date": None} if form == "svg" else None
        draw().savefig(folder / f"{draw.__name__}.{form}", facecolor=CARD, metadata=metadata)
