"""Regular expressions from strangers, matched in polynomial time.

PEFT's configuration holds regular expressions (`rank_pattern`, a `target_modules` string), and
Python's matcher takes exponential time on some of them. Here the parsed expression is followed with
the *set* of positions that it can reach, which needs no backtracking.
"""

from __future__ import annotations

import re
import warnings
from re import _constants as op
from re import _parser as parser

from lora_jax._core.errors import LoRAError, quoted

MAX_LENGTH = 4096


MAX_DEPTH = 50


CALL = 4  # what an element costs beside its positions


MAX_STEPS = 1_000_000  # a quarter of a second, whatever a file holds


MORE_STEPS = 2000  # for each name, of which a usual expression takes 500, one of Unsloth's 4,000


LETTERS = (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN)


REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT)


ANCHORS = (op.AT_BEGINNING, op.AT_BEGINNING_STRING, op.AT_END, op.AT_END_STRING)


ANCHORS += (op.AT_BOUNDARY, op.AT_NON_BOUNDARY)


WORD = re.compile(r"\w")


CATEGORIES = {
    op.CATEGORY_DIGIT: re.compile(r"\d"),
    op.CATEGORY_NOT_DIGIT: re.compile(r"\D"),
    op.CATEGORY_SPACE: re.compile(r"\s"),
    op.CATEGORY_NOT_SPACE: re.compile(r"\S"),
    op.CATEGORY_WORD: re.compile(r"\w"),
    op.CATEGORY_NOT_WORD: re.compile(r"\W"),
}


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


class SafePattern:
    """A regular expression of PEFT's, for full matches.

    Args:
      text: the expression.
      where: the setting, for messages.
      budget: what it may take, together with others.
      before, after: expressions that go around it.

    Raises:
      LoRAError: it is none, or has what cannot be followed.

    >>> SafePattern(r".*\\.(q|v)_proj").fullmatch("layers.0.q_proj")
    True
    >>> SafePattern(r"(a+)+b").fullmatch("a" * 200)
    False
    """

    def __init__(self, text: str, where="pattern", budget=None, *, before="", after=""):
        self.budget = budget or Budget(where)
        if len(text) > MAX_LENGTH:
            raise LoRAError(f"{where}: a regular expression of {len(text):,} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what a later Python may read otherwise
                parser.parse(text)  # alone, so that no parenthesis of it closes one of `before`
                self.tree = parser.parse(before + text + after)
            if self.tree.state.flags & ~re.UNICODE:
                raise ValueError("flags are not supported")
            _check(self.tree, 0)
        except (re.error, ValueError, OverflowError, RecursionError) as e:
            why = quoted(str(e))[1:-1]
            raise LoRAError(f"{where}: {quoted(text)} is not a regular expression: {why}") from None

    def fullmatch(self, name: str) -> bool:
        return len(name) in self._all(self.tree, name, {0})

    def search_from_start(self, name: str) -> bool:
        """As `re.match` finds one."""
        return bool(self._all(self.tree, name, {0}))

    def _all(self, items, name, at: set[int]) -> set[int]:
        for kind, value in items:
            if not at:
                break
            at = self._one(kind, value, name, at)
        return at

    def _one(self, kind, value, name, at: set[int]) -> set[int]:
        """The positions after one element, from any of the positions `at`."""
        self.budget.spend(CALL + len(at) * (len(value) if kind is op.IN else 1))
        if kind in LETTERS:
            return {i + 1 for i in at if i < len(name) and _is(kind, value, name[i])}
        if kind is op.SUBPATTERN:
            return self._all(value[-1], name, at)
        if kind is op.BRANCH:
            return set().union(*(self._all(body, name, at) for body in value[1]))
        if kind in REPEATS:
            return self._repeat(*value, name, at)
        if kind is op.AT:
            return {i for i in at if _anchored(value, name, i)}
        return {i for i in at if bool(self._all(value[1], name, {i})) == (kind is op.ASSERT)}

    def _repeat(self, low, high, body, name, at: set[int]) -> set[int]:
        # After len(name) + 1 rounds one of them was empty, and could be repeated at will.
        low = min(low, len(name) + 1)
        for _ in range(low):
            if not at:
                break
            at = self._all(body, name, at)
        found, new, rounds = set(at), at, low
        while new and rounds < high:
            new = self._all(body, name, new) - found
            found |= new
            rounds += 1
        return found


def _check(items, depth: int) -> None:
    """Raises what cannot be followed."""
    if depth > MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    for kind, value in items:
        if kind is op.SUBPATTERN and not (value[1] or value[2]):
            _check(value[-1], depth + 1)
        elif kind is op.BRANCH:
            for body in value[1]:
                _check(body, depth + 1)
        elif kind in REPEATS:
            _check(value[-1], depth + 1)
        elif kind in (op.ASSERT, op.ASSERT_NOT) and value[0] == 1:
            _check(value[1], depth + 1)
        elif kind is op.AT and value not in ANCHORS:
            raise ValueError(f"{str(value).lower()} is not supported")
        elif kind is not op.AT and kind not in LETTERS:
            raise ValueError(f"{str(kind).lower()} is not supported")


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
    sides = [0 <= j < len(name) and bool(WORD.match(name[j])) for j in (i - 1, i)]
    return (sides[0] != sides[1]) == (value is op.AT_BOUNDARY)
