"""AdaLoRA: an update in the form of a singular value decomposition."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lora_jax._config import LoRAConfig
from lora_jax._core.einsum import product, widened
from lora_jax._core.errors import LoRAError
from lora_jax._core.geometry import RANK
from lora_jax._core.keys import as_key, path_key
from lora_jax._core.paths import flatten, nest
from lora_jax._core.placement import near
from lora_jax._init import targets_of
from lora_jax._nodes.adapters import LoRA
from lora_jax._nodes.factors import factors
from lora_jax._nodes.indirect import Indirect
from lora_jax._nodes.node import is_node
from lora_jax._survey import Survey
from lora_jax._targets import Target, Targets
from lora_jax.algebra._svd import as_node
from lora_jax.methods._tree import along_rank, static_of, tree_of

if TYPE_CHECKING:
    import chex


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AdaLoRA(Indirect):
    """An update in the form of a singular value decomposition (arXiv:2303.10512, eq. 3): scale ·
    P·Λ·Q, of which `adalora` prunes singular values; see `init_adalora`.

    Attributes:
      p: P, (*batch, *in, rank).
      lam: the diagonal of Λ, (*batch, rank).
      q: Q, (*batch, rank, *out).

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> lam, geometry = jnp.array([3.0, 0.0]), lora.Geometry((0,), (1,))
    >>> node = lora.methods.AdaLoRA(jnp.eye(3, 2), lam, jnp.eye(2), geometry=geometry)
    >>> node.factors().b  # Λ·Q
    Array([[3., 0.],
           [0., 0.]], dtype=float32)
    """

    p: jax.Array
    lam: jax.Array
    q: jax.Array

    @property
    def rank(self) -> int:
        return self.p.shape[-1]

    @property
    def dims(self) -> dict[str, tuple[int, ...]]:
        g = self.geometry
        return {"p": g.a_dims, "lam": (*g.batch_axes, RANK), "q": g.b_dims}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spanned()

    def factors(self, frozen: Any = None) -> LoRA:
        """P and Λ·Q; it needs nothing frozen."""
        del frozen
        # Λ on Q's side: where Λ is zero, as it is at first, A stays and B is zero, as in LoRA.
        return self.lora(self.p, along_rank(self.lam, self.q) * self.q)


def init_adalora(
    key: chex.PRNGKey, params: Any, config: LoRAConfig | Targets, survey: Survey | None = None
) -> dict:
    """AdaLoRA (arXiv:2303.10512, eq. 3): adapters P·Λ·Q, whose singular values `adalora` prunes.

    Λ is zero, so the adapted function is first the plain one; P and Q are N(0, 0.02²), as in the
    authors' code and PEFT. They work where a LoRA does in `bind` and `merge`; for all else
    `factors` or, after training, `pruned`.

    Args:
      key, params, config, survey: as in `init`. The rank is that of the beginning, the paper's
        1.5 times the target. The scale, alpha / rank, stays when singular values are pruned.

    Returns:
      A tree with an `AdaLoRA` for each leaf: p (*batch, *in, rank), lam (*batch, rank) and
      q (*batch, rank, *out).

    Raises:
      LoRAError: as `init`.

    >>> import jax, jax.numpy as jnp, lora_jax as lora, optax
    >>> params = {"q": jnp.ones((8, 4))}
    >>> config = lora.LoRAConfig(rank=3, targets="q")
    >>> adapters = lora.methods.init_adalora(jax.random.key(0), params, config)
    >>> adapters["q"].p.shape, adapters["q"].lam, adapters["q"].q.shape
    ((8, 3), Array([0., 0., 0.], dtype=float32), (3, 4))
    >>> tx = lora.optim.adalora(optax.adam(1e-2), target_rank=1, steps=100, tinit=10, tfinal=50)
    >>> state = tx.init(adapters)  # and train as ever, then `pruned`
    """
    key, targets = as_key(key), targets_of(params, config, survey, "lora.methods.init_adalora")
    dtype = targets.config.dtype

    def node(path: str, t: Target) -> AdaLoRA:
        one, two = jax.random.split(path_key(key, path))
        p_shape, q_shape = t.geometry.factor_shapes(t.shape, t.rank)
        batch = p_shape[: len(t.geometry.batch_axes)]
        return AdaLoRA(
            0.02 * jax.random.normal(one, p_shape, dtype),
            jnp.zeros((*batch, t.rank), dtype),
            0.02 * jax.random.normal(two, q_shape, dtype),
            **static_of(t),
        )

    return tree_of(key, params, targets, node)


CALL = "lora.optim.adalora(optax.adam(1e-3), target_rank=8, tinit=500, tfinal=1500, steps=3000)"


def orthogonality(adapters: Any) -> jax.Array:
    """R = Σ ‖PᵀP − I‖² + ‖QQᵀ − I‖² (arXiv:2303.10512, eq. 4), to be added to the loss.

    The sum goes over all matrices, as in section 3.2. The authors' code, with a coefficient of 0.1,
    and PEFT's, with 0.5, have the mean of the norms without squares.

    Raises:
      LoRAError: there is no `AdaLoRA` in the tree.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> eye, geometry = jnp.eye(3, 2), lora.Geometry((0,), (1,))
    >>> adapters = {"q": lora.methods.AdaLoRA(eye, jnp.ones(2), 2 * eye.T, geometry=geometry)}
    >>> task = lambda adapters: jnp.sum(lora.merge({"q": jnp.eye(3)}, adapters)["q"])
    >>> loss = lambda adapters: task(adapters) + 0.1 * lora.methods.orthogonality(adapters)
    >>> round(float(loss(adapters) - task(adapters)), 3)  # Q's rows have norm 2: 0.1 · 2·(4 − 1)²
    1.8
    """
    total = jnp.zeros((), jnp.float32)
    for node in adalora_nodes(near(adapters)):
        # P (n, in, r) and Q (n, r, out) in fp32: PᵀP − I is a small difference.
        p, q = node.geometry.pair(widened(node.p), widened(node.q))
        for x in (p, q.mT):
            # PᵀP, then QQᵀ: (n, r, r).
            gram = product(x.mT, x)
            total = total + jnp.sum((gram - jnp.eye(node.rank, dtype=x.dtype)) ** 2)
    return total


def pruned(adapters: Any) -> dict:
    """AdaLoRA's adapters as `LoRA` of real ranks: without the singular values that are zero.

    The update stays the same. It depends on values, so it is not for use under jit.

    Args:
      adapters: trained with `adalora`; nodes of another kind stay as they are.

    Returns:
      An adapter tree. Ranks differ from leaf to leaf; a leaf of several weights has the largest of
      theirs, with zeros in the others. A leaf of which nothing is left is not in the tree.

    Raises:
      LoRAError: no `AdaLoRA` in the tree, or under jit.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> lam = jnp.array([0.0, 2.0, 0.0])
    >>> p, q = jnp.ones((4, 3)), jnp.ones((3, 2))
    >>> adapters = {"q": lora.methods.AdaLoRA(p, lam, q, geometry=lora.Geometry((0,), (1,)))}
    >>> lora.methods.pruned(adapters)["q"].rank
    1
    """
    if any(isinstance(n.lam, jax.core.Tracer) for n in adalora_nodes(adapters)):
        raise LoRAError(
            "ranks depend on values, so not under jit: lora.methods.pruned(adapters) outside"
        )
    adapters = near(adapters)
    plain = flatten(factors(adapters), is_leaf=is_node)
    out = {}
    for path, node in flatten(adapters, is_leaf=is_node).items():
        if not isinstance(node, AdaLoRA):
            out[path] = node
        # One rank for a stack: that of the weight with the most left. 0: the leaf has no adapter.
        elif rank := int(jnp.max(jnp.sum(node.lam != 0, -1), initial=0)):
            out[path] = _kept(plain[path], node.lam, rank)
    return nest(out)


def _kept(node: LoRA, lam: jax.Array, rank: int) -> LoRA:
    """Columns of A and rows of B whose λ is not zero, in their order; `rank` of each weight."""
    a, b = node.geometry.pair(node.a, node.b)
    # False sorts before True: first those that are kept, (n, rank). A weight with fewer of them
    # fills up with λ = 0, for which `factors` has made rows of B that are zero.
    index = jnp.argsort(lam.reshape(len(a), -1) == 0, axis=-1, stable=True)[:, :rank]
    a = jnp.take_along_axis(a, index[:, None, :], 2)
    b = jnp.take_along_axis(b, index[:, :, None], 1)
    return as_node(node, a, b)


def adalora_nodes(tree: Any) -> list[AdaLoRA]:
    found = [n for n in jax.tree.leaves(tree, is_leaf=is_node) if isinstance(n, AdaLoRA)]
    if not found:
        raise LoRAError(
            "expected adapters of AdaLoRA, found none: adapters = lora.methods.init_adalora(key, "
            f"params, config); tx = {CALL}"
        )
    return found
