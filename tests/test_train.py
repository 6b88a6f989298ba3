"""examples/train.py learns the same whatever the devices, parts, processes and interruptions."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import lora_jax as lora

SCRIPT = Path(__file__).parent.parent / "examples" / "train.py"
SMALL = ["--model", "tiny", "--batch", "16", "--length", "16", "--learning-rate", "5e-3"]
LINE = r"step +(\d+) (train|eval) +loss (\S+) .*accuracy (\S+)"


@contextlib.contextmanager
def started(directory, *flags, devices=1):
    """The script, running; killed if the test fails before it ends."""
    # Most of the time is compilation: less of it.
    xla = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla}
    command = [sys.executable, SCRIPT, *SMALL, "--directory", directory, *flags]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        cwd=directory.parent,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def ended(process, status=0):
    """{(step, kind): (loss, accuracy)} of what it printed."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, out + err
    return {(int(s), kind): (float(a), float(b)) for s, kind, a, b in re.findall(LINE, out)}


def run(*args, **kwargs):
    with started(*args, **kwargs) as process:
        return ended(process)


def adapters(directory):
    found = lora.checkpoint.restore(directory / "checkpoints", base=None)
    return found.step, found.data, found.adapters


@pytest.mark.slow
def test_stopped_and_started_again_it_is_the_run_that_was_not(tmp_path):
    flags = ["--steps", "200", "--save-every", "64", "--log-every", "50", "--eval-every", "100"]
    whole = run(tmp_path / "whole", *flags)
    assert whole[0, "eval"][0] > 3.5 and whole[200, "eval"][0] < 2  # log(32) is 3.47
    assert whole[200, "eval"][1] > 0.5
    before = 0
    for number, status in [(signal.SIGTERM, 143), (signal.SIGINT, 130)]:
        with started(tmp_path / "parts", *flags) as process:
            next(line for line in process.stdout if "train" in line)
            process.send_signal(number)
            ended(process, status)
        step, data, _ = adapters(tmp_path / "parts")
        assert before < step < 200 and data == {"examples": 16 * step}
        before = step
    rest = run(tmp_path / "parts", *flags)
    assert min(rest) == (before + 1, "train")
    assert rest[200, "eval"] == whole[200, "eval"]
    want, got = adapters(tmp_path / "whole"), adapters(tmp_path / "parts")
    assert want[:2] == got[:2] == (200, {"examples": 3200})
    jax.tree.map(np.testing.assert_array_equal, got[2], want[2])
    assert all(np.any(x) for x in jax.tree.leaves(want[2]))
    assert {p.name for p in (tmp_path / "parts").iterdir()} == {"checkpoints", "events"}
    kept = [int(p.name) for p in (tmp_path / "parts" / "checkpoints").glob("[0-9]*")]
    assert len(kept) == 3 and max(kept) == 200


@pytest.mark.slow
def test_devices_and_parts_change_nothing(tmp_path):
    flags = ["--steps", "12", "--log-every", "1", "--dropout", "0"]
    want = run(tmp_path / "one", *flags)
    assert len(want) == 14 and want[12, "train"][0] < want[1, "train"][0]
    parts = run(tmp_path / "parts", *flags, "--accumulate", "2")
    mesh = run(tmp_path / "mesh", *flags, "--mesh", "data=2,fsdp=2,tp=2", devices=8)
    for got in (parts, mesh):
        assert got.keys() == want.keys()
        np.testing.assert_allclose([*got.values()], [*want.values()], rtol=1e-4)


@pytest.mark.slow
def test_processes_stop_together_and_another_number_of_them_goes_on(tmp_path):
    """Only one of the two is told."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{s.getsockname()[1]}"
    flags = ["--dropout", "0", "--log-every", "1", "--steps"]
    cluster = [
        *flags,
        "500",
        "--mesh",
        "fsdp=2,tp=2",
        "--distributed",
        "--coordinator",
        at,
        "--processes",
        "2",
        "--process",
    ]
    with (
        started(tmp_path / "run", *cluster, "0", devices=2) as first,
        started(tmp_path / "run", *cluster, "1", devices=2) as second,
    ):
        next(line for line in first.stdout if "train" in line)
        second.send_signal(signal.SIGTERM)
        ended(first, 143)
        assert ended(second, 143) == {}  # the first alone speaks
    step, data, _ = adapters(tmp_path / "run")
    assert data == {"examples": 16 * step}
    got = run(tmp_path / "run", *flags, str(step + 3))
    assert next(iter(got)) == (step + 1, "train") and step + 3 == max(got)[0]


def test_a_mesh_or_batch_that_does_not_fit(tmp_path):
    for flags, words in [
        (["--mesh", "data=3"], "number of devices, 1"),
        (["--accumulate", "3"], "multiple of 3"),
    ]:
        with started(tmp_path / "run", *flags) as process:
            _, err = process.communicate(timeout=240)
        assert process.returncode == 1 and words in err
    assert not (tmp_path / "run").exists()
