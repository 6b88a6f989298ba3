"""How large two adapters are, and how much they have in common, leaf by leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core.einsum import product
from lora_jax._core.errors import LoRAError
from lora_jax._core.mesh import anywhere
from lora_jax._core.paths import flatten
from lora_jax._core.table import table
from lora_jax._nodes.adapters import LoRA
from lora_jax._nodes.node import is_node
from lora_jax.algebra._arguments import linear
from lora_jax.algebra._finite import check_finite
from lora_jax.algebra._svd import matrices, svd


@dataclasses.dataclass(frozen=True)
class Likeness:
    """How alike one leaf is in two adapters; a stack (layers, experts) has an entry a weight.

    Attributes:
      norms: ‖Δ₁‖ and ‖Δ₂‖ (Frobenius), (2, n).
      cosine: ⟨Δ₁, Δ₂⟩ / ‖Δ₁‖‖Δ₂‖, (n,); 0 where one of them is zero.
      input_angles, output_angles: the principal angles between the spaces that the two read from
        and write to, in degrees from the smallest on, (n, min(rank₁, rank₂)). An update has as many
        directions as singular values above the rounding of its factors, 8·rank·ε·‖s·A‖·‖B‖, ε that
        of their dtype, fp32 at least; NaN stands where one of the two has no more.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> node = lora.LoRA(jnp.ones((2, 1)), jnp.ones((1, 2)), 1.0, lora.Geometry((0,), (1,)))
    >>> found = lora.algebra.compare({"w": node}, {"w": node}).leaves["w"]
    >>> found.norms.shape, found.cosine.round(3), found.input_angles.shape
    ((2, 1), array([1.], dtype=float32), (1, 1))
    """

    norms: np.ndarray
    cosine: np.ndarray
    input_angles: np.ndarray
    output_angles: np.ndarray


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two adapters, leaf by leaf. Print it for a table (of a stack, the means).

    Attributes:
      leaves: {path: `Likeness`} of the leaves that both have.
      first, second: paths that one of them has alone, or that are not low-rank in both.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> node = lora.LoRA(jnp.ones((2, 1)), jnp.ones((1, 2)), 1.0, lora.Geometry((0,), (1,)))
    >>> found = lora.algebra.compare({"q": node, "k": node}, {"q": node})
    >>> list(found.leaves), found.first, found.second
    (['q'], ('k',), ())
    """

    leaves: Mapping[str, Likeness]
    first: tuple[str, ...]
    second: tuple[str, ...]

    def __str__(self):
        head = ("leaf", "norm 1", "norm 2", "cosine", "input angles", "output angles")
        rows = [
            (
                path,
                *(_mean(x, ".4g") for x in leaf.norms),
                _mean(leaf.cosine, ".4f"),
                _span(leaf.input_angles),
                _span(leaf.output_angles),
            )
            for path, leaf in self.leaves.items()
        ]
        lines = [table(head, rows)]
        for name, paths in (("first", self.first), ("second", self.second)):
            lines += [f"in the {name} alone: {', '.join(paths)}"] if paths else []
        return "\n".join(lines)


def _mean(x: np.ndarray, digits: str) -> float | str:
    return float(format(x.mean(), digits)) if x.size else ""


def _span(angles: np.ndarray) -> str:
    """The smallest and the largest angle, each a mean of the weights that have any."""
    known = angles[~np.isnan(angles[:, :1]).all(-1)]
    if not len(known):
        return "none"
    return f"{known[:, 0].mean():.1f}° to {np.nanmax(known, 1).mean():.1f}°"


def compare(first: Any, second: Any) -> Comparison:
    """Compares the updates of two adapters: norms, cosine, principal angles (Björck and Golub,
    doi:10.1090/S0025-5718-1973-0348991-3), all from the factors.

    Args:
      first, second: adapters of one base; their ranks may differ.

    Raises:
      LoRAError: these are no adapters, or DoRA's; a leaf has other axes or another shape in each;
        values that are traced, or not finite.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> def node(row):
    ...     b = jnp.array([row], float)
    ...     return {"w": lora.LoRA(jnp.ones((2, 1)), b, 1.0, lora.Geometry((0,), (1,)))}
    >>> found = lora.algebra.compare(node([1, 0]), node([1, 1])).leaves["w"]
    >>> found.cosine.round(3), found.input_angles.round(), found.output_angles.round()
    (array([0.707], dtype=float32), array([[0.]], dtype=float32), array([[45.]], dtype=float32))
    """
    first, second = linear(first), linear(second)
    check_finite(first, second)
    one, two = (flatten(tree, is_leaf=is_node) for tree in (first, second))
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((one, two))):
        raise LoRAError(
            "a comparison is of values, found traced ones: call lora.algebra.compare outside of jit"
        )
    low_rank = lambda tree: {p for p, n in tree.items() if isinstance(n, LoRA)}
    both = low_rank(one) & low_rank(two)
    leaves = {}
    for path in (p for p in one if p in both):
        a, b = one[path], two[path]
        if (a.geometry, a.shape) != (b.geometry, b.shape):
            raise LoRAError(
                f"'{path}': {a.shape} with {a.geometry} in the first, {b.shape} with {b.geometry} "
                "in the second; compare adapters of one base"
            )
        leaves[path] = Likeness(*map(np.asarray, _numbers(a, b)))
    # Also leaves that both have, but in full or by rows: there are no factors to compare.
    alone = lambda tree: tuple(p for p in tree if p not in both)
    return Comparison(leaves, alone(one), alone(two))


@anywhere
@jax.jit
def _numbers(one: LoRA, two: LoRA) -> tuple[jax.Array, ...]:
    # A (n, in, r), B (n, r, out); U (n, in, k), σ (n, k), Vᵀ (n, k, out).
    (a1, b1), (a2, b2) = matrices(one), matrices(two)
    (u1, s1, v1), (u2, s2, v2) = svd(one), svd(two)
    norms = jnp.stack([jnp.linalg.norm(s, axis=-1) for s in (s1, s2)])
    # ⟨A₁B₁, A₂B₂⟩ = tr(B₁ᵀA₁ᵀA₂B₂) = Σ (A₁ᵀA₂) ∘ (B₁B₂ᵀ), from two r₁ × r₂ matrices; of complex
    # ones the real part, as of vectors of twice the length.
    inner = jnp.sum(product(a1.mT.conj(), a2) * product(b1.conj(), b2.mT), (-2, -1)).real
    size = norms[0] * norms[1]
    # The inner `where` keeps 0 / 0 out of the branch that is not taken.
    cosine = jnp.where(size > 0, inner / jnp.where(size > 0, size, 1), 0)
    ranks = _rank(s1, a1, b1), _rank(s2, a2, b2)
    return norms, cosine, _angles(u1, u2, *ranks), _angles(v1.mT, v2.mT, *ranks)


def _rank(s: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """How many directions of each A·B are more than rounding, (n,)."""
    # Against the factors and not the largest σ: where A·B cancels, all of σ is rounding.
    size = jnp.linalg.norm(a, axis=(1, 2)) * jnp.linalg.norm(b, axis=(1, 2))
    lost = 8 * a.shape[-1] * jnp.finfo(s.dtype).eps * size
    return jnp.sum(s > lost[:, None], -1)


def _angles(q1: jax.Array, q2: jax.Array, rank1: jax.Array, rank2: jax.Array) -> jax.Array:
    """Angles of the spaces of the first `rank` columns (n,) of each (n, p, k); small ones by their
    sines, which rounding does not lose."""
    k1, k2 = q1.shape[-1], q2.shape[-1]
    # Zeros for the columns that are no directions, and as many columns in both.
    own = lambda q, rank: jnp.pad(
        jnp.where(jnp.arange(q.shape[-1]) < rank[:, None, None], q, 0),
        [(0, 0), (0, 0), (0, max(k1, k2) - q.shape[-1])],
    )
    q1, q2 = own(q1, rank1), own(q2, rank2)
    # The wider one first, so that the other has a column for each angle.
    swap = (rank2 > rank1)[:, None, None]
    q1, q2 = jnp.where(swap, q2, q1), jnp.where(swap, q1, q2)
    inner = product(q1.mT.conj(), q2)
    # An SVD sorts falling, zeros last: the cosines from the smallest angle on, and the sines from
    # the largest, hence the reversal of as many as there are.
    cosines = jnp.linalg.svd(inner, compute_uv=False)
    sines = jnp.linalg.svd(q2 - product(q1, inner), compute_uv=False)
    number, at = jnp.minimum(rank1, rank2)[:, None], jnp.arange(min(k1, k2))
    sines = jnp.take_along_axis(sines, jnp.maximum(number - 1 - at, 0), -1)
    cosines = cosines[:, : min(k1, k2)]
    small = jnp.arcsin(jnp.clip(sines, 0, 1))
    # Each on the side of 45° where it is steep: there a rounded value moves the angle least.
    angles = jnp.where(cosines**2 > 0.5, small, jnp.arccos(jnp.clip(cosines, 0, 1)))
    return jnp.where(at < number, jnp.degrees(angles), jnp.nan)
