"""Adapters from a full fine-tuning."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._config import LoRAConfig
from lora_jax._core.einsum import wide
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.nnx import state_of
from lora_jax._core.numbers import SHARE, unequal
from lora_jax._core.paths import flatten, nest
from lora_jax._nodes.adapters import Full, LoRA, Rows, rows_of
from lora_jax._targets import Target, Targets
from lora_jax.algebra._finite import is_finite
from lora_jax.algebra._svd import from_svd, rank_for, share_kept


def extract(
    base: Any, tuned: Any, targets: Targets, *, energy: float | None = None, drop: bool = False
) -> tuple[dict, dict[str, float]]:
    """Adapters of a model that was fine-tuned in full: the best of each rank (the SVD of W' − W).

    Args:
      base: the parameters before.
      tuned: the parameters after, of the same structure.
      targets: what `select` returned: leaves and their ranks; leaves of `full` are taken as they
        are in `tuned`, those of `rows` row by row.
      energy: instead of the targets' ranks, the smallest that keep this share of ‖W' − W‖².
      drop: whether changes of leaves and rows that are no targets may be lost.

    Returns:
      (adapters with scale 1, {path: share of ‖W' − W‖² that is kept, the least of a stack}).

    Raises:
      LoRAError: leaves or rows that changed and are no targets (unless `drop`), trees that differ,
        values of targets that are not finite.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> base, tuned = {"w": jnp.zeros((4, 4))}, {"w": jnp.diag(jnp.array([3.0, 1.0, 0.0, 0.0]))}
    >>> targets = lora.select(base, lora.LoRAConfig(rank=1, targets="w"))
    >>> lora.algebra.extract(base, tuned, targets)[1]["w"]  # 9 of 10
    0.9
    """
    if energy is not None and not SHARE.fits(energy):
        raise LoRAError(
            f"energy={energy}: expected a share in (0, 1]: "
            "lora.algebra.extract(base, tuned, targets, energy=0.95)"
        )
    energy = None if energy is None else float(energy)
    call = "lora.algebra.extract(base, tuned, targets)"
    if not isinstance(targets, Targets):
        raise LoRAError(
            f"expected Targets, found {type(targets).__name__}: lora.algebra.extract(base, tuned, "
            "lora.select(base, config, survey))"
        )
    before, after = (flatten(state_of(x)) for x in (base, tuned))
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((before, after))):
        raise LoRAError(f"what changed is in the values, found traced ones: {call} outside of jit")
    # All checks come before the first SVD, which can take minutes.
    failures = [f"'{p}' is in one tree alone" for p in before.keys() ^ after.keys()]
    failures += [
        f"'{p}': {tuple(before[p].shape)} became {tuple(after[p].shape)}"
        for p in before.keys() & after.keys()
        if before[p].shape != after[p].shape
    ]
    raise_all("these are not one model before and after:", sorted(failures), call)
    targets.check_fit(before, f"{call}, with targets = lora.select(base, config, survey)")
    chosen = {*targets.lora, *targets.full, *targets.rows}
    raise_all(
        "these hold NaN or infinity:",
        [
            f"'{p}' of {name}"
            for p in before
            for name, tree in (("base", before), ("tuned", after))
            if p in chosen and not is_finite(tree[p])
        ],
        "look at the training that made them, or exclude them from the targets",
    )
    if not drop:
        same = lambda p: not bool(jnp.any(unequal(before[p], after[p])))
        lost = [f"'{p}'" for p in before if p not in chosen and not same(p)]
        for p, (_, index) in targets.rows.items():
            # Tables are (rows, d).
            changed = np.any(np.asarray(unequal(before[p], after[p])), 1).nonzero()[0]
            if rows := sorted({*changed.tolist()} - {*index}):
                more = ", …" if len(rows) > 8 else ""
                lost.append(f"'{p}': rows {', '.join(map(str, rows[:8]))}{more}")
        raise_all(
            "these changed, and are no targets:",
            lost,
            "select them too (`full=[...]`, `rows={...}`), or lora.algebra.extract(..., drop=True)",
        )
    flat: dict[str, Any] = {}
    kept: dict[str, float] = {}
    for path, t in targets.lora.items():
        flat[path], kept[path] = _extracted(before[path], after[path], t, targets.config, energy)
    for path in targets.full:
        flat[path] = Full(jnp.asarray(after[path]).astype(targets.config.dtype))
    for path, (shape, index) in targets.rows.items():
        rows = rows_of(jnp.asarray(after[path]), jnp.asarray(index))
        flat[path] = Rows(rows.astype(targets.config.dtype), index, shape[0])
    return nest(flat), kept


def _extracted(
    before: Any, after: Any, t: Target, config: LoRAConfig, energy: float | None
) -> tuple[LoRA, float]:
    """The node of one leaf, and the share of its change that is kept."""
    g = t.geometry
    dtype = wide(after.dtype)
    # Widened before the subtraction: in bf16 a small change would be lost in it.
    change = jnp.asarray(after).astype(dtype) - jnp.asarray(before).astype(dtype)
    # U (n, in, k), σ (n, k), Vᵀ (n, k, out).
    u, s, v = jnp.linalg.svd(g.matrices(change), full_matrices=False)
    rank = t.rank if energy is None else rank_for(s, energy)
    # Zeros that only say the dtype: `from_svd` puts the directions in their place.
    a, b = (jnp.zeros(shape, config.dtype) for shape in g.factor_shapes(t.shape, rank))
    like = LoRA(a, b, 1.0, g, t.dropout, t.embedding)
    return from_svd(like, u, s, v, rank), round(float(share_kept(s, rank)), 6)
