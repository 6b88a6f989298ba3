"""Effective factors: from what a method trains to plain `LoRA` nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.paths import flatten, map_with_path
from lora_jax._core.placement import near
from lora_jax._nodes.adapters import Full, LowRank, Rows
from lora_jax._nodes.node import Node, is_node


def factors(adapters: Any, frozen: Any = None) -> Any:
    """Plain `LoRA` nodes of a tree of `VeRA`, `LoRAXS`, `AdaLoRA` or nodes of your own: the same
    update as A·B.

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
    >>> fn = lora.adapt(lambda p, x: x @ p["q"])
    >>> def loss(adapters):  # VeRA's two vectors are trained, and the model sees a LoRA
    ...     lora_tree = lora.methods.factors(adapters, frozen)
    ...     return jnp.sum(fn(lora.bind(params, lora_tree), jnp.ones((2, 4))))
    >>> jax.tree.map(jnp.shape, jax.tree.leaves(jax.grad(loss)(adapters)))
    [(2,), (3,)]
    """
    failures: list[str] = []
    flat = {} if frozen is None else flatten(frozen, is_leaf=is_node)
    # A node for each leaf, or none: then `frozen` itself is shared by all leaves.
    each = {path: x for path, x in flat.items() if is_node(x)}

    def leaf(path: str, node: Any) -> Any:
        if not is_node(node):
            raise LoRAError(f"expected adapters, found a tree with a {_name(node)} at '{path}'")
        try:
            return near(node).factors(near(each.get(path) if each else frozen))
        except LoRAError as problem:
            failures.append(f"'{path}' is a {_name(node)}: {problem}")
            # Every leaf is looked at; the one error comes below.
            return node

    out = map_with_path(leaf, adapters, is_leaf=is_node)
    raise_all("these adapters need the frozen arrays that they were made with:", failures)
    return out


def without_frozen(nodes: Mapping[str, Node], verb: str) -> dict[str, Any]:
    """The nodes with factors, of those that need no frozen arrays."""
    out, failures = {}, []
    for path, node in nodes.items():
        try:
            # What the node says is for `factors`; here the way out is another call.
            out[path] = near(node).factors()
        except LoRAError:
            failures.append(f"'{path}' is a {_name(node)}")
    raise_all(
        "these adapters are no factors without their frozen arrays:",
        failures,
        f"lora.{verb}(params, lora.methods.factors(adapters, frozen))",
    )
    return out


def check_factors(nodes: Mapping[str, Node]) -> None:
    """Raises for nodes that are no factors, nor values in the base's place."""
    plain = LowRank | Full | Rows
    rest = {p: n for p, n in nodes.items() if is_node(n) and not isinstance(n, plain)}
    # It does not override `factors`: it acts on the weight by `weight` alone.
    has_none = lambda n: type(n).factors is Node.factors
    raise_all(
        "these adapters are no factors yet:",
        (f"'{p}' is a {_name(n)}" for p, n in rest.items() if not has_none(n)),
        "pass lora.methods.factors(adapters, frozen); of AdaLoRA, lora.methods.factors(adapters) "
        "or lora.methods.pruned(adapters)",
    )
    raise_all(
        "these adapters have no factors:",
        (f"'{p}' is a {_name(n)}" for p, n in rest.items()),
        "they are for lora.bind and lora.merge",
    )


def _name(x: Any) -> str:
    return type(x).__name__
