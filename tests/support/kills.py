"""Commands that are killed at any moment: nothing half written is ever taken for whole.

`python tests/support/kills.py 50` counts what came of so many.
"""

from __future__ import annotations

import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from test_peft import pair, written

import lora_jax as lora
from lora_jax._cli.torch_adapter import open_torch
from lora_jax.peft._safetensors import open_base

SIDE, LAYERS = 1000, 4


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
runpy.run_module("lora_jax", run_name="__main__")
"""


def started(folder: Path, args: Sequence[str], most: int | None = None) -> subprocess.Popen:
    """`lora-jax` in a process of its own, which may write files of at most so many bytes."""
    env = os.environ | {
        "PYTHONPATH": os.path.dirname(os.path.dirname(lora.__file__)),
        "JAX_PLATFORMS": "cpu",
    }
    run = ["-m", "lora_jax"] if most is None else ["-c", LIMITED, str(most)]
    return subprocess.Popen(
        [sys.executable, *run, *args], cwd=folder, env=env,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def inputs(folder: Path) -> dict[str, list[str]]:
    """{command: its arguments}, with all that they name."""
    names = [f"l.{i}.q" for i in range(LAYERS)]
    tensors = {k: v for n in names for k, v in pair(n, SIDE, SIDE, r=64).items()}
    written(folder / "a", tensors, r=64)
    zeros = np.zeros((SIDE, SIDE), "f4")
    save_file({f"{n}.weight": zeros for n in names}, folder / "base")
    save_file({f"{n.replace('.', '/')}/kernel": zeros for n in names}, folder / "params")
    return {
        "merge": ["merge", "base", "a", "out"],
        "combine": ["combine", "out", "a", "a:2"],
        "convert": ["convert", "a", "out", "--params", "params"],
    }


def whole(folder: Path, command: str) -> None:
    """Raises unless `out` is what the command makes."""
    out = folder / "out"
    if command == "merge":
        assert all(np.isfinite(t.read()).all() for t in open_base(out).tensors.values())
    elif command == "combine":
        assert {x.rank for x in open_torch(out).low_rank().values()} == {128}
    else:
        assert lora.checkpoint.restore(out, base=None).step == 0


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def killed(folder: Path, args: Sequence[str], number: int, wait: float | None) -> str:
    """Ends a command so many seconds after its start, None once it writes; says what is there.

    Then it runs once more, and must leave `out` whole and nothing beside it.
    """
    before = {p.name for p in folder.iterdir()}
    process, end = started(folder, args), time.monotonic() + (300 if wait is None else wait)
    while process.poll() is None and time.monotonic() < end:
        if wait is None and list(folder.glob(".out.*")):
            break
        time.sleep(0.002)
    process.send_signal(number)
    process.communicate(timeout=900)
    new = {p.name for p in folder.iterdir()} - before
    if "out" in new:
        whole(folder, args[0])
        remove(folder / "out")
    partial = new - {"out"}
    assert number == signal.SIGKILL or not partial, partial
    again = started(folder, args)
    _, error = again.communicate(timeout=900)
    assert again.returncode == 0, error
    whole(folder, args[0])
    remove(folder / "out")
    left = {p.name for p in folder.iterdir()} - before
    assert not left, left
    return "whole" if "out" in new else "partial" if partial else "nothing"


def main(n: int) -> None:
    folder = Path(tempfile.mkdtemp())
    random.seed(0)
    found: collections.Counter = collections.Counter()
    try:  # interrupted, it says what was counted until then
        commands = sorted(inputs(folder).items())
        for i in range(n):
            number = signal.SIGTERM if i % 2 else signal.SIGKILL
            wait = None if i % 4 < 2 else random.uniform(0.5, 6)
            name, args = commands[i % len(commands)]
            found[name, number.name, killed(folder, args, number, wait)] += 1
    except KeyboardInterrupt:
        pass
    finally:
        shutil.rmtree(folder)
    for key, count in sorted(found.items()):
        print(*key, count)
    print(
        f"{found.total()} kills: each time `out` was whole or absent, and the next run left nothing else"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
