"""One run at a time writes to a directory; a run that ended, however, is in nobody's way."""

import json
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from common import fails

import lora_jax as lora
from lora_jax.checkpoint import _run
from lora_jax.checkpoint._run import LOCK, RUN

PARAMS = {"q": jnp.ones((8, 8))}
ADAPTERS = lora.init(jax.random.key(0), PARAMS, lora.LoRAConfig(rank=2, targets="q"))
OTHERS = jax.tree.map(lambda x: x + 1, ADAPTERS)


def save(manager, step, adapters=ADAPTERS, **kwargs):
    return lora.checkpoint.save(manager, step, adapters, base=PARAMS, **kwargs)


def same(path, step, adapters):
    found = lora.checkpoint.restore(path, base=PARAMS, step=step).adapters
    return all(map(jnp.array_equal, jax.tree.leaves(found), jax.tree.leaves(adapters)))


def test_two_managers(tmp_path):
    """The one that comes second is told, also while the first one's files are being written."""
    with ocp.CheckpointManager(tmp_path) as one, ocp.CheckpointManager(tmp_path) as two:
        assert save(one, 1)
        with fails("is saving step 1 to .*nothing was saved|step 1 is not after the latest"):
            save(two, 1, OTHERS)
        one.wait_until_finished()
        with fails("step 1 is not after the latest"):
            save(two, 1, OTHERS)
        assert save(one, 2)  # a refused save takes nothing
        one.wait_until_finished()
        assert save(two, 3, OTHERS)  # goes on from the first one's
        two.wait_until_finished()
        with fails("has saved step 3 to .* since; nothing was saved"):
            save(one, 4)
    assert same(tmp_path, 2, ADAPTERS) and same(tmp_path, 3, OTHERS)


@pytest.mark.parametrize(
    "error, message",
    [
        (KeyError("run"), r"KeyError\('run'\)"),
        (OSError(), r"OSError\(\)"),
        (OSError("full"), "full"),
    ],
)
def test_whatever_goes_wrong_first_all_processes_are_told(monkeypatch, error, message):
    """The others wait in the broadcast: the first process comes there with any error."""
    told = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    tell = lambda x: told.append(x) or x
    monkeypatch.setattr(_run.multihost_utils, "broadcast_one_to_all", tell)

    def fail(manager, step):
        raise error

    with fails(f"^{message}$") as found:
        _run._by_the_first(fail, None, 1)
    assert len(told) == 1 and found.value.__cause__ is error


@pytest.mark.parametrize("name", ["save", "wait_until_finished"])
def test_a_disk_that_is_full(tmp_path, monkeypatch, name):
    """Also of a save in the background, which the next one waits for."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with ocp.CheckpointManager(tmp_path) as manager:
        with monkeypatch.context() as patch:
            patch.setattr(manager, name, full)
            with fails("step 1 could not be written, OSError: .*No space left.*save again"):
                save(manager, 1)
        assert save(manager, 1)
    assert same(tmp_path, 1, ADAPTERS)


def test_one_after_the_other(tmp_path):
    """In one process: managers that are closed, whether or not they are gone."""
    managers = []
    for step in range(1, 4):
        with ocp.CheckpointManager(tmp_path) as manager:
            assert save(manager, step)
        managers.append(manager)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.delete(3)
        assert save(manager, 3, OTHERS)  # going back
    assert same(tmp_path, 3, OTHERS)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """What was noted last counts; a note that is not one is nobody's."""
    monkeypatch.setattr("lora_jax.checkpoint._run.fcntl", None)
    with ocp.CheckpointManager(tmp_path) as manager:
        assert save(manager, 1)
        manager.wait_until_finished()
        entry = json.loads((tmp_path / RUN).read_text())
        (tmp_path / RUN).write_text(json.dumps(entry | {"run": "f" * 32, "step": 7}))
        with fails(r"run ffffffff \(process \d+ on .*\) has saved step 7 to"):
            save(manager, 2)
    for text in ("", "[]", "{}", '{"run": 1, "step": 2}', "[" * 9999):
        (tmp_path / RUN).write_text(text)
        with ocp.CheckpointManager(tmp_path) as manager:
            assert save(manager, (manager.latest_step() or 0) + 1)
    assert not (tmp_path / LOCK).exists()


PROCESS = """
import sys, time, jax, jax.numpy as jnp, lora_jax as lora, orbax.checkpoint as ocp
params = {"q": jnp.ones((8, 8))}
adapters = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets="q"))
manager = ocp.CheckpointManager(sys.argv[1])
print(lora.checkpoint.save(manager, int(sys.argv[2]), adapters, base=params), flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no locks of fcntl")
def test_another_process(tmp_path):
    """While it is there nobody else saves; once it is killed, even as it saves, all can go on."""
    call = [sys.executable, "-c", PROCESS, str(tmp_path), "1"]
    other = subprocess.Popen(call, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "True\n"
        for step in (1, 2):
            with ocp.CheckpointManager(tmp_path) as manager:
                with fails(
                    rf"\(process {other.pid} on .*\) saves to .*nothing was saved|not after"
                ):
                    save(manager, step, OTHERS)
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdout.close()
    with ocp.CheckpointManager(tmp_path) as manager:
        step = (manager.latest_step() or 0) + 1
        assert save(manager, step, OTHERS)
    assert same(tmp_path, step, OTHERS)
