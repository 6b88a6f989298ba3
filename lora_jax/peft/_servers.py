"""What servers can load of PEFT's files, as their loaders check it or take it for granted.

* vLLM: `vllm/lora/peft_helper.py` (`validate_legal`: rank, DoRA, bias, modules_to_save; it reads r
  and lora_alpha, and no patterns), `vllm/lora/utils.py` (`parse_fine_tuned_lora_name`: the names of
  tensors), `vllm/config/lora.py` (`MaxLoRARanks`), and its page "LoRA Adapters".
* sglang-jax: `python/sgl_jax/srt/lora/` (`lora_config.py`: target_modules is a list without
  embed_tokens and lm_head; `lora.py`: the scale is lora_alpha / r; `lora_memory_pool.py`: the
  shapes of modules).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

# vLLM's max_lora_rank.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

# The modules for which sglang-jax has memory.
SGLANG = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Modules in a message.
SHOWN = 3


def _common(settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Iterator[str]:
    """What neither of them has."""
    if settings["rank_pattern"] or settings["alpha_pattern"]:
        yield (
            "ranks or alphas differ between modules, and it reads one of each: pad the ranks and "
            "fold the alphas into B: lora.peft.save(..., uniform_rank=True)"
        )
    if settings["use_dora"]:
        yield "DoRA: it reads no magnitudes; merge it: lora.merge(params, adapters)"
    if settings["bias"] != "none":
        yield (
            f"bias={settings['bias']!r}: it takes no biases; merge the adapter, lora.merge, or "
            "train without them"
        )
    if settings["modules_to_save"]:
        yield (
            f"modules_to_save={settings['modules_to_save'][:SHOWN]}: it takes no module in full; "
            "merge the adapter, lora.merge, and serve the merged model"
        )
    if settings["trainable_token_indices"]:
        yield "rows of a table that are trained: it takes none; merge the adapter, lora.merge"
    if settings.get("alora_invocation_tokens"):
        yield "aLoRA: it would be active for every token; serve it by PEFT, or leave the tokens out"
    if experts := settings["target_parameters"]:
        yield (
            f"{', '.join(experts[:SHOWN])}: experts in one tensor; split them into modules of one "
            "expert each, (out, in): name those in lora.peft.mapping, such as "
            "'mlp.experts.0.up_proj.weight': (out, in), for mapping={...: 'mlp/experts/up[0]'}"
        )
    elif not settings["target_modules"]:
        yield "target_modules: no module is adapted, and it needs the list"
    # Where neither experts nor biases are in the file, base_layer is an attention's.
    inside = sorted({k.rpartition(".lora_")[0] for k in tensors if ".base_layer." in k})
    if inside and not experts and settings["bias"] == "none":
        yield f"{', '.join(inside[:SHOWN])}: a MultiheadAttention of torch, which it does not adapt"
    windows = sorted(k for k, v in tensors.items() if ".lora_A" in k and v.ndim > 2)
    if windows:
        yield f"{', '.join(windows[:SHOWN])}: a convolution, which it does not adapt; merge it"


def _vllm(settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> list[str]:
    found = list(_common(settings, tensors))
    rank = max([settings["r"], *settings["rank_pattern"].values()])
    if rank > RANKS[-1]:
        found.append(
            f"rank {rank}: its max_lora_rank is one of {', '.join(map(str, RANKS[1:]))}: "
            f"lora.algebra.resize(adapters, {RANKS[-1]})"
        )
    return found


def _sglang(settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> list[str]:
    found = list(_common(settings, tensors))
    modules = settings["target_modules"] or []
    if isinstance(modules, str):
        found.append(
            f"target_modules={modules[:60]!r} is an expression, as the mapping has modules of the "
            "same names that are not adapted, and it reads a list: adapt all of them, or leave the "
            "others out of the mapping"
        )
        # Back to names: it is escaped ones, joined.
        modules = re.sub(r"\\(.)", r"\1", modules).split("|")
    tables = sorted({m for m in modules if m.rpartition(".")[2] in ("embed_tokens", "lm_head")})
    if tables:
        found.append(
            f"{', '.join(tables[:SHOWN])}: it adapts neither embedding nor head; merge them, or "
            "train without them"
        )
    others = sorted({m for m in modules if m.rpartition(".")[2] not in SGLANG} - {*tables})
    if others:
        found.append(f"{', '.join(others[:SHOWN])}: it adapts {', '.join(SGLANG)} alone")
    return found


TARGETS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, np.ndarray]], list[str]]] = {
    "peft": lambda settings, tensors: [],
    "vllm": _vllm,
    "sglang-jax": _sglang,
}
