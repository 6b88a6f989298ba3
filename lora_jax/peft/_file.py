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
import stat
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from lora_jax._core.errors import LoRAError, raise_all
from lora_jax.peft._arguments import as_path
from lora_jax.peft._keys import NO_NAME, is_name, renamed

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


# By the format's own names. No type of 8 bits: that is a code, and no weight without its scale.
DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": jnp.dtype("bfloat16")}

# The types of tensors that hold positions.
PLACES = {"I32": np.dtype("int32"), "I64": np.dtype("int64")}

# Bytes of adapter_config.json, and keys in it: a pattern for each of so many modules.
MAX_CONFIG = 4 << 20
MAX_KEYS = 40_000

# Bytes of a header: room for 100,000 tensors.
MAX_HEADER = 32 << 20
MAX_AXES = 8

# In JSON, and one more for each 12 bytes: an empty list takes 3 bytes there, and 64 in memory.
MAX_LISTS = 10_000

# The depth of JSON: Python's own readers and writers fail at about a thousand.
MAX_DEPTH = 64

TO_SAFETENSORS = (
    "a pickle runs code when it is opened, so it is refused. Where you trust it, convert it once, "
    "in PyTorch: `PeftModel.from_pretrained(base, folder).save_pretrained(folder)`"
)


AGAIN = "copy the file again, or write it again in the tool that made it"


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and as what.

    Attributes:
      type: the format's own name, such as "BF16".
      axes: turn it from the order in which it is stored.
    """

    file: Path
    type: str
    shape: tuple[int, ...]
    start: int
    stop: int
    axes: tuple[int, ...] | None = None

    @property
    def dtype(self) -> np.dtype:
        return (DTYPES | PLACES)[self.type]

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def turned(self, *axes: int) -> Stored:
        """The tensor with its axes in another order."""
        # From the order in the file: a tensor is turned once.
        shape = tuple(self.shape[d] for d in axes)
        return dataclasses.replace(self, shape=shape, axes=axes)

    def read(self, into: np.ndarray | None = None) -> np.ndarray:
        """Its value, of a type that `dtype` knows; in bytes that are there, if they are given."""
        data = empty((self.nbytes,), np.uint8) if into is None else into[: self.nbytes]
        with opened(self.file) as file:
            file.seek(self.start)
            if file.readinto(data.data) != self.nbytes:
                raise LoRAError(f"{self.file}: is cut off; copy the file again")
        value = data.view(self.dtype)
        if self.axes is None:
            return value.reshape(self.shape)
        # Axis i is the stored axis axes[i]: the shape in the file, from the turned one.
        stored = [self.shape[self.axes.index(d)] for d in range(len(self.axes))]
        return value.reshape(stored).transpose(self.axes)


def is_finite(value: np.ndarray) -> bool:
    """Whether numbers of one of `DTYPES` are finite, read without a copy: by their bits, of which
    the largest as signed integers is the largest positive number, and as unsigned the most
    negative one; NaN is past infinity."""
    kinds = {2: (np.int16, np.uint16), 4: (np.int32, np.uint32)}[value.itemsize]
    ends = np.array([np.inf, -np.inf], value.dtype)
    within = lambda bits, end: value.view(bits).max(initial=0) < end.view(bits)
    return all(map(within, kinds, ends))


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array at an address that 64 divides, which JAX takes on a CPU as it is, without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    data = np.empty(size + 64, np.uint8)
    start = -data.ctypes.data % 64
    return data[start : start + size].view(dtype).reshape(shape)


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """An adapter folder whose headers were checked, and of which no tensor was read yet.

    Attributes:
      folder: as given; a file where it has no folder of its own.
      config: PEFT's settings, as adapter_config.json has them; their values are not checked yet.
      tensors: {PEFT's name: `Stored`, or the value of what was computed from those}.
      path: the file in which they are.
      format: "peft", "mlx", "diffusers" or "kohya".
      part: the model that they are of, where the file has several, such as "unet".
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored | np.ndarray]
    path: Path
    format: str = "peft"
    part: str | None = None

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the type in which it is stored; finite, or a `LoRAError`."""
        at = self.tensors[name]
        if isinstance(at, np.ndarray):
            return at
        value = at.read()
        if at.type in DTYPES and not is_finite(value):
            raise LoRAError(
                f"{self.path}: '{name}' {at.shape} holds NaN or infinity; the training "
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
      max_bytes: how large all tensors together may be.
      rename: as in `lora.peft.load`; of the names before anything else looks at them.
    """
    folder = as_path(folder)
    config = read_config(folder / CONFIG)
    if not is_there(folder / TENSORS):
        raise LoRAError(f"{folder}: no {TENSORS}, {_instead(folder)}")
    tensors, _ = read_tensors(folder / TENSORS, max_bytes, rename)
    return AdapterFile(folder, config, tensors, folder / TENSORS)


def read_tensors(
    path: Path, max_bytes: int | None = None, rename: Mapping[str, str] | None = None
) -> tuple[Mapping[str, Stored], Mapping[str, Any]]:
    """({name: where it lies}, the file's metadata), checked as in `open_adapter`."""
    with reading(path):
        stored, metadata = _tensors(path)
    tensors = renamed(stored, {} if rename is None else rename, path)
    # By the header, which the length of the file has confirmed: nothing is read yet.
    total = sum(t.nbytes for t in tensors.values())
    if max_bytes is not None and total > max_bytes:
        raise LoRAError(
            f"{path}: {total:,} bytes of tensors, more than an adapter of these "
            f"parameters can need ({max_bytes:,}); lora.peft.load(..., max_bytes={total})"
        )
    return tensors, metadata


def parse_json(data: bytes, where: object) -> dict:
    """A JSON object from untrusted bytes: no key twice, no NaN, no depth without end."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        # Readers take the first or the last of two values: a check could see another than PEFT.
        found = dict(items)
        if len(found) != len(items):
            twice = (k for k, n in collections.Counter(k for k, _ in items).items() if n > 1)
            raise ValueError(f"a key that appears twice: {next(twice)[:100]!r}")
        return found

    def constant(name: str) -> None:
        # Python's reader takes NaN and Infinity, which JSON does not have.
        raise ValueError(f"{name} is not JSON")

    # Before it is parsed: lists in lists would take gigabytes.
    if data.count(b"[") + data.count(b"{") > MAX_LISTS + len(data) // 12:
        raise LoRAError(f"{where}: it is nested too deeply, or holds only lists; {AGAIN}")
    try:
        value = json.loads(data.decode(), object_pairs_hook=pairs, parse_constant=constant)
    # UnicodeDecodeError is a ValueError.
    except (ValueError, RecursionError) as e:
        text = "it is nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise LoRAError(f"{where}: not the JSON that is expected: {text[:200]}; {AGAIN}") from None
    if not isinstance(value, dict):
        raise LoRAError(f"{where}: expected a JSON object, found {type(value).__name__}")
    # Level by level, as recursion would fail where it is to check.
    level: list = [value]
    for _ in range(MAX_DEPTH):
        inside = (x.values() if isinstance(x, dict) else x for x in level)
        level = [x for items in inside for x in items if isinstance(x, dict | list)]
        if not level:
            return value
    raise LoRAError(f"{where}: it is nested too deeply; {AGAIN}")


def read_json(path: Path, most: int = MAX_HEADER, keys: int = MAX_HEADER) -> dict:
    """The JSON object of a file of at most so many bytes and keys."""
    with opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise LoRAError(f"{path}: more than {most:,} bytes, as no settings have; {AGAIN}")
    if (n := data.count(b":")) > keys:
        raise LoRAError(f"{path}: {n:,} keys, expected at most {keys:,}")
    return parse_json(data, path)


def opened(path: str | os.PathLike) -> io.BufferedReader:
    """The file, if it is one: not a folder, pipe or device, also behind a link (the hub's cache
    consists of links, so a link as such is fine)."""
    with reading(path):
        # To open a pipe would wait for its writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise LoRAError(f"{path}: not a regular file")
        return open(path, "rb")


def check_format(path: str | os.PathLike) -> None:
    """The format's own checks of a safetensors file: no gaps, nothing cut off."""
    opened(path).close()
    try:
        with safe_open(path, "np"):
            pass
    except (SafetensorError, OSError, ValueError) as e:
        # The message may quote the file: escaped, and cut.
        text = ascii(str(e)[:200])[1:-1]
        raise LoRAError(f"{path}: expected a safetensors file: {text}; {AGAIN}") from e


@contextlib.contextmanager
def reading(path: str | os.PathLike) -> Generator[None, None, None]:
    """A right that lacks, or a name that is too long, is an error that names the path."""
    try:
        yield
    except LoRAError:
        raise
    # ValueError: a NUL in the name.
    except (OSError, ValueError) as e:
        raise LoRAError(f"{path}: cannot be read: {e}") from e


def is_there(path: Path) -> bool:
    """Whether a file, or anything else, has this name: what it is, `opened` says."""
    with reading(path):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def read_config(path: Path) -> dict:
    """adapter_config.json, of a size that a configuration has."""
    folder = path.parent
    if not is_there(path):
        found = "it is no folder" if is_there(folder) else "there is no such folder"
        found = f"no {CONFIG} there" if folder.is_dir() else found
        raise LoRAError(
            f"{folder}: {found}; expected the folder that PEFT's save_pretrained wrote, with "
            f"{CONFIG} and {TENSORS} (an adapter with a name is in a subfolder)"
        )
    return read_json(path, MAX_CONFIG, MAX_KEYS)


def _tensors(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        # 8 bytes, then a header of 2 bytes at least, {}.
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
            raise LoRAError(
                f"{path}: a header of {length:,} bytes in a file of {size:,}: cut off, or not in "
                "the safetensors format; copy the file again"
            )
        header = parse_json(file.read(length), f"{path}, its header")
    metadata = header.pop("__metadata__", None)
    failures: list[str] = []
    stored = {
        name: found
        for name, entry in header.items()
        if (found := _stored(path, name, entry, 8 + length, size, failures)) is not None
    }
    # Offsets that are wrong one by one say nothing of gaps.
    if not failures:
        failures = list(_gaps(stored, 8 + length, size))
    raise_all(f"{path}: the header is not one of an adapter:", failures[:20], AGAIN)
    if not stored:
        raise LoRAError(f"{path}: holds no tensor; {AGAIN}")
    # Last: of the format's own reader the messages are about bytes, and not about names.
    check_format(path)
    return stored, metadata if isinstance(metadata, dict) else {}


def _instead(folder: Path) -> str:
    """What a folder without PEFT's tensors holds."""
    names = sorted(p.name for p in folder.iterdir())
    pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        return f"only {pickles[0]}: {TO_SAFETENSORS}"
    if "adapters.safetensors" in names:
        return "but adapters.safetensors, an adapter of mlx-lm: lora.peft.load(..., format='mlx')"
    if "adapters.npz" in names:
        return "but adapters.npz, of an old mlx-lm: save it there as safetensors (mx.load, mx.save)"
    return "the adapter is incomplete"


def _stored(
    path: Path, name: str, entry: Any, base: int, size: int, failures: list[str]
) -> Stored | None:
    def wrong(what: str) -> None:
        failures.append(f"{name[:200]!a}: {what}")

    # First, as the other messages show the name.
    if not is_name(name):
        return wrong(NO_NAME)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return wrong("expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    # SHiRA's places are integers, an alpha may be one; all else are weights.
    types = PLACES if name.endswith("_indices") else DTYPES
    types = DTYPES | PLACES if name.endswith(".alpha") else types
    if not isinstance(dtype, str) or dtype not in types:
        what = repr(dtype[:20]) if isinstance(dtype, str) else type(dtype).__name__
        return wrong(f"type {what}, expected one of {', '.join(types)}")
    if not _sizes(shape) or len(shape) > MAX_AXES or not _sizes(offsets) or len(offsets) != 2:
        return wrong(f"expected a shape of at most {MAX_AXES} sizes, and two offsets, all integers")
    start, stop = offsets
    # Integers of Python: no product of sizes overflows.
    if stop - start != math.prod(shape) * types[dtype].itemsize or base + stop > size:
        return wrong(
            f"shape {tuple(shape)} of {dtype} at bytes {start:,} to {stop:,} of {size - base:,}"
        )
    return Stored(path, dtype, tuple(shape), base + start, base + stop)


def _sizes(x: Any) -> bool:
    return isinstance(x, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in x)


def _gaps(stored: Mapping[str, Stored], at: int, size: int) -> Iterator[str]:
    """Tensors that overlap, and bytes that belong to none."""
    # By the end as well: a tensor without elements begins where the next one does.
    for name, t in sorted(stored.items(), key=lambda item: (item[1].start, item[1].stop)):
        if t.start != at:
            yield f"'{name}' begins at byte {t.start:,}, expected {at:,}"
        at = t.stop
    if at != size:
        yield f"the tensors end at byte {at:,} of {size:,}"
