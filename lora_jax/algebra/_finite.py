"""One rule for values that are not finite: refused by name where they are known, else passed on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core.errors import raise_all
from lora_jax._core.nnx import state_of
from lora_jax._core.numbers import check_values
from lora_jax._core.paths import flatten
from lora_jax._core.placement import check_there
from lora_jax._nodes.node import is_node


def check_finite(*trees: Any, weights: Iterable[Any] = (), base: Any = None) -> None:
    """Raises for adapters, weights and a base that hold NaN or infinity, leaf by leaf.

    Traced arrays have no values yet: what is computed of them is NaN where they are not finite.

    Args:
      *trees: adapters.
      weights: one for each of the trees, as of `combine`.
      base: parameters; only leaves that have an adapter are looked at.
    """
    flat = [flatten(tree, is_leaf=is_node) for tree in trees]
    check_values(
        ((f"'{path}'", node) for nodes in flat for path, node in nodes.items()),
        "jax.eval_shape(lora.algebra.combine, adapters)",
    )
    leaves = {} if base is None else flatten(state_of(base))
    leaves = {p: x for p, x in leaves.items() if any(p in nodes for nodes in flat)}
    check_there(*map(flatten, trees), leaves)
    of = lambda k: f" of adapters[{k}]" if len(trees) > 1 else ""
    named = [(f"'{p}'{of(k)}", node) for k, tree in enumerate(flat) for p, node in tree.items()]
    named += [(f"the weight{of(k)}", w) for k, w in enumerate(weights)]
    named += [(f"'{p}' of the base", x) for p, x in leaves.items()]
    raise_all(
        "these hold NaN or infinity:",
        [name for name, value in named if not is_finite(value)],
        "look at the training that made them, or leave them out",
    )


def is_finite(tree: Any) -> bool:
    """Whether all numbers are finite, as far as they are known."""
    known = (jax.Array, np.ndarray, float)
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, known)]
    # Under jit, constants have values and adapters do not: only the former are computed at once.
    with jax.ensure_compile_time_eval():
        return all([bool(_all_finite(x)) for x in arrays if not isinstance(x, jax.core.Tracer)])


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()
