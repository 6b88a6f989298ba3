"""The second moments of what each adapted leaf is multiplied with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapt import adapt
from lora_jax._core.einsum import product, wide
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.geometry import Factor, Geometry
from lora_jax._core.nnx import map_state, state_of
from lora_jax._core.numbers import AT_LEAST_ONE, POSITIVE, check_numbers
from lora_jax._core.paths import flatten, map_with_path, nest
from lora_jax._nodes.adapters import LoRA
from lora_jax._nodes.node import is_node
from lora_jax._nodes.weight import Probe, own_axes
from lora_jax.algebra._svd import as_node, from_svd
from lora_jax.methods._start import lora_nodes, low_rank, off_the_base, plain_svd

if TYPE_CHECKING:
    import chex


def second_moments(
    fn: Callable, params: Any, adapters: Any, *args: Any, **kwargs: Any
) -> dict[str, jax.Array]:
    """C = Σ xᵀx of the inputs x of each adapted leaf, in `fn(params, *args, **kwargs)`.

    x are the rows that meet the leaf's in axes: tokens, the patches of a convolution, what was
    routed to an expert. The model is not changed. It costs one call of `fn`, and for each leaf two
    products of x and an (in, in) matrix; under jit nothing else is computed.
    Moments of several batches add up, `jax.tree.map(jnp.add, first, second)`, to those of all.

    Args:
      fn: the plain function, such as `lambda p, x: model.apply({"params": p}, x)`.
      params: the parameters, or an NNX module.
      adapters: as from `init`, or `Targets`: which leaves. Only shapes are read. Memory is
        4·in² bytes for each weight, so of a large model take a part of them at a time.
      *args, **kwargs: a batch.

    Returns:
      {path: (n, in, in)} in fp32 or wider, n the number of weights that the leaf stacks. It is zero
      where no differentiable way leads from the product to an output, or where the product is in a
      function with a `jax.custom_vjp` of its own: `eva` and `corda` refuse that.

    Raises:
      LoRAError: look-up tables, the inputs of which are no vectors; leaves that do not exist;
        inputs of integers or complex numbers.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.ones((2, 3))}
    >>> targets = lora.select(params, lora.LoRAConfig(rank=1, targets="w"))
    >>> x = jnp.array([[1.0, 2.0], [0.0, 1.0]])
    >>> lora.methods.second_moments(lambda p, x: jnp.tanh(x @ p["w"]), params, targets, x)["w"]
    Array([[[1., 2.],
            [2., 5.]]], dtype=float32)
    """
    leaves = flatten(state_of(params))
    nodes = low_rank(adapters)
    failures = [
        f"'{p}' is a look-up table: its inputs are row numbers"
        for p, t in nodes.items()
        if t.embedding
    ]
    failures += [
        f"'{p}' {t.shape} is no leaf of the parameters"
        for p, t in nodes.items()
        if p not in leaves or tuple(leaves[p].shape) != tuple(t.shape)
    ]
    raise_all("these have no second moments:", failures, "exclude them, or pass their own params")
    probes = {p: _identity(t.geometry, t.shape, leaves[p].dtype) for p, t in nodes.items()}
    # Not strict: a leaf that meets no input is told by a zero moment, see `checked_moments`.
    call = adapt(fn, strict=False)

    def run(probes: Mapping[str, jax.Array]) -> Any:
        def leaf(path: str, base: Any) -> Any:
            if path not in probes:
                return base
            a = Factor(probes[path], nodes[path].geometry.a_dims)
            return Probe(base, a, origin=path, axes=own_axes(base))

        return call(map_state(lambda tree: map_with_path(leaf, tree), params), *args, **kwargs)

    # The gradient of a probe is C·a whatever the cotangent (see `_interpret/observe.py`); a is the
    # identity, so zeros for the outputs are enough, and no loss is needed.
    out, back = jax.vjp(run, probes)
    (moments,) = back(jax.tree.map(_no_cotangent, out))
    return {
        # (*batch, *in, in) to (n, in, in).
        p: c.reshape(*t.geometry.sizes(t.shape)[:2], -1)
        for (p, t), c in zip(nodes.items(), (moments[p] for p in nodes))
    }


def checked_moments(moments: Any, nodes: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The second moments of these leaves, if there are any and they say something."""
    failures = []
    for path, t in nodes.items():
        n, i, _ = t.geometry.sizes(t.shape)
        c = moments.get(path) if isinstance(moments, Mapping) else None
        if c is None:
            failures.append(f"'{path}' has none")
        elif tuple(c.shape) != (n, i, i):
            failures.append(f"'{path}': expected {(n, i, i)}, found {tuple(c.shape)}")
        elif not isinstance(c, jax.core.Tracer) and not _says_something(c):
            failures.append(
                f"'{path}' has a moment that is zero or not finite: no differentiable way leads "
                "from its product to an output, it is moved beyond recognition, or unused"
            )
    raise_all(
        "the second moments are not those of these adapters:",
        failures,
        "moments = lora.methods.second_moments(fn, params, adapters, batch)",
    )
    return {p: moments[p] for p in nodes}


def _says_something(c: jax.Array) -> bool:
    """An expert may have seen nothing, but not all of them."""
    # Under jit it may be a constant, whose values are known.
    with jax.ensure_compile_time_eval():
        return bool(jnp.isfinite(c).all() & (jnp.trace(c, axis1=1, axis2=2) > 0).any())


def _identity(g: Geometry, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """(*batch, *in, in): the identity, for each weight of the stack."""
    batch, inner = ([shape[d] for d in axes] for axes in (g.batch_axes, g.in_axes))
    n = g.sizes(shape)[1]
    # NumPy's fp64 is fp32 to JAX, unless it is told otherwise.
    eye = jnp.eye(n, dtype=jax.dtypes.canonicalize_dtype(wide(dtype))).reshape(*inner, n)
    return jnp.broadcast_to(eye, (*batch, *inner, n))


def _no_cotangent(y: Any) -> Any:
    # For integers JAX wants cotangents of float0.
    if jnp.issubdtype(y.dtype, jnp.inexact):
        return jnp.zeros(y.shape, y.dtype)
    return np.zeros(y.shape, jax.dtypes.float0)


def eva(adapters: Any, moments: Mapping[str, chex.Array], *, rho: float = 2.0) -> dict:
    """A has the leading right singular vectors of the leaf's inputs X, and B is zero (EVA, Paischer
    2024, arXiv:2410.07170, section 3). The ranks are redistributed: the directions of all leaves
    compete, and those stay that explain the largest shares σ²/Σσ² of their leaf's second moment
    (eq. 6 has Σσ; the authors' code and PEFT have this).

    The eigenvectors of C = XᵀX, summed over batches, are the singular vectors of all rows: what the
    paper's incremental SVD comes to where it is not truncated. They are of X itself; PEFT's port
    subtracts the mean of X before.

    Args:
      adapters: as from `init`, of which shapes, types and scales are read, not values. Leaves
        trained in full or by rows stay as they are.
      moments: C of each leaf, from `second_moments`.
      rho: a rank grows to at most rho times itself, twice in the authors' code; 1 keeps them all.
        The sum of the ranks (of a stack, of all its weights, which have one rank) is at most what
        it was; a leaf of which nothing is kept has no adapter. Above 1 it depends on values, so not
        under jit.

    Returns:
      The adapters; scales stay, whatever becomes of the rank.

    Raises:
      LoRAError: rho below 1; moments that are missing, of another shape or zero; a scale that is
        not positive, a `DoRA`.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"up": jnp.ones((4, 4)), "down": jnp.ones((4, 4))}
    >>> config = lora.LoRAConfig(rank=1, targets=["up", "down"])
    >>> up, down = jnp.ones(4), jnp.array([3.0, 2.0, 0.0, 0.0])
    >>> moments = {"up": jnp.diag(up)[None], "down": jnp.diag(down)[None]}
    >>> adapters = lora.methods.eva(lora.init(jax.random.key(0), params, config), moments)
    >>> list(adapters), adapters["down"].rank, jnp.abs(adapters["down"].a[:2])
    (['down'], 2, Array([[1., 0.],
           [0., 1.]], dtype=float32))
    """
    call = "lora.methods.eva(adapters, moments, rho=2.0); 1 keeps the ranks"
    (rho,) = check_numbers(call, rho=(rho, AT_LEAST_ONE))
    nodes = lora_nodes(adapters)
    moments = checked_moments(moments, nodes)
    if rho > 1 and any(isinstance(c, jax.core.Tracer) for c in moments.values()):
        raise LoRAError(
            "the ranks depend on the values of the moments: not under jit; pass rho=1: "
            "lora.methods.eva(adapters, moments, rho=1)"
        )
    # With rho = 1 the ranks stay and all of it may be traced; above, ranks become shapes.
    ranks = {p: n.rank for p, n in nodes.items()}
    with jax.ensure_compile_time_eval() if rho > 1 else contextlib.nullcontext():
        found = {p: _principal(moments[p]) for p in nodes}
        if rho > 1:
            ranks = _ranks({p: share for p, (share, _) in found.items()}, nodes, rho)
    flat = flatten(adapters, is_leaf=is_node)
    return nest(
        {
            p: _started(node, found[p][1], ranks[p]) if p in nodes else node
            # No rank, no adapter; what is trained in full or by rows has no entry, and stays.
            for p, node in flat.items()
            if ranks.get(p, 1)
        }
    )


def corda(
    params: Any,
    adapters: Any,
    moments: Mapping[str, chex.Array],
    *,
    mode: Literal["instruction", "knowledge"],
    damping: float = 0.01,
) -> tuple[Any, dict]:
    """The components of W by what they do to given inputs (CorDA, Yang 2024, arXiv:2406.05223,
    section 3): C·W = U·Σ·Vᵀ, hence W = C⁻¹·U·Σ·Vᵀ, of which r components are trained, base' = W −
    s·A·B. The paper's W is (out, in), and its C on the right.

    Args:
      params, adapters: as of `pissa`.
      moments: C of each leaf, from `second_moments`. Only their directions matter: each is divided
        by the mean of its diagonal.
      mode: "instruction" trains the r largest components, with C of the task: of all updates of
        rank r, A·B leaves the least of ‖C·(W − s·A·B)‖. "knowledge" trains the r smallest, with
        C of what is not to be forgotten.
      damping: so much of the mean of C's diagonal is added to the diagonal, as C is often
        singular. The paper begins with this, 0.01 in its code, and doubles it until C·C⁻¹ is near
        the identity; here it is what you say.

    Returns:
      As `pissa`.

    Raises:
      LoRAError: as `pissa`; moments that are missing, of another shape or zero; an unknown mode.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jnp.eye(4)}, jax.random.normal(jax.random.key(0), (9, 4))
    >>> start = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets="w"))
    >>> moments = lora.methods.second_moments(lambda p, x: x @ p["w"], params, start, x)
    >>> base, adapters = lora.methods.corda(params, start, moments, mode="instruction")
    >>> bool(jnp.allclose(lora.merge(base, adapters)["w"], params["w"], atol=1e-5))
    True
    """
    if mode not in ("instruction", "knowledge"):
        raise LoRAError(
            f"mode={mode!r}: expected 'instruction' or 'knowledge': "
            "lora.methods.corda(params, adapters, moments, mode='instruction')"
        )
    call = "lora.methods.corda(params, adapters, moments, mode=..., damping=0.01)"
    (damping,) = check_numbers(call, traced=True, damping=(damping, POSITIVE))
    moments = checked_moments(moments, lora_nodes(adapters))

    def make(path: str, node: LoRA, w: jax.Array) -> LoRA:
        c = moments[path].astype(w.dtype)
        # C (n, in, in) with a mean diagonal of 1: the damping is a share of it. An expert that saw
        # nothing has C = 0, and only the damping is left.
        mean = jnp.trace(c, axis1=1, axis2=2)[:, None, None] / c.shape[-1]
        c = c / jnp.where(mean > 0, mean, 1) + damping * jnp.eye(c.shape[-1], dtype=c.dtype)
        # w (n, in, out); C stands on the side of the inputs.
        u, s, v = plain_svd(product(c, w))
        take = slice(0, node.rank) if mode == "instruction" else slice(-node.rank, None)
        u, s, v = u[:, :, take], s[:, take], v[:, take]
        # C⁻¹·U: the damped C is positive definite, so a Cholesky solve does it.
        u = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(c), True), u)
        return from_svd(node, u, s, v, node.rank, node.scale)

    return off_the_base(params, adapters, make, "methods.corda")


@jax.jit
def _principal(c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The explained shares, falling, as the mean of a stack (in,), and the vectors (n, in, in)."""
    values, vectors = jnp.linalg.eigh(c.astype(wide(c.dtype)))
    # eigh is rising; rounding makes small eigenvalues negative.
    values, vectors = jnp.maximum(values[:, ::-1], 0), vectors[:, :, ::-1]
    total = jnp.sum(values, -1, keepdims=True)
    return jnp.mean(values / jnp.where(total > 0, total, 1), 0), vectors


def _ranks(
    shares: Mapping[str, jax.Array], nodes: Mapping[str, LoRA], rho: float
) -> dict[str, int]:
    """How many directions each leaf keeps: the largest shares first, while the budget lasts."""
    budget, each, most = 0, {}, []
    for i, (path, node) in enumerate(nodes.items()):
        n, inner, outer = node.geometry.sizes(node.shape)
        # One more direction of a stack costs n, as all its weights have one rank.
        budget, each[path] = budget + n * node.rank, n
        # At most ρ·r, and no more than the leaf has.
        top = min(int(rho * node.rank), inner, outer)
        most += [(-float(s), i, path) for s in shares[path][:top]]
    ranks = dict.fromkeys(nodes, 0)
    # Shares are negated, the largest first; among equals the first leaf. A dear stack is passed
    # over where the rest of the budget does not pay for it, cheaper ones still come.
    for share, _, path in sorted(most):
        if share < 0 and each[path] <= budget:
            ranks[path] += 1
            budget -= each[path]
    return ranks


def _started(node: LoRA, vectors: jax.Array, rank: int) -> LoRA:
    n, _, o = node.geometry.sizes(node.shape)
    return as_node(node, vectors[:, :, :rank], jnp.zeros((n, rank, o), vectors.dtype))
