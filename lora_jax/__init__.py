"""LoRA as a JAX transform: the flow, from a parameter tree to trained and merged adapters."""

import importlib
from typing import TYPE_CHECKING

from lora_jax._adapt import adapt, coverage
from lora_jax._attach import attach, detach
from lora_jax._bind import bind
from lora_jax._config import LoRAConfig, Rule
from lora_jax._core.errors import LoRAError
from lora_jax._core.geometry import Geometry
from lora_jax._init import init
from lora_jax._interpret.coverage import Coverage, Use
from lora_jax._merge import merge, unmerge
from lora_jax._nodes.adapters import DoRA, Full, LoRA, Rows
from lora_jax._nodes.weight import AdaptedWeight
from lora_jax._select import select
from lora_jax._survey import Survey, survey
from lora_jax._targets import Target, Targets

# For type checkers and editors; when it runs, `__getattr__` imports them.
if TYPE_CHECKING:
    from lora_jax import algebra, checkpoint, methods, optim, parallel, peft, quant

__version__ = "0.1.0"

_NAMESPACES = ("algebra", "methods", "optim", "quant", "parallel", "checkpoint", "peft")

__all__ = [
    # which leaves, and how each is used
    "LoRAConfig",
    "Rule",
    "Geometry",
    "survey",
    "Survey",
    "Use",
    "select",
    "Targets",
    "Target",
    # the trainable tree
    "init",
    "LoRA",
    "DoRA",
    "Full",
    "Rows",
    # the transform
    "bind",
    "AdaptedWeight",
    "adapt",
    "coverage",
    "Coverage",
    "attach",
    "detach",
    # deploying
    "merge",
    "unmerge",
    "LoRAError",
    # all else, by namespace
    "algebra",
    "methods",
    "optim",
    "quant",
    "parallel",
    "checkpoint",
    "peft",
]


def __getattr__(name: str):
    """The namespaces, imported when they are first used: orbax alone takes a second."""
    if name in _NAMESPACES:
        # This sets the attribute as well, so `__getattr__` is called once for each of them.
        return importlib.import_module(f"lora_jax.{name}")
    raise AttributeError(f"module 'lora_jax' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
