"""The base of nodes whose trained arrays are not yet factors: all of a `LoRA` but A and B.

Each holds what is trained and nothing else, so that optimisers, weight decay and checkpoints see
nothing else; `factors` makes plain `LoRA` nodes of them, by a pure function for each.
"""

from __future__ import annotations

import dataclasses

import jax

from lora_jax._core.geometry import Geometry, static
from lora_jax._nodes.adapters import LoRA
from lora_jax._nodes.node import Node


# kw_only: the arrays of a subclass, without defaults, may then come after these.
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Indirect(Node):
    """All that is static of the `LoRA` that a node stands for.

    Attributes:
      geometry: which axes of the leaf are which.
      scale: the constant before the update.
      dropout: rate on the branch's input.
      embedding: whether the leaf is a look-up table.
    """

    geometry: Geometry = static()  # noqa: RUF009
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)
    embedding: bool = static(default=False)

    def lora(self, a: jax.Array, b: jax.Array) -> LoRA:
        """The node with these factors, A (*batch, *in, rank) and B (*batch, rank, *out)."""
        return LoRA(a, b, self.scale, self.geometry, self.dropout, self.embedding)
