"""Where training starts: initialisers of A and B from the weights or their gradients.

Those with an update that is not zero take it out of the base, so that the adapted function begins
as the plain one; they return the new base with the adapters. `on_original` goes back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._adapters import LoRA, is_node
from lora_jax._algebra import combine, from_svd, linear, range_svd, svd
from lora_jax._einsum import wide
from lora_jax._errors import LoRAError, raise_all
from lora_jax._init import _typed, path_key
from lora_jax._nnx import state_of
from lora_jax._paths import flatten, nest
from lora_jax._start import (
    as_matrices,
    as_node,
    each,
    lora_nodes,
    off_the_base,
    plain_svd,
    positive,
)


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
    >>> base, adapters = lora.pissa(params, start)
    >>> bool(jnp.allclose(base["w"], jnp.diag(jnp.array([0.0, 2.0, 1.0])), atol=1e-5))
    True
    """
    if niter is not None and niter < 0:
        raise LoRAError(f"expected niter >= 0 or None, found {niter}: lora.pissa(..., niter=4)")

    def make(path, node, w):
        usv = plain_svd(w) if niter is None else range_svd(w, node.rank, niter)
        return from_svd(node, *usv, node.rank, node.scale)

    return off_the_base(params, adapters, make)


def olora(params: Any, adapters: Any) -> tuple[Any, dict]:
    """An orthonormal B from the QR decomposition of W (OLoRA, Büyükakyüz 2024,
    arXiv:2406.01775): Wᵀ = Q·R, B = Q_rᵀ, A = R_rᵀ, base' = W − s·A·B.

    Arguments, result and errors as of `pissa`.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jax.random.normal(jax.random.key(0), (5, 4))}
    >>> start = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets="w"))
    >>> b = lora.olora(params, start)[1]["w"].b
    >>> bool(jnp.allclose(b @ b.T, jnp.eye(2), atol=1e-6))
    True
    """

    def make(path, node, w):
        q, r = jnp.linalg.qr(w.mT)  # (n, out, k), (n, k, in)
        return as_node(node, r[:, : node.rank].mT, q[:, :, : node.rank].mT)

    return off_the_base(params, adapters, make)


def lora_ga(params: Any, adapters: Any, gradients: Any, *, gamma: float = 16.0) -> tuple[Any, dict]:
    """The first step of gradient descent is along the best rank-2r part of the full gradient
    (LoRA-GA, Wang 2024, arXiv:2407.05000).

    With G = ∂loss/∂W = U·S·Vᵀ, A = c·U[:, 1…r] and B = c·V[:, r+1…2r]ᵀ, orthonormal but for the
    scale c = ⁴√out / √γ that keeps outputs stable; base' = W − s·A·B. So does the authors'
    code by default ("ArB2r", "stable"), with a randomised SVD. PEFT's port is another method: there
    B is also multiplied by the singular values, and c is on B alone.

    Args:
      params, adapters: as of `pissa`. The paper's scale is alpha / √rank, `rank_stabilized=True`.
      gradients: the gradient of each adapted leaf: either as `jax.grad(loss)(params)` gives it,
        which takes the memory of all of them, or low-rank, from `low_rank_gradients`, with the
        memory of a few adapters.
      gamma: γ, 16 in the authors' code; the smaller, the larger A and B.

    Returns:
      As `pissa`.

    Raises:
      LoRAError: as `pissa`; a leaf without a gradient, or of a rank above min(in, out) / 2.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jnp.eye(4)}, jax.random.normal(jax.random.key(0), (9, 4))
    >>> loss = lambda p: jnp.sum((x @ p["w"]) ** 2)
    >>> start = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets="w"))
    >>> base, adapters = lora.lora_ga(params, start, jax.grad(loss)(params))
    >>> bool(jnp.allclose(lora.merge(base, adapters)["w"], params["w"], atol=1e-6))
    True
    """
    positive(gamma=gamma)
    nodes = lora_nodes(adapters)
    found = _gradients(gradients, nodes, lambda node: 2 * node.rank)

    def make(path, node, w):
        r = node.rank
        u, _, v = found[path]
        c = w.shape[-1] ** 0.25 / math.sqrt(gamma)
        return as_node(node, c * u[:, :, :r], c * v[:, r : 2 * r])

    return off_the_base(params, adapters, make)


def lora_one(
    adapters: Any, gradients: Any, *, gamma: float = 128.0, normalized: bool = True
) -> dict:
    """One step of gradient descent, at rank r, before the first (LoRA-One, Zhang 2025,
    arXiv:2502.01235, algorithm 1): A·B = −G_r / (γ·S₁) with √S on either side; the base stays. The
    authors' code also multiplies A and B by ⁴√out, as LoRA-GA's does, which here is part of γ.

    Args:
      adapters: as of `pissa`.
      gradients: as of `lora_ga`.
      gamma: the step is scale / γ; 128 in the authors' code, with scale = alpha / √rank.
      normalized: divide G by its largest singular value S₁, as algorithm 1 does: γ then means the
        same whatever the size of the loss. False: the step of gradient descent as it is.

    Returns:
      The adapters.

    Raises:
      LoRAError: as `lora_ga`.

    >>> import jax.numpy as jnp, lora_jax as lora, jax
    >>> params, g = {"w": jnp.zeros((2, 2))}, {"w": jnp.diag(jnp.array([4.0, 1.0]))}
    >>> config = lora.LoRAConfig(rank=1, alpha=1, targets="w")
    >>> start = lora.init(jax.random.key(0), params, config)
    >>> moved = lora.merge(params, lora.lora_one(start, g, gamma=0.5))["w"]
    >>> bool(jnp.allclose(moved, jnp.diag(jnp.array([-2.0, 0.0]))))
    True
    """
    positive(gamma=gamma)
    nodes = lora_nodes(adapters)
    found = _gradients(gradients, nodes, lambda node: node.rank)

    def make(path, node):
        u, s, v = found[path]
        top = s[:, :1] if normalized else jnp.ones_like(s[:, :1])
        s = s / jnp.where(top > 0, top, 1) * (node.scale / gamma)
        return from_svd(node, -u, s, v, node.rank, node.scale)

    return each(adapters, make)


def orthogonal(key: jax.Array, adapters: Any, *, scale: float = 0.1) -> dict:
    """A and B that are not zero, with a product that is (PEFT's "orthogonal"): of an orthogonal
    matrix (r, r) one half of the rows, Q₁, goes into A = scale·X·Q₁, the other into
    B = scale·Q₂ᵀ·Y, with X and Y normal; A·B = 0 as Q₁·Q₂ᵀ is. The base stays.

    Args:
      key: a PRNG key; each leaf's values are of it and the leaf's path alone.
      adapters: as of `pissa`.
      scale: of either factor; a tenth in PEFT.

    Returns:
      The adapters.

    Raises:
      LoRAError: an odd rank.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.ones((4, 4))}
    >>> start = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets="w"))
    >>> node = lora.orthogonal(jax.random.key(1), start)["w"]
    >>> bool(jnp.abs(node.a @ node.b).max() < 1e-6)
    True
    """
    key = _typed(key)
    raise_all(
        "an orthogonal initialisation needs an even rank:",
        (f"'{p}' has rank {n.rank}" for p, n in lora_nodes(adapters).items() if n.rank % 2),
    )

    def make(path, node):
        n, i, o = node.geometry.sizes(node.shape)
        r, dtype = node.rank, wide(node.a.dtype)
        to_q, to_a, to_b = jax.random.split(path_key(key, path), 3)
        q = jnp.linalg.qr(jax.random.normal(to_q, (n, r, r), dtype))[0]
        a = jax.random.normal(to_a, (n, i, r // 2), dtype) @ q[:, 0::2]
        b = q[:, 1::2].mT @ jax.random.normal(to_b, (n, r // 2, o), dtype)
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
    >>> base, start = lora.pissa(params, start)
    >>> trained = jax.tree.map(lambda x: x + 1, start)
    >>> plain = lora.on_original(trained, start)
    >>> one, two = lora.merge(base, trained)["w"], lora.merge(params, plain)["w"]
    >>> plain["w"].rank, bool(jnp.allclose(one, two, atol=1e-5))
    (2, True)
    """
    after, before = (flatten(linear(x), is_leaf=is_node) for x in (adapters, start))
    raise_all(
        "these are not the adapters before and after:",
        sorted(f"'{p}' is in one of them alone" for p in after.keys() ^ before.keys()),
    )
    low = lambda flat: nest({p: n for p, n in flat.items() if isinstance(n, LoRA)})
    both = flatten(combine([low(after), low(before)], [1.0, -1.0]), is_leaf=is_node)
    return nest({p: both.get(p, n) for p, n in after.items()})


def _gradients(gradients: Any, nodes: Mapping[str, LoRA], rank: Callable) -> dict[str, tuple]:
    """{path: (U, S, Vᵀ)} of the gradients of these leaves."""
    flat = flatten(state_of(gradients), is_leaf=is_node)
    failures, found = [], {}
    for path, node in nodes.items():
        g, need = flat.get(path), rank(node)
        if g is None:
            failures.append(f"'{path}' has none")
        elif tuple(g.shape) != node.shape:
            failures.append(f"'{path}': expected one of {node.shape}, found {tuple(g.shape)}")
        else:
            found[path] = svd(g) if isinstance(g, LoRA) else plain_svd(as_matrices(node, g))
            if found[path][1].shape[-1] < need:
                have = found[path][1].shape[-1]
                failures.append(f"'{path}': {need} singular values are needed, it has {have}")
    raise_all(
        "the gradients are not those of these adapters:",
        failures,
        "jax.grad(loss)(params), or lora.low_rank_gradients(loss, params, adapters)",
    )
    return found
