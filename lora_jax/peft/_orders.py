"""In which order a square weight is stored in torch, which its shape does not say."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from lora_jax.peft._arguments import as_names


class Orders:
    """Which weights of a torch model are (in, out), as GPT-2's Conv1D; a Linear's is (out, in).

    Conv1D always has a bias, and the lengths of the biases beside the model's other weights say
    which of the two it uses.

    Args:
      shapes: {name: shape} of the model's parameters.
      conv1d: the ends of the names of modules that are Conv1D, all others are not; None: as the
        biases say.
      otherwise: what a weight is if no bias says anything.

    >>> gpt2 = {"up.weight": (4, 8), "up.bias": (8,), "c_proj.weight": (4, 4), "c_proj.bias": (4,)}
    >>> Orders(gpt2).in_out("c_proj.weight")
    True
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        conv1d: Sequence[str] | None = None,
        otherwise: bool = False,
    ):
        self.shapes, self.otherwise = shapes, otherwise
        self.conv1d = as_names(conv1d, "conv1d")

    def in_out(self, name: str) -> bool | None:
        """Whether a square weight is (in, out); None where it is not known: where the model has
        weights of both kinds, and of experts, which are stored in either order."""
        module = name.removesuffix(".weight")
        if self.conv1d is not None:
            return any(f".{module}".endswith("." + c) for c in self.conv1d)
        # A convolution's window of one position is no axis of experts.
        if {*self.shapes.get(name, ())[2:]} - {1}:
            return None
        # So it is no Conv1D.
        if f"{module}.bias" not in self.shapes:
            return False
        return None if len(self.votes) > 1 else next(iter(self.votes), self.otherwise)

    @functools.cached_property
    def votes(self) -> set[bool]:
        """Whether weights of the model are (in, out), where shapes say it."""
        votes = set()
        for name, shape in self.shapes.items():
            # Not square, with a bias, which has the length of the outputs.
            bias = tuple(self.shapes.get(name.removesuffix(".weight") + ".bias", ()))
            if len(shape) == 2 and shape[0] != shape[1] and len(bias) == 1 and bias[0] in shape:
                votes.add(bias[0] == shape[1])
        return votes
