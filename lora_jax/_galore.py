"""GaLore: Adam for full-parameter training with moments of rank r."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax._einsum import wide
from lora_jax._errors import LoRAError, raise_all
from lora_jax._paths import flatten, map_with_path
from lora_jax._precondition import product, unzip
from lora_jax._targets import Targets
from lora_jax._weight import Geometry

MATRIX = Geometry((0,), (1,))


class ScaleByGaloreState(NamedTuple):
    """State of `scale_by_galore`; of a matrix m × k, m ≤ k, in a stack of n:

    Attributes:
      count: how many updates there were.
      projector: orthonormal columns (n, m, r).
      mu, nu: Adam's moments of the projected gradient, (n, r, k).

    Where r ≥ m there is no projector, and the moments have the leaf's shape.
    """

    count: jax.Array
    projector: Any
    mu: Any
    nu: Any


def galore(
    learning_rate: Any,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    targets: Targets | None = None,
) -> optax.GradientTransformation:
    """GaLore (Zhao et al., arXiv:2403.03507, algorithm 2): Adam for training in full, with moments
    of the gradient's projection on its largest singular directions.

    For a leaf m × k, m ≤ k: P (m, r) holds the left singular vectors of the gradient of every
    `update_proj_gap`-th step; Adam sees PᵀG (r, k), and the leaf moves by α·P·N.

    Good for: full-parameter training where Adam's moments do not fit. It is no adapter: all of W
    moves, nothing is merged, and a gradient as large as W is formed.

    Memory: W and mr + 2rk numbers of state in fp32, where Adam has 2mk: less for r < 2mk / (m+2k).
    FLOPs: 4mkr in each step, and an SVD of the gradient, O(m²k), in every `update_proj_gap`-th
    (under `jax.lax.cond`), which stops the step for seconds where m is some thousands.

    Args:
      learning_rate: a number or a schedule; 0.01 in the paper's pre-training.
      rank: r; 128 to 1024 in the paper (a quarter to a half of the model's width).
      update_proj_gap: T; 200 in the paper.
      scale: α; 0.25 in the paper.
      b1, b2, eps: Adam's.
      weight_decay: decoupled, of all leaves.
      targets: what `select` returned: the leaves to project, and which of their axes are rows,
        columns or a stack (scanned layers, experts). The paper takes attention's and MLP's. None:
        every leaf of two axes; then one of more axes is trained by plain Adam.

    Returns:
      An optimiser for any parameter tree; leaves that are not projected are trained by plain Adam,
      without α.

    Raises:
      LoRAError: a rank or gap below 1; in `init`, targets that are no leaves of the tree.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.ones((64, 256)), "bias": jnp.ones(256)}
    >>> state = lora.galore(0.01, rank=4).init(params)
    >>> sum(x.size for x in jax.tree.leaves(state))  # 64·4 + 2·4·256, 2·256 of Adam, two counts
    2818
    """
    tx = scale_by_galore(rank, update_proj_gap, scale, b1, b2, eps, targets)

    def kinds(params):
        geometry = _geometries(params, targets)
        return map_with_path(lambda path, _: "galore" if path in geometry else "adam", params)

    return optax.chain(
        optax.partition({"galore": tx, "adam": optax.scale_by_adam(b1, b2, eps)}, kinds),
        optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_galore(
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    targets: Targets | None = None,
) -> optax.GradientTransformation:
    """The step of `galore` without a learning rate; leaves that are not projected pass unchanged.

    >>> import optax, lora_jax as lora
    >>> tx = optax.chain(lora.scale_by_galore(rank=8), optax.scale_by_learning_rate(0.01))
    """
    if rank < 1 or update_proj_gap < 1:
        raise LoRAError(
            f"expected rank and update_proj_gap >= 1, found {rank} and {update_proj_gap}: "
            "lora.galore(0.01, rank=128, update_proj_gap=200)"
        )

    def init(params):
        geometry = _geometries(params, targets)
        leaf = lambda path, x: _start(x, geometry.get(path), rank)
        _, *parts = unzip(map_with_path(leaf, params), _Leaf)
        return ScaleByGaloreState(jnp.zeros((), jnp.int32), *parts)

    def update(updates, state, params=None):
        del params
        treedef = jax.tree.structure(updates)
        flat, geometry = flatten(updates), _geometries(updates, targets)
        old, mus, nus = (treedef.flatten_up_to(part) for part in state[1:])
        rows = [
            g if _masked(p) else _rows(g, geometry[path]) for (path, g), p in zip(flat.items(), old)
        ]
        sources = [p if _masked(p) else g for g, p in zip(rows, old)]
        new = state.count % update_proj_gap == 0
        ps = jax.lax.cond(new, _projectors, lambda sources, old: old, sources, old)
        count = optax.safe_increment(state.count)

        def leaf(path, g, rows, p, mu, nu):
            if _masked(mu):
                return _Leaf(g, p, mu, nu)
            low = rows.astype(mu.dtype) if _masked(p) else product(p.mT, rows)
            mu, nu = b1 * mu + (1 - b1) * low, b2 * nu + (1 - b2) * low**2
            t = count.astype(mu.dtype)
            step = scale * (mu / (1 - b1**t)) / (jnp.sqrt(nu / (1 - b2**t)) + eps)
            if not _masked(p):
                step = _unrows(product(p, step), geometry[path], g.shape)
            return _Leaf(step.astype(g.dtype), p, mu, nu)

        out = [leaf(*row) for row in zip(flat, flat.values(), rows, ps, mus, nus)]
        updates, *parts = unzip(treedef.unflatten(out), _Leaf)
        return updates, ScaleByGaloreState(count, *parts)

    return optax.GradientTransformation(init, update)


class _Leaf(NamedTuple):
    """What a step gives for one leaf."""

    update: Any
    projector: Any
    mu: Any
    nu: Any


def _start(x, g: Geometry | None, rank: int) -> _Leaf:
    """The state of a leaf."""
    if g is None:
        return _Leaf(*[optax.MaskedNode()] * 4)
    zeros = lambda *shape: jnp.zeros(shape, wide(x.dtype))
    n, i, o = g.sizes(x.shape)
    m, k = min(i, o), max(i, o)
    if rank >= m:
        return _Leaf(None, optax.MaskedNode(), zeros(*x.shape), zeros(*x.shape))
    return _Leaf(None, zeros(n, m, rank), zeros(n, rank, k), zeros(n, rank, k))


def _masked(x) -> bool:
    return isinstance(x, optax.MaskedNode)


def _geometries(params: Any, targets: Targets | None) -> dict[str, Geometry]:
    """{path: axes} of the leaves that are projected."""
    flat = flatten(params)
    if targets is None:
        return {path: MATRIX for path, x in flat.items() if x.ndim == 2}
    raise_all(
        "these targets do not fit the parameters:",
        (
            f"'{path}': expected {t.shape}, found "
            + (str(tuple(flat[path].shape)) if path in flat else "no such leaf")
            for path, t in targets.lora.items()
            if path not in flat or tuple(flat[path].shape) != tuple(t.shape)
        ),
        "lora.galore(0.01, targets=lora.select(params, config, survey))",
    )
    return {path: t.geometry for path, t in targets.lora.items()}


def _rows(x, g: Geometry) -> jax.Array:
    """A leaf as (n, m, k), in fp32 or wider."""
    n, i, o = g.sizes(x.shape)
    x = x.transpose(*g.batch_axes, *g.in_axes, *g.out_axes).reshape(n, i, o)
    return (x if i <= o else x.mT).astype(wide(x.dtype))


def _unrows(x, g: Geometry, shape) -> jax.Array:
    """The leaf of `shape` of which x is the `_rows`."""
    _, i, o = g.sizes(shape)
    order = (*g.batch_axes, *g.in_axes, *g.out_axes)
    x = (x if i <= o else x.mT).reshape([shape[d] for d in order])
    return x.transpose([order.index(d) for d in range(len(order))])


def _projectors(gradients: list, old: list) -> list:
    """The left singular vectors of each gradient, as many as of old. The moments are kept, and mean
    something only if a vector's sign, which an SVD leaves open, is that of the one before it."""

    def one(g, p):
        if _masked(p):
            return p
        u = jnp.linalg.svd(g, full_matrices=False)[0][..., : p.shape[-1]]
        return u * jnp.where(jnp.sum(u * p, -2, keepdims=True) < 0, -1, 1).astype(u.dtype)

    return [one(g, p) for g, p in zip(gradients, old)]
