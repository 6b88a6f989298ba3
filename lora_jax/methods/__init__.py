"""Methods beside LoRA: what is trained, and where it starts."""

from lora_jax._nodes.factors import factors
from lora_jax._nodes.node import Node
from lora_jax.methods._adalora import AdaLoRA, init_adalora, orthogonality, pruned
from lora_jax.methods._dora import dora
from lora_jax.methods._from_gradients import lora_ga, lora_one, low_rank_gradients
from lora_jax.methods._from_inputs import corda, eva, second_moments
from lora_jax.methods._from_weights import olora, on_original, orthogonal, pissa
from lora_jax.methods._lora_xs import LoRAXS, init_lora_xs
from lora_jax.methods._propose import Proposal, propose
from lora_jax.methods._vera import VeRA, init_vera

__all__ = [
    "Node",
    "dora",
    "init_vera",
    "VeRA",
    "init_lora_xs",
    "LoRAXS",
    "init_adalora",
    "AdaLoRA",
    "factors",
    "orthogonality",
    "pruned",
    "pissa",
    "olora",
    "orthogonal",
    "on_original",
    "low_rank_gradients",
    "lora_ga",
    "lora_one",
    "second_moments",
    "eva",
    "corda",
    "propose",
    "Proposal",
]
