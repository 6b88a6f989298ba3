"""Optimisers that know that A and B are two factors of one product, as optax transformations.

With G the gradient of W' = W + s·A·B, those of the factors are g_A = s·G·Bᵀ and g_B = s·Aᵀ·G. All
here is computed from these and from r × r matrices, in fp32 or wider: G is never formed. A step of
the factors by −η·dA and −η·dB changes W', to first order, by −η times the *equivalent gradient*
s·(dA·B + A·dB). P_A projects on A's columns, P_B on B's rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from lora_jax._core.einsum import product
from lora_jax._core.errors import LoRAError
from lora_jax._nodes.adapters import LowRank
from lora_jax.optim._labels import FROZEN, labels
from lora_jax.optim._pairs import columns, gram, power, stateless, with_columns
from lora_jax.optim._settings import check_optimiser, check_settings


def riemannian(delta: float = 1e-6) -> optax.GradientTransformation:
    """Riemannian (scaled) gradients of the factors: dA = g_A·(B·Bᵀ + δI)⁻¹ and
    dB = (Aᵀ·A + δI)⁻¹·g_B (Zhang and Pilanci, arXiv:2402.02347).

    Chained before `optax.sgd` it is the paper's scaled GD, before `optax.adam` its scaled AdamW.
    Good for: a step that does not depend on how the product is split into factors (scaled GD, with
    δ = 0: the equivalent gradient is s²·(P_A·G + G·P_B)), so that A and B need no learning rates of
    their own. It helps plain SGD most. The paper's factors have no scale, so s² stays in the
    learning rate.

    Costs 4·(in + out)·r² FLOPs and two r × r eigendecompositions for each weight; no state.

    Args:
      delta: δ; 1e-6 in the authors' code for Mistral. It damps directions in which the
        other factor is small, as B is after its start at zero. 0: the pseudo-inverse, in which such
        directions are zero only where fp32 has lost them.

    Returns:
      A transformation of adapters' gradients; magnitudes and leaves trained in full or by rows pass
      unchanged. `update` needs the adapters, `tx.update(grads, state, adapters)`.

    Raises:
      LoRAError: a delta that is negative or not finite; `update` without the adapters, or given A
        without B.

    >>> import jax, jax.numpy as jnp, lora_jax as lora, optax
    >>> a, b = jax.random.normal(jax.random.key(0), (2, 8, 2))
    >>> params, tx = {"w": jnp.eye(8)}, optax.chain(lora.optim.riemannian(), optax.sgd(0.1))
    >>> def moved(c):  # the same product A·B, split in another way
    ...     node = {"w": lora.LoRA(c * a, b.T / c, 1.0, lora.Geometry((0,), (1,)))}
    ...     loss = lambda adapters: jnp.sum(lora.merge(params, adapters)["w"] ** 2)
    ...     updates, _ = tx.update(jax.grad(loss)(node), tx.init(node), node)
    ...     return lora.merge(params, optax.apply_updates(node, updates))["w"]
    >>> bool(jnp.allclose(moved(1.0), moved(10.0), atol=1e-3))
    True
    """
    (delta,) = check_settings("lora.optim.riemannian(delta=1e-6)", delta=delta)

    def leaf(g: LowRank, node: LowRank, _: Any):
        # Columns are A (n, in, r) and Bᵀ (n, out, r): with them both sides read alike.
        (x, y), (gx, gy) = columns(node), columns(g)
        dx = product(gx, power(gram(y), -1, delta))
        dy = product(gy, power(gram(x), -1, delta))
        return with_columns(g, dx, dy)

    return stateless(leaf, "riemannian")


def lora_pro(
    delta: float = 1e-8, x: Literal["sylvester", "zero", "symmetry"] = "sylvester"
) -> optax.GradientTransformation:
    """LoRA-Pro (arXiv:2407.18242): the gradients of A and B whose equivalent gradient is nearest to
    G, which is G − (I − P_A)·G·(I − P_B), whatever X:

        dA = s⁻²·g_A·(B·Bᵀ)⁻¹ + A·X        dB = s⁻²·(AᵀA)⁻¹·g_B·(I − P_B) − X·B

    (the paper's, transposed to A·B). Chain it before `optax.adamw` or `optax.sgd`: the "efficient"
    mode of the authors' code, in which the moments are of dA and dB. Its other mode keeps Adam's
    moments of the whole weight, in·out numbers each, and is not here.

    Good for: a step of W' that full fine-tuning would take, as far as the factors allow. With SGD
    the change of the product does not depend on how it is split (with the Sylvester equation's X,
    to first order); with Adam, which rescales entries, it does.

    Costs about (8·in + 10·out)·r² FLOPs and two r × r eigendecompositions for each weight, and no
    state.

    Args:
      delta: added to the diagonals of B·Bᵀ and AᵀA before they are inverted; 1e-8 in the authors'
        code. 0: the pseudo-inverse; then the identity above is exact.
      x: "sylvester", the paper's, AᵀA·X + X·BBᵀ = −s⁻²·Aᵀg_A·(BBᵀ)⁻¹, with which dA and
        dB are nearest to g_A and g_B; "zero"; or "symmetry", X = −½·s⁻²·(AᵀA)⁻¹·g_B·Bᵀ·(BBᵀ)⁻¹,
        with which A and B play equal parts.

    Returns:
      As `riemannian`.

    Raises:
      LoRAError: as `riemannian`, or another x.

    >>> import jax, jax.numpy as jnp, lora_jax as lora, optax
    >>> params, (a, b) = {"w": jnp.eye(4)}, jax.random.normal(jax.random.key(0), (2, 4, 4))
    >>> adapters = {"w": lora.LoRA(a, b, 1.0, lora.Geometry((0,), (1,)))}  # of full rank
    >>> loss, merged = lambda p: jnp.sum(p["w"] ** 2), lambda ad: lora.merge(params, ad)
    >>> tx = optax.chain(lora.optim.lora_pro(), optax.sgd(1e-3))
    >>> grads = jax.grad(lambda adapters: loss(merged(adapters)))(adapters)
    >>> updates, _ = tx.update(grads, tx.init(adapters), adapters)
    >>> step = merged(optax.apply_updates(adapters, updates))["w"] - merged(adapters)["w"]
    >>> full = -1e-3 * jax.grad(loss)(merged(adapters))["w"]  # of full fine-tuning
    >>> bool(jnp.allclose(step, full, atol=1e-3))
    True
    """
    (delta,) = check_settings("lora.optim.lora_pro(delta=1e-8)", delta=delta)
    if not (isinstance(x, str) and x in FREE):
        raise LoRAError(
            f"x={x!r}: expected one of {', '.join(map(repr, FREE))}: "
            "lora.optim.lora_pro(x='sylvester')"
        )

    def leaf(g: LowRank, node: LowRank, scale: Any):
        (a, bt), (ga, gbt) = columns(node), columns(g)
        da, db = nearest_gradients(a, bt.mT, ga, gbt.mT, scale, FREE[x], delta)
        return with_columns(g, da, db.mT)

    return stateless(leaf, "lora_pro")


def nearest_gradients(
    a: jax.Array,
    b: jax.Array,
    ga: jax.Array,
    gb: jax.Array,
    scale: Any,
    free: Callable,
    delta: float,
):
    """dA (n, in, r) and dB (n, r, out) of LoRA-Pro; `free` gives X of AᵀA, BBᵀ, both inverses,
    Aᵀ·g_A and s."""
    aa, bb = gram(a), gram(b.mT)
    aa_inv, bb_inv = power(aa, -1, delta), power(bb, -1, delta)
    # X (n, r, r): its terms cancel in dA·B + A·dB, so the equivalent gradient does not see it.
    x = free(aa, bb, aa_inv, bb_inv, product(a.mT, ga), scale)
    # g_B·(I − P_B), P_B = Bᵀ·(B·Bᵀ)⁻¹·B, from the left: nothing out × out is formed.
    outside = gb - product(product(product(gb, b.mT), bb_inv), b)
    da = product(ga, bb_inv) / scale**2 + product(a, x)
    db = product(aa_inv, outside) / scale**2 - product(x, b)
    return da, db


def _sylvester(
    aa: jax.Array, bb: jax.Array, aa_inv: jax.Array, bb_inv: jax.Array, aga: jax.Array, scale: Any
):
    """AᵀA·X + X·BBᵀ = C in the eigenbases of both, where it is a division."""
    (wa, va), (wb, vb) = jnp.linalg.eigh(aa), jnp.linalg.eigh(bb)
    c = -product(aga, bb_inv) / scale**2
    # With X = V_A·Y·V_Bᵀ it reads (w_A,i + w_B,j)·Y_ij = (V_Aᵀ·C·V_B)_ij.
    sums = jnp.maximum(wa, 0)[..., :, None] + jnp.maximum(wb, 0)[..., None, :]
    c = product(product(va.mT, c), vb)
    return product(product(va, jnp.where(sums > 0, c / jnp.where(sums > 0, sums, 1), 0)), vb.mT)


FREE = {
    "sylvester": _sylvester,
    "zero": lambda aa, bb, aa_inv, bb_inv, aga, scale: jnp.zeros_like(aa),
    # Aᵀ·g_A = g_B·Bᵀ, both s·AᵀGBᵀ: so this is the docstring's X.
    "symmetry": lambda aa, bb, aa_inv, bb_inv, aga, scale: (
        product(product(aa_inv, aga), bb_inv) / (-2 * scale**2)
    ),
}


def lora_fa(
    tx: optax.GradientTransformation, *, corrected: bool = False, delta: float = 0.0
) -> optax.GradientTransformation:
    """LoRA-FA (arXiv:2308.03303): A stays as it was drawn; B, and all else, is trained by `tx`.
    In an embedding B is what was drawn, and A is zero: there B stays and A is trained.

    A gets an update of exactly zero and no state. Inside of one `jax.jit` with the gradient, XLA
    drops what nobody reads: the gradient of A is not computed, and an input that only it needs
    (in × tokens numbers for each layer, where x·A has r × tokens) is not kept from the forward
    pass. That is the method's point: less memory for activations, half the optimiser's state.

    Args:
      tx: any optimiser.
      corrected: whether g_B becomes (AᵀA + δI)⁻¹·g_B / s², as in PEFT's optimiser of this name, so
        that the equivalent gradient is P_A·G, nearest to G among those with this A. 2·in·r² FLOPs
        and an eigendecomposition of r × r for each weight. A random A has columns that are almost
        orthogonal, so for Adam it changes little.
      delta: δ; 0 is the pseudo-inverse, PEFT has 1e-8.

    Returns:
      An optimiser for adapters, or for a tree that holds them beside frozen leaves, which get no
      update either.

    Raises:
      LoRAError: as `riemannian`; of `update` with `corrected` alone.

    >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
    >>> params = {"q": jnp.ones((4, 8))}
    >>> adapters = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets="q"))
    >>> state = lora.optim.lora_fa(optax.adam(1e-3)).init(adapters)
    >>> sum(x.size for x in jax.tree.leaves(state))  # two moments of B, and the count
    33
    """

    (delta,) = check_settings("lora.optim.lora_fa(tx, corrected=True, delta=1e-8)", delta=delta)
    check_optimiser(tx, "lora.optim.lora_fa(optax.adam(1e-3))")

    def trained(tree: Any):
        # The factor that was drawn; the other begins at zero and is trained.
        frozen = (FROZEN, "a", "embedding_b")
        return jax.tree.map(lambda x: FROZEN if x in frozen else "trained", labels(tree))

    alone = optax.partition({"trained": tx, FROZEN: optax.set_to_zero()}, trained)
    if not corrected:
        return alone

    def leaf(g: LowRank, node: LowRank, scale: Any):
        (x, y), (gx, gy) = columns(node), columns(g)
        fix = lambda g, other: product(g, power(gram(other), -1, delta)) / scale**2
        # Only the factor that is trained is preconditioned, by the one that stays.
        return with_columns(g, fix(gx, y)) if node.embedding else with_columns(g, None, fix(gy, x))

    return optax.chain(stateless(leaf, "lora_fa"), alone)
