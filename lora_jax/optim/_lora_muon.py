"""LoRA-Muon: a step that does not depend on how A·B is split."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax._core.einsum import product, wide
from lora_jax._core.errors import LoRAError
from lora_jax._core.numbers import is_real
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
    required,
    scaling,
    unzip,
    with_columns,
    zeros_like,
)
from lora_jax.optim._settings import check_optimiser, check_settings

CALL = "lora.optim.lora_muon(1e-2, b1=0.95, weight_decay=0.1)"


class ScaleByLoraMuonState(NamedTuple):
    """State of `scale_by_lora_muon`: the momentum, adapters in fp32."""

    mu: Any


def lora_muon(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.95,
    weight_decay: float = 0.0,
    other: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """LoRA-Muon (Cesista et al., arXiv:2606.12921, algorithm 1): steepest descent in
    the spectral norm of the change of W', as Muon, on the product of two factors.

        dA = ½·msign(m_A·R_B)·R_B / |s|,    R_B = (B·Bᵀ)^−½,    msign(U·Σ·Vᵀ) = U·Vᵀ,

    and likewise dB, with m the averages of g. Good for: a learning rate that is the spectral norm
    of the change of W' in one step (half for each factor), so that it carries over between ranks,
    widths and values of alpha; and half of Adam's state. It is LoRA-RITE without memory (b1 = b2 =
    0), up to the norm of the step.

    The paper has s = 1; the division by |s|, which makes the step independent of alpha, is ours. So
    is the way to compute: inverse roots of r × r matrices by eigendecompositions, exact to fp32
    (the paper's appendix B iterates polynomials). Directions that a factor or its momentum lacks,
    below √(r·ε) of the largest, about 10⁻³, are left out, so that at B = 0 only B moves. So is the
    paper's optional rebalancing of the factors' norms.

    State: (in + out)·r numbers. FLOPs of a step: about 10·(in + out)·r² and four r × r
    eigendecompositions for each weight.

    Args:
      learning_rate: a number or a schedule.
      b1: decay rate of the momentum, a moving average; 0.95 is usual for Muon.
      weight_decay: λ of the paper's split rule: with ρ = √(1 − λη), A becomes ρ·A − (η/ρ)·dA, and B
        likewise, so that the product decays by 1 − λη.
      other: an optimiser of all leaves that are no factors; None: `optax.adamw(learning_rate)`.

    Returns:
      As `lora_rite`.

    Raises:
      LoRAError: as `lora_rite`; a learning rate times weight decay of 1 or more.

    >>> import jax, jax.numpy as jnp, lora_jax as lora, optax
    >>> params, tx = {"w": jnp.eye(8)}, lora.optim.lora_muon(1e-2, other=optax.sgd(1e-2))
    >>> def moved(alpha):  # by the first step, in the spectral norm
    ...     config = lora.LoRAConfig(rank=2, alpha=alpha, targets="w")
    ...     adapters = lora.init(jax.random.key(0), params, config)
    ...     loss = lambda adapters: jnp.sum(lora.merge(params, adapters)["w"] ** 2)
    ...     updates, _ = tx.update(jax.grad(loss)(adapters), tx.init(adapters), adapters)
    ...     new = lora.merge(params, optax.apply_updates(adapters, updates))["w"]
    ...     return round(float(jnp.linalg.norm(new - params["w"], 2)), 4)
    >>> moved(alpha=2), moved(alpha=32)  # B's half of the learning rate; A moves once B is not 0
    (0.005, 0.005)
    """
    learning_rate, b1, weight_decay = check_settings(
        CALL, learning_rate=learning_rate, b1=b1, weight_decay=weight_decay
    )
    both: Any = (learning_rate, weight_decay)
    if all(map(is_real, both)) and math.prod(both) >= 1:
        raise LoRAError(
            f"learning_rate={learning_rate} times weight_decay={weight_decay}: expected less than "
            f"1, the share of the product that decays in a step: {CALL}"
        )
    if other is not None:
        check_optimiser(other, "lora.optim.lora_muon(1e-2, other=optax.adam(1e-3))")
    if decays(weight_decay):
        scaled = _split_decay(learning_rate, weight_decay)
    else:
        scaled = optax.scale_by_learning_rate(learning_rate)
    adam = optax.adamw(learning_rate, weight_decay=weight_decay)
    return partition(optax.chain(scale_by_lora_muon(b1), scaled), adam if other is None else other)


def scale_by_lora_muon(b1: float = 0.95) -> optax.GradientTransformation:
    """The step of `lora_muon` without a learning rate; leaves that are no factors pass unchanged.

    >>> import optax, lora_jax as lora
    >>> tx = optax.chain(lora.optim.scale_by_lora_muon(), optax.scale_by_learning_rate(1e-2))
    """
    (b1,) = check_settings(CALL, b1=b1)

    def init(params: optax.Params):
        return ScaleByLoraMuonState(on_factors(zeros_like, params, other=masked_like))

    def update(updates: optax.Updates, state: Any, nodes: Any, scales: Any):
        def leaf(g: LowRank, node: LowRank, scale: Any, mu: LowRank):
            # (m_A, m_B) as (n, in, r) and (n, out, r).
            m = [b1 * old + (1 - b1) * new for old, new in zip(columns(mu), columns(g))]
            # Reversed: A's step is taken in B's metric, and B's in A's.
            step = [_muon(*side, scale) for side in zip(m, columns(node)[::-1])]
            return Out(with_columns(g, *step), with_columns(mu, *m, dtype=m[0].dtype))

        trees = (nodes, scales, state.mu)
        keep = lambda g, *_: Out(g, optax.MaskedNode())
        updates, mu, *_ = unzip(on_factors(leaf, updates, *trees, other=keep), Out)
        return updates, ScaleByLoraMuonState(mu)

    return scaling("lora_muon", init, update)


def _muon(m: jax.Array, y: jax.Array, scale: Any):
    """½·msign(m·R)·R / |s| of a factor's momentum m (n, p, r) and the other factor y (n, q, r)."""
    # (n, r, r), the symmetric inverse root of yᵀ·y.
    root = power(gram(y), -0.5)
    # msign does not depend on the size of m: this only keeps the squares in range.
    peak = jnp.max(jnp.abs(m), (-2, -1), keepdims=True)
    m = product(m / jnp.where(peak > 0, peak, 1), root)
    # msign(M) = M·(Mᵀ·M)^−½; the last root takes the step from the basis back to the factor.
    # m has the sign of s, and W' moves by s times this: the product is along the gradient.
    return product(product(m, power(gram(m), -0.5)), root) / (2 * abs(scale))


def _split_decay(
    learning_rate: optax.ScalarOrSchedule, weight_decay: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """(ρ − 1)·factor − (η/ρ)·step, ρ = √(1 − λη)."""

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None):
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        decay = weight_decay(state.count) if callable(weight_decay) else weight_decay
        rate = jnp.asarray(rate, jnp.float32)
        keep = jnp.sqrt(1 - decay * rate)

        def leaf(step: jax.Array, x: jax.Array):
            fp32 = wide(x.dtype)
            new = (keep - 1).astype(fp32) * x.astype(fp32)
            return (new - (rate / keep).astype(fp32) * step.astype(fp32)).astype(step.dtype)

        updates = jax.tree.map(leaf, updates, required(params, "lora_muon"))
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    # The updates descend already, so no learning rate follows. The state is optax's of a schedule.
    return optax.GradientTransformation(
        lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update
    )
