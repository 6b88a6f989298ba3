"""Bytes that a compiled program moves between a device's memory and its chip, from its text.

XLA's own count has also what passes within the chip's own memory (a TPU prefetches weights there),
and the whole of an array of which a gather reads a part.
"""

from __future__ import annotations

import math
import re

WIDTH = {"pred": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1}
# They move nothing, or their end does.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "iota"}
PARTS = ("gather", "dynamic-slice")


def traffic(text: str) -> int:
    """Results written and operands read by the instructions of the entry."""
    blocks, entry = parsed(text)
    sizes = {name: shape for block in blocks.values() for name, (shape, *_) in block.items()}
    total = 0
    for _, (shape, op, operands, rest) in blocks[entry].items():
        if op in FREE:
            continue
        if op == "while":
            raise ValueError("a loop: its body is not counted")
        if op in ("copy-start", "slice-start"):
            # (to, from, …) or (from, to, …): as many bytes as the smaller, at each end in memory
            ends = re.findall(r"\w+\[[\d,]*\]\{[^}]*\}", shape)[:2]
            moved = min(nbytes(re.sub(r"S\(\d+\)", "", x)) for x in ends)
            total += moved * sum("S(" not in x for x in ends)
            continue
        total += nbytes(shape)
        callee = re.search(r"calls=%?([\w.-]+)", rest)
        for k, name in enumerate(operands):
            inside = blocks[callee[1]] if callee and op == "fusion" else {}
            total += min(nbytes(sizes[name]), part(inside, k, sizes[name]))
    return total


def parsed(text: str):
    """({computation: {name: (shape, op, operands, rest)}}, the entry's name)."""
    blocks, entry, block = {}, "", {}
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            block = blocks.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif i := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)", line):
            block[i[1]] = i[2], i[3], re.findall(r"%([\w.-]+)", i[4].split("), ")[0]), i[4]
    return blocks, entry


def nbytes(shape: str) -> int:
    """The bytes of what lies in the device's memory: a layout with S(n) is of another one."""
    found = re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", shape)
    return sum(
        WIDTH[dtype] * math.prod(int(d) for d in dims.split(",") if d)
        for dtype, dims, layout in found
        if "S(" not in layout and dtype in WIDTH
    )


def part(inside: dict, k: int, whole: str) -> float:
    """Bytes that a fusion reads of operand k, where only parts of it are taken."""
    number = lambda rest: rest.split(")")[0]
    names = {
        n for n, (_, op, _, rest) in inside.items() if op == "parameter" and number(rest) == str(k)
    }
    read, on_chip = 0, nbytes(whole) == 0
    while names:
        name = names.pop()
        for other, (shape, op, operands, _) in inside.items():
            if name not in operands:
                continue
            if op == "bitcast":
                names.add(other)
            elif op in PARTS and operands[0] == name:
                read += nbytes(re.sub(r"S\(\d+\)", "", shape))
            else:
                return math.inf
    return math.inf if on_chip or not read else read
