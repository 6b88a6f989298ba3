"""Adapters that PEFT wrote, through JAX and back into PEFT: its outputs again, and its bytes."""

import importlib.util
import warnings

import golden_models as g
import jax
import numpy as np
import pytest
from test_peft import MODELS, assert_same_tensors, loaded, stored

import lora_jax as lora

FOLDERS = sorted(p.name for p in g.GOLDEN.iterdir() if p.is_dir())
MISSING = {"net_dora"}  # what load_peft refuses so far
READ = [name for name in FOLDERS if name not in MISSING]
needs_peft = pytest.mark.skipif(
    not (importlib.util.find_spec("peft") and importlib.util.find_spec("torch")),
    reason="needs torch and peft",
)


def error(got, want):
    """The largest difference, as a part of the largest output."""
    return float(np.abs(got - want).max() / np.abs(want).max())


def bound(name):
    """fp32: sums in another order. bf16: activations are rounded in other places."""
    return 2**-7 if name.endswith("bf16") else 1e-6


def jax_error(name):
    """The error of the adapted and of the merged function against PEFT's stored output."""
    params, found = loaded(name)
    fn, (x, _, want) = MODELS[name][0], g.inputs(name)
    merged = jax.jit(fn)(lora.merge(params, found.adapters), x)
    adapted = jax.jit(lora.adapt(fn))(lora.bind(params, found.adapters), x)
    return max(error(merged, want), error(adapted, want))


def test_every_folder_is_read_or_named_as_missing():
    assert set(FOLDERS) - MISSING == set(MODELS)
    for name in MISSING & set(MODELS):
        with pytest.raises(lora.LoRAError):
            loaded(name)


@pytest.mark.parametrize("name", READ)
def test_outputs_are_those_of_peft(name):
    assert jax_error(name) < bound(name)


@needs_peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READ)
def test_peft_reads_back_what_it_wrote(name, tmp_path):
    """PEFT → JAX → file → PEFT → file: the outputs that PEFT stored, and the bytes, both times."""
    import torch_models

    ours, again = tmp_path / "ours", tmp_path / "again"
    _, found = loaded(name)
    lora.save_peft(ours, found.adapters, found.mapping)
    assert_same_tensors(stored(ours), stored(g.folder(name)))
    x, _, want = g.inputs(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing adapter keys|were not used).*")
        before = torch_models.output(name, g.folder(name), np.asarray(x))
        after = torch_models.output(name, ours, np.asarray(x), save=again)
    np.testing.assert_array_equal(after, before)
    assert error(after, want) < bound(name), "PEFT no longer gives what it stored"
    assert_same_tensors(stored(again), stored(ours))
