"""Every snippet of the README runs as pasted."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


@pytest.mark.parametrize("i", range(len(SNIPPETS)))
def test_snippet(i):
    """Each in a process of its own, as a reader would."""
    done = subprocess.run(
        [sys.executable, "-c", SNIPPETS[i]], capture_output=True, text=True, cwd=README.parent
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip(), "a snippet prints a result"


def test_first_snippet_prints_what_it_promises():
    done = subprocess.run(
        [sys.executable, "-c", SNIPPETS[0]], capture_output=True, text=True, cwd=README.parent
    )
    assert done.stdout.strip().endswith("True")
