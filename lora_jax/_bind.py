"""Parameters with adapted weights in place: a pytree, nothing is computed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.keys import as_key
from lora_jax._core.nnx import is_module, map_shared
from lora_jax._core.paths import flatten, map_with_path, nearest
from lora_jax._core.placement import check_placed, check_there
from lora_jax._nodes.factors import without_frozen
from lora_jax._nodes.node import NO_REF, Node, is_node, leaves_of
from lora_jax._nodes.weight import Coded, is_weight, own_axes
from lora_jax._quantized.waiting import is_waiting

if TYPE_CHECKING:
    import chex

CALL = "lora.bind(params, adapters, dropout_key={key})"


def bind(params: Any, adapters: Any, *, dropout_key: chex.PRNGKey | None = None) -> Any:
    """The parameter tree with its adapters in place, for a function made by `adapt`.

    Each adapted leaf becomes an `AdaptedWeight`; a leaf that is trained in full becomes its trained
    value, in the base's dtype; every other leaf is frozen: no gradient flows to it, but to an
    `nnx.Perturbation`. Boxes, dicts and `nnx.State`s are kept.

    Args:
      params: the base parameters: any pytree of arrays, boxed or not, or an NNX module.
      adapters: what `init` returned, or trained from it, or what `choose` took of a stack; None for
        a quantised base alone.
      dropout_key: draws the dropout masks of this call, different for each leaf, layer and use.
        Without one there is no dropout.

    Returns:
      A tree like `params`; of an NNX module, a new module that shares each Variable without an
      adapter: what an adapted call changes of them (random numbers, statistics, caches) or creates
      is changed in `params` itself, as by `nnx.jit`. For an `nnx.State` it is a new state: there,
      return what the call changes.

    Raises:
      LoRAError: adapters of another model (lists the paths that do not exist and the shapes that
        differ), parameters where adapters belong, or parameters that are bound already;
        adapters that need frozen arrays, see `factors`; leaves and adapters that do not lie on the
        same devices.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"q": {"kernel": jnp.ones((64, 32))}}
    >>> adapters = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=4, targets="q"))
    >>> lora.bind(params, adapters)
    {'q': {'kernel': AdaptedWeight('q/kernel', shape=(64, 32), dtype=float32, rank=4, scale=4.0)}}
    """
    nodes = {}
    if adapters is None:
        leaves_of(params, "lora.bind(params, None)")
    else:
        nodes = without_frozen(adapter_nodes(params, adapters, "bind"), "bind")
    key = None if dropout_key is None else as_key(dropout_key, CALL)

    def leaf(path: str, base: Any) -> Any:
        node = nodes.get(path)
        if node is None and is_waiting(base):
            # Without a node it is still no array: the interpreter reads it at each product.
            return Coded(base, origin=path, axes=own_axes(base))
        if node is None:
            return _frozen(base)
        return node.weight(base, path, key)

    # For a plain tree this is `map_with_path` alone.
    return map_shared(lambda tree: map_with_path(leaf, tree), params, nodes)


def adapter_nodes(params: Any, adapters: Any, verb: str) -> dict[str, Node]:
    """{path: node} of adapters that were checked against the parameters.

    Args:
      verb: for messages: the call's name, "bind", or the call with "{params}" and "{adapters}".
    """
    verb = verb if "{" in verb else f"lora.{verb}({{params}}, {{adapters}})"
    name = "model" if is_module(params) else "params"
    call = verb.format(params=name, adapters="adapters")
    call += f", with adapters = lora.init(key, {name}, config)"
    if "_lora_options" in vars(type(params)):
        raise LoRAError(
            "this module holds its adapters, lora.attach made it: "
            "model, adapters = lora.detach(adapted), then "
            + verb.format(params="model", adapters="adapters")
        )
    leaves = leaves_of(params, call)
    bound = [p for p, x in leaves.items() if is_weight(x)]
    if bound:
        raise LoRAError(
            f"these parameters are bound already ({len(bound)} leaves, first "
            f"'{bound[0]}'); start from the base parameters: {call}"
        )
    flat = flatten(adapters, is_leaf=is_node)
    if not flat or not any(map(is_node, flat.values())):
        what = "parameters or another tree" if flat else "an empty tree"
        what = f"a {type(adapters).__name__}" if [*flat] == [""] else what
        raise LoRAError(f"expected adapters, found {what}: {call}")
    failures = [
        f"'{p}' is a {type(x).__name__}, not an adapter" for p, x in flat.items() if not is_node(x)
    ]
    for path, node in flat.items():
        if not is_node(node):
            continue
        if path not in leaves:
            failures.append(
                f"'{path}' is adapted, but the parameters have no such leaf; nearest: "
                + ", ".join(nearest(path, leaves, 3))
            )
        elif not hasattr(leaves[path], "shape"):
            found = type(leaves[path]).__name__
            failures.append(f"'{path}' is adapted, and the parameters have a {found} there")
        elif not node.of_arrays:
            failures.append(f"the adapter of '{path}' holds what is no array")
        elif (problem := node.misfit(tuple(leaves[path].shape))) is not None:
            shapes = ", ".join(f"{n} {getattr(node, n).shape}" for n in node.dims)
            # Every array with one axis more or fewer: `choose` was forgotten, or was one too many.
            what = {1: f"a stack, {shapes}", -1: f"without their first axis, {shapes}"}
            problem = what.get(node.more_axes or 0, problem)
            failures.append(f"'{path}': {problem}")
        elif (problem := _other_type(node, leaves[path])) is not None:
            failures.append(f"'{path}': {problem}")
    if failures:
        call = _corrected(name, params, adapters, flat, leaves, verb) or call
    raise_all("the adapters do not belong to these parameters:", failures, call)
    check_there(leaves, flatten(adapters))
    check_placed(leaves, flat, flat)
    return flat


def _other_type(node: Node, leaf: Any) -> str | None:
    """Why the leaf's type cannot hold what the node makes of it, or None."""
    if isinstance(leaf, jax.Ref):
        return NO_REF
    for x in (leaf, *jax.tree.leaves(node)):
        try:
            _ = isinstance(x, np.ndarray) and jax.typeof(x)
        except TypeError:
            return f"{x.dtype} is no type of JAX's"
    is_a, dtype = jnp.issubdtype, getattr(leaf, "dtype", jnp.float32)
    own = {x.dtype for x in jax.tree.leaves(node) if hasattr(x, "dtype")}
    if not is_a(dtype, jnp.inexact) and (hasattr(node, "scale") or own != {dtype}):
        return f"the leaf is of {dtype}, to which an update in floats would be rounded"
    if hasattr(node, "magnitude") and any(is_a(x, jnp.complexfloating) for x in (*own, dtype)):
        return "DoRA's magnitudes are of real weights: adapt this leaf by LoRA alone"
    if not is_a(dtype, jnp.complexfloating) and any(is_a(x, jnp.complexfloating) for x in own):
        return f"the adapter is complex, the leaf of {dtype}"
    return None


def _corrected(
    name: str,
    params: Any,
    adapters: Any,
    flat: Mapping[str, Any],
    leaves: Mapping[str, Any],
    verb: str,
) -> str | None:
    """The call that was meant, where one is plain: another part of a tree, one of a stack."""
    call = lambda params=name, adapters="adapters": verb.format(params=params, adapters=adapters)
    nodes = {p: n for p, n in flat.items() if is_node(n) and n.of_arrays}
    fits = lambda path, node: path in leaves and node.misfit(tuple(leaves[path].shape)) is None
    if nodes and not any(p in leaves for p in nodes):
        first = next(iter(nodes))
        # Adapters of "q/kernel", and a tree with "params/q/kernel".
        for part in (p.removesuffix(first) for p in leaves if p.endswith(f"/{first}")):
            if all(fits(part + p, n) for p, n in nodes.items()):
                tree = "variables" if part == "params/" else name
                return f"they are of a part of this tree: {call(_part(tree, params, part))}"
        # Adapters of "params/q/kernel" or of "0/q/kernel", and a tree with "q/kernel".
        for part in (first.removesuffix(p) for p in leaves if first.endswith(f"/{p}")):
            within = {p.removeprefix(part): n for p, n in nodes.items() if p.startswith(part)}
            if all(fits(p, n) for p, n in within.items()):
                variables = part == "params/" and len(within) == len(nodes)
                other = dict(adapters=_part("adapters", adapters, part))
                meant = call(**dict(params='{"params": params}') if variables else other)
                return f"the adapters are of a tree that holds this one: {meant}"
    more = {n.more_axes for n in nodes.values()}
    if more == {1}:
        one = call(adapters="lora.algebra.choose(adapters, 0)")
        return f"the adapters are stacked, choose one: {one}"
    if more == {-1}:
        return (
            "one axis was taken of adapters that are not stacked: "
            f"{call()}, without lora.algebra.choose"
        )
    return None


def _part(name: str, tree: Any, part: str) -> str:
    """What one writes to get a part of a tree, by its path."""
    for key in part.strip("/").split("/"):
        if isinstance(tree, Mapping):
            # A checkpoint knows the tree by its paths alone, and not its levels.
            found = next((k for k in tree if str(k) == key), key)
            tree, name = tree.get(found, tree), f"{name}[{json.dumps(found)}]"
        elif isinstance(tree, Sequence):
            tree, name = tree[int(key)], f"{name}[{key}]"
        else:
            tree, name = getattr(tree, key), f"{name}.{key}"
    return name


def _frozen(x: Any) -> Any:
    """A leaf without an adapter: no gradient flows to it (`adapt` sees to the adapted ones)."""
    # Only a tracer carries a gradient; a concrete array stays the same object.
    if isinstance(x, jax.core.Tracer) and jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.stop_gradient(x)
    return x
