"""`benchmarks/gpu.py` runs where there is no accelerator, and its arms agree."""

import importlib.util
import re
import sys

import gpu
import gpu_torch
import jax
import numpy as np
import pytest


@pytest.mark.parametrize(
    "arms", [["hand", "beside"], pytest.param([*gpu.ARMS], marks=pytest.mark.slow)]
)
def test_the_tiny_model_runs_on_a_cpu(arms, capsys):
    """An arm whose package is not there says what to install, and the others go on."""
    with jax.numpy_dtype_promotion("standard"):  # as users have it
        rows = gpu.main(["--model", "tiny", "--steps", "3", "--save", "products", "--arms", *arms])
    assert [*rows] == arms
    missing = {n: row.pop("not run") for n, row in rows.items() if "not run" in row}
    assert {*missing} <= {"qwix", *gpu.TORCH}
    assert all(why.startswith("not installed: pip install ") for why in missing.values())
    rows = {n: row for n, row in rows.items() if n not in missing}
    assert all(row["losses"][-1] < row["losses"][0] for n, row in rows.items() if n != "floor")
    if "floor" in rows:  # the adapters count for more than the losses of arms may differ
        assert abs(rows["floor"]["losses"][0] / rows["hand"]["losses"][0] - 1) > gpu.CLOSE
    assert re.search(
        r"\| beside .*losses of hand.* beside.* agree to", capsys.readouterr().out, re.S
    )


def test_torch_makes_the_same_numbers():
    torch = pytest.importorskip("torch")
    found = gpu_torch.noise(gpu.SEEDS["up_b"], 5 * 12, 12, "cpu").reshape(3, 4)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), gpu.noise("up_b", 6, 3, 4)[5])


def test_what_is_not_there_is_said(monkeypatch):
    """Each of its own: no package, no torch, nothing to ask ahead of time."""
    o = gpu.parse(["--model", "tiny", "--steps", "2"])
    shape, tokens = gpu.MODELS["tiny"]
    there = importlib.util.find_spec("torch")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _: None)
    row = gpu.measured("qwix", o, shape, tokens)
    assert row == {"not run": "not installed: pip install qwix==0.1.8"}
    o.torch = sys.executable
    if not there:
        why = gpu.in_torch("peft_liger", o, shape, tokens)["not run"]
        assert re.match(r"not installed: pip install torch.* liger-kernel==.* \(torch\)", why)
    o.ahead = "h100:1x1x1"
    assert "the device that is there" in gpu.in_torch("peft", o, shape, tokens)["not run"]


def test_losses_that_differ_are_an_error():
    with pytest.raises(SystemExit, match=r"losses differ by 1\.0e"):
        gpu.agree({"hand": {"losses": [1.0]}, "auto": {"losses": [2.0]}})
    assert gpu.agree({"hand": {"losses": [1.0]}, "floor": {"losses": [2.0]}}) == ""


def test_useful_flops_are_those_of_the_weights():
    shape, tokens = gpu.MODELS["8b"]
    n = 7_504_658_432  # all linears and the head
    assert gpu.useful_flops(shape, tokens, "none", False) == 4 * n * 8192
    assert gpu.useful_flops(shape, tokens, "none", True) == 6 * n * 8192
