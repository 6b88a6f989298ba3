"""Experts: of their tensors PEFT's names give the module alone, and not the parameter.

PEFT wraps the module once for each parameter, so that a file has "experts.lora_A.weight" and
"experts.base_layer.lora_A.weight". Here the pairs of a module are collected with the parameters
that they may be; shapes, which only a base has, say which, or the caller.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lora_jax._core.errors import quoted
from lora_jax.peft._arguments import one_of
from lora_jax.peft._config import PeftConfig
from lora_jax.peft._file import AdapterFile
from lora_jax.peft._parts import Experts, Update, plain_name

# Two are too many already; so many are counted for the message.
MAX_WAYS = 8

# In a module: in how many orders they may be grows as the factorial.
MAX_PAIRS = 8


# One assignment: (parameter, what `fit` gave for it) of each pair, outermost first.
Way = list[tuple[str, Any]]


def is_inside(module: str, parts: Mapping[str, str], config: PeftConfig) -> bool:
    """Whether a module's tensors {kind: key} are of single parameters in it."""
    # Embeddings and AdaLoRA know no single parameters.
    if parts.keys() & {"table_a", "e"} or not config.parameters_of(module):
        return False
    return config.targets is None or module not in config.targets


def read_experts(
    found: Sequence[tuple[str, str, str]],
    file: AdapterFile,
    config: PeftConfig,
    wrong: Callable[[str, str], None],
) -> Iterator[Experts]:
    """Groups pairs of tensors by their module; the outermost has the fewest `base_layer`.

    Args:
      found: (module as in the keys, key of A, key of B).
      wrong: is told (key, what is wrong with it).
    """
    modules: dict[str, list[tuple[str, str]]] = {}
    # PEFT wraps the module once more for each parameter: the first one is innermost.
    for module, key_a, key_b in sorted(found, key=lambda f: f[0].count(".base_layer")):
        modules.setdefault(plain_name(module), []).append((key_a, key_b))
    for module, pairs in modules.items():
        names = config.parameters_of(module)
        if config.dora:
            wrong(pairs[0][0], "a DoRA of single parameters, which PEFT does not have")
        elif len(names) < len(pairs) or len(names) > MAX_PAIRS:
            some = ", ".join(quoted(n) for n in names[:3]) + ", …" * (len(names) > 3)
            wrong(
                pairs[0][0],
                f"{len(pairs)} adapted parameters, but target_parameters has {len(names)}: {some}",
            )
        else:
            yield Experts(module, tuple(_pair(module, *p, file, config, wrong) for p in pairs))


def _pair(
    module: str,
    key_a: str,
    key_b: str,
    file: AdapterFile,
    config: PeftConfig,
    wrong: Callable[[str, str], None],
) -> dict[str, Update]:
    """One pair as each parameter that it may be, with that parameter's rank and alpha."""
    a, b = file.shape(key_a), file.shape(key_b)
    found, names = {}, config.parameters_of(module)
    for parameter in names:
        name = f"{module}.{parameter}"
        rank = config.rank_of(name)
        # A (E · rank, in), B (out, rank · E): with the rank of the settings, E follows.
        if len(a) == len(b) == 2 and a[0] == b[1] and a[0] % rank == 0:
            sizes = (rank, a[1], b[0], a[0] // rank)
            scale = config.scale(name, rank)
            found[parameter] = Update(name, "experts", *sizes, scale, key_a, key_b)
    if not found:
        rank = config.rank_of(f"{module}.{names[0]}")
        wrong(key_a, f"with B {b}: expected (experts * {rank}, in) and (out, the same)")
    return found


def ways(
    group: Experts, fit: Callable[[str, Update], Any], order: Sequence[str] | None = None
) -> list[Way]:
    """The assignments of a module's pairs to its parameters, at most `MAX_WAYS`.

    Args:
      fit: for a parameter and the update that a pair is then: its place, or None.
      order: the parameters as the torch module has them, of which PEFT wraps the first first: it is
        the innermost.
    """
    at = {name: i for i, name in enumerate(order or ())}

    # Each pair is tried on each parameter once, not once for each order of those before it.
    fits = [
        {p: place for p, update in pair.items() if (place := fit(p, update)) is not None}
        for pair in group.pairs
    ]

    def rest(fits: Sequence[Mapping[str, Any]], used: tuple[str, ...]) -> Iterable[Way]:
        if not fits:
            yield []
            return
        # From outside in, the parameters run backwards in the module's order.
        last = min((at[p] for p in used if p in at), default=len(at))
        for parameter, place in fits[0].items():
            if parameter not in used and at.get(parameter, -1) < last:
                for way in rest(fits[1:], (*used, parameter)):
                    yield [(parameter, place), *way]

    return list(itertools.islice(rest(fits, ()), MAX_WAYS))


def on_leaves(
    group: Experts, finder: Any, order: Sequence[str] | None = None, along: str | None = None
) -> list[tuple[Any, Update]]:
    """(entry, update) of each parameter, innermost first: the one assignment that leaves allow.

    What A runs along is the same for all of a module. Up to PEFT 0.18 it is the parameter's first
    axis, from 0.19.1 on its last, or the inputs where the module says `is_transposed`; so the file
    does not say it, and the shapes must, or the caller: `along`.

    Args:
      finder: a `Finder`, which is told what cannot be found.
      order, along: `experts` and `experts_a` of `lora.peft.load`.
    """
    turns = {None: (False, True), "in": (False,), "out": (True,)}
    if along is not None:
        one_of(along, ("in", "out"), "experts_a")
    found = [
        way
        for turn in turns[along]
        for way in ways(group, lambda _, u, turn=turn: finder.expert(u, turn), order)
    ]
    if len(found) == 1:
        # Innermost first, as `order` has them.
        return [place for _, place in found[0][::-1]]
    names = list(group.parameters)
    finder.failures.append(
        f"'{group.module}' ({', '.join(names)}; {group.sizes}): "
        + (
            f"{len(found)} ways to assign its tensors fit, and the file does not say which: "
            f"lora.peft.load(..., experts={names}, experts_a='in'), in the order of the torch "
            "module's parameters, and 'out' where PEFT's lora_A runs along the outputs"
            if found
            else "no leaves have these names and sizes; where the experts' axis is not one of a "
            "stack in the survey, lora.peft.load(folder, params, targets) with targets = "
            "lora.select(params, config, survey) and a Rule(..., batch_axes=(0,)) in config"
        )
    )
    return []
