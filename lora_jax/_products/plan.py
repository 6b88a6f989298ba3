"""The plan: which products a low-rank update is made of, decided from shapes when traced.

A group is one input x with T rows and d columns, and the weights W_i (d, k_i) that multiply it,
each with an update of rank r_i. There are two ways to y_i = x·W_i + s·(x·A_i)·B_i, and the same two
for the gradient of x, decided one by one. Beside the base products, and with b bytes a number:

             FLOPs                 bytes moved
  hidden     2·T·d·Σr              b·T·d                x·A, all the A_i side by side
  up         2·T·Σr·k              4·b·T·Σk             (x·A)·B written, read with x·W, sum written
  down       2·T·d·Σr              2·b·T·d              the same for the gradient of x, through Aᵀ
  merge      2·d·Σr·k              4·b·d·Σk             A·B written and read, W read, W' written

The gradients of A and B are xᵀ·(g·Bᵀ) and (x·A)ᵀ·g whatever the plan; no product of the size of W
is among them. So in training, where x·A is needed for the gradient of B anyway, the forward pass
is merged if `merge` < `up` and the backward pass if `merge` < `down`; for one layer that is
T > d and T > c·k, with c between 1 (FLOPs alone, high rank) and 2 (bytes alone, low rank).
Without a gradient it is `merge` < `hidden` + `up`. Under remat the forward pass is made
twice, and so are both sides of the comparison.

FLOPs are made comparable with bytes by a machine balance of 16 FLOPs a byte: fp32 on a CPU core
(100 GFLOP/s, 6 GB/s a core when all are busy) and on an H100 outside of its tensor cores (67
TFLOP/s, 3.35 TB/s). The choice depends on it little, as merging changes FLOPs and bytes alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lora_jax._core.compat import less

BALANCE = 16  # FLOPs a byte; whole, as sizes of symbolic shapes take no fractions


PLANS = ("auto", "factored", "merged")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Whether the merged weight is used, and whether the products with A are made as one.

    Attributes:
      infer: in a forward pass that is not differentiated.
      forward: in one that is.
      backward: for the gradient of the input.
      shared: one product with all the A side by side.
    """

    infer: bool = False
    forward: bool = False
    backward: bool = False
    shared: bool = False

    def __str__(self) -> str:
        where = [f.name for f in dataclasses.fields(self)[:3] if getattr(self, f.name)]
        how = "factored" if not where else "merged" if len(where) == 3 else None
        how = how or f"merged ({', '.join(where)})"
        return how + (", shared" if self.shared else "")


@dataclasses.dataclass(frozen=True)
class Costs:
    """What each part costs, in FLOPs, with bytes at the machine's balance; see the table above."""

    hidden: float
    up: float
    down: float
    merge: float

    @classmethod
    def of(
        cls, rows: int, inner: int, outs: Sequence[int], ranks: Sequence[int], itemsize: int
    ) -> Costs:
        rank, out = sum(ranks), sum(outs)
        rank_out = sum(r * k for r, k in zip(ranks, outs))
        byte = BALANCE * itemsize
        return cls(
            hidden=2 * rows * inner * rank + byte * rows * inner,
            up=2 * rows * rank_out + byte * 4 * rows * out,
            down=2 * rows * inner * rank + byte * 2 * rows * inner,
            merge=2 * inner * rank_out + byte * 4 * inner * out,
        )


def planned(
    mode: str,
    rows: int,
    inner: int,
    outs: Sequence[int],
    ranks: Sequence[int],
    itemsize: int,
    mergeable: bool,
) -> Plan:
    """The plan of one group.

    `mergeable` says whether "auto" may merge: whether the product keeps every bit of the weight,
    and T is the number of rows on the device. Where the shapes are symbolic and a comparison is
    open, nothing is merged or shared.
    """
    # One product reads x once, not once for each weight; the A are copied side by side for it.
    shared = less(2 * sum(ranks), (len(ranks) - 1) * rows)
    if mode == "merged":
        return Plan(True, True, True, shared)
    if mode == "factored" or not mergeable:
        return Plan(shared=shared)
    c = Costs.of(rows, inner, outs, ranks, itemsize)
    infer, forward, backward = (less(c.merge, x) for x in (c.hidden + c.up, c.up, c.down))
    return Plan(infer, forward, backward, shared)
