"""Where parameters go: which axes meet an input in a product, and which leaves are heads.

Every value has, for each of its axes, the axes of leaves that run along it: (leaf, axis). A kernel
that is normalised, symmetrised or added to the identity still meets the input with an axis of its
own; learned queries meet the weights of their layer alone, and are inputs themselves.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lora_jax._core import compat
from lora_jax._core.geometry import blocks_of

LOOK_UP = "gather"

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general", LOOK_UP)

INLINE = (*compat.CALLS, "custom_jvp_call", "custom_vjp_call", "shard_map")

# They join arrays without a product, though their shapes differ.
JOINS = ("concatenate", "dynamic_slice", "dynamic_update_slice", "pad", "select_n", "sort", "clamp")

# They multiply, though the shapes may be equal.
SOLVES = ("triangular_solve", "custom_linear_solve", "tridiagonal_solve")

Axes = tuple[frozenset, ...]  # for each axis, the (leaf, axis) that run along it


@dataclasses.dataclass(frozen=True)
class Value:
    """What a value depends on: parameters alone, or also inputs, through certain last products."""

    # The leaves that it is made of, where it depends on parameters alone.
    leaves: frozenset = frozenset()
    # The numbers of the products that it depends on with no other product in between.
    products: frozenset = frozenset()
    data: bool = False
    axes: Axes = ()
    # By a product of parameters alone: it is used as an input is.
    made: bool = False


class Flow:
    """One walk through a jaxpr.

    Attributes:
      reached: the leaves of which an axis is summed with an input's, whatever was done to them
        before.
      heads: the leaves of the output heads: products that some output depends on alone and that
        no other product reads. Logits depend on a head alone; hidden states, through the residual
        connections, on many products.
      stacks: (leaf, axis) of the first axes along which a later stack of weights multiplies
        separately: of experts that are applied to all tokens.
    """

    def __init__(self, jaxpr: Any, paths: Sequence[str | None]):
        """`paths`: that of each argument that is a leaf; None of an input."""
        self.reached: set[str] = set()
        self.stacks: set[tuple[str, int]] = set()
        self._taken: dict[str, set[int]] = {}  # axes of a leaf that scans go along
        # Products are numbered in program order: the leaves of each, and those that another reads.
        self._leaves: list[frozenset] = []
        self._read: set[int] = set()
        self._size: dict[tuple[str, int], int] = {}
        ins = [self._argument(v, path) for v, path in zip(jaxpr.invars, paths)]
        outs = self._walk(jaxpr, ins)
        alone = {n for v in outs if len(v.products) == 1 for n in v.products}
        self.heads = {leaf for n in alone - self._read for leaf in self._leaves[n]}

    def _argument(self, v: Any, path: str | None) -> Value:
        if path is None:
            return Value(data=True, axes=_none(v))
        sizes = {(path, d): n for d, n in enumerate(v.aval.shape)}
        self._size |= sizes
        return Value(frozenset([path]), axes=tuple(frozenset([tag]) for tag in sizes))

    def _walk(self, jaxpr: Any, values: Iterable[Value]) -> list[Value]:
        env = dict(zip(jaxpr.invars, values))

        def read(v: Any) -> Value:
            # Constants and literals are neither parameters nor inputs.
            none = Value(axes=_none(v))
            return none if isinstance(v, compat.Literal) else env.get(v, none)

        for eqn in jaxpr.eqns:
            env.update(zip(eqn.outvars, self._equation(eqn, [read(v) for v in eqn.invars])))
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, ins: list[Value]) -> list[Value]:
        name, p = eqn.primitive.name, eqn.params
        if name in INLINE:
            return self._walk(compat.opened(p.get("jaxpr", p.get("call_jaxpr")))[0], ins)
        # Indices choose; what they choose from is what the result is made of.
        operands = ins[:1] if name in (LOOK_UP, "dynamic_slice") else ins
        leaves = frozenset().union(*(v.leaves for v in operands))
        axes = _axes(eqn, operands)
        # Parameters alone, so far.
        if not any(v.data for v in ins):
            product = name in PRODUCTS and all(v.leaves for v in operands[:2])
            made = any(v.made for v in ins) or product
            return [Value(leaves, axes=a, made=made) for a in axes]
        products = frozenset().union(*(v.products for v in ins))
        if name in PRODUCTS and leaves:
            self._meets(eqn, operands)
            # It reads the products before it, none of which is a head then.
            self._read |= products
            self._leaves.append(leaves)
            products = frozenset([len(self._leaves) - 1])
            if name != "dot_general":
                # Through a convolution or a look-up axes are not followed.
                axes = map(_none, eqn.outvars)
            return [Value(products=products, data=True, axes=a) for a in axes]
        inside = self._loop(name, p, ins)
        if inside is None:
            # No loop and no known product: a solver or a kernel may still be one.
            if leaves and _multiplies(eqn, ins):
                self.reached |= leaves
        elif inside:
            self._read |= products | inside
            products |= inside
        return [Value(products=products, data=True, axes=a) for a in axes]

    def _meets(self, eqn: Any, ins: Sequence[Value]) -> None:
        """A product of parameters and inputs."""
        if eqn.primitive.name != "dot_general":
            self.reached |= {leaf for v in ins for leaf in v.leaves}
            return
        contracting, batch = eqn.params["dimension_numbers"]
        for side, v in enumerate(ins):
            if v.data:
                continue
            self.reached |= {leaf for d in contracting[side] for leaf, _ in v.axes[d]}
            if not contracting[side]:  # a scale, as of a norm
                continue
            for d, other in zip(batch[side], batch[1 - side]):
                # The first axis of this leaf meets an earlier one's, which its product left free:
                # experts that were all applied to each token, and now their second weights.
                size = eqn.invars[side].aval.shape[d]
                if any(map(self._is_first, v.axes[d])):
                    self.stacks |= {
                        tag
                        for tag in ins[1 - side].axes[other]
                        if self._is_first(tag) and self._size[tag] == size > 1
                    }

    def _is_first(self, tag: tuple[str, int]) -> bool:
        """Whether it is a leaf's first axis but for those that scans go along, which may be any."""
        taken = self._taken.get(tag[0], set())
        return tag[1] == next(d for d in itertools.count() if d not in taken)

    def _loop(self, name: str, p: dict, ins: Sequence[Value]) -> frozenset | None:
        """The products inside of a loop or branch, which reads all that it is given; None of
        another primitive."""
        if name == "scan":
            consts, carry = compat.scan_counts(p)
            return self._repeated(p["jaxpr"], ins, slice(consts, consts + carry))
        if name == "while":
            consts = p["body_nconsts"]
            return self._repeated(p["body_jaxpr"], ins[p["cond_nconsts"] :], slice(consts, None))
        if name == "cond":
            branches = [self._repeated(b, ins[1:], slice(0, 0)) for b in p["branches"]]
            return frozenset().union(*branches)
        return None

    def _repeated(self, body: Any, ins: Sequence[Value], carried: slice) -> frozenset:
        """The products of a body. What it carries is an input once it depends on one."""
        body, values = compat.opened(body)[0], list(ins)
        for i, v in enumerate(body.invars):  # a scan takes the first axis of what it runs over
            axes = values[i].axes
            taken = len(axes) - len(_none(v))
            for leaf, axis in frozenset().union(*axes[:taken]):
                self._taken.setdefault(leaf, set()).add(axis)
            values[i] = dataclasses.replace(values[i], axes=axes[taken:])
        # Until nothing changes; each round turns a carried value into data, so it ends.
        while True:
            outs = self._walk(body, values)
            new = [
                Value(o.leaves, o.products, True, o.axes) if o.data and not v.data else v
                for v, o in zip(values[carried], outs)
            ]
            if new == values[carried]:
                return frozenset().union(*(v.products for v in outs))
            values[carried] = new


def _none(v: Any) -> Axes:
    return (frozenset(),) * len(getattr(v.aval, "shape", ()))


def _multiplies(eqn: Any, ins: Sequence[Value]) -> bool:
    """Whether a primitive that is not known joins parameters and inputs otherwise than element by
    element: a solver, a kernel."""
    name = eqn.primitive.name
    if name in JOINS or name.startswith("scatter"):
        return False
    out = eqn.outvars[0].aval.shape

    def fits(shape: tuple[int, ...]) -> bool:
        same = len(shape) == len(out) and all(n in (1, m) for n, m in zip(shape, out))
        return shape == () or same

    met = (x.aval.shape for x, v in zip(eqn.invars, ins) if v.leaves and not v.data)
    return name in SOLVES or not all(map(fits, met))


def _axes(eqn: Any, ins: Sequence[Value]) -> list[Axes]:
    """What runs along each axis of each output."""
    outs = [tuple(getattr(v.aval, "shape", ())) for v in eqn.outvars]
    known = _RULES.get(eqn.primitive.name)
    if known is not None:
        return [known(eqn, ins)]
    every = frozenset().union(*(tags for v in ins for tags in v.axes))
    met = [v.axes for v in ins if any(v.axes) and not _is_bias(v, ins)]

    def one(shape: tuple[int, ...]) -> Axes:
        # Where shapes differ nothing is known: anything may run along each axis.
        if not met or any(len(axes) != len(shape) for axes in met):
            return (every,) * len(shape)
        return tuple(frozenset().union(*tags) for tags in zip(*met))  # element by element

    return [one(shape) for shape in outs]


def _is_bias(v: Value, ins: Sequence[Value]) -> bool:
    """Whether a value is repeated along an axis of what parameters made, such as a query's bias."""
    return not v.made and any(
        other.made and any(bool(theirs) > bool(own) for own, theirs in zip(v.axes, other.axes))
        for other in ins
    )


def _dot(eqn: Any, ins: Sequence[Value]) -> Axes:
    contracting, batch = eqn.params["dimension_numbers"]
    # (*batch, *free of the left, *free of the right)
    met = [ins[0].axes[i] | ins[1].axes[j] for i, j in zip(*batch)]
    for side, v in enumerate(ins):
        met += [t for d, t in enumerate(v.axes) if d not in (*contracting[side], *batch[side])]
    return tuple(met)


def _transpose(eqn: Any, ins: Sequence[Value]) -> Axes:
    return tuple(ins[0].axes[d] for d in eqn.params["permutation"])


def _broadcast(eqn: Any, ins: Sequence[Value]) -> Axes:
    axes = list(_none(eqn.outvars[0]))
    for i, d in enumerate(eqn.params["broadcast_dimensions"]):
        axes[d] = ins[0].axes[i]
    return tuple(axes)


def _without(name: str) -> Callable[[Any, Sequence[Value]], Axes]:
    """What is left where the parameter `name` says which axes are gone."""
    return lambda eqn, ins: tuple(t for d, t in enumerate(ins[0].axes) if d not in eqn.params[name])


def _reshape(eqn: Any, ins: Sequence[Value]) -> Axes:
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    # Without elements there are no blocks: anything may run along each axis.
    axes = [frozenset().union(*ins[0].axes)] * len(new)
    for before, after in blocks_of(old, new) or ():
        for d in after:
            runs = (ins[0].axes[i] for i in before if new[d] > 1)  # none along an axis of size 1
            axes[d] = frozenset().union(*runs)
    return tuple(axes)


_RULES = {
    "dot_general": _dot,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "squeeze": _without("dimensions"),
    "reshape": _reshape,
    **dict.fromkeys(
        ["reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin"],
        _without("axes"),
    ),
}
