"""A primitive that lowers to a plain JAX function."""

from __future__ import annotations

import functools

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from lora_jax._core import compat


def primitive(name: str, impl) -> Primitive:
    """A primitive with several results that is lowered as `impl`."""
    p = Primitive(name)
    p.multiple_results = True

    @functools.lru_cache(maxsize=1024)
    def jitted(**params):
        return jax.jit(functools.partial(p.bind, **params))

    @functools.lru_cache(maxsize=1024)
    def avals(*args, **params):
        return compat.out_avals(functools.partial(impl, **params), args)

    p.def_impl(lambda *args, **params: jitted(**params)(*args))
    p.def_abstract_eval(avals)
    mlir.register_lowering(p, mlir.lower_fun(impl, multiple_results=True))
    return p
