"""The checkpoints in a directory: orbax's manager, and the description that stands in each."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Generator, Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from lora_jax._core.errors import LoRAError

# The description's format; a reader refuses those above its own.
FORMAT = 1


@contextlib.contextmanager
def opened(
    manager: ocp.CheckpointManager | str | os.PathLike,
) -> Generator[ocp.CheckpointManager, None, None]:
    """The manager itself; for a directory, one that cannot write."""
    if isinstance(manager, ocp.CheckpointManager):
        yield manager
    elif isinstance(manager, str | os.PathLike):
        # A path of a file system, or of a bucket.
        directory = epath.Path(manager)
        if not directory.is_dir():
            raise LoRAError(f"there is no directory {os.fspath(manager)!r}")
        options = ocp.CheckpointManagerOptions(read_only=True, create=False)
        local = "://" not in str(directory)
        # Orbax refuses relative paths.
        directory = directory.absolute() if local else directory
        with ocp.CheckpointManager(directory, options=options) as opened:
            yield opened
    else:
        raise LoRAError(
            f"expected an orbax CheckpointManager or a directory, found {type(manager).__name__}: "
            "manager = ocp.CheckpointManager(directory); "
            "lora.checkpoint.restore(manager, adapters, base=params)"
        )


def crc32(record: Mapping) -> int:
    """The checksum of a description without its own, as JSON would give it back."""
    # With sorted keys: what JSON gives back need not have their order.
    rest = {k: v for k, v in record.items() if k != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def description(manager: ocp.CheckpointManager, step: int | None) -> tuple[int, dict]:
    """(step, what the checkpoint says about itself)."""
    step = manager.latest_step() if step is None else step
    if step is None:
        raise LoRAError(f"there is no complete checkpoint in {manager.directory}")
    if step not in manager.all_steps():
        raise LoRAError(
            f"there is no checkpoint {step} in {manager.directory}; there are "
            f"{manager.all_steps() or 'none'}"
        )
    # In this order: whose it is, how new, whether whole, which step.
    record = _read(manager, step, lora=ocp.args.JsonRestore())["lora"]
    where = f"checkpoint {step} in {manager.directory}"
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise LoRAError(f"{where} is not one of lora_jax's: its description has no format")
    if record["format"] > FORMAT:
        raise LoRAError(
            f"{where} has format {record['format']}; this version reads up to {FORMAT}: "
            "pip install -U lora_jax"
        )
    if record.get("crc32") != crc32(record) or not _is_whole(record):
        raise LoRAError(
            f"{where} is damaged: its description is not what was written. Other steps there: "
            f"{[s for s in manager.all_steps() if s != step] or 'none'}"
        )
    if record.get("step") != step:
        raise LoRAError(
            f"{where} is step {record.get('step')} by its own description: it was copied or "
            "renamed. Give it back its name, or copy the whole run to a directory of its own"
        )
    return step, record


def _is_whole(record: Mapping) -> bool:
    """Whether it has the parts that `save` writes: its checksum may be a stranger's."""
    text = lambda x: isinstance(x, str)
    parts = {
        "base": _is_type,
        "nodes": lambda x: isinstance(x, dict) and text(x.get("kind")),
        "adapters": _is_entry,
        "state": _is_entry,
        # These may be None.
        "content": text,
        "config": lambda _: True,
        "metrics": lambda x: isinstance(x, float),
    }
    empty = [name for name in ("content", "config", "metrics") if record.get(name, 0) is None]
    return "data" in record and all(
        isinstance(record.get(name), dict) and all(map(fits, record[name].values()))
        for name, fits in parts.items()
        if name not in empty
    )


def _is_type(x: Any) -> bool:
    """[dtype, shape]"""
    return (
        isinstance(x, list)
        and [*map(type, x)] == [str, list]
        and all(type(n) is int and 0 <= n < 2**63 for n in x[1])
    )


def _is_entry(x: Any) -> bool:
    """What `recorded` says of a leaf."""
    of = isinstance(x, dict) and ("value" in x or _is_type(x.get("array")))
    return of and ("value" in x or type(x.get("sum")) is type(x.get("key", "")) is str)


def _read(manager: ocp.CheckpointManager, step: int, **items: Any) -> Any:
    """What orbax restores. Whatever it raises over a damaged file becomes one error, which says
    what other steps there are."""
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    # JSON, tensorstore, orbax and the file system each have errors of their own.
    except Exception as e:
        others = [s for s in manager.all_steps() if s != step]
        reason = (str(e).strip().splitlines() or [""])[0][:300]
        raise LoRAError(
            f"checkpoint {step} in {manager.directory} cannot be read ({type(e).__name__}: "
            f"{reason}); it is damaged, incomplete, or not one of lora_jax's. Nothing was changed. "
            f"Other steps there: {others or 'none'}; restore one by lora.checkpoint.restore(..., "
            f"step=...)"
        ) from e


def arrays_of(manager: ocp.CheckpointManager, step: int, name: str, targets: dict) -> dict:
    """{escaped path: array} of the step's item `name`, as `targets` asks for them."""
    if not targets:
        return {}
    return _read(manager, step, **{name: ocp.args.StandardRestore(targets)})[name]


def ours(manager: ocp.CheckpointManager, step: int) -> bool:
    try:
        metadata: Any = manager.metadata(step)
        return "lora" in metadata.item_handlers
    # Whatever a foreign or damaged file makes orbax raise.
    except Exception:
        return False
