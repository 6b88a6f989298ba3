"""Names of torch parameters and of leaves, in one spelling, and what is found by them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

# First names that stand for the whole network: one side may have them and the other not. Any
# other, such as "vision_tower" or "decoder", tells one part of a model from another.
WRAPPERS = frozenset(
    """
    params module base_model model transformer network net backbone lm
    bert roberta distilbert albert electra deberta mpnet gpt_neox rwkv mobilebert esm vit
    """.split()
)


class Names:
    """Leaves by their names in tokens: found by the same name, a longer one or a shorter one.

    What is left out at the beginning of the longer one holds no number.
    """

    def __init__(self):
        self.exact: dict[tuple[str, ...], list[str]] = {}
        self.ends: dict[tuple[str, ...], list[tuple[tuple[str, ...], str]]] = {}

    def add(self, tokens: tuple[str, ...], path: str) -> None:
        self.exact.setdefault(tokens, []).append(path)
        for first, rest in _shorter(tokens):
            self.ends.setdefault(rest, []).append((first, path))

    def find(self, tokens: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
        """(the first names that one side lacks, leaf)."""
        # The same name, then leaves with a longer one, then those with a shorter one.
        yield from (((), path) for path in self.exact.get(tokens, ()))
        yield from self.ends.get(tokens, ())
        for first, rest in _shorter(tokens):
            yield from ((first, path) for path in self.exact.get(rest, ()))


def _shorter(tokens: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    for i in range(1, len(tokens)):
        # Behind a number of a layer, q is the q of that layer and not of any other.
        if tokens[i - 1].isdecimal():
            break
        yield tokens[:i], tokens[i:]


def is_wrapper(first: Sequence[str]) -> bool:
    """Whether these first names say nothing of which part of a model it is.

    >>> is_wrapper(("base_model", "model")), is_wrapper(("vision_tower", "model"))
    (True, False)
    """
    return WRAPPERS.issuperset(first)


def is_head(name: str) -> bool:
    """Whether torch's name is a head's, which has no leaf of its own where it is the embedding."""
    *parents, module, last = ("", *name.split("."))
    return last == "weight" and "head" in module and is_wrapper([p for p in parents if p])


def tokens_of(parts: Sequence[str], flat: bool = False) -> tuple[str, ...]:
    """Names in a common spelling: lower case, a number at the end apart, each word if `flat`."""
    out: list[str] = []
    for part in parts if not flat else [word for p in parts for word in p.split("_")]:
        # layers_0, layers0 and layers.0 are one name.
        found = re.fullmatch(r"(.*?)_?(\d+)", part.lower())
        out += [t for t in found.groups() if t] if found else [part.lower()]
    return tuple(out)
