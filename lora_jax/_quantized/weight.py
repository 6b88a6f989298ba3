"""A quantised base: weights that stay in their codes until the product that uses them.

A `Quantized` stands in the place of an array in the parameter tree. It is frozen, and a function
made by `adapt` understands it: moves (transposes, reshapes, casts) wait, a scan slices the codes,
and each product reads the weight anew, in the forward pass and again in the backward one, so that
no more than one dequantised layer is alive.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._core import compat
from lora_jax._core.errors import LoRAError, refuse_use
from lora_jax._core.geometry import names, static
from lora_jax._core.order import ordered
from lora_jax._quantized.formats import (
    FORMATS,
    SECOND,
    STORED,
    block_sizes,
    decode,
    read,
    read_tiles,
    undoubled,
)
from lora_jax._quantized.waiting import Waiting


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized(Waiting):
    """A weight of `shape` in codes; `quantize` makes them, and `dequantize` reads them.

    Attributes:
      codes: (*shape[:-1], n), of four bits two in a byte; the last axis padded to whole blocks.
      constants: (*shape[:-1], blocks), or, per channel, `shape` with ones along the in axes. With
        double quantisation (*shape[:stack], groups, 256) codes of 8 bits.
      second: with it, (maxima (*shape[:stack], groups), means (*shape[:stack])) of the constants;
        for NVFP4 what they are multiplied by, (scales (*shape[:stack]),); of a qwix array what is
        subtracted from the codes, (zeros,), as constants; else None.
      format: a key of `FORMATS`.
      stored_dtype: of the weight that it stands for.
      pad: how much the last axis was padded.
      stack: how many leading axes are a stack of weights (layers, experts).
      read_at: the sharding, of the weight as it lies there, that its arrays get before it is read,
        or None; see `gathered`.
      moves: what is done to the weight when it is read, as (primitive, parameters), and moved_to,
        its shape and type then.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> w = lora.quant.quantize({"w": jnp.ones((128, 64))}, "w")["w"]
    >>> w
    Quantized((128, 64), float32, 'nf4', 4.5 bits)
    >>> w.codes.shape, w.constants.shape, w.value().shape  # two codes in a byte, blocks of 64
    ((128, 32), (128, 1), (128, 64))
    """

    lora_leaf = True  # for `_core.paths`: one leaf of a parameter tree

    codes: jax.Array
    constants: jax.Array
    second: tuple[jax.Array, ...] | None
    format: str = static()
    stored_dtype: Any = static()  # noqa: RUF009
    pad: int = static(default=0)
    stack: int = static(default=0)
    read_at: NamedSharding | None = static(default=None)  # noqa: RUF009

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape of the weight as it lies there; of a part, where the arrays are of a part."""
        *lead, n = self.codes.shape
        return (*lead, n * (2 if STORED[self.format].bits == 4 else 1) - self.pad)

    @property
    def sharding(self) -> Any:
        """That of the codes, in the order of the weight's axes; None where it is not known."""
        # A tracer has that of its type, an array its own.
        traced = isinstance(self.codes, jax.core.Tracer)
        found = getattr(jax.typeof(self.codes) if traced else self.codes, "sharding", None)
        if not isinstance(found, NamedSharding) or not self.moves:
            return found
        if self.order is None:
            return None
        spec = dict(enumerate(found.spec))
        return NamedSharding(found.mesh, PartitionSpec(*(spec.get(d) for d in self.order)))

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """What a function is traced with; shardings and manual axes that are in types are kept."""
        return compat.abstract(self.shape, self.dtype, self.sharding, jax.tree.leaves(self))

    @property
    def nbytes(self) -> int:
        """The bytes of codes and constants."""
        return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(self))

    @property
    def bits(self) -> float:
        """Bits per parameter."""
        return 8 * self.nbytes / max(1, math.prod(self.stored))

    @property
    def double(self) -> bool:
        """Whether the constants are quantised as well."""
        fmt = STORED[self.format]
        return self.second is not None and not (fmt.whole or fmt.tiles)

    @property
    def storable(self) -> bool:
        """Whether other numbers can be stored in the same way, see `how`."""
        return not self.moves and self.format in FORMATS

    @property
    def how(self) -> dict[str, Any]:
        """How other numbers are stored in the same way, for `in_codes` and `rounded`."""
        # Per channel the in axes are those along which constants have size 1.
        per_channel = STORED[self.format].block is None
        in_axes = tuple(d for d, n in enumerate(self.constants.shape) if n == 1 and per_channel)
        return dict(in_axes=in_axes, stack=self.stack, double=self.double)

    @property
    def sliceable(self) -> bool:
        """Whether the parts of axis 0 are those of each array."""
        order = self.order
        if STORED[self.format].tiles:
            # A constant may be of all parts.
            each = len({len(x) for x in jax.tree.leaves(self)}) == 1
        else:
            # Constants quantised twice keep the weight's axis 0 only if it is a stack's.
            one = self.second is None and len(self.constants) == len(self.codes)
            each = self.stack > 0 or one
        whole = self.codes.ndim > 1 and each
        return whole and order is not None and order[0] == 0

    def specs(self, spec: Iterable, mesh: Any = None) -> Quantized:
        """The PartitionSpecs of the arrays, where `spec` is the weight's.

        Constants lie as the codes do; those quantised twice, which have no other axis, along the
        first axis after the stack. With a mesh, what its devices do not divide is replicated.

        >>> import jax, lora_jax as lora
        >>> from jax.sharding import PartitionSpec as P
        >>> params = {"w": jax.ShapeDtypeStruct((512, 1024), "float32")}
        >>> q = jax.eval_shape(lambda p: lora.quant.quantize(p, "w", double=True), params)["w"]
        >>> of = q.specs(P("fsdp", "tp"))
        >>> of.codes, of.constants, of.second
        (P('fsdp', 'tp'), P('fsdp', None), (P('fsdp',), P()))
        """
        if self.order is None:
            raise LoRAError(f"{self!r} is not spread over devices once it is moved: bind it after")
        # `spec` is in the order of the moved weight, `own` in that of the codes.
        of = dict(zip(self.order, spec))
        own = [of.get(d) for d in range(self.codes.ndim)]
        stack, first = own[: self.stack], own[self.stack]

        def fit(x: Any, entries: Sequence) -> PartitionSpec:
            parts = [math.prod(mesh.shape[n] for n in names(e)) if mesh else 1 for e in entries]
            # One number cannot be spread, nor what the devices do not divide.
            even = [n > 1 and n % p == 0 for n, p in zip(x.shape, parts)]
            return PartitionSpec(*(e if fits else None for e, fits in zip(entries, even)))

        arrays: dict[str, Any] = dict(
            codes=fit(self.codes, own), constants=fit(self.constants, own)
        )
        if self.second is not None and not self.double:
            tiles = STORED[self.format].tiles
            arrays["second"] = (fit(self.second[0], own if tiles else stack),)
        elif self.second is not None:
            top, mean = self.second
            arrays["constants"] = fit(self.constants, [*stack, first, None])
            arrays["second"] = fit(top, [*stack, first]), fit(mean, stack)
        return dataclasses.replace(self, **arrays)

    def part(self) -> Quantized:
        """One of axis 0, of arrays that were sliced already."""
        at = self.read_at and NamedSharding(
            self.read_at.mesh, PartitionSpec(*self.read_at.spec[1:])
        )
        stack = max(self.stack - 1, 0)
        part = dataclasses.replace(self, stack=stack, read_at=at, moves=(), moved_to=None)
        return part._moving(self.moves)

    def rows(self, eqn: Any, indices: jax.Array) -> jax.Array | None:
        """What a gather along other axes than the last picks; None if it is another one."""
        p = eqn.params
        dn, last = p["dimension_numbers"], self.ndim - 1
        whole = (
            not self.moves
            and STORED[self.format].block is not None
            # The last axis is whole and stays the last: codes and constants take one gather.
            and last not in (*dn.start_index_map, *dn.collapsed_slice_dims)
            and p["slice_sizes"][last] == self.shape[last]
            and eqn.outvars[0].aval.ndim - 1 in dn.offset_dims
            and not dn.operand_batching_dims
        )
        if not whole:
            return None
        same = {k: p[k] for k in ("mode", "unique_indices", "indices_are_sorted")}
        sizes = lambda x: (*p["slice_sizes"][:last], x.shape[last])
        pick = lambda x, **fill: lax.gather(x, indices, dn, sizes(x), **same, **fill)
        rows = self._picked(pick)
        if p["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
            return rows
        # Out of bounds are no codes: what is read there becomes the weight's own fill.
        inside = pick(jnp.ones((*self.shape[:last], 1), bool), fill_value=False)
        return jnp.where(inside, rows, jnp.asarray(p["fill_value"], rows.dtype))

    def at_rows(self, index: jax.Array) -> jax.Array:
        """Rows of a table."""
        if STORED[self.format].block is None or self.moves:
            return self.value()[index]
        return self._picked(lambda x: x[index])

    def _picked(self, pick: Callable[[jax.Array], jax.Array]) -> jax.Array:
        codes, constants = pick(self.codes), pick(self.block_constants())
        picked = dataclasses.replace(self, codes=codes, constants=constants, second=None, stack=0)
        return picked.value()

    def __repr__(self) -> str:
        if self.problem() is not None:  # also what jax.tree.map made of it: shapes, shardings
            codes, constants = (
                f"{x.dtype}{x.shape}" if hasattr(x, "dtype") else x
                for x in (self.codes, self.constants)
            )
            return f"Quantized(codes={codes}, constants={constants}, {self.format!r})"
        return f"Quantized({self.shape}, {self.dtype}, {self.format!r}, {self.bits:.4g} bits)"

    def value(self, after: jax.Array | None = None) -> jax.Array:
        """The weight as an array; with `after`, read anew and no sooner than that is there."""
        q = self._there(after)
        fmt = STORED[self.format]
        if fmt.tiles:
            zero = None if q.second is None else q.second[0]
            w = read_tiles(fmt, q.codes, q.constants, zero, q.stored[-1])
            return self._moved(w.astype(q.dtype))
        return self._moved(read(fmt, q.codes, q.block_constants(), q.stored, q.dtype))

    def each_half(self, after: jax.Array | None = None) -> list[jax.Array]:
        """The numbers at even places of the stored weight's last axis, and those at odd ones, each
        as an array; for four bits and whole blocks."""
        q, fmt = self._there(after), STORED[self.format]
        assert fmt.block is not None  # as all of four bits have
        shape = (*q.codes.shape[:-1], -1, fmt.block // 2)
        # upper and lower half of each byte: (..., blocks, block / 2)
        parts = (x.reshape(shape) for x in (q.codes >> 4, q.codes & 15))
        constants = q.block_constants()
        halves = (decode(fmt, x, constants, q.dtype).reshape(q.codes.shape) for x in parts)
        return [self._moved(w) for w in halves]

    def block_constants(self) -> jax.Array:
        """The constant of each block, read where it is in codes."""
        if self.second is None or STORED[self.format].tiles:
            return self.constants
        if not self.double:
            scale = self.second[0].astype(jnp.float32)
            more = range(scale.ndim, self.constants.ndim)
            return self.constants.astype(jnp.float32) * jnp.expand_dims(scale, more)
        *rest, last = self.stored
        shape = (*rest, block_sizes(last, STORED[self.format].block)[0])
        return undoubled(self.constants, self.second, shape, self.stack)

    def problem(self) -> str | None:
        """Why the fields are not those of one weight, as of leaves that were cut by hand, cast, or
        restored into others; None if they are."""
        fmt = STORED.get(self.format) if isinstance(self.format, str) else None
        if fmt is None:
            return f"format={self.format!r}: expected one of {', '.join(STORED)}"
        second = self.second
        if second is not None and not (isinstance(second, tuple | list) and second):
            found = "an empty" if isinstance(second, tuple | list) else "a"
            return f"expected a tuple of arrays as second, found {found} {type(second).__name__}"
        arrays = (self.codes, self.constants, *(second or ()))
        if odd := [x for x in arrays if not (hasattr(x, "shape") and hasattr(x, "dtype"))]:
            return f"expected arrays as codes and constants, found a {type(odd[0]).__name__}"
        if not compat.is_float_type(self.stored_dtype):
            return f"stored_dtype={self.stored_dtype!r}: expected a floating type"
        if not fmt.holds(*(x.dtype for x in arrays)):
            return f"{', '.join(str(x.dtype) for x in arrays)} are not the types of {self.format!r}"
        shape, *others = (tuple(x.shape) for x in arrays)
        whole = all(type(n) is int and n >= 0 for n in (self.pad, self.stack))
        if not whole or self.stack >= max(len(shape), 1):
            return f"pad={self.pad!r} and stack={self.stack!r} of codes {shape}"
        *lead, last = self.stored if shape else (0,)
        if last < 1:
            return f"pad={self.pad} of codes {shape}: there is nothing"
        stack = tuple(lead[: self.stack])
        n, block = block_sizes(last, fmt.block)
        each = n * min(fmt.parts, 2)  # scales; scales and offsets; 16 bytes for eight blocks
        if fmt.block is None:
            many = [(k, d) for x in others for k, d in zip(x, self.stored)]
            good = all(k and d % k == 0 if fmt.tiles else k in (1, d) for k, d in many)
            good = good and all(len(x) == len(shape) for x in others)
        elif self.double:
            groups = math.ceil(math.prod(lead[self.stack :]) * n / SECOND)
            good = others == [(*stack, groups, SECOND), (*stack, groups), stack]
        else:
            # NVFP4's, for each of a stack, or of layers put together.
            scale = others[1] if others[1:] else ()
            good = others[0] == (*lead, each) and scale == tuple(lead[: len(scale)])
            good = good and len(scale) >= len(stack) * fmt.whole and each % fmt.parts == 0
        pad = self.pad <= (fmt.bits == 4) if fmt.tiles else self.pad == n * block - last
        if good and pad:
            return None
        return (
            f"codes {shape} and constants {', '.join(map(str, others))} of {self.format!r} are not "
            "of one part of a weight. By hand (shard_map, all_gather) cut the last axis between "
            f"blocks of {fmt.block}, and, with double quantisation, the first axis after the "
            f"stack alone, in groups of {SECOND} constants; `jax.jit` needs no such care"
        )

    def _there(self, after: jax.Array | None) -> Quantized:
        """The weight as it lies there, about to be read."""
        if (wrong := self.problem()) is not None:
            raise LoRAError(wrong)
        # Else XLA may read all weights at the start, or keep one reading for the backward pass.
        codes = self.codes if after is None else ordered(after, self.codes)
        q = dataclasses.replace(self, codes=codes, moves=(), moved_to=None)
        # Under shard_map the arrays are one device's part, and lie where they are.
        return q if self.read_at is None or compat.manual(codes) else lie(q, self.read_at)


def lie(q: Quantized, sharding: NamedSharding) -> Quantized:
    """The weight with its arrays where a sharding of it says."""
    specs = q.specs(sharding.spec, sharding.mesh)
    explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    place = jax.sharding.reshard if explicit else lax.with_sharding_constraint
    return jax.tree.map(lambda x, s: place(x, NamedSharding(sharding.mesh, s)), q, specs)


def _unread(self: Quantized, *_: Any, **__: Any) -> None:
    raise LoRAError(
        f"a quantised weight, {self!r}, was used as an array. Bind the parameters and adapt the "
        "function: lora.adapt(model.apply)({'params': lora.bind(params, adapters)}, x), of an NNX "
        "module lora.adapt(lambda model, x: model(x))(lora.bind(model, adapters), x), with "
        "adapters None where there are none; or, for plain arrays, lora.quant.dequantize(params)"
    )


refuse_use(Quantized, _unread)


def is_quantized(x: Any) -> bool:
    return isinstance(x, Quantized)
