"""What an adapter file holds, by the names of the torch parameters that it changes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from lora_jax.peft._file import AdapterFile


@dataclasses.dataclass(frozen=True)
class Update:
    """A low-rank update of one torch parameter.

    Attributes:
      name: the parameter, such as "model.layers.0.self_attn.q_proj.weight".
      kind: "linear", "embedding", "conv" or "experts".
      rank, n_in, n_out, batch: sizes; batch is the number of experts, else 1. A size of 0 is not in
        the file: it is the leaf's.
      scale: the constant before B·A.
      a, b, e: the keys of its tensors; e is AdaLoRA's diagonal.
      magnitude: the key of DoRA's.
      flat: A is a matrix although the parameter may be a convolution's.
    """

    name: str
    kind: str
    rank: int
    n_in: int
    n_out: int
    batch: int
    scale: float
    a: str
    b: str
    e: str | None = None
    window: tuple[int, ...] = ()  # of a convolution
    swapped: bool = False  # A runs along the outputs of the leaf, B along its inputs
    magnitude: str | None = None
    flat: bool = False

    def arrays(self, file: AdapterFile) -> tuple[np.ndarray, np.ndarray]:
        """A (batch, rank, in) and B (batch, out, rank), in the type in which they are stored."""
        a, b = file.read(self.a), file.read(self.b)
        # A (E · r, in) is expert by expert, B (out, r · E) rank by rank.
        if self.kind == "experts":
            a = a.reshape(self.batch, self.rank, -1)
            b = b.reshape(-1, self.rank, self.batch).transpose(2, 0, 1)
        else:
            a, b = a.reshape(1, self.rank, -1), b.reshape(1, -1, self.rank)
        if self.e is not None:
            # E (r, 1) scales the ranks of A; in fp32, as the product has more digits than 16 bits.
            a = a.astype(np.float32) * file.read(self.e).astype(np.float32)[None]
        # The weight transposed is Aᵀ·Bᵀ: the two change places.
        return (b.transpose(0, 2, 1), a.transpose(0, 2, 1)) if self.swapped else (a, b)

    def turned(self) -> Update:
        """The update of the transposed weight."""
        return dataclasses.replace(self, n_in=self.n_out, n_out=self.n_in, swapped=not self.swapped)


@dataclasses.dataclass(frozen=True)
class Delta:
    """An update ΔW of one torch parameter that the file does not hold as factors.

    Attributes:
      update: its name and sizes; rank 0.
      kind: PEFT's type, such as "LOHA".
      module: its module, as PEFT's settings name it.
      keys: {name of a tensor, without its module: key}.
    """

    update: Update
    kind: str
    module: str
    keys: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Experts:
    """The adapted parameters of one module of experts; which is which only the leaves can say.

    Attributes:
      module: the module's name.
      pairs: for each pair of tensors, outermost first: {parameter that `target_parameters` may mean
        by it: the update that it is then}.
    """

    module: str
    pairs: tuple[Mapping[str, Update], ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(p for pair in self.pairs for p in pair))

    @property
    def sizes(self) -> str:
        """Those of each pair, for messages."""
        # A pair has the same sizes as any of its parameters, if their ranks are alike.
        first = (next(iter(pair.values())) for pair in self.pairs)
        return ", ".join(f"{u.batch} of {u.n_in} by {u.n_out}" for u in first)


@dataclasses.dataclass(frozen=True)
class Value:
    """A parameter in full: `key`, if given, replaces it; scale · `add` is added to it."""

    name: str
    shape: tuple[int, ...]
    key: str | None
    add: str | None = None
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Table:
    """A frozen table of the base, which PEFT stores beside an adapted embedding."""

    name: str
    shape: tuple[int, ...]
    key: str


@dataclasses.dataclass(frozen=True)
class NewRows:
    """Rows `index` of a table, replaced by the rows of `key`."""

    name: str
    shape: tuple[int, ...]
    key: str
    index: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Parsed:
    """All that a file holds.

    `copies` are pairs of keys that must hold the same, maybe transposed (with bias="all", it stores
    a saved module's bias twice, with ensure_weight_tying the factors of embedding and head).
    """

    updates: tuple[Update, ...]
    experts: tuple[Experts, ...]
    values: tuple[Value, ...]
    rows: tuple[NewRows, ...]
    tables: tuple[Table, ...]
    copies: tuple[tuple[str, str, bool], ...] = ()
    deltas: tuple[Delta, ...] = ()

    def unequal(self, file: AdapterFile) -> list[str]:
        """What is wrong with `copies`."""
        failures = []
        for copy, key, turned in self.copies:
            # Numbers, not bytes: -0.0 is 0.0.
            value = file.read(key)
            if not np.array_equal(file.read(copy), value.T if turned else value):
                failures.append(f"'{copy}' and '{key}' should be the same, and are not")
        return failures


def plain_name(name: str) -> str:
    """A name without what PEFT puts into it around an adapted module.

    >>> plain_name("a.base_layer.base_layer_norm.weight")
    'a.base_layer_norm.weight'
    """
    return re.sub(r"\.base_layer(?=\.|$)", "", name)
