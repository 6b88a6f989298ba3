"""The rules of the primitives that move or scale a weight: its factors are carried along."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from lora_jax._core import compat
from lora_jax._core.einsum import times
from lora_jax._core.geometry import RANK, Factor, blocks_of, spec_along
from lora_jax._interpret.rule import Context, Equation, Function, Rule, every, read_first
from lora_jax._nodes.weight import Followed, is_weight, origins

Base: TypeAlias = Callable[[], Any]  # makes what the primitive makes of the base


def _alone(fn: Callable[[Equation, Followed, Base, Sequence], Followed | None]) -> Function:
    """The rule of a primitive whose first operand alone is a weight: fn(eqn, w, base, rest)."""

    def whole(ctx: Context, eqn: Equation, args: Sequence) -> list | None:
        w, *rest = args
        if not is_weight(w) or any(map(is_weight, rest)):
            return None
        out = fn(eqn, w, lambda: ctx.bind(eqn, [w.base, *rest])[0], rest)
        return None if out is None else [out]

    return whole


def _transpose(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed | None:
    return w.relabelled(base(), {old: new for new, old in enumerate(eqn.params["permutation"])})


def _squeeze(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed | None:
    gone = eqn.params["dimensions"]  # of size 1: what is left of an index or a slice
    kept = [d for d in range(w.ndim) if d not in gone]
    stacked = {axis for d in gone for axis in w.axes[d]}
    return w.relabelled(base(), {old: new for new, old in enumerate(kept)}, stacked)


def _broadcast_in_dim(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed | None:
    shape, to = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    # An axis of size 1 that is repeated is none of the factors' any more: they are constant there.
    return w.relabelled(base(), {d: to[d] for d in range(w.ndim) if w.shape[d] == shape[to[d]]})


def _reshape(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed | None:
    if eqn.params["dimensions"] is not None:  # it transposes as well
        return None
    new_shape = eqn.params["new_sizes"]
    blocks = blocks_of(w.shape, new_shape)
    if blocks is None:
        return None
    if not all(_reshapeable(f, w.shape, old) for f in w.parts.values() for old, _ in blocks):
        return None
    axes: list[tuple[int, ...]] = [()] * len(new_shape)
    for old, new in blocks:  # (8, 2, 4) to (8, 8): [((0,), (0,)), ((1, 2), (1,))]
        merged = tuple(dict.fromkeys(axis for d in old for axis in w.axes[d]))
        for d in new:
            axes[d] = merged
    return w.moved(base(), lambda f: _reshape_factor(f, w.shape, new_shape, blocks), axes)


# A block is reshaped in one factor and absent from the other, or in both: an in axis that is merged
# with an out axis would be neither's.


def _runs_along(f: Factor, shape: Sequence[int], old: Sequence[int]) -> bool:
    return any(f.has(d) and shape[d] > 1 for d in old)


def _reshapeable(f: Factor, shape: Sequence[int], old: Sequence[int]) -> bool:
    big = [d for d in old if shape[d] > 1]
    return len({f.has(d) for d in big}) <= 1


def _reshape_factor(
    f: Factor, shape: Sequence[int], new_shape: Sequence[int], blocks: Sequence
) -> Factor:
    f = f.sorted(rank_first=f.dims[0] == RANK)
    # The rank stays first or last, where it was: between axes that are merged it could not.
    dims = [d for old, new in blocks if _runs_along(f, shape, old) for d in new]
    sizes = [new_shape[d] for d in dims]
    rank = f.value.shape[f.dims.index(RANK)]
    if f.dims[0] == RANK:
        return Factor(lax.reshape(f.value, [rank, *sizes]), (RANK, *dims))
    return Factor(lax.reshape(f.value, [*sizes, rank]), (*dims, RANK))


def _slice(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed | None:
    p = eqn.params
    strides = p["strides"] or (1,) * w.ndim

    def move(f: Factor) -> Factor:
        start, limit, step = (
            [r if d == RANK else q[d] for d in f.dims]
            for q, r in ((p["start_indices"], 0), (p["limit_indices"], f.size(RANK)), (strides, 1))
        )
        return Factor(lax.slice(f.value, start, limit, step), f.dims)

    return w.moved(base(), move, w.axes)


def _dynamic_slice(eqn: Equation, w: Followed, base: Base, starts: Sequence) -> Followed | None:
    sizes = eqn.params["slice_sizes"]

    def move(f: Factor) -> Factor:
        at = [jnp.zeros_like(starts[0]) if d == RANK else starts[d] for d in f.dims]
        size = [f.size(RANK) if d == RANK else sizes[d] for d in f.dims]
        return Factor(lax.dynamic_slice(f.value, at, size), f.dims)

    return w.moved(base(), move, w.axes)


def _rev(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed | None:
    flipped = eqn.params["dimensions"]

    def move(f: Factor) -> Factor:
        return Factor(lax.rev(f.value, [i for i, d in enumerate(f.dims) if d in flipped]), f.dims)

    return w.moved(base(), move, w.axes)


def _convert(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed | None:
    # The factors keep their own precision; the contraction casts them to its operand's.
    return w.with_base(base()) if jnp.issubdtype(eqn.params["new_dtype"], jnp.inexact) else None


def _identity(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed | None:
    return w.with_base(base())


def _neg(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed | None:
    return w.scaled(base(), lambda a: -a)


def _mul(ctx: Context, eqn: Equation, args: Sequence) -> list | None:
    """By a scalar: exact on the factors as well."""
    w, c = args if is_weight(args[0]) else args[::-1]
    if is_weight(c) or jnp.ndim(c) != 0 or jnp.iscomplexobj(c):
        return None
    base = ctx.bind(eqn, [x.base if is_weight(x) else x for x in args])[0]
    return [w.scaled(base, lambda a: a * lax.convert_element_type(c, a.dtype))]


def _div(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed | None:
    if jnp.ndim(rest[0]) != 0 or jnp.iscomplexobj(rest[0]):
        return None
    return w.scaled(base(), lambda a: a / lax.convert_element_type(rest[0], a.dtype))


def _concatenate(ctx: Context, eqn: Equation, args: Sequence) -> list | None:
    """Side by side: the ranks add up, [A₁ A₂ …] times a B that is zero outside each one's part."""
    dim = eqn.params["dimension"]
    weights = [w for w in args if is_weight(w)]
    out, first = _side_by_side(ctx, eqn, args), weights[0]
    if out is None or any(w.dropout != first.dropout for w in weights):
        return None
    if not all(
        {*w.a.dims} == {*first.a.dims} and {*w.b.dims} == {*first.b.dims} for w in weights
    ) or not (first.a.has(dim) or first.b.has(dim)):
        return None
    gains = [w.gain for w in weights if w.gain is not None]
    if any({*g.dims} != {*gains[0].dims} or not g.has(dim) for g in gains):
        return None
    a, b, gain, start = [], [], [], 0
    for w in args:
        stop = start + w.shape[dim]
        if is_weight(w):
            around = (start, out.shape[dim] - stop)  # how much of the result is not this weight
            a.append(_padded(w.a.order(first.a.dims), dim, around, w.scale))
            b.append(_padded(w.b.order(first.b.dims), dim, around, 1.0))
            if w.gain is not None:
                gain.append(_padded(w.gain.order(gains[0].dims), dim, around, 1.0))
        start = stop
    a, b = (
        Factor(lax.concatenate(values, f.dims.index(RANK)), f.dims)
        for f, values in ((first.a, a), (first.b, b))
    )
    gain = Factor(functools.reduce(lax.add, gain), gains[0].dims) if gains else None
    return [dataclasses.replace(out, a=a, b=b, gain=gain, rows=None, scale=1.0)]


def _concatenate_probes(ctx: Context, eqn: Equation, args: Sequence) -> list | None:
    out = _side_by_side(ctx, eqn, args)
    return None if out is None else [dataclasses.replace(out, a=None)]


def _side_by_side(ctx: Context, eqn: Equation, args: Sequence) -> Any:
    """The first weight with the base and the origins of all, if they came the same way."""
    weights = [w for w in args if is_weight(w)]
    if len({(w.axes, w.stacked, w.indexed) for w in weights}) > 1:
        return None
    base = ctx.bind(eqn, [w.base if is_weight(w) else w for w in args])[0]
    return dataclasses.replace(weights[0], base=base, origin=origins(*weights))


def _padded(f: Factor, dim: int, around: tuple[int, int], scale: float) -> jax.Array:
    value = times(f.value, scale)
    if not f.has(dim):
        return value
    zero = jnp.zeros((), value.dtype)
    ends = (around if d == dim else (0, 0) for d in f.dims)
    return lax.pad(value, zero, [(low, high, 0) for low, high in ends])


def _barrier(ctx: Context, eqn: Equation, args: Sequence) -> list | None:
    # Over base and factors, so that what is made of either waits as the program says.
    leaves, treedef = jax.tree.flatten(args)
    return jax.tree.unflatten(treedef, lax.optimization_barrier(leaves))


def _sharding_constraint(ctx: Context, eqn: Equation, args: Sequence) -> list | None:
    (w,), sharding = args, eqn.params["sharding"]
    base = ctx.bind(eqn, [w.base])[0]
    if not isinstance(sharding, NamedSharding):
        return [w.with_base(base)]

    return [_along(w, base, sharding, lax.with_sharding_constraint)]


def _reshard(ctx: Context, eqn: Equation, args: Sequence) -> list | None:
    (w,) = args
    base = ctx.bind(eqn, [w.base])[0]
    return [_along(w, base, eqn.params["dst_sharding"], jax.sharding.reshard)]


def _along(w: Followed, base: Any, sharding: NamedSharding, place: Callable) -> Followed:
    """The weight on its new base, each factor placed along the axes that it shares with it."""

    def move(f: Factor) -> Factor:
        own = NamedSharding(sharding.mesh, spec_along(f.dims, sharding.spec))
        return Factor(place(f.value, own), f.dims)

    return w.moved(base, move, w.axes)


def _all_gather(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed | None:
    p = eqn.params
    dim = p["all_gather_dimension"]
    if not p["tiled"] or p["axis_index_groups"] is not None:
        return None

    def move(f: Factor) -> Factor:
        if not f.has(dim):  # each device has all of it
            return f
        return Factor(
            lax.all_gather(f.value, p["axis_name"], axis=f.dims.index(dim), tiled=True), f.dims
        )

    return w.moved(base(), move, w.axes)


def _pvary(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed | None:
    axes = eqn.params["axes"] if "axes" in eqn.params else eqn.params["axis_name"]
    return w.moved(base(), lambda f: Factor(compat.vary(f.value, axes), f.dims), w.axes)


RULES: dict[str, Rule] = {
    "transpose": every(_alone(_transpose), moves=True),
    "squeeze": every(_alone(_squeeze), moves=True),
    "broadcast_in_dim": every(_alone(_broadcast_in_dim), moves=True),
    "reshape": every(_alone(_reshape), moves=True),
    "slice": every(_alone(_slice), moves=True),
    "dynamic_slice": read_first(_alone(_dynamic_slice)),
    "rev": read_first(_alone(_rev)),
    "convert_element_type": every(_alone(_convert), moves=True),
    "copy": every(_alone(_identity), moves=True),
    "copy_p": every(_alone(_identity), moves=True),
    "name": every(_alone(_identity), moves=True),
    "device_put": read_first(_alone(_identity)),
    "neg": read_first(_alone(_neg), moves=True),
    "mul": read_first(_mul, moves=True),
    "div": read_first(_alone(_div), moves=True),
    "concatenate": Rule(_concatenate, _concatenate_probes),
    "optimization_barrier": read_first(_barrier),
    "sharding_constraint": every(_sharding_constraint, moves=True),
    "reshard": every(_reshard),
    "all_gather": every(_alone(_all_gather)),
    "pvary": read_first(_alone(_pvary)),
    "pcast": read_first(_alone(_pvary)),
}
