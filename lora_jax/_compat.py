"""Everything that differs between JAX versions, or is not public in them: 0.10 to 0.12."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
from jax._src import core, source_info_util
from jax._src.interpreters import partial_eval
from jax.extend.core import Literal, jaxpr_as_fun

__all__ = [
    "CALLS",
    "Literal",
    "eqn_context",
    "is_unspecified",
    "jaxpr_as_fun",
    "live",
    "opened",
    "scan_counts",
    "shard_map_axes",
    "source_line",
    "staging",
]


# Primitives that call one body once, on all of their operands.
CALLS = ("jit", "pjit", "remat2", "remat", "checkpoint", "closed_call", "core_call")


def opened(jaxpr: Any) -> tuple[Any, tuple]:
    """(jaxpr, constants), of a ClosedJaxpr, a Jaxpr, or the one class for both of JAX 0.12."""
    return getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ()))


def live(jaxpr: Any) -> tuple[Any, tuple]:
    """`opened`, without the equations that no output depends on."""
    jaxpr, consts = opened(jaxpr)
    return partial_eval.dce_jaxpr(jaxpr, True, instantiate=True)[0], consts


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """(number of constants, number of carried values) of a scan equation."""
    if "ft_in" in params:  # since 0.11
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def shard_map_axes(params: dict[str, Any]) -> frozenset:
    """The mesh axes that a shard_map equation makes manual."""
    for name in ("newly_manual_axes", "manual_axes"):
        if name in params:
            return frozenset(params[name])
    return frozenset(params["mesh"].axis_names)


def is_unspecified(sharding: Any) -> bool:
    """Whether a sharding in a jit equation's parameters was left to the compiler."""
    return not isinstance(sharding, jax.sharding.Sharding)


@contextlib.contextmanager
def eqn_context(eqn: Any):
    """Binds what follows under an equation's own name stack, source line and JAX configuration."""
    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    traceback = eqn.source_info.traceback
    with source_info_util.user_context(traceback, name_stack=name_stack), eqn.ctx.manager:
        yield


def source_line(eqn: Any) -> str:
    """`file.py:line:column (function)` of what made the equation; "" if it is JAX's own code."""
    path, _, where = source_info_util.summarize(eqn.source_info).rpartition("/")
    return "/".join([*path.split("/")[-2:], where]).lstrip("/")


def staging() -> bool:
    """Whether operations are recorded, under a jit or the like, and not executed at once."""
    trace = core.trace_ctx.trace
    while trace is not None:
        if isinstance(trace, partial_eval.DynamicJaxprTrace):
            return True
        trace = getattr(trace, "parent_trace", None)
    return False
