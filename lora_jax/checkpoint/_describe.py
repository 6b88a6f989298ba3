"""Adapters and configurations as JSON: what a checkpoint says about itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._config import LoRAConfig, as_patterns
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.geometry import Geometry
from lora_jax._core.paths import flatten
from lora_jax._core.plain import has_function, plain
from lora_jax._nodes.adapters import DoRA, Full, LoRA, LowRank, Rows
from lora_jax._nodes.node import Node, array_names, is_node
from lora_jax._targets import Targets


def kind(cls: type) -> str:
    """What a description calls nodes of this class."""
    return cls.__name__.lower()


def own_classes() -> dict[str, type]:
    """{kind: class} of the library's own nodes, for a restore to which no adapters are passed: with
    them come their classes."""
    # Here, as it brings all methods and what they stand on: few restores need it.
    import lora_jax.methods as methods

    nodes = (LoRA, DoRA, Full, Rows, *vars(methods).values())
    is_class = lambda x: isinstance(x, type) and issubclass(x, Node) and x is not Node
    return {kind(cls): cls for cls in filter(is_class, nodes)}


def adapters_to_json(adapters: Any) -> dict[str, dict]:
    """{path: all that is static of its node, and the shapes and types of its arrays}."""
    return {p: node_to_json(n) for p, n in flatten(adapters, is_leaf=is_node).items()}


def node_to_json(node: Any) -> dict:
    """
    >>> node_to_json(Full(jax.ShapeDtypeStruct((2, 3), "float32")))
    {'kind': 'full', 'value': ['float32', [2, 3]]}
    """
    values = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    # A trained field is an array, or a tree of them in a node of the user's own.
    typed = lambda x: jax.tree.map(lambda x: [str(x.dtype), list(x.shape)], x)
    values |= {name: typed(values[name]) for name in array_names(node)}
    return plain({"kind": kind(type(node))} | values)


def nodes_from_json(described: Mapping[str, Mapping], adapters: Any, where: str) -> dict[str, Any]:
    """{path: the node, with shapes in the place of arrays} of what a checkpoint describes.

    Args:
      adapters: those that are restored into: they bring their classes. Only nodes with two factors
        are returned, which may grow; all others must be as those that were passed. None: all nodes,
        and each must be of a class of the library's own.
    """
    if adapters is None:
        classes = own_classes()
        raise_all(
            f"{where} holds adapters of classes that are not the library's own:",
            (f"'{p}' is a {x['kind']}" for p, x in described.items() if not _is_of(x, classes)),
            "pass adapters like them, arrays or shapes: lora.checkpoint.restore(manager, adapters, "
            "base=params)",
        )
    else:
        found = map(type, jax.tree.leaves(adapters, is_leaf=is_node))
        classes = {kind(cls): cls for cls in found if issubclass(cls, LowRank)}
    nodes, failures = {}, []
    for path, x in described.items():
        try:
            if _is_of(x, classes):
                nodes[path] = node_from_json(x, classes)
                # Sizes of arrays that do not fit one another, axes that there are not, no scale.
                failures += [f"'{path}': {p}" for p in [nodes[path].misfit(nodes[path].shape)] if p]
                float(getattr(nodes[path], "scale", 0))
        except (TypeError, ValueError, AttributeError, LookupError) as e:
            failures.append(f"'{path}': {e}")
    raise_all(f"{where} is damaged: these adapters are none:", failures, "restore another step")
    return nodes


def _is_of(x: Mapping, classes: Mapping[str, type]) -> bool:
    """Whether a description is one of these classes'."""
    cls = classes.get(x["kind"])
    # By the fields as well: a user's class may have the name of one of ours.
    return cls is not None and {"kind", *(f.name for f in dataclasses.fields(cls))} == x.keys()


def node_from_json(x: Mapping, classes: Mapping[str, type] | None = None) -> Any:
    """The node, with shapes in the place of arrays, of one of these classes or of the library's."""
    cls = (own_classes() if classes is None else classes)[x["kind"]]
    values = {}
    for field in dataclasses.fields(cls):
        value = x[field.name]
        if not field.metadata.get("static"):
            value = jax.ShapeDtypeStruct(tuple(value[1]), jnp.dtype(value[0]))
        elif field.name == "geometry":
            value = Geometry(**{k: tuple(v) for k, v in value.items()})
        # JSON has no tuples, and static fields are hashed.
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def config_to_json(config: LoRAConfig) -> dict:
    """The configuration, to be compared and, if it holds no function, to be made again.

    >>> import re
    >>> config_to_json(LoRAConfig(targets=re.compile("q|v")))["targets"]
    [{'regex': 'q|v', 'flags': 32}]
    """
    names = ("targets", "exclude", "full")
    patterns: dict[str, Any] = {name: as_patterns(getattr(config, name)) for name in names}
    return plain(dataclasses.replace(config, **patterns))


def config_from_json(x: Mapping) -> LoRAConfig | None:
    """The configuration, or None if a function was part of it."""
    return None if has_function(x) else LoRAConfig.from_json(x)


def as_config(config: LoRAConfig | Targets) -> LoRAConfig:
    config = config.config if isinstance(config, Targets) else config
    if not isinstance(config, LoRAConfig):
        raise LoRAError(
            f"expected a LoRAConfig or Targets, found {type(config).__name__}: "
            "config=lora.LoRAConfig(rank=8)"
        )
    return config


def another_config(config: LoRAConfig, adapters: Any) -> list[str]:
    """A line for each adapter whose rank, scale or dropout is not the configuration's."""
    lines = []
    for path, node in flatten(adapters, is_leaf=is_node).items():
        if isinstance(node, LowRank):
            rule = config.rule(path, jax.ShapeDtypeStruct(node.shape, node.a.dtype))
            want = (rule.rank, config.scale(rule.rank, rule.alpha), rule.dropout)
            found = (node.rank, node.scale, node.dropout)
            # Equal to the last bit: both scales are of one formula.
            if want != found:
                lines.append(
                    f"'{path}': rank, scale and dropout {want} by the configuration, found {found}"
                )
    return lines


def other_config(
    record: Mapping[str, Any], config: LoRAConfig | Targets | None, grow: bool
) -> list[str]:
    if config is None:
        return []
    # By way of JSON, as the saved one went: tuples are lists on both sides.
    mine = json.loads(json.dumps(config_to_json(as_config(config))))
    # What growing changes, and how the new part was drawn.
    ignored = ("rank", "alpha", "rules", "init") if grow else ()
    return [
        f"config: {name}={value!r} was saved, found {mine.get(name)!r}"
        for name, value in (record["config"] or {}).items()
        if mine.get(name) != value and name not in ignored
    ]
