"""A base model from torch's tensors: each leaf of a Flax model filled, one at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding

from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.geometry import Geometry
from lora_jax._core.nnx import map_state
from lora_jax._core.paths import map_with_path
from lora_jax._quantized.formats import FORMATS
from lora_jax._quantized.weight import Quantized
from lora_jax._survey import Survey
from lora_jax._targets import Targets
from lora_jax.peft._arguments import as_float, one_of
from lora_jax.peft._file import empty
from lora_jax.peft._hub import folder as folder_of
from lora_jax.peft._mapping import TorchMapping
from lora_jax.peft._place import Piece, Placed, is_float, placed
from lora_jax.peft._safetensors import open_base
from lora_jax.quant._quantize import (
    FINITE,
    NOT_FINITE,
    chosen_leaves,
    not_finite,
    quantize_leaf,
    stacked,
)

# Rows of a transposed matrix that are copied together.
STRIP = 64


def load_base(
    folder: str | os.PathLike,
    params: Any,
    survey: Survey | Targets | None = None,
    *,
    mapping: Mapping[str, Any] | TorchMapping | None = None,
    dtype: Any = None,
    quantize: str | Mapping[str, Any] | None = None,
    conv1d: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
) -> Any:
    """Reads the weights of a torch model, such as a Hugging Face folder, into a Flax model's tree.

    Every tensor of the folder that `ignore` does not name is used, and every leaf filled, or the
    call fails and lists what is left on either side. Leaves are made one after the other, each
    straight in its type and with its sharding: beside the result there is never more than one
    tensor, or one leaf where it is sharded.

    Args:
      folder: with model.safetensors, or several such files and their index; one such file; or a
        name on the Hugging Face hub, "user/name" (needs the extra `hub`). fp32, fp16 or bf16.
      params: shapes, as of `jax.eval_shape`, `nnx.eval_shape` or arrays, whose values are not read.
        A `jax.ShapeDtypeStruct` with a sharding says where the leaf is to lie. Leaves that are not
        floating-point stay as they are.
      survey: how the function uses each leaf, or the `Targets` made of it, as in `lora.peft.load`.
        Needed for stacks, heads, convolutions, experts, and to know that a head is tied.
      mapping: as in `lora.peft.load`: {torch name, or regular expression: leaf, leaves, or part of
        a leaf}. What it does not name is found by names and shapes. Experts of which torch has one
        module each are the positions of a stack; in a stack of stacks the first number in a name is
        of the outer axis.
      dtype: of all leaves; None for that of each in `params`.
      quantize: a format such as "nf4", for all linear leaves; or the arguments of
        `lora.quant.quantize` by name: {"targets": ..., "format": ..., "double": ...}. A stack is
        quantised layer by layer.
      conv1d: modules whose square weight is stored (in, out); None: as the biases of the others
        say, see `lora.peft.load`.
      ignore: regular expressions for the names of tensors to leave out, such as buffers.
      rename: {regular expression: text} to be replaced in the names of the tensors, one after the
        other, so that they are like the leaves'.
      revision, subfolder: of a name on the hub.

    Returns:
      A tree, or module, like `params` with arrays in it. A base that is tied (config.json) also
      fills the head of a model that is not.

    Raises:
      LoRAError: a file that is missing, damaged, or of other types; tensors or leaves that are left
        over, or that fit in several ways; an untied base for a tied model.

    >>> import jax, jax.numpy as jnp, lora_jax as lora, numpy as np, pathlib, tempfile
    >>> from safetensors.numpy import save_file
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> tensors = {f"model.layers.{i}.q.weight": np.full((3, 4), i, "f4") for i in range(2)}
    >>> save_file(tensors, folder / "model.safetensors")
    >>> params = {"layers": {"q": {"kernel": jax.ShapeDtypeStruct((2, 4, 3), "bfloat16")}}}
    >>> fn = lambda p, x: jax.lax.scan(lambda x, w: (x, x @ w), x, p["layers"]["q"]["kernel"])
    >>> survey = lora.survey(fn, params, jnp.ones((1, 4), "bfloat16"))
    >>> kernel = lora.peft.load_base(folder, params, survey)["layers"]["q"]["kernel"]
    >>> kernel.shape, str(kernel.dtype), kernel[:, 0, 0].tolist()
    ((2, 4, 3), 'bfloat16', [0.0, 1.0])
    """
    base = open_base(folder_of(folder, revision, subfolder))
    found = placed(
        base, params, survey, mapping=mapping, conv1d=conv1d, ignore=ignore, rename=rename
    )
    kind = as_float(dtype)
    chosen, how = _to_quantise(params, quantize, survey)
    bad: list[str] = []
    # For a tensor that is turned over into its leaf; what is not used of it takes no memory.
    room = np.empty(max((t.nbytes for t in base.tensors.values()), default=0), np.uint8)

    def leaf(path: str, like: Any) -> Any:
        if not is_float(like):
            return like
        to = kind or np.dtype(like.dtype)
        if path not in chosen:
            return _put(_read(found, path, like.shape, to, room), _sharding(like))
        q = _quantised(found, path, like.shape, to, room, chosen[path].geometry, how, bad)
        where = _sharding(like)
        if not isinstance(where, NamedSharding):
            return q
        # The codes and their constants, each cut as the weight would be.
        at = lambda x, spec: _put(np.asarray(x), NamedSharding(where.mesh, spec))
        return jax.tree.map(at, q, q.specs(where.spec, where.mesh))

    result = map_state(lambda tree: map_with_path(leaf, tree), params)
    raise_all(NOT_FINITE, bad, FINITE)
    return result


def _to_quantise(
    params: Any, how: str | Mapping[str, Any] | None, survey: Survey | Targets | None
) -> tuple[Mapping[str, Any] | Targets, dict[str, Any]]:
    """(the leaves to be quantised, {"format", "double"})."""
    if how is None:
        return {}, {}
    given = dict(how) if isinstance(how, Mapping) else {"format": how}
    one_of(given.get("format", "nf4"), FORMATS, "quantize: format")
    if unknown := given.keys() - {"targets", "format", "double"}:
        raise LoRAError(
            f"quantize: {', '.join(map(repr, sorted(map(str, unknown))))} is none of its settings: "
            "quantize={'targets': 'all-linear', 'format': 'nf4', 'double': True}"
        )
    settings = {"format": given.get("format", "nf4"), "double": bool(given.get("double", False))}
    surveyed = survey if isinstance(survey, Survey) else None
    targets = given.get("targets", "all-linear")
    return chosen_leaves(params, targets, settings["format"], surveyed), settings


def _quantised(
    found: Placed,
    path: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    room: np.ndarray,
    geometry: Geometry,
    how: Mapping[str, Any],
    bad: list[str],
) -> Quantized:
    """A leaf in few bits; a stack, of which each tensor is one position, layer by layer."""
    # One layer in full at a time, where each has a tensor of its own.
    apart = stacked(geometry) and all(isinstance(p.block.index[0], int) for p in found.pieces[path])
    parts = []
    for i in range(shape[0]) if apart else [None]:
        w = jax.device_put(_read(found, path, shape, dtype, room, i))
        bad.extend(not_finite(path, w))
        parts.append(quantize_leaf(w, geometry, how["format"], how["double"]))
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def _read(
    found: Placed,
    path: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    room: np.ndarray,
    at: int | None = None,
) -> np.ndarray:
    """A leaf, or the position `at` of its first axis, from its tensors, one after the other."""
    pieces = [p for p in found.pieces[path] if at is None or p.block.index[0] == at]
    if len(pieces) == 1 and pieces[0].entry.layout != "out_in":
        value = pieces[0].value()
        # The tensor itself, which JAX takes without a copy on a CPU.
        if value.dtype == dtype and value.flags.c_contiguous:
            return value
    out = empty(shape if at is None else (1, *shape[1:]), dtype)
    for p in pieces:
        value = p.value(room)
        first = p.block.slices[0] if out.ndim and at is None else slice(None)
        # Infinity is looked for below.
        with np.errstate(over="ignore"):
            _copy(out[(first, *p.block.slices[1:])] if out.ndim else out, value)
    _check_range(path, pieces, out)
    return out


def _copy(out: np.ndarray, value: np.ndarray) -> None:
    """`out[...] = value`; of a transposed matrix a strip at a time, as each row of `out` would else
    be gathered from all over memory."""
    # The stride of an axis of one position says nothing.
    sizes = [s * (n > 1) for s, n in zip(value.strides, value.shape)]
    axis = int(np.argmax(sizes)) if sizes else 0
    inner = int(np.prod(value.shape[axis + 1 :], initial=1))
    # In the order of the rows already.
    if not sizes or axis == next((d for d, n in enumerate(value.shape) if n > 1), axis):
        out[...] = value
        return
    step = max(1, STRIP // inner)
    for start in range(0, value.shape[axis], step):
        at = (slice(None),) * axis + (slice(start, start + step),)
        same = out.dtype == value.dtype
        # A cast is fast along rows alone.
        out[at] = value[at] if same else np.ascontiguousarray(value[at])


def _check_range(path: str, pieces: Sequence[Piece], out: np.ndarray) -> None:
    """Nothing of a larger type is beyond the leaf's."""
    most = float(jnp.finfo(out.dtype).max)
    # Only what was rounded can have left the range: else no number is looked at.
    wide = [p for p in pieces if float(jnp.finfo(p.tensor.dtype).max) > most]
    if wide and not np.isfinite(out).all():
        raise LoRAError(
            f"'{path}' {out.dtype}: '{wide[0].entry.name}' ({wide[0].tensor.type}) holds a number "
            f"that {out.dtype} does not, or one that is not finite: dtype='float32'"
        )


def _sharding(like: Any) -> Sharding | None:
    """Where a leaf is to lie; None for anywhere."""
    found = getattr(like, "sharding", None)
    # An array that was never placed lies where JAX put it, and asks for nothing.
    return None if isinstance(like, jax.Array) and not like.committed else found


def _put(value: np.ndarray, sharding: Sharding | None) -> jax.Array:
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    # Over several processes each one gives its own part.
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
