"""The two files of a PEFT adapter, read as what they are: data from a stranger.

Nothing is believed: sizes, types, names and offsets are checked before an array is allocated, and
what is read is never larger than the file. A pickle is never opened.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shutil
import socket
import stat
import zlib
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from lora_jax._core.errors import LoRAError, raise_all

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": jnp.dtype("bfloat16")}


MAX_CONFIG = 4 << 20  # bytes


MAX_KEYS = 40_000  # in it: a pattern for each of so many modules


MAX_HEADER = 32 << 20


MAX_AXES = 8


MAX_LISTS = (
    10_000  # in JSON, and one more for each 12 bytes: an empty list takes 3, and in memory 64
)


MAX_DEPTH = 64  # of JSON: Python's own readers and writers fail at about a thousand


NAME = re.compile(r"[\w\-+:@]+(\.[\w\-+:@]+)*", re.ASCII)


TO_SAFETENSORS = (
    "a pickle runs code when it is opened, so it is refused. Where you trust it, convert it once, "
    "in PyTorch: `PeftModel.from_pretrained(base, folder).save_pretrained(folder)`"
)


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one tensor lies in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """An adapter folder whose headers were checked, and of which no tensor was read yet.

    Attributes:
      folder: as given.
      config: adapter_config.json as a dict; its values are not checked yet.
      tensors: {name: `Stored`}.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the type in which it is stored; finite, or a `LoRAError`."""
        at = self.tensors[name]
        with opened(self.folder / TENSORS) as file:
            file.seek(at.start)
            data = file.read(at.stop - at.start)
        if len(data) != at.stop - at.start:
            raise LoRAError(f"{self.folder / TENSORS}: '{name}' is cut off; copy the file again")
        value = np.frombuffer(data, at.dtype).reshape(at.shape)
        if not np.isfinite(value.astype(np.float32)).all():
            raise LoRAError(
                f"{self.folder / TENSORS}: '{name}' {at.shape} holds NaN or infinity; the training "
                "that wrote it diverged, take an earlier checkpoint"
            )
        return value


def open_adapter(
    folder: str | os.PathLike,
    max_bytes: int | None = None,
    rename: Mapping[str, str] | None = None,
) -> AdapterFile:
    """Checks an adapter folder; reads its configuration and the header of its tensors.

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors.
      max_bytes: how large all tensors together may be.
      rename: {regular expression: what stands in its place} in the tensors' names, one after the
        other, before anything else looks at them.

    Raises:
      LoRAError: a file is missing, is a pickle or no regular file, is cut off or too large, has
        doubled, deep or malformed JSON, or lies about its tensors.
    """
    if not isinstance(folder, str | os.PathLike):
        raise LoRAError(f"expected the path of a folder, found {type(folder).__name__}")
    folder = Path(folder)
    try:
        config = _config(folder / CONFIG)
        tensors = renamed(_tensors(folder), rename or {}, folder / TENSORS)
    except OSError as e:
        raise LoRAError(f"{folder}: cannot be read: {e}") from e
    total = sum(t.stop - t.start for t in tensors.values())
    if max_bytes is not None and total > max_bytes:
        raise LoRAError(
            f"{folder / TENSORS}: {total:,} bytes of tensors, more than an adapter of these "
            f"parameters can need ({max_bytes:,}); lora.peft.load(..., max_bytes={total})"
        )
    return AdapterFile(folder, config, tensors)


def read_adapter(
    folder: str | os.PathLike, max_bytes: int | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(configuration, {name: array}) of an adapter folder, see `open_adapter`.

    >>> import pathlib, tempfile, numpy as np
    >>> from safetensors.numpy import save_file
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    >>> save_file({"q.lora_A.weight": np.ones((2, 4))[:1].astype("f4")}, folder / TENSORS)
    >>> config, tensors = read_adapter(folder)
    >>> config["r"], tensors["q.lora_A.weight"].shape
    (2, (1, 4))
    """
    file = open_adapter(folder, max_bytes)
    return dict(file.config), {name: file.read(name) for name in file.tensors}


def renamed(
    tensors: Mapping[str, Any], rename: Mapping[str, str], where: object
) -> Mapping[str, Any]:
    """The tensors under the names that the caller's expressions make of theirs."""
    if not isinstance(rename, Mapping):
        raise LoRAError(f"rename: expected {{expression: text}}, found {type(rename).__name__}")
    out: dict[str, Any] = {}
    for name, stored in tensors.items():
        new = name
        for old, text in rename.items():
            try:
                new = re.sub(old, text, new)
            except (re.error, IndexError, TypeError) as e:
                raise LoRAError(
                    f"rename: {old!r}: {text!r} is not a regular expression and a text ({e}): "
                    f"rename={{'^': 'base_model.model.'}}"
                ) from None
        if new in out or not NAME.fullmatch(new):
            raise LoRAError(f"{where}: rename makes '{name}' {new!r}, which is no name, or taken")
        out[new] = stored
    return out


def parse_json(data: bytes, where: object) -> dict:
    """A JSON object from untrusted bytes: no key twice, no NaN, no depth without end."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            twice = (k for k, n in collections.Counter(k for k, _ in items).items() if n > 1)
            raise ValueError(f"a key that appears twice: {next(twice)[:100]!r}")
        return found

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    if data.count(b"[") + data.count(b"{") > MAX_LISTS + len(data) // 12:
        raise LoRAError(f"{where}: it is nested too deeply, or holds only lists")
    try:
        value = json.loads(data.decode(), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError is a ValueError
        text = "it is nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise LoRAError(f"{where}: not the JSON that is expected: {text[:200]}") from None
    if not isinstance(value, dict):
        raise LoRAError(f"{where}: expected a JSON object, found {type(value).__name__}")
    level: list = [value]
    for _ in range(MAX_DEPTH):
        inside = (x.values() if isinstance(x, dict) else x for x in level)
        level = [x for items in inside for x in items if isinstance(x, dict | list)]
        if not level:
            return value
    raise LoRAError(f"{where}: it is nested too deeply")


def read_json(path: Path, most: int = MAX_HEADER) -> dict:
    """The JSON object of a file of at most so many bytes."""
    with opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise LoRAError(f"{path}: larger than {most:,} bytes; nothing of its kind is")
    return parse_json(data, path)


def opened(path: str | os.PathLike) -> io.BufferedReader:
    """The file, if it is one: not a folder, pipe or device, also behind a link (the hub's cache
    consists of links, so a link as such is fine)."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for its writer
            raise LoRAError(f"{path}: not a regular file")
        return open(path, "rb")
    except LoRAError:
        raise
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise LoRAError(f"{path}: cannot be read: {e}") from e


@contextlib.contextmanager
def checked(path: str | os.PathLike) -> Generator[Any, None, None]:
    """A safetensors file after the format's own checks: no gaps, nothing cut off."""
    opened(path).close()
    try:
        with safe_open(path, "np") as file:
            yield file
    except LoRAError:
        raise
    except (SafetensorError, OSError, ValueError) as e:
        text = ascii(str(e))[1:201]  # it may quote the file
        raise LoRAError(f"{path}: expected a safetensors file: {text}") from e


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
        pid = name.removeprefix(start).removesuffix(end)
        if name == f"{start}{pid}{end}" and pid.isdecimal() and not _alive(int(pid)):
            remove(path.parent / name)
    return path.parent / f"{start}{os.getpid()}{end}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _config(path: Path) -> dict:
    folder = path.parent
    if not path.is_file():
        found = f"no {CONFIG} there" if folder.is_dir() else "there is no such folder"
        found = "it is no folder" if folder.exists() and not folder.is_dir() else found
        raise LoRAError(
            f"{folder}: {found}; expected the folder that PEFT's save_pretrained "
            f"wrote, with {CONFIG} and {TENSORS} (an adapter with a name is in a subfolder)"
        )
    with opened(path) as file:
        data = file.read(MAX_CONFIG + 1)
    if len(data) > MAX_CONFIG:
        raise LoRAError(f"{path}: larger than {MAX_CONFIG:,} bytes; no configuration is")
    if (n := data.count(b":")) > MAX_KEYS:
        raise LoRAError(f"{path}: {n:,} keys, expected at most {MAX_KEYS:,}")
    return parse_json(data, path)


def _tensors(folder: Path) -> dict[str, Stored]:
    path = folder / TENSORS
    if not path.exists():
        raise LoRAError(f"{folder}: no {TENSORS}, {_instead(folder)}")
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
            raise LoRAError(
                f"{path}: a header of {length:,} bytes in a file of {size:,}: cut off, or not in "
                "the safetensors format; copy the file again"
            )
        header = parse_json(file.read(length), f"{path}, its header")
    header.pop("__metadata__", None)
    failures: list[str] = []
    stored = {
        name: found
        for name, entry in header.items()
        if (found := _stored(name, entry, 8 + length, size, failures)) is not None
    }
    if not failures:
        failures = list(_gaps(stored, 8 + length, size))
    raise_all(f"{path}: the header is not one of an adapter:", failures[:20])
    if not stored:
        raise LoRAError(f"{path}: holds no tensor")
    with checked(path):
        pass
    return stored


def _instead(folder: Path) -> str:
    """What a folder without PEFT's tensors holds."""
    names = sorted(p.name for p in folder.iterdir())
    pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        return f"only {pickles[0]}: {TO_SAFETENSORS}"
    if mlx := {"adapters.safetensors", "adapters.npz"}.intersection(names):
        return (
            f"but {min(mlx)}: an adapter of mlx-lm, whose lora_a is (in, rank), lora_b "
            "(rank, out), and whose scale stands alone: give these arrays to lora.LoRA(a, b, "
            "scale, geometry), or fuse it there (mlx_lm.fuse)"
        )
    return "the adapter is incomplete"


def _stored(name: str, entry: Any, base: int, size: int, failures: list[str]) -> Stored | None:
    def wrong(what: str) -> None:
        failures.append(f"{name[:200]!a}: {what}")

    if not NAME.fullmatch(name) or len(name) > 512:
        return wrong("expected a dotted name of a torch module's parameter")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return wrong("expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        what = repr(dtype[:20]) if isinstance(dtype, str) else type(dtype).__name__
        return wrong(f"type {what}, expected one of {', '.join(DTYPES)}")
    if not _sizes(shape) or len(shape) > MAX_AXES or not _sizes(offsets) or len(offsets) != 2:
        return wrong(f"expected a shape of at most {MAX_AXES} sizes, and two offsets, all integers")
    start, stop = offsets
    if stop - start != math.prod(shape) * DTYPES[dtype].itemsize or base + stop > size:
        return wrong(
            f"shape {tuple(shape)} of {dtype} at bytes {start:,} to {stop:,} of {size - base:,}"
        )
    return Stored(DTYPES[dtype], tuple(shape), base + start, base + stop)


def _sizes(x: Any) -> bool:
    return isinstance(x, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in x)


def _gaps(stored: Mapping[str, Stored], at: int, size: int) -> Iterator[str]:
    """Tensors that overlap, and bytes that belong to none."""
    for name, t in sorted(stored.items(), key=lambda item: (item[1].start, item[1].stop)):
        if t.start != at:
            yield f"'{name}' begins at byte {t.start:,}, expected {at:,}"
        at = t.stop
    if at != size:
        yield f"the tensors end at byte {at:,} of {size:,}"
