"""What to adapt, and how: the configuration and its patterns."""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, Literal, Self

import jax.numpy as jnp

from lora_jax._core.errors import raise_all
from lora_jax._core.numbers import integer, is_real, number
from lora_jax._core.paths import module_of, nearest
from lora_jax._core.plain import fields_of, written

# A suffix ("q_proj"), a glob ("*/attn/*"), a compiled regex (full match) or predicate(path, leaf).
Pattern = str | re.Pattern | Callable[[str, Any], bool]


Patterns = Pattern | Sequence[Pattern]


ALL_LINEAR = "all-linear"


def as_patterns(patterns: Patterns) -> tuple[Pattern, ...]:
    if isinstance(patterns, str | re.Pattern) or callable(patterns):
        return (patterns,)
    if isinstance(patterns, Set):
        # The order of a set of strings differs from process to process.
        return tuple(sorted(patterns, key=describe))
    return tuple(patterns)


def matches(pattern: Pattern, path: str, leaf: Any = None) -> bool:
    """Whether a pattern means this leaf, by the leaf's own path or its module's.

    >>> matches("q_proj", "layers/0/q_proj/kernel"), matches("proj", "layers/0/q_proj/kernel")
    (True, False)
    >>> matches("layers/*/q_proj", "layers/0/q_proj/kernel")
    True
    >>> matches(re.compile(r".*[qv]_proj"), "layers/0/v_proj/kernel")
    True
    """
    # "layers/0/q_proj/kernel", and its module, "layers/0/q_proj".
    names = [path, *([module_of(path)] if "/" in path else [])]
    match pattern:
        case re.Pattern():
            return any(pattern.fullmatch(n) for n in names)
        case str() if any(c in pattern for c in "*?["):
            return any(fnmatch.fnmatchcase(n, pattern) for n in names)
        case str():
            return any(n == pattern or n.endswith("/" + pattern) for n in names)
    return bool(pattern(path, leaf))


def describe(pattern: Pattern) -> str:
    return repr(pattern.pattern if isinstance(pattern, re.Pattern) else pattern)


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
}


class _Named:
    """Refuses names that are not its own by those that are, where Python would raise TypeError."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # `__new__` comes before the dataclass's `__init__`, which would raise a TypeError.
        own = list(inspect.signature(cls.__init__).parameters)[1:]
        failures, call = [], [repr(x) for x in args]
        for name, value in kwargs.items():
            ours = THEIRS.get(name, name)
            if ours not in own:
                failures.append(f"it has no '{name}'; nearest: {', '.join(nearest(name, own, 3))}")
                continue
            if ours != name:
                failures.append(f"'{name}' is '{ours}' here")
            # PEFT's rank_pattern is a dict: its value is not what `rules` takes.
            call.append(f"{ours}=..." if ours == "rules" else f"{ours}={value!r}")
        raise_all(f"{cls.__name__}:", failures, f"lora.{cls.__name__}({', '.join(call)})")
        return super().__new__(cls)

    def _put(self, **values: Any) -> None:
        # `__post_init__` sets its own fields; the dataclass is frozen for everyone else.
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclasses.dataclass(frozen=True)
class Rule(_Named):
    """What is different for the leaves that a pattern means. The first rule that matches holds.

    Attributes:
      pattern: as in `LoRAConfig.targets`.
      rank, alpha, dropout: instead of the configuration's; None keeps the configuration's.
      in_axes, out_axes: the axes that the weight contracts and produces, where the survey is not
        to decide, or no function is given.
      batch_axes: axes that stack separate weights, each of which gets its own A and B: experts,
        layers, or the packed axis of a (2, heads, d, k) kernel that holds keys and values.

    >>> Rule("kv_einsum/w", rank=4, batch_axes=(0,))  # doctest: +ELLIPSIS
    Rule(pattern='kv_einsum/w', rank=4, ...
    """

    pattern: Pattern
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    in_axes: tuple[int, ...] | None = None
    out_axes: tuple[int, ...] | None = None
    batch_axes: tuple[int, ...] | None = None

    def __post_init__(self):
        axes = ("in_axes", "out_axes", "batch_axes")
        failures = [
            f"{name}={getattr(self, name)!r}, expected integers, such as (0,)"
            for name in axes
            if getattr(self, name) is not None and _integers(getattr(self, name)) is None
        ]
        if not _is_pattern(self.pattern):
            failures.append(f"pattern={self.pattern!r}, {ONE_PATTERN}")
        raise_all("invalid Rule:", failures, "for example: lora.Rule('w', batch_axes=(0,))")
        # NumPy's and JAX's integers become Python's, so that equal rules are equal.
        self._put(**{n: _integers(x) for n in axes if (x := getattr(self, n)) is not None})
        self._put(**{n: number(getattr(self, n)) for n in ("rank", "alpha", "dropout")})


@dataclasses.dataclass(frozen=True)
class LoRAConfig(_Named):
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
        failures = list(_bad_numbers("LoRAConfig", self.rank, self.alpha, self.dropout))
        failures += [
            f"{name}=None, expected a number"
            for name in ("rank", "alpha", "dropout")
            if getattr(self, name) is None
        ]
        failures += self._bad_patterns()
        if isinstance(self.rules, Iterable) and all(isinstance(r, Rule) for r in self.rules):
            for rule in self.rules:
                failures += _bad_numbers(
                    f"Rule({describe(rule.pattern)})", rule.rank, rule.alpha, rule.dropout
                )
        else:
            found = f"[{self.rules!r}]" if isinstance(self.rules, Rule) else "[lora.Rule(...)]"
            failures.append(f"rules={self.rules!r}: expected a list, rules={found}")
        if not callable(self.init) and self.init not in ("kaiming", "gaussian"):
            failures.append(
                f"init={self.init!r}: expected 'kaiming', 'gaussian' or a function "
                "(key, shape, dtype) -> array"
            )
        if self.bias not in ("none", "adapted", "all"):
            failures.append(f"bias={self.bias!r}: expected 'none', 'adapted' or 'all'")
        try:
            floating = jnp.issubdtype(jnp.dtype(self.dtype), jnp.floating)
        except TypeError:
            floating = False
        # np.dtype(None) is float64: None has a check of its own.
        if not floating or self.dtype is None:
            failures.append(f"dtype={self.dtype}: expected a floating-point type")
        if not isinstance(self.rank_stabilized, bool):
            failures.append(f"rank_stabilized={self.rank_stabilized!r}: expected True or False")
        raise_all(
            "invalid configuration:",
            failures,
            "for example: LoRAConfig(rank=8, alpha=16, targets=['q_proj', 'v_proj'])",
        )
        # Hashable, and equal where the meaning is.
        self._put(**{n: number(getattr(self, n)) for n in ("rank", "alpha", "dropout")})
        for name in ("targets", "exclude", "full"):
            if not _is_pattern(getattr(self, name)):
                self._put(**{name: as_patterns(getattr(self, name))})
        rows = {pattern: _integers(index) for pattern, index in self.rows.items()}
        self._put(rules=tuple(self.rules), rows=rows, dtype=jnp.dtype(self.dtype))

    @property
    def _others(self) -> bool:
        """Whether something beside low-rank updates is trained."""
        return bool(self.full or self.rows) or self.bias != "none"

    def _bad_patterns(self) -> Iterable[str]:
        for name in ("targets", "exclude", "full"):
            value = getattr(self, name)
            # `all` of nothing is True: an empty sequence passes, an empty string must not.
            several = isinstance(value, Iterable) and not isinstance(value, str)
            several = several and all(map(_is_pattern, value))
            if not (_is_pattern(value) or several):
                yield f"{name}={value!r}: expected one or several patterns; {ONE_PATTERN}"
            elif name == "targets" and several and not (value or self._others):
                # With `full`, `rows` or `bias` an empty list is right: only those are trained.
                yield "targets=[]: nothing would be adapted; name leaves, or 'all-linear'"
        if not isinstance(self.rows, Mapping):
            yield f"rows={self.rows!r}: expected {{pattern: row numbers}}, {{'embed': [7, 8]}}"
            return
        for pattern, index in self.rows.items():
            if not _is_pattern(pattern) or _integers(index) is None:
                yield f"rows={{{pattern!r}: {index!r}}}: expected row numbers, {{'embed': [7, 8]}}"

    def __hash__(self) -> int:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        # A dict is not hashable; a frozenset of its items forgets their order, as == does.
        return hash(tuple((values | {"rows": frozenset(self.rows.items())}).values()))

    def to_json(self) -> str:
        """The configuration as JSON text, for `from_json`.

        Raises:
          LoRAError: a function is part of it.

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
        found = next((r for r in self.rules if matches(r.pattern, path, leaf)), Rule(path))
        own = lambda value, common: common if value is None else value
        return dataclasses.replace(
            found,
            rank=own(found.rank, self.rank),
            alpha=own(found.alpha, self.alpha),
            dropout=own(found.dropout, self.dropout),
        )

    def scale(self, rank: int | None = None, alpha: float | None = None) -> float:
        """alpha / rank, or alpha / √rank where rank-stabilised."""
        rank = self.rank if rank is None else rank
        alpha = self.alpha if alpha is None else alpha
        return float(alpha / (math.sqrt(rank) if self.rank_stabilized else rank))


ONE_PATTERN = "a pattern is a suffix ('q_proj'), a glob ('*/attn/*'), re.compile(...) or a function"


def _is_pattern(x: Any) -> bool:
    return (isinstance(x, str) and x != "") or isinstance(x, re.Pattern) or callable(x)


def _integers(x: Any) -> tuple[int, ...] | None:
    """Integers of any library as Python's, or None if they are not."""
    try:
        found = None if isinstance(x, str | bytes | Mapping) else tuple(map(integer, x))
    except TypeError:
        return None
    # `integer` gives None for booleans and traced numbers: one of them is enough.
    known = tuple(n for n in found or () if n is not None)
    return known if found is not None and len(known) == len(found) else None


def _bad_numbers(who: str, rank: Any, alpha: Any, dropout: Any) -> Iterable[str]:
    if rank is not None and not ((integer(rank) or 0) >= 1):
        yield f"{who}: rank={rank!r}, expected an integer >= 1"
    if alpha is not None and not (is_real(alpha) and math.isfinite(alpha) and alpha != 0):
        yield f"{who}: alpha={alpha!r}, expected a finite number other than 0"
    if dropout is not None and not (is_real(dropout) and 0 <= dropout < 1):
        yield f"{who}: dropout={dropout!r}, expected a rate in [0, 1)"
