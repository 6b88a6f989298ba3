"""Merging adapters into plain parameters, and taking them out again."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._bind import adapter_nodes
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.nnx import map_state, state_of
from lora_jax._core.numbers import check_flags
from lora_jax._core.paths import flatten, map_with_path
from lora_jax._core.placement import away, near
from lora_jax._nodes.factors import without_frozen
from lora_jax._nodes.node import Node
from lora_jax._nodes.stored import layout
from lora_jax._nodes.weight import is_weight
from lora_jax._quantized.make import check_format, in_codes, unstorable
from lora_jax._quantized.waiting import value
from lora_jax._quantized.weight import is_quantized


def merge(
    params: Any, adapters: Any, *, donate: bool = False, requantize: bool | str = False
) -> Any:
    """W + scale·A·B (arXiv:2106.09685, section 4.1), and what other nodes make of W, as plain
    parameters for the plain model.

    The update is accumulated in fp32 (or wider) and rounded once. The base is not changed, so going
    back is exact: keep it. Leaves are merged one at a time, so that beyond the result the peak
    memory is that of one leaf. A leaf in a host's memory (`pinned_host`) is merged on the devices,
    and its result is on the host again.

    Args:
      params: the base parameters.
      adapters: the adapters.
      donate: let each adapted leaf of `params` give its memory to the merged one. `params` cannot
        be used afterwards.
      requantize: store each quantised leaf with an update in its format again, and leave those
        without an adapter in their codes. It rounds a second time, and an update smaller than the
        codes' distance is lost: `lora.quant.errors(lora.merge(params, adapters), requantised)` says
        how much, leaf by leaf. A format, such as "nf4": store each leaf with an update in that,
        arrays and codes of other formats too; of adapters that were trained by `adapt(fn,
        merge_aware="nf4")` that is the function that was trained, to one rounding. What was trained
        in full or by rows is an array either way, and not rounded.

    Returns:
      A tree of the same structure, types, shapes, dtypes, boxes and shardings. Leaves without an
      adapter are the same arrays; those that are quantised become arrays, adapted or not, unless
      `requantize` is set.

    Raises:
      LoRAError: as `bind`; or a merged leaf is not finite (all of them are listed). Under jit the
        values are not known, and only the first is checked. With `requantize`, an unknown
        format; True, and a leaf in a format that is only read, as those of GGUF files; a format,
        and a leaf with an update that is no matrix of floats.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.zeros((2, 2))}
    >>> node = lora.LoRA(jnp.ones((2, 1)), jnp.ones((1, 2)), 0.5, lora.Geometry((0,), (1,)))
    >>> lora.merge(params, {"w": node})["w"]
    Array([[0.5, 0.5],
           [0.5, 0.5]], dtype=float32)
    """
    return _each(params, adapters, "merge", 1.0, donate, requantize)


def unmerge(params: Any, adapters: Any, *, donate: bool = False) -> Any:
    """W' − scale·A·B: the base of parameters that someone else merged.

    Exact up to the rounding of the merge; the result of `merge` need not be undone, as the base is
    still there.

    Args:
      params: merged parameters.
      adapters: the adapters that were merged.
      donate: as in `merge`.

    Raises:
      LoRAError: as `merge`; or the adapters hold leaves that were trained in full or by rows, or
        scaled (DoRA), the original values of which are lost.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> node = lora.LoRA(jnp.ones((2, 1)), jnp.ones((1, 2)), 0.5, lora.Geometry((0,), (1,)))
    >>> params, adapters = {"w": jnp.eye(2)}, {"w": node}
    >>> bool((lora.unmerge(lora.merge(params, adapters), adapters)["w"] == params["w"]).all())
    True
    """
    return _each(params, adapters, "unmerge", -1.0, donate)


def _each(
    params: Any, adapters: Any, verb: str, sign: float, donate: bool, requantize: bool | str = False
) -> Any:
    check_flags(f"lora.{verb}(params, adapters, donate=True)", donate=donate)
    nodes = without_frozen(adapter_nodes(params, adapters, verb), verb)
    if sign < 0:
        raise_all(
            "cannot unmerge leaves whose base values are lost:",
            (f"'{p}' was {n.lost}" for p, n in nodes.items() if n.lost is not None),
            "keep the base parameters, or take these leaves from them",
        )
    if isinstance(requantize, np.bool_):
        requantize = bool(requantize)
    stored = _stored(params, nodes, requantize) if requantize is not False else {}
    bad: list[str] = []

    def leaf(path: str, base: Any) -> Any:
        if path not in nodes:
            read = is_quantized(base) and not requantize
            return away(_value(near(base)), base) if read else base
        merged, finite = _merged(base, nodes[path], sign, donate)
        if path in stored and jnp.finfo(merged.dtype).bits > 32:
            finite = jnp.isfinite(merged.astype(jnp.float32)).all()  # as constants of codes are
        # `not finite` waits for the device, so that only one leaf is in work at a time.
        if not isinstance(finite, jax.core.Tracer) and not finite:
            bad.append(f"'{path}' {tuple(base.shape)} holds NaN or infinity after merging")
        if path not in stored:
            return merged
        return away(in_codes(near(jnp.asarray(merged)), **stored[path]), base)

    out = map_state(lambda tree: map_with_path(leaf, tree), params)
    raise_all(
        f"refusing to {verb} non-finite values:",
        bad,
        "look at the leaf's base and adapter; nothing was changed" if not donate else "",
    )
    return out


def _merged(base: Any, node: Node, sign: float, donate: bool) -> tuple[Any, Any]:
    if isinstance(base, jax.ShapeDtypeStruct):
        raise LoRAError(
            "cannot merge abstract parameters; wrap the call: "
            "jax.eval_shape(lora.merge, params, adapters)"
        )
    # A traced value can be neither donated nor placed; its memory space is kept.
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((base, node))):
        merged, finite = _merge_leaf(sign, *near((base, node)))
        return away(merged, base), finite
    if is_quantized(base):
        # Codes are not donated: they are too small to hold what is merged.
        merged, finite = _jitted(sign, False)(*near((base, node)))
        return away(merged, base), finite
    copy, node = near((base, node))
    # A copy from the host is nobody else's: it always gives its memory.
    merged, finite = _jitted(sign, donate or copy is not base)(copy, node)
    if copy is not base and donate:
        # Only its copy on the device was donated.
        base.delete()
    if isinstance(base, np.ndarray):
        return np.asarray(merged), finite
    return jax.device_put(merged, base.sharding), finite  # no copy where it is there already


# Jitted: op by op, each step of the decoding would be an array of the size of W.
_value = jax.jit(value)


def _stored(
    params: Any, nodes: Mapping[str, Node], requantize: bool | str
) -> dict[str, dict[str, Any]]:
    """{path: what `in_codes` has to know} of the leaves that are stored in codes."""
    wrong = None if requantize is True else check_format(requantize, "requantize")
    if wrong:
        raise LoRAError(f"{wrong}, True (each in its own) or False")
    leaves = flatten(state_of(params))
    # in shapes alone; what is trained in full or by rows is no update of the leaf by factors
    weight = lambda p, n: jax.eval_shape(lambda base, n: n.weight(base, ""), leaves[p], n)
    found = {p: weight(p, n) for p, n in nodes.items()}
    of = {p: w for p, w in found.items() if is_weight(w) and w.rows is None}
    if isinstance(requantize, str):
        bad = {p: unstorable(w) for p, w in of.items()}
        title, fix = f"these leaves cannot be stored in {requantize!r}:", ""
        formats = dict.fromkeys(of, requantize)
    else:
        of = {p: w for p, w in of.items() if is_quantized(w.base)}
        why = lambda w: unstorable(w) if w.base.storable else f"is a {w.base}, which is only read"
        bad = {p: why(w) for p, w in of.items()}
        title, fix = "these leaves cannot be stored as they were:", ", requantize='nf4'"
        formats = {p: w.base.format for p, w in of.items()}
    raise_all(
        title, (f"'{p}' {x}" for p, x in bad.items() if x), f"lora.merge(params, adapters{fix})"
    )
    return {p: dict(format=formats[p], **layout(w, formats[p])) for p, w in of.items()}


@functools.lru_cache(maxsize=4)
def _jitted(sign: float, donate: bool):
    """One function for all leaves: JAX compiles it once for each shape, dtype and sharding."""
    return jax.jit(functools.partial(_merge_leaf, sign), donate_argnums=0 if donate else ())


def _merge_leaf(sign: float, base: Any, node: Node) -> tuple[jax.Array, jax.Array]:
    merged = node.merged(base, sign)
    return merged, jnp.isfinite(merged).all()
