"""Damaged adapter folders, a thousand and more: each is refused clearly, or means what it says."""

import json
import os
import shutil
import struct

import damage_outcome
import damage_work
import golden_models as g
import pytest

import lora_jax as lora
from lora_jax.peft._file import CONFIG, TENSORS

NAME = "net_lora"


def assert_good(name, damages, out):
    assert out.good, f"{out.kind}: {name}, {'+'.join(damages)}: {out.what}"


def test_the_goldens_are_loaded_as_by_hand():
    for name in damage_outcome.MODELS:
        out = damage_outcome.outcome(name, g.folder(name))
        assert out.kind == "loaded", f"{name}: {out.kind}: {out.what}"


def test_damaged_folders():
    damage_outcome.many(250, assert_good)


@pytest.mark.slow
def test_thousands_of_damaged_folders_in_little_memory():
    damage_outcome.many(50, lambda *_: None)  # compiles, fills caches
    with damage_outcome.address_space(256 << 20):
        damage_outcome.many(3000, assert_good)


def test_what_the_check_finds(tmp_path):
    """It could fail: a loader that is slow, large, crashes, is unclear, or wrong is told apart."""
    folder = shutil.copytree(g.folder(NAME), tmp_path / "a")
    other = damage_outcome.loaded_by("net_rslora_patterns", g.folder("net_rslora_patterns"))

    def fails(error):
        raise error

    ways = {
        "crashed": lambda: fails(RecursionError()),
        "unclear": lambda: fails(lora.LoRAError("somewhere")),
        "refused": lambda: fails(lora.LoRAError(f"{folder}: no")),
        "wrong": lambda: other,
        "too large": lambda: bytearray(64 << 20),
        "too slow": lambda: [None for _ in iter(int, 1)],
        "loaded": None,
    }
    got = {k: damage_outcome.outcome(NAME, folder, load, 0.5).kind for k, load in ways.items()}
    assert got == {k: k for k in ways}


# Large ones, each once


def pair(name, at, n_in=8, n_out=12):
    for tail, shape in (("A", [1, n_in]), ("B", [n_out, 1])):
        stop = at + 4 * shape[0] * shape[1]
        key = f"base_model.model.{name}.lora_{tail}.weight"
        yield key, {"dtype": "F32", "shape": shape, "data_offsets": [at, stop]}
        at = stop


def pairs(names):
    return packed(dict(e for i, n in enumerate(names) for e in pair(n, 80 * i)), 80 * len(names))


def singles(n, key):
    entries = ({"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(n))
    return packed({key % i: e for i, e in enumerate(entries)}, 4 * n)


def packed(header, size):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def tried(folder, config=None, data=None):
    shutil.copytree(g.folder(NAME), folder)
    settings = json.loads((folder / CONFIG).read_text()) | (config or {})
    (folder / CONFIG).write_text(json.dumps(settings))
    if data is not None:
        (folder / TENSORS).write_bytes(data)
    out = damage_outcome.outcome(NAME, folder)
    assert out.good, f"{out.kind}: {out.what}"


EVERY = {"target_modules": None, "modules_to_save": None}


def test_many_tensors(tmp_path):
    tried(tmp_path / "a", EVERY, singles(4_000, "base_model.model.m%d.lin.bias"))


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["lora_A.weight", "lin.bias", "weight"])
def test_a_hundred_thousand_tensors(tmp_path, tail):
    tried(tmp_path / "a", EVERY, singles(100_000, f"base_model.model.m%d.{tail}"))


@pytest.mark.slow
def test_many_pairs(tmp_path):
    tried(tmp_path / "a", EVERY, pairs([f"m{i}" for i in range(50_000)]))


@pytest.mark.parametrize("start, one, stop", [(b"[", b"[],", b"[]]"), (b'"', b"xxx", b'"')])
def test_a_large_header(tmp_path, start, one, stop):
    tried(tmp_path / "a", EVERY, packed(b'{"a": ' + start + one * (10 << 20) + stop + b"}", 0))


def test_many_targets(tmp_path):
    tried(tmp_path / "a", {"target_modules": [f"m{i}" for i in range(200_000)]})


def test_permission_denied(tmp_path):
    folder = shutil.copytree(g.folder(NAME), tmp_path / "a")
    (folder / TENSORS).chmod(0)
    if root := os.geteuid() == 0:  # who may read everything
        folder.chmod(0o700)
        os.seteuid(65534)
    try:
        with pytest.raises(lora.LoRAError, match=f"(?s){folder}.*Permission denied"):
            damage_outcome.loaded_by(NAME, folder)
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "("},  # names no folder
        {f"m{i}": 1 for i in range(20_000)},  # a message of megabytes
        {"peft_type": "x" * 100_000},
        {"target_parameters": [f"lin.{i}" for i in range(20_000)]},
        {"target_parameters": ["lin.a\x1b[2J", "lin.b"]},
    ],
    ids=["folder", "unknown settings", "kind", "parameters", "control characters"],
)
def test_messages_of_settings(tmp_path, config):
    tried(tmp_path / "a", config)


@pytest.mark.parametrize(
    "config",
    [
        EVERY | {"alpha_pattern": {"((x{500}){500}){500}": 1}},  # repeats what found nothing
        {"target_modules": "(?=.*(?=.*(?=.*(?=.*b))))"},
    ],
    ids=["repeats", "assertions"],
)
def test_expressions_that_take_long(tmp_path, config):
    tried(tmp_path / "a", config, pairs(["a" * 450]))


@pytest.mark.parametrize(
    "config, modules",
    [
        ({"alpha_pattern": {f"m{i}": 1 for i in range(200_000)}}, 1),
        ({"alpha_pattern": {f"m{i}": 1 for i in range(20_000)}}, 100),
        ({"alpha_pattern": {f"m{i}.x": 1 for i in range(20_000)}}, 100),
        ({"alpha_pattern": {"." + bin(i)[2:].replace("0", "."): 1 for i in range(20_000)}}, 100),
        ({"alpha_pattern": {f"m{i}*": 1 for i in range(20_000)}}, 1),
        ({"alpha_pattern": {"a" * 3_000_000: 1}}, 1),
        ({"target_modules": [f"m{i}" for i in range(100_000)]}, 200),
        ({"target_parameters": [f"x{i % 100}.m{i}" for i in range(20_000)]}, 100),
        ({"trainable_token_indices": {f"m{i}": [i] for i in range(20_000)}}, 1),
    ],
    ids=["too many", "names", "dots", "places of dots", "expressions", "a long name", "targets",
         "parameters", "tokens"],
)  # fmt: skip
def test_many_settings(tmp_path, config, modules):
    tried(tmp_path / "a", EVERY | config, pairs([f"x{i}" for i in range(modules)]))


@pytest.mark.parametrize("shape", [[60], [1, 10, 6], [1, 60], [2, 3, 10]])
def test_a_matrix_of_another_shape(shape):
    """A vector as a shard of ZeRO-3 has it: the numbers would fall on other places."""
    w = damage_work.Work.golden(NAME)
    next(t for t in w.tensors if t[0].endswith("head.weight"))[2] = shape
    w.laid_out()
    w.packed()
    out = damage_outcome.tried(w)
    assert out.kind == "refused", out.what
