"""The interpreter: evaluates a jaxpr with adapted weights, and records what became of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from lora_jax import _compat, _control, _products  # noqa: F401  (they register their rules)
from lora_jax._rules import RULES
from lora_jax._weight import AdaptedWeight, is_weight, origins

LOW_RANK, MATERIALISED = "low-rank", "materialised"


@dataclasses.dataclass(frozen=True)
class Use:
    """One place where a leaf is used.

    Attributes:
      primitive: the JAX primitive, such as "dot_general".
      how: "low-rank" or "materialised".
      source: the line of the user's code.
      in_axes, out_axes, batch_axes: the leaf's axes by their part in a contraction.
    """

    primitive: str
    how: str
    source: str
    in_axes: tuple[int, ...] = ()
    out_axes: tuple[int, ...] = ()
    batch_axes: tuple[int, ...] = ()


def by_leaf(paths: Iterable[str], events: Mapping[tuple, Use]) -> dict[str, tuple[Use, ...]]:
    """The uses of each leaf, in the order of the program."""
    uses: dict[str, list[Use]] = {path: [] for path in paths}
    for (path, _, _), use in events.items():
        uses[path].append(use)
    return {path: tuple(u) for path, u in uses.items()}


class Interpreter:
    """One evaluation. `events` maps (leaf, equation, how) to a `Use`."""

    def __init__(self):
        self.events: dict[tuple, Use] = {}
        self.jits: dict = {}  # rebuilt inner functions, see the rule of `jit`
        self._uses = 0

    def run(self, jaxpr, consts, args) -> list:
        """The outputs of an (open) jaxpr; those that are a moved weight stay adapted."""
        env: dict = {}

        def read(v):
            return v.val if isinstance(v, _compat.Literal) else env[v]

        env.update(zip(jaxpr.constvars, consts))
        env.update(zip(jaxpr.invars, args))
        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            with _compat.eqn_context(eqn):
                outs = self._equation(eqn, values)
            env.update(zip(eqn.outvars, outs))
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, eqn, values) -> list:
        if not any(map(is_weight, values)):
            return self.bind(eqn, values)
        rule = RULES.get(eqn.primitive.name)
        outs = rule(self, eqn, values) if rule else None
        if outs is None:
            plain = [self.materialise(v, eqn) if is_weight(v) else v for v in values]
            outs = self.bind(eqn, plain)
        return outs

    def bind(self, eqn, values) -> list:
        """The equation itself, on arrays."""
        params = eqn.primitive.get_bind_params(eqn.params)
        out = eqn.primitive.bind(*values, **params)
        return list(out) if eqn.primitive.multiple_results else [out]

    def use(self) -> int:
        """A number that no other use has: it tells dropout masks apart."""
        self._uses += 1
        return self._uses

    def fresh(self, value):
        """A weight as it enters a body: its masks there differ from those of other calls."""
        return value.folded(self.use()) if is_weight(value) and value.seed is not None else value

    def used(self, w: AdaptedWeight, eqn, how, in_dims=(), out_dims=(), batch_dims=(), name=None):
        """Records a use, in terms of the axes of the leaf."""
        inner, outer, batch = (
            {axis for d in dims for axis in w.axes[d]} for dims in (in_dims, out_dims, batch_dims)
        )
        self._record(
            w, eqn, how, inner, outer - inner, (batch | set(w.stacked)) - inner - outer, name
        )

    def _record(self, w, eqn, how, inner, outer, batch, name=None):
        axes = [tuple(sorted(a)) for a in (inner, outer, batch)]
        name = name or eqn.primitive.name
        use = Use(name, how, _compat.source_line(eqn), *axes)
        self.events |= {(leaf, id(eqn), how): use for leaf in origins(w)}

    def materialise(self, w: AdaptedWeight, eqn, name: str | None = None):
        """The plain array that an equation without a rule needs."""
        if w.indexed:  # rows of a table that turned out to be activations
            rows, rest = set(w.indexed), {axis for dim in w.axes for axis in dim}
            self._record(
                w, eqn, LOW_RANK, rows, rest - rows, set(w.stacked) - rows - rest, "gather"
            )
            return w.looked_up()
        self.used(w, eqn, MATERIALISED, name=name)
        return w.materialise()

    def returned(self, w: AdaptedWeight):
        """A moved weight that the function returns, as a plain array."""
        how = LOW_RANK if w.indexed else MATERIALISED
        use = Use("output", how, "the outputs")
        self.events |= {(leaf, None, how): use for leaf in origins(w)}
        return w.looked_up() if w.indexed else w.materialise()

    @contextlib.contextmanager
    def recording(self, events: dict):
        """Records into `events` instead: those of a function that is traced once, called often."""
        outer, self.events = self.events, events
        try:
            yield
        finally:
            self.events = outer

    def replay(self, events: dict, args: Sequence, call) -> None:
        """Takes over the events of such a function, for the arguments of the equation `call`."""
        for (i, eqn, how), use in events.items():
            source = use.source or _compat.source_line(call)
            use = dataclasses.replace(use, source=source)
            self.events |= {(leaf, eqn, how): use for leaf in origins(args[i])}
