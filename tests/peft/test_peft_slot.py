"""One slot of a stack, written from where it lies: the file of its adapters."""

import ml_dtypes
import numpy as np
import pytest
from common import fails
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import device_put, eval_shape, jit, make_mesh, tree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax.peft._save import is_finite

LAYERS, IN, OUT = 2, 8, 4
NAMES = {f"layers.{i}.up.weight": (OUT, IN) for i in range(LAYERS)} | {"norm.weight": (IN,)}
PARAMS = {"up": np.ones((LAYERS, IN, OUT), "f4"), "norm": np.ones(IN, "f4")}
RULE = lora.Rule("up", batch_axes=(0,), in_axes=(1,), out_axes=(2,))
SURVEY = lora.select(PARAMS, lora.LoRAConfig(rank=2, targets="up", rules=[RULE]))
TORCH = {r"layers\.(\d+)\.up": "up[{1}]", "norm.weight": "norm"}
MAPPING = lora.peft.mapping(NAMES, PARAMS, SURVEY, mapping=TORCH)


def stacked(dtype="float32", dora=False, spoilt=None):
    """Three slots and the empty one; layer 1 of each has one rank, which starts with a zero."""
    draw = np.random.default_rng(0)
    array = lambda *shape: draw.normal(size=(4, *shape)).astype(dtype)
    a, b = array(LAYERS, IN, 2), array(LAYERS, 2, OUT)
    a[:, 1, 0] = a[:, 1, :, 1] = b[:, 1, 1] = 0
    if spoilt is not None:
        a[spoilt, 0, 0, 0] = np.nan
    node = lora.LoRA(a, b, 1.0, lora.Geometry((1,), (2,), (0,)))
    node = node.with_magnitude(abs(array(LAYERS, OUT))) if dora else node
    return {"up": node, "norm": lora.Full(array(IN))}


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("dtype, dora", [("float32", True), ("bfloat16", False)])
@pytest.mark.parametrize("axes", [None, (), ("x",), (..., "y"), (..., "x", "y"), ("y", ..., "x")])
def test_the_file_of_a_slot(tmp_path, axes, dtype, dora):
    alone = stacked(dtype, dora)
    mesh = make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def laid(x):
        # `axes` with as many None for the dots as x has axes beside
        at = axes.index(...) if ... in axes else len(axes)
        first, last = axes[:at], axes[at + 1 :]
        last = last[max(0, len(first) + len(last) - x.ndim) :]
        spec = (*first, *(None,) * (x.ndim - len(first) - len(last)), *last)
        spec = [n if n is None or s % mesh.shape[n] == 0 else None for n, s in zip(spec, x.shape)]
        return device_put(x, NamedSharding(mesh, P(*spec)))

    there = alone if axes is None else tree.map(laid, alone)
    lora.peft.save(tmp_path / "slot", there, MAPPING, slot=1)
    lora.peft.save(tmp_path / "alone", tree.map(lambda x: x[1], alone), MAPPING)
    assert files(tmp_path / "slot") == files(tmp_path / "alone")


def test_ranks_of_a_layer_are_those_in_use(tmp_path):
    lora.peft.save(tmp_path, stacked(), MAPPING, slot=2)
    shapes = lora.peft.load(tmp_path, PARAMS, SURVEY, mapping=TORCH)
    assert shapes.config["rank_pattern"] == {"layers.1.up": 1}


@pytest.mark.parametrize(
    "tree, slot, match",
    [
        (stacked(), None, r"'up' has an axis of slots.*slot=0"),
        (stacked(), 3, r"slot=3: expected 0 to 2: lora.peft.save\(folder, stacked, mapping"),
        (stacked(), -1, r"slot=-1: expected 0 to 2"),
        (stacked(), True, r"slot=True: expected 0 to 2"),
        ({"up": tree.map(lambda x: x[1], stacked()["up"])}, 0, "expected a stack, found"),
        ({}, 0, "expected a stack, found"),
        (stacked(spoilt=1), 1, "'.*layers.0.up.lora_A.weight' holds NaN or infinity"),
    ],
)
def test_what_is_no_slot(tmp_path, tree, slot, match):
    with fails(match):
        lora.peft.save(tmp_path / "out", tree, MAPPING, slot=slot)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("slot", [None, 1])
def test_what_has_no_values(tmp_path, slot):
    there = stacked() if slot is not None else tree.map(lambda x: x[1], stacked())
    save = lambda adapters: lora.peft.save(tmp_path / "out", adapters, MAPPING, slot=slot)
    with fails(r"(?s)no values:.*'up/a' is traced: outside of jax.jit"):
        jit(save)(there)
    with fails("'up/a' is a shape alone"):
        save(eval_shape(lambda: there))
    gone = device_put(there)
    gone["up"].a.delete()
    with fails("'up/a' is deleted"):
        save(gone)
    assert not list(tmp_path.iterdir())


def test_another_slot_s_nan_is_its_own(tmp_path):
    for name, spoilt in (("one", 1), ("none", None)):
        lora.peft.save(tmp_path / name, stacked(spoilt=spoilt), MAPPING, slot=0)
    assert files(tmp_path / "one") == files(tmp_path / "none")


@given(st.data())
def test_finite_by_the_bits(data):
    dtype = data.draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
    bits = {2: np.uint16, 4: np.uint32}[np.dtype(dtype).itemsize]
    found = data.draw(hnp.arrays(bits, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0)))
    value = found.view(dtype)
    for x in (value, value.T, value[::2]):
        assert is_finite(x) == np.isfinite(x.astype(np.float32)).all()
