"""An adapter folder from a stranger is read or refused: one clear error, no pickle, little memory.

Folders damaged at random are in test_peft_damage.py.
"""

import json
import os
import shutil
import struct
import tracemalloc

import golden_models as g
import jax.numpy as jnp
import numpy as np
import pytest
from common import fails

import lora_jax as lora
from lora_jax.peft._config import peft_config
from lora_jax.peft._file import CONFIG, TENSORS, open_adapter
from lora_jax.peft._patterns import Budget, SafePattern

NAME = "net_lora"
PARAMS = g.net_params(NAME)


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "adapter"
    shutil.copytree(g.folder(NAME), out)
    return out


def header_of(data):
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def packed(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def rewritten(folder, change):
    """The tensors' file with another header."""
    header, body = header_of((folder / TENSORS).read_bytes())
    (folder / TENSORS).write_bytes(packed(change(header) or header, body))


def read_adapter(folder):
    file = open_adapter(folder)
    return file.config, {name: file.read(name) for name in file.tensors}


def test_what_was_written_is_read(folder):
    config, arrays = read_adapter(folder)
    assert config["r"] == 3 and len(arrays) == 8
    want = g.tensors(folder / TENSORS)
    for name, value in arrays.items():
        np.testing.assert_array_equal(value, want[name])


def test_a_pickle_is_refused_with_the_way_out(folder):
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with fails("only adapter_model.bin: a pickle runs code.*save_pretrained"):
        open_adapter(folder)


def test_missing_files(tmp_path, folder):
    with fails("no adapter_config.json there"):
        open_adapter(tmp_path)
    with fails("there is no such folder"):
        open_adapter(tmp_path / "nowhere")
    (folder / TENSORS).unlink()
    with fails("no adapter_model.safetensors, the adapter is incomplete"):
        open_adapter(folder)


def test_links_are_followed_to_files_only(folder, tmp_path):
    (tmp_path / "blob").write_bytes((folder / TENSORS).read_bytes())
    (folder / TENSORS).unlink()
    (folder / TENSORS).symlink_to("../blob")  # as in the hub's cache
    assert len(read_adapter(folder)[1]) == 8
    (folder / TENSORS).unlink()
    (folder / TENSORS).symlink_to("/dev/zero")
    with fails("not a regular file"):
        open_adapter(folder)
    for file in (TENSORS, CONFIG):
        (folder / file).unlink()
        os.mkfifo(folder / file)
        with fails(f"{file}: not a regular file"):
            open_adapter(folder)
        (folder / file).unlink()
        (folder / file).symlink_to(file)
        with fails(f"{file}: cannot be read"):
            open_adapter(folder)


@pytest.mark.parametrize(
    "text, match",
    [
        (b"", "not the JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b"\xff\xfe", "not the JSON"),
        (b'{"r": 1, "r": 2}', "a key that appears twice: 'r'"),
        (b'{"r": NaN}', "NaN is not JSON"),
        (b'{"a":' * 35_000, "nested too deeply"),
        (b'{"a":' * 100_000, "100,000 keys, expected at most 40,000"),
        (b'{"r": ' + b"9" * 10_000 + b"}", "not the JSON"),
        (b" " * (5 << 20), "more than"),
    ],
)
def test_bad_json(folder, text, match):
    (folder / CONFIG).write_bytes(text)
    with fails(match):
        open_adapter(folder)


def entry(header, **change):
    name = next(n for n in header if n != "__metadata__")
    header[name] |= change


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda h: entry(h, dtype="F64"), "type 'F64', expected one of F32, F16, BF16"),
        (lambda h: entry(h, dtype=[[]]), "type list"),
        (lambda h: entry(h, shape=[10**10, 12]), "shape .10000000000, 12. of F32"),
        (lambda h: entry(h, shape=[-3, -12]), "expected a shape"),
        (lambda h: entry(h, shape=[3.0, 12]), "expected a shape"),
        (lambda h: entry(h, shape=[True, 36]), "expected a shape"),
        (lambda h: entry(h, shape=[1] * 40), "expected a shape"),
        (lambda h: entry(h, shape=[2**40] * 3), "expected a shape|shape"),
        (lambda h: entry(h, data_offsets=[0, 10**12]), "at bytes"),
        (lambda h: entry(h, data_offsets=[4, 148]), "begins at byte"),
        (lambda h: entry(h, extra=1), "expected dtype, shape and data_offsets"),
        (lambda h: h | {"x": 3}, "'x': expected dtype"),
        (lambda h: {f"../{k}": v for k, v in h.items()}, "expected a dotted name"),
        (lambda h: {f"/etc/{k}": v for k, v in h.items()}, "expected a dotted name"),
        (lambda h: {f"a..{k}": v for k, v in h.items()}, "expected a dotted name"),
        (lambda h: {"x" * 600 + k: v for k, v in h.items()}, "expected a dotted name"),
        (lambda h: {"__metadata__": {}}, "holds no tensor|end at byte"),
    ],
)
def test_headers_that_lie(folder, change, match):
    rewritten(folder, change)
    with fails(match):
        open_adapter(folder)


def test_a_tensor_that_is_there_twice(folder):
    header, body = header_of((folder / TENSORS).read_bytes())
    text = json.dumps(header)
    name = next(iter(header))
    twice = text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    (folder / TENSORS).write_bytes(packed(twice.encode(), body))
    with fails("appears twice"):
        open_adapter(folder)


def test_bytes_that_belong_to_no_tensor(folder):
    with open(folder / TENSORS, "ab") as file:
        file.write(b"more")
    with fails("the tensors end at byte"):
        open_adapter(folder)


def test_a_header_longer_than_the_file(folder):
    data = (folder / TENSORS).read_bytes()
    for n in (2**63, 10**9, len(data), 0):
        (folder / TENSORS).write_bytes(struct.pack("<Q", n) + data[8:])
        with fails("a header of|not the JSON"):
            open_adapter(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(folder, value):
    data = bytearray((folder / TENSORS).read_bytes())
    data[-4:] = np.float32(value).tobytes()
    (folder / TENSORS).write_bytes(data)
    with fails("holds NaN or infinity"):
        lora.peft.load(folder, PARAMS)


def test_a_rank_of_ten_gigabytes(folder):
    """A sparse file is as large as it says, and takes no disk; it is refused before it is read."""
    rank = 10**8
    shapes = {"lora_A": [rank, 8], "lora_B": [12, rank]}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * shape[1]
        key = f"base_model.model.lin.{name}.weight"
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    data = packed(header, b"")
    with open(folder / TENSORS, "wb") as file:
        file.write(data)
        file.truncate(len(data) + at)
    tracemalloc.start()
    with fails("more than an adapter of these parameters can need"):
        lora.peft.load(folder, PARAMS)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def loads_or_fails(folder):
    try:
        lora.peft.load(folder, PARAMS)
    except lora.LoRAError as e:
        assert len(str(e)) < 40_000


@pytest.mark.parametrize(
    "text", ["(a+)+$", "(a|a)*b", "((a*)*)*" * 5 + "b", "(a{9000}){9000}", "(" * 4000 + ")" * 4000]
)
def test_expressions_that_take_forever(folder, text):
    config = json.loads((folder / CONFIG).read_text())
    names = [k.replace("lin", "a" * 100) for k in g.tensors(folder / TENSORS)]
    assert names
    for change in ({"rank_pattern": {text: 2}}, {"target_modules": text}):
        (folder / CONFIG).write_text(json.dumps(config | change))
        loads_or_fails(folder)
    budget = Budget()
    try:
        SafePattern(text, budget=budget).fullmatch("a" * 300)
    except lora.LoRAError:
        pass
    assert budget.left > -1000  # the step that was one too many


def test_all_bad_settings_are_listed():
    with fails(r"(?s)use_rslora: expected bool.*r: expected an integer|r: expected.*use_rslora"):
        peft_config({"r": -1, "use_rslora": "yes", "alpha_pattern": []}, "config")


def test_half_of_a_write_is_not_seen(folder, monkeypatch):
    """A failure between the files leaves the old adapter whole."""
    found = lora.peft.load(folder, PARAMS)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr(json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lora.peft.save(folder, found.adapters, found.mapping)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_abstract_parameters_are_enough(folder):
    import jax

    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    found = lora.peft.load(folder, abstract)
    assert found.adapters["lin"]["kernel"].a.shape == (8, 3)
    assert found.adapters["lin"]["kernel"].a.dtype == jnp.float32


def test_the_time_of_a_pattern_is_bounded():
    """Each step costs as much as the positions that it starts from."""
    with fails("take too long"):
        pattern = SafePattern("(" + ".*" * 1500 + ")*b")
        pattern.budget.left = 200_000
        for _ in range(1000):
            pattern.fullmatch("a" * 300)
    assert -1000 < pattern.budget.left < 0
