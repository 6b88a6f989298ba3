"""The rules of the primitives that move or scale a weight: its factors are carried along.

Along the axes that a factor has it goes through what the weight goes through; it has no others. For
W (in, out) with A (in, r) and B (r, out), out as (heads, size) reshapes B alone: (r, heads, size).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from lora_jax._core import compat
from lora_jax._core.geometry import RANK, Factor, spec_along
from lora_jax._interpret.rule import (
    BOTH,
    GAIN,
    Base,
    Context,
    Equation,
    Rule,
    alone,
    every,
    read_first,
)
from lora_jax._nodes.weight import AdaptedWeight, Followed, Probe, is_weight, origins


def _transpose(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed:
    # Labels change, and the factors' arrays stay as they are.
    return w.relabelled(base(), {old: new for new, old in enumerate(eqn.params["permutation"])})


def _squeeze(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed:
    gone = eqn.params["dimensions"]  # of size 1: what is left of an index or a slice
    kept = [d for d in range(w.ndim) if d not in gone]
    stacked = {axis for d in gone for axis in w.axes[d]}
    return w.relabelled(base(), {old: new for new, old in enumerate(kept)}, stacked)


def _broadcast_in_dim(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed:
    shape, to = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    # An axis of size 1 that is repeated is none of the factors' any more: they are constant there.
    return w.relabelled(base(), {d: to[d] for d in range(w.ndim) if w.shape[d] == shape[to[d]]})


def _slice(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed:
    p = eqn.params
    strides = p["strides"] or (1,) * w.ndim

    def move(f: Factor) -> Factor:
        # (start, limit, stride) of each axis: from 0 to r by 1 along the rank, all of it.
        own = [*zip(p["start_indices"], p["limit_indices"], strides)]
        return f.map(lax.slice, *zip(*((0, f.size(d), 1) if d < 0 else own[d] for d in f.dims)))

    return w.moved(base(), move)


def _rev(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed:
    flipped = eqn.params["dimensions"]
    own = lambda f: [i for i, d in enumerate(f.dims) if d in flipped]
    return w.moved(base(), lambda f: f.map(lax.rev, own(f)))


def _convert(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed | str:
    # The factors keep their own precision; the contraction casts them to its operand's. A cast to
    # integers rounds the sum W + A·B, and so needs it.
    dtype = eqn.params["new_dtype"]
    return w.with_base(base()) if jnp.issubdtype(dtype, jnp.inexact) else f"it becomes {dtype}"


def _identity(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed:
    return w.with_base(base())


def _neg(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed:
    return w.scaled(base(), lambda a: -a)


def _stop_gradient(ctx: Context, eqn: Equation, args: Sequence) -> list:
    (w,) = args
    base = ctx.bind(eqn, [w.base])[0]
    if w.stopped:  # the program freezes the parameter: the adapter trains
        return [w.with_base(base)]
    # A target, a straight-through estimator, rows that were looked up: a constant to the gradient.
    return [w.moved(base, lambda f: f.map(lax.stop_gradient))]


def _mul(ctx: Context, eqn: Equation, args: Sequence) -> list | str:
    """By a scalar, or along axes of one factor: exact on that factor as well."""
    by = 0 if is_weight(args[1]) else 1
    if is_weight(args[by]):  # of two weights the one that is a vector along the other
        axes = [ctx.body.varies(v) for v in eqn.invars]
        by = 0 if axes[0] < axes[1] else 1
        # A proper subset: a vector along the other, or a scalar.
        if not axes[by] < axes[1 - by]:
            return "it is a product of two weights"
    op = lambda f, c: f * lax.convert_element_type(c, f.dtype)
    return _times(ctx, eqn, args[1 - by], args, by, op)


def _div(ctx: Context, eqn: Equation, args: Sequence) -> list | str:
    if is_weight(args[1]):
        return "it divides"
    w, _ = args
    return _times(ctx, eqn, w, args, 1, lambda f, c: f / lax.convert_element_type(c, f.dtype))


def _times(
    ctx: Context, eqn: Equation, w: Followed, args: Sequence, by: int, op: Callable
) -> list | str:
    if jnp.issubdtype(eqn.invars[by].aval.dtype, jnp.complexfloating):
        return "it is scaled by complex numbers"
    moved = spread_to(w, eqn.outvars[0].aval.shape)
    if moved is None:
        return REPEATED
    if isinstance(w, Probe) and ctx.body.leaves_of(eqn.invars[by]) & {*origins(w)}:
        return "it is scaled by what is made of it"  # no linear map
    c = ctx.materialise(args[by], eqn) if is_weight(args[by]) else args[by]
    # The operands in their order, with the factor c and the weight's base.
    base = ctx.bind(eqn, [c if i == by else x.base for i, x in ((0, args[0]), (1, args[1]))])[0]
    out = scaled_along(moved, base, c, ctx.body.varies(eqn.invars[by]), op)
    return out if isinstance(out, str) else [out]


REPEATED = "it is repeated along a new axis there"


def scaled_along(
    w: Followed, base: Any, c: jax.Array, dims: Collection[int], op: Callable
) -> Followed | str:
    """The weight times `c`, which varies along `dims` alone; op(factor, c) does it to a factor."""
    dims = {*dims, *(d for d, n in enumerate(jnp.shape(c)) if n == 0)}  # without a first element
    if jnp.ndim(c) and w.ndim:  # what c is along each other axis is in its first element
        where = compat.explicit_sharding(c)
        if where is not None:  # each device has a first element
            spec = spec_along(tuple(d if d in dims else RANK for d in range(c.ndim)), where.spec)
            c = jax.sharding.reshard(c, where.update(spec=spec))
        at = [slice(None) if d in dims else slice(1) for d in range(c.ndim)]
        c = lax.squeeze(c[tuple(at)], [d for d in range(c.ndim) if d not in dims])
    if not dims:
        return w.scaled(base, lambda f: op(f, c))
    if not isinstance(w, AdaptedWeight):
        # A probe: a scale along all axes of the leaf at once would be in neither factor.
        own = {d for d, n in enumerate(w.shape) if n != 1 and w.axes[d]}
        return f"it is scaled {BOTH}" if own <= {*dims} else w.with_base(base)
    both = {*w.a.dims, *w.b.dims}
    new = [d for d in dims if d not in both]
    # A factor that has all of `dims`, or lacks only such as the other lacks too.
    fits = [n for n in "ab" if all(w.parts[n].has(d) or d in new for d in dims)]
    if not fits:
        return f"it is scaled {BOTH}"
    name = fits[0]
    order = sorted(dims)

    def along(f: Factor) -> Factor:
        f = f.spread({d: w.shape[d] for d in new})
        at = [d for d in f.dims if d in order]
        # c lies in the order of `dims`, sorted; the factor's axes may stand in another.
        c_ = lax.transpose(c, [order.index(d) for d in at])
        c_ = lax.broadcast_in_dim(c_, f.value.shape, [*map(f.dims.index, at)])
        return f.map(op, compat.lying_as(c_, f.value))

    moved: dict[str, Any] = {name: along(w.parts[name])}
    out = dataclasses.replace(w, base=base, **moved)
    # Rows lie as B does. Where A is scaled, they are multiplied by it later.
    rows = along(w.rows) if w.rows is not None and name == "b" else w.rows
    return dataclasses.replace(out, rows=rows)


def spread_to(w: Followed, shape: Sequence[int]) -> Followed | None:
    """The weight as it is used in an operation with arrays of `shape`, where an axis of size 1 is
    repeated; without its base."""
    if w.ndim != len(shape):
        return None
    if tuple(w.shape) == tuple(shape):
        return w
    label = {d: d for d, n in enumerate(w.shape) if n == shape[d]}
    return w.relabelled(jax.ShapeDtypeStruct(shape, w.dtype), label)


def _split(ctx: Context, eqn: Equation, args: Sequence) -> list:
    (w,), dim = args, eqn.params["axis"]
    ends = [0, *itertools.accumulate(map(int, eqn.params["sizes"]))]
    part = lambda base, *at: w.moved(base, lambda f: f.cut(dim, *at))
    return [*map(part, ctx.bind(eqn, [w.base]), ends, ends[1:])]


def _unstack(ctx: Context, eqn: Equation, args: Sequence) -> list:
    (w,), dim = args, eqn.params["axis"]
    stacked = set(w.axes[dim])
    label = {d: d - (d > dim) for d in range(w.ndim) if d != dim}

    def one(base: Any, i: int) -> Followed:
        part = w.moved(w.base, lambda f: f.cut(dim, i, i + 1))
        return part.relabelled(base, label, stacked)

    return [one(base, i) for i, base in enumerate(ctx.bind(eqn, [w.base]))]


def _pad(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed | str:
    config: dict[int, Any] = {
        d: tuple(map(int, c)) for d, c in enumerate(eqn.params["padding_config"])
    }
    padded = [d for d, c in config.items() if any(c)]
    if not isinstance(w, AdaptedWeight):
        return w.with_base(base())
    if w.gain is not None:
        return GAIN
    # What is padded has no update: one factor at least must be zero there.
    new = {d: w.shape[d] for d in padded if not w.a.has(d) and not w.b.has(d)}
    w = dataclasses.replace(w, a=w.a.spread(new))
    out = w.moved(base(), lambda f: f.padded(config))
    # Beside a row there is what it is padded with, and not the row's.
    return out if all(map(w.a.has, padded)) else dataclasses.replace(out, rows=None)


def _tile(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed:
    reps = eqn.params["reps"]
    own = lambda f: [1 if d < 0 else reps[d] for d in f.dims]
    return w.moved(base(), lambda f: f.map(lax.tile, own(f)))


def _barrier(ctx: Context, eqn: Equation, args: Sequence) -> list:
    # Over base and factors, so that what is made of either waits as the program says.
    leaves, treedef = jax.tree.flatten(args)
    return jax.tree.unflatten(treedef, lax.optimization_barrier(leaves))


def _sharding_constraint(ctx: Context, eqn: Equation, args: Sequence) -> list:
    (w,), sharding = args, eqn.params["sharding"]
    base = ctx.bind(eqn, [w.base])[0]
    if not isinstance(sharding, NamedSharding):
        return [w.with_base(base)]
    return [_along(w, base, sharding, lax.with_sharding_constraint)]


def _reshard(ctx: Context, eqn: Equation, args: Sequence) -> list | str:
    (w,), where = args, eqn.params["dst_sharding"]
    if getattr(where.spec, "unreduced", None):
        return "it becomes one of the terms of a sum over devices"
    # `reduced` is for the gradient of the weight, which is frozen.
    where = where.update(spec=spec_along(tuple(range(w.ndim)), where.spec))
    eqn = eqn.replace(params=eqn.params | {"dst_sharding": where})
    base = ctx.bind(eqn, [w.base])[0]
    return [_along(w, base, where, jax.sharding.reshard)]


def _along(w: Followed, base: Any, sharding: NamedSharding, place: Callable) -> Followed:
    """The weight on its new base, each factor placed along the axes that it shares with it."""

    own = lambda f: NamedSharding(sharding.mesh, spec_along(f.dims, sharding.spec))
    return w.moved(base, lambda f: f.map(place, own(f)))


def _all_gather(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed | str:
    p = eqn.params
    dim = p["all_gather_dimension"]
    # Untiled it adds an axis for the devices, and groups gather parts.
    if not p["tiled"] or p["axis_index_groups"] is not None:
        return "it is gathered by groups, or along a new axis"

    def move(f: Factor) -> Factor:
        if not f.has(dim):  # each device has all of it
            return f
        at = f.dims.index(dim)
        return f.map(lambda x: lax.all_gather(x, p["axis_name"], axis=at, tiled=True))

    return w.moved(base(), move)


def _pvary(eqn: Equation, w: Followed, base: Base, rest: Sequence) -> Followed:
    axes = eqn.params["axes"] if "axes" in eqn.params else eqn.params["axis_name"]
    return w.moved(base(), lambda f: f.map(compat.vary, axes))


RULES: dict[str, Rule] = {
    "transpose": every(alone(_transpose), moves=True),
    "squeeze": every(alone(_squeeze), moves=True),
    "broadcast_in_dim": every(alone(_broadcast_in_dim), moves=True),
    "slice": every(alone(_slice), moves=True),
    "rev": read_first(alone(_rev)),
    "convert_element_type": every(alone(_convert), moves=True),
    **dict.fromkeys(("copy", "copy_p", "name"), every(alone(_identity), moves=True)),
    "device_put": read_first(alone(_identity)),
    "neg": read_first(alone(_neg), moves=True),
    "mul": read_first(_mul, moves=True),
    "div": read_first(_div, moves=True),
    "stop_gradient": every(_stop_gradient, moves=True),
    "reduce_precision": read_first(alone(_identity), moves=True),
    "split": read_first(_split, moves=True),
    "unstack": read_first(_unstack, moves=True),
    "pad": read_first(alone(_pad)),
    "tile": read_first(alone(_tile), moves=True),
    "optimization_barrier": read_first(_barrier),
    "sharding_constraint": every(_sharding_constraint, moves=True),
    "reshard": every(_reshard),
    "all_gather": every(alone(_all_gather)),
    **dict.fromkeys(("pvary", "pcast"), read_first(alone(_pvary))),
}
