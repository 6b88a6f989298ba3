"""The rules of the primitives that join weights with others or with arrays: sums, concatenations,
choices. The update of the whole is the sum of all updates, so their ranks add up.

Shapes: A₁ (in, r₁), A₂ (in, r₂) make A (in, r₁ + r₂); B₁ (r₁, out), B₂ (r₂, out) B (r₁ + r₂, out).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._core import compat
from lora_jax._core.einsum import cast, times
from lora_jax._core.geometry import PART, RANK, Factor
from lora_jax._interpret.moves import REPEATED, scaled_along, spread_to
from lora_jax._interpret.rule import GAIN, TOKENS, Context, Equation, Rule, read_first
from lora_jax._nodes.weight import AdaptedWeight, Followed, Probe, is_weight, origins

ROWS = "rows that were looked up are activations where they are added"
RATES = "the rates of dropout differ"
DATA = "it is added to an array that inputs enter: it acts as a bias there"


def _sum(
    ctx: Context, eqn: Equation, args: Sequence, of: Sequence[int], parts: Sequence[Any]
) -> list | str:
    """The sum of `parts`, each the weight that argument of[i] of the equation became, and arrays.

    The base is the equation's of the bases: what is no weight adds nothing to the update.
    """
    rest = [v for i, v in enumerate(eqn.invars) if i not in of]
    if any(w.indexed for w in parts):
        return ROWS
    if not all(map(ctx.body.constant, rest)):
        return DATA
    # An axis that comes from no axis of the leaf is a repetition.
    if any(n != 1 and not w.axes[d] for w in parts for d, n in enumerate(w.shape)) and rest:
        return "it is repeated along an axis, as a bias is"
    base = ctx.bind(eqn, [x.base if is_weight(x) else x for x in args])[0]
    out = _joined(base, parts)
    return out if isinstance(out, str) else [out]


def _joined(base: Any, parts: Sequence[Any]) -> Followed | str:
    """One weight of several of one shape, all adapted or all probes: [A₁ A₂ …] · [B₁; B₂; …]."""
    first = parts[0]
    labels = _labels(parts)
    if isinstance(labels, str):
        return labels
    if isinstance(first, Probe):
        return dataclasses.replace(first, base=base, a=None, **labels)
    if any(w.gain is not None for w in parts):
        return GAIN
    pairs = _alike(parts)
    if isinstance(pairs, str):
        return pairs
    a, b, seed = _beside(parts, *zip(*pairs))
    whole = dict(base=base, a=a, b=b, seed=seed, rows=None, scale=_scale(parts))
    return dataclasses.replace(first, **whole, **labels)


def _scale(parts: Sequence[AdaptedWeight]) -> float:
    """The scale of the whole: that of all parts, or 1 where each is in its first factor."""
    return parts[0].scale if len({w.scale for w in parts}) == 1 else 1.0


def _labels(parts: Sequence[Followed]) -> dict | str:
    """What is said of the leaves: where their axes are, by name of the field."""
    same = all((w.axes, w.stacked, w.indexed) == _way(parts[0]) for w in parts)
    leaves = {o for w in parts for o in origins(w)}
    if not same and len(leaves) > 1 and isinstance(parts[0], Probe):
        return "it is joined with another leaf that came another way"
    union = lambda groups: tuple(dict.fromkeys(axis for group in groups for axis in group))
    axes = parts[0].axes if same else tuple(map(union, zip(*(w.axes for w in parts))))
    if not same and len(leaves) == 1:  # W + Wᵀ: as the first one lies
        axes = tuple(map(lambda first, all_: first or all_, parts[0].axes, axes))
    return dict(
        origin=tuple(dict.fromkeys(o for w in parts for o in origins(w))),
        stopped=all(w.stopped for w in parts),
        axes=axes,
        stacked=union(w.stacked for w in parts),
        indexed=union(w.indexed for w in parts),
    )


def _way(w: Followed) -> tuple:
    return w.axes, w.stacked, w.indexed


def _alike(parts: Sequence[AdaptedWeight]) -> list[tuple[Factor, Factor]] | str:
    """The factors of each weight, in such an order and with such axes that all first ones run along
    the same axes, and all second ones do. A scale that not all have is in the first."""
    if any(w.tokens is not None for w in parts):
        return TOKENS
    # The joined branch has one rate, and a mask for each part.
    if len({w.dropout if w.drops else 0.0 for w in parts}) > 1:
        return RATES
    # How the first weight's factors lie; others are taken in the order that fits better.
    want = [{*parts[0].a.dims}, {*parts[0].b.dims}]
    some = {PART: 1} if any(w.a.has(PART) for w in parts) else {}
    pairs, scale = [], _scale(parts)
    for w in parts:
        a = w.a if w.scale == scale else w.a.map(times, w.scale)
        a, b = a.spread(some), w.b.spread(some)
        orders = (a, b), (b, a)  # of Wᵀ the factors change places
        misfit = lambda pair: sum(len({*f.dims} ^ dims) for f, dims in zip(pair, want))
        pairs.append(min(orders, key=misfit))
    for i in (0, 1):
        # Then all get the axes that any of them has; along a new one a factor is constant.
        want[i] = want[i].union(*(pair[i].dims for pair in pairs)) - {RANK, PART}
    out = []
    for w, (first, second) in zip(parts, pairs):
        missing = [dims - {*f.dims} for f, dims in zip((first, second), want)]
        if any(second.has(d) for d in missing[0]) or any(first.has(d) for d in missing[1]):
            return "it is joined with a weight whose factors run along other axes"
        size = dict(enumerate(w.shape))
        one, two = ({d: size[d] for d in sorted(m)} for m in missing)
        out.append((first.spread(one), second.spread(two)))
    return out


def _beside(
    weights: Sequence[AdaptedWeight], firsts: Sequence[Factor], seconds: Sequence[Factor]
) -> tuple[Factor, Factor, Factor | None]:
    """All A, and all B, with their ranks side by side, and the seed of the whole.

    With dropout the weights are side by side along an axis PART instead: x·A of each has an input
    with a mask of its own.
    """
    if not weights[0].drops:
        return _along(RANK, firsts), _along(RANK, seconds), None
    parts = lambda fs: [f.spread({PART: 1}) for f in _placed(fs, [{}] * len(fs), RANK)]
    seeds = _seeds(weights, PART)
    return _along(PART, parts(firsts)), _along(PART, parts(seconds)), _along(PART, seeds)


def _along(dim: int, factors: Sequence[Factor]) -> Factor:
    """The factors side by side along an axis."""
    values, dims = _values(factors)
    return Factor(lax.concatenate(values, dims.index(dim)), dims)


def _values(factors: Sequence[Factor]) -> tuple[list[jax.Array], tuple[int, ...]]:
    """Their arrays, of one type and order of axes; and that order."""
    dims = factors[0].dims
    dtype = jnp.result_type(*(f.value.dtype for f in factors))
    values = [cast(f.order(dims).value, dtype) for f in factors]
    # Where shardings are part of types, as the one lies that is cut along most axes.
    like = max(values, key=lambda v: sum(s is not None for s in jax.typeof(v).sharding.spec))
    return [compat.lying_as(v, like) for v in values], dims


def _seeds(weights: Sequence[AdaptedWeight], dim: int) -> list[Factor]:
    """The seeds, all along the same axes, `dim` among them."""
    seeds = [w.seed for w in weights if w.seed is not None]
    dims = sorted({dim, *(d for s in seeds for d in s.dims)} - {RANK})
    return [s.spread({d: 1 if d < 0 else w.shape[d] for d in dims}) for w, s in zip(weights, seeds)]


def _add(ctx: Context, eqn: Equation, args: Sequence) -> list | str:
    """A sum or a difference: the update of what is subtracted changes its sign."""
    at = [i for i, w in enumerate(args) if is_weight(w)]
    parts: list[Any] = [spread_to(args[i], eqn.outvars[0].aval.shape) for i in at]
    if any(w is None for w in parts):
        return REPEATED
    if eqn.primitive.name == "sub":
        # Operand 1 is what is subtracted.
        parts = [w.scaled(w.base, lambda a: -a) if i else w for i, w in zip(at, parts)]
    return _sum(ctx, eqn, args, at, parts)


def _select(ctx: Context, eqn: Equation, args: Sequence) -> list | str:
    """A choice along axes of one factor: of each weight the update counts where it is chosen."""
    which, *cases = args
    if is_weight(which):
        return "it is what chooses"
    if all(map(is_weight, cases)) and _one_and_the_same(cases):
        base = ctx.bind(eqn, [which, *(w.base for w in cases)])[0]
        return [cases[0].with_base(base)]
    dims = ctx.body.varies(eqn.invars[0])
    # Operand 0 only chooses: inputs may enter it.
    at, parts = [0], []
    for i, w in enumerate(cases):
        if is_weight(w):
            chosen = lax.eq(which, lax.full_like(which, i))
            part = scaled_along(w, w.base, chosen, dims, lambda f, c: f * c.astype(f.dtype))
            if isinstance(part, str):
                return part
            at.append(i + 1)
            parts.append(part)
    return _sum(ctx, eqn, args, at, parts)


def _one_and_the_same(cases: Sequence[Followed]) -> bool:
    """Whether all have one update: vmap of cond chooses between a weight and itself."""
    # The very arrays, and all that is static.
    (first, alike), *others = (jax.tree.flatten(w.with_base(None)) for w in cases)
    return all(s == alike and all(map(operator.is_, first, xs)) for xs, s in others)


def _concatenate(ctx: Context, eqn: Equation, args: Sequence) -> list | str:
    """Side by side: [A₁ A₂ …] times a B that is zero outside each one's part; where both factors
    of all run along the axis or none does, as in a stack, both are concatenated along it, and no
    rank grows."""
    return _side_by_side(ctx, eqn, args, eqn.params["dimension"], list(args))


def _stack(ctx: Context, eqn: Equation, args: Sequence) -> list | str:
    dim = eqn.params["axis"]
    shape = list(eqn.outvars[0].aval.shape)
    shape[dim] = 1

    def raised(w: Any) -> Any:
        if not is_weight(w):
            return w
        label = {d: d + (d >= dim) for d in range(w.ndim)}
        # Only shapes are asked for here: the base is that of the equation itself.
        return w.relabelled(jax.ShapeDtypeStruct(shape, w.dtype), label)

    return _side_by_side(ctx, eqn, args, dim, list(map(raised, args)))


def _side_by_side(
    ctx: Context, eqn: Equation, args: Sequence, dim: int, placed: list
) -> list | str:
    """placed: the arguments as they lie in the result, with axis `dim`."""
    weights = [w for w in placed if is_weight(w)]
    first = weights[0]
    labels = _labels(weights)
    if isinstance(labels, str):
        return labels
    base = ctx.bind(eqn, [w.base if is_weight(w) else w for w in args])[0]
    if isinstance(first, Probe):
        rest = [v for v, x in zip(eqn.invars, args) if not is_weight(x)]
        if not all(map(ctx.body.constant, rest)):
            return DATA
        return [dataclasses.replace(first, base=base, a=None, **labels)]
    if not any(f.has(dim) for w in weights for f in (w.a, w.b)):
        # A new axis, or one of repeats: a stack. Along it every factor is constant.
        along = lambda w: w.moved(w.base, lambda f: f.spread({dim: w.shape[dim]}))
        weights = list(map(along, weights))
    gains = [w.gain for w in weights if w.gain is not None]
    if any({*g.dims} != {*gains[0].dims} or not g.has(dim) for g in gains):
        return GAIN
    pairs = _alike(weights)
    if isinstance(pairs, str):
        return pairs
    stacked = all(f.has(dim) for f in pairs[0])
    # How much of the result along the axis is before and after each weight.
    around, start = [], 0
    for w in placed:
        # An array that is stacked has no axis `dim` yet, and takes one place.
        stop = start + w.shape[dim] if is_weight(w) or w.ndim == base.ndim else start + 1
        around += [{dim: (start, base.shape[dim] - stop, 0)}] if is_weight(w) else []
        start = stop
    firsts, seconds = zip(*pairs)
    if stacked:  # of one rank, and one number of parts: the largest
        a, b = (_total(_placed(fs, around, RANK, PART)) for fs in (firsts, seconds))
        seed = _total(_placed(_seeds(weights, dim), around, PART)) if first.drops else None
    else:
        a, b, seed = _beside(weights, _placed(firsts, around), _placed(seconds, around))
    own = [at for w, at in zip(weights, around) if w.gain is not None]
    gain = _total(_placed(gains, own)) if gains else None
    # Tables one below the other, some rows of each in the place of its own. Beside a row there is
    # what it is joined with, as in `_pad`.
    rows = [w.rows for w, (_, b_) in zip(weights, pairs) if w.rows and {*w.rows.dims} == {*b_.dims}]
    below = not stacked and len(rows) == len(weights) and not rows[0].has(dim)
    own = _along(RANK, rows) if below else None
    whole = dict(base=base, a=a, b=b, gain=gain, seed=seed, rows=own, scale=_scale(weights))
    return [dataclasses.replace(first, **whole, **labels)]


def _total(factors: Sequence[Factor]) -> Factor:
    values, dims = _values(factors)
    return Factor(functools.reduce(lax.add, values), dims)


def _placed(factors: Sequence[Factor], around: Sequence[dict], *grow: int) -> list[Factor]:
    """Each factor with zeros around it, so many along each axis, and after it along the axes
    `grow` up to the largest."""
    most = {d: max(f.size(d) for f in factors) for d in grow if factors[0].has(d)}
    return [
        f.padded(at | {d: (0, n - f.size(d), 0) for d, n in most.items()})
        for f, at in zip(factors, around)
    ]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "add_any", "sub"), read_first(_add)),
    "select_n": read_first(_select),
    "concatenate": read_first(_concatenate),
    "stack": read_first(_stack),
}
