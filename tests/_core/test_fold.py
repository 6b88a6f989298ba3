"""Folded tables: every leaf is there once, with its own cells, in text and as HTML."""

import html.parser
import itertools
import re

import jax
import jax.numpy as jnp
import pytest
from common import examples
from hypothesis import given
from hypothesis import strategies as st

import lora_jax as lora
from lora_jax._core.fold import Folded, fold, folded, natural
from lora_jax._core.table import html_table, table

NAMES = st.sampled_from(
    ["q", "h", "h_0", "h_1", "h_2", "h_10", "0", "1", "2", "01", "02", "h_", ""]
)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
ROWS = st.dictionaries(
    PATHS, st.tuples(st.integers(0, 1), st.sampled_from(["a", "b"])), max_size=24
)


@examples(200)
@given(ROWS)
def test_unfolding_gives_back_every_leaf(rows):
    unfolded = [(path, value) for paths, value in fold(rows) for path in paths]
    assert len(unfolded) == len(rows) and dict(unfolded) == rows
    assert all(len([*paths]) == len(paths) for paths, _ in fold(rows))


@examples(100)
@given(ROWS)
def test_lines_are_few_and_differ(rows):
    """No two of them could be one: folding what is folded changes nothing."""
    lines = [str(paths) for paths, _ in fold(rows)]
    assert len({*zip(lines, (value for _, value in fold(rows)))}) == len(lines)
    plain = {path: value for path, value in rows.items() if not re.search(r"\d", path)}
    assert [str(path) for path, _ in fold(plain)] == natural(plain)


@examples(100)
@given(st.lists(PATHS, unique=True, max_size=24))
def test_natural_order_is_an_order_of_the_same(paths):
    found = natural(paths)
    assert sorted(found) == sorted(paths) and natural(found) == found


@examples(100)
@given(st.sets(st.integers(0, 30), min_size=1))
def test_ranges_say_the_numbers(numbers):
    """Read as a shell reads them."""
    ((path, _),) = fold({f"h_{n}/q": None for n in numbers})
    text = str(path)
    if len(numbers) == 1:
        assert text == f"h_{next(iter(numbers))}/q"
        return
    inner = re.fullmatch(r"h_\{(.*)\}/q", text)[1]
    ends = [[int(n) for n in run.split("..")] for run in inner.split(",")]
    assert [*itertools.chain(*(range(r[0], r[-1] + 1) for r in ends))] == sorted(numbers)


@pytest.mark.parametrize("paths, lines", [
    (["a/0/q", "a/1/q", "a/2/q", "a/5/q"], ["a/{0..2,5}/q"]),
    ([f"h_{i}/e{j}/w" for i in (0, 1, 10, 2) for j in range(4)], ["h_{0..2,10}/e{0..3}/w"]),
    # A grid with a hole: what is there, and no more.
    (["0/e0", "0/e1", "1/e1", "2/e0", "2/e1"], ["{0,2}/e{0,1}", "1/e1"]),
    (["h_01", "h_02", "h_03", "h_1", "h_2"], ["h_{01..03}", "h_{1,2}"]),
    (["conv", "conv1", "conv2"], ["conv", "conv{1,2}"]),
])  # fmt: skip
def test_lines(paths, lines):
    assert [str(p) for p, _ in fold(dict.fromkeys(paths))] == lines


def test_a_tree_keeps_its_own_order():
    fields = ["conv1", "norm1", "conv2", "norm2"]
    assert natural(fields) == fields
    assert natural(["b10/x", "b10/a", "b9/x", "a"]) == ["b9/x", "b10/x", "b10/a", "a"]


def tree(layers=24):
    w = jnp.ones((4, 4))
    layer = {"attn": {"k": w, "q": w}, "mlp": {"down": w}}
    return {"layers": [layer] * layers, "head": jnp.ones((4, 9))}


def test_targets_of_24_layers():
    """A line each for what is alike, the parameters of all together; by itself in the mapping."""
    rules = [lora.Rule("layers/7/attn/q", rank=1)]
    config = lora.LoRAConfig(rank=2, targets=["q", "k"], rules=rules, full=["head"])
    targets = lora.select(tree(), config)
    lines = [line.split() for line in str(targets).splitlines()]
    assert [line[:2] for line in lines[2:-1]] == [
        ["layers/{0..23}/attn/k", "24"],
        ["layers/{0..6,8..23}/attn/q", "23"],
        ["layers/7/attn/q", "1"],
        ["head", "1"],
    ]
    counted = [int(line[-1].replace(",", "")) for line in lines[2:-1]]
    assert sum(counted) == targets.parameters == 24 * 16 + 23 * 16 + 8 + 36
    assert len(targets) == 48 and targets["layers/7/attn/q"].rank == 1


def test_what_is_left_out_folds_with_its_reason():
    params = tree(3)
    fn = lambda p, x: sum((x @ a["attn"]["k"]) @ p["w"] for a in p["layers"])
    params["w"] = jnp.ones((4, 4))
    survey = lora.survey(fn, params, jnp.ones((1, 4)))
    config = lora.LoRAConfig(rank=2, targets=["all-linear", "w"], exclude="k")
    left = "left out: layers/{0..2}/attn/k (3 leaves), excluded"
    assert left in str(lora.select(params, config, survey)).splitlines()


class Cells(html.parser.HTMLParser):
    """The text of each cell, row by row; the tags."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows:
            self.rows[-1][-1] += data


@examples(50)
@given(st.lists(st.tuples(st.text(max_size=9), st.integers(0, 9999)), max_size=4))
def test_html_shows_the_text_of_every_cell(rows):
    found = Cells(html_table(("<leaf>", "n & m"), rows))
    assert found.tags == {"table", "thead", "tbody", "tr", "th"} | ({"td"} if rows else set())
    assert found.rows == [["<leaf>", "n & m"], *([path, f"{n:,}"] for path, n in rows)]


def test_names_are_no_tags():
    name = "<script>alert('1')</script>&0"
    params = {name: jnp.ones((4, 4)), "w": jnp.ones((4, 4))}
    fn = lambda p, x: x @ p[name] @ p["w"]
    survey = lora.survey(fn, params, jnp.ones((1, 4)))
    targets = lora.select(params, lora.LoRAConfig(rank=1, targets=lambda path, x: True), survey)
    bound = lora.bind(params, lora.init(jax.random.key(0), params, targets))
    for shown in (survey, targets, lora.coverage(fn, bound, jnp.ones((1, 4)))):
        text = shown._repr_html_()
        assert "<script" not in text and "&lt;script&gt;" in text
        assert Cells(text).tags <= {"table", "thead", "tbody", "tr", "th", "td", "div"}


def test_html_and_text_have_the_same_cells():
    targets = lora.select(tree(), lora.LoRAConfig(rank=2, targets=["q", "k"]))
    rows = Cells(targets._repr_html_().partition("<div>")[0]).rows
    text = str(targets).splitlines()
    for row, line in zip(rows, [text[0], *text[2:-1]], strict=True):
        assert re.fullmatch(r"\s+".join(map(re.escape, row)), line)
    assert f"<div>{text[-1]}</div>" in targets._repr_html_()


def test_nothing_folds_nothing_changes():
    rows = [("b", 2), ("a", 1)]
    assert folded(("leaf", "n"), rows) == (("leaf", "n"), rows)
    assert table(*folded(("leaf", "n"), rows)).splitlines()[0] == "leaf  n"
    assert str(Folded((("a",), ("b",)))) == "a/b"
