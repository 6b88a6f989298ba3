"""Quantised tensors from strangers: read as what they say, or refused by name."""

import pytest

pytest.importorskip("gguf")

from damage_quantised import OUTCOMES, run


@pytest.mark.parametrize("kind", OUTCOMES)
def test_damaged_tensors(kind):
    found = run(kind, 0, 300)
    assert found["refused"] > 100 and found["read"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", OUTCOMES)
def test_many_damaged_tensors(kind):
    assert run(kind, 300, 5000)["read"] > 200
