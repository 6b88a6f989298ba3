"""What is written appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import zlib
from collections.abc import Generator
from pathlib import Path

from safetensors import SafetensorError

from lora_jax._core.errors import LoRAError


@contextlib.contextmanager
def replacing(out: Path) -> Generator[Path, None, None]:
    """A path beside `out` for what becomes `out` if all goes well, and is removed otherwise."""
    with writing(out):
        # Also a link that leads nowhere.
        if os.path.lexists(out):
            raise LoRAError(f"{out} is there already, and is left as it is; give another path")
        if not out.parent.is_dir():
            raise LoRAError(f"{out}: there is no folder {out.parent}; make it first")
        new = partial(out)
    try:
        yield new
        if os.path.lexists(out):
            raise LoRAError(f"{out} was made meanwhile, and is left as it is; give another path")
        with writing(out):
            os.rename(new, out)
    # The message names the final path: the one beside it is gone when someone reads it.
    except LoRAError as e:
        raise LoRAError(str(e).replace(str(new), str(out))) from e
    finally:
        # Of a name that is too long, nothing is there, and the system does not even look.
        with contextlib.suppress(OSError):
            remove(new)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Generator[None, None, None]:
    """A full disk, a limit on files or a right that lacks is an error that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise LoRAError(f"{path}: cannot be written: {e}") from e


def partial(path: Path) -> Path:
    """Where this process writes what becomes `path` once it is complete.

    What processes of this host that are dead by now left for the same path is removed: after
    `kill -9` it would stay for ever, as large as a model. Of another host's nothing is known.
    """
    host = zlib.crc32(socket.gethostname().encode())
    start, end = f".{path.name}.{host:08x}-", ".partial"
    for name in os.listdir(path.parent):
        # What has not this form exactly is not ours to remove.
        pid = name.removeprefix(start).removesuffix(end)
        if name == f"{start}{pid}{end}" and pid.isdecimal() and not _alive(int(pid)):
            remove(path.parent / name)
    return path.parent / f"{start}{os.getpid()}{end}"


def _alive(pid: int) -> bool:
    try:
        # Signal 0 asks whether the process is there, and sends nothing.
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    # It is another user's.
    except OSError:
        return True
    return True


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
