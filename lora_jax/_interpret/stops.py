"""Which weights a program freezes: those of which each use goes through `stop_gradient`."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from lora_jax._core import compat
from lora_jax._interpret.body import only_moves
from lora_jax._nodes.weight import is_weight


def with_stops(jaxpr: Any, args: Sequence) -> list:
    """The arguments of an (open) jaxpr, each weight with its field `stopped`."""
    stops = _Stops()
    return [
        dataclasses.replace(x, stopped=True)
        if is_weight(x) and stops.left(jaxpr, i) == set()
        else x
        for i, x in enumerate(args)
    ]


class _Stops:
    """Looked up once for each program, as those of calls are often shared."""

    def __init__(self) -> None:
        # By identity; the program is kept, so that no other one gets its id.
        self._readers: dict[int, tuple[Any, dict]] = {}
        self._found: dict[tuple[int, int], set[int] | None] = {}

    def left(self, jaxpr: Any, i: int) -> set[int] | None:
        """The outputs that input i is, moved at most; None if another use of it is not stopped."""
        key = id(jaxpr), i
        if key not in self._found:
            self._found[key] = self._of(jaxpr, jaxpr.invars[i])
        return self._found[key]

    def _of(self, jaxpr: Any, v: Any) -> set[int] | None:
        outs = {i for i, o in enumerate(jaxpr.outvars) if o is v}
        for eqn, i in self._uses(jaxpr)[v]:
            for out in self._through(eqn, i):
                more = None if out is None else self._of(jaxpr, out)
                if more is None:
                    return None
                outs |= more
        return outs

    def _uses(self, jaxpr: Any) -> dict:
        """{value: (equation, which operand of it) of each use}."""
        if id(jaxpr) not in self._readers:
            found = collections.defaultdict(list)
            for eqn in jaxpr.eqns:
                for i, v in enumerate(eqn.invars):
                    if not isinstance(v, compat.Literal):
                        found[v].append((eqn, i))
            self._readers[id(jaxpr)] = jaxpr, found
        return self._readers[id(jaxpr)][1]

    def _through(self, eqn: Any, i: int) -> list:
        """The outputs of an equation that operand i becomes; None among them if it is used."""
        if eqn.primitive.name == "stop_gradient":
            return []
        if only_moves(eqn):
            return [*eqn.outvars]
        found: list = []
        for jaxpr, at in _programs(eqn, i):
            outs = None if at is None else self.left(compat.opened(jaxpr)[0], at)
            if outs is None or (outs and eqn.primitive.name not in compat.CALLS):
                return [None]
            found += [eqn.outvars[o] for o in outs]
        return found


def _programs(eqn: Any, i: int) -> list[tuple[Any, int | None]]:
    """The programs of an equation that its operand i enters, and as which input; None: unknown."""
    name, p = eqn.primitive.name, eqn.params
    if name in (*compat.CALLS, "shard_map", "scan"):
        return [(p.get("jaxpr") or p["call_jaxpr"], i)]
    if name == "cond" and i > 0:
        return [(branch, i - 1) for branch in p["branches"]]
    if name == "while" and i < p["cond_nconsts"]:
        return [(p["cond_jaxpr"], i)]
    if name == "while" and i - p["cond_nconsts"] < p["body_nconsts"]:
        return [(p["body_jaxpr"], i - p["cond_nconsts"])]
    return [(None, None)]
