"""Optimisers of adapters, as optax transformations."""

from lora_jax.optim._adalora import adalora
from lora_jax.optim._galore import galore, scale_by_galore
from lora_jax.optim._labels import labels, lora_plus, trained_only
from lora_jax.optim._lora_muon import lora_muon, scale_by_lora_muon
from lora_jax.optim._lora_rite import lora_rite, scale_by_lora_rite
from lora_jax.optim._per_slot import PerSlotState, by_slot, per_slot
from lora_jax.optim._precondition import lora_fa, lora_pro, riemannian
from lora_jax.optim._tenants import join, leave

__all__ = [
    "labels",
    "trained_only",
    "lora_plus",
    "lora_fa",
    "riemannian",
    "lora_pro",
    "lora_rite",
    "scale_by_lora_rite",
    "lora_muon",
    "scale_by_lora_muon",
    "adalora",
    "galore",
    "scale_by_galore",
    "per_slot",
    "PerSlotState",
    "join",
    "leave",
    "by_slot",
]
