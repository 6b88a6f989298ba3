"""The rules of convolutions.

Shapes: x (N, ..., in), W (window, in, out), A (window, in, r), B (r, out), y (N, ..., out); the
axes of the window and their order in x, W and y are those of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._core import compat
from lora_jax._core.einsum import cast, contract, holding, laid_along, meeting, plus, times
from lora_jax._core.geometry import PART, RANK, Factor
from lora_jax._interpret.observe import observed
from lora_jax._interpret.reshapes import only_in
from lora_jax._interpret.rule import MASKS, TOKENS, TWO, Context, Equation, Rule, adds
from lora_jax._nodes.weight import is_weight
from lora_jax._products.contract import dropout


def _conv_axes(eqn: Equation) -> tuple[int, list[int]]:
    """The kernel's axis of output features, and those that are summed."""
    out, *inner = eqn.params["dimension_numbers"].rhs_spec
    return out, inner


def _rows_first(ctx: Context, eqn: Equation, args: Sequence) -> Sequence:
    """Where both are weights, the left one (looked-up rows, say) becomes an array."""
    x, w = args
    return (ctx.materialise(x, eqn, why=TWO), w) if is_weight(x) and is_weight(w) else args


def _conv(ctx: Context, eqn: Equation, args: Sequence) -> list | str:
    """The convolution by A with `rank` output features, then B at each position.

    In a grouped convolution A is shared by the groups: it runs once in each of them.
    """
    x, w = _rows_first(ctx, eqn, args)
    p = eqn.params
    dn, groups = p["dimension_numbers"], p["feature_group_count"]
    if (why := _odd_conv(eqn, x)) is not None:
        return why
    out_dim, inner = _conv_axes(eqn)
    # For a kernel that is used transposed, A and B change places.
    name = "b" if w.a.has(out_dim) else "a"
    for d in inner:
        if w.a.has(d) and w.b.has(d):  # of several kernels, stacked along the window
            w = only_in(w, d, name)
    first, second = (w.a, w.b) if name == "a" else (w.b, w.a)
    # A must run along the window and the input features alone, B along the output features.
    if any(
        first.has(out_dim) or second.has(d) or not first.has(d) for d in inner if w.shape[d] != 1
    ) or not second.has(out_dim):
        return (
            "one factor must have all axes of the window and the input features, the other that "
            "of the output features: make the adapters with lora.survey of this function"
        )
    if w.tokens is not None:
        return TOKENS
    if w.a.has(PART):
        return MASKS
    # A gain along what is summed cannot be applied to the sum.
    if w.gain is not None and {*w.gain.dims} != {RANK, out_dim}:
        return "DoRA's units are not the output features"
    ctx.used(w, eqn, (inner, (out_dim,), ()))
    y = ctx.bind(eqn, [x, w.base])[0]

    dtype = meeting(x.dtype, w.dtype, y.dtype)
    # Below, x is the branch's alone: the base has seen it whole.
    x = dropout(cast(x, dtype), w, ctx.use())
    first = first.map(cast, x.dtype).map(times, w.scale)
    where = compat.explicit_sharding(y)
    h = _conv_down(eqn, w.ndim, x, first, where)
    # h: (..., batch·groups, ..., rank, ...); B: (rank, out) -> (rank, groups, out / groups)
    batch, feature = dn.out_spec[:2]
    h = h.reshape(*h.shape[:batch], y.shape[batch], groups, *h.shape[batch + 1 :])
    out: list = [("x", d) for d in range(y.ndim)]
    hl = list(out)
    hl[feature] = "rank"
    hl.insert(batch + 1, "group")
    out[feature : feature + 1] = ["group", "out"]
    second = second.relabel({out_dim: out_dim})  # without axes of size 1 that the window may have
    b = cast(second.order((RANK, out_dim)).value, x.dtype)
    b = b.reshape(b.shape[0], groups, b.shape[1] // groups)
    delta = contract(
        h,
        hl,
        b,
        ("rank", "group", "out"),
        out,
        where and where.update(spec=_in_groups(where.spec, feature, groups)),
        precision=p["precision"],
        preferred_element_type=holding(y.dtype),
    )
    # y: (N, ..., out), with one label alone: that of the gain.
    along = [out_dim if d == feature else None for d in range(y.ndim)]
    return [w.gained(plus(y, delta.reshape(y.shape)), along)]


def _odd_conv(eqn: Equation, x: Any) -> str | None:
    """Why no weight is followed into a convolution, if so."""
    if is_weight(x):
        return "it is what the kernel runs over"
    if eqn.params["batch_group_count"] != 1:
        return "the batch is split into groups: it is the derivative of a grouped convolution"
    return None


def _probed_conv(ctx: Context, eqn: Equation, args: Sequence) -> list | str:
    x, w = _rows_first(ctx, eqn, args)
    if (why := _odd_conv(eqn, x)) is not None:
        return why
    out_dim, inner = _conv_axes(eqn)
    ctx.used(w, eqn, (inner, (out_dim,), ()))
    if w.a is not None:
        down = lambda x, a: _conv_down(eqn, w.ndim, x, Factor(a, w.a.dims))
        x = observed(w, inner, x, down)
    return ctx.bind(eqn, [x, w.base])


def _in_groups(spec: PartitionSpec, feature: int, groups: int) -> PartitionSpec:
    """The spec of an array the features of which are split into (groups, features of one)."""
    two = (spec[feature], None) if groups > 1 else (None, spec[feature])
    return PartitionSpec(*spec[:feature], *two, *spec[feature + 1 :])


def _conv_down(
    eqn: Equation, ndim: int, x: jax.Array, first: Factor, where: NamedSharding | None = None
) -> jax.Array:
    """The convolution by a factor without an axis of the output features: its rank is theirs.

    `where`: the sharding of the model's own result, where it is part of types.
    """
    p = eqn.params
    dn = p["dimension_numbers"]
    out_dim, inner = _conv_axes(eqn)
    # In the kernel's own order of axes, with the rank where the output features are.
    kernel = first.spread({d: 1 for d in inner if not first.has(d)})
    kernel = kernel.order(tuple(RANK if d == out_dim else d for d in range(ndim))).value
    at = dn.out_spec[1]  # of the features, which are not sharded: the rank
    return lax.conv_general_dilated(
        _groups_to_batch(x, dn.lhs_spec[0], dn.lhs_spec[1], p["feature_group_count"]),
        kernel,
        p["window_strides"],
        p["padding"],
        p["lhs_dilation"],
        p["rhs_dilation"],
        dn,
        precision=p["precision"],
        out_sharding=laid_along(where, range(ndim), [*range(at), RANK, *range(at + 1, ndim)]),
    )


def _groups_to_batch(x: jax.Array, batch: int, feature: int, groups: int) -> jax.Array:
    """(N, ..., groups·c) as (N·groups, ..., c): one ordinary convolution for all groups."""
    if groups == 1:
        return x
    n, each = x.shape[batch], x.shape[feature] // groups
    # (N, ..., groups, c), (N, groups, ..., c), (N·groups, ..., c)
    x = x.reshape(*x.shape[:feature], groups, each, *x.shape[feature + 1 :])
    x = jnp.moveaxis(x, feature, batch + 1)
    return x.reshape(*x.shape[:batch], n * groups, *x.shape[batch + 2 :])


RULES: dict[str, Rule] = {"conv_general_dilated": Rule(adds(_conv), _probed_conv)}
