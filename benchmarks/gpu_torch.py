"""The arms of `gpu.py` in PyTorch, each in a process of its own: transformers' Llama with PEFT.

`gpu.py` starts it, with a JSON object of the model's shape and the arm; a JSON object comes back.
The weights, adapters and tokens are those of `gpu.py`, made on the device by the same arithmetic.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
SCALE = 2.0
TARGETS = dict.fromkeys(("q", "k", "v", "o"), "self_attn.{}_proj")
TARGETS |= dict.fromkeys(("gate", "up", "down"), "mlp.{}_proj")


def noise(seed, first, size, device):
    """Numbers `first`, first + 1, … of `gpu.noise`."""
    import torch

    x = torch.arange(first, first + size, dtype=torch.int64, device=device)
    x = (x + seed * 0x9E3779B9) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    x = (x ^ (x >> 16)) >> 8
    return x.to(torch.float32) * 2.0**-24


def normal(seed, index, shape, std, device):
    size = shape[0] * shape[1]
    u = noise(seed, index * size, size, device)
    return ((u - 0.5) * (12**0.5 * std)).reshape(shape)


def build(o, device):
    import torch
    import transformers

    if "liger" in o["arm"]:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    config = transformers.LlamaConfig(
        vocab_size=o["vocab"],
        hidden_size=o["width"],
        intermediate_size=o["hidden"],
        num_hidden_layers=o["layers"],
        num_attention_heads=o["heads"],
        num_key_value_heads=o["kv"],
        max_position_embeddings=o["tokens"][1],
        rope_theta=5e5,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    embed, head = (o["vocab"], o["width"]), (o["width"], o["vocab"])
    seeds = o["seeds"]
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(normal(seeds["embed"], 0, embed, 0.02, device))
        model.lm_head.weight.copy_(normal(seeds["head"], 0, head, 0.02, device).T)
        for i, layer in enumerate(model.model.layers):
            for name, where in TARGETS.items():
                linear = layer.get_submodule(where.format(name))
                w = normal(seeds[name], i, linear.weight.shape[::-1], 0.02, device)
                linear.weight.copy_(w.T)
    return model


def coded(model, device):
    """With the layers' linears in NF4, by bitsandbytes."""
    import bitsandbytes as bnb
    import torch

    for layer in model.model.layers:
        for name, where in TARGETS.items():
            parent, _, own = where.format(name).rpartition(".")
            old = layer.get_submodule(where.format(name))
            how = dict(quant_type="nf4", compress_statistics=False)
            new = bnb.nn.Linear4bit(
                *(old.in_features, old.out_features),
                bias=False,
                compute_dtype=torch.bfloat16,
                device="meta",
                **how,
            )
            w = old.weight.data.cpu()
            new.weight = bnb.nn.Params4bit(w, requires_grad=False, **how)
            setattr(layer.get_submodule(parent), own, new.to(device))
    model.is_loaded_in_4bit = True
    return model


def adapted(model, o, device):
    import peft
    import torch

    # As HF's trainer runs it: fp32 adapters under autocast; with Liger all of it in bf16.
    config = peft.LoraConfig(
        r=o["rank"],
        lora_alpha=SCALE * o["rank"],
        target_modules=[f"{name}_proj" for name in TARGETS],
        task_type="CAUSAL_LM",
    )
    wide = "liger" not in o["arm"]
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=wide)
    with torch.no_grad():
        for i, layer in enumerate(model.base_model.model.model.layers):
            for name, where in TARGETS.items():
                linear = layer.get_submodule(where.format(name))
                a, b = (getattr(linear, f"lora_{k}")["default"].weight for k in "AB")
                shape, seeds = a.shape[::-1], [o["seeds"][f"{name}_{k}"] for k in "ab"]
                a.copy_(normal(seeds[0], i, shape, shape[0] ** -0.5, device).T)
                b.copy_(normal(seeds[1], i, b.shape[::-1], 0.02, device).T)
    return model.train()


def run(o) -> dict:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(o, device)
    if "nf4" in o["arm"]:
        model = coded(model, device)
    if o["remat"] == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = adapted(model, o, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    tx = torch.optim.Adam(trained, 1e-4, fused=device == "cuda")
    batch, length = o["tokens"]
    ids = (noise(o["seeds"]["ids"], 0, batch * length, device) * o["vocab"]).long()
    ids = ids.reshape(batch, length)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, losses = [], []
    for _ in range(o["steps"]):
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled="liger" not in o["arm"]):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        tx.step()
        tx.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[1:])
    row = {"seconds": seconds, "losses": losses[:4], "compiled s": times[0] - seconds}
    if device == "cuda":
        row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return row


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    try:
        found = run(options)
    except ModuleNotFoundError as e:
        found = {"not run": f"not installed: pip install {options['install']} ({e.name})"}
    except Exception as e:  # the other arms go on
        found = {"not run": f"{type(e).__name__}: {e}".splitlines()[0][:200]}
    print(json.dumps(found))
