"""What an adapter or a base model on disk is, as a table or as JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from lora_jax._cli.terminal import one_line
from lora_jax._cli.torch_adapter import TorchAdapter, norm, open_torch
from lora_jax._core.errors import LoRAError, quoted, raise_all
from lora_jax._core.paths import flatten
from lora_jax._core.table import table
from lora_jax._nodes.adapters import LoRA, LowRank, Rows
from lora_jax._nodes.node import is_node
from lora_jax.checkpoint._checkpoint import Restored, restore
from lora_jax.checkpoint._describe import config_to_json
from lora_jax.peft._file import CONFIG, TENSORS, opened
from lora_jax.peft._formats import DIFFUSERS
from lora_jax.peft._keys import split
from lora_jax.peft._parts import NewRows, Update
from lora_jax.peft._safetensors import open_base

# Characters of a setting that a table shows.
SHOWN = 160

# Settings with these values say nothing.
EMPTY = (None, [], {}, "", False)

Kind = Literal["peft", "orbax", "base"]

HEADS = ("name", "kind", "shape", "rank", "alpha", "scale", "norm", "dtype", "parameters", "bytes")


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `inspect` found. Print it for a table.

    Attributes:
      what: "peft", "orbax" or "base".
      rows: a dict for each parameter or leaf, with the keys of `HEADS` that apply.
      about: settings, step, metadata.
      below: other adapters and models in the folder.
    """

    what: Kind
    rows: Sequence[Mapping[str, Any]]
    about: Mapping[str, Any]
    below: Sequence[str] = ()

    @property
    def parameters(self) -> int:
        return sum(row["parameters"] for row in self.rows)

    @property
    def bytes(self) -> int:
        return sum(row["bytes"] for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        totals = {"parameters": self.parameters, "bytes": self.bytes}
        return {"what": self.what, **self.about, **totals, "leaves": list(self.rows)}

    def blocks(self) -> list[str]:
        """A table, and the lines below it."""
        heads = [h for h in HEADS if any(h in row for row in self.rows)]
        blocks = [table(heads, [[_shown(row.get(h)) for h in heads] for row in self.rows])]
        blocks.append(
            f"{len(self.rows)} in all: {self.parameters:,} parameters, {self.bytes:,} bytes"
        )
        blocks += [one_line(f"{k}: {_said(v)}") for k, v in self.about.items() if v not in EMPTY]
        return blocks + [f"in it: {text}" for text in self.below]

    def __str__(self):
        return "\n".join(self.blocks())


def _said(value: Any) -> str:
    """Long values shortened."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={_short(v)}" for k, v in value.items() if v not in EMPTY)
    return _short(value)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _shown(cell: Any) -> Any:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return float(f"{cell:.4g}")
    return tuple(cell) if isinstance(cell, list) else cell


# How many levels below a run's folder an adapter is looked for.
DEEP = 3


def kind_of(path: str | os.PathLike) -> Kind:
    """Whether a path is an adapter's folder (of PEFT, mlx-lm or diffusers), a checkpoint directory
    of ours (or a step in it), or a base model in safetensors.

    Raises:
      LoRAError: it is none of them. What is below it is named, as a run's folder has its
        checkpoints in it.
    """
    path = Path(path)
    kind = _kind(path)
    if kind is not None:
        return kind
    if path.exists() and not path.is_dir():
        # It raises, and says that it is a pipe or a device.
        opened(path).close()
    if path.is_dir():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "it is empty"
    else:
        found = f"a file; its folder is {path.parent}" if path.exists() else "there is nothing"
    raise_all(f"{path}: it is no adapter itself; give the path of one that is in it:", _below(path))
    raise LoRAError(
        f"{path}: expected a PEFT folder ({CONFIG}), a checkpoint directory of "
        f"lora.checkpoint.save, or a base model in safetensors; found: {found}"
    )


def _kind(path: Path) -> Kind | None:
    if path.is_file() and path.name not in (CONFIG, TENSORS):
        return "base"
    # A pickle counts too, so that it is refused as one, by name.
    names = (CONFIG, TENSORS, DIFFUSERS, "adapter_model.bin")
    if any((path / name).exists() for name in names):
        return "peft"
    # Before the base: a folder may hold both, checkpoints beside a model.
    steps = [path] if _is_step(path) else path.glob("*")
    if any(_is_step(p) for p in steps):
        return "orbax"
    return "base" if any(path.glob("*.safetensors")) else None


def _below(path: Path) -> Iterator[str]:
    """The folders of a kind below a path, and what they are; a run keeps them near the top."""
    for root, folders, _ in os.walk(path):
        here = Path(root)
        kind = None if here == path else _kind(here)
        if kind == "orbax":
            steps = sorted(int(p.name) for p in here.glob("*") if _is_step(p))
            yield f"{here}: checkpoints, of which {here / str(steps[-1])} is the latest"
        elif kind is not None:
            yield f"{here}: {'an adapter' if kind == 'peft' else 'a base model'}"
        deep = len(here.relative_to(path).parts) >= DEEP
        # In place: `os.walk` goes only into what is left.
        folders[:] = [] if kind or deep else sorted(f for f in folders if not f.startswith("."))


def _is_step(path: Path) -> bool:
    return path.name.isdecimal() and (path / "lora").is_dir()


def restored(path: str | os.PathLike, base: Any = None) -> Restored:
    """A checkpoint directory's latest step, or the step that the path is."""
    path = Path(path)
    only_files(path)
    step = int(path.name) if _is_step(path) else None
    with of_orbax(path):
        return restore(path if step is None else path.absolute().parent, base=base, step=step)


def only_files(folder: Path) -> None:
    """Refuses a folder with a pipe or a device in it, which those who read it would wait for."""
    for root, _, names in os.walk(folder):
        for name in names:
            opened(Path(root) / name).close()


@contextlib.contextmanager
def of_orbax(path: Path) -> Generator[None, None, None]:
    """Whatever orbax and its libraries raise over damaged files or a full disk, with the path."""
    try:
        yield
    except LoRAError:
        raise
    # Orbax and its libraries raise many kinds of errors.
    except Exception as e:
        text = str(e).strip().partition("\n")[0]
        raise LoRAError(f"{path}: {type(e).__name__}: {quoted(text, 1500)}") from e


def inspect(
    path: str | os.PathLike, ignore: Sequence[str] = (), rename: Mapping[str, str] | None = None
) -> Inspection:
    """What is in a folder or file, see `kind_of`. Factors that were trained against a changed base
    (PiSSA, LoftQ) are shown as they are.

    Args:
      ignore, rename: as in `lora.peft.load`.
    """
    kind = kind_of(path)
    if kind == "peft":
        adapter = open_torch(path, (*ignore, "init_lora_weights"), rename)
        rows = [_of_peft(adapter, name) for name in adapter.parts]
        read = adapter.file.tensors
        rows += [_row(t.name, "base table", t.shape, [read[t.key]]) for t in adapter.parsed.tables]
        rows.sort(key=_natural)
        settings = {k: v for k, v in adapter.file.config.items() if v not in EMPTY}
        about = {"config": settings, "unclear": list(adapter.unclear)}
        return Inspection("peft", rows, about, [*_below(Path(path))])
    if kind == "orbax":
        return _of_checkpoint(path)
    base = open_base(path)
    rows = [_row(n, None, t.shape, [t], lambda t: t.type) for n, t in base.tensors.items()]
    return Inspection("base", rows, {"files": [f.name for f in base.files]}, [*_below(Path(path))])


def _natural(row: Mapping[str, Any]) -> list:
    """Layer 2 before layer 10."""
    # Pairs, as numbers and texts cannot be compared with each other.
    parts = re.split(r"(\d+)", row["name"])
    return [(part.isdecimal(), int(part) if part.isdecimal() else part) for part in parts]


def _of_peft(adapter: TorchAdapter, name: str) -> dict[str, Any]:
    entry, what = adapter.parts[name]
    # `open_torch` makes them with a shape.
    assert entry.shape is not None
    tensors = [adapter.file.tensors[k] for k in adapter.keys(name)]
    row = _row(name, entry.kind, entry.shape, tensors)
    if isinstance(what, NewRows):
        return row | {"kind": f"{len(what.index)} rows", "shape": list(what.shape)}
    if not isinstance(what, Update):
        return row | {"kind": "added to" if what.key is None else "full"}
    # alpha_pattern has the attention's own name where the key has PEFT's wrapper in it as well.
    module, _ = split(what.a)
    alpha = adapter.config.alpha_of(module.replace(".base_layer.out_proj", ""))
    if what.magnitude is not None:
        row["kind"] += ", dora"
    # The only line that reads tensors: one parameter at a time.
    size = _norm(adapter.node(name, dtype="float32"))
    return row | {"rank": what.rank, "alpha": alpha, "scale": what.scale, "norm": size}


def _norm(node: LowRank) -> float | None:
    """None where it depends on the base, as that of a DoRA does."""
    return norm(node) if isinstance(node, LoRA) else None


def _row(
    name: str,
    kind: str | None,
    shape: Sequence[int],
    arrays: Sequence[Any],
    type_of: Callable[[Any], str] = lambda x: str(x.dtype),
) -> dict[str, Any]:
    """What is said of any parameter; `arrays` are what it consists of."""
    return {
        "name": name,
        **({"kind": kind} if kind else {}),
        "shape": list(shape),
        "dtype": "/".join(dict.fromkeys(map(type_of, arrays))),
        "parameters": sum(math.prod(x.shape) for x in arrays),
        "bytes": sum(x.nbytes for x in arrays),
    }


def _of_checkpoint(path: str | os.PathLike) -> Inspection:
    found = restored(path)
    rows = []
    for name, node in flatten(found.adapters, is_leaf=is_node).items():
        kind = f"{len(node.index)} rows" if isinstance(node, Rows) else type(node).__name__.lower()
        row = _row(name, kind, node.shape, jax.tree.leaves(node))
        if isinstance(node, LowRank):
            row |= {"rank": node.rank, "scale": node.scale, "norm": _norm(node)}
        rows.append(row)
    base = found.base.leaves
    about = {
        "step": found.step,
        "config": found.config and config_to_json(found.config),
        "data": found.data,
        "metrics": found.metrics,
        "base": {"leaves": len(base), "parameters": sum(math.prod(s) for s, _ in base.values())},
    }
    return Inspection("orbax", rows, about)
