"""What is done to a weight before it is read waits until then."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import numpy as np
from jax import lax

from lora_jax._core.errors import raise_all
from lora_jax._core.geometry import static


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Waiting:
    """A weight that is made where it is used: transposes, reshapes, casts of it are kept until
    then.

    Attributes:
      stored, stored_dtype: shape and type as it lies there.
      moves: what is done to it when it is read, as (primitive, parameters), and moved_to, its shape
        and type then.
      updated: whether what is read holds the update of an adapter.
    """

    updated: ClassVar[bool] = False

    moves: tuple = static(default=())
    moved_to: Any = static(default=None)  # noqa: RUF009

    if TYPE_CHECKING:  # of each kind

        @property
        def stored(self) -> tuple[int, ...]: ...

        @property
        def stored_dtype(self) -> Any: ...

        def value(self, after: jax.Array | None = None) -> jax.Array:
            """The weight as an array; with `after`, made anew and no sooner than that is there."""
            ...

    def problem(self) -> str | None:
        """What is wrong with its arrays, if they were damaged since it was made."""
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        # `moved_to` is the whole's, and stays so where a scan or shard_map cuts the arrays.
        order = self.order
        return self.moved_to[0] if order is None else tuple(self.stored[d] for d in order)

    @property
    def dtype(self) -> Any:
        return self.moved_to[1] if self.moves else self.stored_dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def order(self) -> tuple[int, ...] | None:
        """For each axis that of the stored weight, if moves are transposes and casts alone; else
        None."""
        return _order(self.moves, len(self.stored))

    def moved(self, eqn: Any) -> Self | None:
        """The weight after an equation that only moves or casts it; None if that cannot wait."""
        # Moves are static, part of the tree's structure, which jit hashes.
        move = (eqn.primitive, tuple(sorted(eqn.params.items())))
        try:
            hash(move)
        except TypeError:
            return None
        aval = eqn.outvars[0].aval
        return self._with(move, (tuple(aval.shape), np.dtype(aval.dtype)))

    def transposed(self, order: Sequence[int]) -> Self:
        """The weight with its axes in this order, when it is read."""
        move = (lax.transpose_p, (("permutation", tuple(order)),))
        return self._with(move, (tuple(self.shape[d] for d in order), np.dtype(self.dtype)))

    def _with(self, move: tuple, to: tuple) -> Self:
        return dataclasses.replace(self, moves=(*self.moves, move), moved_to=to)

    def _moving(self, moves: Sequence) -> Self:
        """This part of a weight that waits for nothing, after what waited for the whole."""
        part = self
        # All transposes as one, of the weight before it was sliced: only together do they keep axis
        # 0 in front, see `sliceable`. It is gone, and the others are numbered anew.
        order = _order(moves, len(self.stored) + 1)
        assert order is not None and order[0] == 0
        if order != tuple(range(len(order))):
            part = part.transposed([d - 1 for d in order[1:]])
        for primitive, params in moves:
            if primitive.name == "convert_element_type":
                to = (part.shape, np.dtype(dict(params)["new_dtype"]))
                part = part._with((primitive, params), to)
        return part

    def _moved(self, w: jax.Array) -> jax.Array:
        for primitive, params in self.moves:
            w = primitive.bind(w, **primitive.get_bind_params(dict(params)))
        return w


def _order(moves: Sequence, ndim: int) -> tuple[int, ...] | None:
    order = tuple(range(ndim))
    for primitive, params in moves:
        if primitive.name == "transpose":
            # Axis d of what comes out is axis permutation[d] of what went in.
            order = tuple(order[d] for d in dict(params)["permutation"])
        elif primitive.name != "convert_element_type":
            return None
    return order


def value(base: Any, after: jax.Array | None = None) -> jax.Array:
    """The array that a base is, or stands for."""
    return base.value(after) if isinstance(base, Waiting) else base


def is_waiting(x: Any) -> bool:
    """Whether a base is no array, but what one is made of where it is used."""
    return isinstance(x, Waiting)


def check_codes(leaves: Mapping[str, Any]) -> None:
    """That each quantised leaf of {path: leaf} is what it says; all that are not are listed."""
    found = {path: x.problem() for path, x in leaves.items() if is_waiting(x)}
    raise_all(
        "these quantised leaves were damaged since they were made:",
        (f"'{path}': {wrong}" for path, wrong in found.items() if wrong),
    )
