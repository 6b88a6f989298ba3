"""Where adapters go, of which rank, learnt how fast: a configuration, and why."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._config import ALL_LINEAR, LoRAConfig, Rule
from lora_jax._core.einsum import product, widened
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.nnx import state_of
from lora_jax._core.numbers import AT_LEAST_ONE, COUNT, POSITIVE, SHARE, number, refused
from lora_jax._core.paths import flatten
from lora_jax._core.patterns import matches
from lora_jax._core.table import table
from lora_jax._nodes.adapters import LoRA
from lora_jax._nodes.node import is_node
from lora_jax._quantized.waiting import value
from lora_jax._select import select
from lora_jax._survey import Survey
from lora_jax._targets import Target
from lora_jax.algebra._svd import svd
from lora_jax.methods._from_inputs import checked_moments
from lora_jax.methods._routers import experts_of, kinds_of, module_type, said_of

# What a parameter remembers (Allen-Zhu and Li, arXiv:2404.05405).
BITS_PER_PARAMETER = 2.0

# What is to be learnt of a token: about its loss (Schulman et al. 2025).
BITS_PER_TOKEN = 1.0

USUAL_RANK, LARGEST_RANK = 32, 512


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A configuration, and why. Print it.

    Attributes:
      config: for `select` and `init`; None where adapters would not be smaller than the weights.
      reasons: a sentence for each decision.
      scores: {module type: score} where targets were chosen, and empty where all are adapted.
      learning_rate: a first guess, where that of full fine-tuning was given.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> params = {"up": jnp.ones((64, 256)), "head": jnp.ones((256, 2))}
    >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["head"]
    >>> survey = lora.survey(fn, params, jnp.ones((4, 64)))
    >>> found = lora.methods.propose(params, survey, tokens=5_000, full_learning_rate=1e-4)
    >>> found.config.rank, found.config.alpha, found.learning_rate, found.scores
    (8, 32.0, 0.001, {})
    """

    config: LoRAConfig | None
    reasons: tuple[str, ...]
    scores: Mapping[str, float]
    learning_rate: float | None = None

    def __str__(self):
        lines = [f"- {reason}" for reason in self.reasons]
        if self.scores:
            lines += ["", table(("module type", "score"), [*self.scores.items()])]
        return "\n".join(lines)


def propose(
    params: Any,
    survey: Survey,
    *,
    tokens: int | None = None,
    full_learning_rate: float | None = None,
    moments: Mapping[str, Any] | None = None,
    gradients: Any = None,
    keep: float = 0.5,
    active_experts: int | None = None,
) -> Proposal:
    """A configuration to begin with, and why: the defaults of "LoRA Without Regret" (Schulman et
    al., Thinking Machines Lab 2025), and, given a batch's moments or gradients, fewer targets.

    * All linear layers, with alpha 32 and the scale alpha / rank, which makes the best learning
      rate about independent of the rank, and about 10 times that of full fine-tuning.
    * A rank at which the adapters hold what is in the data: 2 bits for each parameter, 1 for each
      trained token. That is an order of magnitude; too large a rank costs memory, not quality.
    * With `moments` the types of modules with the least normalised feature norm (PLoP, Hayou 2025,
      arXiv:2506.20629): ‖W·x‖ over what a random W of the same norm would give. Where that is
      small, W and the data are not aligned yet, and most is to be learnt.
    * With `gradients` the types with the largest ‖G‖² for each parameter of an adapter: how much
      a first step of gradient descent lowers the loss, for what it costs.

    Routers are left out: what is named so, and has an output for each expert, of a stack or beside
    each other. So are leaves so small that no adapter is smaller, and a leaf too small for the rank
    gets the largest one at which its adapter is. Where all adapters together would have as many
    numbers as the weights that they change, none are proposed.

    A type is a path with its numbers left out: `layers/*/up/kernel`. These are starting points:
    neither way of choosing beats all linear layers of the same size in general.

    Args:
      params: the parameters, or an NNX module; abstract ones where there are no moments.
      survey: how the function uses each leaf.
      tokens: how many tokens are trained on; those that are seen again in later epochs count once.
      full_learning_rate: a good one for full fine-tuning.
      moments: C of each linear leaf, from `second_moments` with the targets of "all-linear".
      gradients: of each, as in `lora_ga`.
      keep: the share of the types that is adapted, at least one.
      active_experts: how many experts serve a token; each gets the rank over this number, so that a
        token meets as much as in other layers (Schulman et al.).

    Returns:
      A `Proposal`.

    Raises:
      LoRAError: as `select` of "all-linear"; both moments and gradients; ones that are missing; a
        keep outside (0, 1], fewer than one token or active expert, or active experts of a model
        without routers.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"up": jnp.ones((64, 256)), "down": jnp.ones((256, 64)), "head": jnp.ones((64, 2))}
    >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"] @ p["head"]
    >>> survey = lora.survey(fn, params, jnp.ones((4, 64)))
    >>> print(lora.methods.propose(params, survey, tokens=5_000, full_learning_rate=1e-4))
    - targets: all linear layers but the head, 2 leaves; attention alone does worse
    - rank 4: 5,000 tokens hold about 5,000 bits, rank 4 about 5,120
    - alpha 32, scale alpha / rank: the best learning rate depends little on the rank
    - learning rate 0.001: 10 times that of full fine-tuning; 15 times for fewer than 100 steps
    - batches: keep them small, of a few dozen examples; LoRA loses more to large ones than full \
fine-tuning
    """
    _check(tokens, full_learning_rate, moments, gradients, keep, active_experts)
    tokens, full_learning_rate, keep = map(number, (tokens, full_learning_rate, keep))
    active_experts = number(active_experts)
    # At rank 1, so that `t.parameters` is what each unit of rank costs.
    everything = select(params, LoRAConfig(rank=1, alpha=32.0, targets=ALL_LINEAR), survey).lora
    routers, experts = experts_of(everything, active_experts)
    tiny = tuple(p for p, t in everything.items() if p not in routers and not _most(t))
    everything = {p: t for p, t in everything.items() if p not in (*routers, *tiny)}
    if not everything:
        return Proposal(None, (f"no adapters: each of {len(tiny)} leaves is smaller than one",), {})
    scores: dict[str, float] = {}
    if moments is None and gradients is None:
        targets, chosen = ALL_LINEAR, dict(everything)
        why = (
            f"targets: all linear layers but the head, {len(chosen)} leaves; attention alone "
            "does worse"
        )
    else:
        plop = moments is not None
        each = (
            _feature_norms(params, everything, moments) if plop else _gains(everything, gradients)
        )
        scores = _by_type(each, rising=plop)
        kept = list(scores)[: max(1, math.ceil(keep * len(scores)))]
        chosen = {p: t for p, t in everything.items() if module_type(p) in kept}
        # A pattern is checked against all leaves, also those that are no linear layers.
        paths = [*flatten(state_of(params))]
        targets = tuple(_pattern(kind, everything, paths) for kind in kept)
        what = "least normalised feature norm" if plop else "largest gradient for its size"
        why = f"targets: the {len(kept)} of {len(scores)} module types with the {what}"
    share = {p: active_experts or 1 for p in experts}
    rank, reason = _rank(chosen, tokens, share)
    # Judged by the whole rank, before small leaves get less: what is wanted does not pay.
    own = {p: max(1, rank // share.get(p, 1)) for p in chosen}
    numbers = sum(
        t.parameters * min(own[p], *t.geometry.sizes(t.shape)[1:]) for p, t in chosen.items()
    )
    weights = sum(math.prod(t.shape) for t in chosen.values())
    if numbers >= weights:
        nothing = (
            f"no adapters: of rank {rank} they would have {numbers:,} numbers, the weights have "
            f"{weights:,}; train those in full, or pass tokens= if there are few"
        )
        return Proposal(None, (nothing,), scores)
    rules = _smaller(chosen, rank, own)
    exclude = routers + tiny if targets == ALL_LINEAR else ()
    config = LoRAConfig(rank=rank, alpha=32.0, targets=targets, rules=rules, exclude=exclude)
    reasons = [
        why,
        *said_of(routers, rank, active_experts),
        *[f"left out, smaller than any adapter: {', '.join(kinds_of(tiny))}"] * bool(tiny),
        reason,
        "alpha 32, scale alpha / rank: the best learning rate depends little on the rank",
        _rate(full_learning_rate),
        "batches: keep them small, of a few dozen examples; LoRA loses more to large ones than "
        "full fine-tuning",
    ]
    rate = None if full_learning_rate is None else 10 * full_learning_rate
    return Proposal(config, tuple(reasons), scores, rate)


def _most(t: Target) -> int:
    """The largest rank at which an adapter has fewer numbers than its leaf; 0: at none."""
    _, i, o = t.geometry.sizes(t.shape)
    return min((i * o - 1) // (i + o), i, o)


def _check(tokens: Any, rate: Any, moments: Any, gradients: Any, keep: Any, active: Any):
    failures = refused(
        tokens=(tokens, AT_LEAST_ONE.or_none),
        full_learning_rate=(rate, POSITIVE.or_none),
        keep=(keep, SHARE),
        active_experts=(active, COUNT.or_none),
    )
    if moments is not None and gradients is not None:
        failures.append("moments and gradients are two ways to choose: pass one of them")
    raise_all("nothing can be proposed:", failures, "lora.methods.propose(params, survey)")


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """The scores as Python's numbers."""
    if any(isinstance(x, jax.core.Tracer) for x in scores.values()):
        raise LoRAError(
            "a choice depends on values, found traced ones: call propose outside of jit"
        )
    out = {p: float(x) for p, x in scores.items()}
    raise_all(
        "what is to be chosen by is NaN or infinity, of the leaves:",
        (f"'{p}'" for p, x in out.items() if not math.isfinite(x)),
        "look at the weights and the batch, or lora.methods.propose(params, survey)",
    )
    return out


def _feature_norms(
    params: Any, targets: Mapping[str, Target], moments: Mapping[str, Any]
) -> dict[str, float]:
    """{path: √(Σ‖xW‖² / Σ‖xR‖²)}, R random with the norm of W: E‖xR‖² = ‖x‖²·‖W‖² / in."""
    moments, leaves = checked_moments(moments, targets), flatten(state_of(params))
    out = {}
    for path, t in targets.items():
        w, c = t.geometry.matrices(widened(value(leaves[path]))), moments[path]
        # Σ‖xW‖² = tr(Wᵀ·C·W) = Σ W ∘ (C·W), with C (n, in, in), W (n, in, out).
        aligned = jnp.sum(w * product(c, w), (1, 2))
        random = jnp.trace(c, axis1=1, axis2=2) * jnp.sum(w**2, (1, 2)) / w.shape[1]
        ratio = aligned / jnp.where(random > 0, random, 1)
        out[path] = jnp.mean(jnp.sqrt(jnp.maximum(ratio, 0)))
    return _numbers(out)


def _gains(targets: Mapping[str, Target], gradients: Any) -> dict[str, float]:
    """{path: ‖G‖² for each parameter of an adapter of rank 1}."""
    flat = flatten(state_of(gradients), is_leaf=is_node)
    raise_all(
        "these leaves have no gradient:",
        (
            f"'{p}'" + (f" of {t.shape}, found {tuple(flat[p].shape)}" if p in flat else "")
            for p, t in targets.items()
            if p not in flat or tuple(flat[p].shape) != tuple(t.shape)
        ),
        "jax.grad(loss)(params), or lora.methods.low_rank_gradients(loss, params, targets)",
    )
    # ‖G‖² = Σσ².
    square = lambda g: jnp.sum((svd(g)[1] if isinstance(g, LoRA) else jnp.asarray(g, "f4")) ** 2)
    return _numbers({p: square(flat[p]) / t.parameters for p, t in targets.items()})


def _by_type(scores: Mapping[str, float], rising: bool) -> dict[str, float]:
    """The mean of each type, the best first."""
    kinds: dict[str, list[float]] = {}
    for path, score in scores.items():
        kinds.setdefault(module_type(path), []).append(score)
    mean = {kind: sum(v) / len(v) for kind, v in kinds.items()}
    return dict(sorted(mean.items(), key=lambda kv: kv[1] if rising else -kv[1]))


def _pattern(kind: str, targets: Iterable[str], paths: Sequence[str]):
    """What means the leaves of this type, and no others."""
    members = {p for p in targets if module_type(p) == kind}
    if {p for p in paths if matches(kind, p)} == members:
        return kind
    # The star would also match, say, a router of the same name: the paths, one by one.
    return re.compile("|".join(re.escape(p) for p in sorted(members)))


def _rank(
    targets: Mapping[str, Target], tokens: int | None, share: Mapping[str, int]
) -> tuple[int, str]:
    """The smallest power of two at which the adapters hold the data, and why.

    `share`: by what the rank of a leaf is divided.
    """
    # The largest rank that any leaf can use; smaller leaves get rules of their own, see `_smaller`.
    top = max(min(t.geometry.sizes(t.shape)[1:]) for t in targets.values())
    if tokens is None:
        rank = min(USUAL_RANK, top)
        return rank, f"rank {rank}: the usual one; pass tokens= to fit it to the data"
    of_rank_1 = sum(t.parameters // share.get(p, 1) for p, t in targets.items())
    bits = tokens * BITS_PER_TOKEN
    # rank · of_rank_1 · 2 bits ≥ the bits of the data.
    rank = 2 ** max(0, math.ceil(math.log2(bits / (of_rank_1 * BITS_PER_PARAMETER))))
    said = f"{tokens:,} tokens hold about {bits:,.0f} bits"
    if rank > min(LARGEST_RANK, top):
        rank = min(LARGEST_RANK, top)
        return rank, f"rank {rank}: {said}, more than adapters can; consider full fine-tuning"
    holds = rank * of_rank_1 * BITS_PER_PARAMETER
    return rank, f"rank {rank}: {said}, rank {rank} about {holds:,.0f}"


def _smaller(targets: Mapping[str, Target], rank: int, own: Mapping[str, int]) -> tuple[Rule, ...]:
    """Rules for leaves that are too small for the rank, or whose `own` is a share of it; each has
    the scale of the others."""
    most = {p: min(own[p], _most(t)) for p, t in targets.items()}
    return tuple(Rule(p, rank=n, alpha=32.0 * n / rank) for p, n in most.items() if n < rank)


def _rate(full: float | None) -> str:
    if full is None:
        return "learning rate: 10 times that of full fine-tuning; 15 times for fewer than 100 steps"
    return (
        f"learning rate {10 * full:g}: 10 times that of full fine-tuning; 15 times for fewer than "
        "100 steps"
    )
