"""The first adapters of VeRA, LoRA-XS and AdaLoRA, and what they keep frozen."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._adapters import LoRA, is_node
from lora_jax._config import LoRAConfig
from lora_jax._einsum import wide
from lora_jax._errors import LoRAError, raise_all
from lora_jax._family import AdaLoRA, LoRAXS, VeRA
from lora_jax._init import _typed, init, path_key
from lora_jax._nnx import state_of
from lora_jax._paths import flatten, nest
from lora_jax._quantized import value
from lora_jax._select import select
from lora_jax._survey import Survey
from lora_jax._targets import Target, Targets
from lora_jax._weight import Geometry


def init_vera(
    key: jax.Array,
    params: Any,
    config: LoRAConfig | Targets,
    survey: Survey | None = None,
    *,
    rank: int | None = None,
    d: float = 0.1,
) -> tuple[dict, dict]:
    """VeRA (arXiv:2310.11454, eq. 2): two trained vectors for each leaf, between two frozen random
    matrices that all leaves share. Of a kernel (in, out): ΔW = A · diag(d) · B · diag(b).

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
      LoRAError: as `init`; or a rank below 1.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"q": jnp.ones((8, 8)), "v": jnp.ones((8, 4))}
    >>> config = lora.LoRAConfig(rank=1, targets=["q", "v"])
    >>> adapters, frozen = lora.init_vera(jax.random.key(0), params, config, rank=16)
    >>> sum(x.size for x in jax.tree.leaves(adapters)), frozen["a"].shape  # 2·16 + 8 + 4
    (44, (8, 16))
    >>> fn = lora.adapt(lambda p, x: (x @ p["q"]) @ p["v"])
    >>> def loss(adapters):
    ...     return fn(lora.bind(params, lora.factors(adapters, frozen)), jnp.ones((2, 8))).sum()
    >>> jax.grad(loss)(adapters)["v"].b.shape
    (4,)
    """
    key, targets = _typed(key), _targets(params, config, survey)
    if rank is not None:
        if rank < 1:
            raise LoRAError(f"rank={rank}: expected an integer >= 1, lora.init_vera(..., rank=256)")
        of_rank = {p: dataclasses.replace(t, rank=rank) for p, t in targets.lora.items()}
        targets = dataclasses.replace(targets, lora=of_rank)
    dtype = targets.config.dtype

    def node(path: str, t: Target) -> VeRA:
        g = t.geometry
        batch, out = (tuple(t.shape[i] for i in axes) for axes in (g.batch_axes, g.out_axes))
        vectors = jnp.full((*batch, t.rank), d, dtype), jnp.zeros((*batch, *out), dtype)
        return VeRA(*vectors, shape=t.shape, **_static(t, scale=1.0))

    sizes = [(*t.geometry.sizes(t.shape)[1:], t.rank) for t in targets.lora.values()]
    n_in, n_out, rank = map(max, zip(*sizes, (1, 1, 1)))

    def he(name: str, shape: tuple[int, int], fan_in: int) -> jax.Array:
        bound = math.sqrt(6 / fan_in)
        return jax.random.uniform(path_key(key, f"vera/{name}"), shape, dtype, -bound, bound)

    frozen = {"a": he("a", (n_in, rank), n_in), "b": he("b", (rank, n_out), rank)}
    return _tree(key, params, targets, node), frozen


def init_lora_xs(
    key: jax.Array,
    params: Any,
    config: LoRAConfig | Targets,
    survey: Survey | None = None,
    *,
    std: float = 1e-5,
) -> tuple[dict, dict]:
    """LoRA-XS (arXiv:2405.17604): a trained matrix R (rank, rank) for each leaf,
    between its largest singular vectors. Of a kernel (in, out): ΔW = scale · A · R · B, with
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
      LoRAError: as `init`; or a rank above the smaller side of a leaf.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"q": jnp.diag(jnp.array([1.0, 3.0, 2.0]))}
    >>> config = lora.LoRAConfig(rank=2, alpha=2, targets="q")
    >>> adapters, frozen = lora.init_lora_xs(jax.random.key(0), params, config)
    >>> adapters["q"].r.shape, frozen["q"].a @ frozen["q"].b
    ((2, 2), Array([[0., 0., 0.],
           [0., 3., 0.],
           [0., 0., 2.]], dtype=float32))
    """
    key, targets = _typed(key), _targets(params, config, survey)
    leaves, dtype = flatten(state_of(params)), targets.config.dtype
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
        return LoRAXS(r, shape=t.shape, **_static(t))

    frozen = {
        path: LoRA(
            *_principal(jnp.asarray(value(leaves[path])), t.geometry, t.rank, jnp.dtype(dtype)),
            t.scale,
            t.geometry,
            t.dropout,
            t.embedding,
        )
        for path, t in targets.lora.items()
    }
    return _tree(key, params, targets, node), nest(frozen)


def init_adalora(
    key: jax.Array, params: Any, config: LoRAConfig | Targets, survey: Survey | None = None
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

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"q": jnp.ones((8, 4))}
    >>> config = lora.LoRAConfig(rank=3, targets="q")
    >>> node = lora.init_adalora(jax.random.key(0), params, config)["q"]
    >>> node.p.shape, node.lam, node.q.shape
    ((8, 3), Array([0., 0., 0.], dtype=float32), (3, 4))
    """
    key, targets = _typed(key), _targets(params, config, survey)
    dtype = targets.config.dtype

    def node(path: str, t: Target) -> AdaLoRA:
        one, two = jax.random.split(path_key(key, path))
        p_shape, q_shape = t.geometry.factor_shapes(t.shape, t.rank)
        batch = p_shape[: len(t.geometry.batch_axes)]
        return AdaLoRA(
            0.02 * jax.random.normal(one, p_shape, dtype),
            jnp.zeros((*batch, t.rank), dtype),
            0.02 * jax.random.normal(two, q_shape, dtype),
            **_static(t),
        )

    return _tree(key, params, targets, node)


def _targets(params, config, survey) -> Targets:
    if not isinstance(config, Targets | LoRAConfig):
        raise LoRAError(f"expected a LoRAConfig or Targets, found {type(config).__name__}")
    return config if isinstance(config, Targets) else select(params, config, survey)


def _static(t: Target, scale: float | None = None) -> dict[str, Any]:
    return dict(
        geometry=t.geometry,
        scale=t.scale if scale is None else scale,
        dropout=t.dropout,
        embedding=t.embedding,
    )


def _tree(key, params, targets: Targets, node: Callable[[str, Target], Any]) -> dict:
    """The nodes of all leaves: those in full and by rows as `init` makes them."""
    rest = init(key, params, dataclasses.replace(targets, lora={}))
    flat = {path: node(path, t) for path, t in targets.lora.items()}
    return nest(flat | flatten(rest, is_leaf=is_node))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _principal(w: jax.Array, g: Geometry, rank: int, dtype) -> tuple[jax.Array, jax.Array]:
    """U·Σ (*batch, *in, rank) and Vᵀ (*batch, rank, *out) of the leaf's largest singular values."""
    order = (*g.batch_axes, *g.in_axes, *g.out_axes)
    flat = w.astype(wide(w.dtype)).transpose(order).reshape(g.sizes(w.shape))
    u, s, v = jnp.linalg.svd(flat, full_matrices=False)
    u, s, v = u[:, :, :rank], s[:, :rank], v[:, :rank]
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), 1, keepdims=True), 1)
    sign = jnp.where(largest < 0, -1, 1).astype(u.dtype)  # (n, 1, rank)
    a, b = u * (s[:, None] * sign), v * sign.mT
    a_shape, b_shape = g.factor_shapes(w.shape, rank)
    return a.reshape(a_shape).astype(dtype), b.reshape(b_shape).astype(dtype)
