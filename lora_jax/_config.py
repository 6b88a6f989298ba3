"""What to adapt, and how: the configuration and its patterns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, ValuesView
from typing import Any, Literal

import jax.numpy as jnp

from lora_jax._core import compat
from lora_jax._core.errors import raise_all
from lora_jax._core.named import Named
from lora_jax._core.numbers import (
    BELOW_ONE,
    COUNT,
    Number,
    integer,
    is_real,
    number,
    refused,
    shown,
)
from lora_jax._core.patterns import (
    ONE_PATTERN,
    Pattern,
    Patterns,
    as_patterns,
    describe,
    is_pattern,
    matches,
)
from lora_jax._core.plain import fields_of, written

ALL_LINEAR = "all-linear"

# What PEFT calls it.
THEIRS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "target_parameters": "targets",
    "exclude_modules": "exclude",
    "modules_to_save": "full",
    "use_rslora": "rank_stabilized",
    "init_lora_weights": "init",
    "trainable_token_indices": "rows",
    "rank_pattern": "rules",
    "alpha_pattern": "rules",
    "use_dora": "lora.methods.dora(params, adapters) here",
    "fan_in_fan_out": "what lora.survey(fn, params, x) finds here",
    "layers_to_transform": "a glob of targets here, such as '*/layers_1?/*'",
    "layers_pattern": "a glob of targets here, such as '*/layers_1?/*'",
    "loftq_config": "an argument of lora.quant.loftq here",
}

# What PEFT has for values of init_lora_weights: here they come after `lora.init`.
STARTS = {
    n: f"lora.methods.{n}" for n in ("pissa", "olora", "orthogonal", "eva", "corda", "lora_ga")
}
STARTS |= {"loftq": "lora.quant.loftq"}


@dataclasses.dataclass(frozen=True)
class Rule(Named, theirs=THEIRS):
    """What is different for the leaves that a pattern means. The first rule that matches holds.

    Attributes:
      pattern: as in `LoRAConfig.targets`.
      rank, alpha, dropout: instead of the configuration's; None keeps the configuration's.
      in_axes, out_axes: the axes that the weight contracts and produces, where the survey is not
        to decide, or no function is given.
      batch_axes: axes that stack separate weights, each of which gets its own A and B: experts,
        layers, or the packed axis of a (2, heads, d, k) kernel that holds keys and values.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> params = {"q": {"kernel": jnp.ones((64, 64))}, "v": {"kernel": jnp.ones((64, 64))}}
    >>> rules = [lora.Rule("v", rank=8, alpha=16)]
    >>> config = lora.LoRAConfig(rank=2, alpha=4, targets=["q", "v"], rules=rules)
    >>> print(lora.select(params, config))
    leaf      shape     primitive  in   out  batch  rank  alpha  parameters
    --------  --------  ---------  ---  ---  -----  ----  -----  ----------
    q/kernel  (64, 64)  ?          (0)  (1)  -         2      4         256
    v/kernel  (64, 64)  ?          (0)  (1)  -         8     16       1,024
    trained: 1,280 of 8,192 (15.625%)
    """

    pattern: Pattern
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    in_axes: tuple[int, ...] | None = None
    out_axes: tuple[int, ...] | None = None
    batch_axes: tuple[int, ...] | None = None

    def __post_init__(self):
        failures, cures = [], {}
        for name in ("in_axes", "out_axes", "batch_axes"):
            if (value := getattr(self, name)) is None:
                continue
            found = _integers(value)
            # NumPy's and JAX's integers become Python's, so that equal rules are equal.
            self._put(**{name: value if found is None else found})
            if found is None:
                failures.append(f"{name}={value!r}, expected integers, such as (0,)")
                cures[name] = "(0,)" if integer(value) is None else f"({integer(value)},)"
        if not is_pattern(self.pattern):
            failures.append(f"pattern={self.pattern!r}, {ONE_PATTERN}")
            cures["pattern"] = "'q_proj'"
        raise_all("invalid Rule:", failures, self._call(cures) if failures else "")
        self._put(**{n: number(getattr(self, n)) for n in NUMBERS})

    def _cures(self) -> dict[str, str]:
        """{number that is wrong: what was meant}; `LoRAConfig` refuses them, all rules in one."""
        return {
            n: _meant(getattr(self, n), kind, default)
            for n, (kind, default) in NUMBERS.items()
            if not kind.or_none.fits(getattr(self, n))
        }


@dataclasses.dataclass(frozen=True)
class LoRAConfig(Named, theirs=THEIRS):
    """Which leaves are adapted, and how.

    Attributes:
      rank: r, the width of the update.
      alpha: the update is scaled by alpha / rank.
      targets: "all-linear" (every leaf that a contraction or convolution uses, embeddings and the
        output head aside; needs a survey), or one or several patterns: a suffix of the leaf's or
        its module's path ("q_proj", "attention/query"), a glob that matches the whole of it
        ("*/layers_1?/*"; `*` crosses slashes), a compiled regular expression (full match), or a
        predicate of (path, leaf).
      exclude: patterns of leaves to leave out.
      rules: exceptions by pattern, see `Rule`.
      rank_stabilized: scale by alpha / √rank instead (rsLoRA, arXiv:2312.03732).
      init: how A starts: "kaiming", U(±1/√fan_in), as loralib and PEFT do; "gaussian",
        N(0, 1/rank²); or a function (key, shape, dtype) -> array. B is zero. For embeddings the
        other way round: A is zero and B is N(0, 1).
      dropout: rate on the input of the low-rank branch, active when `bind` is given a key.
      dtype: of the trainable arrays, whatever the base's.
      bias: also train the biases of no module, of the "adapted" modules, or of "all".
      full: patterns of further leaves that are trained in full (a head, layer norms).
      rows: {pattern of an embedding table: row numbers} whose rows are trained (new tokens).

    Raises:
      LoRAError: rank below 1, or a non-finite alpha, a dropout outside [0, 1), an unknown init or
        bias; all of them at once.

    >>> import lora_jax as lora
    >>> lora.LoRAConfig(rank=16, alpha=32, targets="all-linear").scale()
    2.0
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Patterns = ALL_LINEAR
    exclude: Patterns = ()
    rules: Sequence[Rule] = ()
    rank_stabilized: bool = False
    init: Literal["kaiming", "gaussian"] | Callable = "kaiming"
    dropout: float = 0.0
    dtype: Any = jnp.float32
    bias: Literal["none", "adapted", "all"] = "none"
    full: Patterns = ()
    rows: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in (*PATTERNS, "rules"):
            value = getattr(self, name)
            # An iterator can be read once, and a set has another order in each process.
            if isinstance(value, Set) and name != "rules":
                self._put(**{name: tuple(sorted(value, key=describe))})
            elif isinstance(value, Iterator | ValuesView):
                self._put(**{name: tuple(value)})
        found = [*self._wrong()]
        cures = {name: cure for name, _, cure in found}
        raise_all(
            "invalid configuration:",
            [failure for _, failure, _ in found],
            self._call(cures) if found else "",
        )
        # Hashable, and equal where the meaning is.
        self._put(**{n: number(getattr(self, n)) for n in NUMBERS})
        for name in PATTERNS:
            if not is_pattern(getattr(self, name)):
                self._put(**{name: as_patterns(getattr(self, name))})
        rows = {pattern: _integers(index) for pattern, index in self.rows.items()}
        self._put(rules=tuple(self.rules), rows=rows, dtype=jnp.dtype(self.dtype))

    @property
    def _others(self) -> bool:
        """Whether something beside low-rank updates is trained."""
        return bool(self.full or self.rows) or self.bias != "none"

    def _wrong(self) -> Iterable[tuple[str, str, str]]:
        """(field, what is wrong with it, a value that is right)."""
        for name, (kind, default) in NUMBERS.items():
            value = getattr(self, name)
            for failure in refused(**{name: (value, kind)}):
                cure = _meant(value, kind, default)
                # LoRAConfig("q_proj"): the first argument is the rank.
                names = (value,) if isinstance(value, str) else value
                named = _all(lambda n: is_pattern(n) and not str(n).isdecimal(), names) and names
                if name == "rank" and named and _is(self.targets, ALL_LINEAR):
                    cure += f", targets={value!r}"
                yield name, failure, cure
        for name in PATTERNS:
            value = getattr(self, name)
            one, several = is_pattern(value), _all(is_pattern, value)
            if not (one or several):
                cure = "'all-linear'" if name == "targets" else "()"
                if isinstance(value, Mapping) and _all(is_pattern, [*value]):
                    # PEFT's rank_pattern comes to mind.
                    cure = repr([*value])
                failure = f"{name}={shown(value)}: expected one or several patterns; {ONE_PATTERN}"
                yield name, failure, cure
            elif name == "targets" and several and not (len(value) or self._others):
                # With `full`, `rows` or `bias` an empty list is right: only those are trained.
                nothing = "targets=[]: nothing would be adapted; name leaves, or 'all-linear'"
                yield name, nothing, "'all-linear'"
        if _all(lambda r: isinstance(r, Rule), self.rules):
            calls = f"[{', '.join(rule._call(rule._cures()) for rule in self.rules)}]"
            for rule in self.rules:
                asked = {n: (getattr(rule, n), NUMBERS[n][0].or_none) for n in rule._cures()}
                for failure in refused(**asked):
                    yield "rules", f"Rule({describe(rule.pattern)}): {failure}", calls
        else:
            rules = _rules_meant(self.rules)
            yield "rules", f"rules={shown(self.rules)}: expected a list, rules={rules}", rules
        if not (callable(self.init) or _is(self.init, "kaiming", "gaussian")):
            failure = (
                f"init={shown(self.init)}: expected 'kaiming', 'gaussian' or a function "
                "(key, shape, dtype) -> array"
            )
            if _is(self.init, *STARTS):
                failure += f"; {self.init!r} is {STARTS[self.init]}, after lora.init"
            yield "init", failure, "'kaiming'"
        if not _is(self.bias, "none", "adapted", "all"):
            yield "bias", f"bias={shown(self.bias)}: expected 'none', 'adapted' or 'all'", "'none'"
        # JAX draws no 4-bit numbers.
        fine = compat.is_float_type(self.dtype) and jnp.finfo(jnp.dtype(self.dtype)).bits >= 8
        if not fine:
            yield "dtype", f"dtype={self.dtype!s:.200}: expected a floating-point type", "'float32'"
        if not isinstance(self.rank_stabilized, bool):
            failure = f"rank_stabilized={shown(self.rank_stabilized)}: expected True or False"
            yield "rank_stabilized", failure, "True"
        rows = self.rows if isinstance(self.rows, Mapping) else {None: self.rows}
        for pattern, index in rows.items():
            if not (is_pattern(pattern) and _integers(index)):
                found = {pattern: index} if rows is self.rows else index
                cure = "{'embed': [7, 8]}"
                failure = f"rows={shown(found)}: expected {{pattern: row numbers}}, {cure}"
                yield "rows", failure, cure

    def __hash__(self) -> int:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        # A dict is not hashable; a frozenset of its items forgets their order, as == does.
        return hash(tuple((values | {"rows": frozenset(self.rows.items())}).values()))

    def to_json(self) -> str:
        """The configuration as JSON text, for `from_json`.

        Raises:
          LoRAError: a function is part of it.

        >>> import re
        >>> config = LoRAConfig(rank=4, targets=["q_proj", re.compile("v|o")])
        >>> LoRAConfig.from_json(config.to_json()) == config
        True
        """
        return written(self)

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> LoRAConfig:
        """The configuration that `to_json` wrote: its text, or what `json` reads of it.

        Raises:
          LoRAError: it is no configuration, or an invalid one.
        """
        values = fields_of(cls, text)
        if isinstance(values.get("rules"), tuple):
            # A file may lack the pattern: `Rule` refuses None with a message of its own.
            none: dict[str, Any] = {"pattern": None}
            rule = lambda x: Rule(**none | x) if isinstance(x, dict) else x
            values["rules"] = tuple(map(rule, values["rules"]))
        return cls(**values)

    def rule(self, path: str, leaf: Any = None) -> Rule:
        """The settings of one leaf: the first matching rule, completed from the configuration."""
        at = self.rule_of(path, leaf)
        # A tree that is one array has an empty path, which is no pattern.
        found = Rule(path or "*") if at is None else self.rules[at]
        own = lambda value, common: common if value is None else value
        return dataclasses.replace(
            found,
            rank=own(found.rank, self.rank),
            alpha=own(found.alpha, self.alpha),
            dropout=own(found.dropout, self.dropout),
        )

    def rule_of(self, path: str, leaf: Any = None) -> int | None:
        """Which rule holds for a leaf: the first that matches."""
        of = (i for i, rule in enumerate(self.rules) if matches(rule.pattern, path, leaf))
        return next(of, None)

    def scale(self, rank: int | None = None, alpha: float | None = None) -> float:
        """alpha / rank, or alpha / √rank where rank-stabilised.

        Raises:
          LoRAError: a rank below 1, an alpha that is 0 or not finite.
        """
        asked = {"rank": rank, "alpha": alpha}
        given = {k: (x, NUMBERS[k][0].or_none) for k, x in asked.items()}
        raise_all("no scale:", refused(**given), "config.scale(rank=8, alpha=16)")
        rank = self.rank if rank is None else rank
        alpha = self.alpha if alpha is None else alpha
        return float(alpha / (math.sqrt(rank) if self.rank_stabilized else rank))


PATTERNS = ("targets", "exclude", "full")

# What is asked of the numbers, and what to take in their place.
NUMBERS: dict[str, tuple[Number, float]] = {
    "rank": (COUNT, 8),
    "alpha": (Number("a finite number other than 0", lambda x: x != 0), 16),
    "dropout": (BELOW_ONE, 0.1),
}


def _all(check: Callable[[Any], bool], x: Any) -> bool:
    """Whether this is a list, or what holds its items in an order as well, of such items."""
    return isinstance(x, Sequence) and not isinstance(x, str | bytes) and all(map(check, x))


def _is(x: Any, *names: str) -> bool:
    return isinstance(x, str) and x in names


def _meant(x: Any, kind: Number, default: Any) -> str:
    """The number that was meant: "8" and 8.0 are 8."""
    try:
        found = float(x) if isinstance(x, str) or is_real(x) else default
        found = int(found) if kind.whole else found
    except (ValueError, OverflowError):
        found = default
    return repr(found if kind.fits(found) else default)


def _rules_meant(rules: Any) -> str:
    """What was meant by a dict, as of PEFT's rank_pattern, or by one rule alone."""
    if isinstance(rules, Rule):
        return f"[{rules!r}]"
    if isinstance(rules, Mapping) and _all(is_pattern, [*rules]):
        each = [f"lora.Rule({describe(k)}, rank={_meant(v, COUNT, 8)})" for k, v in rules.items()]
        return f"[{', '.join(each)}]"
    return "()" if rules is None else "[lora.Rule('q_proj', rank=4)]"


def _integers(x: Any) -> tuple[int, ...] | None:
    """Integers of any library as Python's, or None if they are not."""
    try:
        found = None if isinstance(x, str | bytes | Mapping) else tuple(map(integer, x))
    except TypeError:
        return None
    # `integer` gives None for booleans and traced numbers: one of them is enough.
    known = tuple(n for n in found or () if n is not None)
    return known if found is not None and len(known) == len(found) else None
