"""All rules, by the name of the primitive."""

from __future__ import annotations

from lora_jax._interpret import bodies, convs, joins, lookups, loops, moves, reshapes, uses
from lora_jax._interpret.rule import Equation

# No primitive is in two of them.
RULES = (
    moves.RULES
    | reshapes.RULES
    | joins.RULES
    | uses.RULES
    | convs.RULES
    | lookups.RULES
    | bodies.RULES
    | loops.RULES
)


def may_move(eqn: Equation) -> bool:
    """Whether an equation may stand between a parameter and the product that uses it."""
    rule = RULES.get(eqn.primitive.name)
    return rule is not None and rule.moves


def only_moves(eqn: Equation) -> bool:
    """Whether an equation moves its one operand, and makes nothing else of it."""
    return may_move(eqn) and len(eqn.invars) == len(eqn.outvars) == 1


def by_number(eqn: Equation) -> bool:
    """Whether an equation keeps a stack of factors with one number for all tokens: what moves
    weights, the product, which reads the factors by it, and bodies."""
    return may_move(eqn) or eqn.primitive.name in _BY_NUMBER


_BY_NUMBER = ("dot_general", *bodies.RULES, *loops.RULES)
