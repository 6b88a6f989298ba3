"""Weights that are followed through a program: probes, those in codes, and adapted ones.

An adapted weight is one frozen base array and the low-rank factors that are added to it.

Each axis of a factor is labelled with the axis of the weight that it runs along, so that a
transpose of the weight is a change of labels and costs nothing, and so that dense layers, attention
heads, experts, scanned layers and convolutions are one case: with labels a and b,

    W'[w] = W[w] + scale · Σ_r a[a-axes of w, r] · b[b-axes of w, r]    (arXiv:2106.09685, eq. 3)

and, where there is a gain g along some of its axes, (1 + g) times that (DoRA, arXiv:2402.09353).

Shapes, of a dense layer: W (in, out), A (in, r), B (r, out), gain (1, out), seed (2,).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.lax import Precision

from lora_jax._core.compat import explicit_sharding, less, mapped
from lora_jax._core.einsum import cast, contract, gained, holding, laid_along, plus, times, wide
from lora_jax._core.errors import LoRAError, refuse_use
from lora_jax._core.geometry import RANK, SEED_IMPL, SLOT, Factor, static
from lora_jax._quantized.waiting import is_waiting, value


def _unadapted(self: Any, *_: Any, **__: Any) -> Any:
    raise LoRAError(
        f"the adapted weight '{self.name}' was used as an array: the plain function was called "
        "with bound parameters. Adapt the function first: "
        "`apply = lora.adapt(model.apply)`, then "
        "`apply({'params': lora.bind(params, adapters)}, x)`; of an NNX module `call = lora.adapt("
        "lambda model, x: model(x))`, then `call(lora.bind(model, adapters), x)`; "
        "or, for plain arrays, `lora.merge(params, adapters)`."
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Followed:
    """A frozen weight that the interpreter follows through a program, in the place of an array.

    It is a pytree, not an array: a function made by `adapt` understands it, and any other use is an
    error that says so. What is beside the base tells the kinds apart: `Probe`, `Coded` and
    `AdaptedWeight`.

    Attributes:
      base: the frozen array W, or a `Quantized` that stands for it.
      origin: the path of the leaf, or a tuple of those that were concatenated.
      axes: for each axis of `base`, the axes of the original leaf that it came from.
      stacked: the axes of the original leaf that were consumed by a loop or an index.
      indexed: those of `stacked` that a gather consumed, with the look-up not yet decided.
      stopped: whether each use of the leaf goes through `stop_gradient`: that is of the base then.
    """

    base: Any
    origin: Any = static(default="", kw_only=True)  # noqa: RUF009
    axes: tuple[tuple[int, ...], ...] = static(default=(), kw_only=True)
    stacked: tuple[int, ...] = static(default=(), kw_only=True)
    indexed: tuple[int, ...] = static(default=(), kw_only=True)
    stopped: bool = static(default=False, kw_only=True)

    lora_leaf = True  # for `_core.paths`: one leaf of a parameter tree

    @property
    def name(self) -> str:
        """The leaves that it comes from, as a message shows them between quotes."""
        return "' + '".join(map(str, origins(self)))

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
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def parts(self) -> dict[str, Factor]:
        """{field: factor} of the labelled factors, which move along with the base."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: f for name, f in fields.items() if isinstance(f, Factor)}

    def moved(
        self,
        base: Any,
        move: Callable[[Factor], Factor],
        axes: Iterable[tuple[int, ...]] | None = None,
        stacked: Iterable[int] = (),
    ) -> Self:
        """The weight after a change: `move` carries each factor along; without `axes` each axis
        stays where it is."""
        return dataclasses.replace(
            self,
            base=base,
            axes=self.axes if axes is None else tuple(axes),
            stacked=tuple(sorted({*self.stacked, *stacked})),
            **{name: move(f) for name, f in self.parts.items()},
        )

    def relabelled(self, base: Any, label: Mapping[int, int], stacked: Iterable[int] = ()) -> Self:
        """The weight after a change of shape that only renames or drops axes."""
        # An axis that no old one becomes is constant, and comes from no axis of the leaf.
        axes: list[tuple[int, ...]] = [()] * len(base.shape)
        for old, new in label.items():
            axes[new] = self.axes[old]
        return self.moved(base, lambda f: f.relabel(label), axes, stacked)

    def with_base(self, base: Any) -> Self:
        return dataclasses.replace(self, base=base)

    def scaled(self, base: Any, scale: Callable[[jax.Array], jax.Array]) -> Self:
        """The weight times a scalar: `base` is scaled already, `scale` does it to the update."""
        return self.with_base(base)

    def array(self) -> jax.Array:
        """What an equation gets that knows arrays alone."""
        return value(self.base)

    def __repr__(self) -> str:
        name, parts = type(self).__name__, self.parts
        if not all(hasattr(x, "shape") for x in (self.base, *(f.value for f in parts.values()))):
            # What jax.tree.map made of it holds shapes, shardings or names.
            shown = {"base": self.base} | {n: f.value for n, f in parts.items()}
            return f"{name}('{self.origin}', {', '.join(f'{n}={x}' for n, x in shown.items())})"
        return (
            f"{name}('{self.origin}', shape={tuple(self.shape)}, dtype={self.dtype}{self._more()})"
        )

    def _more(self) -> str:
        return ""


refuse_use(Followed, _unadapted)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Probe(Followed):
    """A weight without an update: followed to see where it goes, as a survey does.

    Attributes:
      a: a labelled factor, where the inputs of the products are observed as well, see
        `lora.methods.second_moments`; or None.
    """

    a: Factor | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Coded(Followed):
    """A quantised weight without an adapter: it is read where it is used."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AdaptedWeight(Followed):
    """A frozen weight with its low-rank update beside it: what `bind` puts in an array's place.

    It is a pytree, not an array: a function made by `adapt` understands it, and any other use is an
    error that says so. Beyond the attributes of every weight that is followed (base, origin, axes,
    stacked, indexed) it has

    Attributes:
      a, b: labelled factors.
      seed: labelled key data for dropout, one key per stacked weight, or None.
      gain: by how much more than 1 the sum of base and update is multiplied, along the axes that it
        is labelled with, and an axis RANK of size 1; or None.
      rows: of a table some rows of which are trained, what stands in their place, labelled as b;
        a is then one-hot and b the rows' change. What is looked up is this, and no sum.
      tokens: integers, which slot of the factors each position of the input has: one for each
        along the axes of x that the weight lacks, where a size of 1 is one for all, or a single
        one; -1 has no update. a and b have an axis SLOT then, and of several there is no W +
        scale·A·B. Or None. It does not move along with the base.
      scale: the constant in front of the update.
      dropout: the rate on the input of the low-rank branch, used only with a seed.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> node = lora.LoRA(jnp.ones((2, 1)), jnp.ones((1, 3)), 0.5, lora.Geometry((0,), (1,)))
    >>> weight = lora.bind({"w": jnp.zeros((2, 3))}, {"w": node})["w"]
    >>> weight
    AdaptedWeight('w', shape=(2, 3), dtype=float32, rank=1, scale=0.5)
    >>> weight.materialise()
    Array([[0.5, 0.5, 0.5],
           [0.5, 0.5, 0.5]], dtype=float32)
    """

    a: Factor
    b: Factor
    seed: Factor | None = None
    gain: Factor | None = None
    rows: Factor | None = None
    tokens: jax.Array | None = None
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)

    @property
    def drops(self) -> bool:
        """Whether the input of the low-rank branch has dropout."""
        return self.seed is not None and self.dropout > 0

    @property
    def apart(self) -> bool:
        """Whether the low-rank branch has another input than the base."""
        return self.drops or self.tokens is not None

    def scaled(self, base: Any, scale: Callable[[jax.Array], jax.Array]) -> AdaptedWeight:
        # of A·B one factor is enough
        return dataclasses.replace(self, base=base, a=self.a.map(scale))

    def narrowed(self) -> AdaptedWeight:
        """With the slots alone that tokens name, where these are fewer: what reads all of a stack,
        as a loop over layers does, reads no more then."""
        slots, many = self.tokens, self.a.size(SLOT) if self.a.has(SLOT) else 0
        if slots is None or not less(slots.size * mapped(slots), many):
            return self
        if not slots.ndim:
            return self.settled()

        flat = slots.reshape(-1)
        move = lambda f: f.map(lambda x: jnp.take(x, flat, f.dims.index(SLOT), mode="clip"))
        own = jnp.arange(slots.size, dtype=slots.dtype).reshape(slots.shape)
        none = jnp.where(slots == -1, -1, slots.size)  # past the end: NaN
        tokens = jnp.where((slots >= 0) & (slots < many), own, none)
        return dataclasses.replace(self, a=move(self.a), b=move(self.b), tokens=tokens)

    def settled(self) -> AdaptedWeight:
        """With the factors of the slot that all tokens have, if they have one."""
        if self.tokens is None or self.tokens.ndim:
            return self
        many, slot = self.a.size(SLOT), self.tokens

        def move(f: Factor) -> Factor:
            at = f.dims.index(SLOT)
            # past the end: NaN
            value = jnp.take(f.value, jnp.where(slot < 0, many, slot), at, mode="fill")
            zero = jnp.zeros((), value.dtype)
            return Factor(jnp.where(slot == -1, zero, value), tuple(d for d in f.dims if d != SLOT))

        return dataclasses.replace(self, a=move(self.a), b=move(self.b), tokens=None)

    def folded(self, n: Any) -> AdaptedWeight:
        """The weight with other dropout masks: one for each n, and for each weight of the stack."""
        if self.seed is None:
            return self
        data = self.seed.sorted()  # (*batch, 2)
        # (*batch, 2), as (n,) keys, each folded, and back
        keys = jax.random.wrap_key_data(data.value.reshape(-1, 2), impl=SEED_IMPL)
        words = jax.random.key_data(jax.vmap(lambda k: jax.random.fold_in(k, n))(keys))
        seed = Factor(words.reshape(data.value.shape), data.dims)
        return dataclasses.replace(self, seed=seed)

    def delta(self, dtype: Any = jnp.float32, precision: Any = Precision.HIGHEST) -> jax.Array:
        """scale · A·B in the weight's shape, computed in `dtype`."""
        if self.tokens is not None and not self.tokens.ndim:
            return self.settled().delta(dtype, precision)
        if self.tokens is not None:
            raise LoRAError(
                f"'{self.name}' is adapted token by token, by the slots or the mask of "
                "lora.algebra.choose, and that only products of matrices can do: leave it out of "
                "the adapters, or choose one slot, under jax.vmap for each example"
            )
        # Along axes that neither factor has the update repeats.
        out = tuple(d for d in range(self.ndim) if self.a.has(d) or self.b.has(d))
        a, b = times(cast(self.a.value, dtype), self.scale), cast(self.b.value, dtype)
        # As the base lies: factors that someone spread by themselves need not say it.
        where = None if is_waiting(self.base) else explicit_sharding(self.base)
        own = laid_along(where, range(self.ndim), out)
        delta = contract(a, self.a.dims, b, self.b.dims, out, own, precision=precision)
        return jax.lax.broadcast_in_dim(delta, self.shape, out)

    def materialise(self) -> jax.Array:
        """W + scale·A·B as a plain array, accumulated in fp32 (or wider) and rounded once."""
        # fp32 also for a 16-bit base: most updates are smaller than one step of its type.
        total = self._sum(wide(self.base.dtype), Precision.HIGHEST)
        return self.gained(total, range(self.ndim)).astype(self.base.dtype)

    def looked_up(self) -> jax.Array:
        """Rows of W + scale·A·B, in the model's own precision, as a product with B would be."""
        total = self._sum(holding(self.base.dtype), None)
        return cast(self.gained(total, range(self.ndim)), self.base.dtype)

    def _sum(self, dtype: Any, precision: Any) -> jax.Array:
        base = cast(value(self.base), dtype)
        if is_waiting(self.base) and self.base.updated:  # the update is for its gradient alone
            delta = self.delta(dtype, precision)
            return plus(base, delta - jax.lax.stop_gradient(delta))
        if self.rows is None:
            return plus(base, self.delta(dtype, precision))
        # Not W + (v − W): where W is much larger than v, that has lost v.
        one_hot = self.a.sorted()
        # (V, n) to (V,): which rows are trained
        hit = jnp.any(one_hot.value != 0, -1)
        hit = jax.lax.broadcast_in_dim(hit, self.shape, one_hot.dims[:-1])
        new = dataclasses.replace(self, b=self.rows).delta(wide(dtype))
        return jnp.where(hit, cast(new, dtype), base)

    def array(self) -> jax.Array:
        return self.looked_up() if self.indexed else self.materialise()

    def gained(self, y: jax.Array, labels: Iterable, of: Sequence | None = None) -> jax.Array:
        """(1 + gain) · y, as y + gain·y: in low precision a small gain is not rounded away.

        Args:
          y: an array of these labels.
          of: the labels of the weight's axes; None: the axes themselves.
        """
        if self.gain is None:
            return y
        of, labels = range(self.ndim) if of is None else of, list(labels)
        # {label: axis of the weight} of the gain, then its axes in the order of y's.
        at = {of[d]: d for d in self.gain.dims if d != RANK}
        order = [at[label] for label in labels if label in at]
        gain = self.gain.order((*order, RANK))
        # (*order, 1), without the rank, and broadcast along the rest of y
        value = jax.lax.squeeze(gain.value, (len(order),))
        return gained(y, value, [i for i, label in enumerate(labels) if label in at])

    def _more(self) -> str:
        return f", rank={self.a.size(RANK)}, scale={self.scale}"


def is_weight(x: Any) -> bool:
    return isinstance(x, Followed)


def has_seed(x: Any) -> bool:
    """Whether x is a weight whose dropout masks differ by use and by step of a loop."""
    return isinstance(x, AdaptedWeight) and x.seed is not None


def own_axes(base: Any) -> tuple[tuple[int, ...], ...]:
    """The `axes` of a leaf that was not moved: each axis is itself."""
    return tuple((d,) for d in range(len(base.shape)))


def origins(*weights: Followed) -> tuple:
    """The leaves that weights come from: several, where a weight is a concatenation."""
    return tuple(
        o for w in weights for o in (w.origin if isinstance(w.origin, tuple) else (w.origin,))
    )
