"""Blocks of a leaf, and how a torch tensor lies in them.

A torch parameter belongs to one block of one leaf (a layer of a stack, the keys of a fused kernel),
or to several in a row along its outputs (fused in torch, split here). Everything is a reshape and a
transpose that the leaf's geometry gives.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lora_jax._core.errors import LoRAError
from lora_jax._core.geometry import RANK, Geometry
from lora_jax._nodes.adapters import DoRA, LowRank

INDEX = re.compile(r"(.+?)\[([-\d:, ]+)\]")


@dataclasses.dataclass(frozen=True)
class LeafInfo:
    """A leaf of the user's tree.

    `tied`: it is a table and a product's weight at once; `dilated`: some convolution spreads it.
    """

    path: str
    shape: tuple[int, ...]
    geometry: Geometry | None
    kind: str = "?"
    tied: bool = False
    dilated: bool = False

    @property
    def axes(self) -> Geometry:
        """The geometry, where the caller knows that there is one."""
        assert self.geometry is not None, self.path
        return self.geometry

    @property
    def in_axes(self) -> tuple[int, ...]:
        """The in axes in torch's order: for a convolution the channels come first."""
        g = self.axes
        inner = tuple(sorted(g.in_axes))
        last = max(g.in_axes + g.out_axes)
        # Flax's (*window, in, out); torch has in before the window.
        if self.kind == "conv" and g.out_axes == (last,):
            return inner[-1:] + inner[:-1]
        return inner

    @property
    def out_axes(self) -> tuple[int, ...]:
        return tuple(sorted(self.axes.out_axes))


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of a leaf: for each axis a position, a (start, stop), or None for all of it."""

    leaf: LeafInfo
    index: tuple[int | tuple[int, int] | None, ...]

    def __str__(self):
        if all(i is None for i in self.index):
            return self.leaf.path
        text = [
            ":" if i is None else f"{i[0]}:{i[1]}" if isinstance(i, tuple) else str(i)
            for i in self.index
        ]
        while text[-1] == ":":
            text.pop()
        return f"{self.leaf.path}[{', '.join(text)}]"

    @functools.cached_property
    def slices(self) -> tuple[slice, ...]:
        """The index with every axis kept."""
        return tuple(
            slice(None) if i is None else slice(*i) if isinstance(i, tuple) else slice(i, i + 1)
            for i in self.index
        )

    def sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.shape[d] for d in axes)

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape with every axis kept."""
        return tuple(len(range(*s.indices(n))) for s, n in zip(self.slices, self.leaf.shape))

    @property
    def n_in(self) -> int:
        return math.prod(self.sizes(self.leaf.in_axes))

    @property
    def n_out(self) -> int:
        return math.prod(self.sizes(self.leaf.out_axes))

    @property
    def n_batch(self) -> int:
        return math.prod(self.sizes(self.leaf.axes.batch_axes))

    def region(self, axes: Sequence[int]) -> tuple[slice, ...]:
        return tuple(self.slices[d] for d in axes)


def block(text: str, leaves: dict[str, LeafInfo]) -> Block:
    """The block that a text such as "layers/q/kernel[3]" or "qkv/kernel[:, 0]" names."""
    # The name of a leaf may itself end in brackets.
    found = None if text in leaves else INDEX.fullmatch(text)
    path = found[1] if found else text
    if path not in leaves:
        raise LoRAError(f"no leaf '{path}'")
    leaf = leaves[path]
    parts = [p.strip() for p in found[2].split(",")] if found else []
    if len(parts) > len(leaf.shape):
        raise LoRAError(f"'{text}': the leaf has {len(leaf.shape)} axes, {leaf.shape}")
    index = [_position(p, n, text) for p, n in zip(parts, leaf.shape)]
    return Block(leaf, tuple(index + [None] * (len(leaf.shape) - len(parts))))


def _position(part: str, size: int, text: str) -> int | tuple[int, int] | None:
    numbers = [p.strip() for p in part.split(":")]
    if not all(re.fullmatch(r"\d*", n) for n in numbers) or len(numbers) > 2 or part == "":
        raise LoRAError(f"'{text}': expected positions such as 3, 0:16 or :")
    if len(numbers) == 1:
        if int(part) >= size:
            raise LoRAError(f"'{text}': position {part} of an axis of size {size}")
        return int(part)
    start, stop = int(numbers[0] or 0), int(numbers[1] or size)
    if not start < stop <= size:
        raise LoRAError(f"'{text}': positions {part} of an axis of size {size}")
    # One form for the whole of an axis, as blocks are compared.
    return None if (start, stop) == (0, size) else (start, stop)


def factor_a(array: np.ndarray, b: Block) -> np.ndarray:
    """A (batch, rank, in) as (*batch, *in, rank) in the leaf's order."""
    g = b.leaf.axes
    # The axes in PEFT's order, each by its number in the leaf.
    labels = (*g.batch_axes, RANK, *b.leaf.in_axes)
    sizes = (*b.sizes(g.batch_axes), array.shape[1], *b.sizes(b.leaf.in_axes))
    return array.reshape(sizes).transpose([labels.index(d) for d in g.a_dims])


def factor_b(array: np.ndarray, b: Block) -> np.ndarray:
    """B (batch, out, rank) as (*batch, rank, *out)."""
    g = b.leaf.axes
    labels = (*g.batch_axes, *b.leaf.out_axes, RANK)
    sizes = (*b.sizes(g.batch_axes), *b.sizes(b.leaf.out_axes), array.shape[2])
    return array.reshape(sizes).transpose([labels.index(d) for d in g.b_dims])


def torch_a(a: np.ndarray, b: Block) -> np.ndarray:
    """The block's A of a leaf's, as (batch, rank, in)."""
    g = b.leaf.axes
    a = a[(*b.region((*g.batch_axes, *g.in_axes)), slice(None))]
    # (*batch, *in, rank) in the order of the leaf to (*batch, rank, *in) in PEFT's.
    a = a.transpose([g.a_dims.index(d) for d in (*g.batch_axes, RANK, *b.leaf.in_axes)])
    return a.reshape(b.n_batch, a.shape[len(g.batch_axes)], b.n_in)


def torch_b(value: np.ndarray, b: Block) -> np.ndarray:
    """The block's B of a leaf's, as (batch, out, rank)."""
    g = b.leaf.axes
    value = value[(*b.region(g.batch_axes), slice(None), *b.region(g.out_axes))]
    value = value.transpose([g.b_dims.index(d) for d in (*g.batch_axes, *b.leaf.out_axes, RANK)])
    return value.reshape(b.n_batch, b.n_out, value.shape[-1])


# How a torch tensor lies: the axes are (out, in) for a Linear and a convolution, (in, out) for a
# GPT-2 Conv1D and an Embedding; "same" is the leaf's own order.
def layouts(shape: tuple[int, ...], blocks: Sequence[Block]) -> list[str]:
    """The layouts in which a torch tensor of this shape fits the blocks."""
    found = []
    size = sum(math.prod(b.shape) for b in blocks)
    if math.prod(shape) != size:
        return []
    if len(blocks) == 1 and _is_same(shape, blocks[0]):
        found.append("same")
    # Such as a bias; of a matrix that was flattened nobody knows the order.
    if len(shape) == 1:
        return [] if any(b.leaf.geometry and b.leaf.in_axes for b in blocks) else ["vector"]
    if all(b.leaf.geometry for b in blocks) and len({(b.n_in, b.n_batch) for b in blocks}) == 1:
        n_in, n_out = blocks[0].n_in, sum(b.n_out for b in blocks)
        batch = (blocks[0].n_batch,) if blocks[0].n_batch > 1 else ()
        conv = blocks[0].leaf.kind == "conv" and not batch
        window = blocks[0].sizes(blocks[0].leaf.in_axes)
        if not batch and len(shape) != len(window) + 1 and set(shape[2:]) <= {1}:
            # A window of one position is as good as none.
            conv, shape = False, shape[:2]
        if (shape == (n_out, *window)) if conv else (shape == (*batch, n_out, n_in)):
            found.append("out_in")
        if not conv and shape == (*batch, n_in, n_out):
            found.append("in_out")
        # "same" is one of the two orders then, and the name of the order says more.
        if set(found) > {"same"}:
            found.remove("same")
    return found


def _is_same(shape: tuple[int, ...], b: Block) -> bool:
    """Whether a tensor lies as the block does: of a product's weight to the letter."""
    # Without axes nothing is contracted: those of one position are of no account.
    if b.leaf.geometry is None:
        return _squeezed(b.shape) == _squeezed(shape)
    own = tuple(n for n, i in zip(b.shape, b.index) if not isinstance(i, int))
    return own == shape and b.leaf.kind != "conv"


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def to_leaf(array: np.ndarray, layout: str | None, blocks: Sequence[Block]) -> list[np.ndarray]:
    """A torch tensor as the contents of the blocks, each in its block's shape."""
    if layout in ("same", "vector"):
        cuts = np.cumsum([math.prod(b.shape) for b in blocks])[:-1]
        pieces = [array] if len(blocks) == 1 else np.split(array.reshape(-1), cuts)
        return [p.reshape(b.shape) for p, b in zip(pieces, blocks)]
    n_in, batch = blocks[0].n_in, blocks[0].n_batch
    if layout == "in_out":
        array = array.reshape(batch, n_in, -1).swapaxes(1, 2)
    # (batch, out, in), cut along out into the blocks.
    array = array.reshape(batch, -1, n_in)
    cuts = np.cumsum([b.n_out for b in blocks])[:-1]
    out = []
    for piece, b in zip(np.split(array, cuts, axis=1), blocks):
        labels = (*b.leaf.axes.batch_axes, *b.leaf.out_axes, *b.leaf.in_axes)
        # (*batch, *out, *in), and each axis to its place in the leaf.
        piece = piece.reshape(b.sizes(labels))
        out.append(piece.transpose([labels.index(d) for d in range(len(labels))]))
    return out


def from_leaf(
    pieces: Sequence[np.ndarray], layout: str, blocks: Sequence[Block], shape: tuple[int, ...]
) -> np.ndarray:
    """The torch tensor of `shape` whose contents the blocks are: `to_leaf`, backwards."""
    if layout in ("same", "vector"):
        return np.concatenate([p.reshape(-1) for p in pieces]).reshape(shape)
    flat = []
    for piece, b in zip(pieces, blocks):
        labels = (*b.leaf.axes.batch_axes, *b.leaf.out_axes, *b.leaf.in_axes)
        # (*batch, *out, *in) as (batch, out, in), put together along out.
        flat.append(piece.transpose(labels).reshape(b.n_batch, b.n_out, b.n_in))
    array = np.concatenate(flat, axis=1)
    return (array.swapaxes(1, 2) if layout == "in_out" else array).reshape(shape)


def own_factors(
    node: LowRank, block: Block, blocks: Sequence[Block]
) -> tuple[np.ndarray, np.ndarray]:
    """(A, B) of one block of a leaf, without the ranks that are another block's alone."""
    a, b = np.asarray(node.a), np.asarray(node.b)
    own_a, own_b = torch_a(a, block), torch_b(b, block)
    if all(x == block for x in blocks):
        return own_a, own_b
    out_axes = node.geometry.out_axes
    # Ranks of which the first number of A is not zero are in use: no look at all the others.
    whole = all(block.index[d] is None for d in out_axes)
    if whole and own_a[:, :, :1].any(axis=(0, 2)).all():
        return own_a, own_b
    regions = {tuple(x.index[d] for d in out_axes): x for x in blocks}
    # Ranks that do something here, of own_b (batch, out, rank).
    mine = own_b.any(axis=(0, 1))
    keep: Any = own_a.any(axis=(0, 2)) | mine
    if len(regions) > 1:
        # Over all of the stack.
        axes = node.geometry.batch_axes
        index = lambda x: tuple(None if d in axes else i for d, i in enumerate(x.index))
        whole = [Block(x.leaf, index(x)) for x in regions.values()]
        used = np.array([torch_b(b, x).any(axis=(0, 1)) for x in whole])
        # Block-diagonal: each rank is of one region.
        if (used.sum(axis=0) <= 1).all():
            keep = mine
    # PEFT has no rank of 0: an update of zeros keeps one, or all.
    if not keep.any():
        keep = np.arange(len(keep)) < 1 if len(regions) > 1 else np.ones_like(keep)
    return (own_a, own_b) if keep.all() else (own_a[:, keep], own_b[:, :, keep])


def changes_outside(node: LowRank, blocks: Iterable[Block], magnitude: Any = None) -> bool:
    """Whether it changes the leaf where no torch parameter is: B is not zero there, or a DoRA's
    magnitude is not `magnitude`, the base's norms."""
    g = node.geometry
    # (*batch, rank, *out) without the rank: which outputs change.
    changed: Any = np.asarray(node.b != 0).any(axis=g.b_dims.index(RANK))
    if isinstance(node, DoRA):
        changed = changed | (True if magnitude is None else np.asarray(node.magnitude) != magnitude)
    for block in blocks:
        changed[block.region((*g.batch_axes, *g.out_axes))] = False
    return bool(changed.any())


def together(
    parts: Sequence[tuple[np.ndarray | None, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """One A and B for several blocks in a row: A shared where it is the same, else B block-diagonal
    over the ranks of all."""
    known = [a for a, _ in parts if a is not None]
    if len(known) == len(parts) == 1:
        return known[0], parts[0][1]
    # q, k, v of one fused kernel: A is theirs together, and B one above the other.
    if all(a.dtype == known[0].dtype and np.array_equal(a, known[0]) for a in known):
        rank = known[0].shape[1]
        rows = [
            b if a is not None else np.zeros((*b.shape[:2], rank), known[0].dtype) for a, b in parts
        ]
        return known[0], np.concatenate(rows, axis=1)
    total, at, rows = sum(a.shape[1] for a in known), 0, []
    for a, b in parts:
        row = np.zeros((*b.shape[:2], total), b.dtype)
        n = 0 if a is None else a.shape[1]
        # The ranks from `at` on are this block's alone.
        row[:, :, at : at + n] = b
        at += n
        rows.append(row)
    return np.concatenate(known, axis=1), np.concatenate(rows, axis=1)
