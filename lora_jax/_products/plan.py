"""The plan: which products a low-rank update is made of, decided from shapes when traced.

A group is one input x with T rows and d columns, and the weights W_i (d, k_i) that multiply it,
each with an update of rank r_i. There are three ways to y_i = x·W_i + s·(x·A_i)·B_i, and the same
three for the gradient of x, decided one by one. More than the base products, at b bytes a number:

             FLOPs                 bytes moved
  hidden     2·T·d·Σr              b·T·d                x·A, all the A_i side by side
  up         2·T·Σr·k              4·b·T·Σk             (x·A)·B written, read with x·W, sum written
  down       2·T·d·Σr              2·b·T·d              the same for the gradient of x, through Aᵀ
  merge      2·d·Σr·k              4·b·d·Σk             A·B written and read, W read, W' written
  join       2·T·Σr·k              2·b·d·(T + Σk)       [x, x·A] and [W; B] written, each once
  join back  2·T·d·Σr              2·b·(T + d)·Σk       [g, s·g·Bᵀ] and [W, A] written, each once,
                                   − 2·b·n·T·d          n terms of dx neither written nor read

The gradients of A and B are xᵀ·(g·Bᵀ) and (x·A)ᵀ·g whatever the plan; no product of the size of W
is among them. So in training, where x·A is needed for the gradient of B anyway, the forward pass
is merged if `merge` < `up` and the backward pass if `merge` < `down`; for one layer that is
T > d and T > c·k, with c between 1 (FLOPs alone, high rank) and 2 (bytes alone, low rank).
Without a gradient it is `merge` < `hidden` + `up`. Under remat the forward pass is made
twice, and so are both sides of the comparison.

"Beside" is one product, [x, x·A]·[W; B], whose result is written once, and one for the gradient
of x, of all the weights: [g_1, …, s·g_1·B_1ᵀ, …]·[W_1, …, A_1, …]ᵀ. The update is added in the
product's accumulator, so no bit of W is lost in low precision, and a policy of `jax.checkpoint`
that saves products saves one array. On a GPU what is put side by side is written, as in the table;
`join` takes the place of `up`, and `join back` that of `down`. A weight in codes is written for its
product anyway: that is no copy. A TPU's compiler reads what is put side by side within the product,
but not what it slices as well, as in a scan over layers, and a whole step loses other fusions by
it; a CPU's product is a library's, of whole arrays. On these two "auto" leaves it.

FLOPs are made comparable with bytes by a machine balance of 16 FLOPs a byte: fp32 on a CPU core
(100 GFLOP/s, 6 GB/s a core when all are busy) and on an H100 outside of its tensor cores (67
TFLOP/s, 3.35 TB/s). The choice depends on it little, as merging changes FLOPs and bytes alike, and
"beside" has the FLOPs of the factors.

Rows with an adapter each, of K, are another matter: T rows in G groups that share one. Each of the
two factors, (d, k) say, is one of K matrices, and more than nothing is

                  FLOPs         bytes moved
  gathered        2·T·d·k       3·b·G·d·k               each group's matrix read, written and read;
                                                        b·G·d·k where that is one pass, see below
  summed          2·T·d·k       b·G·d·k                 d terms in one pass with the sum of y: on
                                                        a CPU, of few terms, for few groups
  one by one      4·2·T·d·k     b·G·d·k                 where it lies, in a loop of G steps, by one
                                                        core: on one device of a CPU alone
  concatenated    2·T·K·d·k     b·K·(d·k + 2·T·min(d, k))   all matrices side by side, and x or the
                                                        result at each slot

Measured on two CPU cores, d = 512, r = 8: a product with B is best summed, and one with A gathered
from about 16 rows a group on, and concatenated where K·r is below about 64. `ragged_dot` of rows
that are sorted is none of them: XLA makes K masked products of it on CPUs and GPUs, and on a TPU
v5e it moves more bytes than concatenated. Where there are matrix units, a byte is worth more FLOPs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lora_jax._core.compat import less

BALANCE = 16  # FLOPs a byte; whole, as sizes of symbolic shapes take no fractions
MATRIX_UNITS = 200  # the same of bf16 on an H200 or a TPU v5e: 206 and 240
STEP = 100_000  # FLOPs in the time of one step of a loop on a CPU, about 1 µs

WAYS = ("factored", "merged", "beside")
PLANS = ("auto", *WAYS)
AWARE = "merge-aware"  # as merged, by a base that holds the update and rounds what it merges
MERGING = ("merged", AWARE)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The way of each pass, one of WAYS or AWARE, and whether the products with A are made as one.

    Attributes:
      infer: of a forward pass that is not differentiated.
      forward: of one that is.
      backward: of the gradient of the input.
      shared: one product with all the A side by side.
    """

    infer: str = "factored"
    forward: str = "factored"
    backward: str = "factored"
    shared: bool = False

    def __str__(self) -> str:
        passes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[:3]}
        found = [way for way in (*WAYS, AWARE) if way in passes.values()]
        if len(found) == 1:
            how = found
        else:  # what is not said is factored
            of = lambda way: ", ".join(name for name, w in passes.items() if w == way)
            how = [f"{way} ({of(way)})" for way in found if way != "factored"]
        return ", ".join(how + ["shared"] * self.shared)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What each part costs, in FLOPs, with bytes at the machine's balance; see the table above."""

    hidden: float
    up: float
    down: float
    merge: float
    join: float
    join_back: float

    @classmethod
    def of(
        cls,
        rows: int,
        inner: int,
        outs: Sequence[int],
        ranks: Sequence[int],
        itemsize: int,
        copied: int | None = None,
    ) -> Costs:
        """`copied`: Σk of the weights that are copied to be joined, by default all."""
        rank, out = sum(ranks), sum(outs)
        copied = out if copied is None else copied
        rank_out = sum(r * k for r, k in zip(ranks, outs))
        byte = BALANCE * itemsize
        return cls(
            hidden=2 * rows * inner * rank + byte * rows * inner,
            up=2 * rows * rank_out + byte * 4 * rows * out,
            down=2 * rows * inner * rank + byte * 2 * rows * inner,
            merge=2 * inner * rank_out + byte * 4 * inner * out,
            join=2 * rows * rank_out + byte * 2 * inner * (rows + copied),
            join_back=2 * rows * inner * rank
            + byte * 2 * (rows * out + inner * copied - rows * inner * len(outs)),
        )


def planned(
    mode: str,
    rows: int,
    inner: int,
    outs: Sequence[int],
    ranks: Sequence[int],
    itemsize: int,
    mergeable: bool,
    joinable: bool = False,
    copied: int | None = None,
) -> Plan:
    """The plan of one group.

    `mergeable` and `joinable` say whether "auto" may do so: whether the merged weight would keep
    every bit, and, for both, T is the number of rows on the device. Where the shapes are symbolic
    and a comparison is open, nothing is merged, joined or shared. `copied` as in `Costs.of`.
    """
    # One product reads x once, not once for each weight; the A are copied side by side for it.
    shared = less(2 * sum(ranks), (len(ranks) - 1) * rows)
    if mode != "auto":
        return Plan(mode, mode, mode, shared)
    # Merging without a gradient spares x·A as well: `extra`.
    c = Costs.of(rows, inner, outs, ranks, itemsize, copied)

    def cheapest(factored: float, joined: float, extra: float = 0) -> str:
        way = "factored"
        if joinable and less(joined, factored):
            way, factored = "beside", joined
        return "merged" if mergeable and less(c.merge, factored + extra) else way

    return Plan(
        cheapest(c.up, c.join, c.hidden),
        cheapest(c.up, c.join),
        cheapest(c.down, c.join_back),
        shared,
    )


SLOT_WAYS = ("gathered", "summed", "one by one", "concatenated")
FEW = 16  # terms of a sum
RUN = 32  # rows that "one by one" looks at together, from four times as many on


def way_by_slot(
    groups: int,
    rows: int,
    inner: int,
    outer: int,
    slots: int,
    itemsize: int,
    platform: str,
    local: bool,
    sums: bool = True,
) -> str:
    """The way to a product of rows with a matrix (inner, outer) of their own, one of `slots`; see
    the table above. `groups` of `rows` rows each have one; `local`: on one device; `sums`: a
    product, and not the gradient of the stack."""
    if platform == "cpu" and sums and less(inner, FEW + 1) and less(groups, 4 * RUN):
        return "summed"
    byte = itemsize * (BALANCE if platform == "cpu" else MATRIX_UNITS)
    numbers, flops = inner * outer, 2 * groups * rows * inner * outer
    fused = platform != "cpu" and sums and isinstance(rows, int) and rows == 1
    way, least = "gathered", flops + byte * (1 if fused else 3) * groups * numbers
    small = inner if less(inner, outer) else outer
    all_slots = slots * flops + byte * slots * (numbers + 2 * groups * rows * small)
    if less(all_slots, least):
        way, least = "concatenated", all_slots
    # A loop over rows that lie on several devices would send them to each other.
    loop = 4 * flops + groups * (byte * numbers + STEP)
    whole = isinstance(groups, int)  # no loop of as many steps as a symbol says
    if whole and platform == "cpu" and local and less(loop, least):
        way = "one by one"
    return way
