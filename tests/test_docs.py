"""Pages of the docs that are to be pasted: they run, and do what they say."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "your_own_method.md"


def test_a_method_of_your_own():
    """In a process of its own, as a reader would; `init` and `factors` in at most 40 lines."""
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", snippet],
        capture_output=True, text=True, cwd=PAGE.parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    losses, same = done.stdout.splitlines()
    before, after = map(float, losses.split(" -> "))
    assert after < before / 2 and same == "True"
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 40
