"""Pages of the docs that are to be pasted: they run, and print what stands below their snippets."""

from pathlib import Path

import pytest
from pages import ROOT, assert_prints, assert_same, run, snippets

# Short pages, by folder: new ones are found.
SHORT = (
    "index",
    "start/*",
    "concepts/*",
    "howto/*",
    "design",
    "performance",
    "parallel",
    "scaling",
)
# Each page with its own names, in one process: most of the time is that of the imports.
TOGETHER = """
for page, code in {pages!r}:
    print("\f")
    exec(compile(code, page, "exec"), {{"__name__": "__main__"}})
"""


def assert_page(page):
    """Every snippet, one after another."""
    found = snippets(page)
    assert_prints("\n".join(code for code, _ in found), "".join(printed for _, printed in found))


def test_a_method_of_your_own():
    """`init` and `factors` in at most 40 lines."""
    ((code, _),) = snippets("docs/your_own_method.md")
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    assert_page("docs/your_own_method.md")


def test_a_quantised_base():
    assert_page("docs/quantized.md")


def test_adapters_from_everywhere():
    assert_page("docs/adapters.md")


def test_a_base_from_hugging_face():
    assert_page("docs/bases.md")


def test_reinforcement_learning():
    assert_page("docs/rl.md")


def test_tenants():
    assert_page("docs/tenants.md")


@pytest.mark.slow
def test_methods():
    """Each snippet asserts that its loss falls."""
    assert_page("docs/methods.md")


@pytest.mark.parametrize("pages", SHORT)
def test_short_pages(pages):
    found = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob(f"{pages}.md"))
    of_page = {page: snippets(page) for page in found}
    code = [(page, "\n".join(code for code, _ in of)) for page, of in of_page.items()]
    printed = run(TOGETHER.format(pages=code)).split("\f\n")[1:]
    for (page, of), got in zip(of_page.items(), printed, strict=True):
        assert_same(got, "".join(want for _, want in of), page)


def test_no_page_is_left_out():
    """Every page with code is run, here or by tests/test_docs_with.py."""
    docs = ROOT / "docs"
    pages = {p for p in docs.rglob("*.md") if snippets(p.relative_to(ROOT))}
    run_here = {p for pages in SHORT for p in docs.glob(f"{pages}.md")} | set(
        docs.glob("with/*.md")
    )
    named = Path(__file__).read_text()
    left = [p.name for p in pages - run_here if f'"docs/{p.relative_to(docs)}"' not in named]
    assert not left
