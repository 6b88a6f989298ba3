"""A page for each framework: it runs, on the newest package that is there, and checks itself."""

import ast
import os
import subprocess
import sys

import pytest
from pages import ROOT, snippets
from support.common import installed

PAGES = sorted(p.stem for p in (ROOT / "docs/with").glob("[a-z]*.md"))


def packages(code):
    """The packages that a page imports."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_page(page):
    code = "\n".join(code for code, _ in snippets(f"docs/with/{page}.md"))
    assert "lora.merge(" in code and "atol=1e-5" in code and "grad(" in code
    missing = [name for name in packages(code) if not installed(name)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    env = {**os.environ, "XLA_FLAGS": ""}  # one device, as a reader has
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
