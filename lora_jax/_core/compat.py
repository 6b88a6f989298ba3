"""What differs between versions of JAX (0.10 to 0.12) and of NumPy, or is not public in them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import module as linen
from jax._src import core, effects, source_info_util
from jax._src.interpreters import batching as private_batching
from jax._src.interpreters import partial_eval
from jax.experimental import jet
from jax.extend.core import Literal as Literal
from jax.extend.core import Primitive as Primitive
from jax.extend.core import jaxpr_as_fun as jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

# What `jax.checkpoint` is called, by version.
REMAT = ("remat2", "remat", "checkpoint")

# Primitives that call one body once, on all of their operands.
CALLS = ("jit", "pjit", *REMAT, "closed_call", "core_call")

# The option of jax.jit by which a function leaves no call behind where it is traced: since 0.12
# `True` stands for one that is dissolved later, when lowered.
INLINED = jax.Inline.JAX_EARLY if hasattr(jax, "Inline") else True


def opened(jaxpr: Any) -> tuple[Any, tuple]:
    """(jaxpr, constants), of a ClosedJaxpr, a Jaxpr, or the one class for both of JAX 0.12."""
    return getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ()))


def live(jaxpr: Any) -> tuple[Any, tuple]:
    """`opened`, without the equations that no output depends on."""
    jaxpr, consts = opened(jaxpr)
    # instantiate: inputs stay, used or not, as arguments go by position.
    return partial_eval.dce_jaxpr(jaxpr, True, instantiate=True)[0], consts


def unrepeatable(jaxpr: Any) -> bool:
    """Whether a program has effects that `jax.checkpoint` refuses, such as an ordered print."""
    return bool(effects.remat_allowed_effects.filter_not_in(jaxpr.effects))


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """(number of constants, number of carried values) of a scan equation."""
    if "ft_in" in params:  # since 0.11
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def shard_map_axes(params: dict[str, Any]) -> frozenset:
    """The mesh axes that a shard_map equation makes manual."""
    # The name differs by version; without either every axis of the mesh is manual.
    for name in ("newly_manual_axes", "manual_axes"):
        if name in params:
            return frozenset(params[name])
    return frozenset(params["mesh"].axis_names)


def is_unspecified(sharding: Any) -> bool:
    """Whether a sharding in a jit equation's parameters was left to the compiler."""
    # What is unspecified is a sentinel of a class that JAX keeps private.
    return not isinstance(sharding, jax.sharding.Sharding)


@contextlib.contextmanager
def eqn_context(eqn: Any, scopes: slice = slice(None)) -> Generator[None, None, None]:
    """Binds what follows under an equation's own scopes, source line and JAX configuration."""
    # The names that profiles and HLO show: those of the trace outside, then the equation's.
    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack[scopes]
    traceback = eqn.source_info.traceback
    # `ctx`: the compute type, mesh and XLA metadata under which the equation was traced.
    with source_info_util.user_context(traceback, name_stack=name_stack), eqn.ctx.manager:
        yield


def scopes(eqn: Any) -> tuple[str, ...]:
    """The names of an equation's scopes, outermost first; "" for those that JAX makes."""
    return tuple(getattr(s, "name", "") for s in eqn.source_info.name_stack.stack)


def source_line(eqn: Any) -> str:
    """`file.py:line:column (function)` of what made the equation; "" if it is JAX's own code."""
    path, _, where = source_info_util.summarize(eqn.source_info).rpartition("/")
    # With its last two folders: files of several models may share a name.
    return "/".join([*path.split("/")[-2:], where]).lstrip("/")


def same_vma(*arrays: Any) -> list:
    """The arrays, all varying over the manual mesh axes that any of them varies over."""
    # jax.lax inserts such casts by itself; a primitive that is bound directly does not.
    union = frozenset().union(*map(varying, arrays))
    return [vary(x, union) for x in arrays]


def varying(x: Any) -> frozenset:
    """The manual mesh axes over which x may differ, under shard_map."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def less(a: Any, b: Any) -> bool:
    """a < b, of sizes; False where those of symbolic shapes leave it open."""
    try:
        return bool(a < b)
    except core.InconclusiveDimensionOperation:
        return False


def manual(x: Any) -> bool:
    """Whether x is inside a shard_map."""
    manual = jax.sharding.AxisType.Manual
    return manual in jax.typeof(x).sharding.mesh.axis_types


def mapped(x: Any) -> int:
    """How many of x there are for each of it, by the vmaps inside of the innermost jit; 1: none."""
    count = 1
    while isinstance(x, private_batching.BatchTracer):
        count *= 1 if x.batch_dim is None else x.val.shape[x.batch_dim]
        x = x.val
    return count


def vary(x: Any, axes: Iterable[str]) -> Any:
    """x, varying over `axes` as well."""
    missing = tuple(sorted(set(axes) - varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def abstract(
    shape: Sequence[int], dtype: Any, sharding: Any, arrays: Sequence[Any]
) -> jax.ShapeDtypeStruct:
    """The type of what is made of arrays: with a sharding, if that is part of theirs, and varying
    over the manual mesh axes that any of them varies over."""
    # Abstract arrays, as in a survey: nothing more is known of them.
    if not all(isinstance(x, jax.core.Tracer | jax.Array) for x in arrays):
        return jax.ShapeDtypeStruct(shape, dtype)
    axes = frozenset().union(*map(varying, arrays))
    typed = axes or explicit_sharding(arrays[0]) is not None
    manual = jax.sharding.ManualAxisType(varying=axes) if axes else None
    where = sharding if typed else None
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where, manual_axis_type=manual)


def out_avals(fn: Callable, avals: tuple) -> list:
    """The types of fn's outputs, with shardings and the manual mesh axes that they vary over."""
    return list(jax.make_jaxpr(fn)(*avals).out_avals)


def explicit_sharding(x: Any) -> Any:
    """The sharding that is part of x's type, or of the type x, or None if the compiler decides."""
    sharding = (x if isinstance(x, core.ShapedArray) else jax.typeof(x)).sharding
    explicit = jax.sharding.AxisType.Explicit
    return sharding if explicit in sharding.mesh.axis_types else None


def lying_as(x: jax.Array, like: Any) -> jax.Array:
    """x with the sharding of `like`, or of that type, where it is part of types."""
    where = explicit_sharding(like)
    return x if where is None else jax.sharding.reshard(x, where)


def one_device(x: Any) -> bool:
    """Whether the shape of x is what one device holds: no mesh axis is left to the compiler."""
    mesh = jax.typeof(x).sharding.mesh
    # A manual axis counts as one device: under shard_map a shape is that of a part.
    return all(
        size == 1 or kind == jax.sharding.AxisType.Manual
        for size, kind in zip(mesh.axis_sizes, mesh.axis_types)
    )


def intercepted() -> bool:
    """Whether methods of Linen are called within `nn.intercept_methods`."""
    return len(linen._global_interceptor_stack) > 0


def platform(x: Any) -> str:
    """What x is computed on, "cpu", "gpu" or "tpu": by the mesh in its type, else JAX's default."""
    device = getattr(jax.typeof(x).sharding.mesh, "abstract_device", None)
    if device is None:
        return jax.default_backend()
    return "tpu" if device.device_kind.startswith("TPU") else "gpu"


def is_float_type(x: Any) -> bool:
    """Whether this is a floating type, or the name of one. To NumPy None is float64, and an array
    or, by version, any class is what its attribute says."""
    of_class = isinstance(x, type) and (
        issubclass(x, np.generic | float) or isinstance(getattr(x, "dtype", None), np.dtype)
    )
    try:
        named = of_class or isinstance(x, str | np.dtype)
        return named and jnp.issubdtype(jnp.dtype(x), jnp.floating)
    except (TypeError, ValueError):
        return False


def lowered_for(lowered: Any) -> tuple[jax.Device, ...]:
    """The devices that a function was lowered for, by its arguments' shardings and its own."""
    lowered = getattr(lowered, "lowered", lowered)  # as in Flax's wrapper
    return tuple(getattr(getattr(lowered, "_lowering", None), "_device_list", None) or ())


def staging() -> bool:
    """Whether operations are recorded, under a jit or the like, and not executed at once."""
    trace = core.trace_ctx.trace
    # A JVP's or vmap's trace may be on top; what records is further out.
    while trace is not None:
        if isinstance(trace, partial_eval.DynamicJaxprTrace):
            return True
        trace = getattr(trace, "parent_trace", None)
    return False


def primitive(
    name: str,
    impl: Callable,
    *,
    jvp: Callable | None = None,
    transpose: Callable | None = None,
    batch: Callable | None = None,
    derived: Callable | None = None,
    typed: Callable | None = None,
    once: bool = False,
    **platforms: Callable,
) -> Primitive:
    """A primitive with several results that lowers to the plain function `impl(*args, **params)`.

    Its rules see plain values: None is a tangent or cotangent that is zero, a linear argument of a
    transpose is its type, and a batched argument has the new axis in front.

      jvp(primals, tangents, **params) -> (results, their tangents)
      transpose(cotangents, *args, **params) -> the cotangents of the arguments
      batch(size, args, batched, **params) -> (results, which of them are batched)

    Without a rule, and by `jet`, `derived`, by default `impl`, is differentiated or batched.
    `platforms` are lowered in the place of `impl` on "cpu", "tpu", "cuda" or "rocm": only the one
    that is asked for is traced. `typed` gives results of the same types as `impl`, by a shorter
    trace. `once`: what is lowered is a function of its own, one for all equations that are alike.
    """
    p = Primitive(name)
    p.multiple_results = True
    derived = derived or impl

    # Each equation asks for its types, and this traces `impl`: kept by types and parameters.
    @functools.lru_cache(maxsize=1024)
    def avals(*args: Any, **params: Any) -> list:
        return out_avals(functools.partial(typed or impl, **params), args)

    def jvp_rule(primals: Sequence, tangents: Sequence, **params: Any) -> tuple[list, list]:
        if jvp is None:
            tangents = tuple(map(ad.instantiate_zeros, tangents))
            return jax.jvp(functools.partial(derived, **params), tuple(primals), tangents)
        outs, touts = jvp(primals, [_nonzero(t) for t in tangents], **params)
        return outs, [_zero(y) if t is None else t for y, t in zip(outs, touts)]

    def transpose_rule(cts: Sequence, *args: Any, **params: Any) -> list:
        assert transpose is not None  # else this rule is not registered
        # An argument that is transposed comes as UndefinedPrimal: a type without a value.
        linear = [ad.is_undefined_primal(x) for x in args]
        args = tuple(x.aval if is_linear else x for x, is_linear in zip(args, linear))
        cts = [_nonzero(ct) for ct in cts]
        some = any(ct is not None for ct in cts)
        outs = transpose(cts, *args, **params) if some else [None] * len(args)
        # Each linear argument gets a cotangent, a symbolic zero at least; the others None.
        zero = lambda x, out: ad.Zero(x) if out is None else out
        return [
            zero(x, out) if is_linear else None for x, out, is_linear in zip(args, outs, linear)
        ]

    def batch_rule(args: Sequence, dims: Sequence, **params: Any) -> tuple[list, list]:
        # dims: the batched axis of each argument, or None
        (size,) = {x.shape[d] for x, d in zip(args, dims) if d is not None}
        args = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims)]
        batched = [d is not None for d in dims]
        if batch is None:
            fn = jax.vmap(functools.partial(derived, **params), [0 if b else None for b in batched])
            outs = fn(*args)
            return outs, [0] * len(outs)
        outs, batched = batch(size, args, batched, **params)
        return outs, [0 if b else None for b in batched]

    # Outside of any jit it runs as one compiled program, and not by the steps of `impl`.
    p.def_impl(_of_one_trace(p.bind))
    p.def_abstract_eval(avals)
    # Lowered inline: what is compiled is `impl` itself, and no call.
    for platform, fn in {None: impl, **platforms}.items():
        fn = _of_one_trace(fn) if once else fn
        mlir.register_lowering(p, mlir.lower_fun(fn, multiple_results=True), platform=platform)
    ad.primitive_jvps[p] = jvp_rule
    if transpose is not None:
        ad.primitive_transposes[p] = transpose_rule
    batching.primitive_batchers[p] = batch_rule
    jet.jet_rules[p] = lambda primals, series, **params: jet.jet(
        functools.partial(derived, **params), tuple(primals), tuple(series)
    )
    return p


def _of_one_trace(fn: Callable) -> Callable:
    """fn(*args, **params) by way of a jitted function, one for all equal parameters."""

    @functools.lru_cache(maxsize=1024)
    def jitted(**params: Any) -> Callable:
        return jax.jit(functools.wraps(fn)(functools.partial(fn, **params)))

    return lambda *args, **params: jitted(**params)(*args)


def _nonzero(tangent: Any) -> Any:
    return None if type(tangent) is ad.Zero else tangent


def _zero(primal: Any) -> ad.Zero:
    return ad.Zero(jax.typeof(primal).to_tangent_aval())


def instantiated(primals: Sequence[Any], tangents: Sequence[Any]) -> list:
    """The tangents as arrays: zeros of the primal's type for None."""
    full = lambda x: ad.instantiate_zeros(_zero(x))
    return [full(x) if t is None else t for x, t in zip(primals, tangents)]
