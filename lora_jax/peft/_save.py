"""PEFT out: an adapter tree as a folder that PyTorch's PEFT and vLLM load."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lora_jax._core import compat
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.numbers import Number, integer, refused
from lora_jax._core.paths import flatten
from lora_jax._nodes.factors import check_factors
from lora_jax._nodes.node import is_node
from lora_jax._survey import Survey
from lora_jax._targets import Targets
from lora_jax.peft._arguments import as_names, as_path, check_arrays, check_texts, one_of
from lora_jax.peft._config import peft_config
from lora_jax.peft._export import Export
from lora_jax.peft._file import CONFIG, DTYPES, TENSORS, is_finite
from lora_jax.peft._files import partial, remove, writing
from lora_jax.peft._find import Finder, finish
from lora_jax.peft._hub import folder as folder_of
from lora_jax.peft._keys import NO_NAME, PREFIX, is_name
from lora_jax.peft._mapping import Entry, TorchMapping, as_table, leaf_infos
from lora_jax.peft._names import is_head
from lora_jax.peft._orders import Orders
from lora_jax.peft._safetensors import INDEX, called, open_base
from lora_jax.peft._servers import TARGETS
from lora_jax.peft._slot import on_host

# A rank that the file may have, see `peft_config`.
RANK = Number("an integer >= 1 and < 16,777,216", lambda x: 1 <= x < 1 << 24, whole=True)


def mapping(
    names: Mapping[str, Sequence[int]] | str | os.PathLike,
    params: Any,
    survey: Survey | Targets | None = None,
    *,
    mapping: Mapping[str, Any] | None = None,
    conv1d: Sequence[str] | None = None,
    experts: Sequence[str] | None = None,
    experts_a: str = "in",
    ignore: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
) -> TorchMapping:
    """Which leaf each parameter of a torch model is, for `lora.peft.save`.

    Args:
      names: {torch name: shape}, as in a state dict, of those that are to be mapped; or what
        `lora.peft.load_base` takes: the base's folder, its file or index, or its name on the hub,
        of which headers are read.
      params, survey, mapping: as in `lora.peft.load`.
      conv1d, ignore, rename: as in `lora.peft.load_base`.
      experts: the order of the parameters in the torch module of the experts, on which PEFT's names
        depend; None: that of `names`. A safetensors file does not keep it.
      experts_a: what PEFT's lora_A of the experts runs along: "in", or "out" where they are
        (experts, in, out) in a module without `is_transposed`.

    Raises:
      LoRAError: a file that is missing or damaged; parameters that no leaf, or more than one,
        fits.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> params = {"layers_0": {"q": {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}}}
    >>> names = {"model.layers.0.q.weight": (3, 4), "model.layers.0.q.bias": (3,)}
    >>> print(lora.peft.mapping(names, params))
    torch                    kind    leaf               shape   in   out  batch
    -----------------------  ------  -----------------  ------  ---  ---  -----
    model.layers.0.q.weight  linear  layers_0/q/kernel  (4, 3)  (0)  (1)  -
    model.layers.0.q.bias    value   layers_0/q/bias    (3)     -    -    -
    """
    one_of(experts_a, ("in", "out"), "experts_a")
    shapes = names if isinstance(names, Mapping) else open_base(_at(names)).shapes
    odd = [f"{n!r}: {s!r}" for n, s in shapes.items() if not (isinstance(n, str) and _is_shape(s))]
    raise_all("names: expected {torch name: shape}, such as {'q.weight': (3, 4)}:", odd)
    own = called({n: tuple(s) for n, s in shapes.items()}, ignore, rename, "lora.peft.mapping")
    finder = Finder(leaf_infos(params, survey), as_table(mapping))
    orders = Orders({name: shape for name, (_, shape) in own.items()}, conv1d)
    found = {}
    for name, (torch, shape) in own.items():
        entry = finder.value(name, shape, orders.in_out(name), needed=False)
        if entry is not None:
            found[torch] = of_kind(dataclasses.replace(entry, name=torch), experts_a)
    # A dict has the order of the torch module, a file that of its bytes.
    if experts is None and not isinstance(names, Mapping):
        finder.failures += unordered(found)
    finish(finder, "lora.peft.mapping")
    order = as_names(experts, "experts") or ()
    return TorchMapping(ordered(found, list(order)))


def _is_shape(shape: Any) -> bool:
    fits = lambda n: (size := integer(n)) is not None and size >= 0
    return isinstance(shape, Sequence) and not isinstance(shape, str) and all(map(fits, shape))


def _at(names: str | os.PathLike) -> Path:
    """The folder or file of a base model; of an index, its folder."""
    path = folder_of(names)
    return path.parent if path.name == INDEX else path


def of_kind(entry: Entry, experts_a: str = "in") -> Entry:
    """The entry of a parameter, found by its name and shape, as one that is adapted."""
    kind = _kind(entry)
    head = kind == "linear" and entry.blocks[0].leaf.tied
    swapped = head or (kind == "experts" and experts_a == "out")
    return dataclasses.replace(entry, kind=kind, swapped=swapped)


def _kind(entry: Entry) -> str:
    leaf = entry.blocks[0].leaf
    if leaf.geometry is None:
        return "value"
    # Parameters of experts have names of their own, such as gate_up_proj.
    if not entry.name.endswith(("weight", "bias")):
        return "experts"
    # Before the embedding, which the leaf of a tied head is.
    if leaf.tied and is_head(entry.name):
        return "linear"
    if leaf.kind == "embedding":
        return "embedding"
    return "conv" if len(entry.shape or ()) > 2 else "linear"


def _by_module(found: Mapping[str, Entry]) -> dict[str, list[str]]:
    """The experts' parameters, in their order."""
    modules: dict[str, list[str]] = {}
    for name, entry in found.items():
        if entry.kind == "experts":
            modules.setdefault(name.rpartition(".")[0], []).append(name)
    return modules


def unordered(found: Mapping[str, Entry]) -> Iterator[str]:
    """What is to be said where `found` has experts in no order that means something."""
    for module, names in _by_module(found).items():
        if len(names) > 1:
            last = [n.rpartition(".")[2] for n in names]
            yield (
                f"'{module}' has {', '.join(last)}, and PEFT's names depend on their order in the "
                "torch module, which the file does not keep: "
                f"lora.peft.mapping(..., experts={last})"
            )


def ordered(found: Mapping[str, Entry], order: list[str]) -> dict[str, Entry]:
    """With the parameters of each module of experts in the order given."""
    place = {}
    for names in _by_module(found).values():
        last = {n: n.rpartition(".")[2] for n in names}
        after = sorted(
            names, key=lambda n: order.index(last[n]) if last[n] in order else len(order)
        )
        place |= dict(zip(names, after))
    return {place.get(n, n): found[place.get(n, n)] for n in found}


def save(
    folder: str | os.PathLike,
    adapters: Any,
    mapping: TorchMapping,
    *,
    uniform_rank: bool | int = False,
    base_model_name: str | None = None,
    task_type: str | None = None,
    dtype: Any = None,
    doubled_out_proj: bool = True,
    config: Mapping[str, Any] | None = None,
    target: str = "peft",
    slot: int | None = None,
) -> None:
    """Writes adapters as PEFT 0.21 does: adapter_config.json and adapter_model.safetensors.

    What `lora.peft.load` read of whose adapter it is, it writes again: the mapping has it.

    Ranks and alphas that differ stand in patterns that name one module each. A leaf of which torch
    has several modules is taken apart, several leaves of one torch module are put together; both
    are exact. The files take their place in `folder` once both are complete.

    Args:
      folder: is made if need be; an adapter in it is replaced.
      adapters: `LoRA`, `Full` and `Rows` nodes; `DoRA` for all modules or none.
      mapping: which leaf each torch parameter is: `lora.peft.load(...).mapping`, or
        `lora.peft.mapping`.
        The parameters of one module of experts stand in it in the torch module's own order.
      uniform_rank: one rank and one alpha for all modules, as vLLM reads no patterns: the largest,
        or the given one; smaller ones are padded with zeros. vLLM loads no leaf in full either.
      base_model_name: base_model_name_or_path of the configuration; None: the mapping's.
      task_type: such as "CAUSAL_LM"; None: the mapping's.
      dtype: of the tensors, float32, bfloat16 or float16; None for the adapters' own.
      doubled_out_proj: halve the update of a MultiheadAttention's out_proj, as PEFT adds it twice.
      config: further settings of adapter_config.json, before those that the mapping has.
      target: "vllm" or "sglang-jax": what these servers cannot load is an error.
      slot: of a stack in the place of `adapters`, whose arrays are read where they lie: the same
        file as of `lora.algebra.choose(stacked, slot)`, without a copy on the devices.

    Raises:
      LoRAError: a leaf that the mapping lacks, or of which it has a part only; a torch module that
        PEFT cannot adapt so; what `target` cannot load, each with what to do; a number that is not
        finite, also in `dtype`; a full disk. Nothing is written then.

    >>> import json, pathlib, tempfile, jax.numpy as jnp, lora_jax as lora
    >>> params = {"q": {"kernel": jnp.zeros((4, 3))}}
    >>> node = lora.LoRA(jnp.ones((4, 2)), jnp.ones((2, 3)), 4.0, lora.Geometry((0,), (1,)))
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> mapping = lora.peft.mapping({"q.weight": (3, 4)}, params)
    >>> lora.peft.save(folder, {"q": {"kernel": node}}, mapping, task_type="CAUSAL_LM")
    >>> config = json.loads((folder / "adapter_config.json").read_text())
    >>> config["r"], config["lora_alpha"], config["target_modules"]
    (2, 8, ['q'])
    """
    if not isinstance(mapping, TorchMapping):
        raise LoRAError(
            f"mapping: expected a TorchMapping, found {type(mapping).__name__}: "
            "lora.peft.load(...).mapping, or lora.peft.mapping(names, params, survey)"
        )
    one_of(target, TARGETS, "target")
    check_texts(base_model_name=base_model_name, task_type=task_type)
    if not isinstance(config, Mapping | None):
        raise LoRAError(f"config: expected a dict of settings, found {type(config).__name__}")
    folder = as_path(folder)
    if not isinstance(uniform_rank, bool):
        asked = refused(uniform_rank=(uniform_rank, RANK))
        raise_all("lora.peft.save(..., uniform_rank=True), or 8:", asked)
    check_arrays(adapters, "lora.peft.save(folder, adapters, mapping)")
    nodes = flatten(adapters if slot is None else on_host(adapters, slot), is_leaf=is_node)
    check_factors(nodes)
    known = dict(mapping.settings) | dict(config or {})
    out = Export(nodes, mapping, doubled_out_proj)
    out.run(uniform_rank)
    raise_all("these adapters cannot be written for PEFT:", out.failures)
    base, task = (known.pop(n, None) for n in ("base_model_name_or_path", "task_type"))
    if base_model_name not in (None, base) and known.get("revision") == mapping.settings.get(
        "revision"
    ):
        # That of another base.
        known.pop("revision", None)
    settings = out.config(base_model_name or base, task_type or task)
    # Not `inference_mode`: it changes no function.
    said = known.keys() & (settings.keys() - {"inference_mode"})
    out.failures += [f"config: {n!r} follows from the adapters; leave it out" for n in sorted(said)]
    raise_all("these adapters cannot be written for PEFT:", out.failures)
    tensors = {PREFIX + k: v for k, v in out.tensors.items()}
    # What the server will read, with what the caller adds.
    written = {**settings, **known}
    raise_all(f"{target} cannot load these adapters:", TARGETS[target](written, tensors))
    write_folder(folder, tensors, settings, dtype=dtype, more=known)


def write_folder(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
    *,
    dtype: Any = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes both files of an adapter; they take their place once both are complete.

    What is written is what `open_adapter` and `peft_config` would take, but for `more` settings,
    which are not checked; `dtype` is that of the tensors in the file.

    Raises:
      LoRAError: a tensor of a type that PEFT's files do not have here, or with a number that is not
        finite in it; settings that could not be read again; a disk that is full.
    """
    stored = _stored(tensors, dtype)
    # By the reader's own checks.
    peft_config(settings, folder / CONFIG)
    try:
        text = json.dumps({**settings, **(more or {})}, indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise LoRAError(f"config: expected settings that JSON can hold: {e}") from None
    with writing(folder):
        # A folder that this call makes goes again if it fails.
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        new = [partial(folder / name) for name in (TENSORS, CONFIG)]
        try:
            save_file(stored, new[0], metadata={"format": "pt"})
            new[1].write_text(text)
            # Never the settings of one adapter beside the tensors of another.
            (folder / CONFIG).unlink(missing_ok=True)
            os.replace(new[0], folder / TENSORS)
            os.replace(new[1], folder / CONFIG)
            made = False
        finally:
            for path in new:
                remove(path)
            if made:
                folder.rmdir()


def _stored(tensors: Mapping[str, np.ndarray], dtype: Any) -> dict[str, np.ndarray]:
    """The tensors as the file holds them, checked after the cast."""
    kind = np.dtype(dtype) if compat.is_float_type(dtype) else None
    if dtype is not None and kind not in DTYPES.values():
        raise LoRAError(f"dtype={dtype!s:.200}: expected one of {_types()}")
    failures = [] if tensors else ["the tree holds no adapter"]
    out = {}
    for name, value in tensors.items():
        if not is_name(name):
            failures.append(f"{name[:200]!a}: {NO_NAME}")
            continue
        if kind is None and value.dtype not in DTYPES.values():
            failures.append(f"'{name}' is {value.dtype}; write it as one of {_types()}: dtype=")
            continue
        with np.errstate(over="ignore"):
            # In C order, as the file has the buffer as it lies.
            cast = np.ascontiguousarray(value if kind is None else value.astype(kind))
            fits = is_finite(cast)
            finite = fits or np.isfinite(value.astype(np.float32)).all()
        if not finite:
            failures.append(
                f"'{name}' holds NaN or infinity; take an earlier checkpoint, or less of it"
            )
        elif not fits:
            failures.append(f"'{name}' holds a number that {kind} does not: dtype='float32'")
        out[name] = cast
    raise_all("these adapters cannot be written for PEFT:", failures)
    return out


def _types() -> str:
    return ", ".join(map(str, DTYPES.values()))
