"""The bridge to NNX: a module is its graph definition and a state, which is an ordinary tree.

A module is also a pytree of its own, but one that forgets which variables are shared; `nnx.split`
does not. What calls do to modules is in `nnx_calls`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.tree_util import DictKey

from lora_jax._core.paths import path_of, whole


def is_module(x: Any) -> bool:
    return isinstance(x, nnx.Module)


def is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def is_object(x: Any) -> bool:
    """Whether x has an identity in NNX: a module, `Rngs`, an optimiser, a variable."""
    return isinstance(x, nnx.Pytree | nnx.Variable)


def is_data(x: Any) -> bool:
    return is_object(x) or isinstance(x, jax.Array | np.ndarray)


def attributes_of(x: Any) -> dict[str, Any]:
    # "_pytree__" begins what NNX keeps for itself.
    return {k: v for k, v in vars(x).items() if not str(k).startswith("_pytree__")}


def state_of(tree: Any) -> Any:
    """A module's state; any other tree as it is."""
    return nnx.split(tree)[1] if is_module(tree) else tree


def survey_call(params: Any) -> str:
    """How to survey the function of these parameters, for a message."""
    if is_module(params):
        return "lora.survey(lambda model, x: model(x), model, x)"
    return "lora.survey(model.apply, {'params': params}, x)"


def map_state(fn: Callable[[Any], Any], tree: Any) -> Any:
    """`fn` of a tree, or of a module's state, as a new module."""
    if not is_module(tree):
        return fn(tree)
    graph, state = nnx.split(tree)
    return nnx.merge(graph, fn(state))


# ---------------------------------------------------------------- a module that shares variables
# For each object of a bound module the one that it stands for, where attributes that a call creates
# belong as well. It is kept beside the objects, by identity, since an attribute would be copied
# with them; entries live as long as the bound module.
_ORIGINALS: dict[int, weakref.ref] = {}


class Held(nnx.Variable):
    """Holds a weight in the place of an array that has no Variable around it, in a bound module:
    there NNX would take the weight for a tree of its own. A call gets the array itself."""


def map_shared(fn: Callable[[Any], Any], tree: Any, replaced: Container[str]) -> Any:
    """As `map_state`; but the new module shares the variables that `fn` has no new value for.

    Args:
      fn: from a tree to one of the same structure.
      tree: a tree, of which nothing is shared, or a module.
      replaced: the paths of the leaves with new values. What is one leaf by its class is new too.
    """
    if not is_module(tree):
        return fn(tree)
    graph, state = nnx.split(tree)

    def either(keys: tuple, old: Any, new: Any):
        # A module may hold an array without a Variable around it.
        if not is_variable(old):
            own = new if path_of(keys) in replaced else old
            return Held(own) if whole()(own) else own
        # A weight in codes has no adapter, and what stands for it is new all the same.
        leaves = jax.tree_util.tree_leaves_with_path(new, is_leaf=whole())
        changed = any(path_of((*keys, *k)) in replaced or whole()(x) for k, x in leaves)
        return new if changed else old

    state = jax.tree_util.tree_map_with_path(either, state, fn(state), is_leaf=is_variable)
    # It has these very variables.
    return standing_for(nnx.merge(graph, state), tree)


def shared_copy(module: Any) -> Any:
    """New objects with the module's variables; what a call changes of them is changed in both."""
    return standing_for(nnx.merge(*nnx.split(module)), module)


def standing_for(module: Any, original: Any) -> Any:
    """`module`, which has the structure of `original`."""
    # Both walks are of one graph, in one order.
    own = (x for x in members_of(module) if not isinstance(x, Held))
    for new, old in zip(own, members_of(original)):
        if new is not old and not is_variable(new):
            _ORIGINALS[id(new)] = weakref.ref(old)
            # A later object may get the same id: the entry goes when this object does.
            weakref.finalize(new, _ORIGINALS.pop, id(new), None)
    return module


def is_bound(args: Any) -> bool:
    """Whether a module that `map_shared` made is among the arguments."""
    return any(original_of(x) is not None for x in members_of(objects_in(args)))


def original_of(member: Any) -> Any:
    ref = _ORIGINALS.get(id(member))
    return None if ref is None else ref()


def objects_in(args: Any) -> list:
    leaves = jax.tree.leaves(args, is_leaf=whole(is_object))
    return [x for x in leaves if is_object(x)]


def members_of(root: Any) -> list:
    """The objects below and variables, each once, in an order that `nnx.merge` keeps."""
    return [x for _, x in nnx.iter_graph(root) if is_object(x)]


# ---------------------------------------------------------------- what a module is made of
def modules(root: Any) -> list:
    """The modules below, each once; lists and dicts of modules are no modules."""
    return [x for x in members_of(root) if is_module(x) and not _is_container(x)]


def _is_container(x: Any) -> bool:
    return isinstance(x, nnx.List | nnx.Dict)


def owned(module: Any) -> dict[str, Any]:
    """{path below the module: a variable or an array that belongs to no module below it}."""
    return {path_of(keys): x for keys, x in _owned(module, ())}


def _owned(x: Any, keys: tuple) -> Iterator[tuple[tuple, Any]]:
    for name, value in attributes_of(x).items():
        for inner, leaf in jax.tree_util.tree_leaves_with_path(value, is_leaf=whole(is_object)):
            path = (*keys, DictKey(name), *inner)
            if is_variable(leaf) or not is_object(leaf):
                yield path, leaf
            elif _is_container(leaf) or not is_module(leaf):
                yield from _owned(leaf, path)


def holds_arrays(value: Any) -> bool:
    """Whether there are arrays that belong to no object."""
    leaves = jax.tree.leaves(value, is_leaf=whole(is_object))
    return any(is_data(x) and not is_object(x) for x in leaves)


def places(module: Any) -> dict[int, str]:
    """{id of a variable or array: its path in `state_of(module)`}."""
    leaves = jax.tree_util.tree_leaves_with_path(state_of(module), is_leaf=whole(is_variable))
    return {id(x): path_of(keys) for keys, x in leaves}
