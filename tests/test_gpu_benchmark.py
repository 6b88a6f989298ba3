"""`benchmarks/gpu.py` runs where there is no accelerator, and its arms agree."""

import re

import gpu
import jax
import pytest


@pytest.mark.parametrize(
    "arms", [["hand", "beside"], pytest.param([*gpu.ARMS], marks=pytest.mark.slow)]
)
def test_the_tiny_model_runs_on_a_cpu(arms, capsys):
    with jax.numpy_dtype_promotion("standard"):  # as users have it
        rows = gpu.main(["--model", "tiny", "--steps", "3", "--save", "products", "--arms", *arms])
    assert [*rows] == arms and not any("not run" in row for row in rows.values())
    assert all(row["losses"][-1] < row["losses"][0] for n, row in rows.items() if n != "floor")
    assert re.search(r"\| beside .*losses of hand.* beside agree to", capsys.readouterr().out, re.S)


def test_losses_that_differ_are_an_error():
    with pytest.raises(SystemExit, match=r"losses differ by 1\.0e"):
        gpu.agree({"hand": {"losses": [1.0]}, "auto": {"losses": [2.0]}})
    assert gpu.agree({"hand": {"losses": [1.0]}, "floor": {"losses": [2.0]}}) == ""


def test_useful_flops_are_those_of_the_weights():
    shape, tokens = gpu.MODELS["8b"]
    n = 7_504_658_432  # all linears and the head
    assert gpu.useful_flops(shape, tokens, "none", False) == 4 * n * 8192
    assert gpu.useful_flops(shape, tokens, "none", True) == 6 * n * 8192
