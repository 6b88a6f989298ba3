"""Pages of the docs that are to be pasted: they run, and print what stands below their snippets."""

import pytest
from pages import ROOT, assert_prints, snippets

# The short pages: new ones are found.
SHORT = sorted(
    str(page.relative_to(ROOT))
    for folder in ("start", "concepts", "howto")
    for page in (ROOT / "docs" / folder).glob("*.md")
)


def assert_page(page):
    """Every snippet, one after another."""
    found = snippets(page)
    assert_prints("\n".join(code for code, _ in found), "".join(printed for _, printed in found))


@pytest.mark.long
def test_a_method_of_your_own():
    """`init` and `factors` in at most 40 lines."""
    ((code, _),) = snippets("docs/your_own_method.md")
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    assert_page("docs/your_own_method.md")


@pytest.mark.long
def test_a_quantised_base():
    assert_page("docs/quantized.md")


def test_adapters_from_everywhere():
    assert_page("docs/adapters.md")


@pytest.mark.long
def test_a_base_from_hugging_face():
    assert_page("docs/bases.md")


@pytest.mark.long
def test_reinforcement_learning():
    assert_page("docs/rl.md")


@pytest.mark.long
def test_tenants():
    assert_page("docs/tenants.md")


@pytest.mark.slow
def test_methods():
    """Each snippet asserts that its loss falls."""
    assert_page("docs/methods.md")


@pytest.mark.long
@pytest.mark.parametrize("page", SHORT)
def test_page(page):
    assert_page(page)
