"""What a configuration selects of a parameter tree, as a value to look at, count and assert on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_jax._config import LoRAConfig
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.fold import fold, folded
from lora_jax._core.geometry import Geometry
from lora_jax._core.numbers import BELOW_ONE, COUNT, COUNT_OR_ZERO, FINITE, refused
from lora_jax._core.paths import flatten, nearest
from lora_jax._core.plain import fields_of, plain, written
from lora_jax._core.table import html_table, table
from lora_jax._nodes.adapters import Full, LowRank, Rows
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
            if wrong := [*(found := cls(**values))._wrong()]:
                raise TypeError("; ".join(wrong[:3]))
            return found
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            if isinstance(e, LoRAError):  # a ValueError as well, and it says more
                raise
            raise LoRAError(
                f"expected what Targets.to_json() wrote, found other fields ({e!r}): "
                "lora.Targets.from_json(targets.to_json())"
            ) from None

    def _wrong(self) -> Iterable[str]:
        """Fields that are not of their types, as a file may have them."""
        sizes = lambda x: isinstance(x, tuple) and all(map(COUNT_OR_ZERO.fits, x))
        for path, t in self.lora.items():
            axes = (t.geometry.in_axes, t.geometry.out_axes, t.geometry.batch_axes)
            if not (sizes(t.shape) and all(map(sizes, axes)) and t.geometry.covers(len(t.shape))):
                yield f"'{path}': shape {t.shape} with {t.geometry}"
            numbers = dict(rank=(t.rank, COUNT), dropout=(t.dropout, BELOW_ONE))
            numbers |= dict(alpha=(t.alpha, FINITE), scale=(t.scale, FINITE))
            yield from (f"'{path}': {failure}" for failure in refused(**numbers))
            if (type(t.embedding), type(t.primitive)) != (bool, str):
                yield f"'{path}': embedding={t.embedding!r}, primitive={t.primitive!r}"
        yield from (f"'{p}' in full: shape {s!r}" for p, s in self.full.items() if not sizes(s))
        for path, found in self.rows.items():
            if not (isinstance(found, tuple) and len(found) == 2 and all(map(sizes, found))):
                yield f"'{path}' by rows: {found!r}"
        if not (
            COUNT_OR_ZERO.fits(self.total) and all(isinstance(x, str) for x in self.left.values())
        ):
            yield f"total={self.total!r}, left={self.left!r}"

    def check_fit(self, leaves: Mapping[str, Any], call: str) -> None:
        """Raises a LoRAError, with the corrected call, unless these are leaves of the targets'
        shapes: {path: array}."""
        shapes = {p: t.shape for p, t in self.lora.items()} | dict(self.full)
        shapes |= {p: shape for p, (shape, _) in self.rows.items()}
        shape_of = lambda path: getattr(leaves.get(path), "shape", "no such leaf")
        raise_all(
            "these targets do not fit the parameters:",
            (
                f"'{path}': expected {tuple(shape)}, found {shape_of(path)}"
                for path, shape in shapes.items()
                if shape_of(path) != tuple(shape)
            ),
            call,
        )

    def __len__(self):
        return len(self.lora)

    def __iter__(self):
        return iter(self.lora)

    def __contains__(self, path: object) -> bool:
        return path in self.lora

    def __getitem__(self, path: str) -> Target:
        if path not in self.lora:
            close = ", ".join(nearest(str(path), self.lora)) or "none is adapted"
            raise LoRAError(f"no adapted leaf '{path}'; nearest: {close}")
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
        whole = {p: (Full, tuple(shape), None) for p, shape in self.full.items()}
        parts = {p: (Rows, tuple(shape), index) for p, (shape, index) in self.rows.items()}
        for path, (kind, shape, index) in (whole | parts).items():
            node = flat.get(path)
            found = (type(node), getattr(node, "shape", None), getattr(node, "index", None))
            if node is not None and found != (kind, shape, index):
                rows = lambda index: "" if index is None else f", rows {index}"
                failures.append(
                    f"'{path}': expected {kind.__name__} of {shape}{rows(index)}, found "
                    f"{found[0].__name__} of {found[1]}{rows(found[2])}"
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
