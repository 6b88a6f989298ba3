"""The rules of the primitives that hold a program: descended into, and rebuilt by public functions.

Names, policies, unrolls and shardings are kept. A body that no weight enters is bound unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from lora_jax._core import compat
from lora_jax._core.geometry import RANK, Factor, spec_along
from lora_jax._interpret.rule import Rule, every
from lora_jax._nodes.weight import Coded, Followed, has_seed, is_weight
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


def _remat(ctx, eqn, args):
    p = eqn.params
    jaxpr, consts = compat.opened(p["jaxpr"])
    body = jax.checkpoint(
        lambda *xs: ctx.run(jaxpr, consts, xs), prevent_cse=p["prevent_cse"], policy=p["policy"]
    )
    return _same(jaxpr, args, body(*map(ctx.fresh, args)))


def _call(ctx, eqn, args):
    jaxpr, consts = compat.opened(eqn.params.get("jaxpr") or eqn.params["call_jaxpr"])
    return ctx.run(jaxpr, consts, args)


@dataclasses.dataclass(frozen=True)
class Same:
    """An operand of a loop that every step gets: a constant, or a weight that leaves the loop as it
    entered, so that there is nothing to carry."""

    value: Any

    def at_step(self, carry: Iterator, xs: Iterator) -> Any:
        return self.value


@dataclasses.dataclass(frozen=True)
class Carried:
    """An array that one step hands to the next."""

    value: jax.Array

    def at_step(self, carry: Iterator, xs: Iterator) -> Any:
        return next(carry)


@dataclasses.dataclass(frozen=True)
class Sliced:
    """An array (n, ...) of which step i gets part i."""

    value: Any

    @property
    def whole(self) -> Any:
        """What `lax.scan` slices."""
        return self.value

    def at_step(self, carry: Iterator, xs: Iterator) -> Any:
        return next(xs)


@dataclasses.dataclass(frozen=True)
class SlicedWeight(Sliced):
    """A stack of weights (n, ...): the base is sliced, and each factor that runs along axis 0."""

    value: Followed

    @property
    def whole(self) -> list:
        w = self.value
        base = w.base if not is_quantized(w.base) or w.base.sliceable else w.base.value()
        return [base, *(_lead(f).value for f in w.parts.values() if f.has(0))]

    def at_step(self, carry: Iterator, xs: Iterator) -> Followed:
        w, (base, *values) = self.value, next(xs)
        values = iter(values)
        return dataclasses.replace(
            w,
            base=base.part() if is_quantized(base) else base,
            axes=w.axes[1:],
            stacked=tuple(sorted({*w.stacked, *w.axes[0]})),
            **{name: _part(f, values) for name, f in w.parts.items()},
        )


def _lead(f: Factor) -> Factor:
    """The factor with axis 0 of the weight in front."""
    return f.order((0, *(d for d in f.dims if d != 0)))


def _part(f: Factor, values: Iterator) -> Factor:
    """One layer's factor: the next of the sliced values, or the one that all layers share."""
    value, dims = (next(values), _lead(f).dims[1:]) if f.has(0) else (f.value, f.dims)
    return Factor(value, tuple(d if d == RANK else d - 1 for d in dims))


def _carry(ctx, eqn, args: Sequence, came: Sequence[int | None], first: int) -> list:
    """The operands that a loop carries, the first of them being input `first` of its body."""
    name = eqn.primitive.name

    def operand(i: int, a: Any) -> Same | Carried:
        if not is_weight(a):
            return Carried(a)
        return (
            Same(a) if came[i] == first + i else Carried(ctx.materialise(a, eqn, f"{name} carry"))
        )

    return [operand(i, a) for i, a in enumerate(args)]


def _each_step(operands: Sequence, carry: Iterable = (), xs: Iterable = ()) -> list:
    carry, xs = iter(carry), iter(xs)
    return [o.at_step(carry, xs) for o in operands]


def _values(operands: Sequence, kind: type) -> list:
    return [o.value for o in operands if isinstance(o, kind)]


def _scan(ctx, eqn, args):
    """Stacked weights are sliced with their factors; a weight carried unchanged is a constant."""
    p = eqn.params
    jaxpr, consts = compat.opened(p["jaxpr"])
    n_consts, n_carry = compat.scan_counts(p)
    came = forwarded(jaxpr)

    def stack(a: Any) -> Sliced:
        if isinstance(a, Coded) and not a.base.sliceable:
            a = a.array()
        return SlicedWeight(a) if is_weight(a) else Sliced(a)

    carry = _carry(ctx, eqn, args[n_consts:][:n_carry], came, n_consts)
    stacks = list(map(stack, args[n_consts + n_carry :]))
    operands = [*map(Same, args[:n_consts]), *carry, *stacks]
    # A stack of weights that leaves the loop as it entered is no output of it.
    left = [
        o if i is not None and isinstance(o := operands[i], SlicedWeight) else None
        for i in came[n_carry:]
    ]
    dropping = any(map(has_seed, args))

    def body(carry_in: list, xs: tuple):
        step, parts = xs
        values = _each_step(operands, carry_in, parts)
        outs = ctx.run(jaxpr, consts, [_at_step(ctx.fresh(v), step) for v in values])
        carry_out = [y for y, o in zip(outs, carry) if isinstance(o, Carried)]
        ys = [y for y, o in zip(outs[n_carry:], left) if o is None]
        return _plain(ctx, eqn, carry_out, "scan output"), _plain(ctx, eqn, ys, "scan output")

    steps = jnp.arange(p["length"]) if dropping else None
    options = {"_split_transpose": p["_split_transpose"]} if p.get("_split_transpose") else {}
    carry_out, ys = lax.scan(
        body,
        _values(carry, Carried),
        (steps, [o.whole for o in stacks]),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
        **options,
    )
    ys = iter(ys)
    return _each_step(carry, carry_out) + [next(ys) if o is None else o.value for o in left]


def _at_step(w, step):
    return w.folded(step) if has_seed(w) else w


def _while(ctx, eqn, args):
    p = eqn.params
    cond, cond_consts = compat.opened(p["cond_jaxpr"])
    body, body_consts = compat.opened(p["body_jaxpr"])
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    for_cond, for_body = args[:n_cond], args[n_cond:][:n_body]
    carry = _carry(ctx, eqn, args[n_cond + n_body :], forwarded(body), n_body)
    dropping = any(map(has_seed, args))

    def cond_fun(state: tuple):
        return ctx.run(cond, cond_consts, [*for_cond, *_each_step(carry, state[1])])[0]

    def body_fun(state: tuple):
        step, values = state
        inner = [_at_step(v, step) for v in (*for_body, *_each_step(carry, values))]
        outs = ctx.run(body, body_consts, inner)
        outs = [y for y, o in zip(outs, carry) if isinstance(o, Carried)]
        return step if step is None else step + 1, _plain(ctx, eqn, outs, "while output")

    start = jnp.zeros((), jnp.int32) if dropping else None
    _, out = lax.while_loop(cond_fun, body_fun, (start, _values(carry, Carried)))
    return _each_step(carry, out)


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
    return arg.array() if isinstance(arg, Coded) else arg.with_base(value(arg.base))


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


RULES: dict[str, Rule] = {
    "jit": every(_jit),
    "pjit": every(_jit),
    "remat2": every(_remat),
    "remat": every(_remat),
    "checkpoint": every(_remat),
    "closed_call": every(_call),
    "core_call": every(_call),
    "scan": every(_scan),
    "while": every(_while),
    "cond": every(_cond),
    "shard_map": every(_shard_map),
}
