"""LoRA-XS: a trained square matrix between the largest singular vectors of the leaf."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lora_jax._config import LoRAConfig
from lora_jax._core.einsum import product, widened
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.geometry import RANK, Geometry, static
from lora_jax._core.keys import as_key, path_key
from lora_jax._core.mesh import anywhere, placed, placement
from lora_jax._core.nnx import state_of
from lora_jax._core.numbers import NOT_NEGATIVE, check_numbers, check_values
from lora_jax._core.paths import flatten, nest
from lora_jax._core.placement import near
from lora_jax._init import targets_of
from lora_jax._nodes.adapters import LoRA
from lora_jax._nodes.indirect import Indirect
from lora_jax._quantized.waiting import value
from lora_jax._survey import Survey
from lora_jax._targets import Target, Targets
from lora_jax.algebra._svd import best_svd
from lora_jax.methods._tree import CALL, constant, static_of, tree_of

if TYPE_CHECKING:
    import chex


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LoRAXS(Indirect):
    """A square matrix between the leaf's largest singular vectors (arXiv:2405.17604). A kernel
    (in, out) gets scale · A · R · B, A = U·Σ and B = Vᵀ; see `init_lora_xs`.

    Attributes:
      r: R, (*batch, rank, rank).
      shape: of the leaf.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"q": jnp.eye(8, 4)}
    >>> config = lora.LoRAConfig(rank=2, targets="q")
    >>> adapters, frozen = lora.methods.init_lora_xs(jax.random.key(0), params, config)
    >>> node = adapters["q"]
    >>> node.r.shape, node.factors(frozen["q"]).a.shape
    ((2, 2), (8, 2))
    """

    r: jax.Array
    shape: tuple[int, ...] = static(kw_only=True)

    @property
    def rank(self) -> int:
        return self.r.shape[-1]

    @property
    def dims(self) -> dict[str, tuple[int, ...]]:
        return {"r": (*self.geometry.batch_axes, RANK, RANK)}

    def factors(self, frozen: Any = None) -> LoRA:
        """A and R·B.

        Args:
          frozen: a `LoRA` of the leaf's singular vectors.
        """
        if not isinstance(frozen, LoRA):
            what = "none" if frozen is None else f"a {type(frozen).__name__}"
            call = CALL.format("lora_xs")
            raise LoRAError(f"expected its singular vectors, found {what}: {call}")
        want = (self.shape, self.rank, self.geometry)
        if (found := (frozen.shape, frozen.rank, frozen.geometry)) != want:
            raise LoRAError(
                f"expected singular vectors of {want}, found {found}: {CALL.format('lora_xs')}"
            )
        b = constant(frozen.b, self.r.dtype)
        # R (*batch, rank, rank) times B (*batch, rank, out), the out axes as one.
        flat = b.reshape(*b.shape[: len(self.geometry.batch_axes) + 1], -1)
        # R goes into B: A = U·Σ stays a constant, of which no gradient is formed.
        b = product(self.r, flat).reshape(b.shape)
        return self.lora(constant(frozen.a, self.r.dtype), b)


def init_lora_xs(
    key: chex.PRNGKey,
    params: Any,
    config: LoRAConfig | Targets,
    survey: Survey | None = None,
    *,
    std: float = 1e-5,
) -> tuple[dict, dict]:
    """LoRA-XS (arXiv:2405.17604): a trained matrix R (rank, rank) for each leaf,
    between its largest singular vectors. For a kernel (in, out): ΔW = scale · A · R · B, with
    A = U·Σ and B = Vᵀ from the truncated SVD of W.

    R is N(0, std²), so the adapted function is first the plain one but for about that. The SVD is
    exact, of one leaf at a time, in fp32 or wider; the signs of singular vectors are such that the
    largest entry of each column of U is positive, so that another machine finds the same.

    Args:
      key, params, config, survey: as in `init`. Alpha / rank is the scale, as in the authors' code,
        which the paper's equations leave out; they train query, value, attention output and output.
      std: of R; 1e-5 in the authors' code.

    Returns:
      (adapters, frozen): a tree with a `LoRAXS` for each leaf, and one with a `LoRA` that holds A
      and B, for `factors`; `shardings(params, frozen)` says where it goes. A checkpoint holds R
      alone: make `frozen` from the same base again, or keep it in the `state` of `save`.

    Raises:
      LoRAError: as `init`; a rank above the smaller side of a leaf, a std that is negative or not
        finite.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"q": jnp.diag(jnp.array([1.0, 3.0, 2.0]))}
    >>> config = lora.LoRAConfig(rank=2, alpha=2, targets="q")
    >>> adapters, frozen = lora.methods.init_lora_xs(jax.random.key(0), params, config)
    >>> adapters["q"].r.shape, frozen["q"].a @ frozen["q"].b
    ((2, 2), Array([[0., 0., 0.],
           [0., 3., 0.],
           [0., 0., 2.]], dtype=float32))
    """
    call = "lora.methods.init_lora_xs(key, params, config, std=1e-5)"
    (std,) = check_numbers(call, traced=True, std=(std, NOT_NEGATIVE))
    key, targets = as_key(key), targets_of(params, config, survey, "lora.methods.init_lora_xs")
    leaves, dtype = flatten(state_of(params)), targets.config.dtype
    check_values(((f"'{p}'", leaves[p]) for p in targets.lora), call)
    raise_all(
        "LoRA-XS takes singular vectors of the leaf, and these have fewer than the rank:",
        (
            f"'{path}' {t.shape}: rank {t.rank}, expected at most {most}"
            for path, t in targets.lora.items()
            if t.rank > (most := min(t.geometry.sizes(t.shape)[1:]))
        ),
        "a smaller rank for them: rules=[lora.Rule(pattern, rank=...)]",
    )

    def node(path: str, t: Target) -> LoRAXS:
        batch = tuple(t.shape[d] for d in t.geometry.batch_axes)
        r = std * jax.random.normal(path_key(key, path), (*batch, t.rank, t.rank), dtype)
        return placed(LoRAXS(r, shape=t.shape, **static_of(t)), placement(leaves[path]))

    def principal(path: str, t: Target) -> LoRA:
        w = near(jnp.asarray(value(leaves[path])))
        where = placement(w)
        # Hashable, as static arguments of jit: leaves that agree on them are compiled once.
        static = (t.geometry, t.rank, jnp.dtype(dtype), where is not None)
        a, b = anywhere(lambda w: _principal(w, *static))(w)
        return placed(LoRA(a, b, t.scale, t.geometry, t.dropout, t.embedding), where)

    frozen = {path: principal(path, t) for path, t in targets.lora.items()}
    return tree_of(key, params, targets, node), nest(frozen)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _principal(
    w: Any, g: Geometry, rank: int, dtype: Any, spread: bool
) -> tuple[jax.Array, jax.Array]:
    """U·Σ (*batch, *in, rank) and Vᵀ (*batch, rank, *out) of the leaf's largest singular values."""
    u, s, v = best_svd(g.matrices(widened(w)), rank, spread)
    u, s, v = u[:, :, :rank], s[:, :rank], v[:, :rank]
    # The entry of largest magnitude in each column of U, (n, 1, rank).
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), 1, keepdims=True), 1)
    # (−u)·σ·(−v) is the same product: both sides turn together.
    sign = jnp.where(largest < 0, -1, 1).astype(u.dtype)
    a, b = g.factors(u * (s[:, None] * sign), v * sign.mT, w.shape)
    return a.astype(dtype), b.astype(dtype)
