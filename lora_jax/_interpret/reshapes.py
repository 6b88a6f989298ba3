"""The rules of the primitives that make axes one, or sum over them.

An axis of one factor is reshaped or summed in that factor. One of both, of a stack of weights, is
first made part of the rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax._core import compat
from lora_jax._core.einsum import times
from lora_jax._core.geometry import PART, RANK, Factor, blocks_of
from lora_jax._interpret.rule import BOTH, GAIN, Base, Equation, Rule, alone, every, read_first
from lora_jax._nodes.weight import AdaptedWeight, Followed, Probe
from lora_jax._quantized.waiting import value

_NEW = -9  # a label for the time being


def _reshape(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed | jax.Array | str:
    new_shape, order = eqn.params["new_sizes"], eqn.params["dimensions"]
    if 0 in new_shape:  # without elements there is no update, and no telling which axis is which
        return value(base())
    if order is not None:  # a transpose first, as vmap makes of a convolution's kernel
        shape = jax.ShapeDtypeStruct([w.shape[d] for d in order], w.dtype)
        w = w.relabelled(shape, {old: new for new, old in enumerate(order)})
    blocks = blocks_of(w.shape, new_shape)
    if blocks is None:
        return f"from {w.shape} to {new_shape} no axes are joined or split whole"
    if isinstance(w, AdaptedWeight):
        w = _one_sided(_with_repeats(w, blocks), blocks)
    if not all(_reshapeable(f, w.shape, old) for f in w.parts.values() for old, _ in blocks):
        return "it joins an axis of one factor with an axis that it lacks and the other has"
    axes: list[tuple[int, ...]] = [()] * len(new_shape)
    for old, new in blocks:  # (8, 2, 4) to (8, 8): [((0,), (0,)), ((1, 2), (1,))]
        merged = tuple(dict.fromkeys(axis for d in old for axis in w.axes[d]))
        for d in new:
            axes[d] = merged
    return w.moved(base(), lambda f: _reshape_factor(f, w.shape, new_shape, blocks), axes)


# A block is reshaped in one factor and absent from the other, or in both: an in axis that is merged
# with an out axis would be neither's.


def _with_repeats(w: AdaptedWeight, blocks: Sequence) -> AdaptedWeight:
    """The weight with each repeated axis, which neither factor has, given to the factors that have
    another axis of its block."""
    a, b = w.a, w.b

    def move(f: Factor) -> Factor:
        for old, _ in blocks:
            big = [d for d in old if w.shape[d] != 1]
            if any(map(f.has, big)):
                f = f.spread({d: w.shape[d] for d in big if not (a.has(d) or b.has(d))})
        return f

    return w.moved(w.base, move)


def _one_sided(w: AdaptedWeight, blocks: Sequence) -> AdaptedWeight:
    """The weight with the axes of a stack, and those that come from none of the leaf, in the one
    factor alone that has the rest of their block."""
    for old, _ in blocks:
        big = {d for d in old if w.shape[d] != 1}
        free = {d for d in big if (w.a.has(d) and w.b.has(d)) or not w.axes[d]}
        keep = [n for n in "ab" if big - free <= {*w.parts[n].dims}]
        if not all(_reshapeable(f, w.shape, old) for f in (w.a, w.b)) and free and keep:
            for d in sorted(free):
                w = only_in(w, d, keep[-1])
    return w


def only_in(w: AdaptedWeight, d: int, keep: str | None) -> AdaptedWeight:
    """The weight with its axis d in the factor `keep` alone, or, summed over d, in none of them.

    The rank is as many times larger: Σ_r A[d,r]·B[d,r] = Σ_(e,r) A[e,r]·(1 where d = e)·B[e,r].
    """
    n = w.shape[d]
    into = PART if w.drops and w.seed is not None and w.seed.has(d) else RANK

    def move(name: str, f: Factor) -> Factor:
        f = _whole(f.spread({d: n}), d)
        if name != keep:
            return f.within(d, into)
        # (n, *f): e in front, and zero where d is not e
        same = lax.broadcast_in_dim(
            jnp.eye(n, dtype=bool), (n, *f.value.shape), (0, f.dims.index(d) + 1)
        )
        value = jnp.where(same, f.value[None], jnp.zeros((), f.value.dtype))
        return Factor(value, (_NEW, *f.dims)).within(_NEW, into)

    seed = w.seed.within(d, PART) if w.seed is not None and into == PART else w.seed
    return dataclasses.replace(w, a=move("a", w.a), b=move("b", w.b), seed=seed, rows=None)


def _whole(f: Factor, d: int) -> Factor:
    """The factor with all of axis d, which is to be merged, on every device."""
    where = compat.explicit_sharding(f.value)
    if where is None:
        return f
    spec = PartitionSpec(*(None if e == d else s for e, s in zip(f.dims, where.spec)))
    return f.map(jax.sharding.reshard, where.update(spec=spec))


def _reshapeable(f: Factor, shape: Sequence[int], old: Sequence[int]) -> bool:
    # All of the block's axes, or none; those of size 1 say nothing.
    big = [d for d in old if shape[d] != 1]
    return len({f.has(d) for d in big}) <= 1


def _reshape_factor(
    f: Factor, shape: Sequence[int], new_shape: Sequence[int], blocks: Sequence
) -> Factor:
    f = f.sorted(rank_first=f.dims[0] == RANK)
    # The rank stays first or last, where it was: between axes that are merged it could not.
    has = lambda old: any(f.has(d) and shape[d] != 1 for d in old)
    dims = [d for old, new in blocks if has(old) for d in new]
    # Slots, in front of the weight's own axes, are no part of it either.
    at = [i for i, d in enumerate(f.dims) if d >= 0] or [len(f.dims)]
    dims = [*f.dims[: at[0]], *dims, *f.dims[at[-1] + 1 :]]
    return Factor(
        lax.reshape(f.value, [f.size(d) if d < 0 else new_shape[d] for d in dims]), (*dims,)
    )


def _reduce_sum(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed | str:
    """A sum along axes of one factor is that of the factor."""
    gone = eqn.params["axes"]
    kept = [d for d in range(w.ndim) if d not in gone]
    # The axes that are left, renumbered.
    label = {d: i for i, d in enumerate(kept)}
    if isinstance(w, Probe) and not any(w.axes[d] for d in gone):  # of repeats, or of a stack
        return dataclasses.replace(w, a=None).relabelled(base(), label)
    if not isinstance(w, AdaptedWeight) or w.indexed:
        return "it is summed"
    if w.gain is not None:
        return GAIN
    # Along an axis that neither factor has the update repeats: the sum is a multiple of it.
    many = math.prod(w.shape[d] for d in gone if not w.a.has(d) and not w.b.has(d))
    for d in gone:
        if w.a.has(d) and w.b.has(d):  # a stack of weights: its sum has all of their ranks
            w = only_in(w, d, None)
    if {d for d in gone if w.a.has(d)} and {d for d in gone if w.b.has(d)}:
        return f"it is summed {BOTH}"

    def move(f: Factor) -> Factor:
        value = jnp.sum(f.value, [i for i, d in enumerate(f.dims) if d in gone])
        return Factor(value, tuple(label.get(d, d) for d in f.dims if d not in gone))

    out = dataclasses.replace(w, rows=None).moved(
        base(), move, [w.axes[d] for d in kept], {axis for d in gone for axis in w.axes[d]}
    )
    # On A alone, as A·B is linear in it.
    return dataclasses.replace(out, a=out.a.map(times, float(many)))


RULES: dict[str, Rule] = {
    "reshape": every(alone(_reshape), moves=True),
    "reduce_sum": read_first(alone(_reduce_sum)),
}
