"""What training takes of memory, by arithmetic: the base, its constants, adapters, optimiser."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding

from lora_jax._core.errors import LoRAError, raise_all
from lora_jax._core.figures import Shown, needs_matplotlib, written
from lora_jax._core.geometry import names
from lora_jax._core.nnx import state_of
from lora_jax._core.paths import flatten
from lora_jax._core.table import table
from lora_jax._nodes.node import is_node
from lora_jax._quantized.waiting import check_codes
from lora_jax._quantized.weight import is_quantized
from lora_jax.parallel._forecast import Forecast
from lora_jax.parallel._state_shardings import state_shardings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("base", "constants", "adapters", "gradients", "optimizer")


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes in all, and on the device that holds most: a part of `Memory`.

    >>> import jax, lora_jax as lora
    >>> found = lora.parallel.memory({"w": jax.ShapeDtypeStruct((1024, 1024), "bfloat16")}, None)
    >>> found.parts["base"]
    Bytes(total=2097152, device=2097152)
    """

    total: int = 0
    device: int = 0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.total + other.total, self.device + other.device)


@dataclasses.dataclass(frozen=True)
class Memory(Shown):
    """What the arrays of a training step take; print it, plot it, or assert on it.

    Attributes:
      parts: {"base", "constants" (of quantisation), "adapters", "gradients", "optimizer": `Bytes`},
        and "activations" where a forecast was given.
      leaves: {path: (shape, type or format, bytes of the base, bytes of constants)}.
      parameters: how many the base has.

    >>> import jax, lora_jax as lora
    >>> found = lora.parallel.memory({"w": jax.ShapeDtypeStruct((1024, 1024), "bfloat16")}, None)
    >>> found.parts["base"].total, found.total, found.parameters
    (2097152, 2097152, 1048576)
    """

    parts: Mapping[str, Bytes]
    leaves: Mapping[str, tuple[tuple[int, ...], str, int, int]]
    parameters: int

    @property
    def total(self) -> int:
        return sum(part.total for part in self.parts.values())

    @property
    def device(self) -> int:
        """Bytes on one device, the one that holds most."""
        return sum(part.device for part in self.parts.values())

    def plot(
        self,
        path: str | os.PathLike | None = None,
        *,
        name: str | None = None,
        beside: Mapping[str, Memory] | None = None,
    ) -> Figure:
        """A figure: the parts as a stacked bar, of the device that holds most.

        Args:
          path: where to write it too, in the format of the suffix, such as .png or .pdf. A file
            there is replaced once the new one is complete.
          name: of the bar; None: "LoRA", "QLoRA", "full" or "base", by what is there.
          beside: other ways to train, {name: `Memory`}, a bar each.

        Raises:
          LoRAError: matplotlib is not installed, or two bars have the same name.

        >>> import jax, optax, lora_jax as lora
        >>> params, tx = {"w": jax.ShapeDtypeStruct((4096, 4096), "bfloat16")}, optax.adam(1e-3)
        >>> config = lora.LoRAConfig(rank=8, targets="w")
        >>> adapters = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, config), params)
        >>> base = jax.eval_shape(lambda p: lora.quant.quantize(p, "w"), params)
        >>> ways = {
        ...     "QLoRA": lora.parallel.memory(base, adapters, tx),
        ...     "full": lora.parallel.memory(params, None, tx),
        ... }
        >>> figure = lora.parallel.memory(params, adapters, tx).plot(beside=ways)
        """
        with needs_matplotlib():
            from lora_jax.parallel._memory_plot import figure
        name, others = self._name() if name is None else name, beside or {}
        if name in others:
            raise LoRAError(
                f"two bars would have the name '{name}': found.plot(name=..., beside={{...}})"
            )
        return written(figure({name: self, **others}), path)

    def _name(self) -> str:
        if not self.parts["adapters"].total:
            return "full" if self.parts["gradients"].total else "base"
        return "QLoRA" if self.parts["constants"].total else "LoRA"

    def __str__(self):
        mega = lambda n: f"{n / 1e6:,.2f}"
        rows = [(name, mega(x.total), mega(x.device)) for name, x in self.parts.items()]
        rows.append(("all", mega(self.total), mega(self.device)))
        width = [max(len(r[i]) for r in (*rows, ("", "MB", "MB per device"))) for i in (1, 2)]
        aligned = [(name, a.rjust(width[0]), b.rjust(width[1])) for name, a, b in rows]
        head = ("", "MB".rjust(width[0]), "MB per device".rjust(width[1]))
        stored = self.parts["base"] + self.parts["constants"]
        bits = 8 * stored.total / max(self.parameters, 1)
        return f"{table(head, aligned)}\nbase: {self.parameters:,} parameters, {bits:.4g} bits each"


def memory(
    params: Any,
    adapters: Any,
    optimizer: Any = None,
    *,
    shardings: Any = None,
    forecast: Forecast | None = None,
) -> Memory:
    """Bytes of the base, of its constants of quantisation, of adapters, gradients and optimiser.

    These are what the arrays of a step take; activations are the compiler's, and are known from a
    `forecast` of the step. MB are 10⁶ bytes.

    Args:
      params: the base, or an NNX module: arrays or shapes, quantised or not, as of
        `jax.eval_shape(lambda p: lora.quant.quantize(p, targets), shapes)`. Where a leaf has a
        sharding, the device holds its part.
      adapters: as from `init`, arrays or shapes. None: the base alone, or, where there is an
        optimiser, full fine-tuning, whose gradients and state are of the parameters themselves.
      optimizer: an optax transformation, for what is trained; None: no state.
      shardings: of the adapters, as from `lora.parallel.shardings`; the gradients and the state
        are sharded alike, see `state_shardings`. None: the arrays' own, or whole on each device.
      forecast: of the step, for its "activations": the compiler's temporaries less the gradients,
        which are among them, so everything else that it keeps in between. None: not known.

    Returns:
      A `Memory`.

    Raises:
      LoRAError: a tree without arrays in the place of the base, or of the adapters; a quantised
        base that is to be trained itself; a forecast of a step that the compiler refused.

    >>> import jax, optax, lora_jax as lora
    >>> shapes = {"w": jax.ShapeDtypeStruct((4096, 4096), "bfloat16")}
    >>> base = jax.eval_shape(lambda p: lora.quant.quantize(p, "w", double=True), shapes)
    >>> config = lora.LoRAConfig(rank=8, targets="w")
    >>> adapters = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, config), shapes)
    >>> print(lora.parallel.memory(base, adapters, optax.adam(1e-3)))
                 MB  MB per device
    ---------  ----  -------------
    base       8.39           8.39
    constants  0.27           0.27
    adapters   0.26           0.26
    gradients  0.26           0.26
    optimizer  0.52           0.52
    all        9.70           9.70
    base: 16,777,216 parameters, 4.127 bits each
    """
    if not (optimizer is None or hasattr(optimizer, "init")):
        raise LoRAError(
            f"expected an optax transformation, found a {type(optimizer).__name__}: "
            "lora.parallel.memory(params, adapters, optax.adam(1e-3))"
        )
    if not isinstance(forecast, Forecast | None):
        raise LoRAError(
            f"expected a forecast, found a {type(forecast).__name__}: lora.parallel.memory(params, "
            "adapters, tx, forecast=lora.parallel.forecast(step, *args))"
        )
    found = flatten(state_of(params))
    check_codes(found)
    if not found or not all(hasattr(x, "shape") for x in found.values()):
        raise LoRAError(
            "expected parameters, arrays or shapes: lora.parallel.memory(params, adapters, tx)"
        )
    raise_all(
        "these leaves do not divide among their devices:",
        (f"'{p}' {x.shape} at {x.sharding.spec}" for p, x in found.items() if not _divides(x)),
        "pad them, or change their shardings",
    )
    leaves, base, constants, count = {}, Bytes(), Bytes(), 0
    for path, x in found.items():
        # A plain leaf counts as its own codes, without constants.
        codes = _sum(x.codes if is_quantized(x) else x)
        rest = _sum((x.constants, x.second)) if is_quantized(x) else Bytes()
        name = x.format if is_quantized(x) else str(x.dtype)
        leaves[path] = (tuple(x.shape), name, codes.total, rest.total)
        base, constants, count = base + codes, constants + rest, count + math.prod(x.shape)
    if adapters is None and optimizer is not None:
        if codes := [path for path, x in found.items() if is_quantized(x)]:
            raise LoRAError(
                f"full fine-tuning trains the parameters, and '{codes[0]}' is quantised: "
                "lora.parallel.memory(lora.quant.dequantize(params), None, tx)"
            )
        trained = Bytes(), *_beside(state_of(params), optimizer, shardings)
    else:
        trained = _trained(adapters, optimizer, shardings)
    parts = dict(zip(PARTS, (base, constants, *trained)))
    if forecast is not None:
        parts["activations"] = _activations(forecast, parts["gradients"])
    return Memory(parts, leaves, count)


def _divides(x: Any) -> bool:
    where = getattr(x, "sharding", None)
    if is_quantized(x) or not isinstance(where, NamedSharding):
        return True
    parts = [math.prod(where.mesh.shape[n] for n in names(entry)) for entry in where.spec]
    return all(n % part == 0 for n, part in zip(x.shape, parts))


def _activations(forecast: Forecast, gradients: Bytes) -> Bytes:
    """What a step keeps beside its arguments and gradients."""
    if forecast.temporaries is None:
        raise LoRAError(
            "the forecast is of a step that does not fit, so its temporaries are not known: leave "
            "it out, or forecast the step for more devices"
        )
    # The compiler may have less than all gradients at a time.
    device = max(forecast.temporaries - gradients.device, 0)
    return Bytes(device * forecast.devices, device)


def _trained(adapters: Any, optimizer: Any, shardings: Any) -> tuple[Bytes, Bytes, Bytes]:
    """The bytes of adapters, gradients and state."""
    if adapters is None:
        return Bytes(), Bytes(), Bytes()
    if not all(map(is_node, flatten(adapters, is_leaf=is_node).values())):
        raise LoRAError(
            "expected adapters, as from lora.init: lora.parallel.memory(params, adapters, tx)"
        )
    own, state = _beside(adapters, optimizer, shardings)
    return own, own, state


def _beside(trained: Any, optimizer: Any, shardings: Any) -> tuple[Bytes, Bytes]:
    """The bytes of the gradients of what is trained, and of the optimiser's state."""
    if shardings is None:
        shardings = jax.tree.map(lambda x: getattr(x, "sharding", None), trained)
        # Where one array has no sharding, all are taken to be whole on each device.
        placed = all(isinstance(s, Sharding) for s in _each(shardings, trained))
        shardings = shardings if placed else None
    # A gradient has the shape, type and sharding of what it is of.
    own = _sum(trained, shardings)
    if optimizer is None:
        return own, Bytes()
    state = jax.eval_shape(optimizer.init, trained)
    at = None if shardings is None else state_shardings(state, trained, shardings)
    return own, _sum(state, at)


def _each(tree: Any, like: Any) -> list:
    # Not `jax.tree.leaves`: a None is no leaf there, and would shift the others.
    try:
        return jax.tree.structure(like).flatten_up_to(tree)
    except ValueError as e:
        raise LoRAError(
            f"the shardings are of another tree than what is trained ({e}): "
            "lora.parallel.memory(params, adapters, tx, shardings=lora.parallel.shardings(params, "
            "adapters))"
        ) from None


def _sum(tree: Any, shardings: Any = None) -> Bytes:
    leaves = jax.tree.leaves(tree)
    at = [getattr(x, "sharding", None) for x in leaves]
    at = at if shardings is None else _each(shardings, tree)
    return sum((_bytes(x, where) for x, where in zip(leaves, at)), Bytes())


def _bytes(x: Any, where: Any) -> Bytes:
    # NumPy does not know the types of random keys.
    size = jnp.dtype(x.dtype).itemsize if not _is_key(x) else x.dtype.itemsize
    shape = tuple(x.shape)
    part = where.shard_shape(shape) if isinstance(where, Sharding) else shape
    return Bytes(math.prod(shape) * size, math.prod(part) * size)


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
