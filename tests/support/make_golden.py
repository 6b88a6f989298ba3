"""Writes the golden adapters of tests/peft/test_peft_kinds.py; needs torch, transformers and peft 0.21.2.

    python tests/support/make_golden.py [folder ...]

Each folder is as those of tests/data/peft_golden/README.md; the models are in torch_models.py. The
values come from torch's generator, so the files change with its version: run it for a new kind.
"""

import pathlib
import sys

FOLDER = pathlib.Path(__file__).parent.parent / "data" / "peft_golden"
PLAIN = {"r": 2, "lora_alpha": 5}
PATTERNS = {"rank_pattern": {"gate_up_proj": 4}, "alpha_pattern": {"experts.down_proj": 3}}
EXPERTS = {
    **PLAIN,
    **PATTERNS,
    "target_modules": ["out"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
PRUNED = {"init_r": 4, "target_r": 1, "tinit": 2, "tfinal": 6, "deltaT": 1, "total_step": 20}
DORA = {**PLAIN, "use_dora": True}
# folder: (model, settings, whether AdaLoRA takes ranks away)
GOLDEN = {
    "kind_convs": ("convs", {**PLAIN, "use_rslora": True, "target_modules": list("abcd")}, False),
    "kind_gated_plain": ("gated_plain", EXPERTS, False),
    "kind_gated_flagged": ("gated_flagged", EXPERTS, False),
    "kind_gated_turned": ("gated_turned", EXPERTS, False),
    "kind_classifier": (
        "classifier",
        {**PLAIN, "bias": "all", "target_modules": ["lin"], "modules_to_save": ["classifier"]},
        False,
    ),
    "kind_mha_bias": ("mha", {**PLAIN, "bias": "all", "target_modules": ["attn", "out"]}, False),
    "kind_adalora": (
        "net",
        {**PRUNED, "lora_alpha": 7, "target_modules": ["lin", "c1d"], "alpha_pattern": {"lin": 2}},
        True,
    ),
    "kind_dora_convs": (
        "convs",
        {
            **DORA,
            "use_rslora": True,
            "rank_pattern": {"c": 3},
            "alpha_pattern": {"a|d": 3},
            "target_modules": list("abcd"),
        },
        False,
    ),
    "kind_dora_classifier": (
        "classifier",
        {
            **DORA,
            "bias": "all",
            "target_modules": ["emb", "lin"],
            "modules_to_save": ["classifier"],
        },
        False,
    ),
    "kind_dora_llama": (
        "two_layers",
        {
            **DORA,
            "rank_pattern": {"layers.1.self_attn.q_proj": 4},  # the scale is that of the others
            "alpha_pattern": {"layers.1.self_attn.q_proj": 10},
            "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"],
        },
        False,
    ),
    "kind_dora_gpt2": ("gpt2", {**DORA, "target_modules": ["c_attn", "c_proj"]}, False),
    "kind_tied_both": (
        "tied",
        {**PLAIN, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        False,
    ),
    "kind_tied_tokens": (
        "tied",
        {**PLAIN, "target_modules": ["q_proj"], "trainable_token_indices": [3, 10]},
        False,
    ),
}


def main():
    import torch_models

    for name, (kind, settings, prune) in GOLDEN.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        torch_models.write_kind(kind, FOLDER / name, settings, prune)
        print(name, sum(f.stat().st_size for f in (FOLDER / name).iterdir()), "bytes")


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    main()
