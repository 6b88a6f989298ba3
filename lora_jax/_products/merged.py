"""The merged plan: products with W + s·A·B, one merged weight at a time.

Shapes: input (T, in) or, for a gradient, (T, out); W (in, out), A (in, r), B (r, out).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from jax import lax

from lora_jax._core.einsum import Labels, along, cast, contract, times, wide
from lora_jax._core.order import ordered
from lora_jax._products.group import Group, Member
from lora_jax._products.plan import AWARE
from lora_jax._quantized.waiting import value


def through_merged(
    group: Group,
    inputs: Sequence[jax.Array],
    a: Sequence[jax.Array],
    b: Sequence[jax.Array],
    w: Sequence,
    product: Callable[[Member, jax.Array, jax.Array], jax.Array],
) -> list[jax.Array]:
    """product(member, input, W + s·A·B) of each member.

    Each waits for the result of the one before, and the first for its input: no scheduler can form
    the merged weights of many layers ahead of their use, or keep those of the forward pass for the
    backward.
    """
    outs: list = []
    for m, x, w_, a_, b_ in zip(group.members, inputs, w, a, b):
        last = outs[-1] if outs else x
        # It is A, or the codes, that wait: small arrays. No copy of W is made for the barrier.
        a_, w_ = ordered(last, a_), value(w_, last)
        holds = group.plan.infer == AWARE
        outs.append(product(m, x, w_ if holds else _merged_weight(group.al, m, w_, a_, b_)))
    return outs


def _merged_weight(al: Labels, m: Member, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """W + s·A·B, added in fp32 (or wider) and rounded once."""
    dtype = wide(w.dtype)
    # Along an axis that neither factor has, such as a broadcast one, the update is constant.
    have = tuple(d for d in m.wl if d in al or d in m.bl)
    a, b = times(cast(a, dtype), m.scale), cast(b, dtype)
    update = contract(a, al, b, m.bl, have, precision=lax.Precision.HIGHEST)
    return cast(lax.add(cast(w, dtype), along(update, have, m.wl, w.shape)), w.dtype)
