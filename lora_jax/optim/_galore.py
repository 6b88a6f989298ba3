"""GaLore: Adam for full-parameter training with moments of rank r."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax._core.einsum import wide
from lora_jax._core.geometry import Geometry
from lora_jax._core.paths import flatten, map_with_path
from lora_jax._targets import Targets
from lora_jax.optim._labels import decays
from lora_jax.optim._pairs import unzip
from lora_jax.optim._settings import check_settings

CALL = (
    "lora.optim.galore(0.01, rank=128, update_proj_gap=200); rank is a shape: "
    'optax.inject_hyperparams(lora.optim.galore, static_args=("rank", "update_proj_gap"))'
)

MATRIX = Geometry((0,), (1,))

# With integers as labels of axes: einsum(x, (0, 1), y, (1, 2), (0, 2)) is x·y.
einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class ScaleByGaloreState(NamedTuple):
    """State of `scale_by_galore`. The arrays of a leaf have its axes, so that they are sharded like
    it; where a group of axes became the rank, the first of them is r, the others 1.

    Attributes:
      count: how many updates there were.
      projector: orthonormal vectors, of a leaf m × k, m ≤ k, (m, r); of one k × m, (r, m).
      mu, nu: Adam's moments of the projected gradient, (r, k) or (k, r).

    Where r ≥ m there is no projector, and the moments have the leaf's shape.
    """

    count: jax.Array
    projector: Any
    mu: Any
    nu: Any


def galore(
    learning_rate: optax.ScalarOrSchedule,
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
    `update_proj_gap`-th step; Adam sees PᵀG (r, k), and the leaf moves by α·P·N. The moments are
    kept where P changes, as in the paper; a vector's sign, which an SVD leaves open, is that of the
    one whose place it takes.

    Good for: full-parameter training where Adam's moments do not fit. It is no adapter: all of W
    moves, nothing is merged, and a gradient as large as W is formed.

    Memory: W and mr + 2rk numbers of state in fp32, where Adam has 2mk: less for r < 2mk / (m+2k).
    FLOPs: 4mkr in each step; in every `update_proj_gap`-th, the first included, 6m²k and two
    eigendecompositions of m × m (under `jax.lax.cond`), which find P to an angle of about
    16·ε·σ₁ / (σ_r − σ_{r+1}), ε that of fp32, where σ_r is at least 10⁻⁴·σ₁; below, P is not an
    SVD's, but orthonormal as well. That step may take seconds where m is some thousands, and two
    more copies of a gradient. On CPUs with other work set OPENBLAS_NUM_THREADS=1: LAPACK's threads
    beside XLA's made it four times as slow.

    On a mesh `state_shardings` splits P and the moments as their leaf: r is replicated.

    Args:
      learning_rate: a number or a schedule; 0.01 to 0.005 in the authors' pre-training.
      rank: r; 128 to 1024 in the paper (a quarter to a half of the model's width).
      update_proj_gap: T; 200 in the paper.
      scale: α; 0.25 in the paper.
      b1, b2, eps: Adam's.
      weight_decay: decoupled, of all leaves.
      targets: what `select` returned: the leaves to project, and which of their axes are rows,
        columns or a stack (scanned layers, experts). The paper takes attention's and MLP's. None:
        every real leaf of two axes; then one of more axes is trained by plain Adam.

    Returns:
      An optimiser for any parameter tree; leaves that are not projected are trained by plain Adam,
      without α.

    Raises:
      LoRAError: a rank or gap that is no integer >= 1, a decay rate outside of [0, 1), a negative
        number or one that is not finite; in `init`, targets that are no leaves of the tree.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.ones((64, 256)), "bias": jnp.ones(256)}
    >>> state = lora.optim.galore(0.01, rank=4).init(params)
    >>> sum(x.size for x in jax.tree.leaves(state))  # 64·4 + 2·4·256, 2·256 of Adam, two counts
    2818
    """
    learning_rate, rank, update_proj_gap, scale, b1, b2, eps, weight_decay = check_settings(
        CALL,
        learning_rate=learning_rate,
        rank=rank,
        update_proj_gap=update_proj_gap,
        scale=scale,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
    )
    tx = scale_by_galore(rank, update_proj_gap, scale, b1, b2, eps, targets)

    def kinds(params: optax.Params):
        geometry = _geometries(params, targets)
        return map_with_path(lambda path, _: "galore" if path in geometry else "adam", params)

    return optax.chain(
        optax.partition({"galore": tx, "adam": optax.scale_by_adam(b1, b2, eps)}, kinds),
        optax.add_decayed_weights(weight_decay) if decays(weight_decay) else optax.identity(),
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
    >>> tx = optax.chain(lora.optim.scale_by_galore(rank=8), optax.scale_by_learning_rate(0.01))
    """
    rank, gap, scale, b1, b2, eps = check_settings(
        CALL, rank=rank, update_proj_gap=update_proj_gap, scale=scale, b1=b1, b2=b2, eps=eps
    )

    def init(params: optax.Params):
        geometry = _geometries(params, targets)
        leaf = lambda path, x: _start(x, geometry.get(path), rank)
        _, *parts = unzip(map_with_path(leaf, params), _Leaf)
        return ScaleByGaloreState(jnp.zeros((), jnp.int32), *parts)

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None):
        del params
        treedef = jax.tree.structure(updates)
        flat, geometry = flatten(updates), _geometries(updates, targets)
        # `flatten_up_to` keeps a MaskedNode, which has no leaves, as the entry of its leaf.
        old, mus, nus = (treedef.flatten_up_to(part) for part in state[1:])
        # None where there is no projector: not ours, or r ≥ m.
        sides = [
            None if _masked(p) else _Sides(g.shape, geometry[path])
            for (path, g), p in zip(flat.items(), old)
        ]
        # `cond` takes no gradient that neither branch reads.
        sources = [p if _masked(p) else g for g, p in zip(flat.values(), old)]
        # In the first step too: the projectors begin as zeros.
        new = state.count % gap == 0
        projectors = functools.partial(_projectors, sides)
        ps = jax.lax.cond(new, projectors, lambda sources, old: old, sources, old)
        count: Any = optax.safe_increment(state.count)

        def leaf(g: jax.Array, side: _Sides | None, p: Any, mu: Any, nu: Any):
            # Not a leaf to project: its update passes unchanged.
            if _masked(mu):
                return _Leaf(g, p, mu, nu)
            # PᵀG, or G itself where there is no projector.
            low = g.astype(mu.dtype)
            low = low if side is None else side.project(low, p)
            mu, nu = b1 * mu + (1 - b1) * low, b2 * nu + (1 - b2) * low**2
            t = count.astype(mu.dtype)
            # Adam's step with its two bias corrections, times α.
            step = scale * (mu / (1 - b1**t)) / (jnp.sqrt(nu / (1 - b2**t)) + eps)
            step = step if side is None else side.back(step, p)
            return _Leaf(step.astype(g.dtype), p, mu, nu)

        out = [leaf(*row) for row in zip(flat.values(), sides, ps, mus, nus)]
        updates, *parts = unzip(treedef.unflatten(out), _Leaf)
        return updates, ScaleByGaloreState(count, *parts)

    return optax.GradientTransformation(init, update)


class _Leaf(NamedTuple):
    """What a step gives for one leaf."""

    update: Any
    projector: Any
    mu: Any
    nu: Any


class _Sides:
    """The axes of a leaf in three groups: a stack of n, rows and columns, m of the one and k of the
    other, m ≤ k. Products are over the leaf's own axes: nothing as large as it is reshaped."""

    def __init__(self, shape: tuple[int, ...], g: Geometry):
        self.shape, self.batch = tuple(shape), g.batch_axes
        self.n, i, o = g.sizes(self.shape)
        self.m = min(i, o)
        # Rows are the shorter side, m: P has its vectors there.
        self.rows, self.cols = (g.in_axes, g.out_axes) if i <= o else (g.out_axes, g.in_axes)
        self.all = tuple(range(len(shape)))
        # The label of the rank's axis; the numbers after it are spare ones for the rows.
        self.rank = len(shape)

    def shape_with(self, r: int, gone: tuple[int, ...]) -> tuple[int, ...]:
        """The leaf's shape with these axes as one of size r, and ones."""
        size = dict(enumerate(self.shape)) | dict.fromkeys(gone, 1) | {gone[0]: r}
        return tuple(size.values())

    def labels(self, gone: tuple[int, ...]) -> tuple[int, ...]:
        """The axes of such an array, those of size 1 left out."""
        return tuple(self.rank if d == gone[0] else d for d in self.all if d not in gone[1:])

    def squeezed(self, x: jax.Array, gone: tuple[int, ...]) -> tuple:
        return jnp.squeeze(x, gone[1:]), self.labels(gone)

    def project(self, g: jax.Array, p: jax.Array) -> jax.Array:
        """Pᵀ·G of a gradient, in the shape of the moments."""
        low = einsum(g, self.all, *self.squeezed(p, self.cols), self.labels(self.rows))
        return low.reshape(self.shape_with(p.shape[self.cols[0]], self.rows))

    def back(self, low: jax.Array, p: jax.Array) -> jax.Array:
        """P·N, in the shape of the leaf."""
        return einsum(*self.squeezed(low, self.rows), *self.squeezed(p, self.cols), self.all)

    def gram(self, x: jax.Array, labels: tuple[int, ...], rows: tuple[int, ...]) -> jax.Array:
        """x·xᵀ (n, m, m) over the columns, of an array with these labels and these as its rows."""
        # The second x has other labels for its rows, so that they are not summed; the columns are.
        spare = {d: self.rank + 1 + i for i, d in enumerate(rows)}
        other = [spare.get(d, d) for d in labels]
        out = (*self.batch, *rows, *spare.values())
        return einsum(x, labels, x, other, out).reshape(self.n, self.m, self.m)

    def vectors(self, g: jax.Array, r: int) -> jax.Array:
        """The left singular vectors of the r largest values, in the shape of the projector.

        They are eigenvectors of G·Gᵀ, which are cheaper than an SVD. But G·Gᵀ squares the singular
        values σ, and its rounding hides those below √ε·σ₁. So those above ε^⅕·σ₁ are taken out of
        G, and the others are found in what is left.
        """
        # To entries of at most 1: their squares neither overflow nor vanish.
        peak = jnp.max(jnp.abs(g), (*self.rows, *self.cols), keepdims=True)
        g, eps = g / jnp.where(peak > 0, peak, 1), float(jnp.finfo(g.dtype).eps)
        w, v = _eigh(self.gram(g, self.all, self.rows))
        # w = σ², so this is σ > ε^⅕·σ₁.
        known = w > eps**0.4 * w[:, :1]
        # (n, m, m), the known columns as zeros.
        others = jnp.where(known[:, None, :], 0, v)
        size = [self.shape[d] for d in (*self.batch, *self.rows)]
        # y = othersᵀ·G, m rows again; its Gram matrix is of what is left, in the basis V.
        across = (*self.batch, self.rank, *self.cols)
        y = einsum(
            g, self.all, others.reshape(*size, self.m), (*self.batch, *self.rows, self.rank), across
        )
        left = self.gram(y, across, (self.rank,))
        top = jnp.max(left, (1, 2))[:, None] + eps
        # Where G is of low rank, what is known is to come after the null space.
        _, q = _eigh(left - jnp.where(known, top, 0)[:, None, :] * jnp.eye(self.m, dtype=g.dtype))
        # The known columns of V come first, then those that Q gives.
        index, c = jnp.arange(r), jnp.sum(known, -1)[:, None, None]
        # Column j of the result is V's j-th for j < c, and V times Q's (j − c)-th from there on.
        later = jnp.take_along_axis(q, jnp.maximum(index - c, 0), -1)
        u = jnp.where(index < c, v[:, :, :r], einsum("nij,njk->nik", v, later))
        # (n, m, r), each axis back to its place in the leaf.
        order = (*self.batch, *self.rows, self.rank)
        u = einsum(u.reshape(*size, r), order, self.labels(self.cols))
        return u.reshape(self.shape_with(r, self.cols))


def _eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, falling, and vectors of symmetric matrices (n, m, m)."""
    w, v = jnp.linalg.eigh(x)
    return w[:, ::-1], v[:, :, ::-1]


def _start(x: jax.Array, g: Geometry | None, rank: int) -> _Leaf:
    """The state of a leaf."""
    if g is None:
        return _Leaf(*[optax.MaskedNode()] * 4)
    zeros = functools.partial(jnp.zeros, dtype=wide(x.dtype))
    side = _Sides(x.shape, g)
    if rank >= side.m:
        return _Leaf(None, optax.MaskedNode(), zeros(x.shape), zeros(x.shape))
    p, low = (zeros(side.shape_with(rank, gone)) for gone in (side.cols, side.rows))
    # An array of its own for ν: a buffer that stood for both could not be donated.
    return _Leaf(None, p, low, jnp.zeros_like(low))


def _masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _projectors(sides: list, gradients: list, old: list) -> list:
    """The left singular vectors of each gradient, as many as before. The moments are kept, and mean
    something only if a vector's sign, which is open, is that of the one before it."""

    def one(side: _Sides, g: jax.Array, p: Any):
        if _masked(p):
            return p
        # The first column axis holds r (`shape_with`).
        u = side.vectors(g.astype(p.dtype), p.shape[side.cols[0]])
        return u * jnp.where(jnp.sum(u * p, side.rows, keepdims=True) < 0, -1, 1).astype(u.dtype)

    return [one(*row) for row in zip(sides, gradients, old)]


def _geometries(params: Any, targets: Targets | None) -> dict[str, Geometry]:
    """{path: axes} of the leaves that are projected."""
    flat = flatten(params)
    if targets is None:
        # The Gram matrix of a complex gradient is another; plain Adam takes it.
        real = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
        return {path: MATRIX for path, x in flat.items() if x.ndim == 2 and real(x)}
    call = "lora.optim.galore(0.01, targets=lora.select(params, config, survey))"
    dataclasses.replace(targets, full={}, rows={}).check_fit(flat, call)
    return {path: t.geometry for path, t in targets.lora.items()}
