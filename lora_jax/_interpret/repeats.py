"""Layers that a program repeats, found so that each is transformed once and not once a layer.

An unrolled model is the same equations again and again, under scopes that differ by a number
(`layer_0`, `layer_1`; `layers/0`). Such a block is evaluated as one inlined function, the trace and
the derivative of which JAX caches; the program that comes out is the same, its names included.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

from lora_jax._core.compat import Literal, scopes

SMALLEST = 8  # equations: below that, a call costs as much as it saves


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """Equations with what they read and what is read of them: all that `Interpreter.run` needs."""

    invars: list
    eqns: list
    outvars: list
    scopes: int  # how many of the outer name scopes are the block's own
    constvars: tuple = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """One of several equal blocks: `first` is the first of them."""

    body: Body
    first: Body


def segments(jaxpr) -> list:
    """The equations in order, those of repeated blocks replaced by a `Block` each."""
    for depth in range(max((len(scopes(e)) for e in jaxpr.eqns), default=0)):
        runs = _runs(jaxpr.eqns, depth)
        first: dict = {}
        classes: dict = collections.defaultdict(list)
        used = _readers(jaxpr, runs)
        for i, (prefix, eqns) in enumerate(runs):
            if prefix is not None and len(eqns) >= SMALLEST:
                body = _body(eqns, used[i], depth + 1)
                signature = _signature(body)
                if signature is not None:
                    first.setdefault(signature, body)
                    classes[signature].append((i, body))
        repeated = {
            i: Block(body, first[signature])
            for signature, members in classes.items()
            if len(members) > 1
            for i, body in members
        }
        if repeated:
            return [
                item
                for i, (_, eqns) in enumerate(runs)
                for item in ([repeated[i]] if i in repeated else eqns)
            ]
    return list(jaxpr.eqns)


def _runs(eqns, depth: int) -> list:
    """Neighbours under one scope that ends in a number: [(scopes, equations)], or (None, …)."""
    runs: list = []
    for eqn in eqns:
        names = scopes(eqn)
        numbered = len(names) > depth and names[depth][-1:].isdigit()
        prefix = names[: depth + 1] if numbered and not eqn.effects else None
        if runs and prefix is not None and runs[-1][0] == prefix:
            runs[-1][1].append(eqn)
        else:
            runs.append((prefix, [eqn]))
    return runs


def _readers(jaxpr, runs) -> list[set]:
    """For each run, the variables that are read outside of it."""
    maker = {v: i for i, (_, eqns) in enumerate(runs) for e in eqns for v in e.outvars}
    outside: list[set] = [set() for _ in runs]

    def read(variables: Iterable, at: int):
        for v in variables:
            if not isinstance(v, Literal) and maker.get(v, at) != at:
                outside[maker[v]].add(v)

    for i, (_, eqns) in enumerate(runs):
        for e in eqns:
            read(e.invars, i)
    read(jaxpr.outvars, len(runs))
    return outside


def _body(eqns, outside: set, scopes: int) -> Body:
    made = {v for e in eqns for v in e.outvars}
    reads = (v for e in eqns for v in e.invars if not isinstance(v, Literal))
    invars = list(dict.fromkeys(v for v in reads if v not in made))
    return Body(invars, eqns, [v for e in eqns for v in e.outvars if v in outside], scopes)


def _signature(body: Body) -> Hashable | None:
    """What two blocks must share to be one program; None if that cannot be told."""
    number: dict[Any, int] = {}
    for v in [*body.invars, *(v for e in body.eqns for v in e.outvars)]:
        number[v] = len(number)

    def atom(v):
        if isinstance(v, Literal):
            value = np.asarray(v.val)
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
                scopes(e)[body.scopes :],
                e.ctx,
            )
            for e in body.eqns
        ),
        tuple(map(atom, body.outvars)),
    )
    try:
        hash(signature)
    except TypeError:
        return None
    return signature
