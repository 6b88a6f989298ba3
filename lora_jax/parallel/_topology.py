"""Meshes of devices that are not there, and what memory a device leaves to a program."""

from __future__ import annotations

import math
import re

import jax
import jaxlib
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh

from lora_jax._core.errors import LoRAError
from lora_jax._core.numbers import integer

GIB = 2**30


H100_BYTES = 84978434048


# What XLA asks of a GPU that is not there; the figures of an H100 SXM, from XLA's gpu_specs.
H100 = f"""
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info {{ major: 9 minor: 8 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  memory_bandwidth: 3352320000000 device_memory_size: {H100_BYTES}
}}
"""


# Bytes that a program may use on one device. TPU: what libtpu 0.0.42 names as available when it
# refuses a program, a little less than the HBM of the data sheets. A TPU7x chip is two devices.
CAPACITY = {
    "TPU v4": int(30.75 * GIB),
    "TPU v5 lite": int(15.75 * GIB),
    "TPU v5": int(95.74 * GIB),
    "TPU v6 lite": int(31.25 * GIB),
    "TPU7x": int(94.75 * GIB),
    "NVIDIA H100 80GB HBM3": H100_BYTES,
}


NAMES = "'v4:2x2x2', 'v5e:16x16', 'v5p:4x4x4', 'v6e:16x16', 'tpu7x:2x2x1' or 'h100:1x1x8'"


def topology_mesh(name: str, /, *, num_slices: int = 1, **axes: int) -> Mesh:
    """A mesh of TPUs or GPUs that need not be there, to compile for.

    The compilers are the real ones. TPUs need libtpu, `pip install 'jax[tpu]'`, and on a machine
    without them `JAX_PLATFORMS=cpu TPU_WORKER_HOSTNAMES=localhost` in the environment; add
    `ALLOW_MULTIPLE_LIBTPU_LOAD=1` for several processes at a time. Nothing is set here, since on a
    real pod these would break it. GPUs need `jax-cuda12-plugin` in jaxlib's own version, and
    neither a driver nor the CUDA libraries.

    Args:
      name: the generation and its shape in chips: `v4`, `v5e`, `v5p`, `v6e` or `tpu7x`, as in
        `v5e:16x16`; or `h100`, in partitions, hosts of each and GPUs of each, as in `h100:1x1x8`.
      num_slices: of that shape, joined by the data-centre network. The first axis runs over them.
      **axes: the axes of the mesh and their sizes, in order.

    Returns:
      A mesh of `Auto` axes for the shardings of `jax.ShapeDtypeStruct`s; see `forecast`. No array
      can be placed on it.

    Raises:
      LoRAError: an unknown name, a compiler that is not installed or that refuses the name, axes
        whose product is not the number of devices.

    >>> import lora_jax as lora
    >>> mesh = lora.parallel.topology_mesh("v5e:16x16", fsdp=16, tp=16)  # doctest: +SKIP
    """
    match = re.fullmatch(r"(v\d\w*|tpu\d\w*|h100):([1-9]\d*(?:x[1-9]\d*)+)", str(name), re.ASCII)
    if not match:
        raise LoRAError(f"{name!r} is not the name of a topology: expected e.g. {NAMES}")
    kind, shape = match[1], tuple(map(int, match[2].split("x")))
    if not axes or any((integer(n) or 0) < 1 for n in (num_slices, *axes.values())):
        raise LoRAError(
            f"expected positive integers, found num_slices={num_slices}, {axes}: "
            f"lora.parallel.topology_mesh({name!r}, fsdp={math.prod(shape)})"
        )
    devices = (_gpus if kind == "h100" else _tpus)(name, shape, num_slices)
    sizes = tuple(axes.values())
    if math.prod(sizes) != len(devices):
        raise LoRAError(
            f"{name!r} has {len(devices)} devices"
            + (f" in {num_slices} slices" if num_slices > 1 else "")
            + f", the axes {axes} have {math.prod(sizes)}"
        )
    if sizes[0] % num_slices:
        raise LoRAError(
            f"the first axis runs over the {num_slices} slices, which do not divide it: {axes}"
        )
    # A mesh in the order of the GPUs: there is no torus to follow.
    if kind == "h100":
        return Mesh(np.array(devices).reshape(sizes), tuple(axes))
    # The shape within a slice, and over slices: their product is the mesh's.
    inside, across = (sizes[0] // num_slices, *sizes[1:]), (num_slices, *[1] * (len(sizes) - 1))
    # An axis of the mesh need not be whole physical ones: 8 × 32 fits on a torus of 16 × 16.
    split = dict(allow_split_physical_axes=True)
    grid = (
        mesh_utils.create_hybrid_device_mesh(inside, across, devices, **split)
        if num_slices > 1
        else mesh_utils.create_device_mesh(sizes, devices, **split)
    )
    return Mesh(grid, tuple(axes))


def capacity(device: jax.Device) -> int | None:
    """Bytes that a program may use on a device: its own figure if it is there, or a known one."""
    try:
        stats = device.memory_stats() or {}
    # A device that is not there has no statistics.
    except jax.errors.JaxRuntimeError:
        stats = {}
    return stats.get("bytes_limit", CAPACITY.get(device.device_kind))


def _tpus(name: str, shape: tuple[int, ...], num_slices: int) -> list:
    # A host has 2x2 chips, but of a side of odd length; a v4 chip's two cores are one device.
    host = [2 if n % 2 == 0 else 1 for n in shape[:2]] + [1]
    options: dict = {"chips_per_host_bounds": host, "num_slices": num_slices}
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"
    try:
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except RuntimeError as e:
        if "not installed" in str(e):
            fix = "pip install 'jax[tpu]'"
        elif "lockfile" in str(e) or "in use" in str(e):
            fix = "another process has libtpu: set ALLOW_MULTIPLE_LIBTPU_LOAD=1 in the environment"
        else:
            fix = f"expected e.g. {NAMES}"
        raise LoRAError(f"{name!r}: {e}\n{fix}") from e


def _gpus(name: str, shape: tuple[int, ...], num_slices: int) -> list:
    if num_slices > 1 or len(shape) != 3:
        raise LoRAError(
            f"{name!r}, num_slices={num_slices}: of GPUs, expected partitions, hosts of each and "
            "GPUs of each, as in 'h100:1x1x8', and no slices"
        )
    try:
        return topologies.get_topology_desc(
            "h100", "cuda", topology="x".join(map(str, shape)), target_config=H100
        ).devices
    except NotImplementedError as e:
        raise LoRAError(
            f"{name!r}: the CUDA plugin is not installed: "
            f"pip install jax-cuda12-plugin=={jaxlib.__version__}"
        ) from e
