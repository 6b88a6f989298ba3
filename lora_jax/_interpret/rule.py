"""What becomes of a weight that is followed, primitive by primitive: the type of a rule.

Each file of rules ends with its `RULES`, by the name of the primitive; `interpreter` joins them. A
new one is a function and an entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from lora_jax._nodes.weight import AdaptedWeight, Followed, Probe

Context: TypeAlias = Any  # the `Interpreter`
Equation: TypeAlias = Any  # of a jaxpr

# (ctx, eqn, operands) -> outputs. One operand or more is a weight. A string: it cannot stay in
# factors here, which is why; the interpreter materialises it, visibly.
Function: TypeAlias = Callable[[Context, Equation, Sequence], Sequence | str]

TOGETHER = "another weight enters it as well"
INDEX = "it is used as an index"

TOKENS = "it is adapted token by token"
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
