"""LoRA as a JAX transform: the flow, from a parameter tree to trained and merged adapters."""

import importlib
from typing import TYPE_CHECKING, Any

# For type checkers and editors; when it runs, `__getattr__` imports them.
if TYPE_CHECKING:
    from lora_jax import algebra, checkpoint, methods, optim, parallel, peft, quant
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

# Here alone: the build reads it as text, and the metadata have it from there.
__version__ = "0.2.0"

# The same again, for `__getattr__`; what is not here is a namespace.
_HOMES = {
    "_adapt": ("adapt", "coverage"),
    "_attach": ("attach", "detach"),
    "_bind": ("bind",),
    "_config": ("LoRAConfig", "Rule"),
    "_core.errors": ("LoRAError",),
    "_core.geometry": ("Geometry",),
    "_init": ("init",),
    "_interpret.coverage": ("Coverage", "Use"),
    "_merge": ("merge", "unmerge"),
    "_nodes.adapters": ("DoRA", "Full", "LoRA", "Rows"),
    "_nodes.weight": ("AdaptedWeight",),
    "_select": ("select",),
    "_survey": ("Survey", "survey"),
    "_targets": ("Target", "Targets"),
}

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


# Checkers read the imports above alone, so that a name that there is not is an error to them.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Imports a public name when it is first used: `lora-jax --help` does not wait for JAX,
        nor the flow for orbax."""
        if name not in __all__:
            raise AttributeError(f"module 'lora_jax' has no attribute '{name}'")
        home = next((module for module, names in _HOMES.items() if name in names), None)
        if home is None:
            # A namespace: its import sets the attribute.
            return importlib.import_module(f"lora_jax.{name}")
        value = getattr(importlib.import_module(f"lora_jax.{home}"), name)
        # From now on it is found without a call of this function.
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
