"""The rules of the primitives that multiply by a weight: contractions, by one or by experts.

Each binds the primitive unchanged on the frozen base and adds the low-rank product beside it.

Shapes: x (T, in), W (in, out), A (in, r), x·A (T, r), B (r, out), y (T, out); for x·Wᵀ, A and B
change places. Operand `side` of a dot_general is the weight, and operand 1 − side is x.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._core.einsum import Labels, cast, contract, holding, meeting, plus, times
from lora_jax._core.geometry import PART, RANK, Factor
from lora_jax._interpret.observe import observed
from lora_jax._interpret.rule import (
    MASKS,
    TOKENS,
    TWO,
    Context,
    Equation,
    Function,
    Rule,
    adds,
    can_add,
)
from lora_jax._nodes.weight import AdaptedWeight, Coded, Probe, is_weight
from lora_jax._products.contract import Product, contracted, dropout
from lora_jax._products.frozen import product
from lora_jax._products.group import Member


def _product_rule(fn: Callable) -> Function:
    """The rule of dot_general: fn(ctx, eqn, side, w, x), where the weight w is operand `side`."""

    def whole(ctx: Context, eqn: Equation, args: Sequence) -> list | str:
        left, right = args
        # Two weights cannot both stay in factors: the left one becomes an array, by choice.
        # Where one is a vector, it is the vector; where one is rows that were looked up, the rows.
        rows = is_weight(left) and is_weight(right) and right.indexed and not left.indexed
        if rows or not is_weight(right) or (is_weight(left) and right.ndim < 2 <= left.ndim):
            return fn(ctx, eqn, 0, left, _other(ctx, eqn, right))
        return fn(ctx, eqn, 1, right, _other(ctx, eqn, left))

    return whole


def _other(ctx: Context, eqn: Equation, x: Any) -> jax.Array:
    """The operand beside a weight, an array: also where it is a weight."""
    return ctx.materialise(x, eqn, why=TWO) if is_weight(x) else x


def _dot(ctx: Context, eqn: Equation, side: int, w: AdaptedWeight, x: jax.Array) -> list | str:
    """Together with the products of the same input that come later in the program."""
    xl = _own_labels(x)
    uses = [(eqn, side, w)]
    if w.gain is not None and _gains_input(eqn, side, w):
        wl = _labels(eqn, side, xl, w.ndim)
        # It runs along another axis of the weight as well, which x does not have.
        if not {wl[d] for d in w.gain.dims if d != RANK} <= {*xl}:
            return "DoRA's units lie along axes that are summed and axes that are not"
        x = cast(x, meeting(x.dtype, w.dtype, eqn.outvars[0].aval.dtype))
        x = w.gained(x, xl, wl)  # x·(g ∘ W) = (g ∘ x)·W, along the axes that are summed
        uses[0] = eqn, side, dataclasses.replace(w, gain=None)
    else:
        siblings = ctx.siblings(eqn, 1 - side)
        # Not those whose gain is applied to x first: it would be another input.
        uses += [u for u in siblings if not _gains_input(*u) and can_add(u[0])]
    # One group: q, k and v of an input share the product with A and what the plan makes of it.
    products = [_product(ctx, e, s, x, xl, w) for e, s, w in uses]
    outs = contracted(x, xl, products, ctx.plan)
    for (e, s, w), (_, plan) in zip(uses, outs):
        ctx.used(w, e, _parts_of(e, s, w.ndim), plan=str(plan))
    for (e, *_), (y, _) in zip(uses[1:], outs[1:]):  # the interpreter will pass over these
        ctx.made(e, [y])
    return [outs[0][0]]


def _coded_dot(ctx: Context, eqn: Equation, side: int, w: Coded, x: jax.Array) -> list:
    p = eqn.params
    if not jnp.issubdtype(x.dtype, jnp.floating) or p["out_sharding"] is not None:
        # `product` has no rule for these; here the whole weight is read.
        return _bound(ctx, eqn, side, w.base, x)
    xl = _own_labels(x)
    return [product(x, xl, w.base, _member(eqn, side, xl, w.ndim))]


def _probed_dot(ctx: Context, eqn: Equation, side: int, w: Probe, x: jax.Array) -> list:
    ctx.used(w, eqn, _parts_of(eqn, side, w.ndim))
    if w.a is not None:
        xl = _own_labels(x)
        wl = _labels(eqn, side, xl, w.ndim)
        # Labels of a; `met`: the axes of the weight that are summed; `inner`: their labels in a.
        al = tuple(RANK if d == RANK else wl[d] for d in w.a.dims)
        met = eqn.params["dimension_numbers"][0][side]
        inner = {wl[d] for d in w.a.dims if d in met}
        # Those of x·a.
        hl = [d for d in dict.fromkeys([*xl, *al]) if d not in inner]
        down = lambda x, a: contract(x, xl, a, al, hl, precision=lax.Precision.HIGHEST)
        x = observed(w, met, x, down)
    return _bound(ctx, eqn, side, w.base, x)


def _own_labels(x: jax.Array) -> Labels:
    """The labels of the axes of x."""
    return tuple(("x", d) for d in range(x.ndim))


def _out_labels(eqn: Equation, side: int, xl: Labels, ndim: int) -> Labels:
    """The result's: batch axes, then what is left of each operand, in their order."""
    contracting, batch = eqn.params["dimension_numbers"]
    xc, xb = contracting[1 - side], batch[1 - side]  # of x
    x_free = [d for i, d in enumerate(xl) if i not in xc and i not in xb]
    w_free = [d for d in _labels(eqn, side, xl, ndim) if d not in xl]
    return (*(xl[d] for d in xb), *(w_free + x_free if side == 0 else x_free + w_free))


def _parts_of(eqn: Equation, side: int, ndim: int) -> tuple:
    """The weight's contracted, free and batch axes in a dot_general."""
    contracting, batch = eqn.params["dimension_numbers"]
    wc, wb = contracting[side], batch[side]
    return wc, [d for d in range(ndim) if d not in wc and d not in wb], wb


def _gains_input(eqn: Equation, side: int, w: AdaptedWeight) -> bool:
    """Whether the product sums over axes that the weight's gain runs along: x gets it then."""
    contracting, _ = eqn.params["dimension_numbers"]
    return w.gain is not None and any(map(w.gain.has, contracting[side]))


def _labels(eqn: Equation, side: int, xl: Labels, ndim: int) -> Labels:
    """The weight's: an axis that meets one of x has its label, any other one of its own."""
    contracting, batch = eqn.params["dimension_numbers"]
    of_weight, of_x = ((*contracting[i], *batch[i]) for i in (side, 1 - side))
    met = dict(zip(of_weight, of_x))
    return tuple(xl[met[d]] if d in met else ("w", d) for d in range(ndim))


def _member(eqn: Equation, side: int, xl: Labels, ndim: int) -> Member:
    """x·W as the model wrote it."""
    p = eqn.params
    return Member(
        _labels(eqn, side, xl, ndim),
        _out_labels(eqn, side, xl, ndim),
        eqn.outvars[0].aval.dtype,
        precision=p["precision"],
        preferred=p["preferred_element_type"],
        numbers=p["dimension_numbers"],
        weight_first=side == 0,
        where=p["out_sharding"],
    )


def _bound(ctx: Context, eqn: Equation, side: int, w: Any, x: Any) -> list:
    return ctx.bind(eqn, [x, w] if side else [w, x])


def _product(
    ctx: Context, eqn: Equation, side: int, x: jax.Array, xl: Labels, w: AdaptedWeight
) -> Product:
    return Product(
        w,
        _member(eqn, side, xl, w.ndim),
        # Called only for a product that is not `whole`; else the group makes x·W too.
        base=lambda: _bound(ctx, eqn, side, w.base, x)[0],
        whole=jnp.issubdtype(x.dtype, jnp.inexact) and eqn.params["out_sharding"] is None,
        use=ctx.use(),
    )


def _ragged_axes(eqn: Equation, args: Sequence) -> tuple[int, int, int, bool] | None:
    """(group, in, out) of the weight, and whether x is (tokens, in); None for other forms."""
    x, w = args[:2]
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (xc, wc), (xb, wb) = numbers.dot_dimension_numbers
    # A fourth operand is a group offset. What is ragged along the summed axis is the form of a
    # gradient of the weight.
    if (
        is_weight(x)
        or len(args) > 3
        or x.ndim != 2
        or w.ndim != 3
        or xb
        or wb
        or len(wc) != 1
        or len(numbers.rhs_group_dimensions) != 1
        or tuple(numbers.lhs_ragged_dimensions) == xc
    ):
        return None
    (group,), (inner,) = numbers.rhs_group_dimensions, wc
    (outer,) = {0, 1, 2} - {group, inner}
    return group, inner, outer, xc == (1,)


RAGGED = "only (tokens, in) by (experts, in, out), with ragged tokens, is known"
EXPERTS = "each expert must have its own A along its inputs, and its own B along its outputs"


def _ragged_dot(ctx: Context, eqn: Equation, args: Sequence) -> list | str:
    """Experts: (tokens, in) by (experts, in, out), with A and B of each expert in turn."""
    axes = _ragged_axes(eqn, args)
    if axes is None:
        return RAGGED
    (x, w, group_sizes), (group, inner, outer, tokens_first) = args, axes
    if w.a.has(PART):
        return MASKS
    # Each factor has to run along the experts and one more axis.
    first, second = (w.a, w.b) if w.a.has(inner) else (w.b, w.a)
    if set(first.dims) != {group, inner, RANK} or set(second.dims) != {group, outer, RANK}:
        return EXPERTS
    if w.tokens is not None:  # the tokens are in another order here
        return TOKENS
    if w.gain is not None and {*w.gain.dims} != {group, outer, RANK}:
        return "DoRA's units are not the outputs of each expert"
    ctx.used(w, eqn, ((inner,), (outer,), (group,)))
    y = ctx.bind(eqn, [x, w.base, group_sizes])[0]
    x = cast(x, meeting(x.dtype, w.dtype, y.dtype))
    x = dropout(x if tokens_first else x.T, w, ctx.use())
    precision = eqn.params["precision"]
    # A: (experts, in, rank), B: (experts, rank, out); the rows of x are sorted by expert.
    a = times(cast(first.order((group, inner, RANK)).value, x.dtype), w.scale)
    b = cast(second.order((group, RANK, outer)).value, x.dtype)
    h = lax.ragged_dot(x, a, group_sizes, precision=precision)  # (tokens, rank)
    y = plus(y, lax.ragged_dot(h, b, group_sizes, precision=precision))
    if w.gain is None:
        return [y]
    full = cast(y, holding(y.dtype))
    gain = cast(w.gain.order((group, RANK, outer)).value, full.dtype)
    ones = jnp.ones((y.shape[0], 1), full.dtype)  # each row times its group's gain, exactly
    gains = lax.ragged_dot(ones, gain, group_sizes, precision=lax.Precision.HIGHEST)
    return [cast(full + full * gains, y.dtype)]


def _probed_ragged_dot(ctx: Context, eqn: Equation, args: Sequence) -> list | str:
    axes = _ragged_axes(eqn, args)
    if axes is None:
        return RAGGED
    (x, w, group_sizes), (group, inner, outer, tokens_first) = args, axes
    ctx.used(w, eqn, ((inner,), (outer,), (group,)))

    def down(x: jax.Array, a: jax.Array, group_sizes: jax.Array) -> jax.Array:
        a = Factor(a, w.a.dims).order((group, inner, RANK)).value
        highest = lax.Precision.HIGHEST
        return lax.ragged_dot(x if tokens_first else x.T, a, group_sizes, precision=highest)

    if w.a is not None:
        x = observed(w, (inner,), x, down, group_sizes)
    return ctx.bind(eqn, [x, w.base, group_sizes])


RULES: dict[str, Rule] = {
    "dot_general": Rule(
        adds(_product_rule(_dot)), _product_rule(_probed_dot), _product_rule(_coded_dot)
    ),
    "ragged_dot_general": Rule(adds(_ragged_dot), _probed_ragged_dot),
}
