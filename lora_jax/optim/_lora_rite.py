"""LoRA-RITE and LoRA-Muon: optimisers whose step does not depend on how A·B is split.

Both see a factor's gradient in an orthonormal basis of the other factor: with B = R·U the polar
decomposition (R = (B·Bᵀ)^½, U with orthonormal rows), g_A·R⁻¹ / s = G·Uᵀ is free of B's magnitude.
They choose a step S there, and S·R⁻¹ / s takes it back: W' changes by S·U, whatever R and s are.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax._core.einsum import product
from lora_jax._nodes.adapters import LowRank
from lora_jax.optim._labels import decays
from lora_jax.optim._pairs import (
    Out,
    columns,
    gram,
    masked_like,
    on_factors,
    partition,
    power,
    scaling,
    unzip,
    with_columns,
    with_node,
    zeros_like,
)
from lora_jax.optim._settings import check_optimiser, check_settings

CALL = "lora.optim.lora_rite(2e-4, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.1)"


class ScaleByLoraRiteState(NamedTuple):
    """State of `scale_by_lora_rite`; other leaves have a `MaskedNode` in each part. All arrays have
    the axes of their factor, by which they are sharded like it, in fp32.

    Attributes:
      count: how many updates there were.
      mu: first moments, adapters.
      basis: the orthonormal factors U of the last step, adapters.
      nu: second moments, nodes of (*batch, r, r) each, with axes of 1 in between.
      escaped: mass that left the bases, nodes of (*batch, 1, 1).
    """

    count: jax.Array
    mu: Any
    basis: Any
    nu: Any
    escaped: Any


def lora_rite(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    other: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """LoRA-RITE (Yen et al., arXiv:2410.20625): Adam's two moments, in a form that does not depend
    on how the product is split into factors.

    Good for: training in which A and B should both move without learning rates of their own. Each
    gradient is freed of the other factor's magnitude; second moments are r × r matrices, so the
    preconditioner is a full one on the side of the rank; both moments are carried over to the new
    basis in each step, and what the old basis loses of the second is added to its diagonal.

    This is the paper's algorithm. The authors' code also clips the gradients that are free of
    magnitude to a global norm of 1 and skips those with a root mean square above 1, and does not
    use the lost mass unless told to; here nothing is clipped or skipped.

    State: mu and basis, 2·(in + out)·r numbers as Adam has, and 2·r². FLOPs of a step: about
    18·(in + out)·r², and ten r × r eigendecompositions, for each weight.

    Args:
      learning_rate: a number or a schedule; as Adam's. W' moves by matrices S·U in which S has
        entries of about 1, independent of alpha.
      b1, b2: decay rates of the moments; 0.9 and 0.999 are those of the authors' README. Both are
        corrected for their start at zero, by decays that grow with the step.
      eps: added to the root of the second moment; 1e-6 in the authors' code.
      weight_decay: decoupled, as in AdamW, of A and of B.
      other: an optimiser of all leaves that are no factors (magnitudes, leaves trained in full or
        by rows); None: `optax.adamw` with the same settings.

    Returns:
      An optimiser for adapters, or for a tree that holds them beside frozen leaves. `update` needs
      the adapters.

    Raises:
      LoRAError: a decay rate outside of [0, 1), a negative number or one that is not finite.

    >>> import jax, jax.numpy as jnp, lora_jax as lora, optax
    >>> a, b = jax.random.normal(jax.random.key(0), (2, 8, 2))
    >>> params, tx = {"w": jnp.eye(8)}, lora.optim.lora_rite(1e-2, other=optax.sgd(1e-2))
    >>> def moved(c):  # the same product A·B, split in another way
    ...     node = {"w": lora.LoRA(c * a, b.T / c, 1.0, lora.Geometry((0,), (1,)))}
    ...     loss = lambda adapters: jnp.sum(lora.merge(params, adapters)["w"] ** 2)
    ...     updates, _ = tx.update(jax.grad(loss)(node), tx.init(node), node)
    ...     return lora.merge(params, optax.apply_updates(node, updates))["w"]
    >>> bool(jnp.allclose(moved(1.0), moved(10.0), atol=1e-3))
    True
    """
    learning_rate, b1, b2, eps, weight_decay = check_settings(
        CALL, learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay
    )
    if other is not None:
        check_optimiser(other, "lora.optim.lora_rite(2e-4, other=optax.adam(1e-3))")
    tx = optax.chain(
        scale_by_lora_rite(b1, b2, eps),
        optax.add_decayed_weights(weight_decay) if decays(weight_decay) else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )
    adam = optax.adamw(learning_rate, b1, b2, weight_decay=weight_decay)
    return partition(tx, adam if other is None else other)


def scale_by_lora_rite(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6
) -> optax.GradientTransformation:
    """The step of `lora_rite` without a learning rate; leaves that are no factors pass unchanged.

    >>> import optax, lora_jax as lora
    >>> tx = optax.chain(  # a trust ratio in between
    ...     lora.optim.scale_by_lora_rite(),
    ...     optax.scale_by_trust_ratio(),
    ...     optax.scale_by_learning_rate(2e-4),
    ... )
    """
    b1, b2, eps = check_settings(CALL, b1=b1, b2=b2, eps=eps)

    def init(params: optax.Params):
        squares = lambda node: zeros_like(node, node.rank)
        numbers = lambda node: zeros_like(node, 1)
        kinds = (zeros_like, zeros_like, squares, numbers)
        mu, basis, nu, escaped = (on_factors(fn, params, other=masked_like) for fn in kinds)
        return ScaleByLoraRiteState(jnp.zeros((), jnp.int32), mu, basis, nu, escaped)

    def update(updates: optax.Updates, state: Any, nodes: Any, scales: Any):
        count: Any = optax.safe_increment(state.count)
        d1, d2 = _decay(b1, count), _decay(b2, count)

        def leaf(
            g: LowRank,
            node: LowRank,
            scale: Any,
            mu: LowRank,
            basis: LowRank,
            nu: LowRank,
            escaped: LowRank,
        ):
            # (*batch, r, 1, …, r) to (n, r, r), and (*batch, 1, …) to (n,).
            squares = [x.reshape(-1, node.rank, node.rank) for x in (nu.a, nu.b)]
            numbers = [x.ravel() for x in (escaped.a, escaped.b)]
            # A's side needs B and B's old basis, and the other way round.
            y, u = columns(node)[::-1], columns(basis)[::-1]
            of = zip(columns(g), y, columns(mu), u, squares, numbers)
            sides = [_rite(*side, scale=scale, d1=d1, d2=d2, eps=eps) for side in of]
            # Five pairs, A's first; the bases are those of the other factors, hence reversed back.
            step, m, u, v, e = zip(*sides)
            fp32 = m[0].dtype
            return Out(
                with_columns(g, *step),
                with_columns(mu, *m, dtype=fp32),
                with_columns(basis, *u[::-1], dtype=fp32),
                with_node(nu, *v),
                with_node(escaped, *e),
            )

        trees = (nodes, scales, *state[1:])
        masked = optax.MaskedNode()
        keep = lambda g, *_: Out(g, masked, masked, masked, masked)
        updates, *rest = unzip(on_factors(leaf, updates, *trees, other=keep), Out)
        return updates, ScaleByLoraRiteState(count, *rest)

    return scaling("lora_rite", init, update)


def _rite(
    g: jax.Array,
    y: jax.Array,
    m: jax.Array,
    u_old: jax.Array,
    v: jax.Array,
    escaped: jax.Array,
    scale: Any,
    d1: jax.Array,
    d2: jax.Array,
    eps: float,
):
    """One side of the algorithm: gradient g and moment m (n, p, r) of a factor, the other factor y
    and its old basis (n, q, r), second moment v (n, r, r), escaped mass (n,)."""
    d1, d2 = d1.astype(g.dtype), d2.astype(g.dtype)
    # R⁻¹ (n, r, r), the basis U = y·R⁻¹, and the gradient without y's magnitude, g·R⁻¹ / s.
    root = power(gram(y), -0.5)
    u = product(y, root)
    g = product(g, root) / scale
    # From the old basis to the new (n, r, r): a contraction, as part of the old one is left.
    p = product(u.mT, u_old)
    moved = product(product(p, v), p.mT)
    # Rounding makes it unsymmetric, and eigh reads one triangle alone.
    moved = (moved + moved.mT) / 2
    # What the second moment had in directions that the new basis lacks goes on the diagonal.
    lost = jnp.max(jnp.linalg.eigvalsh(v) - jnp.linalg.eigvalsh(moved), -1)
    escaped = d2 * (escaped + jnp.maximum(lost, 0))
    # The mean over g's p rows of their outer products.
    v = d2 * moved + (1 - d2) * gram(g) / g.shape[-2]
    w, e = jnp.linalg.eigh(v)
    # (V + ρI)^−½ in V's eigenbasis, with eps as in Adam.
    w = 1 / (jnp.sqrt(jnp.maximum(w, 0) + escaped[:, None]) + eps)
    step = product(product(g, e) * w[..., None, :], e.mT)
    # The momentum is of steps, in the basis of the last one: it is turned to this one.
    m = d1 * product(m, p.mT) + (1 - d1) * step
    # S·R⁻¹ / s: W' moves by s·(S·R⁻¹/s)·(R·U) = S·U.
    return product(m, root) / scale, m, u, v, escaped


def _decay(beta: Any, count: jax.Array):
    """β·(1 − β^(t−1)) / (1 − β^t): with it a moving average needs no correction of its bias."""
    t, known = count.astype(float), isinstance(beta, float)
    # 1 − β^t as such would lose a share ε / (1 − β) of itself, and 0 has no logarithm.
    log = math.log(max(beta, 1e-30)) if known else jnp.log(jnp.maximum(beta, 1e-30))
    return beta * jnp.expm1((t - 1) * log) / jnp.expm1(t * log)
