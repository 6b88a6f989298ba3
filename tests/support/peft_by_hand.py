"""What an adapter folder of a golden model means, from PEFT's formulas and in float64.

Nothing of the library's reader is used: neither its names, nor its shapes, nor its scales.
"""

import json
import math
import re
from unittest import mock

import golden_models as g
import numpy as np
from test_peft import MODELS

import lora_jax as lora
from lora_jax._core.paths import flatten, nest
from lora_jax._nodes.node import is_node

PREFIX = "base_model.model."
TRANSPOSED = re.compile(r"c1d|transformer\.h\..*")  # GPT-2's Conv1D: (in, out)


def first(pattern, name, default):
    keys = (k for k in pattern or {} if re.match(rf"(.*\.)?({k})$", name))
    return next((pattern[k] for k in keys), default)


def taken(config, module):
    """Whether PEFT makes a LoRA of a module, by its own expressions."""
    listed = lambda x: module == x or module.endswith("." + x)
    out, targets = config.get("exclude_modules") or [], config.get("target_modules")
    if re.fullmatch(out, module) if isinstance(out, str) else any(map(listed, out)):
        return False
    saved = config.get("modules_to_save") or []
    if any(re.match(rf"(^|.*\.){m}($|\..*)", module) for m in saved):
        return False
    if targets is None or targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    layers, names = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if module in targets or not any(map(listed, targets)) or layers in (None, []):
        return any(map(listed, targets))
    ways = [names] if isinstance(names, str) else names
    ways = [rf"(?:^|.*?\.){n}\.(\d+)\." for n in ways] or [r".*?\.[^.]*\.(\d+)\."]
    hit = next((h for w in ways if (h := re.match(w, module))), None)
    return hit is not None and int(hit[1]) in ([layers] if isinstance(layers, int) else layers)


def scale(config, module, rank):
    alpha = config.get("lora_alpha")
    alpha = first(config.get("alpha_pattern"), module, 8 if alpha is None else alpha)
    if config.get("peft_type") == "ADALORA":
        r = config.get("init_r") or config.get("r") or 8
        return (alpha if alpha > 0 else r) / (r + 1e-5)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def weights(name, folder):
    """The base's state dict with the adapter in it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    out = {k: v.astype(np.float64) for k, v in g.base(name).items()}
    found = {}
    for key, value in g.tensors(folder / "adapter_model.safetensors").items():
        key = re.sub(r"(lora_\w+|trainable_tokens_delta)\.default\b", r"\1", key)
        if config.get("peft_type") == "ADALORA":  # which leaves it out
            key = re.sub(r"(\.lora_[AB])$", r"\1.weight", key)
        found[key.replace(PREFIX, "")] = value.astype(np.float64)  # twice is read as once
    for key, value in found.items():
        module, _, tail = key.partition(".lora_")
        if tail in ("A.weight", "embedding_A"):
            b = found[f"{module}.lora_{tail.replace('A', 'B')}"]
            e = found.get(f"{module}.lora_E")
            m = found.get(f"{module}.lora_magnitude_vector")
            plain = re.sub(r"\.base_layer(\.out_proj)?", "", module)
            if not config.get("target_parameters") and not taken(config, plain):
                raise ValueError(f"PEFT passes {plain} over")
            low_rank(out, config, module, value if e is None else value * e, b, tail, m)
        elif key.endswith(".token_adapter.trainable_tokens_delta"):
            tokens = config["trainable_token_indices"]
            module = key.removesuffix(".token_adapter.trainable_tokens_delta")
            index = tokens if isinstance(tokens, list) else tokens[module]
            out[module + ".weight"][index] = value
        elif not tail and not re.search("modules_to_save|original_module", key):
            plain = key.replace(".base_layer", "")
            if (plain == key) and any(
                k.startswith(plain.rpartition(".")[0] + ".lora_") for k in found
            ):
                raise ValueError(f"PEFT passes {key} over")
            out[plain] = in_full(value, out[plain].shape)
    for key, value in found.items():  # on top of a bias that was saved in full
        if key.endswith(".lora_B.bias"):
            if not config.get("lora_bias"):
                raise ValueError(f"PEFT passes {key} over")
            module = key.removesuffix(".lora_B.bias")
            rank = found[module + ".lora_A.weight"].shape[0]
            out[f"{module}.bias"] += scale(config, module, rank) * value
    return out


def in_full(value, shape):
    """A shape that differs by axes of size 1, or is a Linear's as a Conv1D has it, says the same."""
    if [n for n in value.shape if n > 1] == [n for n in shape if n > 1]:
        return value.reshape(shape)
    if value.T.shape == shape:
        return value.T
    raise ValueError(f"a value of shape {value.shape} for one of {shape}")


def low_rank(out, config, module, a, b, tail, magnitude=None):
    if config.get("target_parameters") and module.startswith("experts"):
        return experts(out, config, module, a, b)
    owner, name, twice = module, f"{module}.weight", 1
    if module.endswith(".base_layer.out_proj"):  # PEFT adds it twice
        owner = module.removesuffix(".base_layer.out_proj")
        name, twice = f"{owner}.out_proj.weight", 2
    elif f"{module}.in_proj_weight" in out:
        name = f"{module}.in_proj_weight"
    if 0 in a.shape:
        return None  # AdaLoRA, pruned
    rank = a.shape[0]
    r = config.get("r")
    said = first(config.get("rank_pattern"), owner, 8 if r is None else r)
    if config.get("peft_type") != "ADALORA" and said != rank:
        raise ValueError(f"a rank {rank}, where PEFT makes {said}")
    delta = b.reshape(-1, rank) @ a.reshape(rank, -1)
    turned = tail == "embedding_A" or TRANSPOSED.fullmatch(module)
    delta = (delta.T if turned else delta).reshape(out[name].shape)
    out[name] += twice * scale(config, owner, rank) * delta
    if magnitude is not None:
        if twice == 2 or name.endswith("in_proj_weight"):
            raise ValueError("PEFT has no DoRA of a MultiheadAttention")
        out[name] = scaled(out[name], magnitude.reshape(-1), (0,) if turned else None)


def scaled(weight, magnitude, in_axes=None):
    """m · V / ‖V‖ for each output unit; one that is zero stays so."""
    in_axes = tuple(range(1, weight.ndim)) if in_axes is None else in_axes
    norm = np.sqrt((weight**2).sum(in_axes, keepdims=True))
    return np.expand_dims(magnitude, in_axes) * weight / np.where(norm > 0, norm, 1)


def experts(out, config, module, a, b):
    names = [p for p in ("gate_up_proj", "down_proj")
             if any(t.endswith(p) for t in config["target_parameters"])]  # fmt: skip
    name = names[0] if module.endswith(".base_layer") else names[-1]
    weight = out[f"experts.{name}"]
    rank = a.shape[0] // weight.shape[0]
    a = a.reshape(weight.shape[0], rank, -1)
    b = b.reshape(-1, rank, weight.shape[0])
    weight += scale(config, f"experts.{name}", rank) * np.einsum("ore,eri->eoi", b, a)


def merged(params, adapters):
    """{leaf: values} in float64, by hand as well: merge adds in float32."""
    nodes = flatten(adapters, is_leaf=is_node)
    out = {}
    for path, leaf in flatten(params).items():
        leaf, node = np.array(leaf, np.float64), nodes.pop(path, None)
        if isinstance(node, lora.LoRA | lora.DoRA):
            a, b = np.asarray(node.a, np.float64), np.asarray(node.b, np.float64)
            stacked = bool(node.geometry.batch_axes)
            delta = [np.tensordot(x, y, 1) for x, y in (zip(a, b) if stacked else [(a, b)])]
            leaf += node.scale * np.stack(delta).reshape(leaf.shape)
            if isinstance(node, lora.DoRA):
                leaf = scaled(leaf, np.asarray(node.magnitude, np.float64), node.geometry.in_axes)
        elif isinstance(node, lora.Full):
            leaf = np.asarray(node.value, np.float64)
        elif isinstance(node, lora.Rows):
            leaf[list(node.index)] = np.asarray(node.value, np.float64)
        out[path] = leaf
    assert not nodes
    return out


def difference(name, folder, adapters):
    """Where the adapters are not what the folder says, or None."""
    make = MODELS[name][1]
    want = weights(name, folder)
    with mock.patch.multiple(g, base=lambda _: want, tree=nest):
        want = flatten(make(name))
    for path, got in merged(make(name), adapters).items():
        top = max(np.abs(want[path]).max(), 1e-3)
        if got.shape != want[path].shape or not (np.abs(got - want[path]) <= 1e-6 * top).all():
            return f"{path}: {np.abs(got - want[path]).max()} of {top}"
    return None
