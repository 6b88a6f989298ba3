"""The site's sources: what is generated covers the package, and no page is forgotten."""

import re
import sys
import tomllib

import numpy as np
import pytest
from pages import ROOT, assert_prints, snippets

import lora_jax as lora

sys.path.append(str(ROOT / "docs/_site"))
import error_catalogue


def test_the_first_page():
    ((code, printed),) = snippets("docs/index.md")
    assert_prints(code, printed)
    # It says of itself what the README says, to which docs/claims.md holds both.
    why = lambda page: re.findall(r"^- \*\*.*?\n\n", (ROOT / page).read_text(), re.M | re.S)[0]
    assert why("docs/index.md") == why("README.md")


def test_each_namespace_has_its_page_of_the_reference():
    """The page lists `__all__` itself, so that no name is forgotten."""
    pages = (ROOT / "docs/reference").glob("*.md")
    found = re.findall(r"^```\{names\} (.*)$", "".join(p.read_text() for p in pages), re.M)
    spaces = [n for n in lora.__all__ if (ROOT / "lora_jax" / n).is_dir()]
    assert sorted(found) == sorted(["lora_jax", *(f"lora_jax.{n}" for n in spaces)])


def test_each_error_is_in_the_catalogue_once():
    known = error_catalogue.messages()
    assert len({(m.text, m.lines) for m in known}) == len(known) > 300
    for m in known:
        assert error_catalogue.says_something(m.text) or " | " in m.text or m.lines, m
    sites = [
        (file, i)
        for file in error_catalogue.PACKAGE.rglob("*.py")
        if file.name != "errors.py"
        for i, line in enumerate(file.read_text().splitlines(), 1)
        if re.search(r"raise LoRAError\(|^\s+raise_all\(", line)
    ]
    # What is left: the words of a message that is there already, or of another error, handed on.
    places = {(m.file, m.line) for m in known}
    assert len(set(sites) - places) < 0.1 * len(sites)


CURES = tomllib.loads((ROOT / "docs/_site/cures.toml").read_text())


@pytest.mark.parametrize("key", CURES)
def test_a_cure_is_of_messages_that_there_are(key):
    """Each is of a file, or a function, that raises, and what it calls is public."""
    file, _, function = key.partition(":")
    assert any(
        m.file.relative_to(error_catalogue.PACKAGE).as_posix().startswith(file)
        and function in ("", m.function)
        for m in error_catalogue.messages()
    )
    for name in re.findall(r"lora\.([a-z_.]+)\(", CURES[key]):
        value = lora
        for part in name.split("."):
            value = getattr(value, part)


W = {"q": np.ones((4, 3), np.float32)}
MISUSES = {
    "rank": lambda: lora.select(W, lora.LoRAConfig(rank=8, targets="q")),
    "pattern": lambda: lora.LoRAConfig(rank=0, dropout=2.0),
    "no survey": lambda: lora.select(W, lora.LoRAConfig()),
    "a module": lambda: lora.adapt(3),
    "unknown": lambda: lora.merge(W, lora.Full(np.ones(3))),
    "stack": lambda: lora.algebra.stack([], capacity=2),
    "weights": lambda: lora.algebra.combine([{}], [1.0, 2.0]),
    "format": lambda: lora.quant.quantize(W, "q", "int3"),
    "topology": lambda: lora.parallel.topology_mesh("v9"),
    "folder": lambda: lora.peft.load("nowhere", W),
    "checkpoint": lambda: lora.checkpoint.restore("nowhere", base=W),
    "optimiser": lambda: lora.optim.adalora(None, target_rank=0, tinit=1, tfinal=1, steps=2),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_what_is_raised_is_found(misuse):
    with pytest.raises(lora.LoRAError, match=r"\w") as raised:
        MISUSES[misuse]()
    assert error_catalogue.missing(str(raised.value)) == []


def test_what_nobody_raises_is_not_found():
    assert error_catalogue.missing("the moon is not of cheese") == ["the moon is not of cheese"]


def test_a_message_is_what_was_wrong_and_what_to_do():
    text = "expected a stack, found ‹type›: tx.init(lora.algebra.stack([...], capacity=8))"
    cause, cure = error_catalogue.cause_and_cure(text)
    assert cause == "expected a stack, found ‹type›" and cure.startswith("tx.init(")
