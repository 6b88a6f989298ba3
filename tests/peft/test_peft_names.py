"""PEFT's ways to mean modules, against its own rules: a regular expression for each look-up."""

import re
import time

import pytest
from common import fails
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.peft._config import peft_config
from lora_jax.peft._patterns import Patterns
from lora_jax.peft._regex import Budget, SafePattern

NAMES = st.lists(st.sampled_from(["a", "b", "ab", "a0", "a_b", "c-d"]), min_size=1, max_size=4)
KEYS = st.lists(
    st.sampled_from(["a", "b", "0", "_", ".", r"\.", "-", r"\-", "^", "(a|b)", ".*", "b?"]),
    min_size=1,
    max_size=4,
).map("".join)


@given(st.lists(KEYS, max_size=5, unique=True), NAMES)
def test_the_first_pattern_that_ends_the_name(keys, parts):
    """As peft.utils.get_pattern_key."""
    name = ".".join(parts)
    want = next((k for k in keys if re.match(rf"(.*\.)?({k})$", name)), None)
    patterns = Patterns({k: k for k in keys}, "alpha_pattern", Budget())
    assert not patterns.failures
    assert patterns.first(name, None) == want


@given(st.lists(NAMES.map(".".join), max_size=4), NAMES.map(".".join))
def test_ends_of_names(entries, name):
    config = peft_config({"target_modules": entries, "target_parameters": entries}, "config")
    assert config.targeted(name) == any(name == t or name.endswith("." + t) for t in entries)
    inside = [t.rpartition(".")[2] for t in entries]
    want = [p for t, p in zip(entries, inside) if f".{name}.{p}".endswith("." + t)]
    assert config.parameters_of(name) == tuple(dict.fromkeys(want))


@pytest.mark.parametrize(
    "text, match",
    [
        ("(a", "'.a' is not a regular expression: missing"),
        ("a)(b", "is not a regular expression: unbalanced"),
        ("(?<=a)b", "assert is not supported"),
        (r"(a)\1", "groupref is not supported"),
        ("(?i)a", "flags are not supported"),
        ("(?i:a)", "subpattern is not supported"),
        ("a++", "is not supported|is not a regular expression"),
        ("(" * 60 + ")" * 60, "nested too deeply"),
        ("a" * 5000, "of 5,000 characters"),
        ("\x1b[2J(", r"'\\x1b\[2J\('"),
    ],
)
def test_expressions_that_are_refused(text, match):
    with fails(match):
        SafePattern(text, "alpha_pattern")


def test_all_bad_expressions_are_listed():
    raw = {"target_modules": "(", "alpha_pattern": {"[": 1, "ok": 2, "(?i)x": 3}, "r": 0}
    with fails(
        r"(?s)^config: .*r: expected.*alpha_pattern: '\['.*'\(\?i\)x'.*target_modules: '\('"
    ):
        peft_config(raw, "config")


def test_one_budget_for_all_expressions():
    raw = {"alpha_pattern": {f"(x?y?){{{i}}}z": 1 for i in range(100, 200)}}
    config = peft_config(raw, "the file", names=10)
    start = time.perf_counter()
    with fails("^the file: its regular expressions take too long"):
        for i in range(10_000):
            config.alpha_of("xy" * 200 + str(i))
    assert time.perf_counter() - start < 5
