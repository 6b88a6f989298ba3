"""The command line on damaged input: what a run prints, exits with and leaves behind.

`python tests/support/damage_cli.py 1000` counts what came of so many runs.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage
import damage_work
import golden_models as g
import numpy as np
import orbax.checkpoint as ocp
from damage_outcome import TooLong, limited
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from test_peft import MODELS
from typer.testing import CliRunner

import lora_jax as lora
from lora_jax._cli.app import app
from lora_jax._cli.torch_adapter import open_torch
from lora_jax._core.paths import flatten
from lora_jax.peft._safetensors import INDEX, open_base

SECONDS = 20.0  # a machine with much to do; a pipe would never end


BAD_JSON = [b"", b"[" * 100_000, b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", b"[]", b"null", b"\xff",
            b'{"weight_map": []}', b'{"weight_map": {"a": 3}}', b'{"weight_map": {"a": "../b"}}',
            b'{"a": {"b": 1}}', b'{"a": [1, 2], "a": 3}', b'{"(": "x"}', b'{".*": "{9}"}',
            b'{".*": 3}', b'{"lin": []}', b'{"text_config": 3, "architectures": 5}']  # fmt: skip


WEIGHTS = [
    "",
    "",
    "",
    ":0.5",
    ":-2",
    ":0",
    ":nan",
    ":inf",
    ":-1e400",
    ":1e39",
    ":1000000",
    ":1e-30",
    ":x",
    ":",
]


OPTIONS: dict[str, list[list[str]]] = {
    "inspect": [[], ["--json"], ["--ignore", "r"], ["--rename", "(=x"], ["--rename", "^=a."]],
    "merge": [[], ["--keep-base"], ["--conv1d", "none"], ["--experts", "a,b"]],
    "combine": [["--dtype", "fp16"], ["--dtype", "bf16"], ["--uniform"], ["--rank", "1"],
                ["--rank", "-3"], ["--energy", "nan"], ["--seed", str(2**70)],
                ["--method", "ties", "--rank", "2"], ["--rename", r"lora_A=lora_B"]],
    "diff": [[], ["--json"], ["--tolerance", "nan"]],
    "convert": [[], ["--keep-base"], ["--to", "peft"], ["--conv1d", "none"]],
}  # fmt: skip


# What happens to one file, or to whatever else stands at its place.


def flipped(path: Path, draw: Callable) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw(st.integers(1, 4))):
        end = draw(st.sampled_from([8, 64, 400, len(data)]))
        data[draw(st.integers(0, min(end, len(data)) - 1))] ^= draw(st.integers(1, 255))
    path.write_bytes(data)


def cut(path: Path, draw: Callable) -> None:
    os.truncate(path, draw(st.integers(0, path.stat().st_size)))


def json_instead(path: Path, draw: Callable) -> None:
    path.write_bytes(draw(st.sampled_from(BAD_JSON)))


def file_instead(path: Path, draw: Callable) -> None:
    path.unlink()
    ways = [os.mkfifo, os.mkdir, lambda p: None, lambda p: os.symlink("/dev/zero", p),
            lambda p: os.symlink(Path(p).name, p), lambda p: Path(p).touch()]  # fmt: skip
    draw(st.sampled_from(ways))(path)


WAYS = [flipped, cut, json_instead, file_instead]


@contextlib.contextmanager
def inputs(name: str, draw: Callable):
    """A folder with an adapter, a base, parameters, a table and a checkpoint; some damaged."""
    root = Path(tempfile.mkdtemp())
    try:
        _, _, work = draw(damage.cases(name))
        whole = draw(st.booleans())
        if whole:
            shutil.copytree(g.folder(name), root / "adapter")
        else:
            (root / "adapter").mkdir()
            damage_work.write(work, root / "adapter")
        shutil.copytree(g.folder(name), root / "other")
        (root / "base").mkdir()
        shutil.copy(g.folder(name) / "base.safetensors", root / "base" / "model.safetensors")
        (root / "base" / "config.json").write_text('{"architectures": ["NetForCausalLM"]}')
        names = dict.fromkeys(g.base(name), "model.safetensors")
        (root / "base" / INDEX).write_text(json.dumps({"weight_map": names}))
        shutil.copy(checkpoint(name).parent / "params", root / "params")
        (root / "table.json").write_text(json.dumps({"nothing": "none"}))
        shutil.copytree(checkpoint(name), root / "run")
        files = [p for p in root.rglob("*") if p.is_file() and "other" not in p.parts]
        if whole:
            files = [p for p in files if "adapter" not in p.parts]
            part = draw(st.sampled_from(["base", "run", "params", "table.json"]))
            files = [p for p in files if p.relative_to(root).parts[0] == part]
            for _ in range(draw(st.integers(1, 2))):
                path = draw(st.sampled_from(sorted(files)))
                if path.is_file() and not path.is_symlink() and path.stat().st_size:
                    draw(st.sampled_from(WAYS))(path, draw)
        yield root
    finally:
        shutil.rmtree(root)


CHECKPOINTS: dict[str, Path] = {}


def checkpoint(name: str) -> Path:
    """What `lora-jax convert` makes of the golden adapter, once."""
    if name not in CHECKPOINTS:
        folder = Path(tempfile.mkdtemp()) / "run"
        params = {k: np.asarray(v) for k, v in flatten(MODELS[name][1](name)).items()}
        save_file(params, folder.parent / "params")
        done = CliRunner().invoke(
            app,
            ["convert", str(g.folder(name)), str(folder), "--params", f"{folder.parent}/params"],
        )
        assert done.exit_code == 0, done.output
        CHECKPOINTS[name] = folder
    return CHECKPOINTS[name]


def arguments(draw: Callable, root: Path) -> list[str]:
    """A command and what it is given."""
    command = draw(st.sampled_from(sorted(OPTIONS)))
    folders = ["adapter", "base", "run", "run/0", "params", "base/model.safetensors", "table.json"]
    some = lambda: str(root / draw(st.sampled_from(folders)))
    adapter, other, out = (str(root / n) for n in ("adapter", "other", "out"))
    weight = lambda: draw(st.sampled_from(WEIGHTS))
    given = {
        "inspect": [some()],
        "merge": [draw(st.sampled_from([f"{root}/base", some()])), adapter, out],
        "combine": [out, adapter + weight(), other + weight()],
        "diff": [adapter, draw(st.sampled_from([other, some()]))],
        "convert": [draw(st.sampled_from([adapter, f"{root}/run"])), out],
    }[command]
    if command in ("merge", "convert") and draw(st.booleans()):
        given += ["--mapping", str(root / "table.json")]
    if command == "convert":
        given += ["--params", draw(st.sampled_from([f"{root}/params", some()]))]
        given += draw(st.sampled_from([[], ["--torch", f"{root}/base"], ["--torch", some()]]))
    return [command, *given, *draw(st.sampled_from(OPTIONS[command]))]


def problem(args: list[str], root: Path) -> tuple[str, str]:
    """("exit N", "") of a run that is as it should be, or (what is wrong, details)."""
    before = {p.name for p in root.iterdir()}
    start = time.process_time()
    try:
        with limited(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = CliRunner().invoke(app, args)
    except TooLong:
        return "too slow", f"more than {SECONDS} s"
    if time.process_time() - start > SECONDS or isinstance(done.exception, TooLong):
        return "too slow", ""
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        return "crashed", repr(done.exception)[:300]
    kind = f"exit {done.exit_code}"
    if done.exit_code not in (0, 1, 2) or "Traceback" in done.output:
        return "unclear", done.output[:300]
    if not all(line.isprintable() for line in done.output.split("\n")):
        return "cannot be printed", ascii(done.output)[:300]
    new = {p.name for p in root.iterdir()} - before
    if done.exit_code != 0 and args[0] != "diff" and new:
        return "left behind", f"{new}"
    if done.exit_code == 0 and new - {"out"}:
        return "left behind", f"{new}"
    if new:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a setting that is handed on, as before
                read_again(args[0], root / "out")
        except Exception as e:
            return "cannot be read again", repr(e)[:300]
    return kind, ""


def read_again(command: str, out: Path) -> Any:
    if command == "combine":
        return [x.a for x in open_torch(out).low_rank().values()]
    if command == "merge":
        return [t.read() for t in open_base(out).tensors.values() if t.dtype in ("F32", "BF16")]
    if (out / "adapter_config.json").exists():
        return open_torch(out).low_rank()
    with ocp.CheckpointManager(out.absolute()) as manager:
        return lora.checkpoint.restore(manager, base=None)


def many(n: int, check: Callable[[list[str], str, str], None]) -> None:
    """Calls check(arguments, kind, details) for n runs, always the same ones."""
    names = [
        n for n in sorted(MODELS) if MODELS[n][2] is None and n not in ("conv_lora", "moe_plain")
    ]

    @settings(max_examples=n, derandomize=True, database=None, deadline=None,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def run(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(names[:3]))
        with inputs(name, data.draw) as root:
            args = arguments(data.draw, root)
            check(args, *problem(args, root))

    run()


def main(n: int) -> None:
    kinds: collections.Counter = collections.Counter()
    commands: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    bad: dict[tuple[str, str], list[str]] = {}

    def count(args: list[str], kind: str, details: str) -> None:
        kinds[kind] += 1
        commands[args[0]][kind] += 1
        if not kind.startswith("exit"):
            bad.setdefault((kind, details[:80]), [*args, details])

    with contextlib.suppress(KeyboardInterrupt):  # counts until then
        many(n, count)
    print(f"{sum(kinds.values()):,} runs: {dict(kinds)}")
    for command, of in sorted(commands.items()):
        print(f"  {command:8} {dict(of)}")
    for (kind, _), args in list(bad.items())[:40]:
        print(f"{kind}: {' '.join(args)[:600]}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
