"""Eight simulated devices, strict promotion: set before JAX starts.

Most of the time of these tests is LLVM's, so it does less: XLA's own passes, which the figures of
cost and memory come from, are the same.
"""

import os
import zlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    ]
)

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_numpy_dtype_promotion", "strict")

# Always the same examples where a change is checked, others each night.
settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=2500, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

collect_ignore = ["support/torch_models.py"]  # imported where torch is installed


def pytest_addoption(parser):
    parser.addoption(
        "--parts", metavar="1,2/3", help="of N parts of all tests; of tables a quarter"
    )


def pytest_collection_modifyitems(config, items):
    if config.option.parts:
        parts, n = config.option.parts.split("/")
        parts = [*map(int, parts.split(","))]
        # By name, as the versions of a leg may lack some of the tests; every fourth case of a table.
        of = lambda item: int(n) * (4 if hasattr(item, "callspec") else 1)
        mine = lambda item: zlib.crc32(item.nodeid.encode()) % of(item) + 1 in parts
        config.hook.pytest_deselected(items=[item for item in items if not mine(item)])
        items[:] = filter(mine, items)
    if config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="slow: run with -m slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
