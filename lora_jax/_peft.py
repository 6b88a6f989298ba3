"""PEFT in: an adapter folder that PyTorch's PEFT wrote, as an adapter tree."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapters import DoRA, Full, LoRA, Rows, norms
from lora_jax._errors import LoRAError, raise_all
from lora_jax._nnx import state_of
from lora_jax._paths import flatten, nest
from lora_jax._peft_blocks import Block, LeafInfo, factor_a, factor_b, to_leaf
from lora_jax._peft_config import PeftConfig, peft_config
from lora_jax._peft_file import AdapterFile, open_adapter
from lora_jax._peft_find import Finder, finish
from lora_jax._peft_layers import NewRows, Parsed, Update, Value, parse
from lora_jax._peft_map import Entry, TorchMapping, as_table, leaf_infos
from lora_jax._survey import Survey
from lora_jax._targets import Targets


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """What `load_peft` found.

    Attributes:
      adapters: the adapter tree, for `bind` and `merge`.
      config: adapter_config.json.
      mapping: which leaf each torch parameter is: print it, and give it to `save_peft`.
    """

    adapters: dict
    config: Mapping[str, Any]
    mapping: TorchMapping


def load_peft(
    folder: str | os.PathLike,
    params: Any,
    survey: Survey | Targets | None = None,
    *,
    mapping: Mapping[str, Any] | TorchMapping | None = None,
    dtype: Any = None,
    doubled_out_proj: bool = True,
    conv1d: Sequence[str] | None = None,
    experts: Sequence[str] | None = None,
    experts_in_out: bool | None = None,
    keep_base: bool = False,
    ignore: Sequence[str] = (),
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
        are in × out, and all else is an error.
      mapping: {torch name, or regular expression for it: leaf, or list of leaves}. The name is a
        parameter's, or a module's for its weight. The leaf may use the expression's groups, and may
        be a part of a leaf: "layers/q/kernel[{1}]" is one of a stack, "qkv/kernel[:, 0]" one of a
        fused kernel. Several leaves are what a fused torch weight is split into, in the order of
        its outputs. None: found by names and shapes, and an error where that is not certain.
      dtype: of the adapters; None for the type in which they are stored.
      doubled_out_proj: PEFT up to 0.21 adds the update of a MultiheadAttention's out_proj twice, in
        training as in inference; False for an adapter that was trained otherwise.
      conv1d: modules whose square weight is stored (in, out), as GPT-2's Conv1D, rather than (out,
        in); needed only for those that were saved in full.
      experts: the order of the adapted parameters in the torch module of the experts, and
      experts_in_out: whether they are (experts, in, out), where shapes and version do not say it.
      keep_base: use `params` although the file holds another table for an adapted embedding.
      ignore: settings of the configuration to pass over.
      max_bytes: how large the tensors may be together; default twice the base in fp32.

    Returns:
      A `PeftAdapter`.

    Raises:
      LoRAError: a file that is missing, damaged or a pickle; a setting that is not supported; a
        tensor that no leaf, or more than one, fits. All that are found at once are listed.

    >>> import jax.numpy as jnp, lora_jax as lora, tempfile
    >>> params = {"q_proj": {"kernel": jnp.zeros((4, 3))}}
    >>> node = lora.LoRA(jnp.ones((4, 2)), jnp.ones((2, 3)), 0.5, lora.Geometry((0,), (1,)))
    >>> mapping = lora.torch_mapping({"q_proj.weight": (3, 4)}, params)
    >>> folder = tempfile.mkdtemp()
    >>> lora.save_peft(folder, {"q_proj": {"kernel": node}}, mapping)
    >>> loaded = lora.load_peft(folder, params)
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
    file = open_adapter(folder, max_bytes)
    config = peft_config(file.config, file.folder / "adapter_config.json", tuple(ignore))
    parsed = parse(file, config, doubled_out_proj=doubled_out_proj)
    finder = Finder(leaves, as_table(mapping))
    found = _found(parsed, finder, config, conv1d, experts, experts_in_out)
    finish(finder, str(file.folder))
    build = _Build(file, config, flatten(state_of(params)), dtype)
    for entry, what in found:
        build.add(entry, what)
    nodes = build.nodes()
    for copy, key in parsed.copies:
        if not np.array_equal(file.read(copy), file.read(key)):
            build.failures.append(f"'{copy}' and '{key}' should be the same, and are not")
    for table in parsed.tables:
        if not keep_base:
            build.compare(finder.value(table.name, table.shape, False), table)
    finish(finder, str(file.folder))
    raise_all(f"{file.folder}: cannot be used with these parameters:", build.failures)
    return PeftAdapter(nest(nodes), dict(file.config), TorchMapping({e.name: e for e, _ in found}))


def _found(parsed: Parsed, finder: Finder, config: PeftConfig, conv1d, experts, in_out):
    """[(entry, what the file holds for it)] of everything."""
    found: list[tuple[Entry | None, Any]] = [(finder.update(u), u) for u in parsed.updates]
    for group in parsed.experts:
        found += finder.experts(group, config.version, experts, in_out)
    for v in parsed.values:
        module = v.name.removesuffix(".weight")
        named = conv1d is not None and any(f".{module}".endswith("." + c) for c in conv1d)
        unknown = conv1d is None and config.fan_in_fan_out
        found.append((finder.value(v.name, v.shape, None if unknown else named), v))
    for r in parsed.rows:
        found.append((finder.rows(r), r))
    return [(e, what) for e, what in found if e is not None]


class _Build:
    """Puts together what falls on one leaf."""

    def __init__(self, file: AdapterFile, config: PeftConfig, params: dict[str, Any], dtype):
        self.file, self.config, self.params, self.dtype = file, config, params, dtype
        self.failures: list[str] = []
        self.leaves: dict[str, LeafInfo] = {}
        # leaf: [(entry, position among its blocks, what)]
        self.on: dict[str, list[tuple[Entry, int, Any]]] = {}

    def add(self, entry: Entry, what: Any) -> None:
        for i, b in enumerate(entry.blocks):
            self.leaves[b.leaf.path] = b.leaf
            self.on.setdefault(b.leaf.path, []).append((entry, i, what))

    def nodes(self) -> dict[str, Any]:
        """{leaf: node}, in the order of the parameters."""
        out = {}
        for path in self.params:
            if path not in self.on:
                continue
            kinds = {type(what) for _, _, what in self.on[path]}
            names = ", ".join(e.name for e, _, _ in self.on[path][:4])
            if len(kinds) > 1:
                self.failures.append(f"'{path}' is changed in two ways, by {names}")
            elif self._tied(path, kinds.pop(), names):
                make = {Update: self._lora, Value: self._full, NewRows: self._rows}
                out[path] = make[type(self.on[path][0][2])](path, self.on[path])
        return out

    def _tied(self, path, kind, names) -> bool:
        """Whether PEFT's change of one of two tied weights means the same here."""
        if not self.leaves[path].tied or kind is NewRows or self.config.tying:
            return True
        if kind is Value and len(self.on[path]) > 1:
            return True  # both in full; they are compared
        self.failures.append(
            f"'{path}' is the embedding and the head, but the file changes {names} alone; untie "
            "them in the model, or train with ensure_weight_tying in PEFT"
        )
        return False

    def _cast(self, array: np.ndarray) -> jax.Array:
        return jnp.asarray(array if self.dtype is None else array.astype(self.dtype))

    def _take(self, taken: np.ndarray, region, path, name) -> None:
        if taken[region].any():
            self.failures.append(f"'{path}': '{name}' falls on what another parameter is already")
        taken[region] = True

    def _lora(self, path: str, pieces) -> LoRA | DoRA:
        """One node from one low-rank update or several, on different parts of the leaf.

        Parts of the batch axes keep their rank (the smaller are padded with zeros); parts of the
        out axes get a range of ranks each, and B is block-diagonal.
        """
        leaf = self.leaves[path]
        g = leaf.geometry
        taken = np.zeros([leaf.shape[d] for d in (*g.batch_axes, *g.out_axes)], bool)
        regions: dict[tuple, int] = {}
        for entry, i, u in pieces:
            b = entry.blocks[i]
            self._take(taken, b.region((*g.batch_axes, *g.out_axes)), path, entry.name)
            out = tuple(b.index[d] for d in g.out_axes)
            regions[out] = max(regions.get(out, 0), u.rank)
        first = dict(zip(regions, np.cumsum([0, *regions.values()])))
        rank = sum(regions.values())
        types = {self.file.tensors[k].dtype for _, _, u in pieces for k in (u.a, u.b)}
        types |= {np.dtype(np.float32) for _, _, u in pieces if u.e}
        scale = pieces[0][2].scale
        same = len(types) == 1 and all(u.scale == scale for _, _, u in pieces)
        dtype = types.pop() if same else np.dtype(np.float32)
        a, b = (np.zeros(s, dtype) for s in g.factor_shapes(leaf.shape, rank))
        for entry, i, u in pieces:
            block = entry.blocks[i]
            start = sum(x.n_out for x in entry.blocks[:i])
            at = slice(first[tuple(block.index[d] for d in g.out_axes)], None)
            at = slice(at.start, at.start + u.rank)
            own_a, own_b = u.arrays(self.file)
            own_b = own_b[:, start : start + block.n_out]
            if u.scale != scale:
                own_b = own_b.astype(np.float32) * (u.scale / scale if scale else 0.0)
            a[(*block.region((*g.batch_axes, *g.in_axes)), at)] = factor_a(own_a, block)
            b[(*block.region(g.batch_axes), at, *block.region(g.out_axes))] = factor_b(own_b, block)
        embedding = leaf.kind == "embedding" or pieces[0][0].kind == "embedding"
        node = LoRA(self._cast(a), self._cast(b), float(scale), g, self.config.dropout, embedding)
        return self._dora(path, pieces, node, taken.all()) if self.config.dora else node

    def _dora(self, path: str, pieces, node: LoRA, whole: bool) -> DoRA:
        """The node with the magnitudes of all parts; where there is none, the norms themselves."""
        g = node.geometry
        dtype = np.result_type(*{self.file.tensors[u.magnitude].dtype for _, _, u in pieces})
        if whole:
            m = np.zeros([node.shape[d] for d in (*g.batch_axes, *g.out_axes)], dtype)
        else:
            m = np.array(norms(node, jnp.asarray(self._base(path)))).astype(dtype)
        for entry, i, u in pieces:
            block = entry.blocks[i]
            if block.sizes(g.in_axes) != tuple(node.shape[d] for d in g.in_axes):
                self.failures.append(f"'{path}': '{entry.name}' scales a part of its inputs alone")
            start = sum(x.n_out for x in entry.blocks[:i])
            own = self.file.read(u.magnitude).reshape(1, -1, 1)[:, start : start + block.n_out]
            own = factor_b(own, block).squeeze(len(g.batch_axes))
            m[block.region((*g.batch_axes, *g.out_axes))] = own
        return node.with_magnitude(self._cast(m))

    def _full(self, path: str, pieces) -> Full:
        leaf = self.leaves[path]
        taken = np.zeros(leaf.shape, bool)
        parts: list[tuple[Block, np.ndarray]] = []
        for entry, i, v in pieces:
            block = entry.blocks[i]
            value = to_leaf(self._value(entry, v), entry.layout, entry.blocks)[i]
            twice = leaf.tied and any(b == block and np.array_equal(x, value) for b, x in parts)
            if not twice:
                self._take(taken, block.slices, path, entry.name)
            parts.append((block, value))
        dtype = np.result_type(*{x.dtype for _, x in parts}) if parts else np.float32
        out = np.zeros(leaf.shape, dtype) if taken.all() else self._base(path).astype(dtype)
        for block, value in parts:
            out[block.slices] = value
        return Full(self._cast(out))

    def _value(self, entry: Entry, v: Value) -> np.ndarray:
        """The parameter's new value, as torch would have it."""
        if v.add is None:
            return self.file.read(v.key)
        add = self.file.read(v.add).astype(np.float32) * np.float32(v.scale)
        if v.key is not None:
            return self.file.read(v.key).astype(np.float32) + add
        base = [self._base(b.leaf.path)[b.slices].reshape(-1) for b in entry.blocks]
        return np.concatenate(base).astype(np.float32) + add

    def _base(self, path: str) -> np.ndarray:
        if isinstance(self.params[path], jax.ShapeDtypeStruct):
            raise LoRAError(f"'{path}': the file changes a part of it; pass its values in `params`")
        return np.array(self.params[path])

    def _rows(self, path: str, pieces) -> Rows:
        (entry, _, r), *others = pieces
        if others:
            self.failures.append(f"'{path}': rows of it are there twice, '{others[0][0].name}'")
        return Rows(self._cast(self.file.read(r.key)), r.index, entry.blocks[0].leaf.shape[0])

    def compare(self, entry: Entry | None, table: Value) -> None:
        """PEFT stores the frozen table beside an adapted embedding, and puts it in the base's
        place; here it must be the base's."""
        if entry is None:
            return
        stored = to_leaf(self.file.read(table.key), entry.layout, entry.blocks)
        for b, value in zip(entry.blocks, stored):
            base = self._base(b.leaf.path)[b.slices]
            differ = int((base != value.astype(base.dtype)).any(axis=-1).sum())
            if differ:
                self.failures.append(
                    f"'{table.key}': {differ} rows differ from '{b}'; put the file's table into "
                    "the parameters, or load_peft(..., keep_base=True)"
                )
