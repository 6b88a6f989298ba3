"""The rules of the primitives that hold a program: descended into, and rebuilt by public functions.

Names, policies and shardings are kept. A body that no weight enters is bound unchanged. Loops are
in `loops`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._core import compat
from lora_jax._core.geometry import RANK, Factor, spec_along
from lora_jax._interpret.rule import Context, Equation, Rule, every, read_first
from lora_jax._nodes.weight import AdaptedWeight, Coded, Followed, is_weight
from lora_jax._quantized.sending import cut
from lora_jax._quantized.waiting import is_waiting, value


def forwarded(jaxpr: Any) -> list[int | None]:
    """For each output of a jaxpr the input that it is, or None; calls are looked through."""
    source = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in compat.CALLS:
            inner, _ = compat.opened(eqn.params.get("jaxpr") or eqn.params["call_jaxpr"])
            # i: the operand of the call that its output v is.
            for v, i in zip(eqn.outvars, forwarded(inner)):
                u = None if i is None else eqn.invars[i]
                if u is not None and not isinstance(u, compat.Literal) and u in source:
                    source[v] = source[u]
    return [None if isinstance(v, compat.Literal) else source.get(v) for v in jaxpr.outvars]


def arrays(ctx: Context, eqn: Equation, outs: Sequence, name: str) -> list:
    """Outputs of a body where only arrays may leave it."""
    why = f"it leaves the body of the {eqn.primitive.name} as an array: multiply by it inside"
    return [ctx.materialise(o, eqn, name, why) if is_weight(o) else o for o in outs]


def _once(ctx: Context, eqn: Equation, args: Sequence, name: str, transform: Callable) -> list:
    """A body that JAX traced once for all of its calls is interpreted once."""
    source = eqn.params["jaxpr"]
    jaxpr, consts = compat.opened(source)
    # Which operands no data enters is known out here alone.
    fixed = tuple(map(ctx.body.constant, eqn.invars))
    run = lambda xs: ctx.run(jaxpr, consts, xs, fixed=fixed)
    outs = ctx.once(source, run, args, eqn, name, transform, fixed)
    # What a call returns are new tracers: a weight that it hands on stays the object that it was.
    came = [None if i is None else args[i] for i in forwarded(jaxpr)]
    return [a if is_weight(a) else o for a, o in zip(came, outs)]


def _jit(ctx: Context, eqn: Equation, args: Sequence) -> list:
    p = eqn.params
    transform = lambda f, entered: jax.jit(f, **_jit_options(p, entered))
    return _once(ctx, eqn, args, p["name"], transform)


def _jit_options(p: Mapping[str, Any], args: Sequence) -> dict[str, Any]:
    options = dict(keep_unused=p["keep_unused"], inline=p["inline"])
    if p["compiler_options_kvs"]:
        options["compiler_options"] = dict(p["compiler_options_kvs"])
    if not all(map(compat.is_unspecified, p["in_shardings"])):
        # One for each operand of the equation; a weight among them holds several arrays.
        options["in_shardings"] = tuple(_sharding_of(s, a) for s, a in zip(p["in_shardings"], args))
    if not all(map(compat.is_unspecified, p["out_shardings"])):
        options["out_shardings"] = [
            None if compat.is_unspecified(s) else s for s in p["out_shardings"]
        ]
    return options


def _sharding_of(sharding: Any, arg: Any) -> Any:
    """An argument's sharding, or, for a weight, that of each of its arrays."""
    if compat.is_unspecified(sharding):
        return None
    if not is_weight(arg):
        return sharding
    if not isinstance(sharding, NamedSharding):  # it says nothing of single axes
        return _like(arg, sharding, lambda f: None)
    of = lambda f: NamedSharding(sharding.mesh, spec_along(f.dims, sharding.spec))
    return _like(arg, sharding, of)


def _like(arg: Followed, base: Any, of: Callable[[Factor], Any]) -> Any:
    """What is said of a weight, in its own structure: of the base, and `of` each factor."""
    # The same tree structure as the weight's, with specs for arrays.
    new = arg.moved(base, lambda f: Factor(of(f), f.dims))
    if not isinstance(new, AdaptedWeight) or new.tokens is None:
        return new
    # along no axis of the weight
    return dataclasses.replace(new, tokens=of(Factor(new.tokens, (RANK,) * new.tokens.ndim)))


def _remat(ctx: Context, eqn: Equation, args: Sequence) -> list:
    how = {k: eqn.params[k] for k in ("prevent_cse", "policy")}
    return _once(ctx, eqn, args, "checkpoint", lambda f, _: jax.checkpoint(f, **how))


def _call(ctx: Context, eqn: Equation, args: Sequence) -> list:
    jaxpr, consts = compat.opened(eqn.params.get("jaxpr") or eqn.params["call_jaxpr"])
    return ctx.run(jaxpr, consts, args, fixed=tuple(map(ctx.body.constant, eqn.invars)))


def _cond(ctx: Context, eqn: Equation, args: Sequence) -> list | str:
    index, *operands = args
    if is_weight(index):
        return "it is what chooses"
    # Weights are constants of the branches: `lax.switch` passes arrays on, no labels.
    passed = [None if is_weight(o) else o for o in operands]

    def branch(closed: Any) -> Callable:
        jaxpr, consts = compat.opened(closed)

        def fn(xs: Sequence) -> list:
            values = [o if is_weight(o) else x for o, x in zip(operands, xs)]
            return arrays(ctx, eqn, ctx.run(jaxpr, consts, values), "cond output")

        return fn

    return lax.switch(index, [branch(b) for b in eqn.params["branches"]], passed)


def _cuttable(arg: Any, spec: PartitionSpec, mesh: Any) -> Any:
    """The argument, read first where it is quantised and the parts would not be."""
    if not is_weight(arg) or not is_waiting(arg.base) or cut(arg.base, spec, mesh) is not None:
        return arg
    # An adapter stays beside what was read; a weight in codes alone is an array then.
    return arg.array() if isinstance(arg, Coded) else arg.with_base(value(arg.base))


def _meeting(arg: Any, spec: PartitionSpec) -> Any:
    """The argument, with factors whose types have shardings as the spec of the weight says."""

    def move(f: Factor) -> Factor:
        where = compat.explicit_sharding(f.value)
        if where is None:
            return f
        return f.map(jax.sharding.reshard, where.update(spec=spec_along(f.dims, spec)))

    return arg.moved(arg.base, move) if is_weight(arg) else arg


def _shard_map(ctx: Context, eqn: Equation, args: Sequence) -> list:
    p = eqn.params
    jaxpr, consts = compat.opened(p["jaxpr"])
    # A weight that leaves as it came, as NNX gives back all Variables, is the weight that it was.
    came = [
        None if i is None or not is_weight(args[i]) or p["in_specs"][i] != s else args[i]
        for i, s in zip(forwarded(jaxpr), p["out_specs"])
    ]
    # What the spec of a weight says of an axis holds for the factors that have that axis.
    args = [_cuttable(_meeting(a, s), s, p["mesh"]) for a, s in zip(args, p["in_specs"])]

    def spec(arg: Any, s: PartitionSpec) -> Any:
        if not is_weight(arg):
            return s
        base = cut(arg.base, s, p["mesh"]) if is_waiting(arg.base) else s
        return _like(arg, base, lambda f: spec_along(f.dims, s))

    left = lambda outs: [o for o, w in zip(outs, came) if w is None]
    run = lambda xs: arrays(ctx, eqn, left(ctx.run(jaxpr, consts, xs)), "shard_map output")
    fn = jax.shard_map(
        lambda *xs: tuple(run(xs)),
        mesh=p["mesh"],
        in_specs=tuple(map(spec, args, p["in_specs"])),
        out_specs=tuple(left(p["out_specs"])),
        axis_names=compat.shard_map_axes(p),
        check_vma=p["check_vma"],
    )
    outs = iter(fn(*args))
    return [next(outs) if w is None else w for w in came]


def _own_derivative(ctx: Context, eqn: Equation, args: Sequence) -> str:
    """`custom_jvp` and `custom_vjp`: entered, the function would lose its rule."""
    return "it enters a function with a derivative rule of its own, which is for whole arrays"


RULES: dict[str, Rule] = {
    **dict.fromkeys(("jit", "pjit"), every(_jit)),
    **dict.fromkeys(compat.REMAT, every(_remat)),
    **dict.fromkeys(("closed_call", "core_call"), every(_call)),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), read_first(_own_derivative)),
    "cond": every(_cond),
    "shard_map": every(_shard_map),
}
