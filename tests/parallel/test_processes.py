"""Runs that are killed: on one device to the bit, over processes to the dtype; no half checkpoint."""

import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import lora_jax as lora

LINE = re.compile(r"^(\d+) (\S+) ([0-9a-f]{64})$", re.MULTILINE)
SCRIPT = pathlib.Path(__file__).parent.parent / "support" / "run_training.py"


RUNNING = []


@pytest.fixture(autouse=True)
def no_run_outlives_its_test():
    yield
    while RUNNING:
        kill(RUNNING.pop())


def started(directory, *args, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(directory), *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    )  # fmt: skip
    RUNNING.append(process)
    return process


def kill(process):
    """Ends a run with all that it has started; what it printed."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return ("", "") if process.stdout.closed else process.communicate()


def printed(process, steps=8):
    """(stdout, stderr) of a run that ends by itself. The limit is for one that hangs: on a busy
    machine a start takes minutes, and a step up to a second."""
    return process.communicate(timeout=600 + steps)


def finished(process, steps=8):
    """{step: (loss, checksum)} of a run that ended by itself."""
    out, err = printed(process, steps)
    assert process.returncode == 0, err[-3000:]
    return {int(step): (float(loss), sums) for step, loss, sums in LINE.findall(out)}


def together(directory, *args, devices=4, code=0):
    """Two processes; the losses are printed by each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = [*args, "--processes", 2, "--port", port]
    both = [started(directory, *common, "--process", i, devices=devices) for i in range(2)]
    if code:
        codes = [(printed(process)[1], process.returncode) for process in both]
        assert code in [c for _, c in codes], codes  # the other may notice first that it is alone
        return {}
    a, b = map(finished, both)
    assert a == b
    return a


def values(directory):
    return lora.checkpoint.restore(directory, base=None)


def leaves(directory):
    return list(map(np.asarray, jax.tree.leaves(values(directory).adapters)))


def test_two_processes_and_another_mesh(tmp_path):
    """Both die after step 3; two others go on, on another mesh; one alone brings it to its end."""
    alone = finished(started(tmp_path / "alone", "--mesh", 1, 8, devices=8))
    together(tmp_path / "run", "--mesh", 2, 4, "--die-after", 3, code=-signal.SIGKILL)
    assert values(tmp_path / "run").step == 3
    more = together(tmp_path / "run", "--mesh", 4, 2, "--until", 6)
    assert sorted(more) == [4, 5, 6]
    rest = finished(started(tmp_path / "run", "--mesh", 8, 1, devices=8))
    assert sorted(rest) == [7, 8]
    for step, (loss, _) in rest.items():
        np.testing.assert_allclose(loss, alone[step][0], rtol=1e-5)
    for a, b in zip(leaves(tmp_path / "run"), leaves(tmp_path / "alone")):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-5)


def killed_at_random(directory, kills, steps, rng):
    """Kills a run again and again, at any moment from its start on, then lets it end.

    Returns what was printed of each step, by any of the runs, and from which steps they went on.
    """
    seen, resumed = {}, []
    while len(resumed) < kills:
        process = started(directory, "--steps", steps)
        line = process.stdout.readline()
        if line:
            resumed.append(int(line.split()[1]))
            if len(resumed) % 5:  # else at any moment of the start, and of what it compiles
                process.stdout.readline(), process.stdout.readline()  # the first step is saved
            time.sleep(rng.uniform(0, 0.5))
        out, err = kill(process)
        assert process.returncode in (0, -signal.SIGKILL), err[-3000:]
        for step, _, sums in LINE.findall(out):
            assert seen.setdefault(int(step), sums) == sums
        if process.returncode == 0:
            break
    last = finished(started(directory, "--steps", steps), steps)
    return seen | {step: sums for step, (_, sums) in last.items()}, resumed


def check_kills(tmp_path, kills, steps):
    want = finished(started(tmp_path / "whole", "--steps", steps), steps)
    seen, resumed = killed_at_random(tmp_path / "killed", kills, steps, random.Random(0))
    assert resumed == sorted(resumed) and resumed[-1] > 0
    assert all(want[step][1] == sums for step, sums in seen.items())  # every step, to the bit
    assert values(tmp_path / "whole").step == values(tmp_path / "killed").step == steps
    for x, y in zip(leaves(tmp_path / "whole"), leaves(tmp_path / "killed")):
        np.testing.assert_array_equal(x, y)
    print(f"{len(resumed)} kills; went on from steps {resumed}")
    return resumed


@pytest.mark.slow
def test_kill(tmp_path):
    check_kills(tmp_path, kills=2, steps=60)


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    """`python -m pytest -m slow -s -k fifty`: minutes."""
    assert len(check_kills(tmp_path, kills=50, steps=1200)) == 50
