"""Which leaves are trained and how: the configuration applied to a parameter tree."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._config import ALL_LINEAR, LoRAConfig, Rule
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.geometry import Geometry
from lora_jax._core.nnx import survey_call
from lora_jax._core.paths import module_of, nearest
from lora_jax._core.patterns import Pattern, as_patterns, describe, matches
from lora_jax._interpret.reach import PRODUCTS
from lora_jax._nodes.node import NO_REF, leaves_of
from lora_jax._survey import Leaf, Survey
from lora_jax._targets import Target, Targets

PATTERNS = (
    "; patterns are "
    "suffixes ('q_proj'), globs ('*/attn/*'), `re.compile(...)` or functions (path, leaf) -> bool"
)


def no_config(call: str, config: Any, *others: Any) -> LoRAError:
    """The error of another thing in the place of a configuration.

    Args:
      call: the user's, up to the configuration.
      others: the other arguments, among which it may stand.
    """
    kinds = (LoRAConfig, Targets)
    meant = "config" if any(isinstance(x, kinds) for x in others) else "lora.LoRAConfig(rank=8)"
    survey = ", survey" if any(isinstance(x, Survey) for x in (config, *others)) else ""
    kind = "a LoRAConfig" + (" or Targets" if "(key" in call else "")
    found = type(config).__name__
    return LoRAError(f"expected {kind}, found {found}: {call}, {meant}{survey})")


def select(params: Any, config: LoRAConfig, survey: Survey | None = None) -> Targets:
    """Applies a configuration to a parameter tree.

    Args:
      params: the parameters, arrays or `jax.ShapeDtypeStruct`s.
      config: what to adapt.
      survey: how the function uses each leaf. Without one, only 2-D leaves (in × out) and leaves
        whose axes a `Rule` gives can be adapted, and "all-linear" cannot be known.

    Returns:
      A `Targets` value.

    Raises:
      LoRAError: a pattern that matches nothing (with the nearest paths), a leaf of ambiguous
        axes, of an integer type or without a product, a rank above min(in, out), a leaf that two
        parts of the configuration claim; all of them at once.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"q": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}}
    >>> print(lora.select(params, lora.LoRAConfig(rank=4, targets="q")))
    leaf      shape     primitive  in   out  batch  rank  alpha  parameters
    --------  --------  ---------  ---  ---  -----  ----  -----  ----------
    q/kernel  (64, 64)  ?          (0)  (1)  -         4     16         512
    trained: 512 of 4,160 (12.308%)
    """
    return _Selection(params, config, survey).targets()


class _Selection:
    def __init__(self, params: Any, config: LoRAConfig, survey: Survey | None):
        if not isinstance(config, LoRAConfig):
            raise no_config("lora.select(params", config, params, survey)
        if survey is not None and not isinstance(survey, Survey):
            raise LoRAError(
                f"expected a Survey, found {type(survey).__name__}: survey = {survey_call(params)}"
            )
        self.survey_call = survey_call(params)
        leaves = leaves_of(params, "lora.select(params, config)")
        self.leaves = {p: x for p, x in leaves.items() if hasattr(x, "dtype")}
        self.config = config
        # A survey of the whole model serves a part of its tree: paths are the tree's from here on.
        self.survey = None if survey is None else survey.within(self.leaves)
        self.failures: list[str] = []

    def targets(self) -> Targets:
        config = self.config
        exclude = as_patterns(config.exclude)
        self._all_match("exclude", exclude)
        chosen = self._chosen(as_patterns(config.targets))
        left = {p for p in chosen if any(matches(e, p, self.leaves[p]) for e in exclude)}
        lora = {p: t for p in chosen if p not in left and (t := self._target(p)) is not None}
        full = self._full(lora)
        rows = self._rows()
        self._used("full", full)
        self._used("rows", rows)
        # One path holds one node, so that no two parts may claim a leaf.
        for path, leaf in self.leaves.items():
            claims = [
                name
                for name, group in (("targets", lora), ("full", full), ("rows", rows))
                if path in group
            ]
            if claims and isinstance(leaf, jax.Ref):
                self.failures.append(f"'{path}': {NO_REF}")
            if len(claims) > 1:
                self.failures.append(
                    f"'{path}' is claimed by {' and '.join(claims)}; exclude it from one of them"
                )
        # The first rule that matches a leaf holds there.
        first = {config.rule_of(p, self.leaves[p]) for p in lora}
        for i, rule in enumerate(config.rules):
            if not any(matches(rule.pattern, p, self.leaves[p]) for p in lora):
                self.failures.append(
                    f"rule {describe(rule.pattern)} matches no adapted leaf; nearest: "
                    + ", ".join(nearest(str(rule.pattern), lora or self.leaves))
                )
            elif i not in first:
                self.failures.append(
                    f"rule {describe(rule.pattern)} holds nowhere: rules before it match all of "
                    "its leaves; put it before them"
                )
        if not (lora or full or rows or self.failures):
            self.failures.append("nothing is left to train: `exclude` names every leaf chosen")
        no_match = any("matches no leaf" in f for f in self.failures)
        raise_all(
            "cannot apply the configuration to these parameters:",
            self.failures,
            f"to see every leaf: `print({self.survey_call})`{PATTERNS if no_match else ''}",
        )
        total = sum(math.prod(x.shape) for x in self.leaves.values())
        shapes = {p: tuple(self.leaves[p].shape) for p in full}
        left_out = self._left_out({*lora, *full, *rows}, left)
        return Targets(lora, shapes, rows, config, total, left_out)

    def _left_out(self, trained, excluded) -> dict[str, str]:
        """{path: why} of the contracted or looked-up leaves that "all-linear" does not take."""
        if ALL_LINEAR not in as_patterns(self.config.targets):
            return {}
        assert self.survey is not None  # "all-linear" was refused without one
        known = {p: self.survey[p] for p in self.leaves if p not in trained}
        reasons = {}
        for path, leaf in known.items():
            if path in excluded:
                # What the kernel passes before its product; nothing if it enters that as it is.
                by = ", ".join(f"`{u.primitive}`" for u in leaf.uses if not leaf.products)
                reasons[path] = "excluded" + (f"; it is contracted after {by}" if by else "")
            elif leaf.products and 0 in leaf.shape:
                reasons[path] = "without elements"
            elif leaf.head:
                reasons[path] = "the output head"
            elif leaf.kind == "embedding":
                reasons[path] = "an embedding"
            elif len(leaf.shape) >= 2 and any(u.primitive in PRODUCTS for u in leaf.uses):
                reasons[path] = "multiplied by other parameters alone, as learned queries are"
        return reasons

    def _chosen(self, patterns: tuple[Pattern, ...]) -> list[str]:
        if ALL_LINEAR in patterns:
            if self.survey is None:
                raise LoRAError(
                    'targets="all-linear" needs to know how the function uses each leaf: '
                    f"lora.select(params, config, {self.survey_call})"
                )
            linear = self._all_linear(self.survey)
            patterns = tuple(p for p in patterns if p != ALL_LINEAR)
        else:
            linear = []
        self._all_match("targets", patterns)
        meant = {p for t in patterns for p in self._meant(t)}.union(linear)
        # In the tree's order, whatever the order of the patterns.
        return [p for p in self.leaves if p in meant]

    def _all_linear(self, survey: Survey) -> list[str]:
        """Every contracted leaf; one that is contracted after something else was done to it is
        chosen too, so that it is an error and not left out."""
        known = {p: survey[p] for p in self.leaves}
        heads = [p for p, leaf in known.items() if leaf.head]
        linear = [
            p
            for p, leaf in known.items()
            if p not in heads
            and 0 not in leaf.shape
            and (leaf.kind in ("linear", "conv") or _derived(leaf))
        ]
        if not linear:
            only = f"but the output head {', '.join(heads)}; name it in targets" if heads else ""
            self.failures.append(f'"all-linear" matches nothing: no leaf is contracted {only}')
        return linear

    def _meant(self, pattern: Pattern) -> list[str]:
        """The leaves that a target pattern means: the weights among its matches, if any are.

        A suffix that is the leaf's own name, or a predicate, means the leaf whatever it is. A
        kernel that cannot be adapted is meant as well, so that it is an error and not left out.
        """
        found = [p for p, x in self.leaves.items() if matches(pattern, p, x)]
        weights = [p for p in found if self._is_weight(pattern, p)]
        # No weight: kernels, for an error that names them; no kernel: all that matches.
        return weights or [p for p in found if len(self.leaves[p].shape) >= 2] or found

    def _is_weight(self, pattern: Pattern, path: str) -> bool:
        # A predicate, or the end of the leaf's own path: this leaf is meant, whatever it is.
        if callable(pattern) or (isinstance(pattern, str) and f"/{path}".endswith(f"/{pattern}")):
            return True
        if self.survey is None:
            return len(self.leaves[path].shape) >= 2
        leaf = self.survey[path]
        return bool(leaf.products) or _derived(leaf)

    def _all_match(self, what: str, patterns: Sequence[Pattern]) -> None:
        for pattern in patterns:
            found = [p for p, x in self.leaves.items() if matches(pattern, p, x)]
            if not found:
                self.failures.append(
                    f"{what}: {describe(pattern)} matches no leaf; {_guess(what, pattern)}nearest: "
                    + (", ".join(nearest(str(pattern), self.leaves)) or "the tree is one array")
                )

    def _used(self, what: str, paths: Iterable[str]) -> None:
        """A leaf that is trained in full or by rows, and that the function does not use."""
        if self.survey is None:
            return
        for path in paths:
            if self.survey[path].kind == "unused":
                self.failures.append(f"{what}: '{path}' is not used by the function")

    def _target(self, path: str) -> Target | None:
        leaf, rule = self.leaves[path], self.config.rule(path, self.leaves[path])
        shape = tuple(leaf.shape)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            self.failures.append(
                f"'{path}' {shape} is of type {leaf.dtype}; only floating-point "
                "leaves can be adapted: exclude it"
            )
            return None
        known = self.survey[path] if self.survey is not None else None
        if known is not None and known.shape != shape:
            self.failures.append(
                f"'{path}' has shape {shape}, but {known.shape} in the survey: "
                "survey the same model"
            )
            return None
        geometry = self._geometry(path, shape, rule, known)
        if geometry is None:
            return None
        _, inner, outer = geometry.sizes(shape)
        rank, alpha, dropout = rule.rank, rule.alpha, rule.dropout
        assert rank is not None and alpha is not None and dropout is not None  # by `rule`
        if 0 in shape:
            self.failures.append(f"'{path}' {shape} has no elements: exclude=['{path}']")
            return None
        # Beyond it the rank of A·B does not grow, and A and B have more numbers than W.
        if rank > min(inner, outer):
            self.failures.append(
                f"'{path}' {shape}: rank {rank} exceeds min(in={inner}, out={outer}); give it "
                f"its own: rules=[lora.Rule('{path}', rank={min(inner, outer)})], or exclude it"
            )
            return None
        return Target(
            shape,
            geometry,
            rank,
            alpha,
            self.config.scale(rank, alpha),
            dropout,
            known is not None and known.kind == "embedding",
            ", ".join(dict.fromkeys(u.primitive for u in known.products)) if known else "?",
        )

    def _geometry(
        self, path: str, shape: tuple[int, ...], rule: Rule, known: Leaf | None
    ) -> Geometry | None:
        found = known.geometry if known else None
        if found is None and rule.in_axes is None and len(shape) == 2 and known is None:
            found = Geometry((0,), (1,))  # Flax's convention: in × out
        if found is None and (rule.in_axes is None or rule.out_axes is None):
            self.failures.append(self._unknown(path, shape, known))
            return None
        batch = (
            rule.batch_axes if rule.batch_axes is not None else (found.batch_axes if found else ())
        )
        # Negative axes count from the end, as in NumPy; axes that there are not stay what they are.
        n = len(shape)
        there = lambda axes: tuple(d + n if -n <= d < 0 else d for d in axes)
        batch = there(batch)
        own = [None if axes is None else there(axes) for axes in (rule.in_axes, rule.out_axes)]
        # What the rule leaves open the survey says, less the axes that the rule makes a stack.
        inner, outer = (
            axes if axes is not None else tuple(d for d in old if d not in batch)
            for axes, old in zip(own, (found.in_axes, found.out_axes) if found else ((), ()))
        )
        if rule.in_axes is not None and rule.out_axes is None:
            # In axes alone: the rule has the last word, and the rest is out.
            outer = tuple(d for d in range(len(shape)) if d not in batch + inner)
        geometry = Geometry(inner, outer, batch)
        if not geometry.covers(len(shape)):
            self.failures.append(
                f"'{path}' {shape}: in_axes={inner}, out_axes={outer}, batch_axes={batch} must "
                f"name each of the {len(shape)} axes once"
            )
            return None
        return geometry

    def _unknown(self, path: str, shape: tuple[int, ...], known: Leaf | None) -> str:
        """Why the axes of a leaf are not known."""
        if known is None:
            return (
                f"'{path}' {shape}: which axes are in and out is ambiguous; pass a survey, "
                f"lora.init(key, params, config, {self.survey_call}), "
                f"or say it: rules=[lora.Rule('{path}', in_axes=..., out_axes=...)]"
            )
        uses = ", ".join(dict.fromkeys(u.primitive for u in known.uses)) or "unused"
        after = f", but enters one after that: exclude=['{path}']" if _derived(known) else ""
        return f"'{path}' {shape} is used by no contraction, convolution or look-up ({uses}){after}"

    def _full(self, lora: Iterable[str]) -> list[str]:
        patterns = as_patterns(self.config.full)
        self._all_match("full", patterns)
        bias = self.config.bias
        modules = {module_of(p) for p in lora}
        chosen = []
        for path, x in self.leaves.items():
            is_bias = (
                path.rpartition("/")[2] == "bias"
                and bias != "none"
                and (bias == "all" or module_of(path) in modules)
            )
            if is_bias or any(matches(p, path, x) for p in patterns):
                if jnp.issubdtype(x.dtype, jnp.floating):
                    chosen.append(path)
                elif not is_bias:
                    # A pattern that names integers is a mistake; bias="all" passes over them.
                    self.failures.append(
                        f"'{path}' is of type {x.dtype}; only floating-point leaves can be trained"
                    )
        if bias != "none" and not any(p.rpartition("/")[2] == "bias" for p in chosen):
            self.failures.append(
                f"bias={bias!r}, but no leaf is named 'bias'; list the leaves in `full=[...]`"
            )
        return chosen

    def _rows(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        rows = {}
        self._all_match("rows", tuple(self.config.rows))
        for pattern, index in self.config.rows.items():
            for path, x in self.leaves.items():
                if not matches(pattern, path, x):
                    continue
                if path in rows:
                    self.failures.append(f"rows: two patterns name rows of '{path}': join them")
                elif len(x.shape) != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
                    self.failures.append(
                        f"rows: '{path}' {tuple(x.shape)} {x.dtype} is not a table "
                        "of (rows, features)"
                    )
                elif len(set(index)) != len(index) or not all(0 <= i < x.shape[0] for i in index):
                    # A row that is named twice would have two trained values.
                    self.failures.append(
                        f"rows: '{path}' has rows 0 to {x.shape[0] - 1}, each to "
                        f"be named once; found {index}"
                    )
                else:
                    rows[path] = (tuple(x.shape), tuple(index))
        return rows


def _guess(what: str, pattern: Pattern) -> str:
    """What a string that matches nothing looks like: names in a row, or a regular expression."""
    if not isinstance(pattern, str):
        return ""
    if pattern == ALL_LINEAR:
        return "that is for `targets` alone: name the leaves; "
    if what == "targets" and pattern.lower().replace("_", "-") in _LIKE_ALL_LINEAR:
        return f"did you mean '{ALL_LINEAR}'? "
    # "q_proj, v_proj" or "q_proj|v_proj"
    names = [name.strip() for name in re.split(r"[,\s|]", pattern) if name.strip()]
    if len(names) > 1 and all(re.fullmatch(r"[\w/.*?-]+", name) for name in names):
        either = f" or re.compile({pattern!r})" if "|" in pattern else ""
        return f"did you mean {names}{either}? "
    # ".*attn.*(q|v)" is a regular expression to PEFT; here a string is a suffix or a glob.
    if re.search(r"[|^$\\+(]|\.\*", pattern):
        return f"did you mean re.compile({pattern!r})? "
    return ""


_LIKE_ALL_LINEAR = ("all", "linear", "all-linear", "*-linear")


def _derived(leaf: Leaf) -> bool:
    """Whether a kernel is contracted, but not as it is: normalised, masked, added to another."""
    return leaf.reached and not leaf.products and len(leaf.shape) >= 2
