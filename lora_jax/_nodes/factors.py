"""Effective factors: from what a method trains to plain `LoRA` nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._core.einsum import cast
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.paths import flatten, map_with_path
from lora_jax._nodes.adapters import LoRA, is_node
from lora_jax._nodes.indirect import AdaLoRA, Indirect, LoRAXS, VeRA

CALL = (
    "lora.methods.factors(adapters, frozen), with "
    "adapters, frozen = lora.methods.init_{}(key, params, config)"
)


def factors(adapters: Any, frozen: Any = None) -> Any:
    """Plain `LoRA` nodes of a tree of `VeRA`, `LoRAXS` or `AdaLoRA`: the same update as A·B.

    It is differentiable and for use inside of the loss, with only `adapters` trained:
    `loss = lambda adapters: f(lora.bind(params, lora.methods.factors(adapters, frozen)))`. What
    comes out is for all that takes LoRA: `bind`, `merge`, `combine`, `stack`, `dora`,
    `lora.peft.save`. The factors exist while the step needs them, and take the memory of a LoRA of
    that rank. Call it outside of `jax.shard_map`.

    Args:
      adapters: what the method trains. `LoRA`, `DoRA`, `Full` and `Rows` nodes stay as they are.
      frozen: the second tree that `init_vera` or `init_lora_xs` returned; no gradient flows to it.
        AdaLoRA needs none.

    Returns:
      A tree like `adapters`, with a `LoRA` in the place of each such node, in its dtype.

    Raises:
      LoRAError: `frozen` is missing, or of another method, other leaves, or too small; all leaves
        are listed.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"q": jnp.ones((4, 3))}
    >>> config = lora.LoRAConfig(rank=2, targets="q")
    >>> adapters, frozen = lora.methods.init_vera(jax.random.key(0), params, config)
    >>> node = lora.methods.factors(adapters, frozen)["q"]
    >>> type(node).__name__, node.a.shape, node.b.shape
    ('LoRA', (4, 2), (2, 3))
    """
    failures: list[str] = []
    shared = frozen is not None and _is_shared(frozen)
    of = {} if frozen is None or shared else flatten(frozen, is_leaf=is_node)

    def leaf(path, node):
        if not is_node(node):
            raise LoRAError(f"expected adapters, found a tree with a {_name(node)} at '{path}'")
        if isinstance(node, AdaLoRA):
            return _adalora(node)
        if isinstance(node, VeRA):
            problem = _vera_problem(node, frozen if shared else None)
        elif isinstance(node, LoRAXS):
            problem = _lora_xs_problem(node, of.get(path))
        else:
            return node
        if problem is not None:
            failures.append(f"'{path}' is a {_name(node)}: {problem}")
            return node
        return _vera(node, frozen) if isinstance(node, VeRA) else _lora_xs(node, of[path])

    out = map_with_path(leaf, adapters, is_leaf=is_node)
    raise_all("these adapters need the frozen arrays that they were made with:", failures)
    return out


def without_frozen(nodes: Mapping[str, Any], verb: str) -> dict[str, Any]:
    """The nodes with factors, of those that need no frozen arrays."""
    raise_all(
        "these adapters are no factors without their frozen arrays:",
        (f"'{p}' is a {_name(n)}" for p, n in nodes.items() if isinstance(n, VeRA | LoRAXS)),
        f"lora.{verb}(params, lora.methods.factors(adapters, frozen))",
    )
    return {p: _adalora(n) if isinstance(n, AdaLoRA) else n for p, n in nodes.items()}


def check_factors(nodes: Mapping[str, Any]) -> None:
    """Raises for nodes that are not factors yet."""
    raise_all(
        "these adapters are no factors yet:",
        (f"'{p}' is a {_name(n)}" for p, n in nodes.items() if isinstance(n, Indirect)),
        "pass lora.methods.factors(adapters, frozen); of AdaLoRA, lora.methods.factors(adapters) "
        "or "
        "lora.methods.pruned(adapters)",
    )


def _name(x: Any) -> str:
    return type(x).__name__


def _lora(node: Indirect, a: jax.Array, b: jax.Array) -> LoRA:
    return LoRA(a, b, node.scale, node.geometry, node.dropout, node.embedding)


def _adalora(node: AdaLoRA) -> LoRA:
    return _lora(node, node.p, _rows(node.lam, node.q) * node.q)


def _rows(x: jax.Array, b: jax.Array) -> jax.Array:
    """x (*batch, rank), to be multiplied with b (*batch, rank, *out)."""
    return jnp.expand_dims(x, tuple(range(x.ndim, b.ndim)))


def _vera(node: VeRA, frozen: Mapping[str, jax.Array]) -> LoRA:
    """Both vectors go into B: A stays a constant, and no gradient with regard to it is formed."""
    g, dtype = node.geometry, node.d.dtype
    a_shape, b_shape = g.factor_shapes(node.shape, node.rank)
    _, n_in, n_out = g.sizes(node.shape)
    a = _constant(frozen["a"][:n_in, : node.rank], dtype)
    b = _constant(frozen["b"][: node.rank, :n_out], dtype)
    n = len(g.batch_axes)
    b = b.reshape(b_shape[n:]) * jnp.expand_dims(node.b, n)
    a = jnp.broadcast_to(a.reshape(a_shape[n:]), a_shape)
    return _lora(node, a, b * _rows(node.d, b))


def _lora_xs(node: LoRAXS, frozen: LoRA) -> LoRA:
    dtype = node.r.dtype
    n = len(node.geometry.batch_axes)
    b = _constant(frozen.b, dtype)
    flat = b.reshape(*b.shape[: n + 1], -1)
    exact = dict(precision=jax.lax.Precision.HIGHEST)
    b = jnp.matmul(node.r, flat, **exact).reshape(b.shape)
    return _lora(node, _constant(frozen.a, dtype), b)


def _constant(x: jax.Array, dtype) -> jax.Array:
    return jax.lax.stop_gradient(cast(jnp.asarray(x), dtype))


def _is_shared(frozen: Any) -> bool:
    """Whether this is what VeRA shares."""
    arrays = lambda tree: all(hasattr(x, "ndim") for x in tree.values())
    return isinstance(frozen, Mapping) and set(frozen) == {"a", "b"} and arrays(frozen)


def _vera_problem(node: VeRA, frozen: Any) -> str | None:
    if frozen is None:
        return "expected its shared A and B: " + CALL.format("vera")
    _, n_in, n_out = node.geometry.sizes(node.shape)
    need = {"a": (n_in, node.rank), "b": (node.rank, n_out)}
    for name, want in need.items():
        found = jnp.shape(frozen[name])
        if len(found) != 2 or any(f < w for f, w in zip(found, want)):
            return f"expected a shared {name} of at least {want}, found {found}"
    return None


def _lora_xs_problem(node: LoRAXS, frozen: Any) -> str | None:
    if not isinstance(frozen, LoRA):
        what = "none" if frozen is None else f"a {_name(frozen)}"
        return f"expected its singular vectors, found {what}: " + CALL.format("lora_xs")
    want = (node.shape, node.rank, node.geometry)
    if (found := (frozen.shape, frozen.rank, frozen.geometry)) != want:
        return f"expected singular vectors of {want}, found {found}"
    return None
