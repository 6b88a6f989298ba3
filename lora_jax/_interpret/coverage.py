"""What became of each adapted leaf: low-rank, materialised, or unused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from lora_jax._core.errors import raise_all
from lora_jax._core.fold import folded
from lora_jax._core.table import html_table, table

LOW_RANK, MATERIALISED = "low-rank", "materialised"


@dataclasses.dataclass(frozen=True)
class Use:
    """One place where a leaf is used.

    Attributes:
      primitive: the JAX primitive, such as "dot_general".
      how: "low-rank" or "materialised".
      source: the line of the user's code.
      in_axes, out_axes, batch_axes: the leaf's axes by their part in a contraction.
      plan: how the product was made; see `lora.adapt`.
      dilated: it is a convolution with a dilated kernel.
      why: it is materialised, where there is more to say than that no rule follows it.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> found = lora.survey(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 3))}, jnp.ones((2, 4)))
    >>> use = found["w"].uses[0]
    >>> use.primitive, use.how, use.in_axes, use.out_axes
    ('dot_general', 'low-rank', (0,), (1,))
    """

    primitive: str
    how: str
    source: str
    in_axes: tuple[int, ...] = ()
    out_axes: tuple[int, ...] = ()
    batch_axes: tuple[int, ...] = ()
    plan: str = ""
    dilated: bool = False
    why: str = ""


def by_leaf(paths: Iterable[str], events: Mapping[tuple, Use]) -> dict[str, tuple[Use, ...]]:
    """The uses of each leaf, in the order of the program."""
    # The keys of events are (leaf, id of the equation, how and by what).
    uses: dict[str, list[Use]] = {path: [] for path in paths}
    for (path, _, _), use in events.items():
        uses[path].append(use)
    return {path: tuple(u) for path, u in uses.items()}


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Each adapted leaf with every use that a function makes of it.

    Printed, leaves that differ in numbers alone and agree in all columns are one line.

    Attributes:
      shapes: {path: shape} of the adapted leaves.
      uses: {path: its uses}; see `Use`.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"up": jnp.ones((4, 3)), "down": jnp.ones((3, 4))}
    >>> config = lora.LoRAConfig(rank=2, targets=["up", "down"])
    >>> bound = lora.bind(params, lora.init(jax.random.key(0), params, config))
    >>> fn = lambda p, x: x @ p["up"] @ jnp.tanh(p["down"])  # tanh needs the sum itself
    >>> found = lora.coverage(fn, bound, jnp.ones((2, 4)))
    >>> found.low_rank, found.materialised, found.status("down")
    (('up',), ('down',), 'materialised')
    """

    shapes: Mapping[str, tuple[int, ...]]
    uses: Mapping[str, tuple[Use, ...]]

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], events: dict) -> Coverage:
        return cls(dict(shapes), by_leaf(shapes, events))

    def status(self, path: str) -> str:
        """ "low-rank", "materialised" or "unused"."""
        uses = self.uses[path]
        if not uses:
            return "unused"
        # One such use is enough: it forms a gradient of the size of the leaf.
        return MATERIALISED if any(u.how == MATERIALISED for u in uses) else LOW_RANK

    def _paths(self, status: str) -> tuple[str, ...]:
        return tuple(p for p in self.shapes if self.status(p) == status)

    @property
    def low_rank(self) -> tuple[str, ...]:
        return self._paths(LOW_RANK)

    @property
    def materialised(self) -> tuple[str, ...]:
        return self._paths(MATERIALISED)

    @property
    def unused(self) -> tuple[str, ...]:
        return self._paths("unused")

    def check(self, name: str, allow: str, part: bool = False) -> None:
        """Raises a LoRAError that lists every leaf that is not wholly low-rank.

        Args:
          name: of the function.
          allow: the call that allows it, for the message.
          part: the function may leave leaves unused.
        """
        unused = () if part else self.unused
        failures = [
            f"'{path}' {self.shapes[path]} is materialised by `{u.primitive}` at {u.source}"
            + (f": {u.why}" if u.why else "")
            for path in self.materialised
            for u in self.uses[path]
            if u.how == MATERIALISED
        ] + [f"'{path}' {self.shapes[path]} is never used" for path in unused]
        raise_all(
            f"in `{name}`, {len(self.materialised) + len(unused)} of {len(self.shapes)} "
            "adapted leaves are not applied in low rank:",
            failures,
            f"leave them out, `LoRAConfig(..., exclude=[...])`, or allow it, `{allow}`; "
            "`lora.coverage(fn, *args)` shows every use.",
        )

    def _table(self) -> tuple[Sequence[str], Sequence[tuple], str]:
        """The head, the rows, and the line below."""
        rows = [
            (
                path,
                self.shapes[path],
                self.status(path),
                # dict.fromkeys: each once, in the order of the program.
                "; ".join(dict.fromkeys(u.plan for u in self.uses[path] if u.plan)),
                ", ".join(dict.fromkeys(f"{u.primitive} at {u.source}" for u in self.uses[path])),
            )
            for path in self.shapes
        ]
        total = (
            f"{len(self.low_rank)} low-rank, {len(self.materialised)} materialised, "
            f"{len(self.unused)} unused"
        )
        return *folded(("leaf", "shape", "status", "plan", "uses"), rows), total

    def __str__(self):
        head, rows, total = self._table()
        return f"{table(head, rows)}\n{total}"

    def _repr_html_(self) -> str:
        return html_table(*self._table())
