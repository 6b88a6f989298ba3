"""Trees with quantised leaves: made leaf by leaf, read back, compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._config import LoRAConfig
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.geometry import Geometry
from lora_jax._core.nnx import map_state, state_of
from lora_jax._core.numbers import check_flags
from lora_jax._core.paths import flatten, map_with_path
from lora_jax._core.placement import away, check_there, near
from lora_jax._quantized.make import check_format, in_codes, unstorable
from lora_jax._quantized.waiting import check_codes
from lora_jax._quantized.weight import Quantized, is_quantized
from lora_jax._select import select
from lora_jax._survey import Survey
from lora_jax._targets import Targets

NOT_FINITE = "these leaves cannot be quantised; of NaN or infinity a block would take on the value:"


FINITE = (
    "expected finite numbers (in fp32). The checkpoint that they come from is damaged, or of a run "
    "that diverged: take another one, or leave these leaves out of the targets"
)


def quantize(
    params: Any,
    targets: Any,
    format: str = "nf4",
    *,
    survey: Survey | None = None,
    double: bool = False,
    load: Callable[[str], Any] | None = None,
) -> Any:
    """The parameters with leaves in few bits (QLoRA, arXiv:2305.14314), for what `adapt` makes.

    A quantised leaf is frozen, adapted or not; it is read where it is used, one layer at a time, in
    the forward pass and again in the backward one. A scanned stack is read layer by layer.

    Args:
      params: the parameters; leaves are quantised one after the other. Under jit or
        `jax.eval_shape`, abstract: nothing can be refused there for its values, so the constant of
        a block that holds NaN or infinity is NaN, and the whole block is read as NaN (with
        `double`, all of a leaf, or of a stack's layer, whose blocks share a mean).
      targets: which leaves: patterns as those of `LoRAConfig`, such as "all-linear", or `Targets`,
        as `select` returns them, of which the adapted leaves are meant.
      format: "nf4" (4 bits, the quantiles of a normal distribution), "int4" (symmetric), "mxfp4",
        in blocks of 64, 64 and 32 along the last axis; "nvfp4" (E2M1 in blocks of 16, each with a
        constant in E4M3, and one fp32 number for each weight of a stack); "int8", "fp8" (e4m3),
        with a constant for each output unit; "int8_block", "fp8_block", in blocks of 64.
      survey: how the function uses each leaf, as in `select`.
      double: quantise the constants of blocks as well, in groups of 256: 4.5 bits become 4.127.
      load: reads a leaf by its path, where `params` are shapes: the model is never there whole.

    Returns:
      A tree like `params`, with a `Quantized` for each target.

    Raises:
      LoRAError: an unknown format; targets as in `select`; leaves of less than two axes; NaN or
        infinity in a leaf (outside jit), with the index of the first.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> params = {"q": {"kernel": jnp.eye(64)}, "norm": jnp.ones(64)}
    >>> lora.quant.quantize(params, "kernel", double=True)["q"]["kernel"]
    Quantized((64, 64), float32, 'nf4', 4.516 bits)
    """
    chosen = chosen_leaves(params, targets, format, survey, double)
    if load is not None and not callable(load):
        raise LoRAError(f"load={load!r}: expected a function of a path, load=lambda path: ...")
    bad: list[str] = []

    def loaded(path: str, like: Any, w: Any) -> Any:
        found, want = (getattr(x, "shape", None) for x in (w, like))
        if found != want:
            bad.append(f"'{path}': load gives {type(w).__name__} {found}, expected an array {want}")
        return w

    def leaf(path: str, w: Any) -> Any:
        # One leaf at a time: only its codes stay.
        w = w if load is None else loaded(path, w, load(path))
        if path not in chosen:
            return w
        if wrong := not_finite(path, w):
            bad.extend(wrong)
            return w
        return quantize_leaf(w, chosen[path].geometry, format, double)

    result = map_state(lambda tree: map_with_path(leaf, tree), params)
    raise_all(NOT_FINITE, bad, FINITE)
    return result


def chosen_leaves(
    params: Any, targets: Any, format: str, survey: Survey | None, double: bool = False
) -> Targets:
    """The leaves to be quantised, checked."""
    wrong = check_format(format, "format")
    if wrong:
        raise LoRAError(wrong)
    check_flags("double=True", double=double)
    chosen = targets
    if not isinstance(targets, Targets):
        # The rank is of no account: only which leaves, and which of their axes are contracted.
        chosen = select(params, LoRAConfig(rank=1, targets=targets), survey)
    leaves = {p: x for p, x in flatten(state_of(params)).items() if p in chosen}
    done = [p for p, x in leaves.items() if is_quantized(x)]
    raise_all("these leaves are quantised already:", (f"'{p}'" for p in done))
    check_there(leaves)
    return chosen


def not_finite(path: str, w: Any) -> list[str]:
    """Why a leaf cannot be quantised; of a traced one the values are not known."""
    if not isinstance(w, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return [f"'{path}' is a {type(w).__name__}: expected an array"]
    if wrong := unstorable(w):
        return [f"'{path}' {wrong}"]
    if isinstance(w, jax.ShapeDtypeStruct):
        return [f"'{path}' is a shape without numbers: give load=, or call it by jax.eval_shape"]
    if isinstance(w, jax.core.Tracer):
        return []
    # A constant of a jitted function has values.
    with jax.ensure_compile_time_eval():
        w = near(jnp.asarray(w))
        if bool(_all_finite(w)):
            return []
        # One axis at a time: a flat index would gather a sharded leaf.
        index: list[int] = []
        rest = w
        while rest.ndim:
            wrong = ~jnp.isfinite(rest.astype(jnp.float32)).all(tuple(range(1, rest.ndim)))
            index.append(int(jnp.argmax(wrong)))
            rest = rest[index[-1]]
        return [f"'{path}': {rest} at index {tuple(index)} of {w.shape} {w.dtype}"]


@jax.jit
def _all_finite(w: jax.Array) -> jax.Array:
    # In fp32, as constants of blocks are: a larger fp64 is infinite there.
    return jnp.isfinite(w.astype(jnp.float32)).all()


def stacked(g: Geometry) -> int:
    """How many leading axes are a stack of weights."""
    # Only a stack that lies in front can be sliced in its codes, layer by layer.
    return len(g.batch_axes) if g.batch_axes == tuple(range(len(g.batch_axes))) else 0


def quantize_leaf(w: Any, g: Geometry, format: str, double: bool) -> Quantized:
    how = dict(in_axes=g.in_axes, stack=stacked(g), double=double)
    return away(in_codes(near(jnp.asarray(w)), format, **how), w)


def dequantize(params: Any) -> Any:
    """The parameters with each quantised leaf as an array, in the type that it had.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> params = {"q": jnp.eye(64)}
    >>> bool((lora.quant.dequantize(lora.quant.quantize(params, "q"))["q"] == params["q"]).all())
    True
    """
    leaves = flatten(state_of(params))
    check_codes(leaves)
    shapes = [
        p
        for p, x in leaves.items()
        if is_quantized(x) and isinstance(x.codes, jax.ShapeDtypeStruct)
    ]
    raise_all("these leaves are shapes, without codes to read:", (f"'{p}'" for p in shapes))
    check_there(leaves)
    # Jitted, so that the codes' steps to numbers are fused and none of them is an array.
    read = jax.jit(lambda q: q.value())
    leaf = lambda _, x: away(read(near(x)), x) if is_quantized(x) else x
    return map_state(lambda tree: map_with_path(leaf, tree), params)


def errors(params: Any, other: Any) -> dict[str, float]:
    """{path: ‖W − W'‖ / ‖W‖} of each leaf that is quantised in either of two trees; 0 of equal
    ones, also of zeros.

    >>> import jax, lora_jax as lora
    >>> params = {"q": jax.random.normal(jax.random.key(0), (256, 256))}
    >>> round(lora.quant.errors(params, lora.quant.quantize(params, "q"))["q"], 3)
    0.092
    """
    one, two = (flatten(state_of(x)) for x in (params, other))
    check_codes(one)
    check_codes(two)
    failures = [f"'{p}' is in one tree alone" for p in sorted(one.keys() ^ two.keys())]
    both = [p for p in one if p in two and (is_quantized(one[p]) or is_quantized(two[p]))]
    for p in both:
        pair = [getattr(x, "shape", type(x).__name__) for x in (one[p], two[p])]
        if pair[0] != pair[1]:
            failures.append(f"'{p}' is {pair[0]} in one and {pair[1]} in the other")
        elif any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((one[p], two[p]))):
            failures.append(f"'{p}' is a shape without numbers")
    raise_all("these are not the parameters of one model:", failures)
    return {p: float(_error(one[p], two[p])) for p in both}


@jax.jit
def _error(one: Any, two: Any) -> jax.Array:
    one, two = (x.value() if is_quantized(x) else jnp.asarray(x) for x in (one, two))
    one, two = one.astype(jnp.float32), two.astype(jnp.float32)
    size, lost = (jnp.linalg.norm(x.ravel()) for x in (one, one - two))
    # Not 0 / 0; NaN stays NaN.
    return lost / jnp.where(lost == 0, 1, size)
