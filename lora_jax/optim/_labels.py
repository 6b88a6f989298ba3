"""optax: labels for the parts of a tree, and optimisers that train adapters alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax
import optax

from lora_jax._core.errors import LoRAError
from lora_jax._nodes.node import is_node
from lora_jax.optim._settings import check_optimiser, check_settings

FROZEN = "frozen"


def labels(tree: Any) -> Any:
    """What each leaf of a tree is, for `optax.partition`.

    Args:
      tree: adapters, bound parameters, or any tree that holds adapters beside other leaves, such
        as `{"params": params, "adapters": adapters}`.

    Returns:
      The same tree with a label for each leaf: "a" and "b" of a `LoRA` ("embedding_a" and
      "embedding_b" where the leaf is a look-up table), "magnitude" of a `DoRA`, "full", "rows",
      "vera_d" and "vera_b" of a `VeRA`, and so on for every other node: the class's name in small
      letters and the array's; "frozen" for all else.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"q": jnp.ones((4, 4))}
    >>> adapters = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets="q"))
    >>> jax.tree.leaves(lora.optim.labels({"params": params, "adapters": adapters}))
    ['a', 'b', 'frozen']
    """
    return jax.tree.map(lambda x: x.labels() if is_node(x) else FROZEN, tree, is_leaf=is_node)


def trained_only(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies an optimiser to the adapters in a tree that also holds frozen leaves.

    Frozen leaves get no optimiser state and an update of exactly zero. Where the adapters are a
    tree of their own, `tx` needs no wrapping.

    >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
    >>> params = {"q": jnp.ones((4, 4))}
    >>> adapters = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets="q"))
    >>> tree = {"params": params, "adapters": adapters}
    >>> state = lora.optim.trained_only(optax.adam(1e-3)).init(tree)
    >>> sum(x.size for x in jax.tree.leaves(state))  # two moments of A and B, and the count
    33
    """

    check_optimiser(tx, "lora.optim.trained_only(optax.adam(1e-3))")

    def trained_or_frozen(tree: Any) -> Any:
        return jax.tree.map(lambda label: FROZEN if label == FROZEN else "trained", labels(tree))

    return optax.partition({"trained": tx, FROZEN: optax.set_to_zero()}, trained_or_frozen)


def lora_plus(
    make: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    *,
    ratio: float = 16.0,
    embedding_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformation:
    """LoRA+ (arXiv:2402.12354): B learns `ratio` times as fast as A.

    Args:
      make: a function of a learning rate that returns an optimiser, such as `optax.adam`.
      learning_rate: of A, of magnitudes, of leaves that are trained in full, and of nodes that are
        no factors (`VeRA` and its kin); a number or an optax schedule.
      ratio: λ = lr_B / lr_A; in the paper's experiments about 16 was best for RoBERTa with one
        initialisation and 4 to 8 with the other, 2 to 4 for Llama.
      embedding_learning_rate: of the factors of embeddings and of rows; None: `learning_rate`.

    Returns:
      An optimiser for adapters, or for a tree that holds them beside frozen leaves.

    Raises:
      LoRAError: a ratio or a learning rate that is negative or not finite.

    >>> import jax, jax.numpy as jnp, lora_jax as lora, optax
    >>> config = lora.LoRAConfig(rank=2, targets="q")
    >>> adapters = lora.init(jax.random.key(0), {"q": jnp.ones((4, 4))}, config)
    >>> tx = lora.optim.lora_plus(optax.sgd, 1e-4, ratio=16)
    >>> grads = jax.tree.map(jnp.ones_like, adapters)
    >>> updates, state = tx.update(grads, tx.init(adapters), adapters)
    >>> print(*(x[0, 0].round(4) for x in (updates["q"].a, updates["q"].b)))
    -1e-04 -0.0016
    """
    learning_rate, ratio, embedding_learning_rate = check_settings(
        "lora.optim.lora_plus(optax.adam, 1e-4, ratio=16)",
        learning_rate=learning_rate,
        ratio=ratio,
        embedding_learning_rate=embedding_learning_rate,
    )
    if not callable(make) or isinstance(make, type):
        raise LoRAError(
            f"make={type(make).__name__}: expected a function of a learning rate, which is called "
            "with two of them: lora.optim.lora_plus(optax.adam, 1e-4)"
        )
    # A schedule is a function of the step, and so is its multiple.
    times = lambda rate: lambda step: ratio * rate(step)
    fast = times(learning_rate) if callable(learning_rate) else ratio * learning_rate
    slow = make(learning_rate)
    own = make(learning_rate if embedding_learning_rate is None else embedding_learning_rate)
    of: dict[Hashable, optax.GradientTransformation] = {
        "a": slow,
        "b": make(fast),
        "full": slow,
        "magnitude": slow,
        "embedding_a": own,
        "embedding_b": own,
        "rows": own,
        # The arrays of nodes that are no factors.
        "other": slow,
        FROZEN: optax.set_to_zero(),
    }
    known = lambda label: label if label in of else "other"
    return optax.partition(of, lambda tree: jax.tree.map(known, labels(tree)))


def decays(weight_decay: Any) -> bool:
    """Whether there is any weight decay. An array, as `optax.inject_hyperparams` passes it, counts
    as some: the structure of the state may not depend on a value."""
    return not isinstance(weight_decay, int | float) or weight_decay != 0
