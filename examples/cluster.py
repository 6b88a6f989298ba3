"""What train.py needs to run on one device or on many, in one process or in several."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tensorboardX import SummaryWriter

AXES = ("data", "fsdp", "tp")
BATCH = P(("data", "fsdp"))  # its rows; what follows is replicated
RULES = [  # of the base: the first whose pattern is in a leaf's path; axis 0 of a kernel: layers
    (r"(q|k|v|gate|up)_proj/kernel", P(None, "fsdp", "tp")),
    (r"(o|down)_proj/kernel", P(None, "tp", "fsdp")),
    (r"embedding", P("tp", "fsdp")),
    (r"", P()),
]


def make_mesh(text: str | None) -> Mesh:
    """The mesh of "data=2,fsdp=2,tp=2": all devices, by default as "data". Others have size 1."""
    text = text or f"data={jax.device_count()}"
    sizes = {name: int(n) for name, n in re.findall(r"(\w+)=(\d+)", text)}
    same = text == ",".join(f"{name}={n}" for name, n in sizes.items())
    if (
        not same
        or not sizes.keys() <= set(AXES)
        or np.prod(list(sizes.values())) != jax.device_count()
    ):
        raise SystemExit(f"--mesh {text}: expected sizes of {', '.join(AXES)}, whose product is "
                         f"the number of devices, {jax.device_count()}")  # fmt: skip
    shape = tuple(sizes.get(name, 1) for name in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def place(params: Any, mesh: Mesh, dtype: Any) -> Any:
    """The base in `dtype`, sharded by RULES. Each process moves what its own devices hold."""

    def leaf(keys, x):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        spec = next(spec for pattern, spec in RULES if re.search(pattern, path))
        x = np.asarray(x).astype(dtype)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])

    return jax.tree_util.tree_map_with_path(leaf, params)


def batches(examples: grain.MapDataset, size: int, mesh: Mesh, start: int = 0) -> Iterator[Any]:
    """Global batches of `size` examples, from example `start` on.

    Batch i has examples start + i·size and the size - 1 after it, whatever the mesh and the number
    of processes. Each process reads the rows that its devices hold, and no others.
    """
    sharding = NamedSharding(mesh, BATCH)
    held = sharding.addressable_devices_indices_map((size,)).values()
    rows = sorted({row for (where,) in held for row in range(size)[where]})
    n = len(rows)
    local = (
        grain.MapDataset.range((len(examples) - start) // size * n)
        .map(lambda j: examples[start + j // n * size + rows[j % n]])
        .batch(n)
        .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
    )
    for batch in local:
        yield jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, x, (size, *x.shape[1:])),
            batch,
        )


def make_log(directory: Path) -> Callable:
    """A function that prints metrics and writes them for TensorBoard; of process 0 alone."""
    if jax.process_index():
        return lambda step, kind, **metrics: None
    writer = SummaryWriter(str(directory / "events"))

    def log(step, kind, **metrics):
        said = "  ".join(f"{name} {float(x):.5g}" for name, x in metrics.items())
        print(f"step {step:6} {kind:5}  {said}", flush=True)
        for name, x in metrics.items():
            writer.add_scalar(f"{kind}/{name}", float(x), step)
        writer.flush()

    return log


class Stop:
    """SIGTERM (preemption) and SIGINT: a handler notes the signal, the loop asks after each step.

    All processes must leave after the same step, or some would wait for the others for ever. So
    they take the maximum of what each has noted, and read it a step later, when nobody waits for
    it. JAX's own `reached_preemption_sync_point` needs no collective, but hears SIGTERM alone, and
    loses count if orbax, at the end of a save, asks it about the step that was saved.
    """

    def __init__(self, mesh: Mesh):  # after jax.distributed.initialize, whose handler it replaces
        self.signal = 0
        self.each = NamedSharding(mesh, P(mesh.axis_names))
        self.most = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
        self.asked = np.int32(0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.signal = number

    def status(self) -> int:
        """What all processes are to leave with, as shells count it; 0: go on."""
        found = self.signal
        if jax.process_count() > 1:
            noted = np.array([self.signal], np.int32)  # on each device, its process's
            noted = jax.make_array_from_callback((self.each.mesh.size,), self.each, lambda _: noted)
            found, self.asked = int(self.asked), self.most(noted)
        return 128 + found if found else 0
