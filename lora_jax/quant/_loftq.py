"""LoftQ: a quantised base, and adapters that begin as the best correction of what it lost."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._bind import adapter_nodes
from lora_jax._core.einsum import wide
from lora_jax._core.errors import raise_all
from lora_jax._core.nnx import map_state
from lora_jax._core.numbers import PASSES, check_numbers
from lora_jax._core.paths import map_with_path
from lora_jax._nodes.adapters import LoRA
from lora_jax._quantized.make import quantized
from lora_jax._quantized.weight import Quantized
from lora_jax._survey import Survey
from lora_jax.algebra._svd import from_svd
from lora_jax.methods._start import each, lora_nodes, plain_svd
from lora_jax.quant._quantize import (
    FINITE,
    NOT_FINITE,
    chosen_leaves,
    not_finite,
    quantize_leaf,
    stacked,
)


def loftq(
    params: Any,
    adapters: Any,
    targets: Any,
    format: str = "nf4",
    *,
    iterations: int = 5,
    double: bool = False,
    survey: Survey | None = None,
) -> tuple[Any, dict]:
    """Codes and adapters fitted to each weight together (LoftQ, Li 2023, arXiv:2310.08659,
    algorithm 1): from A·B = 0, as often as `iterations`, Q = q(W − s·A·B), and s·A·B = the best of
    rank r of W − Q, by the SVD.

    The adapted function begins nearer to that of W than the quantised one does. A weight without
    structure has little error of low rank: on N(0, 1), with NF4 and rank 16, ‖W − Q − s·A·B‖
    is 0.85, 0.74 and 0.72 of ‖W − q(W)‖ after one, five and ten iterations for (192, 192), 0.89,
    0.78 and 0.76 for (256, 256), and still 0.94 and 0.85 after one and five for (512, 512).

    Args:
      params: the parameters.
      adapters: as from `init`, of which shapes, types and scales are read, not values.
      targets, format, double, survey: which leaves are quantised, and how, as in `quantize`. Those
        without a `LoRA` are merely quantised; an adapter of one that is not stays as it is.
      iterations: T, 5 in the authors' code; 1 is the SVD of the error of q(W).

    Returns:
      (quantised parameters, adapters): both at the end of the last iteration.

    Raises:
      LoRAError: as `quantize` (NaN and infinity, too) and `pissa`; iterations below 1; no adapted
        leaf among the targets.

    >>> import jax, lora_jax as lora
    >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    >>> start = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=8, targets="w"))
    >>> base, adapters = lora.quant.loftq(params, start, "w")
    >>> left = jax.numpy.linalg.norm(params["w"] - lora.merge(base, adapters)["w"])
    >>> plain = lora.quant.dequantize(lora.quant.quantize(params, "w"))["w"]
    >>> bool(left < 0.7 * jax.numpy.linalg.norm(params["w"] - plain))
    True
    """
    call = "lora.quant.loftq(params, adapters, targets, iterations=5)"
    (iterations,) = check_numbers(call, iterations=(iterations, PASSES))
    adapter_nodes(params, adapters, "quant.loftq")
    chosen = chosen_leaves(params, targets, format, survey, double)
    nodes = {p: n for p, n in lora_nodes(adapters).items() if p in chosen}
    if not nodes:
        raise_all(
            "none of these adapted leaves is quantised:", [f"'{p}'" for p in lora_nodes(adapters)]
        )
    found: dict[str, LoRA] = {}
    bad: list[str] = []

    def leaf(path: str, w: Any) -> Any:
        if path not in chosen:
            return w
        wrong = not_finite(path, w)
        # The SVD of what holds NaN may not end.
        if wrong:
            bad.extend(wrong)
            return w
        if path not in nodes:
            return quantize_leaf(w, chosen[path].geometry, format, double)
        q, found[path] = _fit(jnp.asarray(w), nodes[path], format, double, iterations)
        return q

    base = map_state(lambda tree: map_with_path(leaf, tree), params)
    raise_all(NOT_FINITE, bad, FINITE)
    return base, each(adapters, lambda path, node: found.get(path, node))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _fit(
    w: jax.Array, node: LoRA, format: str, double: bool, iterations: int
) -> tuple[Quantized, LoRA]:
    exact, g = w.astype(wide(w.dtype)), node.geometry

    def once(node: LoRA) -> tuple[Quantized, LoRA]:
        # Algorithm 1: Q = q(W − s·A·B), then s·A·B = the best of rank r of W − Q.
        rest = exact - node.weight(exact, "").delta(exact.dtype)
        q = quantized(rest, format, in_axes=g.in_axes, stack=stacked(g), double=double)
        # Set before it is read: a read is rounded to the leaf's own type, which is error, too.
        q = dataclasses.replace(q, stored_dtype=w.dtype)
        error = g.matrices(exact - q.value().astype(exact.dtype))
        return q, from_svd(node, *plain_svd(error), node.rank, node.scale)

    start = jax.tree.map(jnp.zeros_like, node)
    # The loop carries the adapters alone; Q is made anew from them, and kept in the last step.
    before = lax.fori_loop(0, iterations - 1, lambda _, node: once(node)[1], start)
    return once(before)
