"""The products of one input with adapted weights, as a JAX primitive with a gradient of its own.

y_i = x·W_i + s_i·(x·A_i)·B_i (arXiv:2106.09685, eq. 3), for all the weights that multiply one x.
Shapes: x (T, in), A (in, r), x·A (T, r), B (r, out), W (in, out), y (T, out).

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
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from lora_jax._core import compat
from lora_jax._core.einsum import cast, laid_along, mapped_label, times
from lora_jax._products import beside
from lora_jax._products.group import Group, base, factored, gradient, hidden, toward_x, up
from lora_jax._products.merged import through_merged
from lora_jax._products.plan import AWARE, MERGING, Plan
from lora_jax._quantized.waiting import is_waiting, value


def adapted(
    group: Group, x: jax.Array, a: Sequence[jax.Array], b: Sequence[jax.Array], w: Sequence = ()
) -> list[jax.Array]:
    """The outputs of a group; without `w`, the updates alone."""
    # A weight in codes is several arrays: the primitive takes them flat; how they belong together
    # is static.
    if any(map(is_waiting, w)):
        group = dataclasses.replace(group, bases=jax.tree.structure(list(w)))
    return _of_group(group)(*compat.same_vma(x, *a, *b, *jax.tree.leaves(list(w))))


@functools.lru_cache(maxsize=1024)
def _of_group(group: Group):
    """The product as an inlined function: JAX keeps its trace, derivative and transpose, so layers
    with like groups share them."""
    return jax.jit(functools.partial(adapted_p.bind, group=group), inline=compat.INLINED)


def _adapted(*args: jax.Array, group: Group) -> list[jax.Array]:
    x, a, b, w = group.split(args)
    # Not differentiated: x·A is not needed for anything else.
    if group.plan.infer in MERGING:
        return _by_merged(group, x, a, b, w)
    return _by_way(group, group.plan.infer, x, hidden(group, _apart(x), a), b, w)


# On GPUs XLA joins two products of one x where one of them is small: it writes W and A side
# by side for it, at each call, which is most of what a step of few tokens costs. This keeps x·A
# apart from x·W, and g·Bᵀ from g·Wᵀ.
_barrier: Callable = lambda x: [lax.optimization_barrier(x)]
_apart_p = compat.primitive(
    "apart",
    lambda x: [x],
    jvp=lambda primals, tangents: ([_apart(*primals)], tangents),
    transpose=lambda cts, x: cts,
    batch=lambda size, args, batched: ([_apart(*args)], batched),
    cuda=_barrier,
    rocm=_barrier,
)


def _apart(x: jax.Array) -> jax.Array:
    return _apart_p.bind(x)[0]


def _typed(group: Group, x: jax.Array, a: Sequence, b: Sequence, w: Sequence) -> list[jax.Array]:
    """Arrays of the types of the outputs, by one product for each: x·W, where it is there."""
    labels = (group.xl, *[group.al] * len(a), *(m.bl for m in group.members))
    size = {d: n for of, v in zip(labels, (x, *a, *b)) for d, n in zip(of, v.shape)}
    terms = base(group, x, w) if w[0] is not None else up(group, hidden(group, x, a), b)
    return [m.sum([t], size) for m, t in zip(group.members, terms)]


def _by_way(group: Group, way: str, x: jax.Array, h: Sequence, b: Sequence, w: Sequence) -> list:
    """The outputs from x and x·A."""
    return (beside.forward if way == "beside" and w[0] is not None else factored)(group, x, h, b, w)


def _by_merged(
    group: Group, x: jax.Array, a: Sequence[jax.Array], b: Sequence[jax.Array], w: Sequence
) -> list[jax.Array]:
    """x·(W + s·A·B) of each member."""
    product = lambda m, x, w_: m.sum([m.base(x, group.xl, w_)])
    return through_merged(group, [x] * len(w), a, b, w, product)


def _adapted_jvp(primals: Sequence, tangents: Sequence, *, group: Group) -> tuple[list, list]:
    x, a, b, w = group.split(primals)
    tx, ta, tb, tw = group.split(tangents)
    h = hidden(group, _apart(x), a)
    if group.plan.forward in MERGING:
        plan = dataclasses.replace(group.plan, infer=group.plan.forward)
        ys = adapted_p.bind(*primals, group=dataclasses.replace(group, plan=plan))
    else:  # as plain equations, that a policy of jax.checkpoint sees its products
        ys = _by_way(group, group.plan.forward, x, h, b, w)
    # A kind without any tangent gets no zeros in its place: no product is made of them.
    pairs = (([x], [tx]), (a, ta), (b, tb))
    active = tuple(any(t is not None for t in ts) for _, ts in pairs)
    if not any(active):
        return ys, [None] * len(ys)
    # x·A is a residual: the gradient of B needs it, and to save it is cheaper than to make it
    linear = [t for pair, go in zip(pairs, active) if go for t in compat.instantiated(*pair)]
    tys = tangent_p.bind(*linear, x, *h, *primals[1:], group=group, active=active)
    if not group.bases and any(t is not None for t in tw):
        # never so for a frozen base: x·tW
        dense = base(group, x, compat.instantiated(w, tw))
        tys = [lax.add(t, m.sum([d])) for m, t, d in zip(group.members, tys, dense)]
    return ys, tys


Active = tuple[bool, bool, bool]  # whether x, any A, any B has a tangent


def _parts(group: Group, active: Active, args: Sequence) -> tuple:
    """(tx, tA, tB), None where they are not active; then x·A, x, A, B, W."""
    # The linear arguments stand first, as many as `active` says.
    n, rest = len(group.members), iter(args)
    take = lambda size: [next(rest) for _ in range(size)]
    tx, ta, tb = (take(size) if go else None for size, go in zip((1, n, n), active))
    x, h = take(1), take(n)
    return (tx and tx[0], ta, tb), h, *group.split(x + list(rest))


def _tangent(
    *args: jax.Array, group: Group, active: Active, merge: bool | None = None
) -> list[jax.Array]:
    """tx·W + (tx·A + x·tA)·B + (x·A)·tB of each member; `merge`: tx by the merged weight."""
    (tx, ta, tb), h, x, a, b, w = _parts(group, active, args)
    based = w[0] is not None
    either = group.plan.backward == AWARE if merge is False else group.plan.backward in MERGING
    merge = based and (merge or either)
    # tx·A and x·tA, both (T, r), are added before they meet B: one product instead of two.
    terms, th = [], []  # of y, of x·A
    if tx is not None and merge:
        ys = _by_merged(group, tx, a, b, w)
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
    # Where A or B alone change, no term may run along an axis that W was broadcast along.
    return [m.sum(t, n) for m, t, n in zip(group.members, zip(*terms), group.sizes(w))]


def _tangent_transpose(cts: Sequence, *args: Any, group: Group, active: Active) -> list:
    _, h, x, a, b, w = _parts(group, active, args)
    # An output that nothing uses has no cotangent; its member is left out of all the sums.
    live = [i for i, g in enumerate(cts) if g is not None]
    of_live = lambda values: [values[i] for i in live]
    sub = dataclasses.replace(group, members=tuple(of_live(group.members)))
    dx, da, db = _gradients(sub, active, of_live(cts), x, *map(of_live, (h, a, b, w)))
    # in the order of the arguments: one for x, and for each member one for its A and its B
    of_all = lambda values: [dict(zip(live, values)).get(i) for i in range(len(cts))]
    to_x, to_a, to_b = active
    outs = [dx] * to_x + (of_all(da) if to_a else []) + (of_all(db) if to_b else [])
    return outs + [None] * (len(args) - len(outs))


def _gradients(
    group: Group,
    active: Active,
    g: Sequence[jax.Array],
    x: jax.Array,
    h: Sequence[jax.Array],
    a: Sequence[jax.Array],
    b: Sequence[jax.Array],
    w: Sequence,
) -> tuple[jax.Array | None, list[jax.Array] | None, list[jax.Array] | None]:
    """Cotangents of x, of each A and of each B, None where they are not active."""
    to_x, to_a, to_b = active
    members, hl, xl, al = group.members, group.hl, group.xl, group.al
    based = w[0] is not None
    merge, join = (based and group.plan.backward in ways for ways in (MERGING, ("beside",)))
    dx = da = db = None
    dh: list[jax.Array] = []
    dtype, x = x.dtype, cast(x, group.dtype)
    if to_b:
        # (x·A)ᵀ·g: (r, T) · (T, out)
        db = [
            gradient(h_, hl, g_, m.out, m.bl, b_, group.precision)
            for m, h_, g_, b_ in zip(members, h, g, b)
        ]
    if to_a or (to_x and not merge):
        # s·g·Bᵀ: (T, out) · (out, r)
        dh = [
            times(
                gradient(_apart(g_), m.out, cast(b_, h_.dtype), m.bl, hl, h_, group.precision),
                m.scale,
            )
            for m, h_, g_, b_ in zip(members, h, g, b)
        ]
        # (T, Σr) where the plan shares: one product gives all dA, and one the update's part of dx.
        dh = group.side_by_side(dh, hl)
    if to_a:
        # xᵀ·(g·Bᵀ): (in, T) · (T, r)
        da = [gradient(x, xl, d, hl, al, a[0], group.precision) for d in dh]
        da = [cast(d, v.dtype) for d, v in zip(group.apart(da, al, group.ranks(a)), a)]
    if to_x and join:
        dx = cast(beside.backward(group, x, g, dh, a, w), dtype)
    elif to_x:
        # g·Wᵀ + (g·Bᵀ)·Aᵀ, or g·(W + s·A·B)ᵀ: (T, in)
        back = functools.partial(toward_x, jax.typeof(x), xl)
        terms = []
        if merge:
            terms = through_merged(group, g, a, b, w, back)
        elif based:
            terms = list(map(back, members, g, w))
        if not merge:
            a = group.side_by_side([cast(v, x.dtype) for v in a], al)
            terms += [gradient(d, hl, v, al, xl, x, group.precision) for d, v in zip(dh, a)]
        dx = cast(functools.reduce(lax.add, terms), dtype)
    return dx, da, db


def _adapted_batch(
    size: int, args: Sequence, batched: Sequence[bool], *, group: Group
) -> tuple[list, list[bool]]:
    """Another axis of x is another label. Where the factors have it, so would the merged weight:
    then the plan is factored."""
    x, a, b, w = group.split(args)
    of_x, of_a, of_b, of_w = group.split(batched)
    new = mapped_label(group.members[0].out)
    factors, weights = any((*of_a, *of_b)), any(jax.tree.leaves(of_w))
    if weights:
        w, of_w = zip(*map(_read, w, of_w))
    lead = lambda labels, has: (new, *labels) if has else labels
    members = tuple(
        dataclasses.replace(
            m,
            wl=lead(m.wl, weights) if m.wl else (),
            bl=lead(m.bl, factors),
            out=(new, *m.out),
            numbers=None,
            where=laid_along(m.where, m.out, (new, *m.out)),
        )
        for m in group.members
    )
    # A mapped x is more rows of one weight; a mapped factor or weight is another weight for each.
    keeps = group.plan.infer == AWARE or not (factors or weights)
    plan = group.plan if keeps else Plan(shared=group.plan.shared)
    whole = dataclasses.replace(
        group,
        xl=lead(group.xl, of_x),
        al=lead(group.al, factors),
        members=members,
        plan=plan,
        bases=None,
    )

    def front(values: Sequence, batched: Sequence[bool], has: bool) -> list:
        """All with the new axis, if any of their kind has it."""
        wide = lambda v: lax.broadcast(v, (size,))
        return [wide(v) if has and not one else v for v, one in zip(values, batched)]

    w = [] if w[0] is None else front(w, of_w, weights)
    ys = adapted(whole, x, front(a, of_a, factors), front(b, of_b, factors), w)
    return ys, [True] * len(ys)


def _read(w: Any, batched: Any) -> tuple[jax.Array, bool]:
    """A weight as an array, and whether it is batched, from which of its arrays are."""
    if not is_waiting(w):
        return w, batched
    if not any(jax.tree.leaves(batched)):
        return value(w), False
    # Some arrays of codes may be mapped and others not, such as a table that all share.
    axes = jax.tree.map(lambda one: 0 if one else None, batched)
    return jax.vmap(value, (axes,))(w), True


def _by_factors(*args: jax.Array, group: Group) -> list[jax.Array]:
    plan = group.plan
    if plan.infer != AWARE:
        plan = dataclasses.replace(plan, infer="factored")
    return _adapted(*args, group=dataclasses.replace(group, plan=plan))


# What JAX derives of either is of the factored plan: no gradient of a merged weight.
adapted_p = compat.primitive(
    "adapted_product",
    _adapted,
    jvp=_adapted_jvp,
    batch=_adapted_batch,
    derived=_by_factors,
    typed=lambda *args, group: _typed(group, *group.split(args)),
)
tangent_p = compat.primitive(
    "adapted_tangent",
    _tangent,
    transpose=_tangent_transpose,
    derived=functools.partial(_tangent, merge=False),
    typed=lambda *args, group, active: _typed(group, *_parts(group, active, args)[2:]),
)
