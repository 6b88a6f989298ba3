"""AdaLoRA's training: importances, the budget's schedule and the mask, as one optax transformation.

A triplet is a singular value with its two vectors. All of those of all matrices compete for the
budget; the mask of the losers is a state of fixed shape, so that a step is compiled once.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax._core.einsum import wide
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.numbers import refused
from lora_jax._nodes.node import is_node
from lora_jax.methods._adalora import CALL, AdaLoRA, adalora_nodes
from lora_jax.optim._settings import KINDS, check_optimiser


class AdaLoRAState(NamedTuple):
    """The state of `adalora`.

    Attributes:
      step: the number of steps done.
      sensitivity, uncertainty: trees like the adapters, moving means of I and of |I − Ī| of each
        entry; nothing for leaves of another kind.
      mask: such a tree with True for each singular value that the last allocation kept; the sum is
        the budget. Nothing for P and Q.
      inner: the wrapped optimiser's state.
    """

    step: jax.Array
    sensitivity: Any
    uncertainty: Any
    mask: Any
    inner: Any


def adalora(
    tx: optax.GradientTransformation,
    *,
    target_rank: float,
    steps: int,
    tinit: int = 0,
    tfinal: int = 0,
    interval: int = 10,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    """AdaLoRA (arXiv:2303.10512, algorithm 1) around any optimiser of `init_adalora`'s adapters.

    Each step the optimiser moves P, Λ and Q. The importance of an entry is the product of a moving
    mean of its sensitivity |w · ∂L/∂w| and of that mean's uncertainty (eq. 8 to 11), that of a
    triplet S(λ) + mean S(P's column) + mean S(Q's row) (eq. 7). At an allocation the `budget(t)`
    triplets of the highest importance, of all matrices, keep their λ, and all others get zero. It
    is exactly that many: among equals the first ones. Between two allocations all λ train freely,
    by which a pruned triplet can come back (section 4); after the last one the mask is fixed and
    holds at each step.

    The sensitivity is that of the parameters at which the gradient was taken, as in the paper (the
    authors' code and PEFT multiply the gradient with the parameters after the step). To prune is
    part of the update, u = −λ, so nothing may follow that changes updates: put clipping and weight
    decay inside of `tx`.

    Args:
      tx: any optimiser, such as `optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))`.
        Leaves of another kind are its alone.
      target_rank: the mean rank of a matrix at the end; each weight of a stack is a matrix.
      steps: T, how many there will be in all; counted from 1.
      tinit: the first t_i steps prune nothing.
      tfinal: the last t_f steps train with the final mask.
      interval: ΔT, an allocation at each step that it divides, and at T − t_f.
      beta1, beta2: of the two moving means.

    Returns:
      A pair (init, update), with an `AdaLoRAState`. `update` needs the parameters.

    Raises:
      LoRAError: a schedule without a phase in which the budget falls, a coefficient outside of
        [0, 1), a target above the rank; no `AdaLoRA` in the tree, or no parameters.

    >>> import jax, jax.numpy as jnp, lora_jax as lora, optax
    >>> config = lora.LoRAConfig(rank=3, targets=["q", "v"])
    >>> params = {"q": jnp.eye(4), "v": jnp.eye(4)}
    >>> adapters = lora.methods.init_adalora(jax.random.key(0), params, config)
    >>> tx = lora.optim.adalora(optax.sgd(0.01), target_rank=2, steps=20, tinit=2, tfinal=8)
    >>> state = tx.init(adapters)
    >>> def loss(adapters):
    ...     merged = lora.merge(params, adapters)
    ...     error = merged["q"] @ merged["v"] - 2.0
    ...     return jnp.sum(error**2) + lora.methods.orthogonality(adapters)
    >>> @jax.jit
    ... def step(adapters, state):
    ...     updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
    ...     return optax.apply_updates(adapters, updates), state
    >>> for _ in range(20):
    ...     adapters, state = step(adapters, state)
    >>> small = lora.methods.pruned(adapters)  # LoRA of real ranks
    >>> sum(node.rank for node in small.values())  # 2 matrices of mean rank 2
    4
    """
    target_rank, steps, tinit, tfinal, interval, beta1, beta2 = _check(
        target_rank=target_rank,
        steps=steps,
        tinit=tinit,
        tfinal=tfinal,
        interval=interval,
        beta1=beta1,
        beta2=beta2,
    )
    check_optimiser(tx, CALL)
    tx = optax.with_extra_args_support(tx)
    end = steps - tfinal

    def budget_at(mask: Any, step: jax.Array):
        """b(t) of a traced t: the target, and 1 for each larger budget that t has not passed."""
        # λ is (*batch, rank): all its entries are triplets, all but its last axis are matrices.
        lams = [n.lam for n in adalora_nodes(mask)]
        start, matrices = (sum(math.prod(x.shape[:d]) for x in lams) for d in (None, -1))
        # Eq. 12 is computed in Python's integers, exactly; the traced t is only compared.
        falls = _falls(start, round(target_rank * matrices), tinit, end)
        return start - len(falls) + jnp.sum(jnp.asarray(falls, jnp.int32) >= step)

    def init(params: optax.Params):
        nodes = adalora_nodes(params)
        low = [n.rank for n in nodes if n.rank < target_rank]
        if low:
            raise LoRAError(
                f"target_rank={target_rank:g} is above the rank {min(low)} of the adapters; start "
                "with more, the paper with 1.5 times the target: lora.LoRAConfig(rank=12)"
            )
        # In fp32 at least: in fp16 |w · g| would underflow.
        zeros = lambda x: jnp.zeros(x.shape, wide(x.dtype))
        like = lambda fn: _map(lambda n: _each(fn, n), params)
        return AdaLoRAState(
            jnp.zeros((), jnp.int32),
            like(zeros),
            like(zeros),
            _map(lambda n: _lam(n, jnp.ones(n.lam.shape, bool)), params),
            tx.init(params),
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra: Any,
    ):
        if params is None:
            raise LoRAError("adalora needs the parameters: tx.update(grads, state, adapters)")
        adalora_nodes(params)
        # t counts from 1, as in the paper.
        step = state.step + 1
        new = _means(updates, params, state, beta1, beta2)
        # After the last allocation the importances are not read again, and rest.
        old = (state.sensitivity, state.uncertainty)
        sensitivity, uncertainty = jax.tree.map(lambda n, o: jnp.where(step <= end, n, o), new, old)
        # Ranked in every step and used in some: the step is one program without branches.
        kept = _largest(sensitivity, uncertainty, state.mask, budget_at(state.mask, step))
        allocates = (step > tinit) & (step <= end) & ((step % interval == 0) | (step == end))
        mask = jax.tree.map(lambda new, old: jnp.where(allocates, new, old), kept, state.mask)
        # Between allocations nothing is held at zero: a pruned λ may train and come back.
        holds = allocates | (step > end)
        # The gradients have been read: from here on `updates` are the optimiser's.
        updates, inner = tx.update(updates, state.inner, params, **extra)

        def pruning(node: Any, u: Any, m: Any):
            if not isinstance(node, AdaLoRA):
                return u
            # λ + (−λ) is exactly zero, whatever the optimiser said.
            lam = jnp.where(m.lam | ~holds, u.lam, -node.lam.astype(u.lam.dtype))
            return dataclasses.replace(u, lam=lam)

        updates = jax.tree.map(pruning, params, updates, mask, is_leaf=is_node)
        return updates, AdaLoRAState(step, sensitivity, uncertainty, mask, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def budget(t: int, *, start: int, target: int, tinit: int, end: int) -> int:
    """b(t) = b_T + (b₀ − b_T)·(1 − (t − t_i)/(T − t_f − t_i))³ (eq. 12), rounded down, exactly.

    Eq. 12 is printed with t − t_i − t_f in the numerator; this is what the authors' code has.

    The authors' README: 72 matrices from rank 12 to 8, t_i = 500, T = 3000, t_f = 1500.

    >>> of = dict(start=72 * 12, target=72 * 8, tinit=500, end=3000 - 1500)
    >>> [budget(t, **of) for t in (500, 750, 1000, 1500)]
    [864, 697, 612, 576]
    """
    # (1 − (t − t_i)/(end − t_i))³ = left³ / (end − t_i)³, in integers.
    left = end - min(max(t, tinit), end)
    return target + (start - target) * left**3 // (end - tinit) ** 3


def _check(**numbers: Any) -> list[Any]:
    """The schedule in Python's numbers: NumPy's integers would overflow in the budget's cubes."""
    raise_all(
        "the schedule is fixed, and cannot be made of arrays:",
        (f"{k}={v}" for k, v in numbers.items() if isinstance(v, jax.Array)),
        "inject hyperparameters of what it wraps: "
        "lora.optim.adalora(optax.inject_hyperparams(optax.adam)(learning_rate=1e-3), ...)",
    )
    asked = {k: (x, KINDS[k]) for k, x in numbers.items()}
    failures = refused(**asked)
    tinit, tfinal, steps = (numbers[k] for k in ("tinit", "tfinal", "steps"))
    if not failures and tinit >= steps - tfinal:
        failures.append(
            f"tinit={tinit}, tfinal={tfinal}, steps={steps}: expected tinit < steps - tfinal, the "
            "phase in which the budget falls"
        )
    raise_all("invalid schedule:", failures, CALL)
    return [kind.plain(x) for x, kind in asked.values()]


def _falls(start: int, target: int, tinit: int, end: int) -> list[int]:
    """For each budget k from target + 1 to start the last step t with budget(t) >= k."""
    of = dict(start=start, target=target, tinit=tinit, end=end)
    # The budget falls, so "below k" is False and then True: bisection finds where.
    at_least = lambda k: bisect.bisect_left(
        range(tinit, end), True, key=lambda t: budget(t, **of) < k
    )
    return [tinit - 1 + at_least(k) for k in range(target + 1, start + 1)]


def _map(fn: Callable, tree: Any) -> Any:
    """`fn` of each AdaLoRA node; nothing of all else."""
    # A MaskedNode has no leaves, so the state holds nothing for it.
    nothing = lambda x: jax.tree.map(lambda _: optax.MaskedNode(), x)
    one = lambda x: fn(x) if isinstance(x, AdaLoRA) else nothing(x)
    return jax.tree.map(one, tree, is_leaf=is_node)


def _each(fn: Callable, node: AdaLoRA, *others: AdaLoRA) -> AdaLoRA:
    values = {x: fn(*(getattr(n, x) for n in (node, *others))) for x in ("p", "lam", "q")}
    return dataclasses.replace(node, **values)


def _lam(node: AdaLoRA, value: Any) -> AdaLoRA:
    nothing: Any = optax.MaskedNode()
    return dataclasses.replace(node, p=nothing, lam=value, q=nothing)


def _means(
    grads: optax.Updates, params: optax.Params, state: AdaLoRAState, beta1: float, beta2: float
) -> tuple[Any, Any]:
    """Eq. 9 and 10: the moving means of I = |w·g| and of |I − Ī|."""

    def entry(g: jax.Array, w: jax.Array, mean: jax.Array, spread: jax.Array):
        # I = |w · ∂L/∂w|, about how much the loss would change without the entry (eq. 8).
        now = jnp.abs(w.astype(mean.dtype) * g.astype(mean.dtype))
        mean = beta1 * mean + (1 - beta1) * now
        # |I − Ī| with the new mean.
        return mean, beta2 * spread + (1 - beta2) * jnp.abs(now - mean)

    def node(i: int):
        def of(w: Any, g: Any, mean: Any, spread: Any):
            if not isinstance(w, AdaLoRA):
                return mean
            return _each(lambda w, g, m, s: entry(g, w, m, s)[i], w, g, mean, spread)

        return of

    trees = (params, grads, state.sensitivity, state.uncertainty)
    # One tree each of means and of spreads; what stands there twice, XLA computes once.
    return tuple(jax.tree.map(node(i), *trees, is_leaf=is_node) for i in range(2))


def _largest(sensitivity: Any, uncertainty: Any, mask: Any, number: jax.Array) -> Any:
    """A tree like the mask, with True for this many triplets of the highest importance."""
    # The triplets of all leaves in one row.
    scores = jnp.concatenate([s.ravel() for s in _scores(sensitivity, uncertainty)])
    order = jnp.argsort(-scores, stable=True)
    # By rank in the order and not by a threshold, which equal scores would pass together.
    kept = jnp.zeros(scores.shape, bool).at[order].set(jnp.arange(scores.size) < number)
    lams = [n.lam for n in adalora_nodes(mask)]
    # Back to the leaves, in the order in which `_scores` has them.
    parts = jnp.split(kept, list(itertools.accumulate(x.size for x in lams))[:-1])
    found = iter([part.reshape(x.shape) for part, x in zip(parts, lams)])
    return _map(lambda n: _lam(n, next(found)), mask)


def _scores(sensitivity: Any, uncertainty: Any) -> list[jax.Array]:
    """Eq. 7: the importance of each triplet, (*batch, rank), of each leaf."""
    found = []
    for mean, spread in zip(adalora_nodes(sensitivity), adalora_nodes(uncertainty)):
        s = _each(lambda m, u: m * u, mean, spread)
        # The number of batch axes: P is (*batch, *in, rank), Q (*batch, rank, *out).
        n = s.lam.ndim - 1
        p = jnp.mean(s.p, tuple(range(n, s.p.ndim - 1)))
        q = jnp.mean(s.q, tuple(range(n + 1, s.q.ndim)))
        found.append(s.lam + p + q)
    return found
