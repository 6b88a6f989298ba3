"""The rules of the primitives that hold a program: descended into, and rebuilt by public functions.

Names, policies, unrolls and shardings are kept. A body that no weight enters is bound unchanged.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from lora_jax._core import compat
from lora_jax._core.geometry import RANK, Factor, spec_along
from lora_jax._interpret.moves import rule
from lora_jax._nodes.weight import AdaptedWeight, is_weight
from lora_jax._quantized.sending import cut
from lora_jax._quantized.weight import is_quantized, value


def forwarded(jaxpr) -> list[int | None]:
    """For each output of a jaxpr the input that it is, or None; calls are looked through."""
    source = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in compat.CALLS:
            inner, _ = compat.opened(eqn.params.get("jaxpr") or eqn.params["call_jaxpr"])
            for v, i in zip(eqn.outvars, forwarded(inner)):
                u = None if i is None else eqn.invars[i]
                if u is not None and not isinstance(u, compat.Literal) and u in source:
                    source[v] = source[u]
    return [None if isinstance(v, compat.Literal) else source.get(v) for v in jaxpr.outvars]


def _same(jaxpr, args, outs):
    """The outputs, with a weight that only passed through a call as the weight that it was."""
    came = forwarded(jaxpr)
    return [o if i is None or not is_weight(args[i]) else args[i] for i, o in zip(came, outs)]


def _plain(ctx, eqn, outs, why: str):
    """Outputs of a body where only arrays may leave it."""
    return [ctx.materialise(o, eqn, why) if is_weight(o) else o for o in outs]


@rule("jit", "pjit")
def _jit(ctx, eqn, args):
    p = eqn.params
    jaxpr, consts = compat.opened(p["jaxpr"])
    run = lambda xs: ctx.run(jaxpr, consts, xs)
    options = lambda entered: _jit_options(p, entered)
    outs = ctx.once(p["jaxpr"], run, args, eqn, p["name"], options)
    return _same(jaxpr, args, outs)


def _jit_options(p, args):
    options = dict(keep_unused=p["keep_unused"], inline=p["inline"])
    if p["compiler_options_kvs"]:
        options["compiler_options"] = dict(p["compiler_options_kvs"])
    if not all(map(compat.is_unspecified, p["in_shardings"])):
        options["in_shardings"] = tuple(
            _spread_sharding(s, a) for s, a in zip(p["in_shardings"], args)
        )
    if not all(map(compat.is_unspecified, p["out_shardings"])):
        options["out_shardings"] = [
            None if compat.is_unspecified(s) else s for s in p["out_shardings"]
        ]
    return options


def _spread_sharding(sharding, arg):
    """An argument's sharding, or, for a weight, that of each of its arrays."""
    if compat.is_unspecified(sharding):
        return None
    if not is_weight(arg):
        return sharding
    if not isinstance(sharding, NamedSharding):
        return arg.moved(sharding, lambda f: Factor(None, f.dims), arg.axes, arg.stacked)
    return arg.moved(
        sharding,
        lambda f: Factor(NamedSharding(sharding.mesh, spec_along(f.dims, sharding.spec)), f.dims),
        arg.axes,
        arg.stacked,
    )


@rule("remat2", "remat", "checkpoint")
def _remat(ctx, eqn, args):
    p = eqn.params
    jaxpr, consts = compat.opened(p["jaxpr"])
    body = jax.checkpoint(
        lambda *xs: ctx.run(jaxpr, consts, xs), prevent_cse=p["prevent_cse"], policy=p["policy"]
    )
    return _same(jaxpr, args, body(*map(ctx.fresh, args)))


@rule("closed_call", "core_call")
def _call(ctx, eqn, args):
    jaxpr, consts = compat.opened(eqn.params.get("jaxpr") or eqn.params["call_jaxpr"])
    return ctx.run(jaxpr, consts, args)


@rule("scan")
def _scan(ctx, eqn, args):
    """Stacked weights are sliced with their factors; a weight carried unchanged is a constant."""
    p = eqn.params
    jaxpr, consts = compat.opened(p["jaxpr"])
    n_consts, n_carry = compat.scan_counts(p)
    first_x = n_consts + n_carry
    args = [
        a.materialise() if i >= first_x and is_weight(a) and a.is_frozen and not a.base.sliceable
        else a
        for i, a in enumerate(args)
    ]  # fmt: skip
    # What leaves the loop as it entered needs no loop: {output: input}.
    through = {
        o: i for o, i in enumerate(forwarded(jaxpr))
        if i is not None and is_weight(args[i])
        and (i - n_consts == o if o < n_carry else i >= first_x)
    }  # fmt: skip
    args = [
        ctx.materialise(a, eqn, "scan carry")
        if is_weight(a) and n_consts <= i < first_x and i - n_consts not in through
        else a
        for i, a in enumerate(args)
    ]
    constant = [i < n_consts or (i < first_x and is_weight(a)) for i, a in enumerate(args)]
    carried = [i for i in range(n_consts, first_x) if not constant[i]]
    kept = [o for o in range(len(jaxpr.outvars)) if o not in through]
    dropping = any(is_weight(a) and a.seed is not None for a in args)
    sliced = [_sliced_leaves(a) if is_weight(a) else a for a in args[first_x:]]

    def body(carry, xs):
        step, xs = xs
        values = list(args)
        for i, c in zip(carried, carry):
            values[i] = c
        for i, x in enumerate(xs, first_x):
            values[i] = _slice_of(args[i], x) if is_weight(args[i]) else x
        if dropping:
            values = [_at_step(ctx.fresh(v), step) for v in values]
        outs = ctx.run(jaxpr, consts, values)
        outs = _plain(ctx, eqn, [outs[o] for o in kept], "scan output")
        n = sum(o < n_carry for o in kept)
        return outs[:n], outs[n:]

    steps = jnp.arange(p["length"]) if dropping else None
    options = {"_split_transpose": p["_split_transpose"]} if p.get("_split_transpose") else {}
    carry, ys = lax.scan(
        body,
        [args[i] for i in carried],
        (steps, sliced),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
        **options,
    )
    outs = dict(zip(kept, [*carry, *ys]))
    return [args[through[o]] if o in through else outs[o] for o in range(len(jaxpr.outvars))]


def _sliced_leaves(w: AdaptedWeight):
    """What a scan slices of a stacked weight: the base, and the factors that run along axis 0."""
    sliceable = not is_quantized(w.base) or w.base.sliceable
    return [
        w.base if sliceable else w.base.value(),
        *(_lead(f).value if f is not None and f.has(0) else None for f in w.parts.values()),
    ]


def _lead(f: Factor) -> Factor:
    return f.order((0, *(d for d in f.dims if d != 0)))


def _slice_of(w: AdaptedWeight, leaves) -> AdaptedWeight:
    """One layer of a stacked weight, inside the scan."""
    base, *values = leaves
    base = base.part() if is_quantized(base) else base
    parts = {
        name: f
        if f is None
        else Factor(
            f.value if v is None else v,
            tuple(d if d == RANK else d - 1 for d in (f if v is None else _lead(f)).dims if d != 0),
        )
        for (name, f), v in zip(w.parts.items(), values)
    }
    return dataclasses.replace(
        w,
        base=base,
        axes=w.axes[1:],
        stacked=tuple(sorted({*w.stacked, *w.axes[0]})),
        **parts,
    )


def _at_step(w, step):
    return w.folded(step) if is_weight(w) else w


@rule("while")
def _while(ctx, eqn, args):
    p = eqn.params
    cond, cond_consts = compat.opened(p["cond_jaxpr"])
    body, body_consts = compat.opened(p["body_jaxpr"])
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    first = n_cond + n_body
    fixed = [
        i for i, source in enumerate(forwarded(body))
        if source == n_body + i and is_weight(args[first + i])
    ]  # fmt: skip
    args = [
        ctx.materialise(a, eqn, "while carry")
        if is_weight(a) and i >= first and i - first not in fixed
        else a
        for i, a in enumerate(args)
    ]
    carry = args[first:]
    loose = [i for i in range(len(carry)) if i not in fixed]

    def whole(state):
        values = list(carry)
        for i, v in zip(loose, state):
            values[i] = v
        return values

    def cond_fun(state):
        return ctx.run(cond, cond_consts, [*args[:n_cond], *whole(state[1])])[0]

    def body_fun(state):
        step, values = state
        inner = [_at_step(v, step) for v in (*args[n_cond:first], *whole(values))]
        outs = ctx.run(body, body_consts, inner)
        return step if step is None else step + 1, _plain(
            ctx, eqn, [outs[i] for i in loose], "while output"
        )

    dropping = any(is_weight(a) and a.seed is not None for a in args)
    start = jnp.zeros((), jnp.int32) if dropping else None
    _, out = lax.while_loop(cond_fun, body_fun, (start, [carry[i] for i in loose]))
    outs = dict(zip(loose, out))
    return [outs[i] if i in outs else carry[i] for i in range(len(carry))]


@rule("cond")
def _cond(ctx, eqn, args):
    index, *operands = args
    if is_weight(index):
        return None
    arrays = [None if is_weight(o) else o for o in operands]

    def branch(closed):
        jaxpr, consts = compat.opened(closed)

        def fn(xs):
            values = [o if is_weight(o) else x for o, x in zip(operands, xs)]
            return _plain(ctx, eqn, ctx.run(jaxpr, consts, values), "cond output")

        return fn

    return lax.switch(index, [branch(b) for b in eqn.params["branches"]], arrays)


def _cuttable(arg, spec, mesh):
    """The argument, read first where it is quantised and the parts would not be."""
    if not is_weight(arg) or not is_quantized(arg.base) or cut(arg.base, spec, mesh) is not None:
        return arg
    return arg.materialise() if arg.is_frozen else arg.with_base(value(arg.base))


@rule("shard_map")
def _shard_map(ctx, eqn, args):
    p = eqn.params
    jaxpr, consts = compat.opened(p["jaxpr"])
    args = [_cuttable(a, s, p["mesh"]) for a, s in zip(args, p["in_specs"])]

    def spec(arg, s):
        if not is_weight(arg):
            return s
        base = cut(arg.base, s, p["mesh"]) if is_quantized(arg.base) else s
        return arg.moved(base, lambda f: Factor(spec_along(f.dims, s), f.dims), arg.axes)

    fn = jax.shard_map(
        lambda *xs: tuple(_plain(ctx, eqn, ctx.run(jaxpr, consts, xs), "shard_map output")),
        mesh=p["mesh"],
        in_specs=tuple(map(spec, args, p["in_specs"])),
        out_specs=tuple(p["out_specs"]),
        axis_names=compat.shard_map_axes(p),
        check_vma=p["check_vma"],
    )
    return list(fn(*args))
