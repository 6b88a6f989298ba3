"""Regular expressions from strangers, matched in polynomial time.

PEFT's configuration holds regular expressions (`rank_pattern`, a `target_modules` string), and
Python's matcher takes exponential time on some of them. Here the parsed expression is followed with
the *set* of positions that it can reach, which needs no backtracking.
"""

from __future__ import annotations

import re
from re import _constants as op
from re import _parser as parser

from lora_jax._errors import LoRAError

MAX_LENGTH = 4096
MAX_STEPS = 20_000_000  # positions looked at, for all names together; one takes a few hundred
WORD = re.compile(r"\w")
CATEGORIES = {
    op.CATEGORY_DIGIT: re.compile(r"\d"),
    op.CATEGORY_NOT_DIGIT: re.compile(r"\D"),
    op.CATEGORY_SPACE: re.compile(r"\s"),
    op.CATEGORY_NOT_SPACE: re.compile(r"\S"),
    op.CATEGORY_WORD: re.compile(r"\w"),
    op.CATEGORY_NOT_WORD: re.compile(r"\W"),
}


class SafePattern:
    """A regular expression of PEFT's, for full matches.

    >>> SafePattern(r".*\\.(q|v)_proj").fullmatch("layers.0.q_proj")
    True
    >>> SafePattern(r"(a+)+b").fullmatch("a" * 200)
    False
    """

    def __init__(self, text: str, where: str = "pattern"):
        self.where, self.steps = where, 0
        if len(text) > MAX_LENGTH:
            raise LoRAError(f"{where}: a regular expression of {len(text):,} characters")
        try:
            self.tree = parser.parse(text)
            if self.tree.state.flags & ~re.UNICODE:
                raise ValueError("flags are not supported")
            self.fullmatch("")  # raises what cannot be followed
        except (re.error, ValueError, OverflowError, RecursionError) as e:
            raise LoRAError(f"{where}: {text[:80]!r} is not a regular expression: {e}") from None

    def fullmatch(self, name: str) -> bool:
        return len(name) in self._all(self.tree, name, {0})

    def search_from_start(self, name: str) -> bool:
        """As `re.match` finds one."""
        return bool(self._all(self.tree, name, {0}))

    def _all(self, items, name, at: set[int]) -> set[int]:
        for kind, value in items:
            at = self._one(kind, value, name, at)
        return at

    def _one(self, kind, value, name, at: set[int]) -> set[int]:
        """The positions after one element, from any of the positions `at`."""
        self.steps += 1 + len(at)
        if self.steps > MAX_STEPS:
            raise LoRAError(f"{self.where}: a regular expression that takes too long")
        if kind in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            return {i + 1 for i in at if i < len(name) and _is(kind, value, name[i])}
        if kind is op.SUBPATTERN:
            _, on, off, body = value
            if on or off:
                raise ValueError("flags are not supported")
            return self._all(body, name, at)
        if kind is op.BRANCH:
            return set().union(*(self._all(body, name, at) for body in value[1]))
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            return self._repeat(*value, name, at)
        if kind is op.AT:
            return {i for i in at if _anchored(value, name, i)}
        if kind in (op.ASSERT, op.ASSERT_NOT) and value[0] == 1:
            return {i for i in at if bool(self._all(value[1], name, {i})) == (kind is op.ASSERT)}
        raise ValueError(f"{str(kind).lower()} is not supported")

    def _repeat(self, low, high, body, name, at: set[int]) -> set[int]:
        # After len(name) + 1 rounds one of them was empty, and could be repeated at will.
        low = min(low, len(name) + 1)
        for _ in range(low):
            at = self._all(body, name, at)
        found, new, rounds = set(at), at, low
        while new and rounds < high:
            new = self._all(body, name, new) - found
            found |= new
            rounds += 1
        return found


def _is(kind, value, c: str) -> bool:
    if kind is op.LITERAL:
        return ord(c) == value
    if kind is op.NOT_LITERAL:
        return ord(c) != value
    if kind is op.ANY:
        return c != "\n"
    negated = bool(value) and value[0][0] is op.NEGATE
    return negated != any(_in(k, v, c) for k, v in value)


def _in(kind, value, c: str) -> bool:
    if kind is op.LITERAL:
        return ord(c) == value
    if kind is op.RANGE:
        return value[0] <= ord(c) <= value[1]
    return kind is op.CATEGORY and bool(CATEGORIES[value].match(c))


def _anchored(value, name, i) -> bool:
    if value in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
        return i == 0
    if value in (op.AT_END, op.AT_END_STRING):
        return i == len(name)
    if value in (op.AT_BOUNDARY, op.AT_NON_BOUNDARY):
        sides = [0 <= j < len(name) and bool(WORD.match(name[j])) for j in (i - 1, i)]
        return (sides[0] != sides[1]) == (value is op.AT_BOUNDARY)
    raise ValueError(f"{str(value).lower()} is not supported")
