"""Where training starts: initialisers of A and B from the weights or their gradients.

Those with an update that is not zero take it out of the base, so that the adapted function begins
as the plain one; they return the new base with the adapters. `on_original` goes back.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lora_jax._core.einsum import product, wide
from lora_jax._core.errors import raise_all
from lora_jax._core.keys import as_key, path_key
from lora_jax._core.mesh import placement
from lora_jax._core.nnx import state_of
from lora_jax._core.numbers import NOT_NEGATIVE, PASSES_OR_ZERO, check_numbers
from lora_jax._core.paths import flatten, nest
from lora_jax._nodes.adapters import LoRA
from lora_jax._nodes.node import is_node
from lora_jax.algebra._arguments import linear
from lora_jax.algebra._combine import combine
from lora_jax.algebra._svd import as_node, best_svd, from_svd, range_svd
from lora_jax.methods._start import each, lora_nodes, off_the_base

if TYPE_CHECKING:
    import chex


def pissa(params: Any, adapters: Any, *, niter: int | None = None) -> tuple[Any, dict]:
    """The principal singular values and vectors are trained, the rest is the base (PiSSA, Meng
    2024, arXiv:2404.02948): W = U·Σ·Vᵀ, A = U_r·√(Σ_r / s), B = √(Σ_r / s)·V_rᵀ and
    base' = W − s·A·B, the spectral norm of which is σ_{r+1}.

    Args:
      params: the base parameters, or an NNX module.
      adapters: as from `init`, of which shapes, types and scales are read, not values; abstract
        ones too. Leaves trained in full or by rows stay as they are.
      niter: None: the SVD. Otherwise that many iterations from a random start, always the same,
        on r + 10 vectors (the paper's "fast SVD"): cheaper, and about the same.

    Returns:
      (base', adapters): the base in its own dtypes, rounded once after a subtraction in fp32.

    Raises:
      LoRAError: adapters of another model, a scale that is not positive, a `DoRA` (`dora` comes
        after), a niter below 0; all of them at once.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
    >>> start = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=1, targets="w"))
    >>> base, adapters = lora.methods.pissa(params, start)
    >>> bool(jnp.allclose(base["w"], jnp.diag(jnp.array([0.0, 2.0, 1.0])), atol=1e-5))
    True
    """
    call = "lora.methods.pissa(params, adapters, niter=4)"
    (niter,) = check_numbers(call, niter=(niter, PASSES_OR_ZERO.or_none))
    # Read off the leaves: what `make` gets is reshaped or traced, and no longer says it.
    spread = {p: placement(w) is not None for p, w in flatten(state_of(params)).items()}

    def make(path: str, node: LoRA, w: jax.Array) -> LoRA:
        svd = functools.partial(best_svd, spread=spread[path])
        usv = svd(w, node.rank) if niter is None else range_svd(w, node.rank, niter)
        return from_svd(node, *usv, node.rank, node.scale)

    return off_the_base(params, adapters, make, "methods.pissa")


def olora(params: Any, adapters: Any) -> tuple[Any, dict]:
    """An orthonormal B from the QR decomposition of W (OLoRA, Büyükakyüz 2024,
    arXiv:2406.01775): Wᵀ = Q·R, B = Q_rᵀ, A = R_rᵀ, base' = W − s·A·B.

    Arguments, result and errors as of `pissa`.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jax.random.normal(jax.random.key(0), (5, 4))}
    >>> start = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets="w"))
    >>> base, adapters = lora.methods.olora(params, start)  # train against this base
    >>> bool(jnp.allclose(lora.merge(base, adapters)["w"], params["w"], atol=1e-5))
    True
    """

    def make(path: str, node: LoRA, w: jax.Array) -> LoRA:
        # Q (n, out, k), R (n, k, in).
        q, r = jnp.linalg.qr(w.mT)
        return as_node(node, r[:, : node.rank].mT, q[:, :, : node.rank].mT)

    return off_the_base(params, adapters, make, "methods.olora")


def orthogonal(key: chex.PRNGKey, adapters: Any, *, scale: float = 0.1) -> dict:
    """A and B are not zero, and their product is (PEFT's "orthogonal"). Half of the rows of an
    orthogonal matrix (r, r), Q₁, go into A = scale·X·Q₁, the other half, Q₂, into
    B = scale·Q₂ᵀ·Y, with X and Y normal. As Q₁·Q₂ᵀ = 0, A·B = 0 and the base stays.

    Args:
      key: a PRNG key; the values of a leaf depend on it and on the leaf's path alone.
      adapters: as of `pissa`.
      scale: of either factor; a tenth in PEFT.

    Returns:
      The adapters.

    Raises:
      LoRAError: an odd rank, a scale that is negative or not finite.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.ones((4, 4))}
    >>> start = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets="w"))
    >>> adapters = lora.methods.orthogonal(jax.random.key(1), start)
    >>> bool(adapters["w"].b.any()), lora.merge(params, adapters)["w"].round(3)[0]  # not moved yet
    (True, Array([1., 1., 1., 1.], dtype=float32))
    """
    key = as_key(key, "lora.methods.orthogonal({key}, adapters)")
    call = "lora.methods.orthogonal(key, adapters, scale=0.1)"
    (scale,) = check_numbers(call, traced=True, scale=(scale, NOT_NEGATIVE))
    raise_all(
        "an orthogonal initialisation needs an even rank:",
        (f"'{p}' has rank {n.rank}" for p, n in lora_nodes(adapters).items() if n.rank % 2),
        "lora.init(key, params, lora.LoRAConfig(rank=8))",
    )

    def make(path: str, node: LoRA) -> LoRA:
        n, i, o = node.geometry.sizes(node.shape)
        r, dtype = node.rank, wide(node.a.dtype)
        to_q, to_a, to_b = jax.random.split(path_key(key, path), 3)
        q = jnp.linalg.qr(jax.random.normal(to_q, (n, r, r), dtype))[0]
        # Even rows of q are Q₁, odd ones Q₂, (n, r/2, r) each: Q₁·Q₂ᵀ = 0.
        a = product(jax.random.normal(to_a, (n, i, r // 2), dtype), q[:, 0::2])
        b = product(q[:, 1::2].mT, jax.random.normal(to_b, (n, r // 2, o), dtype))
        return as_node(node, scale * a, scale * b)

    return each(adapters, make)


def on_original(adapters: Any, start: Any) -> dict:
    """Adapters of twice the rank that do to the original base what `adapters` do to a changed one:
    [A, A₀] and [s·B; −s·B₀], so that W + that is base' + s·A·B.

    Exact, but for the rounding of a base' in low precision. A base that is shared, or not to be
    shipped again, can so be kept.

    Args:
      adapters: the trained ones.
      start: those that the initialiser returned.

    Returns:
      `LoRA` nodes with scale 1; leaves trained in full or by rows stay as they are.

    Raises:
      LoRAError: trees that differ; a `DoRA`.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jax.random.normal(jax.random.key(0), (5, 4))}
    >>> start = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=1, targets="w"))
    >>> base, start = lora.methods.pissa(params, start)
    >>> trained = jax.tree.map(lambda x: x + 1, start)
    >>> plain = lora.methods.on_original(trained, start)
    >>> one, two = lora.merge(base, trained)["w"], lora.merge(params, plain)["w"]
    >>> plain["w"].rank, bool(jnp.allclose(one, two, atol=1e-5))
    (2, True)
    """
    after, before = (flatten(linear(x), is_leaf=is_node) for x in (adapters, start))
    raise_all(
        "these are not the adapters before and after:",
        sorted(f"'{p}' is in one of them alone" for p in after.keys() ^ before.keys()),
        "lora.methods.on_original(trained, start), with the start that training began from",
    )
    # `combine` folds the scales into B; leaves in full and by rows are not relative to a base.
    low = lambda flat: nest({p: n for p, n in flat.items() if isinstance(n, LoRA)})
    both = flatten(combine([low(after), low(before)], [1.0, -1.0]), is_leaf=is_node)
    return nest({p: both.get(p, n) for p, n in after.items()})
