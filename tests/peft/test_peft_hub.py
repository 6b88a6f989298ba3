"""Repositories of the hub, from a cache that the test lays as huggingface_hub lays it; no network."""

import os
import shutil
import sys

import golden_models as g
import jax.numpy as jnp
import pytest
from common import fails
from test_peft_formats import FOLDER, tree, uses

import lora_jax as lora
from lora_jax.peft import _hub

constants = pytest.importorskip("huggingface_hub.constants")
COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """someone/adapter: main is the LoRA of mlx, the tag v0 an older one; in "second" another."""
    repo = tmp_path / "hub" / "models--someone--adapter"
    for ref, commit in (("main", COMMIT), ("v0", OTHER)):
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for name, inside in (("mlx" if ref == "main" else "mlx_dora", ""), ("loha", "second")):
            (snapshot / inside).mkdir(exist_ok=True)
            for file in (FOLDER / name).glob("adapter*"):  # as links to blobs
                blob = repo / "blobs" / f"{ref}-{name}-{file.name}"
                blob.parent.mkdir(exist_ok=True)
                shutil.copy(file, blob)
                link = snapshot / inside / file.name
                link.symlink_to(os.path.relpath(blob, link.parent))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return repo


def load(name, **kwargs):
    golden = "loha" if kwargs.get("subfolder") else "mlx"
    params = tree(golden, g.tensors(FOLDER / golden / "base.safetensors"))
    return lora.peft.load(name, params, lora.survey(uses, params, jnp.zeros((2,))), **kwargs)


@pytest.mark.filterwarnings("default")  # of huggingface_hub itself
def test_a_repository_is_its_snapshot(cache):
    assert _hub.folder("someone/adapter") == cache / "snapshots" / COMMIT
    for revision, commit in (("v0", OTHER), (OTHER, OTHER), ("main", COMMIT)):
        assert _hub.folder("someone/adapter", revision) == cache / "snapshots" / commit
    found = load("someone/adapter")
    assert found.format == "mlx" and "someone/tiny" in str(found)
    assert load("someone/adapter", subfolder="second", rank=2).config["peft_type"] == "LOHA"


@pytest.mark.filterwarnings("default")
def test_what_the_hub_does_not_have(cache):
    with fails(
        "someone/other: no such folder here, and the hub does not give it: LocalEntryNotFound"
    ):
        load("someone/other")
    with fails("revision 'v9': LocalEntryNotFound"):
        load("someone/adapter", revision="v9")
    with fails("there is no such folder"):
        load("someone/adapter", subfolder="third")
    with fails("expected a path inside the folder"):
        load("someone/adapter", subfolder="../x")
    with fails("someone/bad..name: no such folder here"):
        load("someone/bad..name")


def test_a_path_is_no_repository(tmp_path, monkeypatch):
    """What lies here comes first, and nothing else is looked for on the hub."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FOLDER / "mlx", tmp_path / "someone" / "adapter")
    assert load("someone/adapter").format == "mlx"
    with fails("revision='v0', but this is a path on this machine"):
        load("someone/adapter", revision="v0")
    for name in ("/nowhere/at/all", "./someone/else", "someone/adapter/deep", "nothing"):
        with fails("there is no such folder"):
            load(name)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with fails(r"pip install 'lora_jax\[hub\]'"):
        load("someone/adapter")
