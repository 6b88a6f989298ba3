"""The transform: from a function of parameters to one that understands adapted parameters."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import _compat, _nnx
from lora_jax._coverage import Coverage
from lora_jax._errors import LoRAError, raise_all
from lora_jax._interpret import Interpreter
from lora_jax._plan import PLANS
from lora_jax._quantized import is_quantized
from lora_jax._weight import AdaptedWeight, is_weight


def adapt(
    fn: Callable,
    *,
    strict: bool = True,
    plan: str = "auto",
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
) -> Callable:
    """Makes `fn` understand the adapted weights that `bind` puts into its arguments.

    The result takes the arguments of `fn`. Where they hold adapted weights, each contraction,
    convolution or look-up x·W becomes x·W + scale·(x·A)·B (arXiv:2106.09685, eq. 3); all else is
    `fn`, unchanged. It is a pure function, and composes with every JAX transformation. Without an
    adapted weight among the arguments it is `fn` itself.

    `fn` is traced as `jax.jit` would: arrays are traced, and every other leaf of the arguments
    (Python numbers, booleans, strings, functions) is a constant of the trace. Repeated calls with
    arrays of the same types and equal constants do not trace again.

    Args:
      fn: a function of arrays, such as `model.apply`.
      strict: raise if an adapted leaf is used anywhere but in low rank, or not at all. If False,
        such weights are materialised, W + scale·A·B, which is exact but forms a gradient of the
        size of W; `lora.coverage` lists them.
      plan: how a matrix product is made. "factored": x·W + scale·(x·A)·B. "merged":
        x·(W + scale·A·B) in the forward pass and for the gradient of x; the merged weight is
        accumulated in fp32, rounded once to W's dtype, lives for one product and has no gradient.
        "auto" chooses by FLOPs and bytes, for each pass of each product, and merges only where
        nothing is rounded away: in fp32 or wider and, off the CPU, at the highest precision; and
        on one device (or under shard_map), where shapes are known. Convolutions, ragged products
        and dropout are factored. `lora.coverage` shows the plan of each leaf.
      static_argnums, static_argnames: as in `jax.jit`, for arguments that hold arrays or objects
        and are still constants.

    Raises:
      LoRAError: an unknown plan; or "merged" with dropout, which is on the input of the branch.
        When called, if strict: lists every leaf that was materialised (with the primitive
        and its source line) or unused.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.ones((4, 3))}
    >>> adapters = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets="w"))
    >>> apply = lora.adapt(lambda p, x: x @ p["w"])
    >>> apply(lora.bind(params, adapters), jnp.ones((2, 4)))
    Array([[4., 4., 4.],
           [4., 4., 4.]], dtype=float32)
    """
    call = _Adapted(fn, strict, plan, static_argnums, static_argnames)

    @functools.wraps(fn, updated=())
    def adapted(*args, **kwargs):
        return call(args, kwargs)

    return adapted


@dataclasses.dataclass(frozen=True)
class _Constants:
    """What is not traced of a call: the structure and the leaves that are not arrays."""

    treedef: Any
    leaves: tuple  # one per leaf, _ARRAY where it is traced
    types: tuple  # of the leaves: 1 and True are equal, but not alike
    static: tuple  # (position or name, value) of the static arguments


_ARRAY = object()


class Traceable:
    """A function, with its arguments split into arrays and constants of the trace."""

    def __init__(self, fn, static_argnums=(), static_argnames=()):
        self.fn = fn
        self.static_argnums = (
            (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums)
        )
        self.static_argnames = (
            (static_argnames,) if isinstance(static_argnames, str) else tuple(static_argnames)
        )
        # One function object for the lifetime of the transform: JAX caches its traces.
        self._trace = functools.partial(_rejoined, self)

    def split(self, args, kwargs) -> tuple[_Constants, list]:
        nums = {n % len(args) for n in self.static_argnums if -len(args) <= n < len(args)}
        static = tuple((i, args[i]) for i in sorted(nums)) + tuple(
            (k, kwargs[k]) for k in sorted(kwargs) if k in self.static_argnames
        )
        named = {k for k, _ in static}
        rest = _nnx.pack(
            (
                [None if i in nums else a for i, a in enumerate(args)],
                {k: v for k, v in kwargs.items() if k not in named},
            )
        )
        leaves, treedef = jax.tree.flatten(rest, is_leaf=is_weight)
        arrays = [x for x in leaves if _is_array(x)]
        constants = tuple(_ARRAY if _is_array(x) else x for x in leaves)
        return _Constants(treedef, constants, tuple(map(type, constants)), static), arrays

    def call(self, constants: _Constants, arrays):
        """(what the function returns, what it changed of the modules among its arguments)."""
        arrays = iter(arrays)
        leaves = [next(arrays) if x is _ARRAY else x for x in constants.leaves]
        (args, kwargs), modules = _nnx.unpack(jax.tree.unflatten(constants.treedef, leaves))
        for where, value in constants.static:
            (args if isinstance(where, int) else kwargs)[where] = value
        return self.fn(*args, **kwargs), _nnx.changes(modules)

    def jaxpr(self, constants, arrays):
        """The jaxpr of `call`, with plain arrays for adapted weights, and its output shapes."""
        bases = [x.base if is_weight(x) else x for x in arrays]
        bases = [x.abstract if is_quantized(x) else x for x in bases]
        return jax.make_jaxpr(self._trace, static_argnums=0, return_shape=True)(constants, *bases)


def _rejoined(traceable: Traceable, constants, *arrays):
    return traceable.call(constants, arrays)


class _Adapted(Traceable):
    def __init__(self, fn, strict, plan, static_argnums=(), static_argnames=()):
        super().__init__(fn, static_argnums, static_argnames)
        if plan not in PLANS:
            raise LoRAError(f"plan={plan!r} is not one of {', '.join(PLANS)}")
        self.strict, self.plan = strict, plan
        self._transform = functools.partial(_transformed, self)

    def __call__(self, args, kwargs):
        constants, arrays = self.split(args, kwargs)
        if not any(map(is_weight, arrays)):
            return self.fn(*args, **kwargs)
        try:
            hash(constants)
        except TypeError as e:
            raise LoRAError(
                "an argument that is neither an array nor hashable cannot be a constant of the "
                f"trace ({e}); pass it by closure: lora.adapt(lambda p, x: fn(p, x, thing))"
            ) from None
        if _compat.staging():
            out, changed = _transformed(self, constants, *arrays)
        else:  # executed at once, from a cached jaxpr: inner loops are compiled once
            jaxpr, shapes = jax.make_jaxpr(self._transform, static_argnums=0, return_shape=True)(
                constants, *arrays
            )
            outs = _compat.jaxpr_as_fun(jaxpr)(*jax.tree.leaves(arrays))
            out, changed = jax.tree.unflatten(jax.tree.structure(shapes), outs)
        _nnx.update((args, kwargs), changed)
        return out

    def interpret(self, constants, arrays) -> tuple[Any, Coverage]:
        """The outputs with adapted weights, and what became of each leaf."""
        jaxpr, shapes = self.jaxpr(constants, arrays)
        frozen = [_frozen(x) if is_weight(x) else x for x in _told_apart(arrays)]
        dropping = [x for x in frozen if is_weight(x) and x.drops] if self.plan == "merged" else []
        raise_all(
            'plan="merged" cannot drop inputs of the low-rank branch:',
            [f"'{x.origin}' has dropout {x.dropout}" for x in dropping],
            'lora.bind(params, adapters) without a dropout_key, or lora.adapt(fn, plan="auto")',
        )
        interpreter = Interpreter(self.plan)
        outs = interpreter.run(*_compat.live(jaxpr), frozen)
        unmoved = {id(x) for x in frozen}
        outs = [
            interpreter.returned(o) if is_weight(o) and id(o) not in unmoved else o for o in outs
        ]
        leaves = {x.origin: x.shape for x in frozen if is_weight(x) and not x.is_frozen}
        coverage = Coverage.of(leaves, interpreter.events)
        return jax.tree.unflatten(jax.tree.structure(shapes), outs), coverage


def _frozen(w: AdaptedWeight) -> AdaptedWeight:
    if len(w.axes) != w.ndim:
        raise LoRAError(
            f"the adapted weight '{w.origin}' has {w.ndim} axes here and {len(w.axes)} where it "
            "was bound: it was sliced or batched outside of the adapted function. Adapt the "
            "function that holds the loop: lora.adapt(lambda params, x: jax.lax.scan(layer, x, "
            "params))"
        )
    return w.with_base(jax.lax.stop_gradient(w.base))


def _told_apart(arrays):
    """The arrays, with leaves of one path in two bound trees named differently."""
    seen: collections.Counter = collections.Counter()
    for x in arrays:
        if is_weight(x):
            seen[x.origin] += 1
            if seen[x.origin] > 1:
                x = dataclasses.replace(x, origin=f"{x.origin} (tree {seen[x.origin]})")
        yield x


def _transformed(adapted: _Adapted, constants, *arrays):
    out, coverage = adapted.interpret(constants, arrays)
    if adapted.strict:
        coverage.check(getattr(adapted.fn, "__name__", repr(adapted.fn)))
    return out


def _is_array(x: Any) -> bool:
    return isinstance(x, AdaptedWeight | jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def coverage(
    fn: Callable, *args, plan="auto", static_argnums=(), static_argnames=(), **kwargs
) -> Coverage:
    """What `adapt(fn)(*args, **kwargs)` does with each adapted leaf, without computing anything.

    Args:
      fn: the plain function, not an adapted one.
      plan, static_argnums, static_argnames: as in `adapt`.
      *args, **kwargs: its arguments, with bound parameters; arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      A `Coverage`: print it, or ask it for `low_rank`, `materialised` and `unused` paths.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.ones((4, 3))}
    >>> adapters = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets="w"))
    >>> fn = lambda p, x: x @ p["w"]
    >>> lora.coverage(fn, lora.bind(params, adapters), jnp.ones((2, 4))).low_rank
    ('w',)
    """
    call = _Adapted(fn, False, plan, static_argnums, static_argnames)
    constants, arrays = call.split(args, kwargs)
    found = []
    jax.eval_shape(lambda xs: found.append(call.interpret(constants, xs)[1]), arrays)
    return found[0]
