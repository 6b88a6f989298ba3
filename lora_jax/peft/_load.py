"""PEFT in: an adapter folder that PyTorch's PEFT wrote, as an adapter tree."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax._core.errors import raise_all
from lora_jax._core.nnx import state_of
from lora_jax._core.paths import flatten, nest
from lora_jax._survey import Survey
from lora_jax._targets import Targets
from lora_jax.peft._build import Build
from lora_jax.peft._config import PeftConfig, peft_config, unknown
from lora_jax.peft._experts import on_leaves
from lora_jax.peft._file import open_adapter
from lora_jax.peft._find import Finder, finish
from lora_jax.peft._mapping import Entry, TorchMapping, as_table, leaf_infos
from lora_jax.peft._parse import parse
from lora_jax.peft._parts import Parsed, Update


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """What `lora.peft.load` found.

    Attributes:
      adapters: the adapter tree, for `bind` and `merge`.
      config: adapter_config.json.
      unknown: what it holds that PEFT 0.17 to 0.21 does not know, for `lora.peft.save(config=)`.
      mapping: which leaf each torch parameter is: print it, and give it to `lora.peft.save`.

    >>> import jax.numpy as jnp, lora_jax as lora, tempfile
    >>> params, folder = {"q_proj": {"kernel": jnp.zeros((4, 3))}}, tempfile.mkdtemp()
    >>> node = lora.LoRA(jnp.ones((4, 2)), jnp.ones((2, 3)), 0.5, lora.Geometry((0,), (1,)))
    >>> mapping = lora.peft.mapping({"q_proj.weight": (3, 4)}, params)
    >>> lora.peft.save(folder, {"q_proj": {"kernel": node}}, mapping)
    >>> found = lora.peft.load(folder, params)
    >>> found.adapters["q_proj"]["kernel"].rank, found.config["lora_alpha"], list(found.mapping)
    (2, 1, ['q_proj.weight'])
    """

    adapters: dict
    config: Mapping[str, Any]
    mapping: TorchMapping

    @property
    def unknown(self) -> dict[str, Any]:
        return unknown(self.config)


def load(
    folder: str | os.PathLike,
    params: Any,
    survey: Survey | Targets | None = None,
    *,
    mapping: Mapping[str, Any] | TorchMapping | None = None,
    dtype: Any = None,
    doubled_out_proj: bool = True,
    conv1d: Sequence[str] | None = None,
    experts: Sequence[str] | None = None,
    experts_a: str | None = None,
    keep_base: bool = False,
    ignore: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    max_bytes: int | None = None,
) -> PeftAdapter:
    """Reads an adapter that PEFT saved, LoRA, DoRA or AdaLoRA, for the parameters of a JAX model.

    Every tensor of the file is used, or the call fails. The folder may come from a stranger: it is
    checked before anything is allocated, and nothing in it is run.

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors.
      params: the base parameters. Their values are read only where the file changes a part of a
        leaf, or adds to a bias; else they may be abstract.
      survey: how the function uses each leaf, or the `Targets` made of it. Without one, matrices
        are in × out, but for square ones without a name of Flax's; all else is an error.
      mapping: {torch name, or regular expression for it: leaf, or list of leaves}. The name is a
        parameter's, or a module's for its weight. The leaf may use the expression's groups, and may
        be a part of a leaf: "layers/q/kernel[{1}]" is one of a stack, "qkv/kernel[:, 0]" one of a
        fused kernel. Several leaves are what a fused torch weight is split into, in the order of
        its outputs. What it does not name is found by names and shapes, and an error where that is
        not certain; a name may lack first parts such as "model" or "transformer", but none that
        tells parts apart.
      dtype: of the adapters; None for the type in which they are stored.
      doubled_out_proj: PEFT up to 0.21 adds the update of a MultiheadAttention's out_proj twice, in
        training as in inference; False for an adapter that was trained otherwise.
      conv1d: modules whose square weight is stored (in, out), as GPT-2's Conv1D, rather than (out,
        in); needed only for those that were saved in full.
      experts: the order of the adapted parameters in the torch module of the experts, such as
        ["gate_up_proj", "down_proj"], where their shapes do not say which tensor is whose.
      experts_a: what lora_A of the experts runs along, "in" or "out", where the shapes fit both.
        Since PEFT 0.19.1 it is "in", but for parameters (experts, in, out) of a module without
        `is_transposed`; up to 0.18 it is the first of the two axes.
      keep_base: use `params` although the file holds another table for an adapted embedding.
      ignore: settings of the configuration to pass over; "r" where the tensors have other ranks.
      rename: {regular expression: text} to be replaced in the names of the tensors, one after the
        other, where they are not PEFT's: {"^": "base_model.model."}, {r"_orig_mod\\.": ""}.
      max_bytes: how large the tensors may be together; default twice the base in fp32.

    Returns:
      A `PeftAdapter`.

    Raises:
      LoRAError: a file that is missing, damaged or a pickle; a setting that is not supported; a
        tensor that no leaf, or more than one, fits. All that are found at once are listed.

    >>> import jax.numpy as jnp, lora_jax as lora, tempfile
    >>> params = {"q_proj": {"kernel": jnp.zeros((4, 3))}}
    >>> node = lora.LoRA(jnp.ones((4, 2)), jnp.ones((2, 3)), 0.5, lora.Geometry((0,), (1,)))
    >>> mapping = lora.peft.mapping({"q_proj.weight": (3, 4)}, params)
    >>> folder = tempfile.mkdtemp()
    >>> lora.peft.save(folder, {"q_proj": {"kernel": node}}, mapping)
    >>> loaded = lora.peft.load(folder, params)
    >>> print(loaded.mapping)
    torch          kind    leaf           shape   in   out  batch
    -------------  ------  -------------  ------  ---  ---  -----
    q_proj.weight  linear  q_proj/kernel  (4, 3)  (0)  (1)  -
    >>> loaded.adapters["q_proj"]["kernel"].scale
    0.5
    """
    leaves = leaf_infos(params, survey)
    if max_bytes is None:
        max_bytes = max(8 * sum(math.prod(x.shape) for x in leaves.values()), 64 << 20)
    file = open_adapter(folder, max_bytes, rename)
    config = peft_config(
        file.config, file.folder / "adapter_config.json", tuple(ignore), len(file.tensors)
    )
    parsed = parse(file, config, doubled_out_proj=doubled_out_proj)
    finder = Finder(leaves, as_table(mapping))
    found = _found(parsed, finder, config, conv1d, experts, experts_a)
    finish(finder, str(file.folder))
    build = Build(file, config, flatten(state_of(params)), dtype)
    for entry, what in found:
        build.add(entry, what)
    nodes = build.nodes()
    build.failures += parsed.unequal(file)
    for table in parsed.tables:
        if not keep_base:
            build.compare(finder.value(table.name, table.shape, ()), table)
    finish(finder, str(file.folder))
    raise_all(f"{file.folder}: cannot be used with these parameters:", build.failures)
    entries = {entry.name: entry for entry, _ in found}
    return PeftAdapter(nest(nodes), dict(file.config), TorchMapping(entries, build.untouched))


def _found(
    parsed: Parsed,
    finder: Finder,
    config: PeftConfig,
    conv1d: Sequence[str] | None,
    experts: Sequence[str] | None,
    along: str | None,
) -> list[tuple[Entry, Any]]:
    """[(entry, what the file holds for it)] of everything."""
    found: list[tuple[Entry | None, Any]] = [finder.update(u) or (None, u) for u in parsed.updates]
    for group in parsed.experts:
        for entry, u in on_leaves(group, finder, experts, along):
            found.append((dataclasses.replace(entry, swapped=_swapped_now(u, config)), u))
    for v in parsed.values:
        fan = config.fan_in_fan_out
        found.append((finder.value(v.name, v.shape, conv1d, fan_in_fan_out=fan), v))
    for r in parsed.rows:
        found.append((finder.rows(r), r))
    return [(e, what) for e, what in found if e is not None]


def _swapped_now(update: Update, config: PeftConfig) -> bool:
    """Whether today's PEFT has A of these experts along their outputs; see `on_leaves`."""
    if config.version is None or config.version < (0, 19):
        return False
    return update.swapped != (config.version == (0, 19, 0))
