"""What adapters have learned: how far each weight moved, and in how many directions."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._bind import adapter_nodes
from lora_jax._core.einsum import holding, wide
from lora_jax._core.errors import LoRAError
from lora_jax._core.figures import Shown, needs_matplotlib, written
from lora_jax._core.mesh import anywhere
from lora_jax._core.nnx import state_of
from lora_jax._core.paths import flatten
from lora_jax._core.placement import near
from lora_jax._core.table import table
from lora_jax._nodes.adapters import Full, LoRA, Rows
from lora_jax._nodes.node import is_node
from lora_jax._quantized.waiting import value
from lora_jax._quantized.weight import is_quantized
from lora_jax.algebra._arguments import linear
from lora_jax.algebra._finite import check_finite
from lora_jax.algebra._svd import svd

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """The change ΔW of one leaf; of a stack (layers, experts), an entry for each of n weights.

    Attributes:
      kind: "lora", "rows" (only the rows that are trained count, in ‖W‖ too), or "full" (the leaf
        as one weight; it has no spectrum, as nothing says which of its axes are in and which out).
      stack: the sizes of the batch axes, of product n; () for one weight.
      rank: the largest that the change can have, by how it is made; None in full.
      norm: ‖ΔW‖ (Frobenius), (n,).
      base_norm: ‖W‖, (n,); None without the base's values.
      singular_values: of ΔW, from the largest on, (n, k); None in full.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> node = lora.LoRA(jnp.eye(4)[:, :2], jnp.eye(2), 3.0, lora.Geometry((0,), (1,)))
    >>> change = lora.algebra.learned({"w": jnp.ones((4, 2))}, {"w": node}).leaves["w"]
    >>> change.kind, change.singular_values, change.effective_rank.round(3), change.ratio.round(3)
    ('lora', array([[3., 3.]], dtype=float32), array([2.]), array([1.5]))
    """

    kind: str
    stack: tuple[int, ...]
    rank: int | None
    norm: np.ndarray
    base_norm: np.ndarray | None
    singular_values: np.ndarray | None

    @property
    def ratio(self) -> np.ndarray | None:
        """‖ΔW‖ / ‖W‖, (n,); infinite for a change from zeros. None without the base's values."""
        if self.base_norm is None:
            return None
        # What stands where ‖W‖ is 0: `np.divide` leaves those entries of `out` alone.
        moved = np.where(self.norm > 0, np.inf, 0.0)
        return np.divide(self.norm, self.base_norm, out=moved, where=self.base_norm > 0)

    @property
    def effective_rank(self) -> np.ndarray | None:
        """exp(−Σ p·log p) with p = σ / Σσ, (n,): k equal singular values give k (Roy and Vetterli,
        EUSIPCO 2007, definition 1); 0 where nothing changed."""
        if self.singular_values is None:
            return None
        s = self.singular_values.astype(np.float64)
        total = s.sum(-1, keepdims=True)
        # p·log p is 0 at p = 0, and so is log 1: neither warns.
        p = np.divide(s, total, out=np.ones_like(s), where=total > 0)
        entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), -1)
        return np.where(total[:, 0] > 0, np.exp(entropy), 0.0)

    @property
    def stable_rank(self) -> np.ndarray | None:
        """‖ΔW‖² / σ₁², (n,) (Rudelson and Vershynin, arXiv:math/0503442); 0 where nothing changed.
        Small directions count for less than in the effective rank."""
        if self.singular_values is None:
            return None
        s = self.singular_values.astype(np.float64)
        top = s[:, :1]
        return np.sum(np.divide(s, top, out=np.zeros_like(s), where=top > 0) ** 2, -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Learned(Shown):
    """What adapters have learned, leaf by leaf. Print it for a table (of a stack, the means), plot
    it for a figure; a notebook shows both.

    Attributes:
      leaves: {path: `Change`}.
      unknown: the paths of leaves in full or by rows whose base has no values here.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> node = lora.LoRA(jnp.eye(4)[:, :2], jnp.eye(2), 3.0, lora.Geometry((0,), (1,)))
    >>> adapters = {"w": node, "bias": lora.Full(jnp.ones(2))}
    >>> found = lora.algebra.learned(None, adapters)  # without the base's values
    >>> list(found.leaves), found.unknown
    (['w'], ('bias',))
    """

    leaves: Mapping[str, Change]
    unknown: tuple[str, ...] = ()

    def __str__(self):
        head = "leaf kind weights rank ‖ΔW‖ ‖W‖ ratio largest".split()
        head += ["effective rank", "stable rank"]
        rows = [
            (
                path,
                c.kind,
                len(c.norm),
                "" if c.rank is None else c.rank,
                _mean(c.norm),
                _mean(c.base_norm),
                _mean(c.ratio),
                "" if c.ratio is None or not c.ratio.size else float(f"{c.ratio.max():.3g}"),
                _mean(c.effective_rank),
                _mean(c.stable_rank),
            )
            for path, c in self.leaves.items()
        ]
        lines = [table(head, rows)]
        if self.unknown:
            lines.append(f"not known without the base's values: {', '.join(self.unknown)}")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike | None = None) -> Figure:
        """A figure: ‖ΔW‖ / ‖W‖ (‖ΔW‖ where no base is known) and the effective rank of each target
        (a row) and layer (a column), and the singular spectra, a faint line a weight, a bold one
        the median. Where there are no layers, bars take the place of rows.

        The layer is the number in a path (layers_3, h/3), or else the first axis of a stack; what
        else a leaf stacks, such as experts, is one cell: √Σ‖ΔW‖² / √Σ‖W‖², the mean effective rank.
        A target outside of the layers, such as the head, is one cell as wide as all of them.

        Args:
          path: where to write it too, in the format of the suffix, such as .png or .pdf. A file
            there is replaced once the new one is complete.

        Raises:
          LoRAError: matplotlib is not installed, or there is nothing to plot.
        """
        with needs_matplotlib():
            from lora_jax.algebra._learned_plot import figure
        if not self.leaves:
            raise LoRAError(
                f"nothing to plot: the changes of {', '.join(self.unknown)} are not known; pass "
                "the base's values: lora.algebra.learned(params, adapters)"
            )
        return written(figure(self.leaves), path)


def learned(params: Any, adapters: Any) -> Learned:
    """What adapters have learned: ‖ΔW‖ beside ‖W‖, and the singular values of ΔW, for each weight.

    The singular values of scale · A·B are those of an r × r matrix, after a QR decomposition of
    each factor: no ΔW is formed.

    Args:
      params: the base parameters; None, or abstract ones, where they are not at hand: then norms
        of the base and ratios are None, and what is trained in full or by rows is `unknown`.
      adapters: the adapters, with values: not under jit.

    Raises:
      LoRAError: adapters of another model, without values, or that add no update of their own
        (DoRA; those for `factors`); values that are not finite, of the adapters or their bases.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> b = jnp.array([[3.0, 0, 0], [0, 1, 0]])
    >>> node = lora.LoRA(jnp.eye(4)[:, :2], b, 2.0, lora.Geometry((0,), (1,)))
    >>> found = lora.algebra.learned({"w": jnp.ones((4, 3))}, {"w": node})
    >>> print(found)
    leaf  kind  weights  rank   ‖ΔW‖    ‖W‖  ratio  largest  effective rank  stable rank
    ----  ----  -------  ----  -----  -----  -----  -------  --------------  -----------
    w     lora        1     2  6.325  3.464  1.826     1.83           1.755        1.111
    >>> found.leaves["w"].singular_values
    array([[6., 2.]], dtype=float32)
    >>> figure = found.plot()  # or found.plot("learned.png")
    """
    if params is not None:
        adapter_nodes(params, adapters, "algebra.learned")
    adapters = linear(adapters)
    nodes = flatten(adapters, is_leaf=is_node)
    leaves = {} if params is None else flatten(state_of(params))
    arrays = jax.tree.leaves((adapters, [leaves[p] for p in nodes if p in leaves]))
    traced = any(isinstance(x, jax.core.Tracer) for x in arrays)
    if traced or not all(map(_has_values, jax.tree.leaves(adapters))):
        raise LoRAError(
            "what adapters have learned is in their values, found "
            f"{'traced' if traced else 'abstract'} ones: call lora.algebra.learned outside of "
            "jit, on arrays"
        )
    check_finite(adapters, base=params)
    # Abstract leaves (ShapeDtypeStruct) count as unknown.
    bases = {p: x for p, x in leaves.items() if _has_values(x)}
    changes = {p: _change(node, bases.get(p)) for p, node in nodes.items()}
    known = {p: c for p, c in changes.items() if c is not None}
    return Learned(known, tuple(p for p in changes if p not in known))


def _has_values(x: Any) -> bool:
    return all(isinstance(y, jax.Array | np.ndarray) for y in jax.tree.leaves(x))


def _change(node: Any, base: Any) -> Change | None:
    base = near(base)
    if isinstance(node, LoRA):
        batch = node.geometry.batch_axes
        # (n, k); ‖ΔW‖² = Σσ², so the update is not formed for its norm either.
        s = np.asarray(svd(node)[1])
        size = None if base is None else np.asarray(_norms(base, batch))
        stack = node.a.shape[: len(batch)]
        return Change("lora", stack, node.rank, np.linalg.norm(s, axis=-1), size, s)
    if base is None:
        return None
    if isinstance(node, Full):
        moved, size = np.asarray(_norms(_difference(node.value, base), ())), _norms(base, ())
        return Change("full", (), None, moved, np.asarray(size), None)
    s, size = map(np.asarray, _rows(node, base))
    # A change of m rows of d has rank min(m, d) at most.
    return Change("rows", (), min(node.value.shape), np.linalg.norm(s, axis=-1), size, s)


def _norms(x: Any, batch: tuple[int, ...]) -> jax.Array:
    """Frobenius norms of the weights that are stacked along `batch`, in that order, (n,)."""
    return anywhere(functools.partial(_each_norm, batch))(x)


@functools.partial(jax.jit, static_argnums=0)
def _each_norm(batch: tuple[int, ...], x: Any) -> jax.Array:
    x, rest = value(x), tuple(d for d in range(x.ndim) if d not in batch)
    squares = jnp.sum(jnp.square(jnp.abs(x.astype(wide(x.dtype)))), rest)
    # The sum leaves the batch axes in the leaf's order; the factors have them in the geometry's.
    return jnp.sqrt(squares.transpose([sorted(batch).index(d) for d in batch]).reshape(-1))


@anywhere
@jax.jit
def _difference(tuned: jax.Array, base: Any) -> jax.Array:
    base = value(base)
    dtype = holding(tuned.dtype, base.dtype, jnp.float32)
    return tuned.astype(dtype) - base.astype(dtype)


@anywhere
@jax.jit
def _rows(node: Rows, base: Any) -> tuple[jax.Array, jax.Array]:
    """Singular values of the rows' change, (1, k), and the norm of what they were, (1,)."""
    index = jnp.asarray(node.index)
    # Only the rows in question are dequantised.
    before = base.at_rows(index) if is_quantized(base) else jnp.asarray(base)[index]
    s = jnp.linalg.svd(_difference(node.value, before), compute_uv=False)
    return s[None], _norms(before, ())


def _mean(x: np.ndarray | None) -> float | str:
    return "" if x is None or not x.size else float(f"{x.mean():.4g}")
