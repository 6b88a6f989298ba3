"""`benchmarks/gpu.py` runs where there is no accelerator, and its arms agree."""

import importlib.util
import re
import sys

import beside
import gpu
import gpu_torch
import jax
import numpy as np
import pytest
from common import assert_close

import lora_jax as lora


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


@pytest.mark.parametrize("layers", [["--unrolled"], []], ids=["unrolled", "scanned"])
def test_layers_in_a_loop_of_python(layers):
    """The same loss, and no scan."""
    o = gpu.parse(["--model", "tiny", "--layers", "3", *layers])
    shape, tokens = gpu.MODELS["tiny"]
    params = jax.eval_shape(lambda: gpu.init(shape._replace(layers=3)))
    ids = jax.ShapeDtypeStruct(tokens, np.int32)
    model = lambda params, ids: gpu.forward(shape._replace(layers=3), "xla", "none", o.unrolled,
                                            params, ids)  # fmt: skip
    with jax.numpy_dtype_promotion("standard"):  # as users have it
        names = [e.primitive.name for e in jax.make_jaxpr(model)(params, ids).eqns]
    assert ("scan" in names) != o.unrolled


SMALL = {"ragged": ((12, 8), (3, 8, 6)), "1×1": ((2, 5, 4, 8), (1, 1, 8, 6)),
         "3×3": ((2, 5, 4, 8), (3, 3, 8, 6))}  # fmt: skip


@pytest.mark.parametrize("kind", SMALL)
def test_what_is_put_beside_by_hand_is_the_adapted_product(kind):
    (fn,) = (fn for name, (fn, *_) in beside.BY_HAND.items() if kind in name)
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=shape).astype(np.float32) for shape in SMALL[kind])
    config = lora.LoRAConfig(rank=2, alpha=2 * beside.SCALE, targets="*")
    nodes = lora.init(jax.random.key(0), [w], config, lora.survey(fn, [w], x))
    (node,) = nodes.values()
    a, b = (rng.normal(size=v.shape).astype(np.float32) for v in (node.a, node.b))
    nodes = {"0": lora.LoRA(a, b, node.scale, node.geometry)}
    (want,) = lora.adapt(fn)(lora.bind([w], nodes), x)
    b = b.reshape((1,) * (w.ndim - b.ndim) + b.shape)
    assert_close(beside.joined(fn)(w, a, b, x)[0], want)


def test_bytes_of_convolutions_are_those_of_operands_and_results():
    text = """
  %x.1 = bf16[2,3]{1,0} parameter(0)
  %w.1 = f32[5]{0} parameter(1)
  %conv.1 = (bf16[7]{0}, u8[9]{0}) custom-call(%x.1, %w.1), window={}, custom_call_target="__cudnn$f"
  %other.1 = bf16[11]{0} custom-call(%x.1), custom_call_target="else"
"""
    assert beside.of_cudnn(text) == 2 * 6 + 4 * 5 + 2 * 7
