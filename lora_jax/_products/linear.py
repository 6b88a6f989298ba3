"""The products of one input with adapted weights, as a JAX primitive with a gradient of its own.

y_i = x·W_i + s_i·(x·A_i)·B_i (arXiv:2106.09685, eq. 3), for all the weights that multiply one x.
What the automatic gradient of these lines does badly is done well here:

* in the gradient of B it puts the cotangent, as large as the layer's output, on the left of a
  contraction over several axes, and XLA transposes what stands there. Here the smaller array
  does. No axes are merged, so nothing changes for arrays that are sharded along them;
* the products with A, and those that give its gradient, are one each for all weights;
* where the plan says so, x meets W + s·A·B. The merged weight lives for one product, is formed
  again for the gradient of x, is never a residual and never has a gradient.

Two primitives, so that both modes of differentiation, to any order, batching and sharding
compose: `adapted_p`, and `tangent_p`, its derivative, which is linear and has a transpose.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
from jax import lax
from jax.interpreters import ad, batching

from lora_jax._core import compat
from lora_jax._core.einsum import cast, times
from lora_jax._products.group import (
    Group,
    base,
    factored,
    gradient,
    hidden,
    through_merged,
    to_outputs,
    up,
)
from lora_jax._products.plan import Plan
from lora_jax._products.primitive import primitive
from lora_jax._quantized.dot import dot
from lora_jax._quantized.weight import is_quantized, value


def adapted(group: Group, x, a: Sequence, b: Sequence, w: Sequence = ()) -> list[jax.Array]:
    """The outputs of a group; without `w`, the updates alone."""
    if any(map(is_quantized, w)):
        group = dataclasses.replace(group, bases=jax.tree.structure(list(w)))
    return _of_group(group)(*compat.same_vma(x, *a, *b, *jax.tree.leaves(list(w))))


@functools.lru_cache(maxsize=1024)
def _of_group(group: Group):
    """The product as an inlined function: JAX keeps its trace, derivative and transpose, so layers
    with like groups share them."""
    return jax.jit(functools.partial(adapted_p.bind, group=group), inline=compat.INLINED)


def _adapted(*args, group: Group):
    x, a, b, w = group.split(args)
    if group.plan.infer:
        return to_outputs(group, x, a, b, w)
    return factored(group, x, hidden(group, x, a), b, w)


adapted_p = primitive("adapted_product", _adapted)


def _adapted_jvp(primals, tangents, *, group: Group):
    x, a, b, w = group.split(primals)
    tx, ta, tb, tw = group.split(tangents)
    h = hidden(group, x, a)
    if group.plan.forward:
        plan = dataclasses.replace(group.plan, infer=True)
        ys = adapted_p.bind(*primals, group=dataclasses.replace(group, plan=plan))
    else:
        ys = factored(group, x, h, b, w)
    moves = tuple(any(type(t) is not ad.Zero for t in ts) for ts in ([tx], ta, tb))
    if not any(moves):
        return ys, [ad.Zero.from_primal_value(y) for y in ys]
    linear = [ad.instantiate_zeros(t) for ts, go in zip(([tx], ta, tb), moves) if go for t in ts]
    tys = tangent_p.bind(*linear, x, *h, *primals[1:], group=group, moves=moves)
    if not group.bases and any(t is not None and type(t) is not ad.Zero for t in tw):
        # never so for a frozen base
        dense = base(group, x, map(ad.instantiate_zeros, tw))
        tys = [lax.add(t, m.sum([d])) for m, t, d in zip(group.members, tys, dense)]
    return ys, tys


ad.primitive_jvps[adapted_p] = _adapted_jvp


def _parts(group: Group, moves, args):
    """(tx, tA, tB), None where they do not move; then x, x·A, A, B, W."""
    n, args = len(group.members), iter(args)
    take = lambda size: [next(args) for _ in range(size)]
    tx, ta, tb = (take(size) if go else None for size, go in zip((1, n, n), moves))
    x, h = take(1), take(n)
    return (tx and tx[0], ta, tb), h, *group.split(x + list(args))


def _tangent(*args, group: Group, moves, merge=None):
    (tx, ta, tb), h, x, a, b, w = _parts(group, moves, args)
    based = w[0] is not None
    merge = based and (group.plan.backward if merge is None else merge)
    terms, th = [], []  # of y, of x·A
    if tx is not None and merge:
        ys = to_outputs(group, tx, a, b, w)
        terms.append([(y, m.out) for m, y in zip(group.members, ys)])
    elif tx is not None:
        terms += [base(group, tx, w)] if based else []
        th.append(hidden(group, tx, a))
    if ta is not None:
        th.append(hidden(group, x, ta))
    if th:
        terms.append(up(group, [functools.reduce(lax.add, t) for t in zip(*th)], b))
    if tb is not None:
        terms.append(up(group, h, tb))
    return [m.sum(t) for m, t in zip(group.members, zip(*terms))]


tangent_p = primitive("adapted_tangent", _tangent)


def _tangent_transpose(cts, *args, group: Group, moves):
    (tx, ta, tb), h, x, a, b, w = _parts(group, moves, args)
    live = [i for i, g in enumerate(cts) if type(g) is not ad.Zero]
    pick = lambda values: [values[i] for i in live]
    sub = dataclasses.replace(group, members=tuple(pick(group.members)))
    dx, da, db = _gradients(sub, moves, pick(cts), x, *(pick(v) for v in (h, a, b, w)))

    def back(values, like):
        full = dict(zip(live, values))
        return [full[i] if i in full else ad.Zero(t.aval) for i, t in enumerate(like)]

    outs = [] if tx is None else [dx]
    outs += [d for values, ts in ((da, ta), (db, tb)) if ts for d in back(values, ts)]
    return outs + [None] * (len(args) - len(outs))


ad.primitive_transposes[tangent_p] = _tangent_transpose


def _gradients(group: Group, moves, g, x, h, a, b, w):
    """Cotangents of x, of each A and of each B, None where they do not move."""
    to_x, to_a, to_b = moves
    members, hl, xl, al = group.members, group.hl, group.xl, group.al
    merge = group.plan.backward and w[0] is not None
    dx = da = db = None
    if to_b:
        db = [
            gradient(h_, hl, g_, m.out, m.bl, b_, m.precision)
            for m, h_, g_, b_ in zip(members, h, g, b)
        ]
    if to_a or (to_x and not merge):
        dh = [
            times(gradient(g_, m.out, cast(b_, h_.dtype), m.bl, hl, h_, m.precision), m.scale)
            for m, h_, g_, b_ in zip(members, h, g, b)
        ]
        dh = group.side_by_side(dh, hl)
    if to_a:
        da = [gradient(x, xl, d, hl, al, a[0], group.precision) for d in dh]
        da = [cast(d, v.dtype) for d, v in zip(group.apart(da, al, group.ranks(a)), a)]
    if to_x:
        toward_x = functools.partial(_toward_x, x, xl)
        terms = []
        if merge:
            terms = through_merged(group, g, a, b, w, toward_x)
        elif w[0] is not None:
            terms = list(map(toward_x, members, g, w))
        if not merge:
            a = group.side_by_side([cast(v, x.dtype) for v in a], al)
            terms += [gradient(d, hl, v, al, xl, x, group.precision) for d, v in zip(dh, a)]
        dx = functools.reduce(lax.add, terms)
    return dx, da, db


def _toward_x(x, xl, m, g, w):
    """A term of the cotangent of x, by W or by the merged weight."""
    whole = lambda g, w: gradient(g, m.out, w, m.wl, xl, x, m.precision)
    how = dict(precision=m.precision, preferred_element_type=x.dtype)
    return dot(whole, g, m.out, w, m.wl, xl, g, **how)


def _adapted_batch(args, dims, *, group: Group):
    """Another axis of x is another label. Where the factors have it, so would the merged weight:
    then the plan is factored."""
    (size,) = {v.shape[d] for v, d in zip(args, dims) if d is not None}
    x, a, b, w = group.split(args)
    dx, da, db, dw = group.split(dims)
    new = ("batch", sum(d[0] == "batch" for d in group.members[0].out if isinstance(d, tuple)))
    front = lambda values, dims, all_: [
        v if d is None and not all_ else batching.bdim_at_front(v, d, size)
        for v, d in zip(values, dims)
    ]
    factors = any(d is not None for d in (*da, *db))
    weights = any(d is not None for d in jax.tree.leaves(dw))
    if group.bases is not None:
        if weights:
            w = [jax.vmap(value, (d,))(v) if is_quantized(v) else v for v, d in zip(w, dw)]
        dw = [(0 if weights else None) if is_quantized(d) else d for d in dw]
    lead = lambda labels, has: (new, *labels) if has else labels
    members = tuple(
        dataclasses.replace(
            m,
            wl=m.wl and lead(m.wl, weights),
            bl=lead(m.bl, factors),
            out=(new, *m.out),
            numbers=None,
        )
        for m in group.members
    )
    plan = Plan(shared=group.plan.shared) if factors or weights else group.plan
    batched = Group(lead(group.xl, dx is not None), lead(group.al, factors), members, plan)
    (x,) = front([x], [dx], False)
    w = [] if w[0] is None else front(w, dw, weights)
    outs = adapted(batched, x, front(a, da, factors), front(b, db, factors), w)
    return outs, [0] * len(outs)


batching.primitive_batchers[adapted_p] = _adapted_batch


def _tangent_batch(args, dims, **params):
    fn = functools.partial(_tangent, **params, merge=False)
    return jax.vmap(lambda xs: fn(*xs), in_axes=(list(dims),))(list(args)), [0] * len(
        params["group"].members
    )


batching.primitive_batchers[tangent_p] = _tangent_batch


def _tangent_jvp(primals, tangents, **params):
    fn = functools.partial(_tangent, **params, merge=False)
    return jax.jvp(fn, tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


ad.primitive_jvps[tangent_p] = _tangent_jvp
