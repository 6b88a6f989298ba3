"""What is traced of a call, and what is a constant of the trace."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from lora_jax._core import nnx, nnx_calls
from lora_jax._core.errors import LoRAError
from lora_jax._core.numbers import positions
from lora_jax._nodes.weight import Followed, is_weight
from lora_jax._quantized.weight import is_quantized


@dataclasses.dataclass(frozen=True)
class Constants:
    """What is not traced of a call: the structure and the leaves that are not arrays."""

    treedef: Any
    # One for each leaf; _ARRAY where it is traced.
    leaves: tuple
    # Those of the leaves: 1 and True are equal and hash alike, but trace differently.
    types: tuple
    # (position or name, value) of the static arguments
    static: tuple

    def with_arrays(self, arrays: Iterable) -> Any:
        arrays = iter(arrays)
        leaves = [next(arrays) if x is _ARRAY else x for x in self.leaves]
        return jax.tree.unflatten(self.treedef, leaves)


_ARRAY = object()


class Traceable:
    """A function, with its arguments split into arrays and constants of the trace."""

    def __init__(
        self,
        fn: Callable,
        static_argnums: int | Sequence[int] = (),
        static_argnames: str | Sequence[str] = (),
        call: str = "lora.adapt({fn})",
    ):
        check_function(fn, call)
        self.fn = fn
        self.static_argnums = positions(static_argnums, "static_argnums")
        one = isinstance(static_argnames, str) or not isinstance(static_argnames, Iterable)
        self.static_argnames = (static_argnames,) if one else tuple(static_argnames)
        if not all(isinstance(name, str) for name in self.static_argnames):
            raise LoRAError(
                f"static_argnames={static_argnames!r:.80}: expected a name, or several: "
                'static_argnames=("train",)'
            )
        self.keyed()

    def keyed(self) -> Any:
        # One function object for the lifetime of the transform: JAX caches its traces.
        self._trace = functools.partial(_rejoined, self)
        return self

    def split(self, args: Sequence, kwargs: dict[str, Any]) -> tuple[Constants, list]:
        # Negative ones count from the end; one that this call lacks is passed over, as by jax.jit.
        nums = {n % len(args) for n in self.static_argnums if -len(args) <= n < len(args)}
        static = tuple((i, args[i]) for i in sorted(nums)) + tuple(
            (k, kwargs[k]) for k in sorted(kwargs) if k in self.static_argnames
        )
        named = {k for k, _ in static}
        # None keeps the place of a static argument.
        rest = nnx_calls.pack(
            (
                [None if i in nums else a for i, a in enumerate(args)],
                {k: v for k, v in kwargs.items() if k not in named},
            )
        )
        leaves, treedef = jax.tree.flatten(rest, is_leaf=is_weight)
        arrays = [x for x in leaves if is_array(x)]
        constants = tuple(_ARRAY if is_array(x) else x for x in leaves)
        return Constants(treedef, constants, tuple(map(type, constants)), static), arrays

    def objects(self, constants: Constants, arrays: Iterable) -> tuple:
        """((arguments, named ones) with new NNX objects, what these hold)."""
        return nnx_calls.unpack(*constants.with_arrays(arrays))

    def call(self, constants: Constants, arrays: Iterable) -> tuple:
        """(what the function returns, what it changed of the NNX objects among its arguments)."""
        (args, kwargs), before = self.objects(constants, arrays)
        # Static arguments come back as they are, by position or by name.
        for where, value in constants.static:
            (args if isinstance(where, int) else kwargs)[where] = value
        return nnx_calls.calling(self.fn, *args, **kwargs), nnx_calls.changes(before)

    def parameters(self, constants: Constants, arrays: Iterable) -> list[bool]:
        """Which arrays came in an argument that holds a weight: parameters, no data."""
        (args, kwargs), objects = constants.with_arrays(arrays)
        found = []
        # NNX objects share one state, and so count as one argument.
        for argument in (*args, *kwargs.values(), objects):
            own = list(filter(is_array, jax.tree.leaves(argument, is_leaf=is_weight)))
            found += [any(map(is_weight, own))] * len(own)
        return found

    def jaxpr(self, constants: Constants, arrays: Sequence) -> tuple:
        """The jaxpr of `call`, with plain arrays for adapted weights, and its output shapes."""
        bases = [x.base if is_weight(x) else x for x in arrays]
        # `fn` is traced as if the weight were there; codes have another shape and type.
        bases = [x.abstract if is_quantized(x) else x for x in bases]
        return jax.make_jaxpr(self._trace, static_argnums=0, return_shape=True)(constants, *bases)


def check_function(fn: Any, call: str) -> None:
    """Raises a LoRAError for a model in the function's place: it would be a constant.

    Args:
      call: the user's, with "{fn}", and "{params}" where it takes parameters.
    """
    name = type(fn).__name__
    owner = getattr(fn, "__self__", None)
    if nnx.is_module(owner) and getattr(fn, "__name__", "") == "__call__":
        found = f"the __call__ of one {type(owner).__name__}"
        cure, params = "lambda model, x: model(x)", "model"
    elif nnx.is_module(fn):
        found, cure, params = f"the module {name}", "lambda model, x: model(x)", "model"
    elif isinstance(fn, nn.Module):
        found, cure, params = f"the module {name}", "model.apply", "{'params': params}"
    elif not callable(fn):
        found, cure, params = name, "lambda params, x: ...", "params"
    elif not isinstance(fn, jax.tree_util.Partial) and any(map(is_array, jax.tree.leaves(fn))):
        found, cure, params = f"{name}, which holds them", "lambda model, x: model(x)", "model"
    else:
        return
    call = call.format(fn=cure, params=params)
    if params == "model" and call.startswith("lora.adapt("):
        call += ", or lora.attach(model, adapters)"
    raise LoRAError(f"expected a function of parameters, found {found}: {call}")


def _rejoined(traceable: Traceable, constants: Constants, *arrays: Any) -> tuple:
    return traceable.call(constants, arrays)


def is_array(x: Any) -> bool:
    return isinstance(x, Followed | jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)
