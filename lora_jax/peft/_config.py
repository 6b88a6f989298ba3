"""adapter_config.json: what of it changes the function, checked; and PEFT's own look-ups in it."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lora_jax._core.errors import LoRAError, quoted, raise_all
from lora_jax.peft._patterns import Budget, Patterns, SafePattern, endings

# Settings of training or of initialisation alone, and those that are read below.
HARMLESS = set(
    """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r
    target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora
    modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern
    use_dora megatron_config megatron_core trainable_token_indices loftq_config eva_config
    corda_config lora_ga_config qalora_group_size runtime_config lora_bias target_parameters
    velora_config ensure_weight_tying beta1 beta2 deltaT init_r orth_reg_weight target_r tfinal
    tinit total_step merge_weights
    """.split()
)

MERGE = "merge the adapter in PEFT (merge_and_unload) and load the merged weights"

REFUSED = {
    "use_qalora": f"QALoRA pools its inputs; {MERGE}",
    "use_bdlora": f"BD-LoRA is block-diagonal; {MERGE}",
    "kasa_config": f"KaSA changes the base weights; {MERGE}",
    "monteclora_config": "MonteCLoRA samples its factors: no one update is the adapter's",
    "arrow_config": "Arrow routes between adapters by the input: no one update is the adapter's",
    "alora_invocation_tokens": "aLoRA is active from these tokens on only, which no one update is: "
    "found = lora.peft.load(..., ignore=['alora_invocation_tokens']), then for each batch "
    "lora.algebra.choose(lora.algebra.stack([found.adapters]), 0, found.active(ids))",
    "layer_replication": f"the layers of the base are replicated; {MERGE}",
}

# PEFT's other types that add an update to a weight: {type: (settings of training alone, {setting
# that the update depends on: PEFT's default})}.
OTHERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "LOHA": ("rank_dropout module_dropout use_effective_conv2d init_weights", {"alpha": 8.0}),
    "LOKR": (
        "rank_dropout rank_dropout_scale module_dropout use_effective_conv2d init_weights "
        "decompose_both decompose_factor",
        {"alpha": 8.0},
    ),
    "MISS": ("miss_dropout", {"mini_r": 1, "init_weights": True}),
    "HIRA": ("hira_dropout init_weights", {}),
    "VERA": ("projection_prng_key save_projection vera_dropout d_initial init_weights", {}),
    "GRALORA": ("gralora_dropout gralora_k hybrid_r init_weights", {"alpha": 64.0}),
    "FOURIERFT": (
        "n_frequency n_frequency_pattern init_weights",
        {"scaling": 150.0, "random_loc_seed": 777},
    ),
    "SHIRA": ("mask_type random_seed init_weights", {}),
    "IA3": ("init_ia3_weights", {"feedforward_modules": ()}),
    "OFT": (
        "oft_block_size module_dropout init_weights",
        {
            "coft": False,
            "eps": 6e-5,
            "block_share": False,
            "use_cayley_neumann": True,
            "num_cayley_neumann_terms": 5,
        },
    ),
}

# Settings of LoRA that change the function, and that PEFT would pass over in one of `OTHERS`.
LORA_ALONE = """
    use_dora use_rslora lora_bias lora_dropout target_parameters trainable_token_indices
    ensure_weight_tying
""".split()

# Settings of any type that `lora.peft.save` writes again, as they say whose adapter it is.
ABOUT = ("task_type", "base_model_name_or_path", "revision", "auto_mapping")

# What settings say where they mean nothing.
NOTHING = ("none", "None", "null", "auto", "default", "off")

# PEFT 0.21 has 45.
MAX_SETTINGS = 1000

# Of a name, of which every run of parts is looked up: n parts have n²/2 of them.
MAX_PARTS = 64

# Tables of which rows are trained; tokens of an aLoRA.
MAX_TABLES = MAX_INVOCATION = 1000

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
    targets: str | tuple[str, ...] | None
    target: SafePattern | None  # where `targets` is an expression
    names: frozenset[str]  # where it is a list
    parameters: Mapping[str, tuple[tuple[int, str], ...]]  # {end of a module's name: (place, name)}
    tokens: Mapping[str, tuple[int, ...]] | None
    dropout: float
    tying: bool
    fan_in_fan_out: bool
    version: tuple[int, ...] | None
    bias: str
    in_full: frozenset[str]  # modules_to_save
    any_rank: bool  # the tensors' ranks count, whatever `r` says
    own: Mapping[str, Any]
    feedforward: SafePattern | None  # IA3's feedforward_modules, where it is an expression

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

    def saved(self, name: str) -> bool:
        """Whether a parameter is of a module that is saved in full, or a bias that is."""
        parts = name.split(".")
        # PEFT takes a name in modules_to_save for the end of any module, and for all that is in it.
        ends = (".".join(parts[i:j]) for j in range(1, len(parts)) for i in range(j))
        in_full = len(parts) <= MAX_PARTS and any(end in self.in_full for end in ends)
        return in_full or (parts[-1] == "bias" and self.bias != "none")

    def scale(self, name: str, rank: int) -> float:
        """The constant before B·A: alpha / rank, alpha / √rank (rsLoRA), or AdaLoRA's."""
        alpha = self.alpha_of(name)
        # Its rank number stays that of the beginning, whatever was pruned.
        if self.adalora:
            return (alpha if alpha > 0 else float(self.r)) / (self.r + 1e-5)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def scales_inputs(self, module: str) -> bool:
        """Whether IA3 scales this module's inputs, and not its outputs; by PEFT's rule."""
        if self.feedforward is not None:
            return self.feedforward.fullmatch(module)
        return module.endswith(tuple(self.own["feedforward_modules"]))

    def targeted(self, module: str) -> bool:
        """Whether PEFT would look for this module's tensors at all."""
        # Which modules "all-linear" meant there, the file does not say.
        if self.targets is None or self.targets == "all-linear":
            return True
        if self.target is not None:
            return self.target.fullmatch(module)
        return any(end in self.names for end in endings(module))

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
    own, feedforward = check.own(kind)
    config = PeftConfig(
        kind,
        r,
        own["alpha"] if "alpha" in own else check.number("lora_alpha", 8),
        check.value("use_rslora", bool, False),
        check.value("use_dora", bool, False),
        check.patterns("rank_pattern", (lambda v: isinstance(v, list)) if adalora else _is_rank),
        check.patterns("alpha_pattern", _is_number),
        *check.targets(),
        check.parameters(),
        check.tokens(),
        check.number("lora_dropout", 0.0),
        check.value("ensure_weight_tying", bool, False),
        check.value("fan_in_fan_out", bool, False),
        check.version(),
        check.value("bias", str, "none"),
        frozenset(check.strings("modules_to_save")),
        "r" in ignore,
        own,
        feedforward,
    )
    if config.dora and (adalora or raw.get("lora_bias") is True):
        with_what = "AdaLoRA" if adalora else "lora_bias"
        check.failures.append(f"use_dora with {with_what}, which PEFT does not have")
    # PEFT passes these over, so the adapter would not be what its settings say.
    foreign = [k for k in LORA_ALONE if kind in OTHERS and _switches(raw.get(k))]
    check.failures += [f"{k} is set, which is no setting of {kind}" for k in foreign]
    if not 0 <= config.dropout < 1:
        check.failures.append(f"lora_dropout={config.dropout}, expected a rate in [0, 1)")
    raise_all(f"{where}: not a configuration that can be loaded:", check.failures)
    return config


def unknown(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that PEFT 0.17 to 0.21 does not have."""
    # str, as the type is not checked here: it may be a list.
    training, own = OTHERS.get(str(raw.get("peft_type")), ("", {}))
    known = {*HARMLESS, *REFUSED, *training.split(), *own}
    return {k: v for k, v in raw.items() if k not in known}


def kept(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What `lora.peft.save` writes again: whose adapter it is, and what is not known here."""
    about = {k: raw[k] for k in (*ABOUT, "alora_invocation_tokens") if raw.get(k) is not None}
    return about | unknown(raw)


def _switches(value: Any) -> bool:
    """Whether a value may turn something on: anything but nothing, in whatever form."""
    if isinstance(value, dict | list):
        return any(map(_switches, value.values() if isinstance(value, dict) else value))
    return bool(value) and value not in NOTHING


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

    def supported(self, ignore: Iterable[str]) -> None:
        """Nothing is set that changes the function in a way that is not known here."""
        for name, why in REFUSED.items():
            if self.raw.get(name) and name not in ignore:
                self.failures.append(f"{name} is set, which is not supported: {why}")
        new = {k: v for k, v in unknown(self.raw).items() if k not in ignore}
        # A setting that says something may change the function; one that says nothing cannot.
        on = [k for k, v in new.items() if _switches(v)]
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
        if (
            not (isinstance(init, bool | str | None) and init in PLAIN_INITS)
            and "init_lora_weights" not in ignore
        ):
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
        return (
            default
            if found is None
            else found
            if fits(found)
            else self.wrong(name, expected, default)
        )

    def value(self, name: str, kind: type, default: Any) -> Any:
        return self.read(name, lambda x: isinstance(x, kind), kind.__name__, default)

    def number(self, name: str, default: float) -> float:
        return self.read(name, _is_number, "a number", default)

    def rank(self, name: str, unused: bool = False) -> int:
        return 8 if unused else self.read(name, _is_rank, "an integer >= 1", 8)

    def strings(self, name: str) -> tuple[str, ...]:
        return tuple(self.read(name, _is_strings, "a list of strings", ()))

    def expression(self, name: str) -> SafePattern | None:
        try:
            return SafePattern(self.raw[name], name, self.budget)
        except LoRAError as e:
            self.failures.append(str(e))
            return None

    def own(self, kind: str) -> tuple[Mapping[str, Any], SafePattern | None]:
        """The settings of one of `OTHERS`, and feedforward_modules where it is an expression."""
        found: dict[str, Any] = {}
        pattern = None
        # What is asked of a setting follows from the type of PEFT's default.
        for name, default in OTHERS.get(kind, ("", {}))[1].items():
            if name == "init_weights":
                fits = lambda x: x in (True, False, "bat", "mini")
                found[name] = self.read(name, fits, "True, False, 'bat' or 'mini'", default)
            elif isinstance(default, tuple) and isinstance(self.raw.get(name), str):
                found[name], pattern = (), self.expression(name)
            elif isinstance(default, tuple):
                found[name] = self.strings(name)
            elif type(default) is int:
                found[name] = self.read(name, _is_place, "an integer >= 0", default)
            elif isinstance(default, float):
                found[name] = self.number(name, default)
            else:
                found[name] = self.value(name, bool, default)
        return found, pattern

    def targets(self) -> tuple[str | tuple[str, ...] | None, SafePattern | None, frozenset[str]]:
        """(the setting, its expression, its names)."""
        found = self.raw.get("target_modules")
        if not isinstance(found, str):
            names = None if found is None else self.strings("target_modules")
            return names, None, frozenset(names or ())
        target = None if found == "all-linear" else self.expression("target_modules")
        return found, target, frozenset()

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
        patterns = Patterns(found, name, self.budget)
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
