"""What one of PEFT's additive types is: the names of its tensors, their sizes, its update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lora_jax.peft._config import PeftConfig

Shapes = Mapping[str, tuple[int, ...]]
Arrays = Mapping[str, np.ndarray]


class Misfit(Exception):
    """Tensors that do not fit together."""


@dataclasses.dataclass(frozen=True)
class Form:
    """One of PEFT's types.

    Attributes:
      names: of its tensors, behind the name of the module.
      sizes: (out, in, rank) that shapes imply; 0 for what they do not say, and for no rank.
      update: ΔW (out, in) of the tensors; the inputs of a convolution as torch has them.
      base: whether ΔW depends on the weight.
    """

    names: tuple[str, ...]
    sizes: Callable[[Shapes, PeftConfig, str], tuple[int, int, int]]
    update: Callable[[Arrays, Place], np.ndarray]
    base: bool = False


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an update falls: the module's name, its sizes, its weight (out, in) if `Form.base`."""

    module: str
    n_out: int
    n_in: int
    config: PeftConfig
    rank: int
    weight: Any = None


def has(shapes: Shapes, *names: str) -> None:
    lacking = [n for n in names if n not in shapes]
    more = [n for n in shapes if n not in names]
    if lacking or more:
        text = f"lacks {', '.join(lacking)}" if lacking else f"also has {', '.join(more)}"
        raise Misfit(text)


def axes_of(shapes: Shapes, **axes: int | tuple[int, ...]) -> None:
    for name, n in axes.items():
        allowed = (n,) if isinstance(n, int) else n
        if name in shapes and (len(shapes[name]) not in allowed or 0 in shapes[name]):
            raise Misfit(f"{name} {shapes[name]}: expected {' or '.join(map(str, allowed))} axes")


def equal(what: str, *sizes: Any) -> None:
    if len(set(sizes)) > 1:
        raise Misfit(f"{what} differ: {', '.join(map(str, sizes))}")
