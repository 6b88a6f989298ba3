"""Runs of equations that a program repeats, found so that each is traced once.

An unrolled model is the same equations again and again. JAX keeps the derivative and the transpose
of a function that it has seen, as it does for those of jax.numpy; a jaxpr has lost these functions.
So a run of equations without weights that equals an earlier one is evaluated as an inlined
function; the program that comes out is the same, its names included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import numpy as np

from lora_jax._core.compat import Literal, scopes


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """Equations with what they read and what is read of them: all that `Interpreter.run` needs."""

    invars: list
    eqns: list
    outvars: list
    scopes: int  # how many outer name scopes all of them share
    constvars: tuple = ()


class Repeats:
    """The runs of a jaxpr that were met so far."""

    def __init__(self, jaxpr: Any):
        eqns = enumerate(jaxpr.eqns)
        # The last equation that reads each variable; outputs are read after all of them.
        self._last = {v: i for i, e in eqns for v in e.invars if not isinstance(v, Literal)}
        self._last |= dict.fromkeys(
            (v for v in jaxpr.outvars if not isinstance(v, Literal)), len(jaxpr.eqns)
        )
        self._at = {id(e): i for i, e in enumerate(jaxpr.eqns)}
        self._first: dict[Hashable, Body] = {}

    def first(self, run: list) -> tuple[Body, Body] | None:
        """(the run, an earlier one that equals it), or None if this is the first of its kind."""
        end = self._at[id(run[-1])]
        made = dict.fromkeys(v for e in run for v in e.outvars)
        reads = (v for e in run for v in e.invars if not isinstance(v, Literal))
        invars = list(dict.fromkeys(v for v in reads if v not in made))
        # What nobody reads after the run is no output of its function.
        read_later = [v for v in made if self._last.get(v, -1) > end]
        body = Body(invars, run, read_later, len(scopes(run[0])))
        signature = _signature(body)
        first = body if signature is None else self._first.setdefault(signature, body)
        return None if first is body else (body, first)


def _signature(body: Body) -> Hashable | None:
    """What two runs must share to be one program; None if that cannot be told."""
    number: dict[Any, int] = {}
    for v in [*body.invars, *(v for e in body.eqns for v in e.outvars)]:
        # Variables by their order, in which two equal runs agree.
        number[v] = len(number)

    def atom(v: Any) -> tuple:
        if isinstance(v, Literal):
            value = np.asarray(v.val)
            # By bytes: NaN is not equal to itself, and 0.0 is to -0.0.
            return value.dtype, value.shape, value.tobytes(), v.aval
        return number[v], v.aval

    signature = (
        tuple(map(atom, body.invars)),
        tuple(
            (
                e.primitive,
                tuple(map(atom, e.invars)),
                tuple(map(atom, e.outvars)),
                tuple(e.params.items()),
                e.source_info.traceback,  # so that each keeps its own line
                e.ctx,
            )
            for e in body.eqns
        ),
        tuple(map(atom, body.outvars)),
    )
    try:
        # A parameter that cannot be hashed, such as an array, cannot be compared either.
        hash(signature)
    except TypeError:
        return None
    return signature
