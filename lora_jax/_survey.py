"""How a function uses each leaf of its parameters, found from its jaxpr."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._core import compat
from lora_jax._core.errors import LoRAError
from lora_jax._core.fold import folded
from lora_jax._core.geometry import Geometry
from lora_jax._core.nnx import map_shared
from lora_jax._core.paths import map_with_path, nearest
from lora_jax._core.table import html_table, table
from lora_jax._interpret.coverage import LOW_RANK, Use, by_leaf
from lora_jax._interpret.interpreter import Interpreter
from lora_jax._interpret.reach import LOOK_UP, Flow
from lora_jax._interpret.trace import Traceable
from lora_jax._nodes.node import leaves_of
from lora_jax._nodes.weight import Probe, is_weight, own_axes
from lora_jax._quantized.weight import is_quantized


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf and every use that the function makes of it."""

    shape: tuple[int, ...]
    dtype: Any
    uses: tuple[Use, ...]
    head: bool = False  # an output depends on this product alone
    reached: bool = False  # it enters a product with an input, if not as it is
    stacks: frozenset[int] = frozenset()  # axes that are those of a later stack: of experts

    @property
    def products(self) -> tuple[Use, ...]:
        """The contractions, convolutions and look-ups; where no axis is summed it is a scale."""
        return tuple(
            u for u in self.uses if u.how == LOW_RANK and (u.in_axes or u.primitive == LOOK_UP)
        )

    @property
    def kind(self) -> str:
        """ "linear", "conv", "embedding", "other" (used otherwise) or "unused"."""
        names = {u.primitive for u in self.products}
        if LOOK_UP in names:
            return "embedding"
        if names:
            return "conv" if "conv_general_dilated" in names else "linear"
        return "other" if self.uses else "unused"

    @property
    def geometry(self) -> Geometry | None:
        """The axes by their part in the first product (the look-up, where there is one)."""
        products = sorted(self.products, key=lambda u: u.primitive != LOOK_UP)
        if not products:
            return None
        use = products[0]
        # Experts (E, d, k) applied to all tokens: the product leaves E free, but it is a stack.
        outer = tuple(d for d in use.out_axes if d not in self.stacks)
        # What is neither in nor out stacks separate weights: layers of a scan, experts.
        batch = set(range(len(self.shape))) - set(use.in_axes) - set(outer)
        return Geometry(use.in_axes, outer, tuple(sorted(batch)))


@dataclasses.dataclass(frozen=True)
class Survey:
    """How a function uses each leaf of its first argument. Print it for a table.

    Leaves that differ in numbers alone, such as those of repeated layers, and agree in all columns
    are one line of the table, `layers_{0..23}/q/kernel`; each by itself is in `leaves`.

    Attributes:
      leaves: {path: a leaf}, with its `shape` and `dtype`, the `uses` that the function makes of it
        (a `Use` each), its `kind` ("linear", "conv", "embedding", "other" or "unused"), its
        `geometry` (None where it is in no product), and whether it is the output `head`.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> params = {"params": {"w": jnp.ones((4, 3))}}
    >>> found = lora.survey(lambda v, x: x @ v["params"]["w"], params, jnp.ones((2, 4)))
    >>> found["w"].kind, found["w"].geometry
    ('linear', Geometry(in_axes=(0,), out_axes=(1,), batch_axes=()))
    """

    leaves: Mapping[str, Leaf]

    def __iter__(self) -> Iterator[str]:
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)

    def __getitem__(self, path: str) -> Leaf:
        """The leaf of that path, or of the one path that ends with it ("params/" + path)."""
        if path in self.leaves:
            return self.leaves[path]
        found = [p for p in self.leaves if p.endswith(f"/{path}")]
        if len(found) != 1:
            close = ", ".join(found or nearest(str(path), self.leaves))
            raise LoRAError(
                f"the survey has {len(found) or 'no'} leaves '{path}' (nearest: {close}); survey "
                "the function of the same parameters, or of a tree that holds them: "
                "lora.survey(fn, params, x)"
            )
        return self.leaves[found[0]]

    def within(self, paths: Iterable[str]) -> Survey:
        """The survey by the paths of a tree that is the surveyed one or a part of it ("params/").

        The part is the one that has all the paths: a name such as "LayerNorm_0/bias" may stand in
        the model and in its blocks. Where none or several have them, each leaf is found alone.
        """
        paths = tuple(paths)
        # Each leaf that may be the first path gives a candidate for the part's prefix.
        ends = [p for p in self.leaves if f"/{p}".endswith(f"/{paths[0]}")] if paths else []
        parts = [p.removesuffix(paths[0]) for p in ends]
        fits = [part for part in parts if all(part + p in self.leaves for p in paths)]
        if len(fits) != 1 and "" not in fits:
            return self
        part = "" if "" in fits else fits[0]
        return Survey({p: self.leaves[part + p] for p in paths})

    def _table(self) -> tuple[Sequence[str], Sequence[tuple]]:
        rows = [
            (
                path,
                leaf.shape,
                leaf.kind + (" (head)" if leaf.head else ""),
                ", ".join(dict.fromkeys(u.primitive for u in leaf.uses)),
                *((g.in_axes, g.out_axes, g.batch_axes) if (g := leaf.geometry) else ((), (), ())),
            )
            for path, leaf in self.leaves.items()
        ]
        return folded(("leaf", "shape", "kind", "primitives", "in", "out", "batch"), rows)

    def __str__(self):
        return table(*self._table())

    def _repr_html_(self) -> str:
        return html_table(*self._table())


def survey(fn: Callable, params: Any, *args: Any, **kwargs: Any) -> Survey:
    """Finds how `fn(params, *args, **kwargs)` uses each leaf of `params`.

    Nothing is computed and nothing allocated: arrays may be `jax.ShapeDtypeStruct`s.

    Args:
      fn: a function of parameters, such as `model.apply`.
      params: any pytree, or an NNX module; leaves that are not floating-point arrays are passed on
        as they are.
      *args, **kwargs: the other arguments; arrays are traced, other leaves are constants.

    Returns:
      A `Survey`: for each path the primitives that it reaches, and its in, out and batch axes.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"q": jnp.ones((4, 2, 3)), "bias": jnp.ones((2, 3))}
    >>> fn = lambda p, x: jnp.einsum("td,dhk->thk", x, p["q"]) + p["bias"]
    >>> print(lora.survey(fn, params, jnp.ones((5, 4))))
    leaf  shape      kind           primitives   in   out     batch
    ----  ---------  -------------  -----------  ---  ------  -----
    bias  (2, 3)     other          add          -    -       -
    q     (4, 2, 3)  linear (head)  dot_general  (0)  (1, 2)  -
    """
    call = Traceable(fn, call="lora.survey({fn}, {params}, x)")
    leaves = leaves_of(params, "lora.survey(fn, params, x)")
    flat = {path: x for path, x in leaves.items() if hasattr(x, "dtype")}
    # A probe in each weight's place is followed as an adapted weight is, without factors.
    constants, arrays = call.split((map_shared(_probes, params, flat), *args), kwargs)
    # Integers and complex numbers may be weights too: in no low rank, but not in silence.
    numbers = {id(x): p for p, x in flat.items() if jnp.issubdtype(x.dtype, jnp.number)}
    origins = [x.origin if is_weight(x) else numbers.get(id(x)) for x in arrays]
    found: list = []

    def trace(arrays: Sequence) -> list:
        jaxpr, _ = call.jaxpr(constants, arrays)
        jaxpr, consts = compat.live(jaxpr)
        interpreter = Interpreter()
        outs = interpreter.run(jaxpr, consts, arrays, fixed=call.parameters(constants, arrays))
        # Two walks of one jaxpr: who uses each leaf, and what its products lead to.
        # Neither result is an array: they leave the trace by this list.
        found.extend((interpreter.events, Flow(jaxpr, origins)))
        # eval_shape takes arrays: a probe that `fn` returns is its base again.
        return [o.base if is_weight(o) else o for o in outs]

    jax.eval_shape(trace, arrays)
    events, flow = found
    uses = by_leaf(flat, events)
    return Survey(
        {
            path: Leaf(
                tuple(x.shape),
                x.dtype,
                uses[path],
                path in flow.heads,
                path in flow.reached,
                frozenset(d for leaf, d in flow.stacks if leaf == path),
            )
            for path, x in flat.items()
        }
    )


def _probes(params: Any) -> Any:
    return map_with_path(_probe, params)


def _probe(path: str, x: Any) -> Any:
    """A weight without factors in the place of a floating-point array."""
    # A `jax.Ref` is state that a call changes, and no weight.
    arrays = hasattr(x, "dtype") and not isinstance(x, jax.Ref)
    if not arrays or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    if is_quantized(x):
        # Surveyed as the array that it stands for: geometry is a matter of shapes.
        x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return Probe(x, origin=path, axes=own_axes(x))
