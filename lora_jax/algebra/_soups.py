"""Merging several adapters by the methods of the literature: TIES, DARE, pruning, KnOTS.

The papers define these on task vectors, the differences from the base. That of a low-rank adapter
is Δ = scale · A·B, so they are applied to Δ here. Applied to A and to B, one after the other, they
are something else: the product of trimmed factors is not the trimmed product.

What a method keeps of Δ element by element is dense and of full rank. So one says what is wanted
back: the best adapter of a rank, or the whole as a leaf in full. KnOTS stays of low rank.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lora_jax._core.einsum import product
from lora_jax._core.errors import LoRAError
from lora_jax._core.keys import as_key
from lora_jax._core.mesh import anywhere, placed
from lora_jax._core.numbers import BELOW_ONE, PASSES_OR_ZERO, SHARE, check_flags, integer, shown
from lora_jax._core.paths import nest
from lora_jax._nodes.adapters import LoRA
from lora_jax.algebra._arguments import Part, Parts, check_rank, parts_of
from lora_jax.algebra._combine import typed_alike
from lora_jax.algebra._elementwise import Method, cuts, merged, moved, spread
from lora_jax.algebra._svd import (
    as_node,
    best_svd,
    from_svd,
    leaf_sharding,
    matrices,
    range_svd,
    rank_for,
    share_kept,
)

if TYPE_CHECKING:
    import chex

# Which of its steps a method has: (trim, drop, elect signs).
HOW = {
    "sum": (False, False, False),
    "prune": (True, False, False),
    "ties": (True, False, True),
    "dare": (False, True, False),
    "dare_ties": (False, True, True),
}


def ties(
    adapters: Sequence[Any],
    weights: Sequence[Any] | None = None,
    *,
    density: float = 0.2,
    per_weight: bool = False,
    rank: int | None = None,
    energy: float | None = None,
    passes: int | None = None,
    base: Any = None,
) -> tuple[dict, dict[str, jax.Array]]:
    """TIES (arXiv:2306.01708): trim, elect signs, and the mean of what agrees.

    Each task vector τₖ = wₖ·Δₖ keeps the share `density` of its elements, the largest by magnitude.
    The elected sign of an element is that of Σ τₖ. Its value is the mean of the τₖ that have this
    sign. Zero has no sign, so neither what was trimmed nor what a tree does not have is counted,
    and an element whose sum is zero (but for rounding) is zero.

    Args:
      adapters: adapter trees of one base. They may have other targets and ranks.
      weights: as for `combine`; one number λ for all is the paper's λ.
      density: the share that the trim keeps, in (0, 1]; equal magnitudes are kept together. As in
        the paper it is of the whole task vector: of all leaves that the tree has.
      per_weight: of each weight (in a stack, of each layer) by itself, as PEFT and mergekit count.
      rank, energy: as for `resize`: low-rank leaves come back as the best adapters of this rank, or
        of the smallest rank that keeps this share of ‖Δ‖². It takes the SVD of one leaf at a time.
      passes: with a rank, in place of the SVD: so many passes of subspace iteration from a random
        start (arXiv:0909.4061, algorithm 4.4). In large leaves much faster, and not the best.
      base: the base parameters. Without rank and energy, low-rank leaves come back exactly, as
        `Full`: base + Δ. Leaves that are trained in full or by rows need it always: their task
        vector is the difference from it, and they stay what they are.

    Returns:
      (adapters with scale 1, {path: share of ‖Δ‖² that is kept, the least of a stack}). One leaf of
      each adapter is dense at a time; under jit, the compiler decides.

    Raises:
      LoRAError: as `combine`; a density out of range; none of rank, energy and base; a leaf that is
        no `LoRA`, `Full` or `Rows`.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> def node(row):
    ...     b = jnp.array([row], float)
    ...     return {"w": lora.LoRA(jnp.ones((1, 1)), b, 1.0, lora.Geometry((0,), (1,)))}
    >>> two = [node([4, -2, 0.1, 3]), node([2, 3, 0.2, 0])]
    >>> merged, kept = lora.algebra.ties(two, density=0.5, base={"w": jnp.zeros((1, 4))})
    >>> merged["w"].value
    Array([[3., 3., 0., 3.]], dtype=float32)
    """
    method = _method("ties", density=density, per_weight=per_weight)
    call = "lora.algebra.ties([first, second], [0.5, 0.5], {})"
    return _elementwise(adapters, weights, method, None, rank, energy, passes, base, call)


def prune(
    adapters: Sequence[Any],
    weights: Sequence[Any] | None = None,
    *,
    density: float,
    per_weight: bool = False,
    rank: int | None = None,
    energy: float | None = None,
    passes: int | None = None,
    base: Any = None,
) -> tuple[dict, dict[str, jax.Array]]:
    """Magnitude pruning: Σ wₖ·Δₖ of the largest elements of each, all else being zero.

    The first step of TIES alone (arXiv:2306.01708); of one adapter, `[adapters]`, it says how
    much of its update may be missing.

    Args:
      adapters, weights, density, per_weight, rank, energy, passes, base: as for `ties`.

    Returns:
      As `ties`.

    Raises:
      LoRAError: as `ties`.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> b = jnp.array([[4.0, -2.0, 0.1, 3.0]])
    >>> one = {"w": lora.LoRA(jnp.ones((1, 1)), b, 1.0, lora.Geometry((0,), (1,)))}
    >>> lora.algebra.prune([one], density=0.5, base={"w": jnp.ones((1, 4))})[0]["w"].value
    Array([[5., 1., 1., 4.]], dtype=float32)
    """
    method = _method("prune", density=density, per_weight=per_weight)
    call = "lora.algebra.prune([first, second], [0.5, 0.5], density=0.2, {})"
    return _elementwise(adapters, weights, method, None, rank, energy, passes, base, call)


def dare(
    key: chex.PRNGKey,
    adapters: Sequence[Any],
    weights: Sequence[Any] | None = None,
    *,
    rate: float = 0.9,
    how: str = "sum",
    rank: int | None = None,
    energy: float | None = None,
    passes: int | None = None,
    base: Any = None,
) -> tuple[dict, dict[str, jax.Array]]:
    """DARE (arXiv:2311.03099): drop elements of each Δₖ at random, and rescale.

    An element is zero with probability `rate`, and else divided by 1 − rate, so that the mean over
    keys is Δₖ. What is drawn depends on `key`, the leaf's path and the place in `adapters` alone:
    another leaf or one more adapter changes nothing.

    Args:
      key: a PRNG key, of either kind.
      adapters, weights, rank, energy, passes, base: as for `ties`.
      rate: the probability p to drop an element, in [0, 1).
      how: "sum", Σ wₖ·Δₖ of what is left; or "ties", the elected signs and mean of `ties`, without
        its trim (as `dare_ties` of PEFT and mergekit).

    Returns:
      As `ties`.

    Raises:
      LoRAError: as `ties`; or a rate out of range.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> node = lora.LoRA(jnp.ones((1, 1)), jnp.ones((1, 6)), 1.0, lora.Geometry((0,), (1,)))
    >>> base = {"w": jnp.zeros((1, 6))}
    >>> lora.algebra.dare(jax.random.key(1), [{"w": node}], rate=0.5, base=base)[0]["w"].value
    Array([[0., 2., 2., 0., 0., 0.]], dtype=float32)
    """
    names = {"sum": "dare", "ties": "dare_ties"}
    _check_how(how, names, "lora.algebra.dare(key, [first, second], how='sum', rank=16)")
    method = _method(names[how], rate=rate)
    key = as_key(key, "lora.algebra.dare({key}, [first, second], rank=16)")
    call = "lora.algebra.dare(key, [first, second], [0.5, 0.5], {})"
    return _elementwise(adapters, weights, method, key, rank, energy, passes, base, call)


def knots(
    adapters: Sequence[Any],
    weights: Sequence[Any] | None = None,
    *,
    how: str = "ties",
    density: float = 0.2,
    per_weight: bool = False,
    key: chex.PRNGKey | None = None,
    rate: float = 0.9,
    base: Any = None,
) -> dict:
    """KnOTS (arXiv:2410.19735): merge in the directions that the adapters share.

    The paper's updates are (out, in), side by side [Δ₁ … Δₙ] = U·Σ·[V₁ … Vₙ]ᵀ; so U, what the
    updates write to, is common to all, and each Vₖ says where in the inputs it is read. The merge
    is of the Vₖ·Σ, (in, Σr), and its product with Uᵀ, (Σr, out), is the result. Exact, of a rank of
    at most Σ rₖ, from QR decompositions of the factors: no Δ is formed.

    Merging Vₖ·Σ and not Vₖ differs in the trim alone. As U is orthonormal, elements of Vₖ·Σ are of
    the size of the update, in all directions and leaves; the authors' code does so as well.

    Args:
      adapters: as for `ties`.
      weights: as for `combine`. The shared directions are those of the adapters without weights.
      how: what is done to the Vₖ·Σ: "ties", "prune", "dare", "dare_ties" or "sum" (which is
        `combine`, at a rank of at most `out`).
      density, per_weight: of "ties" and "prune", as for `ties`; of the whole of what an adapter has
        in the shared directions.
      key, rate: of "dare" and "dare_ties", as for `dare`.
      base: the base parameters, for leaves that are trained in full or by rows. Their task vector
        is the difference from it, to which the same is done.

    Returns:
      Adapters with scale 1; the rows of B are orthonormal.

    Raises:
      LoRAError: as `ties`; "dare" without a key.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> def node(a, b):
    ...     a, b = jnp.array(a, float)[:, None], jnp.array([b], float)
    ...     return {"w": lora.LoRA(a, b, 1.0, lora.Geometry((0,), (1,)))}
    >>> two = [node([3, 1], [1, 1]), node([3, -2], [1, 1])]  # they write to one direction
    >>> merged = lora.algebra.knots(two, density=1)["w"]
    >>> (merged.a @ merged.b).round()
    Array([[ 3.,  3.],
           [-2., -2.]], dtype=float32)
    """
    method = _method(how, density, rate, per_weight)
    if method.rate > 0 and key is None:
        raise LoRAError(
            f"how={how!r} draws at random: lora.algebra.knots(..., key=jax.random.key(0))"
        )
    call = "lora.algebra.knots([first, second], [0.5, 0.5])"
    key = None if method.rate == 0 else as_key(key, "lora.algebra.knots(..., key={key})")
    leaves = parts_of(adapters, weights, base, call)
    shared = {}
    for path, parts in leaves.items():
        # One kind a leaf: `parts_of` has refused a mixture.
        if any(p is not None and isinstance(p.node, LoRA) for p in parts):
            # From here on the parts are arrays Vₖ·Σ, trimmed and added up as any task vector.
            leaves[path], shared[path] = _aligned(parts)
    trimmed, out = cuts(leaves, method), {}
    for path, parts in leaves.items():
        delta = merged(leaves, path, trimmed, key, method)
        if path in shared:
            like, b = shared[path]
            # The merged Vₖ·Σ (n, in, k) are A; B is Uᵀ (n, k, out).
            out[path] = placed(as_node(like, delta, b, 1.0), leaf_sharding(like))
        else:
            out[path] = moved(parts, delta)
    return nest(out)


def _method(how: str, density: float = 1.0, rate: float = 0.0, per_weight: bool = False) -> Method:
    _check_how(how, HOW, "lora.algebra.knots([first, second], how='ties')")
    trim, drop, elect = HOW[how]
    if trim and not SHARE.fits(density):
        raise LoRAError(f"density={density}: expected the share to keep, in (0, 1]: density=0.2")
    if drop and not BELOW_ONE.fits(rate):
        raise LoRAError(
            f"rate={rate}: expected the probability to drop an element, in [0, 1): rate=0.9"
        )
    check_flags("per_weight=True", per_weight=per_weight)
    density, rate = float(density) if trim else 1.0, float(rate) if drop else 0.0
    return Method(density, rate, elect, per_weight)


def _check_how(how: Any, names: Iterable[str], call: str) -> None:
    if not (isinstance(how, str) and how in names):
        raise LoRAError(f"how={how!r}: expected one of {', '.join(map(repr, names))}: {call}")


def _elementwise(
    adapters: Sequence[Any],
    weights: Sequence[Any] | None,
    method: Method,
    key: jax.Array | None,
    rank: int | None,
    energy: float | None,
    passes: int | None,
    base: Any,
    call: str,
):
    # Exact: low-rank leaves come back in full, as base + Δ.
    exact = rank is None and energy is None
    if not exact:
        rank, energy = check_rank(rank, energy, call)
    elif base is None:
        raise LoRAError(
            "what is left element by element is of full rank; say what is wanted: rank=16 or "
            "energy=0.9, the best adapters of low rank, or base=params, all of it, as `Full` leaves"
        )
    if passes is not None and (rank is None or not PASSES_OR_ZERO.fits(passes)):
        raise LoRAError(
            f"passes={shown(passes)}: expected a number >= 0 (and <= 1000) and a rank, found "
            f"rank={rank}: " + call.format("rank=16, passes=2")
        )
    passes = integer(passes)  # static, and so hashed
    leaves = parts_of(adapters, weights, base, call.format("rank=16"), exact=exact)
    trimmed, out, kept = cuts(leaves, method), {}, {}
    for path, parts in leaves.items():
        # (n, in, out), of one leaf at a time.
        delta = merged(leaves, path, trimmed, key, method)
        nodes = [p.node for p in parts if p is not None]
        kept[path] = jnp.ones(())
        if isinstance(nodes[0], LoRA) and not exact:
            where = leaf_sharding(nodes[0])
            if passes is None:
                # An energy needs all singular values: there even a sharded leaf has the whole SVD.
                spread = where is not None and rank is not None
                u, s, v = anywhere(functools.partial(best_svd, rank=rank or 0, spread=spread))(
                    delta
                )
            else:
                u, s, v = anywhere(functools.partial(_range_svd, rank=rank, passes=passes))(delta)
            keep = rank if energy is None else rank_for(s, energy)
            assert keep is not None  # one of the two is given
            # Against ‖Δ‖² itself: subspace iteration does not have all of the σ.
            kept[path] = share_kept(s, keep, jnp.sum(delta**2, (1, 2)))
            out[path] = placed(from_svd(typed_alike(nodes)[0], u, s, v, keep), where)
        else:
            out[path] = moved(parts, delta)
    return nest(out), kept


_range_svd = jax.jit(range_svd, static_argnums=(1, 2))


def _aligned(parts: Parts) -> tuple[Parts, tuple[LoRA, jax.Array]]:
    """Each Vₖ·Σ (n, in, k), and (a node like the result, Uᵀ (n, k, out))."""
    have = [p for p in parts if p is not None]
    own, b = _shared([p.node for p in have])
    own = iter(own)
    aligned = tuple(p and Part(next(own), spread(p)) for p in parts)
    return aligned, (typed_alike([p.node for p in have])[0], b)


@anywhere
@jax.jit
def _shared(nodes: list[LoRA]) -> tuple[list[jax.Array], jax.Array]:
    """The SVD of updates one above the other, Δₖ = (Vₖ·Σ)·Uᵀ, from the QR of their factors."""
    # Aₖ (n, in, rₖ), Bₖ (n, rₖ, out).
    a, b = zip(*map(matrices, nodes))
    # [B₁ᵀ B₂ᵀ …] = Q·[R₁ R₂ …]: Q (n, out, k) spans all that any of them writes to, Bₖ = Rₖᵀ·Qᵀ.
    q, r = jnp.linalg.qr(jnp.concatenate(b, -2).mT)
    ends = [sum(x.shape[-1] for x in a[: i + 1]) for i in range(len(a))]
    # Aₖ = Qₖ·Tₖ, so Δₖ = Qₖ·(Tₖ·Rₖᵀ)·Qᵀ. An orthonormal Qₖ on the left changes no right singular
    # vector: those of the stacked Tₖ·Rₖᵀ, times Qᵀ, are those of the stacked Δₖ.
    small = [
        product(jnp.linalg.qr(x, mode="r"), y.mT)
        for x, y in zip(a, jnp.split(r, ends[:-1], axis=-1))
    ]
    v = product(jnp.linalg.svd(jnp.concatenate(small, -2), full_matrices=False)[2], q.mT)
    # Vₖ·Σ = Δₖ·U, by the small product first: Bₖ·U is (n, rₖ, k).
    return [product(x, product(y, v.mT)) for x, y in zip(a, b)], v
