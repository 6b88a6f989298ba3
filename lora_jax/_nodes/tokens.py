"""Adapters that are active for some tokens alone, as an activated LoRA (aLoRA) is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax

from lora_jax._core.errors import LoRAError
from lora_jax._nodes.node import Node
from lora_jax._nodes.weight import AdaptedWeight, is_weight

if TYPE_CHECKING:
    import chex


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ForTokens(Node):
    """A node, and for which tokens its update is there; `lora.algebra.choose` makes them.

    Attributes:
      node: such as a `LoRA`.
      tokens: booleans, one for each position of the inputs of the leaf's products.
    """

    node: Any
    tokens: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.node.shape

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return self.node.misfit(shape)

    def factors(self, frozen: Any = None) -> ForTokens:
        return dataclasses.replace(self, node=self.node.factors(frozen))

    def weight(self, base: Any, path: str, key: chex.PRNGKey | None = None) -> AdaptedWeight:
        weight = self.node.weight(base, path, key)
        if not is_weight(weight) or weight.rows is not None or weight.gain is not None:
            raise LoRAError(
                f"'{path}' is a {type(self.node).__name__}, which changes more than an update that "
                "some tokens can do without: choose with a mask adapters that are LoRA alone"
            )
        return dataclasses.replace(weight, tokens=self.tokens)

    def merged(self, base: Any, sign: float = 1.0) -> jax.Array:
        raise LoRAError(
            "adapters that were chosen for some tokens cannot be merged, which would be for all: "
            "lora.merge(params, lora.algebra.choose(stacked, index))"
        )
