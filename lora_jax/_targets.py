"""What a configuration selects of a parameter tree, as a value to look at, count and assert on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax._config import LoRAConfig
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.fold import fold, folded
from lora_jax._core.geometry import Geometry
from lora_jax._core.paths import flatten
from lora_jax._core.plain import fields_of, plain, written
from lora_jax._core.table import html_table, table
from lora_jax._nodes.adapters import LowRank
from lora_jax._nodes.node import is_node


@dataclasses.dataclass(frozen=True)
class Target:
    """One adapted leaf.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> config = lora.LoRAConfig(rank=2, alpha=8, targets="q")
    >>> target = lora.select({"q": jnp.ones((4, 3))}, config)["q"]
    >>> target.rank, target.scale, target.parameters  # 2 · (4 + 3)
    (2, 4.0, 14)
    """

    shape: tuple[int, ...]
    geometry: Geometry
    rank: int
    alpha: float
    scale: float
    dropout: float = 0.0
    embedding: bool = False
    primitive: str = "?"

    @property
    def parameters(self) -> int:
        batch, inner, outer = self.geometry.sizes(self.shape)
        return batch * self.rank * (inner + outer)


@dataclasses.dataclass(frozen=True)
class Targets:
    """What a configuration selects of a parameter tree: look at it, count it, assert on it.

    Printed, leaves that differ in numbers alone, such as those of repeated layers, and agree in all
    columns are one line, `layers_{0..23}/q/kernel`, with their count and the parameters of all;
    each by itself is in the mapping: `for path in targets: print(path, targets[path])`.

    Attributes:
      lora: {path: `Target`} of the adapted leaves.
      full: {path: shape} of the leaves that are trained in full.
      rows: {path: (shape, row numbers)} of the tables of which rows are trained.
      config: the configuration.
      total: the number of all parameters.
      left: {path: reason} of the leaves that are contracted or looked up, and that "all-linear"
        leaves out: heads, embeddings, and what is excluded by name.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> params = {"q": jnp.ones((4, 3)), "norm": jnp.ones(3)}
    >>> targets = lora.select(params, lora.LoRAConfig(rank=2, targets="q", full=["norm"]))
    >>> list(targets), dict(targets.full), targets.parameters, targets.total
    (['q'], {'norm': (3,)}, 17, 15)
    """

    lora: Mapping[str, Target]
    full: Mapping[str, tuple[int, ...]]
    rows: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    config: LoRAConfig
    total: int
    left: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many parameters are trained."""
        return (
            sum(t.parameters for t in self.lora.values())
            + sum(math.prod(shape) for shape in self.full.values())
            + sum(len(index) * math.prod(shape[1:]) for shape, index in self.rows.values())
        )

    def __hash__(self) -> int:
        # Mappings are not hashable; a frozenset of items is equal where they are.
        parts = (self.lora, self.full, self.rows, self.left)
        return hash((*(frozenset(x.items()) for x in parts), self.config, self.total))

    def to_json(self) -> str:
        """The targets as JSON text, for `from_json`.

        Raises:
          LoRAError: the configuration holds a function.
        """
        self.config.to_json()  # which names what cannot be written
        return written(self)

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> Targets:
        """The targets that `to_json` wrote: its text, or what `json` reads of it.

        Raises:
          LoRAError: it is something else.

        >>> import jax.numpy as jnp, lora_jax as lora
        >>> targets = lora.select({"q": jnp.ones((4, 4))}, lora.LoRAConfig(rank=2, targets="q"))
        >>> lora.Targets.from_json(targets.to_json()) == targets
        True
        """
        values = fields_of(cls, text)
        try:
            # `plain` wrote dataclasses as dicts: inner ones are made before outer ones.
            lora = {
                p: t | {"geometry": Geometry(**t["geometry"])} for p, t in values["lora"].items()
            }
            values["lora"] = {p: Target(**t) for p, t in lora.items()}
            # `fields_of` made tuples and compiled patterns of it: back to what JSON holds.
            values["config"] = LoRAConfig.from_json(plain(values["config"]))
            return cls(**values)
        except (AttributeError, KeyError, TypeError) as e:
            raise LoRAError(
                f"expected what Targets.to_json() wrote, found other fields ({e!r}): "
                "lora.Targets.from_json(targets.to_json())"
            ) from None

    def __len__(self):
        return len(self.lora)

    def __iter__(self):
        return iter(self.lora)

    def __contains__(self, path: object) -> bool:
        return path in self.lora

    def __getitem__(self, path: str) -> Target:
        return self.lora[path]

    def check(self, adapters: Any) -> None:
        """Raises a LoRAError unless `adapters` are those of these targets: none is missing, none
        is extra, and each has the rank and shapes that the configuration gives it.

        >>> import jax, jax.numpy as jnp, lora_jax as lora
        >>> params = {"q": jnp.ones((4, 4))}
        >>> targets = lora.select(params, lora.LoRAConfig(rank=2, targets="q"))
        >>> targets.check(lora.init(jax.random.key(0), params, targets))
        """
        flat = flatten(adapters, is_leaf=is_node)
        expected = {*self.lora, *self.full, *self.rows}
        failures = [f"'{p}' has no adapter" for p in sorted(expected - set(flat))]
        failures += [
            f"'{p}' has an adapter, but is not a target" for p in sorted(set(flat) - expected)
        ]
        for path, t in self.lora.items():
            node = flat.get(path)
            if not isinstance(node, LowRank):
                if node is not None:
                    failures.append(f"'{path}': expected a LoRA, found {type(node).__name__}")
            elif node.rank != t.rank:
                failures.append(f"'{path}': expected rank {t.rank}, found {node.rank}")
            elif (node.a.shape, node.b.shape) != t.geometry.factor_shapes(t.shape, t.rank):
                failures.append(
                    f"'{path}': a {node.a.shape} and b {node.b.shape} do not fit {t.shape}"
                )
        raise_all(
            "the adapters are not those of this configuration:",
            failures,
            "make them by lora.init(key, params, targets), or select what they were made for",
        )

    def _table(self) -> tuple[Sequence[str], Sequence[tuple], list[str]]:
        """The head, the rows, and the lines below."""
        adapted = [
            (
                path,
                t.shape,
                t.primitive,
                t.geometry.in_axes,
                t.geometry.out_axes,
                t.geometry.batch_axes,
                t.rank,
                float(t.alpha),
                t.parameters,
            )
            for path, t in self.lora.items()
        ]
        whole = [(p, s, "full", s) for p, s in self.full.items()]
        parts = [(p, s, f"{len(i)} rows", (len(i), *s[1:])) for p, (s, i) in self.rows.items()]
        full, some = (
            [(path, s, how, (), (), (), "", "", math.prod(trained)) for path, s, how, trained in x]
            for x in (whole, parts)
        )
        names = ("leaf", "shape", "primitive", "in", "out", "batch", "rank", "alpha", "parameters")
        head, rows = folded(names, adapted, full, some, summed="parameters")
        share = f" ({self.parameters / self.total:.3%})" if self.total else ""
        trained = f"trained: {self.parameters:,} of {self.total:,}{share}"
        left = [
            f"left out: {path}{f' ({len(path)} leaves)' if len(path) > 1 else ''}, {reason}"
            for path, reason in fold(self.left)
        ]
        return head, rows, [*left, trained]

    def __str__(self):
        head, rows, below = self._table()
        return "\n".join([table(head, rows), *below])

    def _repr_html_(self) -> str:
        head, rows, below = self._table()
        return html_table(head, rows, *below)
