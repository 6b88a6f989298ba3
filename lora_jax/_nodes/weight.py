"""The adapted weight: one frozen base array and the low-rank factors that are added to it.

Each axis of a factor is labelled with the axis of the weight that it runs along, so that a
transpose of the weight is a change of labels and costs nothing, and so that dense layers, attention
heads, experts, scanned layers and convolutions are one case: with labels a and b,

    W'[w] = W[w] + scale · Σ_r a[a-axes of w, r] · b[b-axes of w, r]    (arXiv:2106.09685, eq. 3)

and, where there is a gain g along some of its axes, (1 + g) times that (DoRA, arXiv:2402.09353).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._core.einsum import cast, contract, plus, times, wide
from lora_jax._core.errors import LoRAError, refuse_use
from lora_jax._core.geometry import RANK, SEED_IMPL, Factor
from lora_jax._quantized.weight import is_quantized, value


def _each_moved(move: Callable[[Factor], Factor], f: Factor) -> Factor:
    """`move` of each of a stack of factors."""
    dims = []

    def one(value):
        moved = move(Factor(value, f.dims))
        dims.append(moved.dims)
        return moved.value

    value = jax.vmap(one)(f.value)
    return Factor(value, dims[0])


def _unadapted(self, *_, **__):
    raise LoRAError(
        f"the adapted weight '{self.origin}' was used as an array: the plain function was called "
        "with bound parameters. Adapt the function first: "
        "`apply = lora.adapt(model.apply)`, then "
        "`apply({'params': lora.bind(params, adapters)}, x)`; of an NNX module `call = lora.adapt("
        "lambda model, x: model(x))`, then `call(lora.bind(model, adapters), x)`; "
        "or, for plain arrays, `lora.merge(params, adapters)`."
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedWeight:
    """A frozen weight with its low-rank update beside it: what `bind` puts in an array's place.

    It is a pytree, not an array: a function made by `adapt` understands it, and any other use is an
    error that says so.

    Attributes:
      base: the frozen array W, or a `Quantized` that stands for it.
      a, b: labelled factors, or None for a weight that is only surveyed, or only quantised; a alone
        for one whose inputs are observed, see `lora.methods.second_moments`.
      seed: labelled key data for dropout, one key per stacked weight, or None.
      gain: by how much more than 1 the sum of base and update is multiplied, along the axes that it
        is labelled with, and an axis RANK of size 1; or None.
      slot: a number; where there is one, the factors are those of a stack of adapters, with an axis
        in front, and this is the one that is meant.
      scale: the constant in front of the update.
      dropout: the rate on the input of the low-rank branch, used only with a seed.
      origin: the path of the leaf, or a tuple of those that were concatenated.
      axes: for each axis of `base`, the axes of the original leaf that it came from.
      stacked: the axes of the original leaf that were consumed by a loop or an index.
      indexed: those of `stacked` that a gather consumed, with the look-up not yet decided.
    """

    base: jax.Array
    a: Factor | None
    b: Factor | None
    seed: Factor | None = None
    gain: Factor | None = None
    slot: jax.Array | None = None
    scale: float = dataclasses.field(default=1.0, metadata=dict(static=True))
    dropout: float = dataclasses.field(default=0.0, metadata=dict(static=True))
    origin: Any = dataclasses.field(default="", metadata=dict(static=True))
    axes: tuple[tuple[int, ...], ...] = dataclasses.field(default=(), metadata=dict(static=True))
    stacked: tuple[int, ...] = dataclasses.field(default=(), metadata=dict(static=True))
    indexed: tuple[int, ...] = dataclasses.field(default=(), metadata=dict(static=True))

    lora_leaf = True  # for `_core.paths`: one leaf of a parameter tree

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return len(self.base.shape)

    @property
    def size(self) -> int:
        return math.prod(self.base.shape)

    @property
    def dtype(self):
        return self.base.dtype

    @property
    def parts(self) -> dict[str, Factor | None]:
        """What moves along with the base."""
        return dict(a=self.a, b=self.b, seed=self.seed, gain=self.gain)

    @property
    def is_probe(self) -> bool:
        """Whether the weight has no update: it is only followed, for a survey or its inputs."""
        return self.b is None and not self.is_frozen

    @property
    def is_frozen(self) -> bool:
        """Whether it is a quantised weight without an adapter."""
        return self.a is None and is_quantized(self.base)

    @property
    def drops(self) -> bool:
        """Whether the input of the low-rank branch has dropout."""
        return self.seed is not None and self.dropout > 0

    def moved(self, base, move: Callable[[Factor], Factor], axes, stacked=()) -> AdaptedWeight:
        """The weight after a change of shape: `move` carries each factor along."""
        move = move if self.slot is None else functools.partial(_each_moved, move)
        return dataclasses.replace(
            self,
            base=base,
            axes=tuple(axes),
            stacked=tuple(sorted({*self.stacked, *stacked})),
            **{name: f if f is None else move(f) for name, f in self.parts.items()},
        )

    def relabelled(self, base, label: Mapping[int, int], stacked=()) -> AdaptedWeight:
        """The weight after a change of shape that only renames or drops axes."""
        axes: list[tuple[int, ...]] = [()] * len(base.shape)
        for old, new in label.items():
            axes[new] = self.axes[old]
        return self.moved(base, lambda f: f.relabel(label), axes, stacked)

    def resolved(self) -> AdaptedWeight:
        """The weight with the factors of its slot alone; NaN if there is no such slot."""
        if self.slot is None:
            return self
        a, b = (
            Factor(jnp.take(f.value, self.slot, axis=0, mode="fill"), f.dims)
            for f in (self.a, self.b)
        )
        return dataclasses.replace(self, a=a, b=b, slot=None)

    def with_base(self, base) -> AdaptedWeight:
        return dataclasses.replace(self, base=base)

    def folded(self, n) -> AdaptedWeight:
        """The weight with other dropout masks: one for each n, and for each weight of the stack."""
        if self.seed is None:
            return self
        data = self.seed.sorted()
        keys = jax.random.wrap_key_data(data.value.reshape(-1, 2), impl=SEED_IMPL)
        words = jax.random.key_data(jax.vmap(lambda k: jax.random.fold_in(k, n))(keys))
        seed = Factor(words.reshape(data.value.shape), data.dims)
        return dataclasses.replace(self, seed=seed)

    def delta(self, dtype=jnp.float32) -> jax.Array:
        """scale · A·B in the weight's shape, computed in `dtype`."""
        out = tuple(d for d in range(self.ndim) if self.a.has(d) or self.b.has(d))
        a, b = times(cast(self.a.value, dtype), self.scale), cast(self.b.value, dtype)
        delta = contract(a, self.a.dims, b, self.b.dims, out)
        return jax.lax.broadcast_in_dim(delta, self.shape, out)

    def materialise(self) -> jax.Array:
        """W + scale·A·B as a plain array, accumulated in fp32 (or wider) and rounded once."""
        if self.is_probe:
            return self.base
        base = value(self.base)
        if self.is_frozen:
            return base
        dtype = wide(base.dtype)
        total = base.astype(dtype) + self.delta(dtype)
        return self.gained(total, range(self.ndim)).astype(self.base.dtype)

    def looked_up(self) -> jax.Array:
        """Rows of W + scale·A·B, in the model's own precision, as a product with B would be."""
        base = value(self.base)
        if self.a is None:
            return base
        return self.gained(plus(base, self.delta(base.dtype)), range(self.ndim))

    def gained(self, y, labels, of: Sequence | None = None) -> jax.Array:
        """(1 + gain) · y, as y + gain·y: in low precision a small gain is not rounded away.

        Args:
          y: an array of these labels.
          of: the labels of the weight's axes; None: the axes themselves.
        """
        if self.gain is None:
            return y
        of, labels = range(self.ndim) if of is None else of, list(labels)
        at = {of[d]: d for d in self.gain.dims if d != RANK}
        order = [at[label] for label in labels if label in at]
        gain = self.gain.order((*order, RANK))
        value = jax.lax.squeeze(cast(gain.value, y.dtype), (len(order),))
        dims = [i for i, label in enumerate(labels) if label in at]
        return jax.lax.add(y, jax.lax.mul(y, jax.lax.broadcast_in_dim(value, y.shape, dims)))

    def __repr__(self):
        rank = None if self.a is None else self.a.size(RANK)
        return (
            f"AdaptedWeight('{self.origin}', shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"rank={rank}, scale={self.scale})"
        )


refuse_use(AdaptedWeight, _unadapted)


def is_weight(x: Any) -> bool:
    return isinstance(x, AdaptedWeight)


def origins(*weights: AdaptedWeight) -> tuple:
    """The leaves that weights come from: several, where a weight is a concatenation."""
    return tuple(
        o
        for w in weights
        if not w.is_frozen
        for o in (w.origin if isinstance(w.origin, tuple) else (w.origin,))
    )
