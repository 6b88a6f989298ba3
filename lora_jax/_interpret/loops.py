"""The rules of `scan` and `while`: what each operand is in a step is found out once."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._core import compat
from lora_jax._core.geometry import Factor
from lora_jax._interpret.bodies import arrays, forwarded
from lora_jax._interpret.rule import Context, Equation, Rule, every
from lora_jax._interpret.saving import all_but_gained, has_own
from lora_jax._nodes.weight import AdaptedWeight, Coded, Followed, has_seed, is_weight
from lora_jax._quantized.waiting import is_waiting


class Part(enum.Enum):
    """What a step of a loop gets of an operand."""

    SAME = enum.auto()  # all of it: a constant, or a weight that leaves the loop as it entered
    CARRIED = enum.auto()  # the array that the last step left
    SLICED = enum.auto()  # its part of (n, ...); of a weight, the base's and that of each factor


@dataclasses.dataclass(frozen=True)
class Operand:
    value: Any
    part: Part

    @property
    def whole(self) -> Any:
        """What `lax.scan` slices: of a weight, the base and the factors that run along axis 0."""
        w = self.value
        if not is_weight(w):
            return w
        # lax.scan slices axis 0 of each array: codes that cannot be cut so are read before it.
        base = w.base if not is_waiting(w.base) or w.base.sliceable else w.base.value()
        return [base, *(_lead(f).value for f in w.parts.values() if f.has(0))]

    def at_step(self, carry: Iterator, xs: Iterator) -> Any:
        """The operand in a step, which takes what is its own of `carry` or of `xs`, in order."""
        if self.part is Part.SAME:
            return self.value
        if self.part is Part.CARRIED:
            return next(carry)
        return _slice_of(self.value, next(xs)) if is_weight(self.value) else next(xs)


def _slice_of(w: Followed, leaves: Sequence) -> Followed:
    """One weight of a stack, in a step that got its part of `Operand.whole`."""
    base, *values = leaves
    factors = iter(values)
    base = base.part() if is_waiting(base) else base
    return w.moved(base, lambda f: _part(f, factors), w.axes[1:], w.axes[0])


def _lead(f: Factor) -> Factor:
    """The factor with axis 0 of the weight in front."""
    return f.order((0, *(d for d in f.dims if d != 0)))


def _part(f: Factor, values: Iterator) -> Factor:
    """One layer's factor: the next of the sliced values, or the one that all layers share."""
    value, dims = (next(values), _lead(f).dims[1:]) if f.has(0) else (f.value, f.dims)
    return Factor(value, tuple(d if d < 0 else d - 1 for d in dims))  # axis 0 is gone


def _carry(
    ctx: Context, eqn: Equation, args: Sequence, came: Sequence[int | None], first: int
) -> list:
    """The operands that a loop carries, the first of them being input `first` of its body."""

    def operand(i: int, a: Any) -> Operand:
        if is_weight(a) and came[i] == first + i:  # it comes out as it went in, each time
            return Operand(a, Part.SAME)
        if is_weight(a):
            why = "a step changes it: multiply by the weight that came in, and carry what is made"
            a = ctx.materialise(a, eqn, f"{eqn.primitive.name} carry", why)
        return Operand(a, Part.CARRIED)

    return [operand(i, a) for i, a in enumerate(args)]


def _each_step(operands: Sequence, carry: Iterable = (), xs: Iterable = ()) -> list:
    """The operands as a step gets them; with the last step's carry, as the loop returns them."""
    carry, xs = iter(carry), iter(xs)
    return [o.at_step(carry, xs) for o in operands]


def _start(operands: Sequence) -> list:
    return [o.value for o in operands if o.part is Part.CARRIED]


def _scan(ctx: Context, eqn: Equation, args: Sequence) -> list:
    """Stacked weights are sliced with their factors; a weight carried unchanged is a constant."""
    p = eqn.params
    jaxpr, consts = compat.opened(p["jaxpr"])
    # The body: (*constants, *carry, *slices) to (*carry, *ys).
    n_consts, n_carry = compat.scan_counts(p)
    came = forwarded(jaxpr)

    tokens: dict[int, Any] = {}

    def read(a: Any) -> Any:
        if isinstance(a, AdaptedWeight) and a.tokens is not None:
            few = a.narrowed()
            # one array for all: by it products of one input are seen to go together
            return dataclasses.replace(few, tokens=tokens.setdefault(id(a.tokens), few.tokens))
        return a.array() if isinstance(a, Coded) and not a.base.sliceable else a

    constants = [Operand(a, Part.SAME) for a in args[:n_consts]]
    carry = _carry(ctx, eqn, args[n_consts:][:n_carry], came, n_consts)
    stacks = [Operand(read(a), Part.SLICED) for a in args[n_consts + n_carry :]]
    operands = [*constants, *carry, *stacks]
    # For each of the ys the operand that it hands on, if that is a stack of weights: one that
    # leaves the loop as it entered is no output of it.
    left = [None if i is None else operands[i] for i in came[n_carry:]]
    left = [o if o and o.part is Part.SLICED and is_weight(o.value) else None for o in left]
    # Masks differ by step: its number is sliced as well.
    dropping = any(map(has_seed, args))

    def body(carry_in: list, xs: tuple) -> tuple[list, list]:
        step, parts = xs
        values = _each_step(operands, carry_in, parts)
        # Masks: `fresh` tells this loop from others, and the step's number one step from another.
        outs = ctx.run(jaxpr, consts, [_at_step(ctx.fresh(v), step) for v in values])
        # What leaves as it entered is no part of lax.scan's carry, nor of its ys.
        carry_out = [y for y, o in zip(outs, carry) if o.part is Part.CARRIED]
        ys = [y for y, o in zip(outs[n_carry:], left) if o is None]
        return arrays(ctx, eqn, carry_out, "scan output"), arrays(ctx, eqn, ys, "scan output")

    gains = any(isinstance(a, AdaptedWeight) and a.gain is not None for a in args)
    policy = all_but_gained if gains and ctx.policy is None else ctx.policy
    if policy is not None and any(map(is_weight, args)) and not has_own(jaxpr):
        # for each step: around the loop, all that is made again would be there at once
        body, ctx.saves = jax.checkpoint(body, prevent_cse=False, policy=policy), True
    steps = jnp.arange(p["length"]) if dropping else None
    # Given only where it is set: not part of the documented interface.
    options = {"_split_transpose": p["_split_transpose"]} if p.get("_split_transpose") else {}
    carry_out, ys = lax.scan(
        body,
        _start(carry),
        (steps, [o.whole for o in stacks]),
        # None where it is symbolic: it is the stacks' own.
        length=p["length"] if isinstance(p["length"], int) else None,
        reverse=p["reverse"],
        unroll=p["unroll"],
        **options,
    )
    ys = iter(ys)
    return _each_step(carry, carry_out) + [next(ys) if o is None else o.value for o in left]


def _at_step(w: Any, step: Any) -> Any:
    return w.folded(step) if has_seed(w) else w


def _while(ctx: Context, eqn: Equation, args: Sequence) -> list:
    p = eqn.params
    cond, cond_consts = compat.opened(p["cond_jaxpr"])
    body, body_consts = compat.opened(p["body_jaxpr"])
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    for_cond, for_body = args[:n_cond], args[n_cond:][:n_body]
    carry = _carry(ctx, eqn, args[n_cond + n_body :], forwarded(body), n_body)
    dropping = any(map(has_seed, args))

    def cond_fun(state: tuple) -> jax.Array:
        return ctx.run(cond, cond_consts, [*for_cond, *_each_step(carry, state[1])])[0]

    def body_fun(state: tuple) -> tuple:
        # The step's number, or None without dropout, and the values that are carried.
        step, values = state
        inner = [_at_step(v, step) for v in (*for_body, *_each_step(carry, values))]
        outs = ctx.run(body, body_consts, inner)
        outs = [y for y, o in zip(outs, carry) if o.part is Part.CARRIED]
        return step if step is None else step + 1, arrays(ctx, eqn, outs, "while output")

    start = jnp.zeros((), jnp.int32) if dropping else None
    _, out = lax.while_loop(cond_fun, body_fun, (start, _start(carry)))
    return _each_step(carry, out)


RULES: dict[str, Rule] = {"scan": every(_scan), "while": every(_while)}
