"""Where parameters go: which leaves reach a product before any input does, and which are heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lora_jax._core import compat

LOOK_UP = "gather"


PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general", LOOK_UP)


INLINE = (*compat.CALLS, "custom_jvp_call", "custom_vjp_call", "shard_map")


@dataclasses.dataclass(frozen=True)
class Value:
    """What a value depends on: parameters alone, or also inputs, through certain last products."""

    leaves: frozenset = frozenset()  # of a value that depends on parameters alone
    products: frozenset = frozenset()  # numbers: those with no other product in between
    data: bool = False


class Flow:
    """One walk through a jaxpr.

    Attributes:
      reached: the leaves that enter a product with an input, whatever was done to them before.
      heads: the leaves of the output heads: products that some output depends on alone and that
        no other product reads. Logits depend on a head alone; hidden states, through the residual
        connections, on many products.
    """

    def __init__(self, jaxpr: Any, origins: Sequence[str | None]):
        self.reached: set[str] = set()
        self._leaves: list[frozenset] = []  # of each product, in program order
        self._read: set[int] = set()
        ins = [Value(data=True) if o is None else Value(frozenset([o])) for o in origins]
        outs = self._walk(jaxpr, ins)
        alone = {n for v in outs if len(v.products) == 1 for n in v.products}
        self.heads = {leaf for n in alone - self._read for leaf in self._leaves[n]}

    def _walk(self, jaxpr: Any, values: list) -> list[Value]:
        env = dict(zip(jaxpr.invars, values))

        def read(v: Any) -> Value:
            return Value() if isinstance(v, compat.Literal) else env.get(v, Value())

        for eqn in jaxpr.eqns:
            env.update(zip(eqn.outvars, self._equation(eqn, [read(v) for v in eqn.invars])))
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, ins: list[Value]) -> list[Value]:
        n = len(eqn.outvars)
        leaves = frozenset().union(*(v.leaves for v in ins))
        if not any(v.data for v in ins):
            return [Value(leaves)] * n
        name, p = eqn.primitive.name, eqn.params
        if name in INLINE:
            return self._walk(compat.opened(p.get("jaxpr", p.get("call_jaxpr")))[0], ins)
        products = frozenset().union(*(v.products for v in ins))
        if name in PRODUCTS and leaves:
            self.reached |= leaves
            self._read |= products
            self._leaves.append(leaves)
            return [Value(products=frozenset([len(self._leaves) - 1]), data=True)] * n
        bodies = {
            "scan": lambda: [(p["jaxpr"], ins)],
            "while": lambda: [(p["body_jaxpr"], ins[p["cond_nconsts"] :])],
            "cond": lambda: [(branch, ins[1:]) for branch in p["branches"]],
        }.get(name, list)()
        inside = frozenset()
        for body, values in bodies:  # a loop reads all that it is given, and its own products
            outs = self._walk(compat.opened(body)[0], values)
            inside = inside.union(*(v.products for v in outs))
        if inside:
            self._read |= products | inside
            products |= inside
        return [Value(products=products, data=True)] * n
