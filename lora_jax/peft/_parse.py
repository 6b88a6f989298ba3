"""From the tensors of an adapter file to updates of torch parameters.

PEFT's keys say which module a tensor belongs to, in one way for each kind of layer. What comes out
is named by the torch parameter that changes, and one of three things: a low-rank update, new rows
of a table, or a new value.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from lora_jax._core.errors import raise_all
from lora_jax.peft._config import PeftConfig
from lora_jax.peft._deltas import delta
from lora_jax.peft._experts import is_inside, read_experts
from lora_jax.peft._file import AGAIN, CONFIG, AdapterFile
from lora_jax.peft._form import Misfit
from lora_jax.peft._forms import FORMS
from lora_jax.peft._keys import PREFIX, split, way_on
from lora_jax.peft._parts import Delta, NewRows, Parsed, Table, Update, Value, plain_name
from lora_jax.peft._settings import MERGE

# The settings without which PEFT looks for no such tensor.
SWITCHES = {"b_bias": "lora_bias", "magnitude": "use_dora"}

# Heads that PEFT adds to modules_to_save, whether the model has them or not.
HEADS = frozenset(("classifier", "score"))

# PEFT's own parameters of kinds that are not known here, such as KaSA's lora_diag.
UNKNOWN = re.compile(r".*\.(lora_\w+|token_adapter)(\.\w+)*")

COPY = re.compile(r"(.+?)\.(modules_to_save|original_module)\.(.+)")

# VeRA's projections, of which a file has one pair for all modules.
SHARED = {"base_model.vera_A": "vera_A", "base_model.vera_B": "vera_B"}

# The out_proj of torch's MultiheadAttention, which PEFT wraps inside the whole of it.
SEPARATE = re.compile(r"(.+)\.base_layer\.out_proj")


def parse(file: AdapterFile, config: PeftConfig, *, doubled_out_proj: bool = True) -> Parsed:
    """Sorts every tensor of the file, by its name and shape alone; no tensor is read.

    Args:
      doubled_out_proj: add the update of a MultiheadAttention's out_proj twice, as PEFT does.

    Raises:
      LoRAError: tensors that are of no known kind, that lack their partner, that do not fit
        together, or that PEFT would ignore; all of them are listed.
    """
    return _Parser(file, config, doubled_out_proj).parsed()


class _Parser:
    def __init__(self, file: AdapterFile, config: PeftConfig, doubled: bool):
        self.file, self.config, self.doubled = file, config, doubled
        self.failures: list[str] = []
        self.odd: list[str] = []  # keys of which `rename` may make PEFT's
        self.adapted: dict[str, dict[str, str]] = {}  # module, as in the keys: {kind: key}
        self.whole: dict[str, str] = {}  # parameter: key
        self.copies: list[tuple[str, tuple[str, ...]]] = []  # (key, its parts)
        self.tied: list[tuple[str, str, bool]] = []  # see `Parsed.copies`
        self.form = FORMS.get(config.kind)
        self.others: dict[str, dict[str, str]] = {}  # of other types, as `adapted`
        self.wrapped: dict[str, list[str]] = {}  # adapted module: where PEFT has what is its own
        self.shared: dict[str, str] = {}  # what all modules have: {kind: key}

    def parsed(self) -> Parsed:
        for key in self.file.tensors:
            self._sort(key)
        updates, experts, values, rows, tables = [], [], {}, [], []
        for module, parts in self.adapted.items():
            if "rows" in parts:
                rows += self._rows(module, parts.pop("rows"))
            pair = self._pair(module, parts)
            # The name of experts says the module, and not which of its parameters.
            if pair is not None and is_inside(plain_name(module), parts, self.config):
                experts.append((module, *pair[:2]))
            elif pair is not None:
                updates += self._update(module, parts, pair)
        # After all keys, as the one that is copied may come later in the file.
        copies = self._copied()
        for module in (*self.adapted, *self.others):
            self.wrapped.setdefault(plain_name(module), []).append(module + ".base_layer")
        for name, key in self.whole.items():
            self._whole(name, key, values, tables)
        self._incomplete(rows)
        # After the values: a bias of an update is added to one that the file has in full.
        for update in updates:
            self._bias(update, values)
        deltas = tuple(d for m, keys in self.others.items() for d in self._delta(m, keys))
        found = tuple(read_experts(experts, self.file, self.config, self._wrong))
        raise_all(
            f"{self.file.folder}: tensors that cannot be used:",
            self.failures,
            way_on(self.odd),
        )
        return Parsed(
            tuple(updates),
            found,
            tuple(values.values()),
            tuple(rows),
            tuple(tables),
            (*copies, *self.tied),
            deltas,
        )

    def _sort(self, key: str) -> None:
        shape = self.file.shape(key)
        module, kind = split(key)
        if self.config.kind == "VERA" and key in SHARED:
            self.shared[SHARED[key]] = key
            return
        if not key.startswith(PREFIX):
            self.odd.append(key)
            return self._wrong(key, f"expected a name that begins with '{PREFIX}'; PEFT skips it")
        if "_orig_mod." in key:
            self.odd.append(key)
            return self._wrong(key, "has a name of torch.compile in it; PEFT skips it")
        name = key.removeprefix(PREFIX)
        if self.form is not None and self._other(key, name, kind):
            return
        if kind is not None:
            parts = self.adapted.setdefault(module, {})
            # Factors are parameters in AdaLoRA, and modules with a weight in LoRA.
            if kind in ("a", "b") and self.config.adalora == key.endswith(".weight"):
                self.odd.append(key)
                how = "without" if self.config.adalora else "with"
                return self._wrong(key, f"expected a name {how} .weight at its end; PEFT skips it")
            if kind in parts:
                return self._wrong(key, f"the same tensor as '{parts[kind]}'")
            # AdaLoRA may have cut all ranks of a module off.
            if 0 in shape and not self.config.adalora:
                return self._wrong(key, "is empty: a shard that was not gathered when it was saved")
            parts[kind] = key
        # VeLoRA's, for a backward pass that keeps less; the function is LoRA's.
        elif name.endswith(".lora_velora_embed"):
            pass
        # A module that is saved in full may have parameters of such names.
        elif UNKNOWN.fullmatch(name) and not self.config.saved(name):
            self.odd.append(key)
            self._wrong(
                key, f"not a tensor of plain LoRA, rsLoRA, AdaLoRA or trainable tokens; {MERGE}"
            )
        # bias="all" stores a bias of a module in modules_to_save under both of its names.
        elif found := COPY.fullmatch(name):
            self.copies.append((key, found.groups()))
        elif name in self.whole or 0 in shape:
            self._wrong(key, "is empty, or there twice")
        else:
            self.whole[name] = key

    def _other(self, key: str, name: str, kind: str | None) -> bool:
        """Whether it is a tensor of a type that is no LoRA, or none at all there."""
        assert self.form is not None
        if kind is not None:
            self._wrong(
                key,
                f"a tensor of a LoRA; PEFT skips it where peft_type is {self.config.kind!r}: "
                f"correct {CONFIG}, or leave it out of the file",
            )
            return True
        found = next((n for n in self.form.names if name.endswith("." + n)), None)
        if found is not None:
            self.others.setdefault(name.removesuffix("." + found), {})[found] = key
        return found is not None

    def _delta(self, module: str, keys: dict[str, str]) -> list[Delta]:
        key = next(iter(keys.values()))
        if problem := self.config.passed_over(plain_name(module)):
            self._wrong(key, problem)
        try:
            return [delta(module, keys | self.shared, self.file, self.config)]
        except Misfit as e:
            self._wrong(key, f"'{module}': {e}")
            return []

    def _copied(self) -> tuple[tuple[str, str, bool], ...]:
        """Parameters that stand there under a second name; the frozen original is not needed.

        The adapter's name is still in that name where the saved module has modules of its own.
        """
        pairs = []
        for key, (module, kind, rest) in self.copies:
            names = [f"{module}.{rest}", f"{module}.{rest.partition('.')[2]}"]
            name = next((n for n in names if n in self.whole), None)
            if name is None:
                self._wrong(key, f"a copy of '{PREFIX}{names[0]}', which is not there")
            elif kind == "modules_to_save":
                pairs.append((key, self.whole[name], False))
        return tuple(pairs)

    def _incomplete(self, rows: Sequence[NewRows]) -> None:
        """What the settings name and the file has nothing of; PEFT fails then."""
        modules = (name.rpartition(".")[0] for name in self.whole)
        lacking = {
            "modules_to_save": set(self.config.in_full.keys) - HEADS
            and not any(map(self.config.inside, modules)),
            "trainable_token_indices": any((self.config.tokens or {}).values()) and not rows,
        }
        for setting in (name for name, lacks in lacking.items() if lacks):
            self.failures.append(
                f"{setting} is set, and the file has none of its tensors; if the adapter is whole "
                f"without them: lora.peft.load(..., ignore=['{setting}'])"
            )

    def _wrong(self, key: str, what: str) -> None:
        self.failures.append(f"'{key}' {self.file.shape(key)}: {what}")

    def _pair(self, module: str, parts: Mapping[str, str]) -> tuple[str, str, bool] | None:
        """(A, B, kind of its names) of a module, or None."""
        if not parts:
            return None
        table = "table_a" in parts or "table_b" in parts
        names = ("table_a", "table_b") if table else ("a", "b")
        # Tensors and settings have to agree: PEFT would start what is lacking anew.
        own = [n for n, on in (("e", self.config.adalora), ("magnitude", self.config.dora)) if on]
        bias = {"b_bias"} if self.config.lora_bias and not self.config.adalora else set()
        extra = set(parts) - {*names, *own} - bias
        lacking = [n for n in (*names, *own) if n not in parts]
        if extra or lacking:
            self._wrong(
                next(iter(parts.values())),
                f"'{module}' has {', '.join(sorted(parts))}, but not {', '.join(lacking)}; {AGAIN}"
                if lacking
                else f"'{module}' also has {', '.join(sorted(extra))}; PEFT would ignore it"
                + "".join(f": set {SWITCHES[n]} in {CONFIG}" for n in extra & SWITCHES.keys()),
            )
            return None
        return parts[names[0]], parts[names[1]], table

    def _update(
        self, module: str, parts: Mapping[str, str], pair: tuple[str, str, bool]
    ) -> list[Update]:
        key_a, key_b, table = pair
        a, b = self.file.shape(key_a), self.file.shape(key_b)
        owner = SEPARATE.fullmatch(module)
        plain = owner[1] if owner else module
        # A head that is tied is adapted with its table, whatever target_modules says.
        problem = self.config.passed_over(plain)
        if problem and not self._is_tied(key_a, key_b):
            self._wrong(key_a, problem)
        # Pruned to nothing.
        if self.config.adalora and 0 in a:
            return []
        if self.file.format == "mlx" and len(a) == 3:
            return self._stacked(module, key_a, key_b)
        shapes = {n: self.file.shape(parts[n]) for n in ("e", "magnitude") if n in parts}
        problem = _misfit(a, b, **shapes)
        if problem:
            self._wrong(key_a, problem)
            return []
        if problem := self.config.other_rank(plain, a[0]):
            self._wrong(key_a, problem)
        # In out_proj the update is added twice, see `doubled_out_proj`.
        scale = self.config.scale(plain, a[0]) * (2 if owner and self.doubled else 1)
        name = module.replace(".base_layer.out_proj", ".out_proj") + ".weight"
        # The pair around an out_proj with one of its own is in_proj's.
        if f"{module}.base_layer.out_proj" in self.adapted:
            name = module + ".in_proj_weight"
        if "magnitude" in parts and (owner or name.endswith("in_proj_weight")):
            self._wrong(key_a, "a DoRA of a MultiheadAttention, which PEFT does not have")
        if owner and self.config.fan_in_fan_out:
            self._wrong(
                key_a,
                "of an attention that fan_in_fan_out is set for, which PEFT then adds transposed; "
                "to add it as it is: lora.peft.load(..., ignore=['fan_in_fan_out'])",
            )
        kind = "embedding" if table else ("conv" if len(a) > 2 else "linear")
        # A (rank, in, *window), B (out, rank, 1, …) of a convolution.
        n_in, window = math.prod(a[1:]), a[2:]
        sizes = (a[0], n_in, b[0], 1)
        # AdaLoRA's A is a matrix, of a convolution as well.
        own = dict(e=parts.get("e"), magnitude=parts.get("magnitude"), flat="e" in parts)
        return [Update(name, kind, *sizes, scale, key_a, key_b, window=window, **own)]

    def _stacked(self, module: str, key_a: str, key_b: str) -> list[Update]:
        """mlx-lm's update of a stack of experts: A (experts, rank, in), B (out, rank, experts)."""
        a, b = self.file.shape(key_a), self.file.shape(key_b)
        if len(b) != 3 or b[1:] != (a[1], a[0]):
            self._wrong(key_a, f"lora_a {a} and lora_b {b}: not of as many experts and ranks")
            return []
        if self.config.dora:
            self._wrong(key_a, "a DoRA of experts, which mlx-lm does not have")
        if problem := self.config.other_rank(module, a[1]):
            self._wrong(key_a, problem)
        sizes = (a[1], a[2], b[0], a[0])
        scale = self.config.scale(module, a[1])
        return [Update(f"{module}.weight", "experts", *sizes, scale, key_a, key_b)]

    def _is_tied(self, key_a: str, key_b: str) -> bool:
        """Whether this is the head beside an adapted embedding, with ensure_weight_tying."""
        tables = [p for p in self.adapted.values() if {"table_a", "table_b"} <= p.keys()]
        if not self.config.tying or len(tables) != 1:
            return False
        # A of the one is B of the other, transposed.
        self.tied += [(key_a, tables[0]["table_b"], True), (key_b, tables[0]["table_a"], True)]
        return True

    def _bias(self, update: Update, values: dict[str, Value]) -> None:
        """lora_bias: b + scale · its own bias."""
        module, _ = split(update.a)
        key = self.adapted[module].get("b_bias")
        if key is None:
            return
        if self.file.shape(key) != (update.n_out,):
            return self._wrong(key, f"expected shape ({update.n_out},)")
        name = plain_name(module) + ".bias"
        # Without a value in the file, the update's bias is added to that of the base.
        value = values.get(name, Value(name, (update.n_out,), None))
        values[name] = dataclasses.replace(value, add=key, scale=update.scale)

    def _whole(self, name: str, key: str, values: dict[str, Value], tables: list[Table]) -> None:
        plain, shape = plain_name(name), self.file.shape(key)
        module = plain.rpartition(".")[0]
        owner, last = name.rpartition(".")[::2]
        # PEFT has the base's own parameters inside the layers that it makes.
        inside = self.wrapped.get(module)
        if inside is not None and owner not in inside and not self.config.inside(module):
            self._wrong(
                key,
                f"'{module}' is adapted, so PEFT would ignore it: lora.peft.load(..., "
                f"rename={{r'{re.escape(name)}$': '{inside[0]}.{last}'}})",
            )
        elif inside is None and plain != name and self.config.passed_over(module):
            self._wrong(
                key,
                f"'{module}' is not adapted, so PEFT would ignore it; expected '{PREFIX}{plain}'",
            )
        elif name.endswith(".base_layer.weight"):
            tables.append(Table(plain, shape, key))
        elif plain in values:
            self._wrong(key, f"'{plain}' is there twice")
        else:
            values[plain] = Value(plain, shape, key)

    def _rows(self, module: str, key: str) -> list[NewRows]:
        shape, tokens = self.file.shape(key), self.config.tokens or {}
        # A list in place of a map stands under "", which ends every name.
        found = [v for k, v in tokens.items() if module.endswith(k)]
        if len(shape) != 2 or len(found) != 1 or len(found[0]) != shape[0]:
            self._wrong(
                key,
                f"trainable_token_indices gives {[len(f) for f in found[:5]]} rows for it; "
                f"in {CONFIG} '{module}' needs as many as the tensor",
            )
            return []
        if len(set(found[0])) != len(found[0]):
            self._wrong(
                key,
                "trainable_token_indices names a row twice; leave one out there, and its row here",
            )
        return [NewRows(plain_name(module) + ".weight", shape, key, found[0])]


def _misfit(
    a: tuple[int, ...],
    b: tuple[int, ...],
    e: tuple[int, ...] | None = None,
    magnitude: tuple[int, ...] | None = None,
) -> str | None:
    """What is wrong with the shapes of a pair, if anything."""
    if len(a) < 2 or len(b) < 2:
        return f"A {a} and B {b}: expected (rank, in) and (out, rank)"
    # PEFT groups B alone: (out, rank / groups, 1, …).
    if b[1] != a[0] and len(a) > 2 and a[0] % b[1] == 0:
        what = "a grouped convolution, whose update is not a grouped kernel"
        return f"B {b} for rank {a[0]}: {what}; {MERGE}"
    if b[1] != a[0] or math.prod(b[2:]) != 1:
        return f"A {a} and B {b} have different ranks; {AGAIN}"
    if e is not None and e != (a[0], 1):
        return f"E {e}, expected ({a[0]}, 1)"
    # (out,) of a product, (1, out, 1, …) of a convolution.
    want = (b[0],) if len(a) == 2 else (1, b[0], *[1] * (len(a) - 2))
    if magnitude is not None and magnitude != want:
        return f"a magnitude {magnitude}, expected {want}"
    return None
