"""A PEFT folder as adapters of the torch model itself: one node for each torch parameter, by name.

The base model is not needed: the kind of each update says how it lies in torch.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.geometry import Geometry
from lora_jax._nodes.adapters import DoRA, LoRA
from lora_jax.peft._blocks import Block, LeafInfo
from lora_jax.peft._build import Build
from lora_jax.peft._config import PeftConfig, peft_config
from lora_jax.peft._deltas import MERGE_OR_LOAD
from lora_jax.peft._experts import Way, ways
from lora_jax.peft._file import CONFIG, AdapterFile
from lora_jax.peft._formats import open_any
from lora_jax.peft._mapping import Entry
from lora_jax.peft._parse import parse
from lora_jax.peft._parts import Experts, NewRows, Parsed, Update, Value

# Torch's Linear is (out, in), GPT-2's Conv1D and an embedding's table (in, out).
OUT_IN, IN_OUT = Geometry((1,), (0,)), Geometry((0,), (1,))

# (experts, out, in)
EXPERTS_OUT_IN = Geometry((2,), (1,), (0,))


@dataclasses.dataclass(frozen=True)
class TorchAdapter:
    """An opened PEFT folder, of which no tensor was read yet.

    Attributes:
      parts: {torch parameter: (its place, what the file holds for it)}.
      unclear: modules of experts of which the ranks and scales in `parts` may be others.
    """

    file: AdapterFile
    config: PeftConfig
    parsed: Parsed
    parts: Mapping[str, tuple[Entry, Update | Value | NewRows]]
    unclear: tuple[str, ...] = ()

    def node(self, name: str, base: Any = None, dtype: Any = None) -> Any:
        """The adapter of one parameter, its tensors read; of `base`, its value, the file may hold a
        change."""
        place, what = self.parts[name]
        path, shape = place.blocks[0].leaf.path, place.shape
        # An update is built from shapes; only what is added to the base reads its value.
        base = jax.ShapeDtypeStruct(shape, np.float32) if base is None else base
        build = Build(self.file, self.config, {path: base}, dtype)
        build.add(place, what)
        nodes = build.nodes()
        raise_all(f"{self.file.folder}: cannot be used:", build.failures)
        return nodes[path]

    def keys(self, name: str) -> tuple[str, ...]:
        """The names of the tensors of one parameter."""
        what = self.parts[name][1]
        low = isinstance(what, Update)
        names = (what.a, what.b, what.e, what.magnitude) if low else (what.key,)
        return tuple(k for k in (*names, getattr(what, "add", None)) if k is not None)

    def low_rank(self) -> dict[str, LoRA | DoRA]:
        """{name: node in fp32} of all low-rank updates."""
        updates = (n for n, (_, what) in self.parts.items() if isinstance(what, Update))
        return {n: self.node(n, dtype=np.float32) for n in updates}


def open_torch(
    folder: str | os.PathLike, ignore: Sequence[str] = (), rename: Mapping[str, str] | None = None
) -> TorchAdapter:
    """Opens a PEFT folder without its base model.

    A linear weight is taken to lie as in torch's Linear, (out, in). Which of several parameters of
    one module of experts is which, the file does not say: they are named with their depth.

    Raises:
      LoRAError: as `lora.peft.load`, for what is wrong with the folder itself.
    """
    file = open_any(folder, rename=rename)
    config = peft_config(file.config, file.folder / CONFIG, tuple(ignore), len(file.tensors))
    parsed = parse(file, config)
    if parsed.deltas:
        raise LoRAError(f"{folder}: peft_type={config.kind!r}: {MERGE_OR_LOAD}")
    parts: dict[str, tuple[Entry, Any]] = {}
    for u in parsed.updates:
        # Each parameter is a leaf of its own name.
        stack = (u.batch, u.n_out, u.n_in), EXPERTS_OUT_IN  # mlx-lm's
        shape = stack if u.kind == "experts" else torch_shape(file, u)
        parts[u.name] = entry(u.name, u.name, *shape, u.kind), u
    unclear: list[str] = []
    for group in parsed.experts:
        for name, u in zip(expert_names(group), _experts(group, unclear)):
            shape = (u.batch, u.n_out, u.n_in)
            parts[name] = entry(name, name, shape, EXPERTS_OUT_IN, "experts"), u
    for v in parsed.values:
        parts[v.name] = entry(v.name, v.name, v.shape, None, "value"), v
    for r in parsed.rows:
        # The table has at least so many rows; how many, the file does not say.
        shape = (max(r.index, default=-1) + 1, r.shape[1])
        parts[r.name] = entry(r.name, r.name, shape, None, "rows"), r
    return TorchAdapter(file, config, parsed, parts, tuple(unclear))


def expert_names(group: Experts) -> tuple[str, ...]:
    """A name for each update, outermost first."""
    names = sorted(group.parameters)
    if len(group.pairs) == len(names) == 1:
        return (f"{group.module}.{names[0]}",)
    of = "|".join(names)
    return tuple(f"{group.module}.({of})[{i}]" for i in reversed(range(len(group.pairs))))


def expert_ways(group: Experts) -> list[Way]:
    """The assignments of a module's pairs to its parameters that ranks allow, without a base."""
    numbers = {u.batch for pair in group.pairs for u in pair.values()}
    # A number of experts, one for all pairs.
    fits = [lambda _, u, n=n: u if u.batch == n else None for n in sorted(numbers)]
    return [way for fit in fits for way in ways(group, fit)]


def _experts(group: Experts, unclear: list[str]) -> list[Update]:
    """The updates of a module's pairs, whose rank and scale may depend on which is which."""
    found = [[u for _, u in way] for way in expert_ways(group)]
    if len({tuple((u.rank, u.scale) for u in way) for way in found}) != 1:
        unclear.append(
            f"'{group.module}': which of its tensors are {' and '.join(group.parameters)} the base "
            "says alone, and their ranks or alphas differ"
        )
    # Where all ways give the same ranks and scales, any of them will do.
    return found[0] if found else [next(iter(pair.values())) for pair in group.pairs]


def torch_shape(file: AdapterFile, u: Update) -> tuple[tuple[int, ...], Geometry]:
    """(shape, axes) of the weight of an update without experts, unless it is a GPT-2 Conv1D's."""
    if u.kind == "embedding":
        return (u.n_in, u.n_out), IN_OUT
    # A Linear's A is (rank, in), a convolution's (rank, in, *window): the rest is the weight's.
    shape = (u.n_out, *file.shape(u.a)[1:])
    return shape, Geometry(tuple(range(1, len(shape))), (0,))


def entry(
    name: str, path: str, shape: Sequence[int], geometry: Geometry | None, kind: str
) -> Entry:
    """A whole tensor `path` as the place of the torch parameter `name`."""
    leaf = LeafInfo(path, tuple(shape), geometry, kind)
    return Entry(name, (Block(leaf, (None,) * len(shape)),), kind, "same", tuple(shape))


def norm(node: LoRA) -> float:
    """‖ΔW‖ (Frobenius, over all weights of a stack) from the factors, without ΔW.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> norm(lora.LoRA(jnp.ones((2, 2)), jnp.ones((2, 8)), 0.5, OUT_IN))  # of 16 ones
    4.0
    """
    a, b = node.geometry.pair(np.asarray(node.a), np.asarray(node.b))
    squares = sum(_square(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(a, b))
    return float(abs(node.scale) * np.sqrt(max(squares, 0.0)))


def _square(a: np.ndarray, b: np.ndarray) -> float:
    """‖A·B‖² of A (in, rank) and B (rank, out), in no more memory than A and B take.

    tr(AᵀA·BBᵀ) is (rank, rank) twice, which is small where the rank is; where it is not, the
    product is: in · out ≤ rank · (in + out) as soon as the rank is at least the smaller of the two.
    """
    if a.shape[1] <= min(a.shape[0], b.shape[1]):
        return float(np.sum((a.T @ a) * (b @ b.T)))
    return float(np.sum((a @ b) ** 2))


def narrow(node: LoRA) -> LoRA:
    """The same update with a rank of at most its smaller side, for what multiplies rank by rank."""
    _, i, o = node.geometry.sizes(node.shape)
    if node.rank <= min(i, o):
        return node
    a, b = node.geometry.pair(*(np.asarray(x, np.float32) for x in (node.a, node.b)))
    # A·B = 1·(A·B) = (A·B)·1, with the identity on the smaller side.
    product, one = a @ b, np.stack([np.eye(min(i, o), dtype=np.float32)] * len(a))
    a, b = (one, product) if i <= o else (product, one)
    shapes = node.geometry.factor_shapes(node.shape, min(i, o))
    a, b = a.reshape(shapes[0]), b.reshape(shapes[1])
    return dataclasses.replace(node, a=jnp.asarray(a), b=jnp.asarray(b))
