"""One rule per primitive that moves a weight: the factors are carried along with it.

A rule is `rule(ctx, eqn, args) -> outputs | None`. At least one of `args` is an AdaptedWeight. None
means that the weight cannot stay in factors here: the interpreter materialises it, visibly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from lora_jax._core import compat
from lora_jax._core.einsum import times
from lora_jax._core.geometry import RANK, Factor, spec_along
from lora_jax._nodes.weight import AdaptedWeight, is_weight, origins

RULES: dict[str, Callable] = {}


def rule(*names: str):
    def register(fn):
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


def _shape_rule(*names: str):
    """A rule for primitives whose first operand alone is a weight: fn(ctx, eqn, w, base, args)."""

    def register(fn):
        def whole(ctx, eqn, args):
            w, *rest = args
            if not is_weight(w) or any(map(is_weight, rest)):
                return None
            out = fn(eqn, w, lambda: ctx.bind(eqn, [w.base, *rest])[0], rest)
            return None if out is None else [out]

        return rule(*names)(whole)

    return register


@_shape_rule("transpose")
def _transpose(eqn, w, base, rest):
    return w.relabelled(base(), {old: new for new, old in enumerate(eqn.params["permutation"])})


@_shape_rule("squeeze")
def _squeeze(eqn, w, base, rest):
    gone = eqn.params["dimensions"]
    kept = [d for d in range(w.ndim) if d not in gone]
    stacked = {axis for d in gone for axis in w.axes[d]}
    return w.relabelled(base(), {old: new for new, old in enumerate(kept)}, stacked)


@_shape_rule("broadcast_in_dim")
def _broadcast_in_dim(eqn, w, base, rest):
    shape, to = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    return w.relabelled(base(), {d: to[d] for d in range(w.ndim) if w.shape[d] == shape[to[d]]})


@_shape_rule("reshape")
def _reshape(eqn, w, base, rest):
    if eqn.params["dimensions"] is not None:
        return None
    new_shape = eqn.params["new_sizes"]
    blocks = _blocks(w.shape, new_shape)
    if blocks is None:
        return None
    for f in (w.a, w.b, w.gain):
        if f is not None and not all(_reshapeable(f, w.shape, old) for old, _ in blocks):
            return None
    axes: list[tuple[int, ...]] = [()] * len(new_shape)
    for old, new in blocks:
        merged = tuple(dict.fromkeys(axis for d in old for axis in w.axes[d]))
        for d in new:
            axes[d] = merged
    return w.moved(base(), lambda f: _reshape_factor(f, w.shape, new_shape, blocks), axes)


def _blocks(old, new):
    """The smallest groups of adjacent axes of two shapes that hold the same number of elements."""
    if 0 in old or 0 in new:
        return None
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b = i + 1, j + 1
        m = old[i] if i < len(old) else 1
        n = new[j] if j < len(new) else 1
        a, b = min(a, len(old)), min(b, len(new))
        while m != n:
            if m < n:
                m, a = m * old[a], a + 1
            else:
                n, b = n * new[b], b + 1
        blocks.append((tuple(range(i, a)), tuple(range(j, b))))
        i, j = a, b
    return blocks


def _runs_along(f: Factor, shape, old) -> bool:
    return any(f.has(d) and shape[d] > 1 for d in old)


def _reshapeable(f: Factor, shape, old) -> bool:
    big = [d for d in old if shape[d] > 1]
    return len({f.has(d) for d in big}) <= 1


def _reshape_factor(f: Factor, shape, new_shape, blocks) -> Factor:
    f = f.sorted(rank_first=f.dims[0] == RANK)
    dims = [d for old, new in blocks if _runs_along(f, shape, old) for d in new]
    sizes = [new_shape[d] for d in dims]
    rank = f.value.shape[f.dims.index(RANK)]
    if f.dims[0] == RANK:
        return Factor(lax.reshape(f.value, [rank, *sizes]), (RANK, *dims))
    return Factor(lax.reshape(f.value, [*sizes, rank]), (*dims, RANK))


@_shape_rule("slice")
def _slice(eqn, w, base, rest):
    p = eqn.params
    strides = p["strides"] or (1,) * w.ndim

    def move(f):
        start, limit, step = (
            [r if d == RANK else q[d] for d in f.dims]
            for q, r in ((p["start_indices"], 0), (p["limit_indices"], f.size(RANK)), (strides, 1))
        )
        return Factor(lax.slice(f.value, start, limit, step), f.dims)

    return w.moved(base(), move, w.axes)


@_shape_rule("dynamic_slice")
def _dynamic_slice(eqn, w, base, starts):
    sizes = eqn.params["slice_sizes"]

    def move(f):
        at = [jnp.zeros_like(starts[0]) if d == RANK else starts[d] for d in f.dims]
        size = [f.size(RANK) if d == RANK else sizes[d] for d in f.dims]
        return Factor(lax.dynamic_slice(f.value, at, size), f.dims)

    return w.moved(base(), move, w.axes)


@_shape_rule("rev")
def _rev(eqn, w, base, rest):
    flipped = eqn.params["dimensions"]

    def move(f):
        return Factor(lax.rev(f.value, [i for i, d in enumerate(f.dims) if d in flipped]), f.dims)

    return w.moved(base(), move, w.axes)


@_shape_rule("convert_element_type")
def _convert(eqn, w, base, rest):
    # The factors keep their own precision; the contraction casts them to its operand's.
    return w.with_base(base()) if jnp.issubdtype(eqn.params["new_dtype"], jnp.floating) else None


@_shape_rule("copy", "copy_p", "name", "device_put")
def _identity(eqn, w, base, rest):
    return w.with_base(base())


@_shape_rule("neg")
def _neg(eqn, w, base, rest):
    return _scaled(w, base(), lambda a: -a)


@rule("mul")
def _mul(ctx, eqn, args):
    """By a scalar: exact on the factors as well."""
    (w, c) = args if is_weight(args[0]) else args[::-1]
    if is_weight(c) or jnp.ndim(c) != 0:
        return None
    base = ctx.bind(eqn, [x.base if is_weight(x) else x for x in args])[0]
    return [_scaled(w, base, lambda a: a * lax.convert_element_type(c, a.dtype))]


@_shape_rule("div")
def _div(eqn, w, base, rest):
    if jnp.ndim(rest[0]) != 0:
        return None
    return _scaled(w, base(), lambda a: a / lax.convert_element_type(rest[0], a.dtype))


def _scaled(w: AdaptedWeight, base, fn) -> AdaptedWeight:
    a = w.a if w.b is None else Factor(fn(w.a.value), w.a.dims)
    return dataclasses.replace(w, base=base, a=a)


@rule("concatenate")
def _concatenate(ctx, eqn, args):
    """Side by side: the ranks add up, [A₁ A₂ …] times a B that is zero outside each one's part."""
    dim = eqn.params["dimension"]
    weights = [w for w in args if is_weight(w)]
    first = weights[0]
    if any(
        (w.axes, w.stacked, w.indexed, w.dropout, w.is_probe)
        != (first.axes, first.stacked, first.indexed, first.dropout, first.is_probe)
        for w in weights
    ):
        return None
    base = ctx.bind(eqn, [w.base if is_weight(w) else w for w in args])[0]
    out = dataclasses.replace(first, base=base, origin=origins(*weights))
    if first.is_probe:
        return [dataclasses.replace(out, a=None)]
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
            around = (start, base.shape[dim] - stop)
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
    return [dataclasses.replace(out, a=a, b=b, gain=gain, scale=1.0)]


def _padded(f: Factor, dim: int, around, scale: float):
    value = times(f.value, scale)
    if not f.has(dim):
        return value
    zero = jnp.zeros((), value.dtype)
    return lax.pad(value, zero, [(*(around if d == dim else (0, 0)), 0) for d in f.dims])


@rule("optimization_barrier")
def _barrier(ctx, eqn, args):
    leaves, treedef = jax.tree.flatten(args)
    return jax.tree.unflatten(treedef, lax.optimization_barrier(leaves))


@rule("sharding_constraint")
def _sharding_constraint(ctx, eqn, args):
    (w,), sharding = args, eqn.params["sharding"]
    base = ctx.bind(eqn, [w.base])[0]
    if not isinstance(sharding, NamedSharding):
        return [w.with_base(base)]

    return [_along(w, base, sharding, lax.with_sharding_constraint)]


@rule("reshard")
def _reshard(ctx, eqn, args):
    (w,) = args
    base = ctx.bind(eqn, [w.base])[0]
    return [_along(w, base, eqn.params["dst_sharding"], jax.sharding.reshard)]


def _along(w: AdaptedWeight, base, sharding: NamedSharding, place: Callable) -> AdaptedWeight:
    """The weight on its new base, each factor placed along the axes that it shares with it."""

    def move(f):
        own = NamedSharding(sharding.mesh, spec_along(f.dims, sharding.spec))
        return Factor(place(f.value, own), f.dims)

    return w.moved(base, move, w.axes)


@_shape_rule("all_gather")
def _all_gather(eqn, w, base, rest):
    p = eqn.params
    dim = p["all_gather_dimension"]
    if not p["tiled"] or p["axis_index_groups"] is not None:
        return None

    def move(f):
        if not f.has(dim):
            return f
        return Factor(
            lax.all_gather(f.value, p["axis_name"], axis=f.dims.index(dim), tiled=True), f.dims
        )

    return w.moved(base(), move, w.axes)


@_shape_rule("pvary", "pcast")
def _pvary(eqn, w, base, rest):
    axes = eqn.params["axes"] if "axes" in eqn.params else eqn.params["axis_name"]
    return w.moved(base(), lambda f: Factor(compat.vary(f.value, axes), f.dims), w.axes)
