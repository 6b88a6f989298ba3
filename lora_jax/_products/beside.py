"""The plan "beside": the factors beside the weight, in one product.

Shapes: x (T, in), A (in, r), x·A (T, r), B (r, out), W (in, out), y and g (T, out). What is summed
over, and what is put side by side, is one axis, made of any number of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from lora_jax._core import compat
from lora_jax._core.einsum import Labels, along, cast, in_order
from lora_jax._core.geometry import RANK
from lora_jax._products.group import Group, gradient
from lora_jax._quantized.waiting import is_waiting, value

JOINED = "joined"  # the label of axes that are made one, along which arrays are put side by side


def forward(
    group: Group, x: jax.Array, h: Sequence[jax.Array], b: Sequence[jax.Array], w: Sequence
) -> list[jax.Array]:
    """[x, x·A]·[W; B] of each member: one product, whose result is written once. All the x·A stand
    beside x, and zeros meet those of the other members."""
    # What is summed over, in x's order: x itself is seldom transposed.
    inner = tuple(d for d in group.xl if d not in group.hl)
    x, xl = _as_one(x, group.xl, inner)  # (T, in)
    hl = _with_ranks(xl)
    x = lax.concatenate([x, *(_placed(v, group.hl, hl, x.shape) for v in h)], xl.index(JOINED))
    ranks = [v.shape[group.hl.index(RANK)] for v in h]
    ys = []
    for i, (m, b_, w_) in enumerate(zip(group.members, b, w)):
        w_, wl = _as_one(_read(w_), m.wl, inner)  # (in, out)
        at = wl.index(JOINED)
        b_ = _placed(cast(b_, x.dtype), m.bl, _with_ranks(wl), w_.shape)
        zeros = [(0, 0, 0)] * w_.ndim
        # (in + Σr, out): W, B at its own ranks, and zeros where the x·A of the others are.
        zeros[at] = (sum(ranks[:i]), sum(ranks[i + 1 :]), 0)
        w_ = lax.concatenate([w_, lax.pad(b_, np.zeros((), b_.dtype), zeros)], at)
        operands = (w_, wl, x, xl) if m.weight_first else (x, xl, w_, wl)
        ys.append(m.sum([m.contract(*operands, m.precision)]))
    return ys


def backward(
    group: Group,
    x: jax.Array,
    g: Sequence[jax.Array],
    dh: Sequence[jax.Array],
    a: Sequence[jax.Array],
    w: Sequence,
) -> jax.Array:
    """[g_1, …, s·g_1·B_1ᵀ, …]·[W_1, …, A_1, …]ᵀ, the gradient of x: one product for all members."""
    gl = (*group.hl[:-1], JOINED)
    gs, ws, wl = [], [], ()
    for m, g_, w_ in zip(group.members, g, w):
        free = tuple(d for d in m.out if d not in group.xl)
        g_, own = _as_one(g_, m.out, free)  # (T, out)
        gs.append(_placed(g_, own, gl, ()))
        w_, own = _as_one(_read(w_), m.wl, free)  # (in, out)
        wl = wl or own
        ws.append(_placed(w_, own, wl, ()))
    al = _with_ranks(wl)
    a = [_placed(cast(v, x.dtype), group.al, al, ws[0].shape) for v in a]
    # (T, Σout + Σr) · (Σout + Σr, in)
    left = lax.concatenate([*gs, *dh], len(gl) - 1)
    right = lax.concatenate([*ws, *a], wl.index(JOINED))
    return gradient(left, gl, right, wl, group.xl, x, group.members[0].precision)


def _read(w: Any) -> jax.Array:
    return _value(w) if is_waiting(w) else w


_value = jax.jit(value, inline=compat.INLINED)  # weights that are alike share a trace


def _as_one(x: jax.Array, xl: Labels, axes: Labels) -> tuple[jax.Array, Labels]:
    """x with these axes as one; in their place, where they lie side by side, else in front."""
    xl, n = tuple(xl), len(axes)
    at = xl.index(axes[0]) if axes else 0
    if xl[at : at + n] != axes:
        own = (*axes, *(d for d in xl if d not in axes))
        x, xl, at = in_order(x, xl, own), own, 0
    shape = (*x.shape[:at], math.prod(x.shape[at : at + n]), *x.shape[at + n :])
    return lax.reshape(x, shape), (*xl[:at], JOINED, *xl[at + n :])


def _with_ranks(labels: Labels) -> Labels:
    return tuple(RANK if d == JOINED else d for d in labels)


def _placed(x: jax.Array, have: Labels, out: Labels, shape: Sequence[int]) -> jax.Array:
    """x with its axes in the order of `out`, constant along those that it lacks: their sizes are in
    `shape`."""
    size = dict(zip(have, x.shape))
    return along(x, have, out, [size[d] if d in size else shape[i] for i, d in enumerate(out)])
