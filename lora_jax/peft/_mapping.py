"""Which leaf each torch parameter belongs to: found and shown, or given; never guessed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax._core.errors import LoRAError
from lora_jax._core.fold import choice, fold
from lora_jax._core.geometry import Geometry
from lora_jax._core.nnx import state_of, survey_call
from lora_jax._core.paths import flatten
from lora_jax._core.table import table
from lora_jax._interpret.reach import LOOK_UP
from lora_jax._quantized.waiting import check_codes
from lora_jax._survey import Survey
from lora_jax._targets import Targets
from lora_jax.peft._blocks import Block, LeafInfo

BIASES = ("bias", "b")

# The names that say how a square matrix lies: (in, out).
FLAX = ("kernel", "embedding")


# An example of one that is given.
TABLE = 'mapping={r"model\\.layers\\.(\\d+)\\.self_attn\\.q_proj": "layers_{1}/attn/query/kernel"}'


@dataclasses.dataclass(frozen=True)
class Entry:
    """One torch parameter of a `TorchMapping`, and where it lies in the model's leaves.

    Attributes:
      name: such as "model.layers.0.self_attn.q_proj.weight".
      blocks: the parts of leaves that it is, in the order of its outputs: three of a fused q, k, v.
        Each prints as "layers/q/kernel[3]"; its leaf's `path` and `shape` are in `leaf`.
      kind: "linear", "embedding", "conv" or "experts", or "value" for one in full.
      layout: how the tensor lies: "out_in", "in_out", "same", "vector"; None if it is not known.
      shape: the tensor's, if it is known.
      swapped: PEFT's A runs along the outputs of the leaf: of a head that is the embedding's table,
        of experts that are (experts, in, out) in a module without `is_transposed`.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> params = {"layers": {"q": {"kernel": jnp.zeros((2, 4, 3))}}}  # a stack of two
    >>> names = {f"layers.{i}.q.weight": (3, 4) for i in range(2)}
    >>> rule = lora.Rule("q/kernel", batch_axes=(0,), in_axes=(1,), out_axes=(2,))
    >>> targets = lora.select(params, lora.LoRAConfig(rank=1, targets="q", rules=[rule]))
    >>> entry = lora.peft.mapping(names, params, targets)["layers.1.q.weight"]
    >>> entry.kind, entry.layout, [str(block) for block in entry.blocks]
    ('linear', 'out_in', ['layers/q/kernel[1]'])
    """

    name: str
    blocks: tuple[Block, ...]
    kind: str
    layout: str | None = None
    shape: tuple[int, ...] | None = None
    swapped: bool = False


@dataclasses.dataclass(frozen=True)
class TorchMapping:
    """Which leaf, or part of it, each torch parameter is. Print it for a table.

    Attributes:
      entries: {torch name: `Entry`}.
      untouched: {leaf: magnitudes (*batch, *out)} of `DoRA`s of which the file had a part: the rest
        are the base's norms, which `lora.peft.save` leaves out as long as they are as they were.
      settings: those of the file that `lora.peft.save` writes again: task_type, the base's name and
        revision, and what is not known here.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> params = {"q_proj": {"kernel": jnp.zeros((4, 3))}}
    >>> entry = lora.peft.mapping({"q_proj.weight": (3, 4)}, params)["q_proj.weight"]
    >>> entry.kind, entry.layout, str(entry.blocks[0])
    ('linear', 'out_in', 'q_proj/kernel')
    """

    entries: Mapping[str, Entry]
    untouched: Mapping[str, np.ndarray] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def __len__(self):
        return len(self.entries)

    def __iter__(self):
        return iter(self.entries)

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    def __str__(self):
        # Dots and slashes change places, so that names fold as paths do.
        turn = str.maketrans("./", "/.")
        rows = {e.name.translate(turn): _beside(e) for e in self.entries.values()}
        shown = []
        for name, (kind, leaf, *rest) in fold(rows):
            torch = ".".join(choice([n.translate(turn) for n in part]) for part in name.parts)
            part = lambda found, parts=name.parts: choice(parts[int(found[1])])
            leaf = re.sub("\0(\\d+)\0", part, leaf)
            shown.append((torch, kind, leaf, *rest))
        return table(("torch", "kind", "leaf", "shape", "in", "out", "batch"), shown)


def _beside(entry: Entry) -> tuple:
    """What a table shows of it beside its name. A number that leaf and name share is written as
    its place among the parts of the name, between NULs, so that layers that are alike are equal."""
    numbers = [(i, part) for i, part in enumerate(entry.name.split(".")) if part.isdecimal()]

    def placed(text: str) -> str:
        left = list(numbers)

        def place(found: re.Match) -> str:
            same = [x for x in left if x[1] == found[0]]
            if not same:
                return found[0]
            left.remove(same[0])
            return f"\0{same[0][0]}\0"

        return re.sub(r"\d+", place, text)

    leaf = entry.blocks[0].leaf
    g = leaf.geometry
    axes = (g.in_axes, g.out_axes, g.batch_axes) if g else ((), (), ())
    return entry.kind, ", ".join(placed(str(b)) for b in entry.blocks), leaf.shape, *axes


def has_values(leaf: Any) -> bool:
    """Whether a leaf is an array: neither abstract nor in codes."""
    return isinstance(leaf, jax.Array | np.ndarray)


def leaf_infos(params: Any, survey: Survey | Targets | None) -> dict[str, LeafInfo]:
    """What is known of each leaf. Without a survey, only that a matrix is in × out, unless it is
    square and has no name of Flax's: torch's `weight` is out × in."""
    if not isinstance(survey, Survey | Targets | None):
        raise LoRAError(
            f"expected a Survey or Targets, found {type(survey).__name__}: "
            f"survey = {survey_call(params)}"
        )
    found = flatten(state_of(params))
    check_codes(found)
    leaves = {p: x for p, x in found.items() if hasattr(x, "shape")}
    if isinstance(survey, Survey):
        survey = survey.within(leaves)
    infos = {}
    for path, x in leaves.items():
        shape = tuple(x.shape)
        last = path.rpartition("/")[2].lower()
        # A bias may have two axes, (heads, head_dim).
        matrix = len(shape) == 2 and last not in BIASES
        # torch's own `weight` is (out, in), which the shape shows unless it is square.
        sure = matrix and (shape[0] != shape[1] or last in FLAX)
        geometry = Geometry((0,), (1,)) if sure else None
        kind, tied, dilated = "embedding" if sure and last == "embedding" else "?", False, False
        if isinstance(survey, Survey):
            leaf = survey[path]
            geometry, kind = leaf.geometry, leaf.kind
            # Looked up and multiplied by: the embedding is the head.
            tied = len({u.primitive == LOOK_UP for u in leaf.products}) == 2
            dilated = any(u.dilated for u in leaf.uses)
        # `Targets` may be made of a survey, of rules, or of names alone.
        elif survey is not None and path in survey and _is_sure(survey, path, x, sure):
            geometry = survey[path].geometry
            kind = "embedding" if survey[path].embedding else "linear"
            kind = "conv" if "conv" in survey[path].primitive else kind
        infos[path] = LeafInfo(path, shape, geometry, kind, tied, dilated)
    return infos


def _is_sure(targets: Targets, path: str, leaf: Any, sure: bool) -> bool:
    """Whether targets say how a leaf lies: from a survey, from a rule, or from its name."""
    surveyed = targets[path].primitive != "?" or len(leaf.shape) != 2
    return sure or surveyed or targets.config.rule(path, leaf).in_axes is not None


def as_table(mapping: Mapping[str, Any] | TorchMapping | None) -> Mapping[str, Any] | None:
    """A mapping that was found, as one that is given."""
    if not isinstance(mapping, Mapping | TorchMapping | None):
        raise LoRAError(f"mapping: expected a dict {{torch name: leaf}}, found {type(mapping)}")
    if isinstance(mapping, TorchMapping):
        return {e.name: [str(b) for b in e.blocks] for e in mapping.entries.values()}
    return mapping


def looked_up(table: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    """What a `mapping` says of a torch parameter, by its module's name or its own.

    >>> looked_up({r"h\\.(\\d+)\\.q": "layers/q[{1}]"}, "h.2.q.weight")
    ('layers/q[2]',)

    Raises:
      LoRAError: the table is malformed, or several keys match.
    """
    names = [name.removesuffix(".weight"), name]
    exact = next((n for n in names if n in table), None)
    items = table.items() if exact is None else [(re.escape(exact), table[exact])]
    found = {}
    for key, value in items:
        try:
            hit = next((h for n in names if (h := re.fullmatch(key, n))), None)
            if hit:
                texts = (value,) if isinstance(value, str) else tuple(value)
                if not texts:
                    raise ValueError("no leaf")
                # By what they say: several keys may match if they mean the same.
                found[tuple(_filled(t, hit) for t in texts)] = key
        except (re.error, IndexError, ValueError, TypeError) as e:
            raise LoRAError(
                f"mapping: {key!r}: {value!r} is not a regular expression and a leaf, or list "
                f"of leaves, with its groups ({e!r}): {TABLE}"
            ) from None
    if len(found) > 1:
        raise LoRAError(f"the keys {', '.join(map(repr, found.values()))} all match it")
    return next(iter(found), None)


def _filled(text: str, hit: re.Match) -> str:
    """A text with a match's groups in the place of {1} and {name}."""
    group = lambda at: hit[int(at[1]) if at[1].isdecimal() else at[1]] or ""
    return re.sub(r"\{(\w+)\}", group, text)
