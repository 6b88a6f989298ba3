"""A PEFT folder as a checkpoint of ours, and back."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lora_jax._cli.inspect import kind_of, of_orbax, only_files, restored
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.geometry import Geometry
from lora_jax._core.paths import flatten, nest
from lora_jax._nodes.adapters import LowRank
from lora_jax._nodes.node import is_node
from lora_jax._survey import Survey
from lora_jax._targets import Targets
from lora_jax.checkpoint._checkpoint import save as save_checkpoint
from lora_jax.peft._blocks import LeafInfo, block
from lora_jax.peft._file import DTYPES, Stored, opened, read_json
from lora_jax.peft._files import replacing, writing
from lora_jax.peft._find import Finder
from lora_jax.peft._load import load
from lora_jax.peft._mapping import Entry, TorchMapping, leaf_infos
from lora_jax.peft._safetensors import open_base
from lora_jax.peft._save import of_kind, ordered, unordered
from lora_jax.peft._save import save as save_adapter
from lora_jax.peft._settings import unknown

PARAMS = (
    "a safetensors file or folder whose names are the paths of the leaves, an orbax checkpoint of "
    "the parameters, or module:function"
)


def to_orbax(
    folder: str | os.PathLike, out: str | os.PathLike, params: Any, **options: Any
) -> TorchMapping:
    """Writes the adapter of a PEFT folder as step 0 of a new checkpoint directory, by `options` of
    `lora.peft.load`. Its `data` holds the configuration and the mapping, for `to_peft`."""
    # Without the limit of `load`: the size of the file is the person's choice.
    found = load(folder, params, max_bytes=1 << 62, **options)
    data = {"peft": {"config": dict(found.config), "mapping": mapping_to_json(found.mapping)}}
    # Orbax makes the directory itself, under the temporary name.
    with replacing(Path(out)) as new, of_orbax(Path(out)):
        _room(new, sum(x.nbytes for x in jax.tree.leaves(found.adapters)))
        with ocp.CheckpointManager(new.absolute()) as manager:
            save_checkpoint(manager, 0, found.adapters, base=params, data=data)
            manager.wait_until_finished()
    return found.mapping


def _room(path: Path, size: int) -> None:
    """Refuses a disk that is full, or a limit on files, before orbax and its threads are asked,
    which would print their own tracebacks."""
    with writing(path), open(path, "xb") as file:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
    path.unlink()


def to_peft(
    directory: str | os.PathLike,
    out: str | os.PathLike,
    params: Any,
    survey: Survey | Targets | None,
    mapping: Mapping[str, Any] | None,
    torch: Mapping[str, Sequence[int]] | None,
    experts: Sequence[str] | None,
    experts_a: str | None,
) -> TorchMapping:
    """Writes a checkpoint's adapters as a new PEFT folder; returns the mapping that was used.

    Args:
      directory: the checkpoints, of which the latest is taken, or a step in it.
      params, survey: the base, to be compared with the checkpoint's; None does not.
      torch: {torch name: shape}, of which those are taken that the adapters change. None: what
        `to_orbax` wrote into the checkpoint.
      mapping, experts, experts_a: as in `lora.peft.mapping`; () for the order of `torch`.
    """
    found = restored(directory, params)
    # What `to_orbax` left in the checkpoint's data; a training run may have put anything there.
    stored = _inside(found.data, "peft")
    if torch is None and not stored:
        raise LoRAError(
            f"{directory}: the checkpoint does not say which torch parameters its leaves are; name "
            "the torch model, --torch model.safetensors"
        )
    if torch is None:
        try:
            chosen = mapping_from_json(stored["mapping"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            raise LoRAError(
                f"{directory}: its mapping is damaged: {e!r:.200}; name the torch model: "
                "--torch model.safetensors"
            ) from e
    else:
        chosen = _mapping(found.adapters, params, survey, mapping, torch, experts_a or "in")
        if experts is None:
            raise_all(f"{directory}: cannot be written for PEFT:", unordered(chosen.entries))
        chosen = TorchMapping(ordered(chosen.entries, list(experts or ())))
    config = _inside(stored, "config")
    with replacing(Path(out)) as new:
        save_adapter(
            new,
            found.adapters,
            chosen,
            task_type=config.get("task_type"),
            base_model_name=config.get("base_model_name_or_path"),
            config=unknown(config),
        )
    return chosen


def _inside(data: Any, name: str) -> dict[str, Any]:
    found = data.get(name) if isinstance(data, dict) else None
    return found if isinstance(found, dict) else {}


def _mapping(
    adapters: Any,
    params: Any,
    survey: Survey | Targets | None,
    table: Mapping[str, Any] | None,
    torch: Mapping[str, Sequence[int]],
    experts_a: str,
) -> TorchMapping:
    """The torch parameters that lie on adapted leaves."""
    nodes = flatten(adapters, is_leaf=is_node)
    # Without parameters the nodes say all that there is to know of the leaves.
    infos = leaf_infos(params, survey) if params is not None else {}
    for path, node in nodes.items():
        info = infos.get(path, LeafInfo(path, tuple(node.shape), None))
        if isinstance(node, LowRank):
            kind = "embedding" if node.embedding else info.kind.replace("?", "linear")
            info = dataclasses.replace(info, geometry=node.geometry, kind=kind)
        infos[path] = info
    finder, found = Finder(infos, table), {}
    for name, shape in torch.items():
        # A torch model has many parameters that are not adapted: what fails there does not count.
        finder.failures.clear()
        entry = finder.value(name, tuple(shape))
        if entry is None or not {b.leaf.path for b in entry.blocks} & nodes.keys():
            continue
        if finder.failures:
            raise LoRAError(finder.failures[0])
        # A leaf in full is written as it lies; only low-rank ones have a kind and a side.
        low = isinstance(nodes.get(entry.blocks[0].leaf.path), LowRank)
        found[name] = of_kind(entry, experts_a) if low else entry
    return TorchMapping(found)


def mapping_to_json(mapping: TorchMapping) -> dict[str, Any]:
    """A mapping without the parameters that it is of."""
    # Several entries may lie on one leaf (layers of a stack): each leaf once, blocks by their text.
    leaves = {b.leaf.path: b.leaf for e in mapping.entries.values() for b in e.blocks}
    return {
        "leaves": {path: dataclasses.asdict(leaf) for path, leaf in leaves.items()},
        "entries": [
            dataclasses.asdict(e) | {"blocks": [str(b) for b in e.blocks]}
            for e in mapping.entries.values()
        ],
    }


def mapping_from_json(x: Mapping[str, Any]) -> TorchMapping:
    """What `mapping_to_json` wrote, also after a pass through JSON."""
    leaves = {}
    for path, leaf in x["leaves"].items():
        # JSON has made lists of tuples.
        g = leaf["geometry"]
        geometry = g and Geometry(**{k: tuple(v) for k, v in g.items()})
        own = {"path": path, "shape": tuple(leaf["shape"]), "geometry": geometry}
        leaves[path] = LeafInfo(**leaf | own)
    found = {}
    for e in x["entries"]:
        blocks = tuple(block(text, leaves) for text in e["blocks"])
        shape = e["shape"] and tuple(e["shape"])
        found[e["name"]] = Entry(**e | {"blocks": blocks, "shape": shape})
    return TorchMapping(found)


def read_params(text: str) -> tuple[Any, Survey | Targets | None]:
    """The parameters that a person names on the command line, and their survey if there is one.

    Args:
      text: a safetensors file or folder, of which only names, shapes and types are read; an orbax
        checkpoint of the parameters, likewise; or "module:function", imported from the working
        directory, which returns parameters, abstract or not, or (parameters, survey).
    """
    path = Path(text)
    if path.is_file() or (path.is_dir() and any(path.glob("*.safetensors"))):
        tensors = open_base(path).tensors
        # Names as paths, or with dots, as torch has them.
        separator = "/" if any("/" in n for n in tensors) else "."
        odd = sorted({t.type for t in tensors.values()} - DTYPES.keys() - _OTHER.keys())
        if odd:
            raise LoRAError(f"{path}: parameters of type {', '.join(odd)} are not known")
        return nest({n.replace(separator, "/"): _abstract(t) for n, t in tensors.items()}), None
    if path.is_dir():
        return _of_orbax(path), None
    if path.exists():
        # It raises, and says that it is a pipe or a device.
        opened(path).close()
    if ":" in text:
        return _called(text)
    raise LoRAError(f"--params {text}: there is no such file; expected {PARAMS}")


_OTHER = {"F64": "float64", "I64": "int64", "I32": "int32", "U8": "uint8", "BOOL": "bool"}


def _abstract(t: Stored) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(t.shape, DTYPES.get(t.type, _OTHER.get(t.type)))


def _of_orbax(path: Path) -> Any:
    only_files(path)
    # The folder itself or its latest step; in it the tree, or the item that managers write.
    steps = sorted((p for p in path.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))
    for root in (path, *steps[-1:]):
        for folder in (root, root / "default", root / "params"):
            if (folder / "_METADATA").is_file():
                with of_orbax(folder):
                    found: Any = (
                        ocp.StandardCheckpointer().metadata(folder.absolute()).item_metadata
                    )
                is_leaf = lambda x: hasattr(x, "shape") and hasattr(x, "dtype")
                # Orbax's metadata of arrays; no array is read.
                shapes = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
                return jax.tree.map(shapes, found.tree, is_leaf=is_leaf)
    raise LoRAError(f"--params {path}: holds no parameters; expected {PARAMS}")


def _called(text: str) -> tuple[Any, Survey | Targets | None]:
    module, _, name = text.partition(":")
    # An installed command does not have it, as `python -m` has.
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as e:
        raise LoRAError(f"--params {text}: {e}; expected {PARAMS}") from e
    finally:
        sys.path.remove(os.getcwd())
    found = function()
    pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Survey | Targets)
    return found if pair else (found, None)


def read_table(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """({torch name or expression: leaf or leaves}, {torch name: shape}) of a JSON file that may
    hold both."""
    found = read_json(Path(path))
    is_shape = lambda x: isinstance(x, list) and all(type(n) is int for n in x)
    shapes = {k: v for k, v in found.items() if is_shape(v)}
    return {k: v for k, v in found.items() if k not in shapes}, shapes


def read_torch(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a torch model: a safetensors file, a folder, or JSON."""
    return dict(read_table(path)[1]) if Path(path).suffix == ".json" else open_base(path).shapes


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    params: str | None,
    mapping: str | os.PathLike | None = None,
    torch: str | os.PathLike | None = None,
    to: str | None = None,
    experts: Sequence[str] | None = None,
    experts_a: str | None = None,
    **options: Any,
) -> TorchMapping:
    """Converts in the direction that `src` asks for; paths and texts as on the command line, and
    `options` of `lora.peft.load`."""
    kind = kind_of(src)
    if kind == "base" or to == kind:
        raise LoRAError(
            f"{src} is {'a base model' if kind == 'base' else 'in that form already'}; expected a "
            "PEFT folder, or a checkpoint directory of lora.checkpoint.save"
        )
    table, shapes = ({}, {}) if mapping is None else read_table(mapping)
    shapes |= {} if torch is None else read_torch(torch)
    if params is None and kind == "peft":
        raise LoRAError(f"--params is needed: {PARAMS}")
    tree, survey = (None, None) if params is None else read_params(params)
    along = {"mapping": table or None, "experts_a": experts_a}
    if kind == "peft":
        return to_orbax(src, dst, tree, survey=survey, experts=experts, **along, **options)
    # The order of the experts: JSON and the checkpoint keep it, safetensors need not.
    known = torch is None or Path(torch).suffix == ".json"
    experts = () if known and experts is None else experts
    return to_peft(src, dst, tree, survey, torch=shapes or None, experts=experts, **along)
