"""Which axis is which: of a weight, and of the factors that run along its axes.

Shapes: W (in, out), A (in, r), B (r, out), each with the same batch axes in front, and in and out
any number of axes, which in W stand in any order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import PartitionSpec


def names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    # None, the name of one mesh axis, or a tuple of names.
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


# A field of the tree's structure and no leaf: jax.tree.map and gradients pass over it.
static = functools.partial(dataclasses.field, metadata=dict(static=True))

Array = TypeVar("Array", jax.Array, np.ndarray)

RANK = -1  # the label of a factor's rank axis, and of a seed's words
SLOT = -2  # of the axis of many adapters, each for some tokens
PART = -3  # of weights that were joined, each with a dropout mask of its own
# All are < 0: no axes of a weight.

# The kind of the keys of dropout masks, whatever kind the user's key is of.
SEED_IMPL = "threefry2x32"


def spec_along(dims: tuple[int, ...], spec: Iterable) -> PartitionSpec:
    """The PartitionSpec of an array whose axes run along `dims` of a weight with `spec`, without
    what is said there of sums."""
    # RANK, −1, is no axis of a spec: the rank is never sharded.
    of = dict(enumerate(getattr(spec, "partitions", spec)))
    return PartitionSpec(*(of.get(d) for d in dims))


def blocks_of(old: Sequence[int], new: Sequence[int]) -> list | None:
    """The smallest groups of adjacent axes of two shapes that hold the same number of elements;
    None where it is not known."""
    # Without elements every grouping would do.
    if 0 in old or 0 in new:
        return None
    found, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        # A group is old[i:a] and new[j:b], of m and n elements. At the end of one shape only
        # axes of size 1 are left of the other: (8,) to (8, 1) ends with the group ((), (1,)).
        a, b = min(i + 1, len(old)), min(j + 1, len(new))
        m, n = math.prod(old[i:a]), math.prod(new[j:b])
        # The side with fewer elements takes its next axis, until both have the same number.
        while m != n:
            # The multiple is known to be larger, also of symbolic sizes such as b·t and b.
            whole = m % n == 0, n % m == 0
            if not any(whole) and not (isinstance(m, int) and isinstance(n, int)):
                return None
            if whole[1] or (not whole[0] and m < n):
                m, a = m * old[a], a + 1
            else:
                n, b = n * new[b], b + 1
        found.append((tuple(range(i, a)), tuple(range(j, b))))
        i, j = a, b
    return found


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Which axes of a weight are contracted (in), produced (out), or a stack of weights (batch).

    A has shape (*batch, *in, rank) and B has shape (*batch, rank, *out).

    >>> import lora_jax as lora
    >>> lora.Geometry(in_axes=(0,), out_axes=(1, 2)).factor_shapes((512, 8, 64), rank=4)
    ((512, 4), (4, 8, 64))
    """

    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    batch_axes: tuple[int, ...] = ()

    @property
    def of_integers(self) -> bool:
        axes = (self.in_axes, self.out_axes, self.batch_axes)
        whole = lambda of: all(isinstance(d, int | np.integer) for d in of)
        return all(isinstance(of, tuple) and whole(of) for of in axes)

    @property
    def a_dims(self) -> tuple[int, ...]:
        return (*self.batch_axes, *self.in_axes, RANK)

    @property
    def b_dims(self) -> tuple[int, ...]:
        return (*self.batch_axes, RANK, *self.out_axes)

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(batch, in, out): how many weights `shape` stacks, and the size of each."""
        size = lambda axes: math.prod(shape[d] for d in axes)
        return size(self.batch_axes), size(self.in_axes), size(self.out_axes)

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.batch_axes, *self.in_axes, *self.out_axes)

    def matrices(self, w: jax.Array) -> jax.Array:
        """A leaf, or what has its shape, as (n, in, out)."""
        # (*batch, *in, *out), then (n, in, out)
        return w.transpose(self._order).reshape(self.sizes(w.shape))

    def leaf(self, m: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Matrices (n, in, out) in the leaf's shape."""
        m = m.reshape([shape[d] for d in self._order])
        # The inverse permutation: axis d of the leaf is where `_order` has it.
        return m.transpose([self._order.index(d) for d in range(len(shape))])

    def pair(self, a: Array, b: Array) -> tuple[Array, Array]:
        """The factors A and B as (n, in, r) and (n, r, out)."""
        # a: (*batch, *in, r); b: (*batch, r, *out)
        n = len(self.batch_axes)
        batch, rank = math.prod(a.shape[:n]), a.shape[-1]
        inner, outer = math.prod(a.shape[n:-1]), math.prod(b.shape[n + 1 :])
        # pyrefly: ignore[bad-return]  # reshape keeps the kind of array, which its stubs do not say
        return a.reshape(batch, inner, rank), b.reshape(batch, rank, outer)

    def factors(
        self, a: jax.Array, b: jax.Array, shape: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """Matrices (n, in, r) and (n, r, out) as the factors of a leaf of this shape."""
        a_shape, b_shape = self.factor_shapes(shape, a.shape[-1])
        return a.reshape(a_shape), b.reshape(b_shape)

    def factor_shapes(
        self, shape: tuple[int, ...], rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B for a weight of `shape`."""
        size = dict(enumerate(shape)) | {RANK: rank}
        return tuple(size[d] for d in self.a_dims), tuple(size[d] for d in self.b_dims)

    def covers(self, ndim: int) -> bool:
        """Whether each of `ndim` axes is named exactly once."""
        return sorted(self.in_axes + self.out_axes + self.batch_axes) == list(range(ndim))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """An array and, for each of its axes, the axis of the weight that it runs along (or RANK)."""

    value: Any  # an array, or what a tree of specs or shardings has in its place
    dims: tuple[int, ...] = static()

    def has(self, dim: int) -> bool:
        return dim in self.dims

    def size(self, dim: int) -> int:
        # from the end: the arrays of a stack of adapters have one more axis in front
        return self.value.shape[self.dims.index(dim) - len(self.dims)]

    def map(self, fn: Callable, *args: Any) -> Factor:
        """The factor with fn(its array, *args), which keeps the axes."""
        return Factor(fn(self.value, *args), self.dims)

    def cut(self, d: int, start: int, stop: int) -> Factor:
        """Its part along axis d; all of it where it does not have that."""
        if not self.has(d):
            return self
        return self.map(jax.lax.slice_in_dim, start, stop, 1, self.dims.index(d))

    def padded(self, ends: Mapping[int, tuple]) -> Factor:
        """With zeros around it: (before, after, between) along some axes."""
        config = [ends.get(d, (0, 0, 0)) for d in self.dims]
        if not any(map(any, config)):
            return self
        return self.map(jax.lax.pad, np.zeros((), self.value.dtype), config)

    def relabel(self, label: Mapping[int, int]) -> Factor:
        """Renames the axes; those of size 1 without a new name are squeezed out."""
        # squeeze refuses a longer axis, along which something would be lost.
        gone = tuple(i for i, d in enumerate(self.dims) if d >= 0 and d not in label)
        value = jax.lax.squeeze(self.value, gone) if gone else self.value
        return Factor(value, tuple(label.get(d, d) for d in self.dims if d < 0 or d in label))

    def within(self, d: int, into: int) -> Factor:
        """The factor with its axis d made a part of its axis `into`, or that axis if it has none.

        Two factors that sum over both axes sum over the one that they become.
        """
        rest = tuple(e for e in self.dims if e not in (d, into))
        f = self.order((*rest, *(e for e in (d, into) if self.has(e))))
        return Factor(f.value.reshape(*f.value.shape[: len(rest)], -1), (*rest, into))

    def spread(self, sizes: Mapping[int, int]) -> Factor:
        """The factor with these axes as well; it is constant along those that it lacked."""
        new = tuple(d for d in sizes if not self.has(d))
        if not new:
            return self
        # lax.broadcast puts new axes in front, in the order of its sizes.
        return Factor(jax.lax.broadcast(self.value, [sizes[d] for d in new]), (*new, *self.dims))

    def order(self, dims: tuple[int, ...]) -> Factor:
        """The same factor with its axes in the given order."""
        if dims == self.dims:
            return self
        return Factor(jax.lax.transpose(self.value, [self.dims.index(d) for d in dims]), dims)

    def sorted(self, rank_first: bool = False) -> Factor:
        """The same factor with its axes in the weight's order, the rank last or first."""
        dims = tuple(sorted(d for d in self.dims if d != RANK))
        return self.order((RANK, *dims) if rank_first else (*dims, RANK))
