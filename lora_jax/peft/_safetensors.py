"""Base models in safetensors files: what is in them, and copies with some tensors changed.

A file is 8 bytes, the length of a JSON header, the header, and the tensors without gaps. A copy in
which shapes and types stay has the same header, so it can be written front to back, one tensor at a
time, whatever its size.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax._core.errors import LoRAError, raise_all
from lora_jax.peft._arguments import as_names, as_path
from lora_jax.peft._file import Stored, checked, opened, parse_json, read_json, reading
from lora_jax.peft._files import replacing, writing
from lora_jax.peft._keys import renamed

INDEX = "model.safetensors.index.json"

# Bytes that are copied at a time.
CHUNK = 8 << 20

# What in a folder holds weights in another form, or would change which are loaded.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ot")

NOT_COPIED = ("adapter_config.json", "pytorch_model.bin.index.json")


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model: one file, or a folder as transformers writes it.

    Attributes:
      path: as given.
      files: the files that hold its tensors, {file: where the first tensor begins}.
      tensors: {name: where it lies}, in the files' order.
      config: config.json beside them, or {}.
    """

    path: Path
    files: Mapping[Path, int]
    tensors: Mapping[str, Stored]
    config: Mapping[str, Any]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: t.shape for name, t in self.tensors.items()}

    def others(self) -> tuple[list[Path], list[Path]]:
        """The other files of the folder, relative to it: (what belongs to the model whatever its
        weights are, what does not)."""
        keep, leave = [], []
        for root, folders, names in os.walk(self.path):
            # In place: `os.walk` goes only into what is left.
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            for name in sorted(n for n in names if not n.startswith(".")):
                path = Path(root) / name
                weights = path.suffix in WEIGHTS or ".ckpt" in name or name in NOT_COPIED
                if path not in self.files:
                    (leave if weights else keep).append(path.relative_to(self.path))
        return keep, leave


def open_base(path: str | os.PathLike) -> Base:
    """The headers of a base model's tensors.

    Args:
      path: a safetensors file, or a folder with model.safetensors, with one other such file, or
        with several and their index.

    Raises:
      LoRAError: there is none, only pickles, or files that are damaged or do not belong together.

    >>> import tempfile, numpy as np
    >>> from safetensors.numpy import save_file
    >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save_file({"q.weight": np.ones((2, 3), "f4")}, path)
    >>> open_base(path).shapes
    {'q.weight': (2, 3)}
    """
    path = Path(path)
    with reading(path):
        whole = path.is_dir()
        files = _files(path) if whole else [path]
    starts, tensors = {}, {}
    failures: list[str] = []
    for file in files:
        starts[file], found = _header(file)
        failures += [
            f"'{n}' is in {tensors[n].file.name} and {file.name}" for n in found if n in tensors
        ]
        tensors |= found
    if whole and os.path.lexists(path / INDEX):
        for name, where in _weight_map(path).items():
            own = tensors[name].file.name if name in tensors else "no file"
            if own != where:
                failures.append(f"'{name}' is in {where} by the index, found in {own}")
    raise_all(f"{path}: the files do not belong together:", failures, "copy the folder again")
    settings = (path if whole else path.parent) / "config.json"
    # A link that leads nowhere is an error, and not a model without settings.
    return Base(path, starts, tensors, read_json(settings) if os.path.lexists(settings) else {})


def _files(folder: Path) -> list[Path]:
    if os.path.lexists(folder / INDEX):
        return [folder / n for n in sorted(set(_weight_map(folder).values()))]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    only = f", only {pickles[0]}: save it in PyTorch as safetensors" if pickles else ""
    raise LoRAError(
        f"{folder}: expected model.safetensors, or {INDEX} and the files that it names; there are "
        f"{', '.join(p.name for p in found) or 'no safetensors files'}{only}"
    )


def _weight_map(folder: Path) -> dict[str, str]:
    """{tensor: file} of a folder's index."""
    found = read_json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise LoRAError(f"{folder / INDEX}: expected weight_map, an object {{tensor: file}}")
    odd = [
        f"{name!a}: {file!a}"
        for name, file in found.items()
        # A name with a folder could lead out of this one.
        if not isinstance(file, str) or Path(file).name != file or not file.isprintable()
    ]
    raise_all(f"{folder / INDEX}: expected names of files:", odd)
    return found


def _header(path: Path) -> tuple[int, dict[str, Stored]]:
    """(where the tensors begin, {name: tensor} in the order in which they lie)."""
    with checked(path), opened(path) as file:
        # Offsets count from the end of the header, which `checked` has found to be whole.
        start = 8 + int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(start - 8), f"{path}, its header")
    header.pop("__metadata__", None)
    raise_all(f"{path}: names of tensors:", [ascii(n) for n in header if not n.isprintable()])
    at = lambda item: item[1]["data_offsets"]
    return start, {
        name: Stored(path, t["dtype"], tuple(t["shape"]), *(start + n for n in t["data_offsets"]))
        for name, t in sorted(header.items(), key=at)
    }


def called(
    tensors: Mapping[str, Any],
    ignore: Sequence[str],
    rename: Mapping[str, str] | None,
    where: object,
) -> dict[str, tuple[str, Any]]:
    """{name after `rename`: (its own name, tensor)} of those that are not to be ignored.

    >>> called({"a.weight": 1, "a.mask": 2}, [r".*\\.mask"], {"^a": "b"}, "base")
    {'b.weight': ('a.weight', 1)}
    """
    ignore = as_names(ignore, "ignore") or ()
    try:
        patterns = [re.compile(p) for p in ignore]
    except re.error as e:
        raise LoRAError(f"ignore={list(ignore)}: not a regular expression: {e}") from None
    kept = {n: t for n, t in tensors.items() if not any(p.fullmatch(n) for p in patterns)}
    named = renamed(kept, rename, where) if rename is not None else kept
    return {new: (old, t) for new, (old, t) in zip(named, kept.items())}


def tied_tables(base: Base) -> list[str]:
    """The table that is the model's output head as well, by config.json."""
    text = base.config.get("text_config")
    # Multimodal models have the text model's settings in a part of their own.
    config = {**(text if isinstance(text, dict) else {}), **base.config}
    kinds = config.get("architectures")
    kinds = kinds if isinstance(kinds, list) else []
    head = any("LM" in str(k) or "ForConditionalGeneration" in str(k) for k in kinds)
    if not head or config.get("tie_word_embeddings") is False:
        return []
    # Where two tables have that size, the head is a tensor of its own.
    of_size = [
        n for n, s in base.shapes.items() if len(s) == 2 and s[0] == config.get("vocab_size")
    ]
    return of_size if len(of_size) == 1 else []


# For each tensor that changes, from its old value to the new one, of the same shape and type.
Changes = Mapping[str, Callable[[np.ndarray], np.ndarray]]


def write_copy(
    base: Base,
    out: str | os.PathLike,
    changed: Changes,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Writes a base model with some tensors changed, one at a time; all else is copied.

    Args:
      out: a new file or folder, like `base.path`; it appears when it is complete, or not at all.
      progress: is told (bytes written, bytes in all).

    Returns:
      The files of the folder that were left out: weights in other forms.

    Raises:
      LoRAError: `out` exists, or cannot be written.
    """
    out, done = as_path(out), 0
    total = sum(file.stat().st_size for file in base.files)

    def told(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    with replacing(out) as new:
        if not base.path.is_dir():
            write_changed(base, base.path, new, changed, told)
            return []
        copied, left = base.others()
        with writing(out):
            new.mkdir()
            # The model's other files first: they are small.
            for path in copied:
                (new / path).parent.mkdir(parents=True, exist_ok=True)
                with opened(base.path / path) as source, open(new / path, "wb") as target:
                    shutil.copyfileobj(source, target)
        for file in base.files:
            write_changed(base, file, new / file.name, changed, told)
    return left


def write_changed(
    base: Base,
    file: Path,
    out: Path,
    changed: Changes,
    progress: Callable[[int], None],
) -> None:
    """Copies one of the base's files, with some tensors changed.

    Args:
      file: one of `base.files`.
      out: the new file; it must not exist.
      changed: see `Changes`.
      progress: is told how many bytes were written, now and then.
    """
    tensors = {n: t for n, t in base.tensors.items() if t.file == file}
    with writing(out), opened(file) as source, open(out, "xb") as target:

        def copy(count: int) -> None:
            while count:
                data = source.read(min(count, CHUNK))
                if not data:
                    raise LoRAError(f"{file}: is cut off; copy the file again")
                target.write(data)
                progress(len(data))
                count -= len(data)

        # The length and the header: shapes and types stay, and so do the offsets.
        copy(base.files[file])
        for name, t in tensors.items():
            source.seek(t.start)
            if name not in changed:
                copy(t.stop - t.start)
                continue
            value = changed[name](t.read())
            # One byte more would move all that follows.
            if (value.shape, value.dtype) != (t.shape, t.dtype):
                raise LoRAError(
                    f"'{name}': {value.dtype}{value.shape} in place of {t.dtype}{t.shape}"
                )
            # As bytes: NumPy gives no buffer of bf16.
            target.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
            progress(t.stop - t.start)
        target.flush()
        # On the disk before the folder gets its name.
        os.fsync(target.fileno())
