"""Adapters of each token's own, of a stack; one for some tokens alone is a stack of one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax

from lora_jax._core.errors import LoRAError
from lora_jax._core.geometry import SLOT, Factor
from lora_jax._nodes.adapters import LoRA
from lora_jax._nodes.node import Node
from lora_jax._nodes.weight import AdaptedWeight, is_weight

if TYPE_CHECKING:
    import chex


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ForTokens(Node):
    """A stack of nodes of one leaf, and which of them each token has; `lora.algebra.choose` makes
    them.

    Attributes:
      node: such as a `LoRA`, each array with an axis of slots in front.
      slots: integers, one for each position of the inputs of the leaf's products, or one for all;
        -1 is no update.
    """

    node: Any
    slots: jax.Array

    @property
    def _one(self) -> Any:
        return jax.eval_shape(lambda node: jax.tree.map(lambda x: x[0], node), self.node)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._one.shape

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return self._one.misfit(shape)

    def weight(self, base: Any, path: str, key: chex.PRNGKey | None = None) -> AdaptedWeight:
        made: list[AdaptedWeight] = []

        def one(node: Any) -> tuple[jax.Array, jax.Array]:
            w = node.weight(base, path)
            if not is_weight(w) or w.rows is not None or w.gain is not None:
                raise LoRAError(
                    f"'{path}' is a {type(node).__name__}, which changes more than an update that "
                    "some tokens can do without: choose for tokens adapters that are LoRA alone"
                )
            made.append(w)
            return w.a.value, w.b.value

        a, b = jax.vmap(one)(self.node)
        front = lambda value, f: Factor(value, (SLOT, *f.dims))
        w = made[0]
        return dataclasses.replace(w, a=front(a, w.a), b=front(b, w.b), tokens=self.slots)

    def merged(self, base: Any, sign: float = 1.0) -> jax.Array:
        raise LoRAError(
            "adapters that were chosen token by token cannot be merged, which would be for all: "
            "lora.merge(params, lora.algebra.choose(stacked, index)), with one number"
        )


def remembering(node: Any, whole: Any, slot: jax.Array) -> Any:
    """The node of one slot of a stack, whose `weight` holds the stack itself.

    What it knows is no part of the tree. Each change of an array makes another node, which does not
    know of it.
    """
    # Frozen: its arrays stay those of the slot. A look-up reads rows, and no slot of each token.
    if isinstance(node, LoRA) and not node.embedding:
        object.__setattr__(node, "_of_stack", ForTokens(whole, slot))
    return node
