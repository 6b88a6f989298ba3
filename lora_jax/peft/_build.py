"""From what an adapter file holds and the leaves that were found for it to the nodes of a tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core.errors import LoRAError
from lora_jax._nodes.adapters import DoRA, Full, LoRA, Rows, norms
from lora_jax.peft._blocks import LeafInfo, factor_a, factor_b, to_leaf
from lora_jax.peft._config import PeftConfig
from lora_jax.peft._file import AdapterFile
from lora_jax.peft._mapping import Entry, has_values
from lora_jax.peft._parts import NewRows, Table, Update, Value

# What falls on a leaf: the entry, the place of the leaf among its blocks, what the file holds.
Piece = tuple[Entry, int, Any]


class Build:
    """Puts together what falls on one leaf."""

    def __init__(
        self, file: AdapterFile, config: PeftConfig, params: Mapping[str, Any], dtype: Any
    ):
        self.file, self.config, self.params, self.dtype = file, config, params, dtype
        self.failures: list[str] = []
        self.leaves: dict[str, LeafInfo] = {}
        self.on: dict[str, list[Piece]] = {}  # by leaf
        self.untouched: dict[str, np.ndarray] = {}  # see `TorchMapping`

    def add(self, entry: Entry, what: Any) -> None:
        for i, b in enumerate(entry.blocks):
            self.leaves[b.leaf.path] = b.leaf
            self.on.setdefault(b.leaf.path, []).append((entry, i, what))

    def nodes(self) -> dict[str, Any]:
        """{leaf: node}, in the order of the parameters."""
        out = {}
        # Not in the order of the file: any file of these tensors gives the same tree.
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

    def _tied(self, path: str, kind: type, names: str) -> bool:
        """Whether PEFT's change of one of two tied weights means the same here."""
        if kind is NewRows:
            return self._untied_rows(path)
        # Where both are changed, they are compared.
        if not self.leaves[path].tied or self.config.tying or len(self.on[path]) > 1:
            return True
        self.failures.append(
            f"'{path}' is the embedding and the head, but the file changes {names} alone; untie "
            "them in the model, or train with ensure_weight_tying in PEFT"
        )
        return False

    def _untied_rows(self, path: str) -> bool:
        """PEFT trains the rows of a tied head with the table's, and stores the table's alone; here
        a head that is a copy of the table would keep its own."""
        table, copies = self.params[path], []
        if self.leaves[path].tied or not has_values(table):
            return True
        for other, x in self.params.items():
            if other == path or other in self.on or not has_values(x):
                continue
            # Shapes first: an array is copied from its device to be compared.
            if table.shape not in (x.shape, x.shape[::-1]):
                continue
            x = np.asarray(x)
            if np.array_equal(x, table) or np.array_equal(x.T, table):
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

    def _take(self, taken: np.ndarray, region: tuple[slice, ...], path: str, name: str) -> None:
        if taken[region].any():
            self.failures.append(f"'{path}': '{name}' falls on what another parameter is already")
        taken[region] = True

    def _lora(self, path: str, pieces: Sequence[Piece]) -> LoRA | DoRA:
        """One node from one low-rank update or several, on different parts of the leaf.

        Parts of the batch axes keep their rank (the smaller are padded with zeros); parts of the
        out axes get a range of ranks each, and B is block-diagonal.
        """
        leaf = self.leaves[path]
        g = leaf.axes
        if leaf.tied and len(pieces) > 1:
            pieces = self._once(path, pieces)
        # (*batch, *out): whether a parameter falls on it already.
        taken = np.zeros([leaf.shape[d] for d in (*g.batch_axes, *g.out_axes)], bool)
        # {part of the out axes: rank}. Layers of a stack share a part, q and k of a kernel do not.
        regions: dict[tuple, int] = {}
        for entry, i, u in pieces:
            b = entry.blocks[i]
            self._take(taken, b.region((*g.batch_axes, *g.out_axes)), path, entry.name)
            out = tuple(b.index[d] for d in g.out_axes)
            regions[out] = max(regions.get(out, 0), u.rank)
        first = dict(zip(regions, np.cumsum([0, *regions.values()])))
        rank = sum(regions.values())
        # The stored type where there is one, and nothing is multiplied; else fp32.
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
            # A torch weight that several leaves hold: the outputs of this one.
            own_b = own_b[:, start : start + block.n_out]
            # A node has one scale: the rest of it goes into B.
            if u.scale != scale:
                own_b = own_b.astype(np.float32) * (u.scale / scale if scale else 0.0)
            a[(*block.region((*g.batch_axes, *g.in_axes)), at)] = factor_a(own_a, block)
            b[(*block.region(g.batch_axes), at, *block.region(g.out_axes))] = factor_b(own_b, block)
        embedding = leaf.kind == "embedding" or pieces[0][0].kind == "embedding"
        node = LoRA(self._cast(a), self._cast(b), float(scale), g, self.config.dropout, embedding)
        return self._dora(path, pieces, node, bool(taken.all())) if self.config.dora else node

    def _dora(self, path: str, pieces: Sequence[Piece], node: LoRA, whole: bool) -> DoRA:
        """The node with the magnitudes of all parts; where there is none, the norms themselves."""
        g = node.geometry
        types = {self.file.tensors[u.magnitude].dtype for _, _, u in pieces}
        dtype = types.pop() if len(types) == 1 else np.dtype(np.float32)
        if self.leaves[path].tied:
            self.failures.append(
                f"'{path}' is the embedding and the head, and the file has DoRA, which scales the "
                "one by its columns and the other by its rows; untie them in the model"
            )
        # Otherwise what the file does not have keeps the norms of the base, so W·m/‖W‖ is W.
        if whole:
            m = np.zeros([node.shape[d] for d in (*g.batch_axes, *g.out_axes)], dtype)
        else:
            m = np.array(norms(node, jnp.asarray(self._base(path))))
            m = m.astype(dtype if dtype.itemsize > 2 else np.float32)
        for entry, i, u in pieces:
            block = entry.blocks[i]
            if block.sizes(g.in_axes) != tuple(node.shape[d] for d in g.in_axes):
                self.failures.append(f"'{path}': '{entry.name}' scales a part of its inputs alone")
            start = sum(x.n_out for x in entry.blocks[:i])
            own = self.file.read(u.magnitude).reshape(1, -1, 1)[:, start : start + block.n_out]
            # A magnitude is turned as a B of rank 1, (1, out, 1).
            own = factor_b(own, block).squeeze(len(g.batch_axes))
            m[block.region((*g.batch_axes, *g.out_axes))] = own
        magnitude = self._cast(m)
        if not whole:
            self.untouched[path] = np.asarray(magnitude)
        return node.with_magnitude(magnitude)

    def _once(self, path: str, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """The updates of a tied embedding and head, which must be one."""
        (_, _, first), *others = pieces
        want = first.arrays(self.file)
        for entry, _, u in others:
            same = u.scale == first.scale and u.rank == first.rank
            if not same or not all(map(np.array_equal, u.arrays(self.file), want)):
                self._differ(path, pieces[0][0], entry)
        return pieces[:1]

    def _differ(self, path: str, one: Entry, two: Entry) -> None:
        self.failures.append(
            f"'{path}' is the embedding and the head, which the file changes differently: "
            f"'{one.name}' and '{two.name}'; untie them in the model"
        )

    def _full(self, path: str, pieces: Sequence[Piece]) -> Full:
        leaf = self.leaves[path]
        taken = np.zeros(leaf.shape, bool)
        for entry, i, _ in pieces[: 1 if leaf.tied else None]:
            self._take(taken, entry.blocks[i].slices, path, entry.name)
        keys = {k for _, _, v in pieces for k in (v.key, v.add) if k is not None}
        types = {self.file.tensors[k].dtype for k in keys}
        types |= {np.dtype(np.float32) for _, _, v in pieces if v.add is not None}
        dtype = types.pop() if len(types) == 1 else np.dtype(np.float32)
        # The base is read only where the file has a part of the leaf.
        out = np.zeros(leaf.shape, dtype) if taken.all() else self._base(path).astype(dtype)
        for n, (entry, i, v) in enumerate(pieces):  # one tensor at a time
            at = entry.blocks[i].slices
            value = to_leaf(self._value(entry, v), entry.layout, entry.blocks)[i]
            if n and leaf.tied and not np.array_equal(out[at], value):
                self._differ(path, pieces[0][0], entry)
            out[at] = value
        return Full(self._cast(out))

    def _value(self, entry: Entry, v: Value) -> np.ndarray:
        """The parameter's new value, as torch would have it."""
        if v.add is None:
            assert v.key is not None  # it has one of the two
            return self.file.read(v.key)
        add = self.file.read(v.add).astype(np.float32) * np.float32(v.scale)
        if v.key is not None:
            return self.file.read(v.key).astype(np.float32) + add
        # No value in the file: its update goes on top of the base's bias.
        base = [self._base(b.leaf.path)[b.slices].reshape(-1) for b in entry.blocks]
        return np.concatenate(base).astype(np.float32) + add

    def _base(self, path: str) -> np.ndarray:
        if not has_values(self.params[path]):
            raise LoRAError(
                f"{self.file.folder}: '{path}': the file changes a part of it; pass its values in "
                "`params`"
            )
        return np.array(self.params[path])

    def _rows(self, path: str, pieces: Sequence[Piece]) -> Rows:
        (entry, _, r), *others = pieces
        if others:
            self.failures.append(f"'{path}': rows of it are there twice, '{others[0][0].name}'")
        return Rows(self._cast(self.file.read(r.key)), r.index, entry.blocks[0].leaf.shape[0])

    def compare(self, entry: Entry | None, table: Table) -> None:
        """PEFT stores the frozen table beside an adapted embedding, and puts it in the base's
        place; here it must be the base's."""
        if entry is None:
            return
        stored = to_leaf(self.file.read(table.key), entry.layout, entry.blocks)
        for b, value in zip(entry.blocks, stored):
            base = self._base(b.leaf.path)[b.slices]
            # In the type of the base, to which the table was rounded when it was loaded.
            differ = int((base != value.astype(base.dtype)).any(axis=-1).sum())
            if differ:
                self.failures.append(
                    f"'{table.key}': {differ} rows differ from '{b}'; put the file's table into "
                    "the parameters, or lora.peft.load(..., keep_base=True)"
                )
