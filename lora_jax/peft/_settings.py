"""Which settings PEFT's files have: those that are read, refused, or of training alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Settings of training or of initialisation alone, and those that are read below.
HARMLESS = set(
    """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r
    target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora
    modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern
    use_dora megatron_config megatron_core trainable_token_indices loftq_config eva_config
    corda_config lora_ga_config qalora_group_size runtime_config lora_bias target_parameters
    velora_config ensure_weight_tying beta1 beta2 deltaT init_r orth_reg_weight target_r tfinal
    tinit total_step merge_weights
    """.split()
)

MERGE = "merge the adapter in PEFT (merge_and_unload) and load the merged weights"

REFUSED = {
    "use_qalora": f"QALoRA pools its inputs; {MERGE}",
    "use_bdlora": f"BD-LoRA is block-diagonal; {MERGE}",
    "kasa_config": f"KaSA changes the base weights; {MERGE}",
    "monteclora_config": "MonteCLoRA samples its factors: no one update is the adapter's",
    "arrow_config": "Arrow routes between adapters by the input: no one update is the adapter's",
    "alora_invocation_tokens": "aLoRA is active from these tokens on only, which no one update is: "
    "found = lora.peft.load(..., ignore=['alora_invocation_tokens']), then for each batch "
    "lora.algebra.choose(lora.algebra.stack([found.adapters]), 0, found.active(ids))",
    "layer_replication": f"the layers of the base are replicated; {MERGE}",
}

# PEFT's other types that add an update to a weight: {type: (settings of training alone, {setting
# that the update depends on: PEFT's default})}.
OTHERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "LOHA": ("rank_dropout module_dropout use_effective_conv2d init_weights", {"alpha": 8.0}),
    "LOKR": (
        "rank_dropout rank_dropout_scale module_dropout use_effective_conv2d init_weights "
        "decompose_both decompose_factor",
        {"alpha": 8.0},
    ),
    "MISS": ("miss_dropout", {"mini_r": 1, "init_weights": True}),
    "HIRA": ("hira_dropout init_weights", {}),
    "VERA": ("projection_prng_key save_projection vera_dropout d_initial init_weights", {}),
    "GRALORA": ("gralora_dropout gralora_k hybrid_r init_weights", {"alpha": 64.0}),
    "FOURIERFT": (
        "n_frequency n_frequency_pattern init_weights",
        {"scaling": 150.0, "random_loc_seed": 777},
    ),
    "SHIRA": ("mask_type random_seed init_weights", {}),
    "IA3": ("init_ia3_weights", {"feedforward_modules": ()}),
    "OFT": (
        "oft_block_size module_dropout init_weights",
        {
            "coft": False,
            "eps": 6e-5,
            "block_share": False,
            "use_cayley_neumann": True,
            "num_cayley_neumann_terms": 5,
        },
    ),
}

# Settings of LoRA that change the function, and that PEFT would pass over in one of `OTHERS`.
LORA_ALONE = """
    use_dora use_rslora lora_bias lora_dropout target_parameters trainable_token_indices
    ensure_weight_tying
""".split()

# Settings of any type that `lora.peft.save` writes again, as they say whose adapter it is.
ABOUT = ("task_type", "base_model_name_or_path", "revision", "auto_mapping")

# What settings say where they mean nothing.
NOTHING = ("none", "None", "null", "auto", "default", "off")


def unknown(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that PEFT 0.17 to 0.21 does not have."""
    # str, as the type is not checked here: it may be a list.
    training, own = OTHERS.get(str(raw.get("peft_type")), ("", {}))
    known = {*HARMLESS, *REFUSED, *training.split(), *own}
    return {k: v for k, v in raw.items() if k not in known}


def kept(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What `lora.peft.save` writes again: whose adapter it is, and what is not known here."""
    about = {k: raw[k] for k in (*ABOUT, "alora_invocation_tokens") if raw.get(k) is not None}
    return about | unknown(raw)


def switches(value: Any) -> bool:
    """Whether a value may turn something on: anything but nothing, in whatever form."""
    if isinstance(value, dict | list):
        return any(map(switches, value.values() if isinstance(value, dict) else value))
    return bool(value) and value not in NOTHING


def as_alpha(rank: int, scale: float) -> int | float:
    """The alpha with alpha / rank == scale, to the last bit where there is one."""
    # It may be rounded: the number beside it may be the one that divides back.
    alpha = scale * rank
    near = [float(round(alpha)), alpha, math.nextafter(alpha, 0), math.nextafter(alpha, math.inf)]
    alpha = next((x for x in near if x / rank == scale), alpha)
    return int(alpha) if alpha == int(alpha) else alpha
