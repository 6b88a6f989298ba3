"""The rule of indexing: rows of a table, or weights of a stack.

Shapes, with indices (T,): a table W (V, d), A (V, r), B (r, d) gives W (T, d), A (T, r), B (r, d);
a stack W (E, d, k), A (E, d, r), B (E, r, k) gives W (T, d, k), A (T, d, r), B (T, r, k).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._core.geometry import Factor
from lora_jax._interpret.rule import INDEX, Context, Equation, Rule, read_first
from lora_jax._nodes.weight import AdaptedWeight, Followed, is_weight


def _gather(ctx: Context, eqn: Equation, args: Sequence) -> list | str:
    """Indexing picks weights from a stack (experts, layers) or rows of a table: both factors are
    looked up, and multiplied where the rows are used."""
    (w, indices), p = args, eqn.params
    dn = p["dimension_numbers"]
    if is_weight(indices):
        return INDEX
    if dn.operand_batching_dims:
        return "each of a stack of weights has its own indices: use jax.lax.map for jax.vmap"
    sizes, start_map = p["slice_sizes"], dn.start_index_map
    # An axis of which all is taken is none that is indexed.
    indexed = tuple(d for d in start_map if sizes[d] < w.shape[d])
    rest = [d for d in range(w.ndim) if d not in dn.collapsed_slice_dims]
    base = ctx.bind(eqn, [w.base, indices])[0]
    axes: list[tuple[int, ...]] = [()] * base.ndim
    # Where the axes that are left lie in the result; its others are those of the indices.
    for old, new in zip(rest, dn.offset_dims):
        axes[new] = w.axes[old]
    taken = tuple(axis for d in indexed for axis in w.axes[d])
    lead = [d for d in range(base.ndim) if d not in dn.offset_dims]
    fixed = ctx.body.constant(eqn.invars[1])  # a permutation, or a choice of the program's own
    if fixed and len(indexed) == len(lead) == 1 and indexed == dn.collapsed_slice_dims:
        axes[lead[0]], taken = taken, ()
    move = lambda f: _gather_factor(f, w, indices, p, base.ndim)
    picked = _masked(w, w.moved(base, move, axes, taken), indices, p)
    return _rows_or_weights(ctx, eqn, w, picked, indexed, rest, fixed)


def _rows_or_weights(
    ctx: Context,
    eqn: Equation,
    w: Followed,
    picked: Followed,
    indexed: Sequence[int],
    rest: Sequence[int],
    fixed: bool,
) -> list:
    """What was picked along the axes `indexed`, which `fixed` indices choose or data.

    It may not be known yet whether these are rows, or weights of a stack. The next use tells: see
    `Interpreter.materialise`.
    """
    if isinstance(w, AdaptedWeight):
        # An index along in or out axes picks rows; along batch axes, which both factors have,
        # weights.
        known = all(f.has(d) for f in (w.a, w.b) for d in indexed)
    else:
        # More than one axis may be a matrix.
        if not fixed and sum(n != 1 for n in eqn.params["slice_sizes"]) <= 1:
            ctx.used(w, eqn, (indexed, rest, ()), name="gather")
            return [picked.base]
        known = False
    taken = {axis for d in indexed for axis in w.axes[d]}
    if known or not taken:
        return [picked]
    return [dataclasses.replace(picked, indexed=tuple({*w.indexed, *taken}))]


def _masked(w: Followed, picked: Followed, indices: jax.Array, p: Mapping[str, Any]) -> Followed:
    """Without an update, and without a gain, where an index is out of bounds along an axis that the
    factors, or the gain, lack: along those that they have, they are filled with zeros."""
    if p["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return picked
    dn, fill = p["dimension_numbers"], p["fill_value"]
    # The last index from which a slice still fits.
    ends = [w.shape[d] - p["slice_sizes"][d] for d in dn.start_index_map]
    batch = tuple(d for d in range(picked.ndim) if d not in dn.offset_dims)

    def mask(name: str, *of: str) -> dict[str, Factor]:
        """What was picked of the part, where nothing is out of bounds along axes that all of `of`
        lack; else 0."""
        f, have = picked.parts.get(name), [w.parts[x] for x in of if x in w.parts]
        loose = [i for i, d in enumerate(dn.start_index_map) if not any(x.has(d) for x in have)]
        if f is None or not loose:
            return {}
        at = [indices[..., i] for i in loose]
        inside = jnp.stack([(x >= 0) & (x <= ends[i]) for i, x in zip(loose, at)]).all(0)
        f = f.order((*filter(f.has, batch), *(d for d in f.dims if d not in batch)))
        # The indices' axes come first, then what is the factor's own: (*batch, *own).
        own = f.dims[sum(map(f.has, batch)) :]
        seen = lax.expand_dims(inside, range(len(batch), len(batch) + len(own)))
        value = jnp.where(seen, f.value, jnp.zeros((), f.value.dtype))
        return {name: Factor(value, (*batch, *own))}

    # With A zero, A·B is. What a row is filled with has no gain, nor counts in the gain's gradient:
    # 0 gives nothing there, and NaN gives NaN, also where its cotangent is 0.
    masked: dict[str, Any] = mask("a", "a", "b") | ({} if fill == 0 else mask("gain", "gain"))
    return dataclasses.replace(picked, **masked)


def _coded_gather(ctx: Context, eqn: Equation, args: Sequence) -> list | str:
    w, indices = args
    if is_weight(indices):
        return INDEX
    return ctx.bind(eqn, [w.base, indices])


def _gather_factor(
    f: Factor, w: Followed, indices: jax.Array, p: Mapping[str, Any], out_ndim: int
) -> Factor:
    """The factor looked up as the weight is. indices: (*lead, n), n positions in a weight of ndim
    axes; the result has the axes of `lead`, those of the factor that are left, and the rank."""
    dn, f = p["dimension_numbers"], f.sorted()
    sizes = [f.size(d) if d < 0 else p["slice_sizes"][d] for d in f.dims]
    rest = [d for d in range(w.ndim) if d not in dn.collapsed_slice_dims]
    label = dict(zip(rest, dn.offset_dims))
    # Which of the n positions are along axes that this factor has.
    columns = [i for i, d in enumerate(dn.start_index_map) if f.has(d)]
    if not columns:  # nothing that it has is indexed
        return f.map(lax.slice, [0] * f.value.ndim, sizes).relabel(label)
    kept = [d for d in f.dims if d not in dn.collapsed_slice_dims]  # the rank among them
    lead = indices.ndim - 1
    # The gather of the weight, in the factor's axes: (*lead, *kept).
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(lead, lead + len(kept))),
        collapsed_slice_dims=tuple(i for i, d in enumerate(f.dims) if d in dn.collapsed_slice_dims),
        start_index_map=tuple(f.dims.index(dn.start_index_map[i]) for i in columns),
    )
    # Fewer columns may repeat, and need not be sorted.
    every = len(columns) == len(dn.start_index_map)
    value = lax.gather(
        f.value,
        indices if every else indices[..., jnp.asarray(columns)],
        numbers,
        sizes,
        mode=p["mode"],
        fill_value=0,  # where the base gets NaN for what is out of bounds, 0 added keeps it
        unique_indices=p["unique_indices"] and every,
        indices_are_sorted=p["indices_are_sorted"] and every,
    )
    batch = [d for d in range(out_ndim) if d not in dn.offset_dims]
    return Factor(value, (*batch, *(d if d < 0 else label[d] for d in kept)))


def _dynamic_slice(ctx: Context, eqn: Equation, args: Sequence) -> list | str:
    """`table[i]`, one row, or the weights of one layer."""
    w, *starts = args
    if any(map(is_weight, starts)):
        return INDEX
    sizes = eqn.params["slice_sizes"]
    base = ctx.bind(eqn, [w.base, *starts])[0]

    def move(f: Factor) -> Factor:
        # All of the rank. Starts are clamped for a factor as they are for the base.
        at = [jnp.zeros_like(starts[0]) if d < 0 else starts[d] for d in f.dims]
        size = [f.size(d) if d < 0 else sizes[d] for d in f.dims]
        return f.map(lax.dynamic_slice, at, size)

    cut = tuple(d for d, n in enumerate(sizes) if n < w.shape[d])
    picked = w.moved(base, move)
    # A part that no input chooses is a weight; one that an input chooses may be rows.
    if all(map(ctx.body.constant, eqn.invars[1:])) or not cut:
        return [picked]
    rest = [d for d in range(w.ndim) if d not in cut]
    return _rows_or_weights(ctx, eqn, w, picked, cut, rest, False)


RULES: dict[str, Rule] = {
    "dynamic_slice": read_first(_dynamic_slice),
    "gather": Rule(_gather, _gather, _coded_gather),
}
