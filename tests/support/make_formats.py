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
    randomised(model)
    model.save_pretrained(FOLDER / name)
    (FOLDER / name / "README.md").unlink(missing_ok=True)
    save_file(base, FOLDER / name / "base.safetensors")
    if name == "alora":  # which cannot be merged
        ids = torch.tensor([[7, 1, 3, 5, 9, 2], [3, 5, 3, 5, 11, 4]])
        with torch.no_grad():
            y = model(input_ids=ids).logits
            model.eval()
        save_file({"in_x": ids, "y": y}, FOLDER / name / "io.safetensors")
        return
    save_changed(FOLDER / name, model.merge_and_unload().state_dict(), base)


def randomised(model):
    import torch

    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))


def save_changed(folder, merged, base, base_of_changed=False):
    import torch
    from safetensors.torch import save_file

    changed = {k: v.contiguous() for k, v in merged.items() if not torch.equal(v, base[k])}
    save_file(changed, folder / "merged.safetensors")
    if base_of_changed:
        save_file({k: base[k] for k in changed}, folder / "base.safetensors")


MLX_KEYS = ["self_attn.q_proj", "mlp.down_proj", "model.embed_tokens"]


def write_mlx(name):
    import json

    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.models import llama
    from mlx_lm.models.switch_layers import SwitchLinear
    from mlx_lm.tuner.utils import linear_to_lora_layers

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.up = nn.Linear(6, 3), SwitchLinear(6, 5, 3, bias=False)

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [Block()]

    mx.random.seed(0)
    if name == "mlx_experts":
        model, keys = Experts(), ["router", "up"]
    else:
        keys = MLX_KEYS[:2] if name == "mlx_dora" else MLX_KEYS
        model = llama.Model(llama.ModelArgs(
            model_type="llama", hidden_size=16, num_hidden_layers=2, intermediate_size=8, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=1e-6, vocab_size=24, tie_word_embeddings=False))  # fmt: skip
    base = dict(tree_flatten(model.parameters()))
    model.freeze()
    p = {"rank": 2, "scale": 3.0, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, 1, p, use_dora=name == "mlx_dora")
    new = [
        (k, v + 0.3 * mx.random.normal(v.shape))
        for k, v in tree_flatten(model.trainable_parameters())
    ]
    model.update(tree_unflatten(new))
    folder = FOLDER / name
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(new))
    config = {"fine_tune_type": "dora" if name == "mlx_dora" else "lora", "num_layers": 1, "lora_parameters": p,
              "model": "someone/tiny", "iters": 10}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=4))
    fused = [(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(fused))
    merged = dict(tree_flatten(model.parameters()))
    changed = {k: v for k, v in merged.items() if not mx.array_equal(v, base[k])}
    mx.save_safetensors(str(folder / "merged.safetensors"), changed)
    mx.save_safetensors(str(folder / "base.safetensors"), {k: base[k] for k in changed})


def write_diffusers(name):
    """A UNet and its text encoder, adapted by PEFT, saved by diffusers in its own format or in kohya's."""
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, cross_attention_dim=8, attention_head_dim=4,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",))  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                        num_attention_heads=2, max_position_embeddings=8))  # fmt: skip
    models = {"unet": unet, "text_encoder": text}
    base = {f"{p}.{k}": v.clone() for p, m in models.items() for k, v in m.state_dict().items()}
    patterns = (
        {"rank_pattern": {"conv1": 3}, "alpha_pattern": {"to_k": 5}} if name != "kohya" else {}
    )
    targets = r"down_blocks.0.(attentions.0.transformer_blocks.0.attn1.to_(q|k|out.0)|resnets.0.conv1|attentions.0.proj_in)"
    unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets, **patterns))
    text.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "out_proj"]))
    for m in models.values():
        randomised(m)
    folder = FOLDER / name
    folder.mkdir()
    states = {p: get_peft_model_state_dict(m) for p, m in models.items()}
    StableDiffusionPipeline.save_lora_weights(
        folder, states["unet"], text_encoder_lora_layers=states["text_encoder"],
        **({} if name != "diffusers" else _collate_lora_metadata(models)))  # fmt: skip
    file = folder / "pytorch_lora_weights.safetensors"
    if name == "kohya":
        from diffusers.utils import convert_state_dict_to_kohya

        state = convert_state_dict_to_kohya(load_file(file))
        for k in [k for k in state if k.endswith(".alpha")]:  # which it sets to the rank
            state[k] = torch.tensor(4.0 if "_te" in k else 5.0 if "conv1" in k else 3.0)
        file.unlink()
        save_file(state, file := folder / "some_style.safetensors")
    for m in models.values():
        (m.delete_adapters if m is unet else m.delete_adapter)("default")
    read = lambda: StableDiffusionPipeline.lora_state_dict(file, return_lora_metadata=True)
    state, alphas, metadata = read()
    StableDiffusionPipeline.load_lora_into_unet(
        state, alphas, unet, adapter_name="x", metadata=metadata
    )
    state, alphas, metadata = read()
    StableDiffusionPipeline.load_lora_into_text_encoder(
        state, alphas, text, prefix="text_encoder", adapter_name="x", metadata=metadata)  # fmt: skip
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = {}
    for p, m in models.items():
        for module, layer in m.named_modules():
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
                merged[f"{p}.{module}.weight"] = layer.get_base_layer().weight.data.clone()
    save_changed(folder, merged, base, base_of_changed=True)


def main():
    writers = {name: lambda n: write_peft(n, *KINDS[n]) for name in KINDS}
    writers |= dict.fromkeys(("mlx", "mlx_dora", "mlx_experts"), write_mlx)
    writers |= dict.fromkeys(("diffusers", "diffusers_plain", "kohya"), write_diffusers)
    for name in sys.argv[1:] or writers:
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        writers[name](name)
        print(name, sum(f.stat().st_size for f in (FOLDER / name).iterdir()), "bytes")


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    main()
