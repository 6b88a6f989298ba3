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
from lora_jax._peft_blocks import LeafInfo, factor_a, factor_b, to_leaf
from lora_jax._peft_config import PeftConfig, peft_config
from lora_jax._peft_experts import on_leaves
from lora_jax._peft_file import AdapterFile, open_adapter
from lora_jax._peft_find import Finder, finish
from lora_jax._peft_layers import parse
from lora_jax._peft_map import Entry, TorchMapping, as_table, leaf_infos
from lora_jax._peft_parts import NewRows, Parsed, Update, Value
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
    experts_a: str | None = None,
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
      experts: the order of the adapted parameters in the torch module of the experts, such as
        ["gate_up_proj", "down_proj"], where their shapes do not say which tensor is whose.
      experts_a: what lora_A of the experts runs along, "in" or "out", where the shapes fit both.
        Since PEFT 0.19.1 it is "in", but for parameters (experts, in, out) of a module without
        `is_transposed`; up to 0.18 it is the first of the two axes.
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
    config = peft_config(
        file.config, file.folder / "adapter_config.json", tuple(ignore), len(file.tensors)
    )
    parsed = parse(file, config, doubled_out_proj=doubled_out_proj)
    finder = Finder(leaves, as_table(mapping))
    found = _found(parsed, finder, config, conv1d, experts, experts_a)
    finish(finder, str(file.folder))
    build = _Build(file, config, flatten(state_of(params)), dtype)
    for entry, what in found:
        build.add(entry, what)
    nodes = build.nodes()
    for copy, key, turned in parsed.copies:
        value = file.read(key)
        if not np.array_equal(file.read(copy), value.T if turned else value):
            build.failures.append(f"'{copy}' and '{key}' should be the same, and are not")
    for table in parsed.tables:
        if not keep_base:
            build.compare(finder.value(table.name, table.shape, ()), table)
    finish(finder, str(file.folder))
    raise_all(f"{file.folder}: cannot be used with these parameters:", build.failures)
    return PeftAdapter(nest(nodes), dict(file.config), TorchMapping({e.name: e for e, _ in found}))


def _found(parsed: Parsed, finder: Finder, config: PeftConfig, conv1d, experts, along):
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
        if kind is NewRows:
            return self._untied_rows(path)
        if not self.leaves[path].tied or self.config.tying or len(self.on[path]) > 1:
            return True  # where both are changed they are compared
        self.failures.append(
            f"'{path}' is the embedding and the head, but the file changes {names} alone; untie "
            "them in the model, or train with ensure_weight_tying in PEFT"
        )
        return False

    def _untied_rows(self, path) -> bool:
        """PEFT trains the rows of a tied head with the table's, and stores the table's alone; here
        a head that is a copy of the table would keep its own."""
        table, copies = self.params[path], []
        if self.leaves[path].tied or isinstance(table, jax.ShapeDtypeStruct):
            return True
        for other, x in self.params.items():
            if other == path or other in self.on or isinstance(x, jax.ShapeDtypeStruct):
                continue
            turned = getattr(x, "shape", ()) == table.shape[::-1]
            if turned and np.array_equal(np.asarray(x).T, table):
                copies.append(other)
            elif getattr(x, "shape", ()) == table.shape and np.array_equal(x, table):
                copies.append(other)
        for other in copies:
            self.failures.append(
                f"'{other}' holds the values of '{path}', of which the file has new rows: if they "
                "are tied in torch, PEFT changes both; use one leaf for both here. If not, pass "
                "`params` with the values that the two have in torch"
            )
        return not copies

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
        if leaf.tied and len(pieces) > 1:
            pieces = self._once(path, pieces)
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

    def _once(self, path: str, pieces):
        """The updates of a tied embedding and head, which must be one."""
        (_, _, first), *others = pieces
        want = first.arrays(self.file)
        for entry, _, u in others:
            same = u.scale == first.scale and u.rank == first.rank
            if not same or not all(map(np.array_equal, u.arrays(self.file), want)):
                self.failures.append(
                    f"'{path}' is the embedding and the head, which the file changes differently: "
                    f"'{pieces[0][0].name}' and '{entry.name}'; untie them in the model"
                )
        return pieces[:1]

    def _full(self, path: str, pieces) -> Full:
        leaf = self.leaves[path]
        taken = np.zeros(leaf.shape, bool)
        for entry, i, _ in pieces[: 1 if leaf.tied else None]:
            self._take(taken, entry.blocks[i].slices, path, entry.name)
        keys = {k for _, _, v in pieces for k in (v.key, v.add) if k is not None}
        types = {self.file.tensors[k].dtype for k in keys}
        types |= {np.dtype(np.float32) for _, _, v in pieces if v.add is not None}
        dtype = types.pop() if len(types) == 1 else np.dtype(np.float32)
        out = np.zeros(leaf.shape, dtype) if taken.all() else self._base(path).astype(dtype)
        for n, (entry, i, v) in enumerate(pieces):  # one tensor at a time
            at = entry.blocks[i].slices
            value = to_leaf(self._value(entry, v), entry.layout, entry.blocks)[i]
            if n and leaf.tied and not np.array_equal(out[at], value):
                self.failures.append(
                    f"'{path}' is the embedding and the head, which the file changes differently: "
                    f"'{pieces[0][0].name}' and '{entry.name}'; untie them in the model"
                )
            out[at] = value
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
