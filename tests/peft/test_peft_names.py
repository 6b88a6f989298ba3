"""PEFT's ways to mean modules, against its own rules: a regular expression for each look-up."""

import dataclasses
import itertools
import json
import random
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft_by_hand
import pytest
from common import fails
from hypothesis import given
from hypothesis import strategies as st

import lora_jax as lora
from lora_jax._cli.inspect import inspect
from lora_jax._core.paths import nest
from lora_jax.peft._config import peft_config
from lora_jax.peft._patterns import PLAIN, Budget, Patterns, SafePattern, matching_others

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
    assert (config.passed_over(name) is None) == any(
        name == t or name.endswith("." + t) for t in entries
    )
    inside = [t.rpartition(".")[2] for t in entries]
    want = [p for t, p in zip(entries, inside) if f".{name}.{p}".endswith("." + t)]
    assert config.parameters_of(name) == tuple(dict.fromkeys(want))


PARTS = st.lists(st.sampled_from(["m", "h", "q", "0", "1"]), min_size=1, max_size=5)
MODULES = PARTS.map(".".join)
LISTS = st.lists(MODULES, max_size=2)


@given(
    st.fixed_dictionaries(
        {"target_modules": LISTS | st.just("all-linear") | st.just(".*q")},
        optional={
            "exclude_modules": LISTS | st.sampled_from([".*", "m.*", ""]),
            "modules_to_save": LISTS | st.just(["h.[01]"]),
            "layers_to_transform": st.sampled_from([0, 1, [1], [], [0, 1]]),
            "layers_pattern": st.sampled_from(["h", ["h", "m"], [], "", "m.h"]),
        },
    ),
    MODULES,
)
def test_which_modules_peft_adapts(settings, name):
    """As peft.tuners.tuners_utils.check_target_module_exists."""
    if isinstance(settings["target_modules"], str):
        settings.pop("layers_to_transform", None)  # PEFT refuses the two together
    found = peft_config(settings, "config").passed_over(name)
    assert (found is None) == peft_by_hand.taken(settings, name)


def test_layers_beside_an_expression():
    with fails("layers_to_transform: expected a list of target_modules beside it"):
        peft_config({"target_modules": ".*q", "layers_to_transform": [1]}, "config")


ATOMS = [*"ab.1^$-{}]é", "\n", "ab", "q_a", "", *r"\. a\.b \w \D \s \b \B \A \Z \x61 \0 \(".split()]
ATOMS += r"[ab] [^a] []a] [^]b] [\d-] [a\]\-.] [[a] [(|)]".split()
REPEATS = ["", *"* + ? {2} {,1} {1,} {0,2} {,} {0} {} {a} *? +? ?? {1,2}? {2}?".split()]
GROUPS = ["({}){}", "(?:{}){}", "(?P<x>{}){}", "(?={}){}", "(?!{}){}", "(?<={}){}", "(?<!{}){}"]
POSSESSIVE = r"[*+?}]\+"
EXPRESSIONS = st.recursive(
    st.sampled_from(ATOMS),
    lambda x: (
        st.tuples(st.sampled_from(["{}{}", "{}|{}"]), x, x)
        | st.tuples(st.sampled_from(["{}{}", *GROUPS]), x, st.sampled_from(REPEATS))
    ).map(lambda parts: parts[0].format(*parts[1:])),
    max_leaves=6,
).filter(lambda text: not re.search(POSSESSIVE, text))


def check(text, names):
    """Our answers are those of `re`, and what it refuses is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of sets in sets
        try:
            want, inside = re.compile(text), re.compile(rf"(.*\.)?({text})$")
        except re.error:
            with fails("is not a regular expression that can be used"):
                SafePattern(text)
            return
    found = SafePattern(text)
    patterns = Patterns({text: 1}, "alpha_pattern", Budget())
    plain = PLAIN.fullmatch(text)
    for name in names:
        assert found.fullmatch(name) == bool(want.fullmatch(name))
        assert found.match(name) == bool(want.match(name))
        if not plain or "\n" not in name:  # a plain key does not end before a last line break
            assert patterns.first(name, 0) == bool(inside.match(name))


@given(EXPRESSIONS, st.lists(st.text("ab._q1-é\n", max_size=6), min_size=1, max_size=6))
def test_the_answers_of_re(text, names):
    check(text, names)


def test_the_answers_of_re_for_each_part_and_repeat():
    names = ["", *"a b aa aaa ab abb ba a.b q_a 1 { a{ ] é".split(), "\n", "b\n"]
    for repeat in REPEATS:
        for text in [x + repeat for x in ATOMS] + [g.format("a|b", repeat) for g in GROUPS]:
            if not re.search(POSSESSIVE, text):
                for whole in (text, text + "b", "b" + text):
                    check(whole, names)


@pytest.mark.parametrize(
    "text",
    [
        r"(?:.*?(?:text|language).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp)",
        r"^(?!.*(?:vision|lm_head)).*\.(?P<last>q|k|v)_proj$",
        r"(language_model|model)(?=\.).*(?<!vision\.)mlp\.\w+",
        r"model.layers.([0-9]|1[0-5]).(self_attn.q_proj|mlp.(gate|up)_proj)",
    ],
)
def test_the_answers_of_re_for_real_names(text):
    parts = ["self_attn", "mlp", "vision.mlp"], ["q_proj", "up_proj", "out_proj"]
    roots = ["model", "language_model.model", "model.vision_tower", "base.model"]
    names = [".".join(x) for x in itertools.product(roots, ["layers.3", "layers.17"], *parts)]
    assert 0 < sum(bool(re.fullmatch(text, name)) for name in names) < len(names)
    check(text, [*names, "model.layers.5.mlp", "lm_head", "xmodel.layers.5.mlp"])


@pytest.mark.parametrize(
    "text, match",
    [
        ("(a", "'.a' is not a regular expression that can be used: missing"),
        ("a)(b", "can be used: unbalanced"),
        ("[z-a]", "can be used: bad character range"),
        ("(?<=a+)b", "can be used: look-behind requires fixed-width"),
        (r"(a)\1", r": \\\\1 is not supported here"),
        ("(?i)a", r": \(\?i is not supported here"),
        ("(?i:a)", r": \(\?i is not supported here"),
        ("(?P<x>a)(?P=x)", r": \(\?P is not supported here"),
        ("(a)(?(1)b)", r": \(\?\(1 is not supported here"),
        ("(?>a)", r": \(\?>a is not supported here"),
        ("a(?#b)", r": \(\?#b is not supported here"),
        ("a++", r": \+ is not supported here"),
        ("a**", r": \* is not supported here"),
        ("[é]", r": \[é\] is not supported here"),
        (r"\u0041", r": \\\\u is not supported here"),
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
    budget = config.alpha_pattern.budget
    with fails("^the file: its regular expressions take too long"):
        for i in range(10_000):
            config.alpha_of("xy" * 200 + str(i))
    assert i < 10 and -1000 < budget.left < 0  # the step that was one too many


def test_names_that_are_patterns_for_others():
    """As by an expression for each pair; what is no plain name is never a pattern for itself."""
    draw = random.Random(0)
    for _ in range(300):
        part = lambda: "".join(draw.choices("ab_+", (4, 4, 1, 0.2), k=draw.randint(1, 2)))
        names = {".".join(part() for _ in range(draw.randint(1, 3))): 0 for _ in range(12)}
        want = {
            n for n in names
            if "+" in n or any(re.match(rf"(.*\.)?({n})$", m) for m in names if m != n)
        }  # fmt: skip
        assert matching_others(names) == want


def test_a_name_that_is_no_plain_pattern(tmp_path):
    """ "x+y" as an expression is not the name x+y."""
    shapes = {"x+y": (4, 6), "z": (6, 5)}
    params = {n: {"kernel": jnp.zeros((i, o))} for n, (i, o) in shapes.items()}
    axes = lora.Geometry((0,), (1,))
    node = lambda r, i, o: lora.LoRA(jnp.ones((i, r)), jnp.ones((r, o)), 1.0, axes)
    nodes = {"x+y": {"kernel": node(3, 4, 6)}, "z": {"kernel": node(2, 6, 5)}}
    names = {f"{n}.weight": (o, i) for n, (i, o) in shapes.items()}
    lora.peft.save(tmp_path, nodes, lora.peft.mapping(names, params))
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = {n: peft_by_hand.first(found["rank_pattern"], n, found["r"]) for n in shapes}
    assert ranks == {"x+y": 3, "z": 2}


def test_names_of_any_script(tmp_path):
    """A torch module has any name that an attribute of Python's may have, or a number."""
    names = ["größe", "слой.0", "слой.1", "層_ª", "आकार", "e\u0301", "x.größe"]
    params = {n.replace(".", "/"): jnp.zeros((4, 6)) for n in names}
    axes = lora.Geometry((0,), (1,))
    nodes = {
        path: lora.LoRA(jnp.full((4, r), float(r)), jnp.ones((r, 6)), 1.0, axes)
        for r, path in enumerate(params, 1)
    }
    params, nodes = (nest({f"{n}/kernel": x for n, x in t.items()}) for t in (params, nodes))
    lora.peft.save(
        tmp_path, nodes, lora.peft.mapping({f"{n}.weight": (6, 4) for n in names}, params)
    )
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = [peft_by_hand.first(found["rank_pattern"], n, found["r"]) for n in names]
    assert ranks == [*range(1, len(names) + 1)]
    jax.tree.map(np.testing.assert_array_equal, lora.peft.load(tmp_path, params).adapters, nodes)


@pytest.mark.parametrize("name", ["a b", "a..b", "a'", "x²", "a\u202eb", "", "a" * 600])
def test_names_that_are_none(tmp_path, name):
    """What `load` would refuse is not written."""
    axes, params = lora.Geometry((0,), (1,)), {"w": jnp.zeros((4, 6))}
    node = {"w": lora.LoRA(jnp.ones((4, 1)), jnp.ones((1, 6)), 1.0, axes)}
    entry = lora.peft.mapping({"w": (6, 4)}, params)["w"]
    entry = dataclasses.replace(entry, name=f"{name}.weight")
    with fails("expected a dotted name of letters"):
        lora.peft.save(tmp_path / "out", node, lora.peft.TorchMapping({entry.name: entry}))
    assert not (tmp_path / "out").exists()


def test_layers_have_decimal_numbers(tmp_path):
    """² is a digit to Python, and no number."""
    config = peft_config({"target_modules": ["q"], "layers_to_transform": [2]}, "config")
    assert config.passed_over("m.h.²x.q") and config.passed_over("m.h.²")
    (tmp_path / "²" / "lora").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "²"):
        with fails("expected a PEFT folder"):
            inspect(path)
