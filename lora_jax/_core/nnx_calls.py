"""Calls with NNX objects among their arguments: into a trace, and out of it.

What a traced function changes of the objects is written back as `nnx.jit` does: values, metadata,
and the attributes that come and go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError

from lora_jax._core.errors import LoRAError
from lora_jax._core.nnx import (
    Held,
    attributes_of,
    is_data,
    is_object,
    is_variable,
    members_of,
    objects_in,
    original_of,
    standing_for,
)
from lora_jax._core.paths import whole

_OBJECT = object()  # stands in the arguments for what is in `Packed`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """The objects among some arguments, as one state: they may share variables."""

    state: Any
    graph: Any = dataclasses.field(metadata=dict(static=True))


def pack(args: Any) -> tuple[Any, Packed]:
    """(the arguments with a mark for each object, those objects)."""
    objects = objects_in(args)
    graph, state = nnx.split(objects)
    # `nnx.split` puts the very Variables into the state, so that identity tells them.
    leaves, structure = jax.tree.flatten(state, is_leaf=is_variable)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(leaves)):
        # The Variables that a bound module shares with its original: no gradient flows to them,
        # but for those that are there to be differentiated.
        frozen = {
            id(v)
            for original in map(original_of, members_of(objects))
            if original is not None
            for values, _ in _contents(original).values()
            for v in values
            if not isinstance(v, nnx.Perturbation)
        }
        leaves = [_stopped(x) if id(x) in frozen else x for x in leaves]
        state = jax.tree.unflatten(structure, leaves)
    marked = jax.tree.map(lambda x: _OBJECT if is_object(x) else x, args, is_leaf=whole(is_object))
    return marked, Packed(state, graph)


def _stopped(variable: Any) -> Any:
    """A variable that a bound module shares is frozen: no gradient flows to it."""

    def one(x: Any) -> Any:
        floats = isinstance(x, jax.core.Tracer) and jnp.issubdtype(x.dtype, jnp.floating)
        return jax.lax.stop_gradient(x) if floats else x

    return jax.tree.map(one, variable, is_leaf=whole())


def unpack(marked: Any, packed: Packed) -> tuple[Any, list]:
    """(the arguments with new objects, what the objects hold before the call)."""
    objects = nnx.merge(packed.graph, packed.state)
    each = iter(objects)
    args = jax.tree.map(lambda x: next(each) if x is _OBJECT else x, marked)
    members = members_of(objects)
    _replace(members, lambda x: x.get_raw_value() if isinstance(x, Held) else x)
    return args, [(x, _contents(x)) for x in members]


def _replace(members: list, fn: Callable[[Any], Any]) -> None:
    """Puts fn(leaf) in the place of each leaf of the attributes of new objects."""
    for x in members:
        for name, value in () if is_variable(x) else vars(x).items():
            if any(fn(leaf) is not leaf for leaf in _flat(value)[0]):
                vars(x)[name] = jax.tree.map(fn, value, is_leaf=whole(is_object))


def calling(fn: Callable, *args: Any, **kwargs: Any):
    """`fn` of arguments that are new objects."""
    try:
        return fn(*args, **kwargs)
    except TraceContextError as e:
        raise LoRAError(
            f"{e}: the adapted function changes a module, Rngs or state that it does not take as "
            "an argument. Pass it: lora.adapt(lambda params, rest, x: nnx.merge(graph, params, "
            "rest)(x)), or lora.adapt(lambda model, x: model(x))"
        ) from e


# ---------------------------------------------------------------- out of the trace
def _contents(x: Any) -> dict[str, tuple[list, Any]]:
    """{attribute: (leaves, structure)} of an object; a variable has one, without a name."""
    if is_variable(x):
        return {"": jax.tree.flatten(x, is_leaf=whole())}
    return {k: _flat(v) for k, v in attributes_of(x).items()}


def _flat(value: Any) -> tuple[list, Any]:
    try:
        return jax.tree.flatten(value, is_leaf=whole(is_object))
    except (TypeError, ValueError):  # a constant of keys that cannot be sorted
        return [value], jax.tree.structure(0)


def _same(old: tuple[list, Any] | None, new: tuple[list, Any]) -> bool:
    return (
        old is not None
        and old[1] == new[1]
        and all(
            # Data by identity, as a tracer has no truth value; constants by type and value.
            a is b or (not (is_data(a) or is_data(b)) and type(a) is type(b) and a == b)
            for a, b in zip(old[0], new[0])
        )
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Changes:
    """What a call has changed of the objects among its arguments, which are numbered.

    Attributes:
      variables: {number: the variable with its new value}.
      arrays: those among the values of the new attributes.
      state: of the objects among these values; None for a variable that has a number already.
      attributes: (number, name) of each attribute that is new or has a new value.
      removed: (number, name) of each attribute that is gone.
      values: the leaves of the values of `attributes`, with marks for arrays and objects, and their
        structure.
      graph, known, parts: the graph of the objects among them; the numbers of the leaves of `state`
        and of all that they are made of.
    """

    variables: dict[int, Any]
    arrays: list
    state: Any
    attributes: tuple = dataclasses.field(metadata=dict(static=True))
    removed: tuple = dataclasses.field(metadata=dict(static=True))
    values: tuple = dataclasses.field(metadata=dict(static=True))
    graph: Any = dataclasses.field(metadata=dict(static=True))
    known: tuple = dataclasses.field(metadata=dict(static=True))
    parts: tuple = dataclasses.field(metadata=dict(static=True))


_ARRAY = object()


@dataclasses.dataclass(frozen=True)
class _Known:
    number: int


def changes(before: list) -> Changes:
    """The changes of a call, from what `unpack` returned."""
    variables, new, removed = {}, {}, []
    for i, (x, old) in enumerate(before):
        now = _contents(x)
        removed += [(i, k) for k in old if k not in now]
        for k, content in now.items():
            if _same(old.get(k), content):
                continue
            # A Variable has one entry; any other object has one for each attribute.
            if is_variable(x):
                variables[i] = x
            else:
                new[i, k] = vars(x)[k]
    leaves, structure = zip(*map(_flat, new.values())) if new else ((), ())
    number = {id(x): i for i, (x, _) in enumerate(before)}
    # An object that was there before the call goes by its number; it has its own change.
    leaves = [_Known(number[id(x)]) if id(x) in number else x for each in leaves for x in each]
    # New objects leave as one graph: two attributes may hold the same one.
    created = [x for x in leaves if is_object(x)]
    graph, state = nnx.split(created)
    parts, treedef = jax.tree.flatten(state, is_leaf=is_variable)
    # They may hold Variables that were there.
    known = tuple(number.get(id(x)) for x in parts)
    return Changes(
        variables,
        [x for x in leaves if is_data(x) and not is_object(x)],
        [None if n is not None else x for n, x in zip(known, parts)],
        tuple(new),
        tuple(removed),
        (
            tuple(_OBJECT if is_object(x) else _ARRAY if is_data(x) else x for x in leaves),
            structure,
        ),
        (graph, treedef),
        known,
        tuple(number.get(id(x)) for x in members_of(created)),
    )


def without(new: Changes, before: list, same: Callable[[Any, Any], bool]) -> Changes:
    """The changes without those of variables that hold the same as `before`, by `same`."""

    def is_new(i: int, variable: Any) -> bool:
        (_, contents), (now, structure) = before[i], _contents(variable)[""]
        old, was = contents[""]  # the structure has the metadata
        return structure != was or not all(map(same, old, now))

    variables = {i: x for i, x in new.variables.items() if is_new(i, x)}
    return dataclasses.replace(new, variables=variables)


def update(args: Any, new: Changes) -> None:
    """Writes the changes into the objects among the arguments, as `nnx.jit` does."""
    if not (new.variables or new.attributes or new.removed):
        return
    members = members_of(objects_in(args))
    try:
        for i, variable in new.variables.items():
            members[i].update_from_state(variable)
        objects: list = []
        for level in _levels(members):
            # What is created holds parts of the objects of this level; where none differs, of all.
            if not objects or any(level[n] is not members[n] for n in new.parts if n is not None):
                objects, first = _created(level, new), objects
                for x, of in zip(first, objects):
                    standing_for(x, of)
            for (i, name), value in zip(new.attributes, _values(level, objects, new)):
                # NNX takes an attribute as data, and not as a constant, where this mark says so.
                data = any(map(is_data, _flat(value)[0]))
                _set(level[i], name, nnx.data(value) if data else value)
            for i, name in new.removed:
                if name in vars(level[i]):
                    own = isinstance(name, str)
                    delattr(level[i], name) if own else vars(level[i]).pop(name)
    except TraceContextError as e:
        raise LoRAError(
            f"{e}: the call changes the model's state, and the model was made outside of this "
            "jax.grad, jax.jit or the like. Pass it through NNX's own: nnx.value_and_grad(lambda "
            "adapters, model, x: loss(call(lora.bind(model, adapters), x)))(adapters, model, x)"
        ) from None


def _set(x: Any, name: str | int, value: Any) -> None:
    """`setattr`; and for numbers, which the elements of Flax 0.12.2's lists have for names."""
    setattr(x, name, value) if isinstance(name, str) else x._setattr(name, value)


def _levels(members: list) -> Iterator[list]:
    """The members, those that they stand for, and so on."""
    while True:
        yield members
        pairs = [(x, old) for x in members if (old := original_of(x)) is not None]
        if not pairs:
            return
        of = {id(x): old for x, old in pairs}
        for x, old in pairs:  # a Variable with a weight stands for the one in the same place
            for name in vars(x).keys() & vars(old).keys():
                own, theirs = _flat(vars(x)[name])[0], _flat(vars(old)[name])[0]
                of |= {id(v): o for v, o in zip(own, theirs) if is_variable(v)}
        members = [of.get(id(x), x) for x in members]


def _created(members: list, new: Changes) -> list:
    """The objects that the call has made; what they hold of the members is by number."""
    graph, treedef = new.graph
    parts = [x if n is None else members[n] for n, x in zip(new.known, new.state)]
    objects = nnx.merge(graph, jax.tree.unflatten(treedef, parts))
    own = members_of(objects)
    of = {id(x): members[n] for x, n in zip(own, new.parts) if n is not None}
    _replace(own, lambda x: of.get(id(x), x))
    return objects


def _values(members: list, objects: list, new: Changes) -> list:
    """The values of the new attributes: the reverse of `changes`."""
    created, arrays, (leaves, structures) = iter(objects), iter(new.arrays), new.values

    def value(x: Any) -> Any:
        if isinstance(x, _Known):
            return members[x.number]
        return next(created) if x is _OBJECT else next(arrays) if x is _ARRAY else x

    filled = map(value, leaves)
    return [
        jax.tree.unflatten(each, [next(filled) for _ in range(each.num_leaves)])
        for each in structures
    ]
