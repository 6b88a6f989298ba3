"""From updates ΔW on their leaves to low-rank updates, as `Build` takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax._core.errors import LoRAError, raise_all
from lora_jax.peft._blocks import from_leaf
from lora_jax.peft._config import PeftConfig
from lora_jax.peft._deltas import matrix, needs_base
from lora_jax.peft._file import AdapterFile
from lora_jax.peft._find import Finder
from lora_jax.peft._form import Misfit
from lora_jax.peft._mapping import BIASES, Entry, has_values
from lora_jax.peft._parts import Delta, Update, Value


def reduced(
    file: AdapterFile,
    config: PeftConfig,
    found: Sequence[tuple[tuple[Entry, Update], Delta]],
    finder: Finder,
    values: Mapping[str, Any],
    rank: int | None,
    energy: float | None,
) -> tuple[AdapterFile, list[tuple[Entry, Any]], dict[str, float]]:
    """Each update as the LoRA of its largest singular values.

    Args:
      found: what `Finder.update` gave for each update, and the update.
      rank, energy: of each: at most so many, or as many as keep this share of its squares.

    Returns:
      (the file with the factors in it, [(entry, what falls on its leaves)], {name: share kept}).

    Raises:
      LoRAError: an update that does not fit its leaf, or is not finite; a weight that is abstract.
    """
    made: dict[str, np.ndarray] = {}
    out: list[tuple[Entry, Any]] = []
    shares: dict[str, float] = {}
    failures: list[str] = []
    for (entry, update), what in found:
        # On a tied head the leaf has the update turned; ΔW is torch's.
        torch = update.turned() if update.swapped else update
        try:
            weight = _weight(entry, update, values) if needs_base(config) else None
            a, b, shares[entry.name] = low_rank(
                matrix(what, torch, file, config, weight), rank, energy
            )
        except (Misfit, LoRAError, np.linalg.LinAlgError) as e:
            lost = "its update cannot be computed: " * isinstance(e, np.linalg.LinAlgError)
            failures.append(f"'{what.module}': {lost}{e}")
            continue
        keys = f"{what.module}.lora_A", f"{what.module}.lora_B"
        made |= {keys[0]: a, keys[1]: b}
        low = dataclasses.replace(torch, rank=len(a), a=keys[0], b=keys[1])
        out.append((entry, low.turned() if update.swapped else low))
        if config.kind == "IA3" and not config.scales_inputs(what.module):
            out += _bias(what, entry, file, finder, values, made)
    failures += finder.failures
    raise_all(f"{file.folder}: cannot be used with these parameters:", failures)
    return dataclasses.replace(file, tensors={**file.tensors, **made}), out, shares


def low_rank(
    update: np.ndarray, rank: int | None, energy: float | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """The best A (r, in) and B (out, r) of an update (out, in), and the share of ‖ΔW‖² they keep.

    >>> a, b, kept = low_rank(np.diag([3.0, 1.0, 0.0])[:2], 1, None)
    >>> a.shape, b.shape, kept
    ((1, 3), (2, 1), 0.9)
    """
    u, s, v = _svd(update)
    # Relative to the largest, as the square of a small one may be 0.
    squares = (s / (s[0] or 1.0)) ** 2
    share = np.cumsum(squares) / (np.sum(squares) or 1.0)
    # 1 is what float64 holds of it.
    if energy is not None:
        enough = share >= min(energy * share[-1], 1 - 1e-14)
        rank = int(np.argmax(enough)) + 1 if share[-1] else 1
    keep = min(rank or 1, len(s))
    # Half of σ to each, so that both factors keep their digits in fewer bits.
    root = np.sqrt(s[:keep])
    kept = float(share[keep - 1]) if share[-1] else 1.0
    with np.errstate(over="ignore"):
        a = (root[:, None] * v[:keep]).astype(np.float32)
        b = (u[:, :keep] * root).astype(np.float32)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise Misfit("its update is not finite in float32")
    return a, b, round(kept, 9)


def _svd(update: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """LAPACK's; of a large matrix of low rank, as most types make, in the space of its columns.

    A few random combinations of the columns span it, or what they leave is not nothing (Halko,
    Martinsson and Tropp, arXiv:0909.4061, section 4.1).
    """
    norm = np.linalg.norm(update)
    for width in (64, 256):
        # Not worth it where the small matrix is no smaller.
        if width > min(update.shape) // 4:
            break
        random = np.random.default_rng(0).standard_normal((update.shape[1], width))
        # q (out, width) spans the columns, small (width, in) is the update in it.
        q, _ = np.linalg.qr(update @ random)
        small = q.T @ update
        if np.linalg.norm(update - q @ small) <= 1e-13 * norm:
            u, s, v = np.linalg.svd(small, full_matrices=False)
            return q @ u, s, v
    u, s, v = np.linalg.svd(update, full_matrices=False)
    return u, s, v


def _weight(entry: Entry, update: Update, values: Mapping[str, Any]) -> np.ndarray:
    """The base's weight (out, in) in float64, as torch has it."""
    pieces = [_read(b.leaf.path, values)[b.slices] for b in entry.blocks]
    shape = (sum(b.n_out for b in entry.blocks), entry.blocks[0].n_in)
    value = from_leaf(pieces, "out_in", entry.blocks, shape)
    return value.T if update.swapped else value


def _read(path: str, values: Mapping[str, Any]) -> np.ndarray:
    value = values[path]
    if not has_values(value):
        raise LoRAError(
            f"'{path}': the update depends on the weight; pass values: "
            "lora.peft.load(..., base=params)"
        )
    return np.asarray(value).astype(np.float64)


def _bias(
    what: Delta,
    entry: Entry,
    file: AdapterFile,
    finder: Finder,
    values: Mapping[str, Any],
    made: dict[str, np.ndarray],
) -> list[tuple[Entry, Any]]:
    """IA3 scales outputs, so the bias, too, where there is one."""
    # Flax has the bias beside the kernel.
    beside = [
        [f"{b.leaf.path.rpartition('/')[0]}/{n}".lstrip("/") for n in BIASES] for b in entry.blocks
    ]
    if not any(path in finder.leaves for paths in beside for path in paths):
        return []
    (key,) = what.keys.values()
    scale = file.read(key).astype(np.float64).reshape(-1)
    name, shape = f"{what.module}.bias", scale.shape
    bias = finder.value(name, shape)
    if bias is None:
        return []
    old = np.concatenate([_read(b.leaf.path, values)[b.slices].reshape(-1) for b in bias.blocks])
    made[name] = (old * scale).astype(np.float32)
    return [(bias, Value(name, shape, name))]
