"""The entry of the command line."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from types import FrameType


def main() -> None:
    """`lora-jax`: runs the command that the arguments name, and exits with its status."""
    sys.unraisablehook = _of_the_main_thread
    try:
        import typer  # noqa: F401
    except ModuleNotFoundError:
        print("the command line needs typer: pip install 'lora_jax[cli]'", file=sys.stderr)
        raise SystemExit(1) from None
    from lora_jax._cli.app import app

    # The work is the disk's: the accelerator is left alone, and its memory to others. JAX reads it
    # when a command imports it, which `--help` does not.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stopped)
    # Orbax logs what it raises, and what is raised is said below.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)

    app(prog_name="lora-jax")


def _of_the_main_thread(error: sys.UnraisableHookArgs) -> None:
    """Prints what could be raised nowhere. So do threads of orbax's libraries, over a full disk,
    when the main one has raised it already."""
    if threading.current_thread() is not threading.main_thread():
        return
    # `_stopped` was called while garbage was collected, as by JAX's callback: a moment later.
    if isinstance(error.exc_value, SystemExit):
        code = error.exc_value.code
        signal.signal(signal.SIGALRM, lambda *_: sys.exit(code))
        signal.setitimer(signal.ITIMER_REAL, 0.1)
    else:
        sys.__unraisablehook__(error)


def _stopped(number: int, frame: FrameType | None) -> None:
    """Leaves as after an error, so that what is half written is removed on the way."""
    # Once is enough: a second signal would interrupt the cleaning up.
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)
