"""Adapters on disk: save, restore, fingerprint."""

from lora_jax.checkpoint._checkpoint import Restored, restore, save
from lora_jax.checkpoint._fingerprint import Fingerprint, fingerprint

__all__ = ["save", "restore", "Restored", "fingerprint", "Fingerprint"]
