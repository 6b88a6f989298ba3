"""Writes tests/data/formats: adapters of other kinds, and what the tools that wrote them make of them.

    python tests/support/make_formats.py [folder ...]

Needs torch, transformers and peft 0.21.2; `mlx_*` mlx and mlx-lm, `diffusers_*` and `kohya_*` diffusers.
Each folder has the adapter as it was written, `base.safetensors` (the weights before) and
`merged.safetensors` (those of the modules that changed, after the tool's own merge, in fp32). All
parameters of the adapters are random; run it for a new kind, as the values change with torch's version.
"""

import pathlib
import shutil
import sys

FOLDER = pathlib.Path(__file__).parent.parent / "data" / "formats"
ALL = ["a", "b", "lin", "out"]
# folder: (model, peft's class of settings, settings)
KINDS = {
    "loha": ("mixed", "LoHa", {"r": 2, "alpha": 3, "target_modules": ALL, "use_effective_conv2d": True,
                               "rank_pattern": {"lin": 3}, "alpha_pattern": {"out": 5}}),
    "loha_flat": ("mixed", "LoHa", {"r": 2, "alpha": 3, "target_modules": ["a", "b"]}),
    "lokr": ("mixed", "LoKr", {"r": 1, "alpha": 2, "target_modules": ALL, "use_effective_conv2d": True}),
    "lokr_both": ("mixed", "LoKr", {"r": 1, "alpha": 2, "target_modules": ALL, "decompose_both": True,
                                    "decompose_factor": 4}),
    "miss": ("net", "Miss", {"r": 3, "target_modules": ["lin", "head"]}),
    "miss_mini": ("net", "Miss", {"r": 2, "mini_r": 3, "init_weights": "mini", "target_modules": ["lin", "head"]}),
    "miss_bat": ("net", "Miss", {"r": 2, "init_weights": "bat", "target_modules": ["lin", "head"]}),
    "hira": ("net", "Hira", {"r": 2, "target_modules": ["emb", "lin", "c1d", "head"], "rank_pattern": {"lin": 3}}),
    "hira_convs": ("mixed", "Hira", {"r": 2, "target_modules": ["a", "b"]}),
    "vera": ("net", "Vera", {"r": 3, "target_modules": ["lin", "head"], "bias": "vera_only"}),
    "gralora": ("net", "Gralora", {"r": 4, "gralora_k": 2, "alpha": 6, "hybrid_r": 2, "target_modules": ["lin", "c1d"]}),
    "fourierft": ("net", "FourierFT", {"n_frequency": 20, "scaling": 30.0, "random_loc_seed": 7,
                                       "target_modules": ["lin", "c1d", "head"], "n_frequency_pattern": {"head": 11}}),
    "shira": ("net", "Shira", {"r": 1, "target_modules": ["lin", "head"], "random_seed": 3}),
    "ia3": ("net", "IA3", {"target_modules": ["lin", "c1d", "head"], "feedforward_modules": ["head"]}),
    "ia3_convs": ("mixed", "IA3", {"target_modules": ALL, "feedforward_modules": ["b"]}),
    "oft": ("mixed", "OFT", {"r": 0, "oft_block_size": 2, "target_modules": ["lin", "out"]}),
    "oft_exact": ("mixed", "OFT", {"r": 2, "oft_block_size": 0, "target_modules": ALL, "block_share": True,
                                   "use_cayley_neumann": False}),
    "oft_bound": ("mixed", "OFT", {"r": 0, "oft_block_size": 4, "target_modules": ["out"], "coft": True, "eps": 0.1,
                                   "modules_to_save": ["lin"]}),
    "alora": ("untied", "Lora", {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"],
                                 "alora_invocation_tokens": [3, 5], "task_type": "CAUSAL_LM"}),
}  # fmt: skip


def write_peft(name, kind, cls, settings):
    import peft
    import torch
    import torch_models
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = torch_models.KINDS[kind]().eval()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    model = peft.get_peft_model(model, getattr(peft, cls + "Config")(**settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    model.save_pretrained(FOLDER / name)
    (FOLDER / name / "README.md").unlink(missing_ok=True)
    merged = model.merge_and_unload().state_dict()
    changed = {k: v.contiguous() for k, v in merged.items() if not torch.equal(v, base[k])}
    save_file(base, FOLDER / name / "base.safetensors")
    save_file(changed, FOLDER / name / "merged.safetensors")


def main():
    wanted = sys.argv[1:]
    for name, (kind, cls, settings) in KINDS.items():
        if wanted and name not in wanted:
            continue
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        write_peft(name, kind, cls, settings)
        print(name, sum(f.stat().st_size for f in (FOLDER / name).iterdir()), "bytes")


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    main()
