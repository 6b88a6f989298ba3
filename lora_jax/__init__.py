"""LoRA as a JAX transform."""

from lora_jax._activations import corda, eva
from lora_jax._adalora import adalora, orthogonality, pruned
from lora_jax._adapt import adapt, coverage
from lora_jax._adapters import DoRA, Full, LoRA, Rows, choose
from lora_jax._algebra import combine, extract, resize, scaled
from lora_jax._bind import bind
from lora_jax._bitsandbytes import bitsandbytes_weight
from lora_jax._checkpoint import Restored, restore, save
from lora_jax._compare import Comparison, Likeness, compare
from lora_jax._config import LoRAConfig, Rule
from lora_jax._coverage import Coverage
from lora_jax._dora import dora
from lora_jax._errors import LoRAError
from lora_jax._factors import factors
from lora_jax._family import AdaLoRA, LoRAXS, VeRA
from lora_jax._family_init import init_adalora, init_lora_xs, init_vera
from lora_jax._fingerprint import Fingerprint, fingerprint
from lora_jax._forecast import Forecast, forecast
from lora_jax._galore import galore, scale_by_galore
from lora_jax._gguf import gguf_weight
from lora_jax._gradients import low_rank_gradients
from lora_jax._init import init
from lora_jax._initialisers import lora_ga, lora_one, olora, on_original, orthogonal, pissa
from lora_jax._interpret import Use
from lora_jax._learned import Change, Learned, learned
from lora_jax._loftq import loftq
from lora_jax._memory import Memory, memory
from lora_jax._merge import merge, unmerge
from lora_jax._moments import second_moments
from lora_jax._optim import labels, lora_plus, trained_only
from lora_jax._peft import PeftAdapter, load_peft
from lora_jax._peft_map import TorchMapping
from lora_jax._peft_save import save_peft, torch_mapping
from lora_jax._precondition import lora_fa, lora_pro, riemannian
from lora_jax._propose import Proposal, propose
from lora_jax._quantize import dequantize, quantization_errors, quantize
from lora_jax._quantized import Quantized
from lora_jax._rite import lora_muon, lora_rite, scale_by_lora_muon, scale_by_lora_rite
from lora_jax._select import select
from lora_jax._shardings import shardings, state_shardings
from lora_jax._soups import dare, knots, prune, ties
from lora_jax._spread import gathered
from lora_jax._stack import put, stack
from lora_jax._survey import Survey, survey
from lora_jax._targets import Target, Targets
from lora_jax._topology import topology_mesh
from lora_jax._weight import AdaptedWeight, Geometry

__version__ = "0.1.0"

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
    "dora",
    "DoRA",
    "Full",
    "Rows",
    # trained trees that become factors
    "factors",
    "init_vera",
    "VeRA",
    "init_lora_xs",
    "LoRAXS",
    "init_adalora",
    "AdaLoRA",
    "adalora",
    "orthogonality",
    "pruned",
    # where training starts, and where adapters go
    "pissa",
    "olora",
    "orthogonal",
    "lora_ga",
    "lora_one",
    "low_rank_gradients",
    "eva",
    "corda",
    "second_moments",
    "on_original",
    "propose",
    "Proposal",
    # the transform
    "bind",
    "AdaptedWeight",
    "adapt",
    "coverage",
    "Coverage",
    # a quantised base
    "quantize",
    "dequantize",
    "quantization_errors",
    "loftq",
    "gguf_weight",
    "bitsandbytes_weight",
    "Quantized",
    # one device or a pod
    "shardings",
    "state_shardings",
    "gathered",
    "topology_mesh",
    "memory",
    "Memory",
    "forecast",
    "Forecast",
    # checkpoints
    "save",
    "restore",
    "Restored",
    "fingerprint",
    "Fingerprint",
    # files
    "load_peft",
    "save_peft",
    "PeftAdapter",
    "torch_mapping",
    "TorchMapping",
    # training and deploying
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
    "galore",
    "scale_by_galore",
    "merge",
    "unmerge",
    # adapters as values
    "combine",
    "scaled",
    "resize",
    "extract",
    "ties",
    "dare",
    "prune",
    "knots",
    "compare",
    "Comparison",
    "Likeness",
    "learned",
    "Learned",
    "Change",
    # many at once
    "stack",
    "choose",
    "put",
    "LoRAError",
]
