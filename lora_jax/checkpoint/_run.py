"""One run at a time writes to a directory of checkpoints.

Two files say so, beside the steps. `.lora_lock` is locked (`fcntl`) by the process that saves, from
its first save until it ends or the manager is gone; the kernel frees it however a process ends, so
that a crashed run resumes with nothing to clean up. `.lora_run` names the run that saved last and
its step; it is replaced as a whole. It is what counts where there are no locks (buckets, some
network file systems), and between two managers of one process: a run that finds another one's name
there stops.

What that guarantees. On a local file system, and on NFS with its lock service: no two processes
save to one directory. Without locks: a run that another one has overtaken is told at its next save;
two that save the same step within the same moment may both return, and the one whose name was
replaced is told at its next save.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import socket
import uuid
import weakref
from collections.abc import Callable, MutableMapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from lora_jax._core.errors import LoRAError

# It is not there on Windows.
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

LOCK, RUN = ".lora_lock", ".lora_run"

INSTEAD = "nothing was saved. Use another directory, or end the other run"

# Bytes of an error that all processes raise: a broadcast has one shape in all of them.
MESSAGE = 2048


class _Claim:
    """What a manager of this process has of its directory: a name, and the lock's file."""

    def __init__(self) -> None:
        self.run = uuid.uuid4().hex
        self.saved = False
        self.lock: int | None = None

    def close(self) -> None:
        if self.lock is not None:
            os.close(self.lock)


# The managers of this process that saved; an entry goes with its manager.
_CLAIMS: MutableMapping[ocp.CheckpointManager, _Claim] = weakref.WeakKeyDictionary()


def claim(manager: ocp.CheckpointManager, step: int) -> None:
    """Takes the directory for this manager's run and `step`, or says which other run has it."""
    _by_the_first(_take, manager, step)
    # Between the manager's last look and the lock, others may have saved.
    manager.reload()
    latest = manager.latest_step()
    if latest is not None and step <= latest:
        raise LoRAError(f"another run has saved step {latest} to {manager.directory}; {INSTEAD}")
    _by_the_first(_note, manager, step)


def _by_the_first(do: Callable, manager: ocp.CheckpointManager, step: int) -> None:
    """The first process does it; what goes wrong there is raised by all."""
    problem, cause = "", None
    if jax.process_index() == 0:
        try:
            do(manager, step)
        except Exception as e:  # whatever it is: the others wait below
            expected = isinstance(e, LoRAError | OSError) and str(e)
            problem, cause = str(e) if expected else repr(e), e
    # A collective: every process comes here, with an error or without.
    if jax.process_count() > 1:
        text = np.zeros(MESSAGE, np.uint8)
        data = problem.encode()[:MESSAGE]
        text[: len(data)] = np.frombuffer(data, np.uint8)
        text = np.asarray(multihost_utils.broadcast_one_to_all(text))
        problem = bytes(text).rstrip(b"\0").decode(errors="replace")
    if problem:
        raise LoRAError(problem) from cause


def _take(manager: ocp.CheckpointManager, step: int) -> None:
    directory = epath.Path(manager.directory)
    mine = _CLAIMS.get(manager)
    if mine is None:
        mine = _Claim()
        # The method holds the claim, and not the manager, which would never end.
        weakref.finalize(manager, mine.close)
        _CLAIMS[manager] = mine
    free = _locked(mine, directory)
    last = _last(directory)
    who = f"run {last.get('run', '?')[:8]} (process {last.get('pid')} on {last.get('host')})"
    if not free:
        raise LoRAError(f"{who} saves to {directory}; {INSTEAD} (in a notebook: `del manager`)")
    if last and last["run"] != mine.run:
        if mine.saved:
            raise LoRAError(f"{who} has saved step {last['step']} to {directory} since; {INSTEAD}")
        # Another manager of this process, which the lock does not keep out, may still be writing.
        others = [m for m, claimed in _CLAIMS.items() if claimed.run == last["run"]]
        if any(m.is_saving_in_progress() for m in others) and step <= last["step"]:
            raise LoRAError(f"{who} is saving step {last['step']} to {directory}; {INSTEAD}")


def _note(manager: ocp.CheckpointManager, step: int) -> None:
    directory, mine = epath.Path(manager.directory), _CLAIMS[manager]
    entry = {"run": mine.run, "step": step, "pid": os.getpid(), "host": socket.gethostname()}
    # Whole or not at all, and under a name of our own until then.
    new = directory / f"{RUN}.{mine.run}"
    new.write_text(json.dumps(entry))
    new.replace(directory / RUN)
    mine.saved = True


def _locked(mine: _Claim, directory: epath.Path) -> bool:
    """Whether no other process has the lock; it is taken, where there are locks."""
    if fcntl is None or "://" in str(directory):
        return True
    if mine.lock is None:
        mine.lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        # Again at each save: a lock of `fcntl` is the process's, and ends where another manager of
        # this directory is closed.
        fcntl.lockf(mine.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        # These say that another process has the lock; others, that the file system has no locks.
        return e.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def _last(directory: epath.Path) -> dict[str, Any]:
    """Who saved last; empty where nobody did, or what is there is not ours to read."""
    try:
        entry = json.loads((directory / RUN).read_text())
        whole = isinstance(entry["run"], str) and isinstance(entry["step"], int)
        return entry if whole else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
