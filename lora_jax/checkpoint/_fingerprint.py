"""What a tree is, in a few numbers: paths, shapes, types, and checksums of the values.

A checksum is a sum of integers, so it is the same however an array is sharded, and it is computed
where the array lives: no leaf is gathered.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax._core import compat
from lora_jax._core.errors import LoRAError
from lora_jax._core.nnx import is_module
from lora_jax._core.paths import flatten
from lora_jax._core.placement import check_there
from lora_jax._quantized.weight import is_quantized

# Two sums of 32 bits, as jit has no 64 by default; the second seed is 2³² / the golden ratio.
_SEEDS = (0x00000000, 0x9E3779B9)


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What adapters were made for: the leaves of a parameter tree, and what is in them.

    Attributes:
      leaves: {path: (shape, dtype)}.
      content: {path: checksum of the values}, or None.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> one, two = (lora.checkpoint.fingerprint({"w": jnp.ones((n, 2))}) for n in (2, 3))
    >>> dict(one.leaves), one.differences(two)
    ({'w': ((2, 2), 'float32')}, ["'w': expected float32(2, 2), found float32(3, 2)"])
    """

    leaves: Mapping[str, tuple[tuple[int, ...], str]]
    content: Mapping[str, str] | None = None

    def differences(self, other: Fingerprint) -> list[str]:
        """A line for each leaf by which `other` differs from this one; contents are compared where
        both have them."""
        lines = [f"'{p}' is missing" for p in self.leaves if p not in other.leaves]
        lines += [f"'{p}' is not expected" for p in other.leaves if p not in self.leaves]
        alike = set()
        for path in self.leaves.keys() & other.leaves.keys():
            both = self.leaves[path], other.leaves[path]
            want, found = (f"{dtype}{shape}" for shape, dtype in both)
            if want != found:
                lines.append(f"'{path}': expected {want}, found {found}")
            else:
                alike.add(path)
        one, two = self.content or {}, other.content or {}
        # A quantised leaf has several arrays, `path/codes` and others.
        leaf = lambda p: p if p in self.leaves else p.rpartition("/")[0]
        changed = {leaf(p) for p in one.keys() & two.keys() if one[p] != two[p]}
        lines += [f"'{p}': has other values" for p in changed & alike]
        return sorted(lines)


def fingerprint(params: Any, *, content: bool | None = None) -> Fingerprint:
    """What a base is, to be kept with the adapters that were trained on it.

    Args:
      params: the parameters, or an NNX module, of which random state is left out; shapes will do,
        which have no content.
      content: also take a checksum of each leaf's values (of an NNX module: of its `nnx.Param`s),
        where it lives and however it is sharded; None: of arrays, and not of shapes. It tells
        another base from this one, and finds damage; it is not made to withstand someone who wants
        two bases to look the same. It reads every parameter once, with some 40 integer operations
        for each: on a CPU a second of one core is 0.34 GB of bf16 or 0.75 GB of fp32 (48 of them
        for 8B parameters in bf16). To take it once for a run, pass `fingerprint(params)` as the
        base; to do without, `fingerprint(params, content=False)`.

    Returns:
      A `Fingerprint`.

    Raises:
      LoRAError: content=True, and shapes.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> a, b = ({"w": jnp.ones((2, 2)) * x} for x in (1, 2))
    >>> lora.checkpoint.fingerprint(a).differences(lora.checkpoint.fingerprint(b))
    ["'w': has other values"]
    >>> one, two = (lora.checkpoint.fingerprint(x, content=False) for x in (a, b))
    >>> one == two
    True
    """
    # Shapes are those of all leaves, values those of parameters: a module's statistics move.
    state, values = (lasting(params, kind) for kind in (..., nnx.Param))
    leaves = {p: (tuple(x.shape), _type(x)) for p, x in state.items()}
    shapes = [x for x in jax.tree.leaves(values) if isinstance(x, jax.ShapeDtypeStruct)]
    content = not shapes if content is None else content
    if content and shapes:
        raise LoRAError(
            "content=True needs arrays, found shapes: lora.checkpoint.fingerprint(params)"
        )
    arrays = dict(y for x in values.items() for y in _arrays(*x))
    return Fingerprint(leaves, checksums(arrays) if content else None)


# {who asks: (the arrays of a base, its fingerprint)}; no array is kept alive by it.
_TAKEN: MutableMapping[Any, tuple[list[weakref.ref], Fingerprint]] = weakref.WeakKeyDictionary()


def taken_once(owner: Any, params: Any) -> Fingerprint:
    """`fingerprint(params)`; where `owner` asks again for the same arrays, which never change, the
    one that was taken. NumPy's may change, and are read each time."""
    arrays = jax.tree.leaves(lasting(params, ...))
    refs, found = _TAKEN.get(owner, ([], None))
    if found is not None and len(refs) == len(arrays):
        # The very same arrays: a reference to one that is gone gives None, which is none of them.
        if all(ref() is x for ref, x in zip(refs, arrays)):
            return found
    found = fingerprint(params)
    # JAX's arrays do not change; NumPy's may.
    if all(isinstance(x, jax.Array) for x in arrays):
        _TAKEN[owner] = [weakref.ref(x) for x in arrays], found
    return found


def lasting(params: Any, kind: Any) -> dict[str, Any]:
    """{path: array} of what a call does not change: of an NNX module no random state, and with
    `kind`, nnx.Param, no statistics."""
    if is_module(params):
        _, _, params, _ = nnx.split(params, nnx.RngState, kind, ...)
    flat = flatten(params).items()
    is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return {p: x for p, x in flat if hasattr(x, "dtype") and not is_key(x)}


def _type(x: Any) -> str:
    how = f" as {x.format}{', twice' if x.double else ''}" if is_quantized(x) else ""
    return f"{x.dtype}{how}"


def _arrays(path: str, x: Any) -> list[tuple[str, Any]]:
    """The arrays of a leaf, by path: several of one that is quantised."""
    if not is_quantized(x):
        return [(path, x)]
    # In the order of the fields.
    names = ("codes", "constants", *(("maxima", "means") if x.double else ("second",)))
    return list(zip([f"{path}/{name}" for name in names], jax.tree.leaves(x)))


def checksums(flat: Mapping[str, Any]) -> dict[str, str]:
    """{path: 64 bits in hex} of arrays; all are started before the first is waited for."""
    if compat.staging():
        raise LoRAError("this reads the values of arrays: call it outside of jax.jit")
    check_there(flat)
    # Dispatch is asynchronous: the second line waits, this one does not.
    sums = {p: _checksum(_summable(x)) for p, x in flat.items()}
    return {p: "".join(f"{int(n):08x}" for n in np.asarray(x)) for p, x in sums.items()}


def _summable(x: Any) -> Any:
    """x where, and as, it can be summed: not in a device's host memory, not of 64 bits or
    more, which jit would cut."""
    if isinstance(x, jax.Array):
        own = next(iter(x.sharding.device_set)).default_memory().kind
        if x.sharding.memory_kind in (own, None):
            return x
        return jax.device_put(x, x.sharding.with_memory_kind(own))
    x = np.asarray(x)
    if x.dtype.itemsize < 8:
        return x
    # The words of each element, in the order in which `_words` has them.
    return np.ascontiguousarray(x).view(np.uint32).reshape(*x.shape, x.dtype.itemsize // 4)


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """(2,) uint32: the sum, modulo 2³², of a mixture of each word with its position, twice.

    The mixture is one to one in the word, so that no change of a single word is lost.
    """
    words = _words(x)
    # Integers wrap, and their sum has no order: any sharding gives the same.
    return jnp.stack(
        [jnp.sum(_mix(words + _mix(_index(words.shape) + jnp.uint32(seed)))) for seed in _SEEDS]
    ).astype(jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    """The bits of each element as a uint32, or as two along a new last axis."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _words(jnp.stack([x.real, x.imag], axis=-1))
    small = x.dtype == jnp.bool_ or jnp.issubdtype(x.dtype, jnp.integer)
    if small and x.dtype.itemsize <= 4:
        # One to one: negative numbers wrap.
        return x.astype(jnp.uint32)
    # In words of 32 bits; of a type with less, such as float4_e2m1fn, in words of its own.
    bits = jnp.finfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.floating) else 32
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(bits, 32)}")).astype(jnp.uint32)


def _index(shape: tuple[int, ...]) -> jax.Array:
    """Each position's number, without a reshape, which would gather a sharded array."""
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for d in reversed(range(len(shape))):
        step = jnp.uint32(stride % 2**32)
        index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, d) * step
        stride *= shape[d]
    return index


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser: one to one, and every bit of x reaches every bit of the result."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
