"""The bridge to NNX: a module is its graph definition and a state, which is an ordinary tree.

A module is also a pytree of its own, but one that forgets which variables are shared; `nnx.split`
does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from lora_jax._core.errors import LoRAError
from lora_jax._core.paths import whole


def is_module(x: Any) -> bool:
    return isinstance(x, nnx.Module)


def state_of(tree: Any) -> Any:
    """A module's state; any other tree as it is."""
    return nnx.split(tree)[1] if is_module(tree) else tree


def map_state(fn: Callable[[Any], Any], tree: Any) -> Any:
    """`fn` of a tree, or of a module's state, as a new module."""
    if not is_module(tree):
        return fn(tree)
    graph, state = nnx.split(tree)
    return nnx.merge(graph, fn(state))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A module among the arguments of a traced function."""

    state: Any
    graph: Any = dataclasses.field(metadata=dict(static=True))


def pack(args: Any) -> Any:
    """The arguments with each module as a `Packed`."""

    def one(x):
        if not is_module(x):
            return x
        graph, state = nnx.split(x)
        return Packed(state, graph)

    return jax.tree.map(one, args, is_leaf=whole(is_module))


def unpack(args: Any) -> tuple[Any, list[tuple[tuple, Any]]]:
    """The arguments with modules again, and each module beside the state that it was made of."""
    modules = []

    def one(x):
        if not isinstance(x, Packed):
            return x
        flat = jax.tree.flatten(x.state, is_leaf=whole())  # before: a module may share variables
        modules.append((flat, nnx.merge(x.graph, x.state)))
        return modules[-1][1]

    return jax.tree.map(one, args, is_leaf=lambda x: isinstance(x, Packed)), modules


def changes(modules: list[tuple[tuple, Any]]) -> list[dict[int, Any]]:
    """For each module the leaves of its state that a call has changed, by number."""
    return [_changed(*flat, module) for flat, module in modules]


def _changed(before, structure, module) -> dict[int, Any]:
    after, now = jax.tree.flatten(nnx.split(module)[1], is_leaf=whole())
    if structure != now:
        raise LoRAError(
            f"{type(module).__name__} got or lost variables in the call; create them before, or "
            "use `graphdef, state = nnx.split(module)` and return the state"
        )
    return {i: new for i, (old, new) in enumerate(zip(before, after)) if new is not old}


def update(args: Any, changed: list[dict[int, Any]]) -> None:
    """Writes such changes into the modules among the arguments, as `nnx.jit` does."""
    modules = [x for x in jax.tree.leaves(args, is_leaf=whole(is_module)) if is_module(x)]
    for module, new in zip(modules, changed):
        if new:
            leaves, structure = jax.tree.flatten(nnx.split(module)[1], is_leaf=whole())
            leaves = [new.get(i, x) for i, x in enumerate(leaves)]
            nnx.update(module, jax.tree.unflatten(structure, leaves))
