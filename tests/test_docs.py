"""Pages of the docs that are to be pasted: they run, and do what they say."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def snippets(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)


def run(code):
    """What it prints, in a process of its own, as a reader would run it."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, cwd=DOCS.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_method_of_your_own():
    """`init` and `factors` in at most 40 lines."""
    (snippet,) = snippets("your_own_method.md")
    losses, same = run(snippet).splitlines()
    before, after = map(float, losses.split(" -> "))
    assert after < before / 2 and same == "True"
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 40


def test_a_quantised_base():
    """Every snippet, one after another: the table of bytes, and the errors of merging."""
    *_, bits, errors = run("\n".join(snippets("quantized.md"))).splitlines()
    assert bits == "base: 262,144 parameters, 4.127 bits each"
    merged = ast.literal_eval(errors)
    assert merged.keys() == {"up/kernel", "down/kernel"} and 0.05 < merged["up/kernel"] < 0.11


@pytest.mark.slow
def test_methods():
    """Every snippet, one after another; each asserts that its loss falls."""
    assert "targets: all linear layers" in run("\n".join(snippets("methods.md")))
