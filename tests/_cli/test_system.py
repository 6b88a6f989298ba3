"""The command line and the system: pipes, full disks, signals, memory; and what it says."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc

import damage_cli
import golden_models as g
import jax
import kills
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_cli import COMMANDS, params_file, rows, run
from test_merge_files import hf_folder
from test_peft import changed, delta, pair, stored, written

import lora_jax as lora
from lora_jax._cli.flags import in_flags
from lora_jax._cli.torch_adapter import narrow, norm, open_torch
from lora_jax._core.paths import nest
from lora_jax.peft._files import partial


def assert_good(args, kind, details):
    assert kind.startswith("exit"), f"{kind}: {' '.join(args)}: {details}"


def test_runs_on_damaged_input():
    damage_cli.many(40, assert_good)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's loop
def test_a_thousand_runs_on_damaged_input():
    damage_cli.many(1000, assert_good)


# Signals and disks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed(tmp_path, number):
    args = kills.inputs(tmp_path)["merge"]
    assert kills.killed(tmp_path, args, number, None) in ("partial", "nothing", "whole")


COLLECTED = """
import gc, os, signal, sys, time
from lora_jax._cli import main
sys.unraisablehook = main._of_the_main_thread
signal.signal(signal.SIGTERM, main._stopped)
def once(*_):
    gc.callbacks.remove(once)
    os.kill(os.getpid(), signal.SIGTERM)
gc.callbacks.append(once)
gc.collect()
while True:
    time.sleep(0.01)
"""


def test_a_signal_while_garbage_is_collected():
    """Python drops what is raised there; the process ends all the same."""
    done = subprocess.run([sys.executable, "-c", COLLECTED], timeout=120, capture_output=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, b"")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_fifty_kills(tmp_path, seed):
    commands = sorted(kills.inputs(tmp_path).items())
    number = [signal.SIGTERM, signal.SIGKILL][seed % 2]
    wait = [None, np.random.default_rng(seed).uniform(0.5, 6)][seed % 4 // 2]
    kills.killed(tmp_path, commands[seed % 3][1], number, wait)


@pytest.mark.parametrize("command", ["merge", "combine", "convert"])
def test_a_disk_that_is_full(tmp_path, command):
    """A limit on the size of files, which the system says in the same way."""
    args = kills.inputs(tmp_path)[command]
    before = {p.name for p in tmp_path.iterdir()}
    process = kills.started(tmp_path, args, most=5000)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1, error
    assert error.startswith("error: ") and "File too large" in error
    assert "Traceback" not in error and f".{os.sep}out" not in error
    assert {p.name for p in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_a_disk_that_fills_up_meanwhile(tmp_path, monkeypatch):
    """After room was found: also then no thread of orbax's has the last word."""
    patch = "import lora_jax._cli.convert as c; c._room = lambda *_: None\n"
    monkeypatch.setattr(kills, "LIMITED", patch + kills.LIMITED)
    process = kills.started(tmp_path, kills.inputs(tmp_path)["convert"], most=100_000)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1 and error.startswith("error: out"), error
    assert "File too large" in error and "Traceback" not in error


def test_what_a_dead_process_left_is_removed(tmp_path):
    """Files of the same output and host, and of no process that lives."""
    base = hf_folder(tmp_path / "base", g.base("mha"))
    dead, other = 2**22 + 5, tmp_path / ".other.4194309.partial"  # above what a system numbers
    here = partial(tmp_path / "out").name.rpartition("-")[0]
    left = [tmp_path / f"{here}-{dead}.partial", tmp_path / f"{here}-{dead + 1}.partial"]
    left[0].mkdir()
    (left[0] / "model.safetensors").write_text("half")
    left[1].write_text("half")
    mine = [other, tmp_path / f"{here}-{os.getppid()}.partial", tmp_path / f"{here}-x.partial"]
    mine.append(tmp_path / f".out.00000000-{dead}.partial")  # another host's
    for path in mine:
        path.write_text("mine")
    run("merge", base, g.folder("mha"), tmp_path / "out", "--conv1d", "none")
    assert not any(p.exists() for p in left) and all(p.exists() for p in mine)


# Pipes and devices, missing folders, odd numbers, odd JSON


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    odd = "/dev/zero" if kind == "device" else tmp_path / "pipe"
    kind == "pipe" and os.mkfifo(odd)
    a, out, base = g.folder("mha"), tmp_path / "out", g.folder("mha") / "base.safetensors"
    for args in (
        ("inspect", odd),
        ("merge", odd, a, out),
        ("merge", base, a, out, "--mapping", odd),
        ("convert", a, out, "--params", odd),
        ("convert", a, out, "--params", base, "--mapping", odd),
        ("convert", a, out, "--params", base, "--torch", odd),
    ):
        assert "not a regular file" in run(*args, code=1)
    assert "it is no folder" in run("combine", out, odd, code=1)
    assert "it is no folder" in run("diff", a, odd, code=2)
    folder = hf_folder(tmp_path / "hf", g.base("mha"))
    (folder / "extra").symlink_to(odd)  # would be copied for ever
    assert "not a regular file" in run("merge", folder, a, out, "--conv1d", "none", code=1)
    assert not out.exists()


def test_a_pipe_in_a_checkpoint(tmp_path):
    shutil.copytree(damage_cli.checkpoint("net_lora"), tmp_path / "run")
    os.mkfifo(tmp_path / "run" / "0" / "pipe")
    assert "not a regular file" in run("inspect", tmp_path / "run", code=1)


DEEP = [b"[" * 100_000, b'{"a":' * 100_000, b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"]


@pytest.mark.parametrize("text", DEEP)
def test_deep_json(tmp_path, text):
    a, out = g.folder("mha"), tmp_path / "out"
    (tmp_path / "deep").write_bytes(text)
    base = g.folder("mha") / "base.safetensors"
    for name in ("config.json", "model.safetensors.index.json"):
        folder = hf_folder(tmp_path / name, g.base("mha"))
        (folder / name).write_bytes(text)
        assert "nested too deeply" in run("merge", folder, a, out, code=1)
    args = ("--mapping", tmp_path / "deep")
    assert "nested too deeply" in run("merge", base, a, out, *args, code=1)
    assert "nested too deeply" in run("convert", a, out, "--params", base, *args, code=1)


@pytest.mark.parametrize("found", [[], 3, None, {}, {"a": 3}, {"a": "../b"}, {"a": ["b"]}])
def test_an_index_that_is_none(tmp_path, found):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": found}))
    match = "expected weight_map" if not isinstance(found, dict) or not found else "expected names"
    assert match in run("merge", tmp_path, g.folder("mha"), tmp_path / "out", code=1)


def test_missing_folders(tmp_path):
    no = tmp_path / "no"
    assert "there is no such folder" in run("combine", tmp_path / "out", no, code=1)
    assert "there is no such folder" in run("diff", g.folder("mha"), no, code=2)
    assert "there is nothing" in run("inspect", no, code=1)
    assert "No such file" in run("merge", no, g.folder("mha"), tmp_path / "out", code=1)
    run("combine", tmp_path / "out", g.folder("mha"), "--seed", 2**70, code=2)


WEIGHTS = ["0", "-0.0", "1e-45", "1e-30", "1000000", "1e12", "1e30", "1e39", "1e308", "1e400",
           "nan", "inf", "-inf"]  # fmt: skip


@pytest.mark.parametrize("weight", WEIGHTS)
def test_what_combine_writes_can_be_read(tmp_path, weight):
    """Every weight × type × form: an error and nothing, or a folder that is read again."""
    one, two = (written(tmp_path / n, pair("q", 6, 4, seed=i)) for i, n in enumerate("ab"))
    for i, options in enumerate(
        [["--dtype", d, *u] for d in ("fp32", "bf16", "fp16") for u in ([], ["--uniform"])]
    ):
        out = tmp_path / f"out{i}"
        good = np.isfinite(float(weight)) and abs(float(weight)) < 1e4
        code = 0 if good else 1 if not np.isfinite(float(weight)) or "fp16" in options else None
        result = damage_cli.CliRunner().invoke(
            damage_cli.app, ["combine", str(out), f"{one}:{weight}", str(two), *options]
        )
        assert code is None or result.exit_code == code, result.output
        assert out.exists() == (result.exit_code == 0)
        if out.exists():
            node = open_torch(out).low_rank()["q.weight"]
            got = (node.scale * np.asarray(node.a) @ np.asarray(node.b)).T
            want = float(weight) * delta(pair("q", 6, 4), "q") + delta(pair("q", 6, 4, seed=1), "q")
            np.testing.assert_allclose(got, want, rtol=0.05, atol=0.05 * np.abs(want).max())


# Memory


@pytest.mark.parametrize("sides, rank", [((16, 16), 8000), ((1, 1), 10**6), ((3, 5000), 4000)])
def test_a_rank_as_large_as_the_file(tmp_path, sides, rank):
    folder = written(tmp_path / "a", pair("q", *sides, r=rank))
    other = written(tmp_path / "b", pair("q", *sides, r=rank, seed=1))
    size = (folder / "adapter_model.safetensors").stat().st_size
    run("inspect", folder)  # what is imported and compiled stays
    tracemalloc.start()
    leaves, _ = rows(folder)
    peak = tracemalloc.get_traced_memory()[1]
    run("diff", folder, other, code=1)
    more = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(peak, more) < 16 * size + (16 << 20), f"{peak:,}, {more:,} of {size:,}"
    node = open_torch(folder).low_rank()["q.weight"]
    want = np.linalg.norm(node.scale * (np.asarray(node.a, "f8") @ np.asarray(node.b, "f8")))
    assert leaves["q.weight"]["norm"] == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 5, 6, 7, 40])
@pytest.mark.parametrize("sides", [(6, 4), (4, 6)])
def test_narrow_is_the_same_update(tmp_path, rank, sides):
    node = open_torch(written(tmp_path / "a", pair("q", *sides, r=rank))).low_rank()["q.weight"]
    small = narrow(node)
    assert small.rank == min(rank, 4) and small.shape == node.shape
    np.testing.assert_allclose(small.a @ small.b, node.a @ node.b, rtol=1e-5, atol=1e-5)
    assert norm(small) == pytest.approx(norm(node), rel=1e-5)


# What it says, and reads


def test_raw_starts_are_looked_at(tmp_path):
    """PiSSA's and LoftQ's factors are of a changed base: shown as they are, and never merged."""
    for name in ("pissa", "loftq"):
        folder = changed(tmp_path / name, "mha", {"init_lora_weights": name})
        assert f"init_lora_weights={name}" in run("inspect", folder)
        assert "init_lora_weights" in run("diff", folder, g.folder("mha"), code=1)
        base = g.folder("mha") / "base.safetensors"
        text = run("merge", base, folder, tmp_path / "out", code=1)
        assert "trained against a changed base" in text and "--ignore init_lora_weights" in text


def test_a_mapping_for_merge(tmp_path):
    tensors = pair("decoder.q", 6, 4) | pair("decoder.v", 6, 6, seed=1)
    folder = written(tmp_path / "a", tensors)
    base = {"x.query.weight": np.zeros((4, 6), "f4"), "x.value.weight": np.zeros((6, 6), "f4")}
    save_file(base, tmp_path / "base")
    (tmp_path / "m.json").write_text(
        json.dumps({r"decoder\.q": "x.query", "decoder.v.weight": "x.value.weight"})
    )
    args = ("merge", tmp_path / "base", folder, tmp_path / "out")
    assert "is not in the base" in run(*args, code=1)
    run(*args, "--mapping", tmp_path / "m.json")
    for q, name in (("q", "query"), ("v", "value")):
        want = delta(tensors, f"decoder.{q}")
        np.testing.assert_allclose(g.tensors(tmp_path / "out")[f"x.{name}.weight"], want, atol=1e-5)
    (tmp_path / "m.json").write_text(json.dumps({r"decoder\.(.*)": ["x.query", "x.value"]}))
    args = (*args[:3], tmp_path / "no", "--mapping", tmp_path / "m.json")
    assert "expected one tensor of the base" in run(*args, code=1)


@pytest.mark.parametrize("part", ["vision_tower", "decoder", "draft"])
def test_another_part_of_the_model_is_not_merged(tmp_path, part):
    """As in `lora.peft.load`; the flag that the message names does what it says."""
    tensors = pair(f"{part}.model.layers.0.q", 6, 4)
    folder = written(tmp_path / "a", tensors)
    save_file({"model.layers.0.q.weight": np.zeros((4, 6), "f4")}, tmp_path / "base")
    args = ("merge", tmp_path / "base", folder, tmp_path / "out")
    text = run(*args, code=1)
    table = text.partition("--mapping FILE, with ")[2].splitlines()[0]
    (tmp_path / "m.json").write_text(table)
    run(*args, "--mapping", tmp_path / "m.json")


def test_names_that_are_not_pefts(tmp_path):
    old = stored(g.folder("mha"))
    new = dict.fromkeys(old) | {"_orig_mod." + k: v for k, v in old.items()}
    folder = changed(tmp_path, "mha", {}, new)
    text = run("inspect", folder, code=1)
    flag = text.partition("--rename ")[2].split("'")[1]
    assert "lora.peft" not in text and "2 in all" in run("inspect", folder, "--rename", flag)
    run("inspect", folder, "--rename", "x", code=2)


def test_added_tokens_in_merge(tmp_path):
    emb = {"emb.lora_embedding_A": np.ones((2, 68), "f4"),
           "emb.lora_embedding_B": np.ones((4, 2), "f4")}  # fmt: skip
    rows = {"emb.token_adapter.trainable_tokens_delta": np.ones((1, 4), "f4")}
    save_file(
        {"emb.weight": np.zeros((64, 4), "f4"), "lm_head.weight": np.ones((64, 4), "f4")},
        tmp_path / "base",
    )
    for i, (tensors, rest) in enumerate(
        [(emb, {}), (pair("lm_head", 4, 68), {}), (rows, {"trainable_token_indices": [67]}),
         ({"emb.weight": np.ones((68, 4), "f4")}, {"modules_to_save": ["emb"]})]
    ):  # fmt: skip
        folder = written(tmp_path / f"{i}", tensors, **rest)
        text = run("merge", tmp_path / "base", folder, tmp_path / "out", code=1)
        assert "resize the base to 68" in text


def test_a_square_weight_of_torch_is_not_converted_unasked(tmp_path):
    folder = written(tmp_path / "a", pair("q", 5, 5))
    save_file({"q.weight": np.zeros((5, 5), "f4")}, tmp_path / "params")
    text = run("convert", folder, tmp_path / "out", "--params", tmp_path / "params", code=1)
    assert "its axes are not known" in text and "--params module:function" in text
    save_file({"q/kernel": np.zeros((5, 5), "f4")}, tmp_path / "params")
    run("convert", folder, tmp_path / "out", "--params", tmp_path / "params")


def test_settings_of_a_newer_peft_are_kept(tmp_path):
    folder = changed(tmp_path, "net_lora", {"newer": "auto"})
    args = ("--params", params_file(tmp_path / "params", "net_lora"))
    run("convert", folder, tmp_path / "run", *args)
    run("convert", tmp_path / "run", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["newer"] == "auto"


FORMATS = sorted(p for p in (g.GOLDEN.parent / "formats").iterdir() if p.is_dir())


SIGNS = "\x1b[2J\n\ud800\u202e\x00"


@pytest.mark.parametrize("setting", ["task_type", f"new{SIGNS}", "base_model_name_or_path"])
def test_signs_that_no_terminal_is_to_see(tmp_path, setting):
    """Of a stranger's settings, and of paths that are no text: printed, and escaped."""
    said = SIGNS if not setting.startswith("new") else "none"
    written(tmp_path / "a", pair("q", 6, 4), **{setting: said})
    odd = tmp_path / os.fsdecode(b"b\xff\n")
    for args in (
        ("inspect", tmp_path / "a"),
        ("combine", odd, tmp_path / "a"),
        ("diff", tmp_path / "a", odd),
        ("inspect", odd / "none"),
    ):
        done = damage_cli.CliRunner().invoke(damage_cli.app, [*map(str, args)])
        assert done.exit_code in (0, 1) and isinstance(done.exception, SystemExit | None), args
        lines = (done.stdout + done.stderr).split("\n")
        assert all(line.isprintable() for line in lines), lines
    said = run("inspect", tmp_path / "a")
    assert r"\x1b[2J\n\ud800\u202e\x00" in said.splitlines()[-1]


def test_messages_name_flags_that_there_are(tmp_path):
    """Of adapters of all kinds: what is asked for is a flag of some command, not a call of Python."""
    flags = {o for c in COMMANDS.values() for p in c.params for o in p.opts}
    said = set()
    for folder in FORMATS:
        base = folder / "base.safetensors"
        for args in (("inspect",), ("merge", base), ("convert",)):
            after = {"inspect": (), "merge": (tmp_path / args[0] / folder.name,)}
            more = after.get(args[0], (tmp_path / folder.name, "--params", base))
            done = damage_cli.CliRunner().invoke(
                damage_cli.app, [*map(str, (*args, folder, *more))]
            )
            text = done.stderr if done.exit_code else ""
            assert done.exit_code in (0, 1) and "lora.peft.load" not in text, text
            assert not re.search(r"\b(rank|energy|ignore|mapping)=", text), text
            said |= {*re.findall(r"--\w[\w-]*", text)}
    assert {"--rank", "--energy", "--ignore", "--params", "--mapping"} <= said <= flags


def test_a_type_that_is_no_lora_is_converted_to_a_rank(tmp_path):
    folder = FORMATS[0].parent / "miss"
    base = {k: np.asarray(v) for k, v in g.tensors(folder / "base.safetensors").items()}
    params = {"c1d/kernel": base["c1d.weight"], "emb/embedding": base["emb.weight"]}
    params |= {f"{n}/kernel": np.ascontiguousarray(base[f"{n}.weight"].T) for n in ("head", "lin")}
    save_file(params, tmp_path / "params")
    args = ("convert", folder, tmp_path / "run", "--params", tmp_path / "params")
    assert "--rank 16, or --energy 0.99" in run(*args, code=1)
    assert "--rank 0" in run(*args, "--rank", 0, code=1)
    run(*args, "--rank", 2)
    tree = nest(params)
    want = lora.merge(tree, lora.peft.load(folder, tree, rank=2).adapters)
    got = lora.merge(tree, lora.checkpoint.restore(tmp_path / "run", base=tree).adapters)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    run("convert", tmp_path / "run", tmp_path / "back")
    assert {r["rank"] for r in rows(tmp_path / "back")[0].values()} == {2}
    args = ("convert", g.folder("net_lora"), tmp_path / "x", "--params", tmp_path / "params")
    assert "lora-jax combine OUT SRC --rank 16" in run(*args, "--rank", 2, code=1)


def test_numbers_of_combine(tmp_path):
    args = ("combine", tmp_path / "out", g.folder("llama_default"))
    text = run(*args, "--energy", 2, code=1)
    assert "found --energy 2.0: --rank 8 or --energy 0.95" in text
    assert "found --rank 0: --rank 8" in run(*args, "--rank", 0, code=1)
    run(*args, "--rank", 10**30, code=2)
    run(*args, "--method", "dare", "--rank", 2, "--density", 0, code=2)
    run(*args, "--method", "other", code=2)


def test_messages_name_flags():
    for text, want in {
        "lora.peft.load(..., ignore=['a b', 'c'])": "--ignore 'a b' --ignore c",
        "lora.peft.load(..., keep_base=True)": "--keep-base",
        "lora.peft.load(..., experts=['a', 'b'], experts_a='in'), or": "--experts a,b --experts-a in, or",
        "lora.peft.load(..., survey=lora.survey(fn, params, x))": "--params module:function, "
        "which returns (params, survey)",
        "lora.peft.load(..., mapping={'(a)': 'b'})": '--mapping FILE, with {"(a)": "b"}',
        "lora.peft.load(..., base=params)": "in Python, lora.peft.load(..., base=params)",
        "restore one by lora.checkpoint.restore(..., step=...)": "name another step, as FOLDER/STEP",
        "LoRAConfig(rank=8)": "LoRAConfig(rank=8)",
        "lora.peft.load(..., broken": "lora.peft.load(..., broken",
        "conv1d=[] or conv1d=['q']": "--conv1d none or --conv1d q",
    }.items():
        assert in_flags(text) == want
