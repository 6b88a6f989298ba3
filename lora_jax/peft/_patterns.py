"""PEFT's ways to mean modules: by the end of a name, and by regular expressions in a map.

As many names, keys and expressions as a file has room for are looked up in about linear time; what
strangers' expressions may take beyond that is bounded by a `Budget`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lora_jax._core.errors import LoRAError
from lora_jax.peft._regex import MAX_LENGTH, Budget, SafePattern

# Nothing repeats: letters that mean themselves, dots that mean any, and both escaped.
PLAIN = re.compile(r"\^?(?:[\w.\-]|\\[.\-])+", re.ASCII)


MAX_EXPRESSIONS = 1000


def endings(name: str) -> Iterator[str]:
    """The name, and what is behind each of its dots.

    >>> list(endings("a.b.c"))
    ['a.b.c', 'b.c', 'c']
    """
    yield name
    for i, c in enumerate(name):
        if c == ".":
            yield name[i + 1 :]


class Patterns:
    """A map of patterns to values; the first one, in the file's order, that ends a name counts.

    >>> patterns = Patterns({"k.proj": 1, "^q": 2, ".*(q|o)": 3}, "alpha_pattern", Budget("file"))
    >>> [patterns.first(name, 8) for name in ("a.k_proj", "q", "a.q", "v")]
    [1, 2, 3, 8]
    """

    def __init__(self, values: Mapping[str, Any], where: str, budget: Budget):
        self.values, self.keys, self.budget = values, list(values), budget
        # (whether it is the whole name, length): (places of dots that mean any, {text: place})
        self.plain: dict[tuple[bool, int], tuple[set[tuple[int, ...]], dict[str, int]]] = {}
        self.expressions: list[tuple[int, SafePattern]] = []
        self.failures: list[str] = []
        for place, key in enumerate(self.keys):
            if len(key) > MAX_LENGTH:
                self.failures.append(f"{where}: a key of {len(key):,} characters")
            elif PLAIN.fullmatch(key):
                self._plain(place, key)
            elif len(self.expressions) == MAX_EXPRESSIONS:
                self.failures.append(f"{where}: more than {MAX_EXPRESSIONS} regular expressions")
                break
            else:
                self._expression(place, key, where)

    def _plain(self, place: int, key: str) -> None:
        whole = key.startswith("^")
        text = key[whole:]
        if "\\" in text:
            parts = re.findall(r"\\.|.", text)
            text = "".join("\0" if p == "." else p[-1] for p in parts)
        else:
            text = text.replace(".", "\0")
        dots = tuple(i for i, c in enumerate(text) if c == "\0") if "\0" in text else ()
        masks, texts = self.plain.setdefault((whole, len(text)), (set(), {}))
        masks.add(dots)
        texts.setdefault(text, place)

    def _expression(self, place: int, key: str, where: str) -> None:
        try:
            pattern = SafePattern(key, where, self.budget, before=r"(.*\.)?(", after=")$")
            self.expressions.append((place, pattern))
        except LoRAError as e:
            self.failures.append(str(e))

    def first(self, name: str, default: Any) -> Any:
        """The value of the first pattern that ends the name."""
        if not self.keys:
            return default
        places = list(self._places(name))
        for place, pattern in self.expressions:
            if places and place > min(places):
                break
            if pattern.search_from_start(name):
                places.append(place)
                break
        return self.values[self.keys[min(places)]] if places else default

    def _places(self, name: str) -> Iterator[int]:
        for ending in endings(name):
            for whole in (False, True) if ending is name else (False,):
                masks, texts = self.plain.get((whole, len(ending)), ((), {}))
                for dots in masks:
                    self.budget.spend(len(dots))
                    text = ending
                    for i in dots:
                        text = text[:i] + "\0" + text[i + 1 :]
                    if text in texts:
                        yield texts[text]
