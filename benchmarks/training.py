"""A training step: time, XLA's own figures, and whether the arms do the same."""

from __future__ import annotations

import arms
import numpy as np
from cases import SIZE, TOKENS, setup
from measure import in_turns, ratio, table

FIGURES = ("flops", "bytes", "temp")
UPDATES = 5


def training(case, names, repeats, size=SIZE, tokens=TOKENS) -> str:
    """The table of one case; every cell a ratio to `hand`, the last a relative difference."""
    shared = setup(case, size, tokens)
    built, losses, failed = {}, {}, {}
    for name in names:
        try:
            arm = arms.build(name, shared)
            losses[name] = np.array([arm.step() for _ in range(UPDATES + 1)])
            built[name] = arm
        except arms.NotApplicable as e:
            failed[name] = f"- ({e})"
        except Exception as e:
            failed[name] = f"fails: {type(e).__name__}"
    times = in_turns({name: arm.step for name, arm in built.items()}, repeats)
    hand = built["hand"]
    rows = []
    for name in names:
        if name in failed:
            rows.append((name, failed[name], *["-"] * (len(FIGURES) + 1)))
            continue
        cost = built[name].cost
        figures = [f"{cost[k] / hand.cost[k]:.3f}" if cost else "-" for k in FIGURES]
        difference = np.abs(losses[name] / losses["hand"] - 1).max()
        loss = f"{difference:.1e}" if built[name].comparable else "-"
        rows.append((name, ratio(times[name], times["hand"]), *figures, loss))
    header = ("arm", "time", "FLOPs", "bytes accessed", "temporary memory", "loss")
    note = (
        f"hand: {1e3 * np.median(times['hand']):.0f} ms, {hand.cost['flops'] / 1e9:.2f} GFLOP, "
        f"{hand.cost['bytes'] / 1e6:.0f} MB accessed, {hand.cost['temp'] / 1e6:.1f} MB temporary"
    )
    return table(header, rows) + "\n\n" + note
