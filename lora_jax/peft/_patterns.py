"""PEFT's ways to mean modules: by the end of a name, and by regular expressions of strangers.

Python's matcher takes exponential time on some expressions. Here one is followed with the *set* of
positions that it can reach, which needs no backtracking, and a `Budget` bounds what all expressions
of a file may take. As many plain names and keys as a file has room for are looked up in about
linear time.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from lora_jax._core.errors import LoRAError, quoted

# Nothing repeats: letters that mean themselves, dots that mean any, and both escaped.
PLAIN = re.compile(r"\^?(?:[\w.\-]|\\[.\-])+")
MAX_EXPRESSIONS = 1000
MAX_LENGTH = 4096
MAX_DEPTH = 50
CALL = 4  # what a call costs beside its positions
COMPILE = 40  # what each part costs once
MAX_STEPS = 1_000_000  # a quarter of a second, whatever a file holds
MORE_STEPS = 2000  # for each name, of which a usual expression takes 300, one of Unsloth's 1,000

# An atom is what `re` itself matches in constant time: up to 64 letters that mean themselves, one
# letter of a class, or a place (^, \b). Classes are in ASCII: others take `re` long to compile.
_REPEAT = r"(?:([*+?])|\{(?!\})([0-9]*)(?:(,)([0-9]*))?\})\??"
_CLASS = r"\[\^?\]?(?:\\[ -MO-TV-tv-~]|[ -\[^-~])*\]"
_ESCAPE = r"\\(?:x..|0[0-7]{0,2}|[^NUux0-9])"
REPEAT = re.compile(_REPEAT)
ATOM = re.compile(
    rf"(?:[\w-]|\\\.){{1,64}}(?!{_REPEAT})|(?!{_REPEAT})(?:{_CLASS}|{_ESCAPE}|[^\\\[()|])"
)
OPEN = re.compile(r"\((?:\?(?::|P<\w+>|(<?[=!]))|(?!\?))")


class Budget:
    """How many positions all expressions of one file may look at, together.

    Args:
      where: the file, for the message.
      names: how many names there are to be matched.
    """

    def __init__(self, where: object = "pattern", names: int = 0):
        self.where, self.left = where, MAX_STEPS + MORE_STEPS * names

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise LoRAError(f"{self.where}: its regular expressions take too long")


class _Item(NamedTuple):
    """An atom or a group (its branches), how often, and which way it only looks: =, !, <=, <!."""

    body: re.Pattern[str] | list[list[_Item]]
    low: int
    high: float
    look: str | None


class SafePattern:
    r"""A regular expression of PEFT's, with the answers of `re` in bounded time.

    Args:
      text: the expression.
      where: the setting, for messages.
      budget: what it may take, together with others.
      before, after: expressions that go around it.

    Raises:
      LoRAError: it is none, or has flags, references back, atomic or conditional parts, comments.

    >>> SafePattern(r".*\.(q|v)_proj").fullmatch("layers.0.q_proj")
    True
    >>> SafePattern(r"(a+)+b").fullmatch("a" * 200)
    False
    """

    def __init__(
        self,
        text: str,
        where: str = "pattern",
        budget: Budget | None = None,
        *,
        before: str = "",
        after: str = "",
    ):
        self.budget = budget or Budget(where)
        if len(text) > MAX_LENGTH:
            raise LoRAError(f"{where}: a regular expression of {len(text):,} characters")
        try:
            with warnings.catch_warnings():
                # They are of what a later Python may read otherwise.
                warnings.simplefilter("ignore")
                whole = before + text + after
                self.branches, end = self._parse(whole, 0, 0)
                if end < len(whole):
                    raise ValueError("unbalanced parenthesis")
                # Alone, so that no parenthesis of it closes one of `before`.
                re.compile(text)
        except LoRAError:
            raise
        except (re.error, ValueError, OverflowError) as e:
            why = quoted(str(e))[1:-1]
            what = f"{quoted(text)} is not a regular expression that can be used"
            raise LoRAError(f"{where}: {what}: {why}") from None

    def _parse(self, text: str, i: int, depth: int) -> tuple[list[list[_Item]], int]:
        """The branches from `i` on, and where they end."""
        if depth > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        branches: list[list[_Item]] = [[]]
        while i < len(text) and text[i] != ")":
            self.budget.spend(COMPILE)
            if text[i] == "|":
                branches.append([])
                i += 1
                continue
            if found := ATOM.match(text, i):
                body, look, i = re.compile(found[0]), None, found.end()
            elif found := OPEN.match(text, i):
                look = found[1]
                body, i = self._parse(text, found.end(), depth + 1)
                if i == len(text):
                    raise ValueError("missing ), unterminated group")
                i += 1
            else:
                part = re.findall(r"(?s)\(\?\W?\w?|\[.{0,6}|\\?.", text[i:])[0]
                raise ValueError(f"{part} is not supported here")
            low, high = 1, 1
            if found := REPEAT.match(text, i):
                sign, least, comma, most = found.groups()
                low = int(least or sign == "+")
                high = int(most) if most else 1 if sign == "?" else math.inf
                # {n} is {n,n}; {n,} has no end.
                high = low if least and not comma else high
                i = found.end()
            branches[-1].append(_Item(body, low, high, look))
        return branches, i

    def fullmatch(self, name: str) -> bool:
        return len(name) in self._any(self.branches, name, {0})

    def match(self, name: str) -> bool:
        return bool(self._any(self.branches, name, {0}))

    def _any(self, branches: list[list[_Item]], name: str, at: set[int]) -> set[int]:
        """The positions after any of the branches, from any of the positions `at`."""
        found: set[int] = set()
        # All of them, and not the first that fits: what comes after decides.
        for items in branches:
            self.budget.spend(CALL + len(at))
            ends = at
            for item in items:
                ends = self._repeat(item, name, ends) if ends else ends
            found |= ends
        return found

    def _repeat(self, item: _Item, name: str, at: set[int]) -> set[int]:
        # After len(name) + 1 rounds one of them was empty, and could be repeated at will.
        low = min(item.low, len(name) + 1)
        for _ in range(low):
            if not at:
                break
            at = self._once(item, name, at)
        found, new, rounds = set(at), at, low
        # Only from positions that are new: a name has as many as letters, so this ends.
        while new and rounds < item.high:
            new = self._once(item, name, new) - found
            found |= new
            rounds += 1
        return found

    def _once(self, item: _Item, name: str, at: set[int]) -> set[int]:
        self.budget.spend(CALL + len(at))
        # `match` at i still sees what is before i, which \b and ^ ask for.
        if isinstance(item.body, re.Pattern):
            return {m.end() for i in at if (m := item.body.match(name, i))}
        if item.look is None:
            return self._any(item.body, name, at)
        return {i for i in at if self._sees(item.body, item.look, name, i)}

    def _sees(self, body: list[list[_Item]], look: str, name: str, i: int) -> bool:
        # Ahead: whether the body matches from i on.
        if look in "=!":
            return bool(self._any(body, name, {i})) == (look == "=")
        # Behind: whether it ends at i, from any position before.
        self.budget.spend(i)
        return (i in self._any(body, name, set(range(i + 1)))) == (look == "<=")


def endings(name: str) -> Iterator[str]:
    """The name, and what is behind each of its dots.

    >>> list(endings("a.b.c"))
    ['a.b.c', 'b.c', 'c']
    """
    yield name
    for i, c in enumerate(name):
        if c == ".":
            yield name[i + 1 :]


def matching_others(names: Collection[str]) -> set[str]:
    """Those that are no pattern for themselves alone: PEFT takes one for the end of a name, and a
    dot in it for any letter.

    >>> sorted(matching_others(["a.q", "q", "b.q", "k.v", "k_v", "x+y"]))
    ['k.v', 'q', 'x+y']
    """
    masks: dict[int, set[tuple[int, ...]]] = {}
    for name in names:
        dots = tuple(i for i, c in enumerate(name) if c == ".")
        masks.setdefault(len(name), set()).add(dots)
    found = {name for name in names if not PLAIN.fullmatch(name)}
    for name in names:
        for ending in endings(name):
            # The names that it would be, if they have their dots there.
            for dots in masks.get(len(ending), ()):
                text = "".join("." if i in dots else c for i, c in enumerate(ending))
                if text != name and text in names:
                    found.add(text)
    return found


@dataclasses.dataclass(frozen=True)
class Modules:
    """Modules that a setting means: by an expression for the whole name, or by ends of names.

    >>> "layers.0.q_proj" in Modules(frozenset(["q_proj"])), "q_proj" in Modules(frozenset())
    (True, False)
    """

    names: frozenset[str]
    expression: SafePattern | None = None

    def __contains__(self, module: str) -> bool:
        if self.expression is not None:
            return self.expression.fullmatch(module)
        return any(end in self.names for end in endings(module))


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of which modules are targets; `behind`: names before their number, () for any."""

    numbers: frozenset[int]
    behind: tuple[str, ...]

    def have(self, module: str) -> bool:
        """Whether a module is in one of them; by PEFT's rule, the first number that is a layer's.

        >>> layers = Layers(frozenset([1]), ())
        >>> layers.have("model.layers.1.q"), layers.have("model.layers.0.1.q"), layers.have("q")
        (True, False, False)
        """
        parts = module.split(".")
        numbers = [i for i, part in enumerate(parts[:-1]) if part.isdecimal()]
        # Without a pattern two names are in front.
        found = [i for i in numbers if i > 1] if not self.behind else []
        for name in self.behind:
            found += [i for i in numbers if f".{'.'.join(parts[:i])}".endswith(f".{name}")]
        return bool(found) and int(parts[found[0]]) in self.numbers


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
        # \0 stands for a dot that means any letter; what is escaped means itself.
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
            # A plain key that comes earlier in the file has won.
            if places and place > min(places):
                break
            if pattern.match(name):
                places.append(place)
                break
        return self.values[self.keys[min(places)]] if places else default

    def _places(self, name: str) -> Iterator[int]:
        # PEFT matches (.*\.)?(key)$: a key is an end of the name, and with ^ the whole of it.
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
