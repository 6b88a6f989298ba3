"""Routers and their experts, as names and shapes tell them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from lora_jax._core.errors import LoRAError
from lora_jax._targets import Target


def module_type(path: str) -> str:
    """The path with a star for each number.

    >>> module_type("model/layers_11/attn/q_proj/kernel")
    'model/layers_*/attn/q_proj/kernel'
    """
    return re.sub(r"\d+", "*", path)


def kinds_of(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(map(module_type, paths)))


_ROUTER = re.compile(r"router|routing|(?:^|[/_.])(?:gate|gating)(?:[/_.\d]|$)", re.IGNORECASE)


def _in_a_row(router: str, paths: Iterable[str], n: int) -> set[str]:
    """The leaves beside a router that differ in one number alone, and are n: experts/0 to n - 1."""
    found = _ROUTER.search(router)
    beside = router[: router.rfind("/", 0, found.start() + 1) + 1] if found else ""
    groups: dict[str, set[str]] = {}
    for path in paths:
        if path.startswith(beside):
            for digits in re.finditer(r"\d+", path[len(beside) :]):
                start, end = (len(beside) + x for x in digits.span())
                groups.setdefault(f"{path[:start]}*{path[end:]}", set()).add(path)
    return {path for group in groups.values() if len(group) == n > 1 for path in group}


def experts_of(
    targets: Mapping[str, Target], active: int | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The routers, and the leaves that stack as many weights as a router has outputs, or that are
    as many beside it."""
    stacks = {p: {t.shape[d] for d in t.geometry.batch_axes} for p, t in targets.items()}
    outs = {p: t.geometry.sizes(t.shape)[2] for p, t in targets.items() if _ROUTER.search(p)}
    rows = {p: _in_a_row(p, targets, n) - {p} for p, n in outs.items()}
    routers = tuple(
        p for p, n in outs.items() if rows[p] or any(n in sizes for sizes in stacks.values())
    )
    experts = tuple(
        p for p, sizes in stacks.items()
        if p not in routers and any(outs[r] in sizes or p in rows[r] for r in routers)
    )  # fmt: skip
    if active is not None and not experts:
        raise LoRAError(
            f"active_experts={active}, but there is no router beside a stack of as many experts as "
            "it has outputs, nor beside that many modules: lora.methods.propose(params, survey)"
        )
    return routers, experts


def said_of(routers: Sequence[str], rank: int, active: int | None) -> list[str]:
    if not routers:
        return []
    each = (
        "pass active_experts= to share the rank among those that serve a token"
        if active is None
        else f"{active} serve a token, each at rank {max(1, rank // active)}"
    )
    kinds = kinds_of(routers)
    return [
        f"routers left out: {', '.join(kinds)}; where tokens go stays as it is",
        f"experts: {each}",
    ]
