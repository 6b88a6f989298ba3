"""A base model back as torch's tensors: a Hugging Face folder with other weights in it."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.nnx import state_of
from lora_jax._core.paths import flatten
from lora_jax._survey import Survey
from lora_jax._targets import Targets
from lora_jax.peft._blocks import from_leaf
from lora_jax.peft._hub import folder as folder_of
from lora_jax.peft._mapping import Entry, TorchMapping, has_values
from lora_jax.peft._place import placed
from lora_jax.peft._safetensors import open_base, write_copy


def save_base(
    folder: str | os.PathLike,
    params: Any,
    survey: Survey | Targets | None = None,
    *,
    like: str | os.PathLike,
    mapping: Mapping[str, Any] | TorchMapping | None = None,
    conv1d: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
) -> None:
    """Writes parameters as the Hugging Face folder `like` with their values in it.

    What `lora.peft.load_base(like, params, survey)` reads is written back, in the same files, names
    and types; config.json, the tokenizer and all other files are copied. Each value is rounded once
    to the type of its tensor.

    Args:
      folder: a new folder, or a new file if `like` is one; it appears when it is complete, or not
        at all.
      params: the parameters of a plain model: merged (`lora.merge`), not quantised.
      like: the folder, file or name on the hub that the base was loaded from.
      survey, mapping, conv1d, rename, revision, subfolder: as in `lora.peft.load_base`.
      ignore: tensors that no leaf is; they are copied.

    Raises:
      LoRAError: `folder` is there already; tensors or leaves that are left over; leaves that are
        quantised or not finite; a head that differs from a table which `like` ties it to. Nothing
        is written then.

    >>> import jax, jax.numpy as jnp, lora_jax as lora, numpy as np, pathlib, tempfile
    >>> from safetensors.numpy import load_file, save_file
    >>> base, new = (pathlib.Path(tempfile.mkdtemp()) / name for name in ("base", "new"))
    >>> base.mkdir()
    >>> save_file({"model.q.weight": np.zeros((3, 4), "f2")}, base / "model.safetensors")
    >>> params = {"q": {"kernel": jnp.arange(12.0).reshape(4, 3)}}
    >>> lora.peft.save_base(new, params, like=base)
    >>> load_file(new / "model.safetensors")["model.q.weight"][0].tolist()
    [0.0, 3.0, 6.0, 9.0]
    """
    base = open_base(folder_of(like, revision, subfolder))
    found = placed(
        base, params, survey, mapping=mapping, conv1d=conv1d, ignore=ignore, rename=rename,
        call="lora.peft.save_base",
    )  # fmt: skip
    leaves = flatten(state_of(params))
    failures = [
        f"'{path}' is {type(leaves[path]).__name__}, expected an array: "
        "lora.peft.save_base(folder, lora.merge(lora.quant.dequantize(params), adapters), ...)"
        for path in found.pieces
        if not has_values(leaves[path])
    ]
    raise_all("these parameters cannot be written as a base:", failures)

    def value(entry: Entry) -> np.ndarray:
        """A tensor, in the leaf's type."""
        parts = [np.asarray(leaves[b.leaf.path][b.slices]) for b in entry.blocks]
        # Those of a base are known.
        assert entry.layout is not None and entry.shape is not None
        return from_leaf(parts, entry.layout, entry.blocks, entry.shape)

    # Such a base has one tensor for table and head: two that differ have no place in it.
    if found.tied is not None:
        head, table = found.tied
        if not np.array_equal(value(head), value(found.entries[table])):
            leaf = found.entries[table].blocks[0].leaf.path
            raise LoRAError(
                f"'{head.blocks[0].leaf.path}' differs from '{leaf}', and {base.path} stores one "
                "tensor for both (tie_word_embeddings in config.json); save it in transformers "
                "with tie_word_embeddings=False, and give that folder as `like`"
            )

    def changed(name: str, old: np.ndarray) -> np.ndarray:
        own = value(found.entries[name])
        # Infinity is looked for below.
        with np.errstate(over="ignore"):
            new = own.astype(base.tensors[name].dtype)
        if not np.isfinite(new).all():
            raise LoRAError(
                f"'{name}': the value of '{found.entries[name].blocks[0].leaf.path}' holds NaN, "
                f"infinity, or a number that {new.dtype} does not"
            )
        return new

    # Functions, so that each value is made when its bytes are due.
    write_copy(base, folder, {n: functools.partial(changed, n) for n in found.entries})
