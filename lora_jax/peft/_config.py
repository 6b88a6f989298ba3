"""adapter_config.json: what of it changes the function, checked; and PEFT's own look-ups in it."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

from lora_jax._core.errors import LoRAError, quoted, raise_all
from lora_jax.peft._patterns import PLAIN, Budget, Layers, Modules, Patterns, SafePattern, endings
from lora_jax.peft._settings import LORA_ALONE, MERGE, OTHERS, REFUSED, switches, unknown

# PEFT 0.21 has 45.
MAX_SETTINGS = 1000

# The parts of a name, each run of which is looked up: n parts have n²/2 of them.
MAX_PARTS = 64

# Tables of which rows are trained; tokens of an aLoRA.
MAX_TABLES = MAX_INVOCATION = 1000

# Settings that are read also where they are to be ignored: the rank of experts, which no tensor
# has, and the tokens that `PeftAdapter.active` looks for.
USED = ("r", "alora_invocation_tokens")

# Initialisations that leave the base as it was, so that B·A is the whole change.
PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The settings of an adapter that change the function; `own` are those of its type alone."""

    kind: str  # PEFT's peft_type
    r: int
    alpha: float
    rank_stabilized: bool
    dora: bool
    rank_pattern: Patterns
    alpha_pattern: Patterns
    targets: Modules | None  # None: whichever have tensors
    excluded: Modules
    in_full: Patterns  # modules_to_save
    layers: Layers | None  # layers_to_transform
    parameters: Mapping[str, tuple[tuple[int, str], ...]]  # {end of a module's name: (place, name)}
    tokens: Mapping[str, tuple[int, ...]] | None
    dropout: float
    tying: bool
    fan_in_fan_out: bool
    lora_bias: bool
    version: tuple[int, ...] | None
    bias: str
    any_rank: bool  # the tensors' ranks count, whatever `r` says
    own: Mapping[str, Any]

    @property
    def adalora(self) -> bool:
        return self.kind == "ADALORA"

    def alpha_of(self, name: str) -> float:
        """By PEFT's rule: the first pattern, in the file's order, that ends the name.

        AdaLoRA has one alpha: PEFT reads no pattern for it.
        """
        return self.alpha if self.adalora else self.alpha_pattern.first(name, self.alpha)

    def rank_of(self, name: str) -> int:
        """What the file says of the rank; needed only where no tensor does (experts)."""
        return self.r if self.adalora else self.rank_pattern.first(name, self.r)

    def other_rank(self, name: str, rank: int) -> str | None:
        """What is wrong with the rank of a module's tensors; PEFT would not load them."""
        said = self.rank_of(name)
        # AdaLoRA cuts ranks off.
        if self.adalora or self.any_rank or said == rank:
            return None
        return (
            f"is of rank {rank}, and the configuration says {said}: tensors or configuration are "
            "another adapter's, or rank_pattern was changed; if alpha belongs to the tensors' "
            "rank: lora.peft.load(..., ignore=['r'])"
        )

    def inside(self, module: str) -> bool:
        """Whether a module is one that is saved in full, or is in one."""
        # PEFT takes a name in modules_to_save for the end of any module, and for all that is in it.
        ends = [i for i, c in enumerate(module + ".") if c == "."]
        return len(ends) <= MAX_PARTS and any(self.in_full.first(module[:i], False) for i in ends)

    def saved(self, name: str) -> bool:
        """Whether a parameter is of a module that is saved in full, or a bias that is."""
        module, _, last = name.rpartition(".")
        return self.inside(module) or (last == "bias" and self.bias != "none")

    def scale(self, name: str, rank: int) -> float:
        """The constant before B·A: alpha / rank, alpha / √rank (rsLoRA), or AdaLoRA's."""
        alpha = self.alpha_of(name)
        # Its rank number stays that of the beginning, whatever was pruned.
        if self.adalora:
            return (alpha if alpha > 0 else float(self.r)) / (self.r + 1e-5)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def scales_inputs(self, module: str) -> bool:
        """Whether IA3 scales this module's inputs, and not its outputs; by PEFT's rule."""
        found = self.own["feedforward_modules"]
        # A list has the ends of names, also within a part of one.
        return module in found if found.expression else module.endswith(tuple(found.names))

    def passed_over(self, module: str) -> str | None:
        """Why PEFT would not look for this module's tensors, if it would not."""
        rules = {
            "exclude_modules": module in self.excluded,
            "modules_to_save": self.inside(module),
            "target_modules": self.targets is not None and module not in self.targets,
            "layers_to_transform": self.targets is not None
            and self.layers is not None
            # A name in full is of any layer.
            and module not in self.targets.names
            and not self.layers.have(module),
        }
        found = next((name for name, out in rules.items() if out), None)
        return found and (
            f"{found} leaves '{module}' out, so PEFT would ignore it; if it belongs to the adapter:"
            f" lora.peft.load(..., ignore=['{found}'])"
        )

    def parameters_of(self, module: str) -> tuple[str, ...]:
        """The parameters that `target_parameters` may mean in a module, in its order."""
        # "" is of parameters without a module; sorted by the place in target_parameters.
        found = [x for end in (*endings(module), "") for x in self.parameters.get(end, ())]
        return tuple(dict.fromkeys(name for _, name in sorted(found)))


def peft_config(
    raw: Mapping[str, Any], where: object, ignore: tuple[str, ...] = (), names: int = 0
) -> PeftConfig:
    """Checks types and values.

    Args:
      raw: adapter_config.json.
      where: names the file in messages.
      ignore: settings that this library does not know, or refuses, and that are to be passed over.
      names: how many names will be looked up: what expressions may take grows with it.

    Raises:
      LoRAError: a value of another type or out of range; a setting that changes the function and is
        not supported; one that is unknown and set. All of them are listed.

    >>> config = peft_config({"peft_type": "LORA", "r": 4, "lora_alpha": 8}, "example")
    >>> config.scale("q_proj", 4)
    2.0
    """
    if len(raw) > MAX_SETTINGS:
        raise LoRAError(f"{where}: {len(raw):,} settings, expected at most {MAX_SETTINGS:,}")
    raw = {k: v for k, v in raw.items() if k not in ignore or k in USED}
    check = _Checks(raw, Budget(where, names))
    kind = check.value("peft_type", str, "LORA")
    # At once: of an unknown type every setting would be unknown as well.
    if kind not in ("LORA", "ADALORA", *OTHERS):
        known = ", ".join(("LORA", "ADALORA", *OTHERS))
        check.failures.append(f"peft_type={quoted(kind)}, expected one of {known}; {MERGE}")
        raise_all(f"{where}: not a configuration that can be loaded:", check.failures)
    adalora = kind == "ADALORA"
    check.supported(ignore)
    check.invocation()
    # AdaLoRA's factors begin with init_r; OFT's r counts blocks and is no rank.
    r = check.rank("init_r" if adalora and raw.get("init_r") is not None else "r", kind == "OFT")
    own, targets = check.own(kind), raw.get("target_modules")
    config = PeftConfig(
        kind,
        r,
        own["alpha"] if "alpha" in own else check.number("lora_alpha", 8),
        check.value("use_rslora", bool, False),
        check.value("use_dora", bool, False),
        check.patterns("rank_pattern", (lambda v: isinstance(v, list)) if adalora else _is_rank),
        check.patterns("alpha_pattern", _is_number),
        # Which modules "all-linear" meant there, the file does not say.
        None if targets in (None, "all-linear") else check.modules("target_modules"),
        check.modules("exclude_modules"),
        check.listed("modules_to_save"),
        check.layers(),
        check.parameters(),
        check.tokens(),
        check.number("lora_dropout", 0.0),
        check.value("ensure_weight_tying", bool, False),
        check.value("fan_in_fan_out", bool, False),
        check.value("lora_bias", bool, False),
        check.version(),
        check.value("bias", str, "none"),
        "r" in ignore,
        own,
    )
    if config.dora and (adalora or config.lora_bias):
        with_what = "AdaLoRA" if adalora else "lora_bias"
        check.failures.append(
            f"use_dora with {with_what}, which PEFT does not have; if it was not trained: "
            "lora.peft.load(..., ignore=['use_dora'])"
        )
    # PEFT passes these over, so the adapter would not be what its settings say.
    foreign = [k for k in LORA_ALONE if kind in OTHERS and switches(raw.get(k))]
    check.failures += [
        f"{k} is set, which is no setting of {kind}, and PEFT passes it over: "
        f"lora.peft.load(..., ignore=['{k}'])"
        for k in foreign
    ]
    if not 0 <= config.dropout < 1:
        check.failures.append(
            f"lora_dropout={config.dropout}, expected a rate in [0, 1); to train "
            "without: lora.peft.load(..., ignore=['lora_dropout'])"
        )
    raise_all(f"{where}: not a configuration that can be loaded:", check.failures)
    return config


def _is_rank(x: Any) -> bool:
    # Not isinstance: True is an int.
    return type(x) is int and 1 <= x < 1 << 24


def _is_place(x: Any) -> bool:
    return type(x) is int and 0 <= x < 1 << 32


def _is_places(x: Any) -> bool:
    return isinstance(x, list) and all(_is_place(i) and i < 1 << 31 for i in x)


def _is_strings(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(i, str) for i in x)


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) and abs(x) < 1e12


class _Checks:
    """Reads settings and collects what is wrong with them."""

    def __init__(self, raw: Mapping[str, Any], budget: Budget):
        self.raw, self.budget = raw, budget
        self.failures: list[str] = []

    def supported(self, ignore: Collection[str]) -> None:
        """Nothing is set that changes the function in a way that is not known here."""
        for name, why in REFUSED.items():
            if self.raw.get(name) and name not in ignore:
                self.failures.append(f"{name} is set, which is not supported: {why}")
        new = unknown(self.raw)
        # A setting that says something may change the function; one that says nothing cannot.
        on = [k for k, v in new.items() if switches(v)]
        for name in on:
            self.failures.append(
                f"{quoted(name)} is not a setting of PEFT 0.17 to 0.21; if it does not change "
                f"the function: lora.peft.load(..., ignore=[{quoted(name)}])"
            )
        if passed := ", ".join(quoted(k) for k in (*new,)[:20] if k not in on):
            warnings.warn(
                f"passed over: {passed}; PEFT 0.17 to 0.21 has no such settings", stacklevel=4
            )
        # Any other takes B·A out of the base at the start: the change is not B·A then.
        init = self.raw.get("init_lora_weights")
        if not (isinstance(init, bool | str | None) and init in PLAIN_INITS):
            self.failures.append(
                f"init_lora_weights={quoted(str(init), 40)} trained against a changed base; save "
                "it in PEFT with path_initial_model_for_weight_conversion, which makes it plain; "
                "if `params` are that changed base: "
                "lora.peft.load(..., ignore=['init_lora_weights'])"
            )

    def wrong(self, name: str, expected: str, default: Any) -> Any:
        value = self.raw[name]
        # Cut, as a value may be as large as the file.
        text = type(value).__name__
        if isinstance(value, str | int | float):
            text = quoted(value, 60) if isinstance(value, str) else repr(value)[:60]
        self.failures.append(f"{name}: expected {expected}, found {text}")
        return default

    def read(self, name: str, fits: Callable[[Any], bool], expected: str, default: Any) -> Any:
        """A setting; `default` where it is not there, or null."""
        found = self.raw.get(name)
        if found is None:
            return default
        return found if fits(found) else self.wrong(name, expected, default)

    def value(self, name: str, kind: type, default: Any) -> Any:
        return self.read(name, lambda x: isinstance(x, kind), kind.__name__, default)

    def number(self, name: str, default: float) -> float:
        return self.read(name, _is_number, "a number", default)

    def rank(self, name: str, unused: bool = False) -> int:
        return 8 if unused else self.read(name, _is_rank, "an integer >= 1", 8)

    def strings(self, name: str) -> tuple[str, ...]:
        return tuple(self.read(name, _is_strings, "a list of strings", ()))

    def modules(self, name: str) -> Modules:
        """A setting that names modules, by an expression or by a list."""
        if not isinstance(self.raw.get(name), str):
            return Modules(frozenset(self.strings(name)))
        try:
            return Modules(frozenset(), SafePattern(self.raw[name], name, self.budget))
        except LoRAError as e:
            self.failures.append(str(e))
            return Modules(frozenset())

    def listed(self, name: str) -> Patterns:
        """A list of which each is an expression for the end of a name."""
        return self._patterns(name, dict.fromkeys(self.strings(name), True))

    def layers(self) -> Layers | None:
        found = self.raw.get("layers_to_transform")
        numbers: Any = [found] if _is_place(found) else found
        if numbers is None or numbers == []:
            return None
        if not _is_places(numbers):
            return self.wrong("layers_to_transform", "a layer's number, or a list of them", None)
        if isinstance(self.raw.get("target_modules"), str):
            return self.wrong("layers_to_transform", "a list of target_modules beside it", None)
        names = self.raw.get("layers_pattern")
        names = [names] * bool(names) if isinstance(names, str) else self.strings("layers_pattern")
        if not all(PLAIN.fullmatch(n) for n in names):
            self.wrong("layers_pattern", "names of modules", None)
        return Layers(frozenset(numbers), tuple(names))

    def own(self, kind: str) -> Mapping[str, Any]:
        """The settings of one of `OTHERS`."""
        found: dict[str, Any] = {}
        # What is asked of a setting follows from the type of PEFT's default.
        for name, default in OTHERS.get(kind, ("", {}))[1].items():
            if name == "init_weights":
                fits = lambda x: x in (True, False, "bat", "mini")
                found[name] = self.read(name, fits, "True, False, 'bat' or 'mini'", default)
            elif isinstance(default, tuple):
                found[name] = self.modules(name)
            elif type(default) is int:
                found[name] = self.read(name, _is_place, "an integer >= 0", default)
            elif isinstance(default, float):
                found[name] = self.number(name, default)
            else:
                found[name] = self.value(name, bool, default)
        return found

    def parameters(self) -> Mapping[str, tuple[tuple[int, str], ...]]:
        found: dict[str, list[tuple[int, str]]] = {}
        for place, text in enumerate(self.strings("target_parameters")):
            module, _, name = text.rpartition(".")
            found.setdefault(module, []).append((place, name))
        return {module: tuple(names) for module, names in found.items()}

    def patterns(self, name: str, is_value: Callable[[Any], bool]) -> Patterns:
        found = self.raw.get(name) or {}
        if not isinstance(found, dict) or not all(map(is_value, found.values())):
            found = self.wrong(name, "a map of names to numbers", {})
        if any(isinstance(v, list) for v in found.values()):
            # AdaLoRA's, which say which ranks were kept: the tensors have only those.
            found = {}
        return self._patterns(name, found)

    def _patterns(self, name: str, values: Mapping[str, Any]) -> Patterns:
        patterns = Patterns(values, name, self.budget)
        self.failures += patterns.failures
        return patterns

    def tokens(self) -> dict[str, tuple[int, ...]] | None:
        """{end of a module's name: row numbers}; a list is for whatever module has the tensor."""
        name = "trainable_token_indices"
        found = self.raw.get(name)
        if found is None:
            return None
        # Every name ends with "".
        found = {"": found} if isinstance(found, list) else found
        if isinstance(found, dict) and len(found) > MAX_TABLES:
            return self.wrong(name, f"at most {MAX_TABLES} tables", None)
        if not isinstance(found, dict) or not all(map(_is_places, found.values())):
            return self.wrong(name, "a list of row numbers, or a map of such lists", None)
        return {k: tuple(v) for k, v in found.items()}

    def invocation(self) -> None:
        """An aLoRA's tokens, which `PeftAdapter.active` compares with those of a batch."""
        fits = lambda x: _is_places(x) and len(x) <= MAX_INVOCATION
        expected = f"at most {MAX_INVOCATION} token numbers"
        self.read("alora_invocation_tokens", fits, expected, None)

    def version(self) -> tuple[int, ...] | None:
        found = self.value("peft_version", str, None)
        numbers = re.match(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", found) if found else None
        return tuple(int(n or 0) for n in numbers.groups()) if numbers else None
