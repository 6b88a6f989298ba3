"""What a step takes on each device, before there is one: compiled, never executed."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lora_jax._core import compat
from lora_jax._core.errors import LoRAError
from lora_jax._core.numbers import positions
from lora_jax._core.table import table
from lora_jax.parallel._hlo import Collective, collectives
from lora_jax.parallel._topology import capacity

# The two ways in which the TPU compiler says that a program does not fit.
OUT_OF_MEMORY = (
    r"Used (?P<used>[\d.]+\w?) of (?P<limit>[\d.]+\w?) hbm",
    r"\((?P<used>[\d.]+\w?)\) exceeds available HBM \((?P<limit>[\d.]+\w?)\)",
)


# A printed forecast lists so many collectives, the largest.
SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a compiled function takes on one device; bytes as the compiler lays arrays out.

    Attributes:
      device_kind, devices: what it was compiled for, and how many.
      arguments, outputs, aliased, temporaries: bytes; aliased are outputs in the place of donated
        arguments. None where the compiler refused the program for want of memory.
      peak: arguments + outputs - aliased + temporaries, or the figure with which it was refused.
      capacity: bytes that a program may use on the device, None where that is not known.
      flops, bytes_accessed: by XLA's cost analysis, which counts the body of a loop once, whatever
        its trip count, so of a scan over layers one layer; None where there is none (GPUs).
      collectives: a `Collective` each, the most bytes first. Their trip counts are known, other
        than those of the FLOPs.
      seconds: to compile.

    >>> import jax, lora_jax as lora
    >>> plan = lora.parallel.forecast(lambda x: x @ x, jax.ShapeDtypeStruct((8, 8), "float32"))
    >>> plan.arguments, plan.outputs, plan.peak >= 512  # bytes
    (256, 256, True)
    """

    device_kind: str
    devices: int
    arguments: int | None
    outputs: int | None
    aliased: int | None
    temporaries: int | None
    peak: int
    capacity: int | None
    flops: float | None
    bytes_accessed: float | None
    collectives: tuple[Collective, ...]
    seconds: float

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the capacity; None where that is not known."""
        return None if self.capacity is None else self.peak <= self.capacity

    @property
    def collective_bytes(self) -> int | None:
        """Bytes of all collectives in one call, loops counted; None where a loop's trips are not
        known, or nothing was compiled."""
        if self.arguments is None:
            return None
        total = 0
        for c in self.collectives:
            if c.times is None:
                return None
            total += c.bytes * c.count * c.times
        return total

    def __str__(self) -> str:
        names = ("arguments", "outputs", "aliased", "temporaries", "peak", "capacity")
        rows = [(name, _size(getattr(self, name))) for name in names]
        rows.append(("collectives", _size(self.collective_bytes)))
        rows += [
            (name.replace("_", " "), "not known" if n is None else f"{n:.4g}")
            for name, n in (("flops", self.flops), ("bytes_accessed", self.bytes_accessed))
        ]
        fits = {None: "its memory is not known", True: "it fits", False: "it does not fit"}
        lines = [
            f"{self.devices} x {self.device_kind}: {fits[self.fits]}; compiled in "
            f"{self.seconds:.1f} s",
            table(("on each device", ""), rows),
        ]
        if self.collectives:
            shown = [
                (c.kind, c.array, _size(c.bytes), c.count, "?" if c.times is None else c.times)
                for c in self.collectives[:SHOWN]
            ]
            lines += ["", table(("collective", "array", "size", "count", "times each"), shown)]
        if len(self.collectives) > SHOWN:
            lines.append(f"and {len(self.collectives) - SHOWN} smaller")
        return "\n".join(lines)


def forecast(
    fn: Callable,
    /,
    *args: Any,
    donate_argnums: int | Sequence[int] = (),
    out_shardings: Any = None,
    **kwargs: Any,
) -> Forecast:
    """Compiles a function for the devices of its arguments' shardings, or of its own
    `in_shardings`, and executes nothing.

    So it says, before there is a pod, whether a step fits there and what it takes. Compiling needs
    neither the devices nor the memory of the model: arguments are shapes.

    Args:
      fn: any function of arrays, or one that `jax.jit`, `jax.pmap` or `nnx.jit` returned.
      *args, **kwargs: arrays or `jax.ShapeDtypeStruct`s with shardings on one mesh, which may be
        one of `topology_mesh`.
      donate_argnums, out_shardings: as of `jax.jit`. An output that is to take the place of a
        donated argument needs the same sharding, so pin it.

    Returns:
      A `Forecast`, which prints as tables. Where the TPU compiler says that the program does not
      fit, that is a forecast as well; any other error of compiling is raised.

    Raises:
      LoRAError: `fn` is no function.

    The whole recipe, with a mesh of the devices at hand; for a pod, it is another mesh:

    >>> import math, jax, jax.numpy as jnp, optax, lora_jax as lora
    >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    >>> mesh = Mesh(jax.devices(), "fsdp")  # lora.parallel.topology_mesh("v5e:16x16", fsdp=256)
    >>> place = lambda tree, shardings: jax.tree.map(
    ...     lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    ... )
    >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
    >>> params = {
    ...     "up": jax.ShapeDtypeStruct((512, 2048), "bfloat16"),
    ...     "down": jax.ShapeDtypeStruct((2048, 512), "bfloat16"),
    ... }
    >>> params = place(params, jax.tree.map(lambda _: NamedSharding(mesh, P("fsdp")), params))
    >>> x = jax.ShapeDtypeStruct((64, 512), "bfloat16", sharding=NamedSharding(mesh, P("fsdp")))
    >>> targets = lora.select(params, lora.LoRAConfig(rank=8, targets=["up", "down"]))
    >>> where = lora.parallel.shardings(params, targets)
    >>> init = lambda: lora.init(jax.random.key(0), params, targets)
    >>> adapters = place(jax.eval_shape(init), where)
    >>> tx = optax.sgd(1e-3, momentum=0.9)
    >>> state = jax.eval_shape(tx.init, adapters)
    >>> state_where = lora.parallel.state_shardings(state, adapters, where)
    >>> def step(adapters, state, params, x):
    ...     loss = lambda adapters: jnp.mean(lora.adapt(fn)(lora.bind(params, adapters), x) ** 2)
    ...     updates, state = tx.update(jax.grad(loss)(adapters), state)
    ...     return optax.apply_updates(adapters, updates), state
    >>> plan = lora.parallel.forecast(
    ...     step, adapters, place(state, state_where), params, x,
    ...     donate_argnums=(0, 1), out_shardings=(where, state_where),
    ... )
    >>> local = lambda x: x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
    >>> trained = jax.tree.leaves((adapters, place(state, state_where)))
    >>> plan.aliased == sum(map(local, trained))  # the donated adapters and state
    True
    """
    if not callable(fn):
        raise LoRAError(
            f"expected a function, found a {type(fn).__name__}: lora.parallel.forecast(step, *args)"
        )
    donate_argnums = positions(donate_argnums, "donate_argnums")
    # A function that is jitted already keeps its own settings where none are given here.
    given = [d for d in (donate_argnums, out_shardings) if d not in ((), None)]
    jitted: Any = fn
    if given or not hasattr(fn, "lower"):
        jitted = jax.jit(fn, donate_argnums=donate_argnums, out_shardings=out_shardings)
    lowered = jitted.lower(*args, **kwargs)
    # JAX may not tell what it lowered for; then the arguments do.
    devices = compat.lowered_for(lowered) or _devices((args, kwargs))
    device = min(devices, key=lambda d: d.id)
    # Tracing and lowering are not counted.
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        # JAX has one error for all that XLA says: only this one is an answer.
        used, limit = _out_of_memory(str(e))
        if used is None:
            raise
        sizes: dict[str, Any] = dict(arguments=None, outputs=None, aliased=None, temporaries=None)
        sizes |= dict(peak=used, capacity=limit)
        costs: dict = {}
        text = ""
    else:
        sizes = {**_sizes(compiled.memory_analysis()), "capacity": capacity(device)}
        # None where the backend has no cost analysis.
        costs = compiled.cost_analysis() or {}
        text = compiled.as_text()
    seconds = time.perf_counter() - start
    return Forecast(
        device_kind=device.device_kind,
        devices=len(devices),
        **sizes,
        flops=costs.get("flops"),
        bytes_accessed=costs.get("bytes accessed"),
        collectives=collectives(text),
        seconds=seconds,
    )


def _devices(tree: Any) -> set[jax.Device]:
    """Those of the leaf that is on most of them; the default one, where no leaf says."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree)]
    found = [s.device_set for s in shardings if s is not None]
    return max(found, key=len, default={jax.devices()[0]})


def _sizes(stats: Any) -> dict[str, int]:
    sizes = dict(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
    )
    # The sum holds the aliased bytes three times (arguments, outputs, aliased); they exist once.
    return sizes | dict(peak=sum(sizes.values()) - 2 * sizes["aliased"])


def _out_of_memory(message: str) -> tuple[int | None, int | None]:
    """(bytes needed, bytes available) of the TPU compiler's refusal; else None."""
    for pattern in OUT_OF_MEMORY:
        if found := re.search(pattern, message):
            return _bytes(found["used"]), _bytes(found["limit"])
    return None, None


def _bytes(text: str) -> int:
    # 0 where the last character is a digit, and no unit.
    power = "KMGT".find(text[-1]) + 1
    return int(float(text[:-1] if power else text) * 1024**power)


def _size(n: int | None) -> str:
    if n is None:
        return "not known"
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if n >= 1024**power:
            return f"{n / 1024**power:.2f} {unit}"
    return f"{n} B"
