"""VeRA: two trained vectors between random matrices that all leaves share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lora_jax._config import LoRAConfig
from lora_jax._core.errors import LoRAError
from lora_jax._core.geometry import RANK, static
from lora_jax._core.keys import as_key, path_key
from lora_jax._core.numbers import FINITE, SIZE, check_numbers
from lora_jax._init import targets_of
from lora_jax._nodes.adapters import LoRA
from lora_jax._nodes.indirect import Indirect
from lora_jax._survey import Survey
from lora_jax._targets import Target, Targets
from lora_jax.methods._tree import CALL, along_rank, constant, static_of, tree_of

if TYPE_CHECKING:
    import chex


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class VeRA(Indirect):
    """Two vectors of one leaf, between random matrices that all leaves share (arXiv:2310.11454,
    eq. 2). A kernel (in, out) gets scale · A · diag(d) · B · diag(b); see `init_vera`.

    Attributes:
      d: (*batch, rank).
      b: (*batch, *out).
      shape: of the leaf.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"q": jnp.ones((8, 4))}
    >>> config = lora.LoRAConfig(rank=1, targets="q")
    >>> adapters, frozen = lora.methods.init_vera(jax.random.key(0), params, config, rank=16)
    >>> node = adapters["q"]
    >>> node.d.shape, node.b.shape, node.factors(frozen).a.shape
    ((16,), (4,), (8, 16))
    """

    d: jax.Array
    b: jax.Array
    shape: tuple[int, ...] = static(kw_only=True)

    @property
    def rank(self) -> int:
        return self.d.shape[-1]

    @property
    def dims(self) -> dict[str, tuple[int, ...]]:
        g = self.geometry
        return {"d": (*g.batch_axes, RANK), "b": (*g.batch_axes, *g.out_axes)}

    def factors(self, frozen: Any = None) -> LoRA:
        """Both vectors go into B: A stays a constant, and no gradient with regard to it is formed.

        Args:
          frozen: {"a": (in, rank), "b": (rank, out)}, as large or larger.
        """
        g, dtype = self.geometry, self.d.dtype
        _, n_in, n_out = g.sizes(self.shape)
        _check_shared(frozen, a=(n_in, self.rank), b=(self.rank, n_out))
        a_shape, b_shape = g.factor_shapes(self.shape, self.rank)
        # The first rows and columns of the shared matrices, (in, rank) and (rank, out).
        a = constant(frozen["a"][:n_in, : self.rank], dtype)
        b = constant(frozen["b"][: self.rank, :n_out], dtype)
        # diag(d)·B·diag(b): b is (*batch, *out), B (rank, *out), the product (*batch, rank, *out).
        n = len(g.batch_axes)
        b = b.reshape(b_shape[n:]) * jnp.expand_dims(self.b, n)
        # All weights of a stack have the same A; what differs is in B.
        a = jnp.broadcast_to(a.reshape(a_shape[n:]), a_shape)
        return self.lora(a, b * along_rank(self.d, b))


def _check_shared(frozen: Any, **need: tuple[int, int]) -> None:
    """Raises unless this is what all leaves share, and large enough for this one."""
    if not isinstance(frozen, Mapping) or frozen.keys() != need.keys():
        raise LoRAError("expected its shared A and B: " + CALL.format("vera"))
    for name, want in need.items():
        found = jnp.shape(frozen[name])
        if len(found) != 2 or any(f < w for f, w in zip(found, want)):
            raise LoRAError(
                f"expected a shared {name} of at least {want}, found {found}: "
                + CALL.format("vera")
            )


def init_vera(
    key: chex.PRNGKey,
    params: Any,
    config: LoRAConfig | Targets,
    survey: Survey | None = None,
    *,
    rank: int | None = None,
    d: float = 0.1,
) -> tuple[dict, dict]:
    """VeRA (arXiv:2310.11454, eq. 2): two trained vectors for each leaf, between two frozen random
    matrices that all leaves share. For a kernel (in, out): ΔW = A · diag(d) · B · diag(b).

    A and B are as large as the largest leaf needs; a smaller one takes their first rows and
    columns, as in PEFT. They are drawn from He's uniform distribution (Kaiming, fan-in, gain √2),
    b is zero and d is constant (section 3.3). The paper has no alpha, and the configuration's is
    not used; leaves with batch axes (experts, layers) have vectors of their own for each weight.

    Args:
      key, params, config, survey: as in `init`; leaves trained in full or by rows as there.
      rank: of all leaves, and it may exceed their sides; None: the configuration's. The paper's are
        1024 (RoBERTa-base) and 256 (RoBERTa-large, Llama).
      d: the first value of d.

    Returns:
      (adapters, frozen): a tree with a `VeRA` for each leaf, and {"a": (in, rank), "b": (rank,
      out)}, for `factors`. The same key and leaves give the same `frozen`; it may be kept in the
      `state` of `save`.

    Raises:
      LoRAError: as `init`; a rank that is no integer >= 1, a d that is not finite.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"q": jnp.ones((8, 8)), "v": jnp.ones((8, 4))}
    >>> config = lora.LoRAConfig(rank=1, targets=["q", "v"])
    >>> adapters, frozen = lora.methods.init_vera(jax.random.key(0), params, config, rank=16)
    >>> sum(x.size for x in jax.tree.leaves(adapters)), frozen["a"].shape  # 2·16 + 8 + 4
    (44, (8, 16))
    >>> fn = lora.adapt(lambda p, x: (x @ p["q"]) @ p["v"])
    >>> def loss(adapters):
    ...     bound = lora.bind(params, lora.methods.factors(adapters, frozen))
    ...     return fn(bound, jnp.ones((2, 8))).sum()
    >>> jax.grad(loss)(adapters)["v"].b.shape
    (4,)
    """
    call = "lora.methods.init_vera(key, params, config, rank=256, d=0.1)"
    rank, d = check_numbers(call, traced=True, rank=(rank, SIZE.or_none), d=(d, FINITE))
    key, targets = as_key(key), targets_of(params, config, survey, "lora.methods.init_vera")
    if rank is not None:
        of_rank = {p: dataclasses.replace(t, rank=rank) for p, t in targets.lora.items()}
        targets = dataclasses.replace(targets, lora=of_rank)
    dtype = targets.config.dtype

    def node(path: str, t: Target) -> VeRA:
        g = t.geometry
        batch, out = (tuple(t.shape[i] for i in axes) for axes in (g.batch_axes, g.out_axes))
        vectors = jnp.full((*batch, t.rank), d, dtype), jnp.zeros((*batch, *out), dtype)
        return VeRA(*vectors, shape=t.shape, **static_of(t, scale=1.0))

    # As large as the largest leaf in each direction; the ones are for a tree without leaves.
    sizes = [(*t.geometry.sizes(t.shape)[1:], t.rank) for t in targets.lora.values()]
    n_in, n_out, widest = map(max, zip(*sizes, (1, 1, 1)))

    def he(name: str, shape: tuple[int, int], fan_in: int) -> jax.Array:
        bound = math.sqrt(6 / fan_in)
        # A key by name, so that the two draw apart and the same in every run.
        return jax.random.uniform(path_key(key, f"vera/{name}"), shape, dtype, -bound, bound)

    frozen = {"a": he("a", (n_in, widest), n_in), "b": he("b", (widest, n_out), widest)}
    return tree_of(key, params, targets, node), frozen
