"""Writes the golden bases of tests/peft/test_bases.py; needs torch and transformers 4.57.6.

    python tests/support/make_bases.py [folder ...]

Each folder is what save_pretrained wrote of a tiny model of random values; beside it are an input and
what the model gives for it in fp32. The values come from torch's generator, so the files
change with its version: run it for a new kind.
"""

import pathlib
import sys

FOLDER = pathlib.Path(__file__).parent.parent / "data" / "bases"
LLAMA = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
BIASES = {"attention_bias": True, "mlp_bias": True}
BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
GPT2 = {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
VIT = {
    **{k: v for k, v in BERT.items() if k not in ("vocab_size", "max_position_embeddings")},
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 3,
}
MIXTRAL = {
    **LLAMA,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}
QWEN = {
    **LLAMA,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "head_dim": 8,
    "decoder_sparse_step": 1,
}

# folder: (class of transformers, settings, type of the files, the largest file)
BASES = {
    "llama_tied": ("Llama", {**LLAMA, "tie_word_embeddings": True}, "float32", "1GB"),
    "llama_untied": ("Llama", {**LLAMA, **BIASES}, "float32", "8KB"),
    "llama_bf16": ("Llama", LLAMA, "bfloat16", "1GB"),
    "llama_fp16": ("Llama", {**LLAMA, "tie_word_embeddings": True}, "float16", "1GB"),
    "bert": ("Bert", BERT, "float32", "1GB"),
    "gpt2": ("GPT2", GPT2, "float32", "1GB"),
    "vit": ("ViT", VIT, "float32", "1GB"),
    "mixtral": ("Mixtral", MIXTRAL, "float32", "1GB"),
    "qwen3_moe": ("Qwen3Moe", QWEN, "float32", "1GB"),
}
HEADS = {"Bert": "Model", "GPT2": "LMHeadModel", "ViT": "ForImageClassification"}


def make(name):
    """The torch model of a folder with random values, and an input of it."""
    import torch
    import transformers

    kind, settings, dtype, _ = BASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, kind + HEADS.get(kind, "ForCausalLM"))(config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(0.3 * torch.randn_like(p) + ("norm" in key.lower() and "weight" in key))
        for p in model.parameters():  # buffers, such as the frequencies of rotations, stay in fp32
            p.data = p.data.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    x = torch.randn(2, 3, 8, 8) if kind == "ViT" else torch.randint(0, 40, (2, 7))
    return model.eval(), x


def output(model, x):
    import torch

    with torch.no_grad():
        y = model.float()(x)
    return getattr(y, "logits", None) if "logits" in y else y.last_hidden_state


def main():
    from safetensors.torch import save_file

    for name, (_, _, _, largest) in BASES.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        model, x = make(name)
        folder = FOLDER / name
        model.save_pretrained(folder, max_shard_size=largest)
        save_file({"x": x, "y": output(model, x)}, FOLDER / f"{name}_io.safetensors")
        (folder / "generation_config.json").unlink(missing_ok=True)
        print(name, sum(f.stat().st_size for f in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main()
