"""What the figure of learned changes shows: a cell for each target and layer, and short names."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from lora_jax._core.fold import NUMBERED


@dataclasses.dataclass(frozen=True)
class Cell:
    """One target in one layer; `spectra` (m, k) of the weights in it, or None."""

    target: str
    layer: int | None
    size: float
    effective: float
    spectra: np.ndarray | None


def cells_of(path: str, change: Any, relative: bool) -> Iterable[Cell]:
    """One for each layer of a leaf."""
    target, layer = layer_of(path, bool(change.stack))
    if layer is not None or not change.stack or not change.stack[0]:
        groups = [(layer, slice(None))]
    else:
        # The n weights lie in C order, so those of one index of the first axis are adjacent.
        each = len(change.norm) // change.stack[0]
        groups = [(i, slice(i * each, (i + 1) * each)) for i in range(change.stack[0])]
    for layer, which in groups:
        size = np.linalg.norm(change.norm[which])
        if relative:
            base = None if change.base_norm is None else np.linalg.norm(change.base_norm[which])
            # As `Change.ratio`, for the weights of the cell together.
            size = np.nan if base is None else size / base if base else math.inf if size else 0.0
        s = change.singular_values[which] if change.kind == "lora" else None
        effective = np.nan if s is None or not len(s) else change.effective_rank[which].mean()
        yield Cell(target, layer, float(size), float(effective), s)


def layer_of(path: str, stacked: bool) -> tuple[str, int | None]:
    """The path without the number of its layer, and that number.

    The first numbered part counts that is a block: neither the leaf nor the module that holds it.
    Where there is none, a stack counts along its axis, and the rest by the first number of all.

    >>> layer_of("layers_3/attn/q_2/kernel", False), layer_of("layers/mlp/wi_0/kernel", True)
    (('layers_*/attn/q_2/kernel', 3), ('layers/mlp/wi_0/kernel', None))
    >>> layer_of("Dense_1/kernel", False), layer_of("head/kernel", False)
    (('Dense_*/kernel', 1), ('head/kernel', None))
    """
    parts = path.split("/")
    # In a stack the last two parts, module and leaf, are no layer: the axis is.
    for i in range(len(parts) - (2 if stacked else 0)):
        if (found := NUMBERED.fullmatch(parts[i])) is not None:
            name, number = found.groups()
            return "/".join([*parts[:i], f"{name}*", *parts[i + 1 :]]), int(number)
    return path, None


def short_names(targets: Sequence[str], in_layers: Collection[str]) -> list[str]:
    """The targets without the parts that those in layers share, that stand for the layer's number,
    and that most of them end with, as far as they still differ.

    >>> layered = ["model/layers/*/mlp/up/kernel", "model/layers/*/q/kernel"]
    >>> short_names([*layered, "head/bias"], layered)
    ['mlp/up', 'q', 'head/bias']
    >>> layered = ["encoder/h_*/q/kernel", "decoder/h_*/q/kernel"]
    >>> short_names(layered, layered)
    ['encoder/q', 'decoder/q']
    >>> short_names(["layers_*/kernel", "head/bias", "head/kernel"], ["layers_*/kernel"])
    ['kernel', 'head/bias', 'head/kernel']
    """
    # The leaf's own name is never cut from the front.
    alike = [t.split("/")[:-1] for t in in_layers or targets]
    shared = 0
    while all(len(p) > shared for p in alike) and len({p[shared] for p in alike}) == 1:
        shared += 1
    cut = lambda t: t.split("/", shared)[-1] if t in in_layers or not in_layers else t
    names = _distinct([cut(t) for t in targets], targets)
    plain = lambda n: "/".join(p for p in n.split("/") if not p.endswith("*"))
    bare = [plain(n) if t in in_layers and "/" in plain(n) else n for n, t in zip(names, targets)]
    names = _distinct(bare, names)
    (last, count), *_ = Counter(n.rpartition("/")[2] for n in names).most_common(1)
    # Most end alike, in "kernel" say. A kernel beside a bias says that it is one.
    if 2 * count >= len(names):
        beside = Counter(n.rpartition("/")[0] for n in names)
        cut = lambda n: n.removesuffix(f"/{last}") if beside[n.rpartition("/")[0]] == 1 else n
        names = _distinct(list(map(cut, names)), names)
    return names


def _distinct(names: Sequence[str], otherwise: Sequence[str]) -> list[str]:
    fine = len(names) > 1 and len({*names}) == len(names)
    return list(names if fine else otherwise)
