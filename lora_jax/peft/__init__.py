"""Adapters in PEFT's files: read and written."""

from lora_jax.peft._load import PeftAdapter, load
from lora_jax.peft._mapping import TorchMapping
from lora_jax.peft._save import mapping, save

__all__ = [
    "load",
    "save",
    "mapping",
    "PeftAdapter",
    "TorchMapping",
]
