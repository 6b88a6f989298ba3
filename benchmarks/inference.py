"""A forward pass, adapters beside the weights or merged into them."""

from __future__ import annotations

import functools

import arms
import jax
import numpy as np
from cases import SIZE, setup
from measure import in_turns, ratio, table

ARMS = ("hand", "ours_auto", "ours_factored", "nnx_lora", "peft")
TOKENS = ((2, 512), (8, 1))
# One call of few tokens takes less than a timer can tell from the noise.
CALLS = {(2, 512): 1, (8, 1): 20}


def inference(case, names, repeats, size=SIZE) -> str:
    """The table; every cell a ratio to the plain model, or to PEFT's own for PEFT's."""
    shared = setup(case, size)
    runs, failed = {"plain": arms.build("ours_auto", shared).forwards["plain"]}, {}
    for name in [n for n in ARMS if n in names]:
        try:
            forwards = arms.build(name, shared).forwards
        except arms.NotApplicable as e:
            failed[name] = f"- ({e})"
            continue
        if name != "peft":
            forwards.pop("plain", None)  # the same as above
        if name == "ours_factored":
            forwards.pop("merged")  # the same as that of ours_auto
        runs |= {f"{name} {kind}": forward for kind, forward in forwards.items()}
    columns = []
    for tokens in TOKENS:
        ids = jax.random.randint(jax.random.key(3), tokens, 0, shared.config.vocab)
        waited = {k: functools.partial(_calls, run, ids, CALLS[tokens]) for k, run in runs.items()}
        columns.append(in_turns(waited, repeats))
    rows = []
    for name in runs:
        plain = "peft plain" if name in ("peft unmerged", "peft merged") else "plain"
        rows.append((name, *(ratio(t[name], t[plain]) for t in columns)))
    rows += [(name, *[why] * len(TOKENS)) for name, why in failed.items()]
    medians = [np.median(t["plain"]) / CALLS[n] for n, t in zip(TOKENS, columns)]
    note = "plain: " + ", ".join(f"{1e3 * m:.2f} ms at {n}" for n, m in zip(TOKENS, medians))
    return table(("weights", *(f"tokens {t}" for t in TOKENS)), rows) + "\n\n" + note


def _calls(run, ids, n):
    for _ in range(n):
        jax.block_until_ready(run(ids))
