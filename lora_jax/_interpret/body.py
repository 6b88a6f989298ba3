"""A body under evaluation: its values, and what its equations say of each."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable, Sequence
from typing import Any

from lora_jax._core import compat
from lora_jax._interpret import bodies, convs, joins, lookups, loops, moves, reshapes, uses
from lora_jax._interpret.rule import Equation
from lora_jax._nodes.weight import is_weight, origins

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


def by_number(eqn: Equation) -> bool:
    """Whether an equation keeps a stack of factors with one number for all tokens: what moves
    weights, the product, which reads the factors by it, and bodies."""
    return may_move(eqn) or eqn.primitive.name in _BY_NUMBER


_BY_NUMBER = ("dot_general", *bodies.RULES, *loops.RULES)


def only_moves(eqn: Equation) -> bool:
    """Whether an equation moves its one operand, and makes nothing else of it."""
    return may_move(eqn) and len(eqn.invars) == len(eqn.outvars) == 1


# Their results differ along an axis only if an operand does.
_ELEMENTWISE = frozenset(
    "convert_element_type copy stop_gradient neg sign abs exp log sqrt rsqrt square not "
    "add sub mul div max min pow eq ne lt le gt ge and or select_n".split()
)


def _long_axes(v: Any) -> set[int]:
    # Not n > 1: a symbolic size is not known to be.
    return {d for d, n in enumerate(getattr(v.aval, "shape", ())) if n != 1}


class Running:
    """A body under evaluation: its values, and who makes and who multiplies them."""

    def __init__(self, eqns: Sequence, env: dict, scopes: int, fixed: Iterable = ()):
        self.env = env
        self.scopes = scopes
        # The inputs that no data enters.
        self._fixed = set(fixed)
        # The ids of the equations that were evaluated, in their turn or ahead of it.
        self.done: set[int] = set()
        self._eqns = eqns

    def read(self, v: Any) -> Any:
        return v.val if isinstance(v, compat.Literal) else self.env[v]

    def has(self, v: Any) -> bool:
        return isinstance(v, compat.Literal) or v in self.env

    @functools.cached_property
    def _makers(self) -> dict:
        return {v: eqn for eqn in self._eqns for v in eqn.outvars}

    def maker(self, v: Any) -> Equation | None:
        return self._makers.get(v)

    @functools.cached_property
    def _products(self) -> dict:
        # {what tells an operand: (equation, which operand it is)}
        found = collections.defaultdict(list)
        for eqn in self._eqns:
            if eqn.primitive.name == "dot_general":
                for side, v in enumerate(eqn.invars):
                    found[self._origin(v)].append((eqn, side))
        return found

    @functools.cached_property
    def _constants(self) -> set:
        found = set(self._fixed)
        # Equations stand in order, so that one pass finds all; what has effects may bring in data.
        for eqn in self._eqns:
            if not eqn.effects and all(
                isinstance(v, compat.Literal) or v in found for v in eqn.invars
            ):
                found.update(eqn.outvars)
        return found

    def constant(self, v: Any) -> bool:
        """Whether a value is made of parameters and constants alone."""
        return isinstance(v, compat.Literal) or v in self._constants

    @functools.cached_property
    def _varying(self) -> dict[Any, set[int]]:
        # {output: axes}. In order, as in `_constants`: a value may be an operand many times over.
        found: dict[Any, set[int]] = {}
        at = lambda v: None if isinstance(v, compat.Literal) else found.get(v)
        of = lambda v: _long_axes(v) if (axes := at(v)) is None else axes
        for eqn in self._eqns:
            name, p = eqn.primitive.name, eqn.params
            for v in eqn.outvars:
                # Nothing is known of any other primitive.
                dims = _long_axes(v)
                # New axes, and those of size 1 that are repeated, do not vary.
                if name == "broadcast_in_dim":
                    dims = {p["broadcast_dimensions"][d] for d in of(eqn.invars[0])}
                elif name == "iota":
                    dims &= {p["dimension"]}
                elif name in _ELEMENTWISE:
                    dims &= set().union(*map(of, eqn.invars))
                found[v] = dims
        return found

    def varies(self, v: Any) -> set[int]:
        """The axes along which the elements of a value may differ."""
        made = not isinstance(v, compat.Literal) and v in self._varying
        return self._varying[v] if made else _long_axes(v)

    def leaves_of(self, v: Any) -> set:
        """The leaves that a value is made of."""
        found, seen, todo = set(), set(), [v]
        while todo:
            v = todo.pop()
            if isinstance(v, compat.Literal) or v in seen:
                continue
            seen.add(v)
            # A value that is not made yet is followed to its makers all the same.
            if is_weight(self.env.get(v)):
                found.update(origins(self.env[v]))
            eqn = self.maker(v)
            todo += eqn.invars if eqn is not None else []
        return found

    def products_of(self, x: Any) -> list:
        """(equation, side) of each dot_general of `x`, or of an equal conversion of its source."""
        return self._products[self._origin(x)]

    def _origin(self, v: Any) -> Any:
        """What tells `v` from other values: casts of one value to one type are one."""
        eqn = None if isinstance(v, compat.Literal) else self.maker(v)
        if eqn is None or eqn.primitive.name != "convert_element_type":
            return id(v)
        return self._origin(eqn.invars[0]), v.aval.dtype
