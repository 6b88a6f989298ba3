"""Linen: a module whose `apply`, methods and `bind` understand bound parameters."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax

from lora_jax._adapt import Adapted
from lora_jax._doors.subclass import Options, Output, members, plain_class, reduced, subclass
from lora_jax._nodes.weight import is_weight

CALL = "lora.attach(module"


def attached(module: nn.Module, options: Options) -> Any:
    new = module.clone()
    object.__setattr__(new, "__class__", attached_class(type(module), options))
    return new


def detached(module: nn.Module) -> Any:
    new = module.clone()
    object.__setattr__(new, "__class__", plain_class(module))
    return new


def attached_class(cls: type, options: Options) -> type:
    body: dict[str, Any] = {
        name: _method(name, method)
        for name, method in members(cls, nn.Module)
        if not isinstance(method, property) and name != "setup"
    }
    body |= {"apply": _apply(options), "__hash__": cls.__hash__, "__eq__": cls.__eq__}
    body["__reduce_ex__"] = functools.partialmethod(_reduced)
    return subclass(cls, options, body)


def _reduced(self: Any, protocol: Any) -> tuple:
    return reduced(attached_class, self, protocol)


def _holds_weights(tree: Any) -> bool:
    return any(map(is_weight, jax.tree.leaves(tree, is_leaf=is_weight)))


def _plain_apply(module: Any, variables: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    return plain_class(module).apply(module, variables, *args, **kwargs)


def _run(module: Any, variables: Any, args: tuple, kwargs: dict[str, Any]) -> Output:
    return Output.of(_plain_apply(module, variables, args, kwargs))


_run.__name__ = "apply"  # as an error calls it


def _apply(options: Options) -> Any:
    whole, part = (Adapted(_run, *options, part=p, made=CALL) for p in (False, True))

    @nn.nowrap
    @functools.wraps(nn.Module.apply, updated=())
    def apply(self: Any, variables: Any, *args: Any, **kwargs: Any) -> Any:
        if not _holds_weights(variables):
            return _plain_apply(self, variables, args, kwargs)
        call = whole if kwargs.get("method") in (None, "__call__") else part
        try:
            hash(self)
        except TypeError:  # no constant of the trace: each call is traced anew
            fn = functools.wraps(_run)(functools.partial(_run, self))
            call = Adapted(fn, *options, part=call.part, made=CALL)
            return call((variables, args, kwargs), {}).value()
        return call((self, variables, args, kwargs), {}).value()

    return apply


def _method(name: str, method: Any) -> Any:
    @nn.nowrap
    @functools.wraps(method, updated=())
    def adapted(self: Any, *args: Any, **kwargs: Any) -> Any:
        scope = self.scope
        if scope is None or scope.parent is not None or not _holds_weights(scope.variables()):
            return method.__get__(self)(*args, **kwargs)
        return _bound(self, name, args, kwargs)

    return adapted


def _bound(module: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A method of a module that `bind` returned, with what it changes written back."""
    scope = module.scope
    unbound, variables = module.unbind()
    rngs = {}
    for stream, rng in scope.rngs.items():
        calls = scope.rng_counters.get(stream, 0)  # the first call draws what `apply` draws
        key = rng.as_jax_rng()
        rngs[stream] = jax.random.fold_in(key, calls) if calls else key
        scope.rng_counters[stream] = calls + 1
    out = unbound.apply(variables, *args, rngs=rngs, mutable=scope.mutable, method=name, **kwargs)
    if scope.mutable is False:
        return out
    out, changed = out
    for collection, values in changed.items():
        for key, value in values.items():
            scope.put_variable(collection, key, value)
    return out
