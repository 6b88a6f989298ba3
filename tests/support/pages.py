"""Snippets of Markdown pages, run as a reader runs them, and what the page says that they print."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SNIPPET = re.compile(r"```python\n(.*?)```(?:\s+```text\n(.*?)```)?", re.S)
# What other packages deprecate among themselves is theirs; what a page calls is ours.
WARNINGS = ("error", "ignore::DeprecationWarning", "error::DeprecationWarning:__main__")
FLAGS = tuple(word for flag in WARNINGS for word in ("-W", flag))


def snippets(page):
    """(code, what it prints or "") of each snippet: the text block that follows it at once. In it
    `...` stands for anything, such as digits that depend on the machine."""
    return SNIPPET.findall((ROOT / page).read_text())


def run(code):
    """What it prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, *FLAGS, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def assert_prints(code, want):
    assert_same(run(code), want)


def assert_same(got, want, where=""):
    how = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    same = doctest.OutputChecker().check_output(want, got, how)
    assert same, f"{where} printed:\n{got}\nsaid:\n{want}"
