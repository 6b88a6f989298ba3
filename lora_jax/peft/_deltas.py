"""An update ΔW of a type of PEFT's that is no LoRA, from its tensors.

Sizes are checked before anything is computed; ΔW is in float64, so that what is cut off is a choice
of the caller's and not of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.numbers import COUNT, SHARE, refused
from lora_jax.peft._config import PeftConfig
from lora_jax.peft._file import AdapterFile
from lora_jax.peft._form import Misfit, Place
from lora_jax.peft._forms import FORMS
from lora_jax.peft._parts import Delta, Update

MERGE_OR_LOAD = (
    "its updates are brought to a LoRA by lora.peft.load(..., rank=) and written as one by "
    "lora.peft.save; or merge it in PEFT (merge_and_unload)"
)


def delta(module: str, keys: Mapping[str, str], file: AdapterFile, config: PeftConfig) -> Delta:
    """The update of one module, its tensors checked by their shapes alone.

    Raises:
      Misfit: they are not those of one module of this type.
    """
    form = FORMS[config.kind]
    shapes = {name: file.shape(key) for name, key in keys.items()}
    n_out, n_in, rank = form.sizes(shapes, config, module)
    kind = "embedding" if any("_embedding_" in name for name in keys) else "linear"
    if rank and (problem := config.other_rank(module, rank)):
        raise Misfit(problem)
    first = next(iter(keys.values()))
    update = Update(f"{module}.weight", kind, rank, n_in, n_out, 1, 1.0, first, "", flat=True)
    return Delta(update, config.kind, module, keys)


def matrix(
    what: Delta, found: Update, file: AdapterFile, config: PeftConfig, weight: np.ndarray | None
) -> np.ndarray:
    """ΔW (out, in) in float64, where `found` has the sizes of the leaf, and `weight` is the base's
    (out, in) for types that need it.

    Raises:
      Misfit: the tensors do not fit the leaf.
    """
    arrays = {}
    for name, key in what.keys.items():
        value = file.read(key)
        # Places stay integers.
        arrays[name] = value if value.dtype.kind == "i" else value.astype(np.float64)
    # Without factors there is no rank in the tensors: PEFT scales by that of the settings.
    rank = what.update.rank or config.rank_of(what.module)
    place = Place(what.module, found.n_out, found.n_in, config, rank, weight)
    with np.errstate(over="ignore", invalid="ignore"):
        out = FORMS[what.kind].update(arrays, place)
    # Also of NaN, with which no comparison holds.
    if not (np.abs(out) <= np.finfo(np.float32).max).all():
        raise Misfit("its update is not finite in float32")
    return out


def needs_base(config: PeftConfig) -> bool:
    """Whether the updates of an adapter of this type depend on the weights."""
    return FORMS[config.kind].base or config.own.get("init_weights") == "bat"


def check(rank: int | None, energy: float | None, where: object, kind: str) -> None:
    """One of the two is given where it is needed, and neither where nothing is cut off."""
    call = f"{where}: lora.peft.load(..., rank=16), or energy=0.99"
    if kind in FORMS and (rank is None) == (energy is None):
        raise LoRAError(
            f"{call}: a {kind} adapter is an update that is brought to a LoRA by its singular "
            "values; say of which rank, or which share of ‖ΔW‖² is to be kept"
        )
    if kind not in FORMS and (rank is not None or energy is not None):
        raise LoRAError(
            f"{where}: rank and energy are for types that are no LoRA; this one is: "
            "lora.algebra.resize(adapters, rank)"
        )
    raise_all(call, refused(rank=(rank, COUNT.or_none), energy=(energy, SHARE.or_none)))
