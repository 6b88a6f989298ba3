"""Adapters as values: sums, ranks, soups, comparison, stacks."""

from lora_jax.algebra._combine import combine, resize, scaled
from lora_jax.algebra._compare import Comparison, Likeness, compare
from lora_jax.algebra._extract import extract
from lora_jax.algebra._learned import Change, Learned, learned
from lora_jax.algebra._soups import dare, knots, prune, ties
from lora_jax.algebra._stack import choose, put, stack

__all__ = [
    "combine",
    "scaled",
    "resize",
    "extract",
    "ties",
    "dare",
    "prune",
    "knots",
    "compare",
    "Comparison",
    "Likeness",
    "learned",
    "Learned",
    "Change",
    "stack",
    "put",
    "choose",
]
