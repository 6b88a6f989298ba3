"""What becomes of a weight that is followed, primitive by primitive: the type of a rule.

Each file of rules ends with its `RULES`, by the name of the primitive; `interpreter` joins them. A
new one is a function and an entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax

from lora_jax._core.einsum import addable
from lora_jax._nodes.weight import AdaptedWeight, Followed, Probe, is_weight

Context: TypeAlias = Any  # the `Interpreter`
Equation: TypeAlias = Any  # of a jaxpr

# (ctx, eqn, operands) -> outputs. One operand or more is a weight. A string: it cannot stay in
# factors here, which is why; the interpreter materialises it, visibly.
Function: TypeAlias = Callable[[Context, Equation, Sequence], Sequence | str]

TOGETHER = "another weight enters it as well"
INDEX = "it is used as an index"

TOKENS = "it is adapted token by token"
GAIN = "DoRA's gain is of the sum W + A·B, and not of what is joined with it"
BOTH = "along the axes of both factors"
TWO = "two adapted weights meet, and one of them has to be an array"
MASKS = "it is joined of several leaves, each with a dropout mask of its own"


def no_rule(name: str) -> str:
    """Why a primitive without a rule needs the sum W + A·B itself."""
    if name.startswith("scatter") or name == "dynamic_update_slice":
        return "it is written into: set the values in the parameters, before `bind`"
    return "no linear map that keeps an update in low rank"


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one primitive takes weights, by their kind.

    Attributes:
      adapted: for operands with an adapted weight among them.
      probe: for operands with a probe.
      coded: for operands with coded weights alone, or, where it is the function of the other kinds
        as well, among others. None: coded weights are read first.
      moves: the primitive only moves or scales its operand: it may be evaluated ahead of its turn,
        and where it has no other operand, a quantised base waits with it until it is read.
    """

    adapted: Function
    probe: Function
    coded: Function | None = None
    moves: bool = False

    def of(self, weights: Sequence[Followed]) -> Function | None:
        """The function for operands with these weights."""
        kinds = set(map(type, weights))
        # Weights in codes beside others are read before: see `Interpreter._equation`.
        if AdaptedWeight in kinds:
            return self.adapted
        return self.probe if Probe in kinds else self.coded


def every(fn: Function, moves: bool = False) -> Rule:
    """One function for all kinds."""
    return Rule(fn, fn, fn, moves)


def read_first(fn: Function, moves: bool = False) -> Rule:
    """One function for adapted weights and probes; coded ones are read."""
    return Rule(fn, fn, None, moves)


Base: TypeAlias = Callable[[], Any]  # makes what the primitive makes of the base


def alone(
    fn: Callable[[Equation, Followed, Base, Sequence], Followed | jax.Array | str],
) -> Function:
    """The rule of a primitive whose first operand alone is a weight: fn(eqn, w, base, rest)."""

    def whole(ctx: Context, eqn: Equation, args: Sequence) -> list | str:
        w, *rest = args
        if not is_weight(w) or any(map(is_weight, rest)):
            return TOGETHER
        out = fn(eqn, w, lambda: ctx.bind(eqn, [w.base, *rest])[0], rest)
        return out if isinstance(out, str) else [out]

    return whole


def adds(fn: Function) -> Function:
    """The rule `fn` where an update can be added to the result: else the weight is merged."""

    def whole(ctx: Context, eqn: Equation, args: Sequence) -> Sequence | str:
        if can_add(eqn):
            return fn(ctx, eqn, args)
        types = " and ".join(str(v.aval.dtype) for v in eqn.invars[:2])
        name = f"{eqn.primitive.name} of {types} to {eqn.outvars[0].aval.dtype}"
        why = "no number of its type can be added to the result"
        read = lambda v: ctx.materialise(v, eqn, name, why) if is_weight(v) else v
        return ctx.bind(eqn, list(map(read, args)))

    return whole


def can_add(eqn: Equation) -> bool:
    return addable([v.aval.dtype for v in eqn.invars[:2]], eqn.outvars[0].aval.dtype)
