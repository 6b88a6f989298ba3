"""Adapters that PEFT wrote, through JAX and back into PEFT: its outputs again, and its bytes."""

import json
import warnings

import golden_models as g
import jax
import numpy as np
import pytest
import test_peft_kinds
from common import needs_peft
from make_golden import GOLDEN
from test_peft import MODELS, assert_same_tensors, loaded, outputs, stored

import lora_jax as lora
from lora_jax._core.paths import flatten
from lora_jax._nodes.node import is_node
from lora_jax.peft._file import CONFIG, TENSORS

FOLDERS = sorted(p.name for p in g.GOLDEN.iterdir() if p.is_dir())
# Other bytes, which mean the same: AdaLoRA's E and pruned ranks; a base's table; a bias three times.
REWRITTEN = {"kind_adalora", "kind_classifier", "kind_dora_classifier", "kind_tied_both"}


def opened(name, folder=None):
    """(function, parameters, what load_peft found)."""
    folder = folder or g.folder(name)
    if name in MODELS:
        return MODELS[name][0], *loaded(name, folder)
    for file in ("base.safetensors", "io.safetensors"):
        if not (folder / file).exists():
            (folder / file).symlink_to(g.folder(name) / file)
    fn, params, _, found, _ = test_peft_kinds.opened(folder, GOLDEN[name][0])
    return fn, params, found


def error(got, want):
    """The largest difference, as a part of the largest output."""
    return float(np.abs(got - want).max() / np.abs(want).max())


def bound(name):
    """fp32: sums in another order. bf16: activations are rounded in other places."""
    return 2**-7 if name.endswith("bf16") else 1e-6


def assert_same_adapters(got, want):
    flat = [flatten(tree, is_leaf=is_node) for tree in (got, want)]
    assert flat[0].keys() == flat[1].keys()
    jax.tree.map(np.testing.assert_array_equal, *flat)


def test_every_folder_is_read():
    assert set(FOLDERS) == MODELS.keys() | GOLDEN.keys()


@pytest.mark.parametrize("name", FOLDERS)
def test_outputs_and_bytes_are_those_of_peft(name, tmp_path):
    """The adapted and the merged function; and what is written is what PEFT wrote."""
    fn, params, found = opened(name)
    x, base, want = g.inputs(name)
    assert error(base, want) > 1e-3, "the adapter changes nothing"
    for got in outputs(fn, params, found.adapters, x):
        assert error(got, want) < bound(name)
    lora.peft.save(tmp_path, found.adapters, found.mapping)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, TENSORS]
    again = opened(name, tmp_path)[2].adapters
    if name not in REWRITTEN:
        assert_same_tensors(stored(tmp_path), stored(g.folder(name)))
        return assert_same_adapters(again, found.adapters)
    trees = (lora.merge(params, adapters) for adapters in (found.adapters, again))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), *trees)


@needs_peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FOLDERS)
def test_peft_reads_back_what_it_wrote(name, tmp_path):
    """PEFT → JAX → file → PEFT → file: the outputs that PEFT stored, and the bytes, both times."""
    import torch_models

    ours, again = tmp_path / "ours", tmp_path / "again"
    found = opened(name)[2]
    lora.peft.save(ours, found.adapters, found.mapping)
    x, _, want = g.inputs(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing adapter keys|were not used).*")
        before = torch_models.output(name, g.folder(name), np.asarray(x))
        after = torch_models.output(name, ours, np.asarray(x), save=again)
    assert error(after, want) < bound(name), "PEFT no longer gives what it stored"
    if name not in REWRITTEN:
        np.testing.assert_array_equal(after, before)
        assert_same_tensors(stored(again), stored(ours))
    dora = json.loads((g.folder(name) / CONFIG).read_text())["use_dora"]
    assert json.loads((ours / CONFIG).read_text())["use_dora"] == dora
