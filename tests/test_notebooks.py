"""The notebooks of the docs: their code runs, without Jupyter, and prints what it did; they are
committed without outputs, which the site makes."""

import json
import subprocess
import sys

import pytest
from pages import FLAGS, ROOT, assert_same

PAGES = sorted((ROOT / "docs").rglob("*.ipynb"))


def cells(page):
    return [c for c in json.loads(page.read_text())["cells"] if c["cell_type"] == "code"]


def test_they_are_found():
    assert [p.stem for p in PAGES] == ["llama_to_vllm", "quickstart"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_notebook(page):
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells(page))
    code = ["import matplotlib; matplotlib.use('Agg')"]
    code += ["".join(cell["source"]) for cell in cells(page)]
    command = [sys.executable, *FLAGS, "-c", "\n".join(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=page.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same(done.stdout, (ROOT / f"tests/data/notebooks/{page.stem}.txt").read_text())
