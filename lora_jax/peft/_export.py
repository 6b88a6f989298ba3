"""What PEFT's files hold of an adapter tree: its tensors and its settings."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax._core.errors import raise_all
from lora_jax._nodes.adapters import DoRA, Full, LoRA, LowRank, Rows
from lora_jax.peft._blocks import Block, changes_outside, from_leaf, own_factors, together, torch_b
from lora_jax.peft._mapping import Entry, TorchMapping
from lora_jax.peft._patterns import endings, matching_others
from lora_jax.peft._settings import as_alpha

# What is written is what this PEFT writes.
VERSION = "0.21.2"

# Names of PEFT's own in the layers that it makes.
PARTS = ("base_layer", "lora_A", "lora_B", "lora_dropout", "default")


def times(b: np.ndarray, by: float) -> np.ndarray:
    """The product in fp32, rounded once; what overflows is refused when it is written."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (b.astype(np.float32) * by).astype(b.dtype)


@dataclasses.dataclass(eq=False)
class _Low:
    """A low-rank update of one torch parameter."""

    entry: Entry
    a: np.ndarray  # (batch, r, in)
    b: np.ndarray  # (batch, out, r)
    scale: float
    dropout: float
    magnitude: np.ndarray | None = None  # DoRA's (out,)

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    def scaled(self, scale: float) -> None:
        """The same update with another constant before it."""
        if scale != self.scale:
            self.b = times(self.b, self.scale / scale)
            self.scale = scale

    def padded(self, rank: int) -> None:
        more = rank - self.rank
        self.a = np.pad(self.a, ((0, 0), (0, more), (0, 0)))
        self.b = np.pad(self.b, ((0, 0), (0, 0), (0, more)))


class Export:
    def __init__(self, nodes: Mapping[str, Any], mapping: TorchMapping, doubled: bool):
        self.nodes, self.mapping, self.doubled = nodes, mapping, doubled
        self.failures: list[str] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.low: dict[str, _Low] = {}
        self.values: dict[str, np.ndarray] = {}
        self.tokens: dict[str, list[int]] = {}
        self.blocks: dict[str, list[Block]] = {}

    def run(self, uniform: bool | int) -> None:
        for entry in self.mapping.entries.values():
            for b in entry.blocks:
                self.blocks.setdefault(b.leaf.path, []).append(b)
        raise_all("these adapters cannot be written for PEFT:", self._not_covered())
        for entry in self.mapping.entries.values():
            nodes = [self.nodes.get(b.leaf.path) for b in entry.blocks]
            kinds = {type(n) for n in nodes if n is not None}
            if len(kinds) > 1:
                self.failures.append(
                    f"'{entry.name}': its leaves, one tensor in torch, are trained in different "
                    "ways; merge it: lora.merge"
                )
            elif kinds:
                make: Any = {LoRA: self._lora, DoRA: self._lora, Full: self._full, Rows: self._rows}
                make[kinds.pop()](entry, nodes)
        self._ranks(uniform)

    def _not_covered(self) -> Iterator[str]:
        """Trained leaves of which not every element belongs to one torch parameter."""
        for path, node in self.nodes.items():
            # No subclass either: its update may be another.
            if type(node) not in (LoRA, DoRA, Full, Rows):
                name = type(node).__name__
                yield f"'{path}' is a {name}, not an adapter that PEFT has; pass lora.init's tree"
                continue
            if node.more_axes:
                yield (
                    f"'{path}' has an axis of slots, as of a stack; say which is to be written: "
                    "lora.peft.save(folder, stacked, mapping, slot=0)"
                )
                continue
            blocks = self.blocks.get(path, [])
            shape = tuple(node.shape)
            if not blocks:
                yield f"'{path}' is in no entry of the mapping; add it"
            elif blocks[0].leaf.tied and len(blocks) == 1 and not isinstance(node, Rows):
                yield (
                    f"'{path}' is the embedding and the head, and the mapping has one of the two; "
                    "name both in lora.peft.mapping, such as embed_tokens.weight and lm_head.weight"
                )
            elif blocks[0].leaf.tied and isinstance(node, DoRA):
                yield (
                    f"'{path}' is the embedding and the head, and a DoRA: PEFT scales the one "
                    "by its columns and the other by its rows; untie them in the model"
                )
            elif blocks[0].leaf.shape != shape:
                yield (
                    f"'{path}' {shape}, but {blocks[0].leaf.shape} in the mapping; make it of "
                    "these parameters: lora.peft.mapping(names, params, survey)"
                )
            # A part without a parameter is an error only if it changes. The blocks of a tied leaf
            # are there twice.
            elif (n := sum(math.prod(b.shape) for b in set(blocks))) != math.prod(shape) and (
                not isinstance(node, LowRank)
                or changes_outside(node, blocks, self.mapping.untouched.get(path))
            ):
                yield (
                    f"'{path}' {shape}: the mapping has {n:,} of {math.prod(shape):,} elements; "
                    "name the torch parameters of the others too"
                )

    def _lora(self, entry: Entry, nodes: Sequence[LowRank | None]) -> None:
        # One constant for the parameter: that of other leaves goes into their B.
        scale = next((n.scale for n in nodes if n is not None and n.scale), 0.0)
        dropout = next(n.dropout for n in nodes if n is not None)
        parts: list[tuple[np.ndarray | None, np.ndarray]] = []
        for block, node in zip(entry.blocks, nodes):
            if node is None:
                # Outputs that are not adapted: rows of zeros, without a rank.
                parts.append((None, np.zeros((block.n_batch, block.n_out, 0), np.float32)))
                continue
            if node.geometry != block.leaf.geometry:
                self.failures.append(
                    f"'{block.leaf.path}' has {node.geometry}, but {block.leaf.geometry} in the "
                    "mapping; make the mapping with the targets that the adapters were made with"
                )
                return
            a, b = own_factors(node, block, self.blocks[block.leaf.path])
            # On the table of a tied head, or experts (in, out): torch's A is the leaf's B.
            if entry.swapped:
                a, b = b.transpose(0, 2, 1), a.transpose(0, 2, 1)
            if node.scale != scale:
                b = times(b, node.scale / scale)
            parts.append((a, b))
        if entry.swapped and len(parts) > 1:
            self.failures.append(f"'{entry.name}': A runs along the outputs of several leaves")
            return
        a, b = together(parts)
        scaled = [n if isinstance(n, DoRA) else None for n in nodes]
        magnitude = self._magnitude(entry, scaled) if any(scaled) else None
        self.low[entry.name] = _Low(entry, a, b, scale, dropout, magnitude)

    def _magnitude(self, entry: Entry, nodes: Sequence[DoRA | None]) -> np.ndarray | None:
        """The magnitudes of a torch parameter, (out,)."""
        known = [n for n in nodes if n is not None]
        if len(known) < len(nodes):
            lacking = [b.leaf.path for b, n in zip(entry.blocks, nodes) if n is None]
            self.failures.append(
                f"'{entry.name}' is a DoRA, but {', '.join(lacking)}, which belongs to it in "
                "torch, is not adapted; adapt it too: lora.methods.dora(params, adapters)"
            )
            return None
        if entry.kind == "experts" or entry.name.endswith("in_proj_weight"):
            what = "single parameters" if entry.kind == "experts" else "a MultiheadAttention"
            self.failures.append(
                f"'{entry.name}' is a DoRA, and PEFT has none of {what}; merge it: lora.merge"
            )
            return None
        parts = [
            # A magnitude (*batch, *out) is a B of rank 1.
            torch_b(np.expand_dims(np.asarray(n.magnitude), len(n.geometry.batch_axes)), b)
            for b, n in zip(entry.blocks, known)
        ]
        return np.concatenate([p[0, :, 0] for p in parts])

    def _full(self, entry: Entry, nodes: Sequence[Full | None]) -> None:
        known = [n for n in nodes if n is not None]
        if entry.layout is None or entry.shape is None or len(known) < len(nodes):
            what = "its shape in torch" if entry.layout is None else "the others of its leaves"
            self.failures.append(
                f"'{entry.name}' is trained in full, but {what} are not known; name it with its "
                "shape: lora.peft.mapping({name: shape}, params, survey)"
            )
            return
        pieces = [np.asarray(n.value)[b.slices] for b, n in zip(entry.blocks, known)]
        self.values[entry.name] = from_leaf(pieces, entry.layout, entry.blocks, entry.shape)

    def _rows(self, entry: Entry, nodes: Sequence[Rows]) -> None:
        module = entry.name.removesuffix(".weight")
        self.tokens[module] = list(nodes[0].index)
        key = module + ".token_adapter.trainable_tokens_delta"
        self.tensors[key] = np.asarray(nodes[0].value)

    def _ranks(self, uniform: bool | int) -> None:
        """Equal ranks and scales where PEFT, or the caller, wants them."""
        # First, as it changes ranks: a MultiheadAttention has one for both of its parameters.
        for name, low in self.low.items():
            if name.endswith(".in_proj_weight"):
                self._attention(name.removesuffix(".in_proj_weight"), low)
        plain = [n for n, low in self.low.items() if low.magnitude is None]
        if 0 < len(plain) < len(self.low) and not self.failures:
            self.failures.append(
                f"{', '.join(plain)}: no DoRA, but others are, and PEFT has one setting for all; "
                "give these magnitudes too: lora.methods.dora(params, adapters)"
            )
        if not uniform or not self.low:
            return
        rank = max(low.rank for low in self.low.values())
        if uniform is not True and uniform < rank:
            self.failures.append(
                f"uniform_rank={uniform}, but there is a rank {rank}: uniform_rank={rank}, or "
                f"lora.algebra.resize(adapters, {uniform}) first"
            )
        rank = rank if uniform is True else uniform
        # The scale that most have, so that the fewest B are rounded.
        scale = _commonest((low.scale for low in self.low.values() if low.scale), 0.0)
        for low in self.low.values():
            low.scaled(scale)
            low.padded(rank)

    def _attention(self, module: str, low: _Low) -> None:
        out = self.low.get(module + ".out_proj.weight")
        if out is None:
            self.failures.append(
                f"'{module}': PEFT adapts in_proj and out_proj, or neither; name both, in "
                "`targets` and in the mapping"
            )
            return
        # PEFT adds this update twice: half of it each time.
        if self.doubled:
            out.scale = out.scale / 2
        # One of them may be 0, which no B can take up.
        out.scaled(low.scale) if low.scale else low.scaled(out.scale)
        rank = max(low.rank, out.rank)
        low.padded(rank)
        out.padded(rank)

    def config(self, base_model_name: str | None, task_type: str | None) -> dict[str, Any]:
        """The settings, and the tensors of what they depend on."""
        names: dict[str, tuple[int, float]] = {}
        experts: dict[str, list[str]] = {}
        modules = []
        for name, low in self.low.items():
            if low.entry.kind == "experts":
                experts.setdefault(name.rpartition(".")[0], []).append(name)
                names[name] = (low.rank, low.scale)
                continue
            module = name.removesuffix(".weight").removesuffix(".in_proj_weight")
            # An out_proj is stored inside its attention, whose rank and alpha are its own.
            inner = self._store(module, low)
            if inner == module:
                modules.append(module)
                names[module] = (low.rank, low.scale)
        for module, inside in experts.items():
            # The last parameter is the outermost.
            for depth, name in enumerate(reversed(inside)):
                self._store_experts(module + ".base_layer" * depth, self.low[name])
        adapted = {*modules, *experts}
        bias, saved = self._store_values(adapted)
        self._separate(saved, {*adapted, *self.tokens})
        # The pair that most modules have: patterns name the fewest.
        rank, scale = _commonest(names.values(), (8, 1.0))
        alpha = as_alpha(rank, scale)
        alphas = {n: as_alpha(*v) for n, v in names.items()}
        return {
            "peft_type": "LORA",
            "peft_version": VERSION,
            "task_type": task_type,
            "base_model_name_or_path": base_model_name,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": _patterns({n: v[0] for n, v in names.items()}, rank),
            "alpha_pattern": _patterns(alphas, alpha),
            "target_modules": _targets(modules, self.mapping),
            "target_parameters": [n for inside in experts.values() for n in inside] or None,
            "modules_to_save": saved or None,
            "trainable_token_indices": self.tokens or None,
            "bias": bias,
            "lora_dropout": max((low.dropout for low in self.low.values()), default=0.0),
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": any(low.magnitude is not None for low in self.low.values()),
            "lora_bias": False,
            "ensure_weight_tying": any(b.leaf.tied for n in self.nodes for b in self.blocks[n]),
        }

    def _store(self, module: str, low: _Low) -> str:
        """Writes one update; returns the module under which its rank stands."""
        owner, _, last = module.rpartition(".")
        # torch's MultiheadAttention never calls its out_proj: PEFT wraps it inside.
        attention = last == "out_proj" and f"{owner}.in_proj_weight" in self.low
        key = f"{owner}.base_layer.out_proj" if attention else module
        a, b, magnitude = low.a[0], low.b[0], low.magnitude
        # Factors of a table are parameters, all others the weights of modules.
        if low.entry.kind == "embedding":
            self.tensors |= {f"{key}.lora_embedding_A": a, f"{key}.lora_embedding_B": b}
        else:
            if low.entry.kind == "conv":
                # As that of a convolution is.
                assert low.entry.shape is not None
                # A (r, in, *window), B (out, r, 1, …).
                window = low.entry.shape[1:]
                ones = [1] * (len(window) - 1)
                a, b = a.reshape(low.rank, *window), b.reshape(*b.shape, *ones)
                if magnitude is not None:
                    magnitude = magnitude.reshape(1, -1, *ones)
            self.tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        if magnitude is not None:
            self.tensors[f"{key}.lora_magnitude_vector"] = magnitude
        return owner if attention else module

    def _store_experts(self, key: str, low: _Low) -> None:
        e, r, n_in = low.a.shape
        # A (E, r, in) expert by expert; B (E, out, r) to (out, r, E), rank by rank.
        self.tensors[f"{key}.lora_A.weight"] = low.a.reshape(e * r, n_in)
        self.tensors[f"{key}.lora_B.weight"] = low.b.transpose(1, 2, 0).reshape(-1, r * e)

    def _store_values(self, adapted: set[str]) -> tuple[str, list[str]]:
        """(the setting of `bias`, modules_to_save)."""
        bias, saved = "none", []
        # A bias of a module that is saved in full belongs to it, all others to `bias`.
        modules = {n.rpartition(".")[0] for n in self.values if not n.endswith(".bias")}
        for name, value in self.values.items():
            module, _, last = name.rpartition(".")
            if module in adapted and last != "bias":
                self.failures.append(
                    f"'{name}' is trained in full, and '{module}' is adapted; PEFT does one of the "
                    "two: merge the adapter, lora.merge"
                )
            owner = module.rpartition(".")[0]
            if last == "bias" and module not in modules:
                if f"{owner}.in_proj_weight" in self.low and module == f"{owner}.out_proj":
                    name = f"{owner}.base_layer.out_proj.base_layer.bias"
                elif module in adapted:
                    name = f"{module}.base_layer.bias"
                # "lora_only" means biases of adapted modules alone.
                bias = "all" if module not in adapted or bias == "all" else "lora_only"
            elif last == "in_proj_bias" and module in adapted:
                name, bias = f"{module}.base_layer.in_proj_bias", "all"
            elif not module:
                self.failures.append(
                    f"'{name}' is a parameter of the model itself, and PEFT saves modules; leave "
                    "it out, or put it into a module of the torch model"
                )
            elif module not in saved:
                saved.append(module)
            self.tensors[name] = value
        # A module is saved with all that is in it.
        inside = tuple(m + "." for m in saved)
        return bias, [m for m in saved if not m.startswith(inside)]

    def _separate(self, saved: Sequence[str], adapted: set[str]) -> None:
        """PEFT takes a name in modules_to_save for whatever ends with it, or is inside."""
        parts = {f"{m}.{p}" for m in adapted for p in PARTS}
        for name in saved:
            hit = re.compile(rf"(^|.*\.){re.escape(name)}($|\..*)")
            for module in sorted(adapted | {p for p in parts if p.endswith(name)}):
                if module.endswith(name) or hit.match(module):
                    self.failures.append(
                        f"'{name}' is trained in full, which PEFT takes to mean '{module}' as "
                        "well, which is adapted; train or adapt both in the same way"
                    )


def _commonest(values: Iterable[Any], default: Any) -> Any:
    found = collections.Counter(values).most_common(1)
    return found[0][0] if found else default


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """{name: value} of what is not the default; each pattern matches its own name only."""
    several = matching_others(values)
    pattern = lambda name: "^" + re.escape(name) if name in several else name
    return {pattern(name): value for name, value in values.items() if value != default}


def _targets(modules: Sequence[str], mapping: TorchMapping) -> list[str] | str | None:
    """Full names; as one expression where a name also ends another, which is not adapted."""
    # PEFT takes each name of a list for the end of others; an expression is the whole name.
    known = {n.rpartition(".")[0] for n in mapping} - set(modules)
    if {end for n in known for end in endings(n)} & {*modules}:
        return "|".join(map(re.escape, modules))
    return list(modules) or None
