"""For code that takes a model object, not a function: a module with its adapters inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from lora_jax._bind import adapter_nodes
from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.paths import nest
from lora_jax._doors import linen, module
from lora_jax._doors.subclass import Options, options_of
from lora_jax._nodes.node import Node


def attach(
    model: Any,
    adapters: Any = None,
    *,
    rngs: nnx.Rngs | None = None,
    strict: bool = True,
    plan: str = "auto",
    save: str | Callable | None = None,
    merge_aware: str | None = None,
) -> Any:
    """The model with its adapters inside, for trainers and samplers that take a model object.

    NNX: a module of the same class (a subclass of it) with the same attributes and methods. It
    shares the base's Variables, and holds each array of the adapters as an `nnx.LoRAParam` beside
    its leaf: `kernel_lora_a` beside `kernel`. Each method is adapted, of the model and of each of
    its parts. So Flax's own loop trains the adapters: `nnx.Optimizer(adapted, tx,
    wrt=nnx.LoRAParam)`, `nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))`;
    `nnx.state(adapted, nnx.LoRAParam)` is what to save. The base is frozen: its gradients are zero.
    An attribute that is read, such as `adapted.head.kernel`, is the base's.

    Linen: a module of the same class whose `apply`, methods and `bind` (and the children of what
    that returns) understand what `lora.bind` returns, as well as plain parameters. It takes no
    adapters: they are in the variables. It is hashed and compared by its fields, so `jax.jit` does
    not trace it anew.

    Args:
      model: an NNX or a Linen module.
      adapters: of NNX alone: what `init` returned, or trained from it.
      rngs: of NNX alone: draws the masks of the adapters' dropout, if their config has a rate;
        `adapted.eval()` turns it off. Linen: `lora.bind(params, adapters, dropout_key=key)`.
      strict, plan, save, merge_aware: as in `adapt`. Methods other than `__call__` may leave leaves
        unused.

    Raises:
      LoRAError: adapters of another model; no module; one that is attached already; adapters that
        need frozen arrays (VeRA). When a method is called: what `adapt` raises; dropout without
        `rngs`.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> from flax import nnx
    >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    >>> adapters = lora.init(jax.random.key(0), model, lora.LoRAConfig(rank=2, targets="kernel"))
    >>> adapted = lora.attach(model, adapters)
    >>> isinstance(adapted, nnx.Linear), adapted(jnp.ones((1, 4))).shape
    (True, (1, 3))
    >>> list(nnx.state(adapted, nnx.LoRAParam))
    ['kernel_lora_a', 'kernel_lora_b']

    >>> import flax.linen as nn
    >>> model, x = nn.Dense(3), jnp.ones((1, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> adapters = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets="kernel"))
    >>> lora.attach(model).apply({"params": lora.bind(params, adapters)}, x).shape
    (1, 3)
    """
    options = Options(strict, plan, save, merge_aware)
    if options_of(model) is not None:
        raise LoRAError(
            "the model has adapters attached already: model, adapters = lora.detach(adapted), "
            "then lora.attach(model, others)"
        )
    if isinstance(model, nn.Module):
        return _linen(model, adapters, rngs, options)
    if not isinstance(model, nnx.Module):
        raise LoRAError(f"lora.attach takes an NNX or a Linen module, found {_what(model)}")
    if adapters is None:
        raise LoRAError("an NNX module holds its adapters: lora.attach(model, adapters)")
    if not isinstance(rngs, nnx.Rngs | None):
        call = "lora.attach(model, adapters, rngs=nnx.Rngs(0))"
        raise LoRAError(f"expected nnx.Rngs, found a {type(rngs).__name__}: {call}")
    nodes = adapter_nodes(model, adapters, "attach")
    raise_all(
        "the attached model holds what is trained, and these adapters need frozen arrays as well:",
        [f"'{path}' is a {type(n).__name__}" for path, n in nodes.items() if _needs_frozen(n)],
        "bind them within the loss: lora.bind(model, lora.methods.factors(adapters, frozen))",
    )
    return module.attached(model, nodes, rngs, options)


def _linen(model: nn.Module, adapters: Any, rngs: Any, options: Options) -> Any:
    apply = "lora.attach(module).apply({'params': lora.bind(params, adapters"
    if adapters is not None:
        raise LoRAError(f"a Linen module holds no parameters, and so no adapters: {apply})}}, x)")
    if rngs is not None:
        raise LoRAError(f"a Linen module holds no random numbers: {apply}, dropout_key=key)}}, x)")
    if model.scope is not None:
        raise LoRAError(
            "this module is bound to variables already; attach it before that: "
            "lora.attach(module).bind({'params': lora.bind(params, adapters)})"
        )
    return linen.attached(model, options)


def _needs_frozen(node: Node) -> bool:
    try:
        jax.eval_shape(lambda n: n.factors(), node)
    except LoRAError:
        return True
    return False


def _what(x: Any) -> str:
    """What was passed for a module, and what to call instead."""
    if callable(x):
        return f"the function {getattr(x, '__name__', x)!r}: lora.adapt(fn)"
    return (
        f"a {type(x).__name__}; of parameters it is lora.bind(params, adapters), for a function "
        "made by lora.adapt(fn)"
    )


def detach(adapted: Any) -> Any:
    """What `attach` was given: (model, adapters) of an NNX module, the module of a Linen module.

    Args:
      adapted: what `attach` returned, trained or not, or a part of it.

    Returns:
      For NNX, a module of the model's own class that shares every Variable of the base, and the
      adapters as `init` makes them, with the arrays that are there now: for `lora.merge`,
      `lora.checkpoint.save`, `lora.peft.save`. For Linen the module.

    Raises:
      LoRAError: it was not attached.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> from flax import nnx
    >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    >>> config = lora.LoRAConfig(rank=2, targets="kernel")
    >>> adapted = lora.attach(model, lora.init(jax.random.key(0), model, config))
    >>> model, adapters = lora.detach(adapted)
    >>> type(model).__name__, adapters["kernel"].b.shape
    ('Linear', (2, 3))
    """
    if options_of(adapted) is None:
        raise LoRAError(
            f"expected what lora.attach returned, found a {type(adapted).__name__}: "
            "model, adapters = lora.detach(lora.attach(model, adapters))"
        )
    if isinstance(adapted, nn.Module):
        return linen.detached(adapted)
    model, nodes = module.detached(adapted)
    return model, nest(nodes)
