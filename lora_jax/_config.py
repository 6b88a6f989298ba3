"""What to adapt, and how: the configuration and its patterns."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, Literal

import jax.numpy as jnp

from lora_jax._core.errors import raise_all
from lora_jax._core.paths import module_of

# A suffix ("q_proj"), a glob ("*/attn/*"), a compiled regex (full match) or predicate(path, leaf).
Pattern = str | re.Pattern | Callable[[str, Any], bool]


Patterns = Pattern | Sequence[Pattern]


ALL_LINEAR = "all-linear"


def as_patterns(patterns: Patterns) -> tuple[Pattern, ...]:
    if isinstance(patterns, str | re.Pattern) or callable(patterns):
        return (patterns,)
    if isinstance(patterns, Set):  # whose order is that of the process
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


@dataclasses.dataclass(frozen=True)
class Rule:
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


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
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
        for rule in self.rules:
            failures += _bad_numbers(
                f"Rule({describe(rule.pattern)})", rule.rank, rule.alpha, rule.dropout
            )
        if not callable(self.init) and self.init not in ("kaiming", "gaussian"):
            failures.append(
                f"init={self.init!r}: expected 'kaiming', 'gaussian' or a function "
                "(key, shape, dtype) -> array"
            )
        if self.bias not in ("none", "adapted", "all"):
            failures.append(f"bias={self.bias!r}: expected 'none', 'adapted' or 'all'")
        if not jnp.issubdtype(self.dtype, jnp.floating):
            failures.append(f"dtype={self.dtype}: expected a floating-point type")
        raise_all(
            "invalid configuration:",
            failures,
            "for example: LoRAConfig(rank=8, alpha=16, targets=['q_proj', 'v_proj'])",
        )

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


def _bad_numbers(who: str, rank: Any, alpha: Any, dropout: Any) -> Iterator[str]:
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        yield f"{who}: rank={rank!r}, expected an integer >= 1"
    if alpha is not None and not (isinstance(alpha, int | float) and math.isfinite(alpha)):
        yield f"{who}: alpha={alpha!r}, expected a finite number"
    if dropout is not None and not (isinstance(dropout, int | float) and 0 <= dropout < 1):
        yield f"{who}: dropout={dropout!r}, expected a rate in [0, 1)"
