"""Every snippet of the README runs as pasted, and prints what stands below it."""

import pytest
from pages import assert_prints, snippets

SNIPPETS = snippets("README.md")


@pytest.mark.parametrize("i", range(len(SNIPPETS)))
def test_snippet(i):
    code, printed = SNIPPETS[i]
    assert printed, "a snippet prints a result, and the page shows it"
    assert_prints(code, printed)
