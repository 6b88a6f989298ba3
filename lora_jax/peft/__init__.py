"""PEFT's adapters and Hugging Face's base models, in their files: read and written."""

from lora_jax.peft._load import PeftAdapter, load
from lora_jax.peft._load_base import load_base
from lora_jax.peft._mapping import Entry, TorchMapping
from lora_jax.peft._save import mapping, save
from lora_jax.peft._save_base import save_base

__all__ = [
    "load",
    "save",
    "load_base",
    "save_base",
    "mapping",
    "PeftAdapter",
    "TorchMapping",
    "Entry",
]
