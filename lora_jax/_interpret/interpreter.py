"""The interpreter: evaluates a jaxpr with adapted weights, and records what became of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from lora_jax._core import compat
from lora_jax._interpret.body import RULES, Running, by_number, may_move
from lora_jax._interpret.coverage import LOW_RANK, MATERIALISED, Use
from lora_jax._interpret.repeats import Body, Repeats
from lora_jax._interpret.rule import Equation, no_rule
from lora_jax._nodes.weight import AdaptedWeight, Coded, Followed, has_seed, is_weight, origins
from lora_jax._quantized.sending import sent
from lora_jax._quantized.waiting import is_waiting, value


class _Number(int):
    """Which argument a weight is, for a function that serves several calls; messages show the leaf
    of the first one."""

    leaf: str

    def __new__(cls, i: int, leaf: str) -> _Number:
        self = super().__new__(cls, i)
        self.leaf = leaf
        return self

    def __str__(self) -> str:
        return self.leaf


class Interpreter:
    """One evaluation. `events` maps (leaf, equation, how) to a `Use`."""

    def __init__(self, plan: str = "auto", policy: Callable | None = None):
        self.plan = plan
        self.policy = policy  # of jax.checkpoint, for the bodies of scans that weights enter
        self.saves = False  # whether there was such a body
        self.events: dict[tuple, Use] = {}
        self.body = Running([], {}, 0)  # that is run now
        self._jits: dict = {}  # see `once`
        self._uses = 0

    def run(
        self,
        jaxpr: Any,
        consts: Sequence,
        args: Sequence,
        scopes: int = 0,
        fixed: Sequence[bool] = (),
    ) -> list:
        """The outputs of an (open) jaxpr; those that are a moved weight stay adapted.

        Runs of plain equations that repeat are traced once. `scopes` counts outer name scopes to
        leave out. `fixed`: which of the arguments no data enters; weights are, in any case.
        """
        env = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, args))
        still = [v for v, one in zip(jaxpr.invars, fixed) if one]
        still += [v for v, x in zip(jaxpr.invars, args) if is_weight(x)]
        body = Running(jaxpr.eqns, env, scopes, [*jaxpr.constvars, *still])
        # Bodies nest: rules run those inside by this method.
        outer, self.body = self.body, body
        repeats = Repeats(jaxpr) if any(map(is_weight, args)) else None
        try:
            for run in self._runs(jaxpr.eqns):
                body = repeats and self._is_plain(run[0]) and repeats.first(run)
                if body:
                    self._repeated(run, *body)
                else:
                    for eqn in run:
                        self.evaluate(eqn)
            return [self.body.read(v) for v in jaxpr.outvars]
        finally:
            self.body = outer

    def _runs(self, eqns: Sequence) -> Iterator[list]:
        """The equations in order: neighbours of one scope that no weight enters, together.

        Each is asked for when those before it, save plain ones, are evaluated.
        """
        run: list = []
        for eqn in eqns:
            if id(eqn) in self.body.done:  # it was made with a sibling
                continue
            plain = self._is_plain(eqn)
            if run and not (plain and compat.scopes(eqn) == compat.scopes(run[0])):
                yield run
                run = []
            run.append(eqn)
            if not plain:
                yield run
                run = []
        if run:
            yield run

    def _is_plain(self, eqn: Equation) -> bool:
        # What the run itself makes is not there yet; plain equations make no weights.
        values = [self.body.env.get(v) for v in eqn.invars if not isinstance(v, compat.Literal)]
        return not eqn.effects and not any(is_weight(v) or is_waiting(v) for v in values)

    def _repeated(self, run: list, body: Body, first: Body) -> None:
        """A run that equals an earlier one, by the function of that: JAX keeps its derivative."""
        args = [self.body.read(v) for v in body.invars]
        evaluate = functools.partial(self.run, first, (), scopes=first.scopes)
        # The names that all of the run share are this call's; inside come those of the first run,
        # less the names that all of that share.
        with compat.eqn_context(run[0], slice(self.body.scopes, body.scopes)):
            inlined = lambda f, _: jax.jit(f, inline=compat.INLINED)
            outs = self.once(first, evaluate, args, run[0], "run", inlined)
        self.body.env.update(zip(body.outvars, outs))

    def evaluate(self, eqn: Equation) -> None:
        values = [self.body.read(v) for v in eqn.invars]
        with compat.eqn_context(eqn, slice(self.body.scopes, None)):
            outs = self._equation(eqn, values)
        self.made(eqn, outs)

    def once(
        self,
        source: Any,
        run: Callable,
        args: Sequence,
        call: Equation,
        name: str,
        transform: Callable,
        fixed: Sequence[bool] = (),
    ) -> list:
        """`run(args)` by one function that serves all calls of one source with alike weights.

        The events of the one trace are taken over for the weights of each call. The function is
        `transform(f, the arguments that it takes)`: of `jax.jit` or `jax.checkpoint`, which keep
        the trace.
        """
        # In the shared function a weight goes by the number of its argument, and its masks are
        # those of this call.
        entered = [
            dataclasses.replace(self.fresh(a), origin=_Number(i, a.name)) if is_weight(a) else a
            for i, a in enumerate(args)
        ]
        # Weights are alike if all that is static of them is: kinds, labels, scales, moves of codes.
        key = (id(source), tuple(jax.tree.structure(a) for a in entered), tuple(fixed))
        if key not in self._jits:
            events: dict = {}

            def body(*xs: Any) -> list:
                with self.recording(events):
                    return run(xs)

            body.__name__ = body.__qualname__ = name
            # `source` is kept so that no other object gets its id.
            self._jits[key] = (transform(body, entered), events, source)
        fn, events, _ = self._jits[key]
        # Traced at the first call, which records `events`; later calls repeat them.
        outs = fn(*entered)
        self.replay(events, args, call)
        return [
            # From numbers of arguments back to paths.
            dataclasses.replace(o, origin=origins(*(args[i] for i in origins(o))))
            if is_weight(o)
            else o
            for o in outs
        ]

    def made(self, eqn: Equation, outs: Sequence) -> None:
        """Takes the outputs of an equation of the body."""
        self.body.done.add(id(eqn))
        self.body.env.update(zip(eqn.outvars, outs))

    def siblings(self, eqn: Equation, side: int) -> list:
        """The later dot_generals of the body that multiply the same input, operand `side` of `eqn`,
        with an adapted weight: (equation, which operand is the weight, the weight)."""
        found = []
        for other, x_side in self.body.products_of(eqn.invars[side]):
            v = other.invars[1 - x_side]
            if other is not eqn and id(other) not in self.body.done and self._reach(v):
                w = self.body.read(v)
                if isinstance(w, AdaptedWeight):
                    found.append((other, 1 - x_side, w))
        return found

    def _reach(self, v: Any) -> bool:
        """Makes a value ahead of its turn, if it is only moved from what is there."""
        if self.body.has(v):
            return True
        eqn = self.body.maker(v)
        # Moves alone: making them early reads no data, and changes no product.
        if eqn is None or not may_move(eqn) or not all(map(self._reach, eqn.invars)):
            return False
        self.evaluate(eqn)
        return True

    def _equation(self, eqn: Equation, values: list) -> list:
        """The outputs of one equation; here the kinds of weights are told apart."""
        weights = [v for v in values if is_weight(v)]
        if not weights:
            return self.bind(eqn, values)
        rule = RULES.get(eqn.primitive.name)
        fn = rule.of(weights) if rule else None
        if rule is None or fn is None or fn is not rule.coded:  # codes are read first
            values = [v.array() if isinstance(v, Coded) else v for v in values]
        if not by_number(eqn):
            values = [v.settled() if isinstance(v, AdaptedWeight) else v for v in values]
        outs = fn(self, eqn, values) if fn else no_rule(eqn.primitive.name)
        if isinstance(outs, str):
            # No rule, or one that cannot: the sum itself, as a visible use.
            plain = [self.materialise(v, eqn, why=outs) if is_weight(v) else v for v in values]
            outs = self.bind(eqn, plain)
        # What moves codes may have to read them: an array then, and no weight any more.
        read = lambda v: isinstance(v, Coded) and not is_waiting(v.base)
        return [v.base if read(v) else v for v in outs]

    def bind(self, eqn: Equation, values: list) -> list:
        """The equation itself, on arrays; what only moves a quantised weight waits."""
        if any(map(is_waiting, values)):
            alone = len(values) == 1
            # A gather over devices or a new sharding: codes are sent, and not what they stand for.
            elsewhere = sent(values[0], eqn) if alone else None
            if elsewhere is not None:
                return [elsewhere]
            alone = alone and len(eqn.outvars) == 1
            # A transpose, reshape or cast waits until the weight is read.
            moved = values[0].moved(eqn) if alone and may_move(eqn) else None
            if moved is not None:
                return [moved]
            if eqn.primitive.name == "gather" and is_waiting(values[0]):
                # Only the rows that are looked up are read.
                rows = values[0].rows(eqn, values[1])
                if rows is not None:
                    return [rows]
            # Read again in the backward pass: what is kept for it are the codes.
            return jax.checkpoint(lambda *xs: self.bind(eqn, list(map(value, xs))))(*values)
        params = eqn.primitive.get_bind_params(eqn.params)
        out = eqn.primitive.bind(*values, **params)
        return list(out) if eqn.primitive.multiple_results else [out]

    def use(self) -> int:
        """A number that no other use has: it tells dropout masks apart."""
        self._uses += 1
        return self._uses

    def fresh(self, value: Any) -> Any:
        """A weight as it enters a body: its masks there differ from those of other calls."""
        return value.folded(self.use()) if has_seed(value) else value

    def used(
        self,
        w: Followed,
        eqn: Equation,
        dims: Sequence[Iterable[int]] = ((), (), ()),
        how: str = LOW_RANK,
        name: str | None = None,
        plan: str = "",
        why: str = "",
        consumed: Iterable[int] = (),
    ) -> None:
        """Records a use, with the weight's axes by their part in it: in, out, batch. `consumed`:
        axes of the leaf that the weight has no more, and that were in axes."""
        inner, outer, batch = ({axis for d in part for axis in w.axes[d]} for part in dims)
        inner |= {*consumed}
        # An axis that a loop or an index consumed is a batch axis, if it is neither in nor out. An
        # axis has the first part that it is in.
        parts = inner, outer - inner, (batch | {*w.stacked}) - inner - outer
        in_axes, out_axes, batch_axes = (tuple(sorted(a)) for a in parts)
        dilated = max(eqn.params.get("rhs_dilation") or (1,)) > 1
        name = name or eqn.primitive.name
        line = compat.source_line(eqn)
        use = Use(name, how, line, in_axes, out_axes, batch_axes, plan, dilated, why)
        # By the equation, so that one that is evaluated again counts once.
        self.events |= {(leaf, id(eqn), how): use for leaf in origins(w)}

    def materialise(
        self, w: Followed, eqn: Equation, name: str | None = None, why: str = ""
    ) -> jax.Array:
        """The plain array that an equation without a rule needs."""
        if w.indexed:  # rows of a table that turned out to be activations
            self.used(w, eqn, ((), range(w.ndim), ()), name="gather", consumed=w.indexed)
        elif not isinstance(w, Coded):
            self.used(w, eqn, how=MATERIALISED, name=name, why=why)
        return w.array()

    def returned(self, w: Followed, moved: bool, why: str) -> jax.Array:
        """A weight that the function returns, as an array. Strict mode does not object to one that
        comes back as it was."""
        if moved and not isinstance(w, Coded):
            how = LOW_RANK if w.indexed else MATERIALISED
            use = Use("output", how, "the outputs", why=why)
            self.events |= {(leaf, None, how): use for leaf in origins(w)}
        return w.array()

    @contextlib.contextmanager
    def recording(self, events: dict):
        """Records into `events` instead: those of a function that is traced once, called often."""
        outer, self.events = self.events, events
        try:
            yield
        finally:
            self.events = outer

    def replay(self, events: dict, args: Sequence, call: Equation) -> None:
        """Takes over the events of such a function, for the arguments of the equation `call`."""
        for (i, eqn, how), use in events.items():
            # In JAX's own code (einsum is a jit) there is no line of the user's: the call has it.
            source = use.source or compat.source_line(call)
            use = dataclasses.replace(use, source=source)
            self.events |= {(leaf, eqn, how): use for leaf in origins(args[i])}
