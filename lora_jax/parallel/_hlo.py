"""The collectives of a compiled program, from its text."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)


# What an instruction calls, by one name, calls=%fused, or by several, {%one, %two}. Not `body` and
# `condition`: loops are counted by themselves.
CALLED = re.compile(
    r"(?:calls|to_apply|branch_computations|(?:true|false)_computation)=(\{.*?\}|%[\w.-]+)"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that a compiled program sends between devices.

    Attributes:
      kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute" ...
      array: its dtype and shape on one device, as in "bf16[4096,1376]": of what goes in or of what
        comes out, whichever is larger.
      bytes: of that array.
      count: how many such there are in the program.
      times: how often each is executed: the product of the trip counts of the loops around it; None
        where one of these is not known.

    >>> import lora_jax as lora
    >>> found = lora.parallel.Collective("all-reduce", "f32[8,16]", 512, count=2, times=32)
    >>> found.bytes * found.count * found.times  # in one call of the program
    32768
    """

    kind: str
    array: str
    bytes: int
    count: int
    times: int | None


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    # All that follows the opening parenthesis: operands, then attributes.
    rest: str
    root: bool


# {computation: its instructions}
Blocks = Mapping[str, Sequence[Instruction]]
Names = Mapping[str, Instruction]


def collectives(text: str) -> tuple[Collective, ...]:
    """The collectives of a compiled program, from its text; the most bytes first.

    On TPU, a collective that runs beside other work appears in each of the fusions that it spans,
    some of them in other loops: it is counted where it starts. What the TPU compiler calls
    all-reduce-scatter, an all-reduce of which each device keeps a part, is a reduce-scatter here.
    """
    blocks, entry = _parse(text)
    names = {i.name: i for block in blocks.values() for i in block}
    found: collections.Counter = collections.Counter()
    # One entry for each array, kind and number of times, however many instructions there are.
    for kind, i, times in _executed(blocks, names, _started(blocks), entry, 1):
        found.update((kind, array, times) for array in _arrays(i, names))
    every = (
        Collective(kind, array, nbytes(array), n, times)
        for (kind, array, times), n in found.items()
    )
    return tuple(sorted(every, key=lambda c: (-c.bytes, c.kind, c.array, c.times or 0)))


def nbytes(array: str) -> int:
    """Bytes of an array such as `bf16[8,128]`: widths are in the names of all types but pred."""
    dtype, _, dims = array.removesuffix("]").partition("[")
    bits = re.search(r"\d+", dtype)
    width = 8 if dtype == "pred" else int(bits[0]) if bits else 0
    return math.ceil(width * math.prod(int(d) for d in dims.split(",") if d) / 8)


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """({computation: instructions}, the entry's name)."""
    blocks: dict[str, list[Instruction]] = {}
    block: list[Instruction] = []
    entry = ""
    # Without comments, such as /*index=5*/ within long tuples.
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            block = blocks.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        # [ROOT] %name = shape op(operands), attributes
        elif i := re.match(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)", line):
            # Up to "), ": the attributes name computations, which are no operands.
            operands = re.findall(r"%([\w.-]+)", i[5].split("), ")[0])
            block.append(Instruction(i[2], i[3], i[4], tuple(operands), i[5], bool(i[1])))
    return blocks, entry


def _channel(i: Instruction) -> str | None:
    found = re.search(r"channel_id=(\d+)", i.rest)
    return found and found[1]


def _started(blocks: Blocks) -> dict[str | None, str]:
    """{channel: the computation which starts it}, of collectives that span several fusions."""
    return {
        _channel(i): name
        for name, block in blocks.items()
        if any("AsyncCollectiveStart" in i.rest for i in block)
        for i in block
        if i.op in KINDS
    }


def _executed(
    blocks: Blocks,
    names: Names,
    started: Mapping[str | None, str],
    computation: str,
    times: int | None,
) -> Iterator[tuple[str, Instruction, int | None]]:
    """(kind, instruction, times) of the collectives in a computation and in those it calls."""
    for i in blocks.get(computation, ()):
        kind = i.op.removesuffix("-start")
        if kind in KINDS:
            # One that spans several fusions has the same channel in each: only its start counts.
            if started.get(_channel(i), computation) == computation:
                scatters = computation.startswith("all-reduce-scatter")
                yield "reduce-scatter" if scatters else kind, i, times
        elif i.op == "while":
            trips = _trips(i, blocks, names)
            inner = None if trips is None or times is None else times * trips
            yield from _executed(blocks, names, started, _named("body", i), inner)
        # These name the computation that async-start has called.
        elif i.op not in ("async-update", "async-done"):
            for called in CALLED.findall(i.rest):
                for callee in re.findall(r"[\w.-]+", called):
                    yield from _executed(blocks, names, started, callee, times)


def _arrays(i: Instruction, names: Names) -> list[str]:
    """What a collective sends: of each operand and its result the larger."""
    parts = lambda shape: re.findall(r"\w+\[[\d,]*\]", shape)
    given = [part for name in i.operands for part in parts(names[name].shape)]
    made = parts(i.shape)
    if i.op.endswith("-start") and len(made) >= 2 * len(given):
        # The result of a start is (operands, results, contexts).
        made = made[len(given) : 2 * len(given)]
    return [max(pair, key=nbytes) for pair in zip(given, made)] or made


def _trips(loop: Instruction, blocks: Blocks, names: Names) -> int | None:
    """The trip count as the compiler notes it. Where there is no note, as on TPU, it is that of a
    loop which counts up by a constant; None for any other loop."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known[1])

    def constant(name: str) -> int | None:
        # The bound of a loop may reach it by way of copies.
        i = names[name]
        while i.op == "copy":
            i = names[i.operands[0]]
        value = re.match(r"(-?\d+)\)", i.rest)
        return int(value[1]) if i.op == "constant" and value else None

    # for (i = start; i < stop; i += step), with i at one place of the tuple that the loop carries.
    root = lambda role: next(i for i in blocks[_named(role, loop)] if i.root)
    test, before, after = root("condition"), names[loop.operands[0]], root("body")
    if "direction=LT" not in test.rest or {before.op, after.op} != {"tuple"}:
        return None
    index = re.search(r"index=(\d+)", names[test.operands[0]].rest)
    if index is None:
        return None
    first, added = before.operands[int(index[1])], names[after.operands[int(index[1])]]
    start, stop = constant(first), constant(test.operands[1])
    step = next((n for n in map(constant, added.operands) if n), None)
    if added.op != "add" or start is None or stop is None or step is None:
        return None
    # ⌈(stop − start) / step⌉
    return max(0, -((start - stop) // step))


def _named(role: str, i: Instruction) -> str:
    return re.findall(rf"{role}=%?([\w.-]+)", i.rest)[0]
