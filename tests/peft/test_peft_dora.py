"""DoRA in PEFT's files on leaves that are fused, split, stacked or of heads, and what PEFT has not."""

import json
import warnings
from unittest import mock

import golden_models as g
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import fails, needs_peft, noisy
from test_peft import assert_same_tensors, changed, loaded, outputs, pair, stored, written
from test_peft_golden import error
from test_peft_kinds import of_base

import lora_jax as lora
from lora_jax.peft._config import peft_config


def of_heads(w):
    """q, v (in, heads, 4) and o (heads, 4, out)."""
    params = of_base(g.llama_params)(w)
    for layer in params["model"]["layers"].values():
        a = layer["self_attn"]
        for n in "qkv":
            a[f"{n}_proj"]["kernel"] = a[f"{n}_proj"]["kernel"].reshape(16, -1, 4)
        a["o_proj"]["kernel"] = a["o_proj"]["kernel"].reshape(4, 4, 16)
    return params


def dense(p, x):
    kernel = p["kernel"]
    if kernel.ndim == 2:
        return x @ kernel
    if kernel.shape[0] == 16:
        return jnp.einsum("bti,ihd->bthd", x, kernel)
    return jnp.einsum("bthd,hdo->bto", x.reshape(*x.shape[:2], 4, 4), kernel)


def llama_of_heads(p, ids):
    with mock.patch.object(g, "dense", dense):
        return g.llama(p, ids)


def table(scanned):
    """q, k and v are columns of one leaf, qkv (16, 32)."""
    at, first = ("", "{1}, ") if scanned else ("{1}/", "")
    columns = {"q": "0:16", "k": "16:24", "v": "24:32"}
    layer = r"model\.layers\.(\d+)\."
    found = {
        rf"{layer}self_attn\.{n}_proj": f"model/layers/{at}self_attn/qkv/kernel[{first}:, {c}]"
        for n, c in columns.items()
    }
    at, index = ("", "[{1}]") if scanned else ("{1}/", "")
    rest = rf"{layer}(self_attn\.o|mlp\.down)_proj"
    for n in ("self_attn.o", "mlp.down"):
        path = f"model/layers/{at}{n.replace('.', '/')}_proj/kernel{index}"
        found[rest.replace(r"(self_attn\.o|mlp\.down)", n.replace(".", r"\."))] = path
    return found


SPLIT = {
    **g.GPT2_SPLIT,
    r"transformer\.h\.(\d)\.(attn|mlp)\.c_proj": "transformer/h/{1}/{2}/c_proj/kernel",
}
# layout: (golden, function, parameters of the base weights, mapping)
LAYOUTS = {
    "scanned": ("llama", g.llama, of_base(g.llama_params, scanned=True), None),
    "of heads": ("llama", llama_of_heads, of_heads, None),
    "fused": ("llama", g.llama, of_base(g.llama_params, fused=True), table(False)),
    "fused and scanned": (
        "llama", g.llama, of_base(g.llama_params, scanned=True, fused=True), table(True),
    ),
    "split": ("gpt2", g.gpt2, of_base(g.gpt2_params, split=True), SPLIT),
}  # fmt: skip


def read(layout, folder=None):
    """(name of the golden, function, parameters, survey, what load_peft found)."""
    kind, fn, make, mapping = LAYOUTS[layout]
    name = f"kind_dora_{kind}"
    params = make(g.base(name))
    survey = lora.survey(fn, params, g.inputs(name)[0])
    found = lora.peft.load(folder or g.folder(name), params, survey, mapping=mapping)
    return name, fn, params, survey, found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_bytes_are_those_of_peft(layout, tmp_path):
    name, fn, params, _, found = read(layout)
    x, _, want = g.inputs(name)
    for got in outputs(fn, params, found.adapters, x):
        assert error(got, want) < 1e-6
    lora.peft.save(tmp_path, found.adapters, found.mapping)
    assert_same_tensors(stored(tmp_path), stored(g.folder(name)))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True


def test_the_rest_of_a_fused_leaf_keeps_its_norms(tmp_path):
    """k has no update in the file: it stays as it is, and once it is trained it must be named."""
    _, _, params, _, found = read("fused")
    kernel = params["model"]["layers"]["0"]["self_attn"]["qkv"]["kernel"]
    node = found.adapters["model"]["layers"]["0"]["self_attn"]["qkv"]["kernel"]
    k = slice(16, 24)
    np.testing.assert_allclose(node.magnitude[k], np.linalg.norm(kernel[:, k], axis=0), rtol=1e-6)
    merged = lora.merge({"w": kernel}, {"w": node})["w"]
    np.testing.assert_allclose(merged[:, k], kernel[:, k], rtol=1e-6)
    trained = noisy(found.adapters)
    with fails(r"self_attn/qkv/kernel' \(16, 32\): the mapping has 384 of 512 elements"):
        lora.peft.save(tmp_path / "a", trained, found.mapping)
    only = jax.tree.map(lambda x: x, found.adapters)
    moved = node.magnitude.at[20].add(0.1)  # a magnitude alone
    own = {f: getattr(node, f) for f in ("a", "b", "scale", "geometry")}
    only["model"]["layers"]["0"]["self_attn"]["qkv"]["kernel"] = lora.DoRA(**own, magnitude=moved)
    with fails("the mapping has 384 of 512 elements"):
        lora.peft.save(tmp_path / "a", only, found.mapping)
    with fails("the mapping has 384 of 512 elements"):  # nothing says what the norms were
        mapping = lora.peft.TorchMapping(found.mapping.entries)
        lora.peft.save(tmp_path / "a", found.adapters, mapping)


def complete(layout):
    """The layout's golden with noise, and a mapping that names all of it."""
    name, fn, params, survey, found = read(layout)
    names = {n: v.shape for n, v in g.base(name).items() if n.endswith("proj.weight")}
    names = {n: s for n, s in names.items() if "gate" not in n and "up_" not in n}
    names |= {n: v.shape for n, v in g.base(name).items() if n.endswith("c_attn.weight")}
    mapping = lora.peft.mapping(
        names, params, survey, mapping=LAYOUTS[layout][3], conv1d=["c_proj", "c_attn"]
    )
    return name, fn, params, noisy(found.adapters), mapping


@needs_peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["fused", "fused and scanned", "split"])
def test_trained_ones_give_pefts_outputs(layout, tmp_path):
    """Ranks become block-diagonal, magnitudes are taken apart or put together."""
    import torch_models

    name, fn, params, adapters, mapping = complete(layout)
    lora.peft.save(tmp_path, adapters, mapping)
    x = g.inputs(name)[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing adapter keys|were not used).*")
        got = torch_models.output(name, tmp_path, np.asarray(x))
    want = jax.jit(fn)(lora.merge(params, adapters), x)
    assert error(got, np.asarray(want)) < 4e-6


@pytest.mark.parametrize("layout", ["fused and scanned", "split"])
def test_trained_ones_come_back(layout, tmp_path):
    _, _, params, adapters, mapping = complete(layout)
    lora.peft.save(tmp_path, adapters, mapping)
    again = read(layout, tmp_path)[-1].adapters
    want, got = (jax.jit(lora.merge)(params, a) for a in (adapters, again))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), want, got)


# What PEFT has no DoRA of


def test_attention_is_refused(tmp_path):
    params, found = loaded("mha")
    with fails("'attn.in_proj_weight' is a DoRA, and PEFT has none of a MultiheadAttention"):
        lora.peft.save(tmp_path / "a", lora.methods.dora(params, found.adapters), found.mapping)
    assert not (tmp_path / "a").exists()
    rows = {"attn": 24, "attn.base_layer.out_proj": 8}
    extra = {
        f"base_model.model.{n}.lora_magnitude_vector": np.ones(k, "f4") for n, k in rows.items()
    }
    folder = changed(tmp_path, "mha", {"use_dora": True}, extra)
    with fails("(?s)out_proj.lora_A.*a DoRA of a MultiheadAttention, which.*attn.lora_A.*which"):
        loaded("mha", folder)


def test_experts_are_refused(tmp_path):
    params, found = loaded("moe_plain")
    dora = lora.methods.dora(params, found.adapters)
    with fails("'experts.(gate_up|down)_proj' is a DoRA, and PEFT has none of single parameters"):
        lora.peft.save(tmp_path / "a", dora, found.mapping)
    settings = {"target_modules": [], "target_parameters": ["experts.up"], "use_dora": True}
    tensors = pair("experts", 6, 6, r=6) | {"experts.lora_magnitude_vector": np.ones(6, "f4")}
    params = {"experts": {"up": jnp.zeros((3, 6, 6))}}
    with fails("a DoRA of single parameters, which PEFT does not have"):
        lora.peft.load(written(tmp_path / "b", tensors, **settings), params)


def test_a_table_that_is_the_head_is_refused(tmp_path):
    params = {"embed_tokens": {"embedding": jnp.ones((8, 4))}}
    fn = lambda p, ids: p["embed_tokens"]["embedding"][ids] @ p["embed_tokens"]["embedding"].T
    survey = lora.survey(fn, params, jnp.zeros((1, 3), jnp.int32))
    tensors = {
        "embed_tokens.lora_embedding_A": np.ones((1, 8), "f4"),
        "embed_tokens.lora_embedding_B": np.ones((4, 1), "f4"),
        "embed_tokens.lora_magnitude_vector": np.ones(4, "f4"),
    }
    settings = {"r": 1, "use_dora": True, "ensure_weight_tying": True}
    folder = written(tmp_path / "a", tensors, **settings)
    with fails("is the embedding and the head, and the file has DoRA"):
        lora.peft.load(folder, params, survey)
    names = {"embed_tokens.weight": (8, 4), "lm_head.weight": (8, 4)}
    mapping = lora.peft.mapping(names, params, survey)
    config = lora.LoRAConfig(rank=1, targets=["embed_tokens"])
    adapters = lora.init(jax.random.key(0), params, config, survey)
    with fails("is the embedding and the head, and a DoRA"):
        lora.peft.save(tmp_path / "b", lora.methods.dora(params, adapters), mapping)


def test_a_part_of_a_torch_module(tmp_path):
    """The leaves of one torch weight are all DoRA, or none is."""
    _, _, _, _, found = read("split")
    del found.adapters["transformer"]["h"]["0"]["attn"]["k"]
    with fails("'transformer.h.0.attn.c_attn.weight' is a DoRA, but transformer/h/0/attn/k/kernel"):
        lora.peft.save(tmp_path, found.adapters, found.mapping)


def test_with_some_and_without_others(tmp_path):
    _, found = loaded("net_dora")
    node = found.adapters["lin"]["kernel"]
    found.adapters["lin"]["kernel"] = lora.LoRA(node.a, node.b, node.scale, node.geometry)
    with fails("lin.weight: no DoRA, but others are"):
        lora.peft.save(tmp_path, found.adapters, found.mapping)


def test_settings_that_peft_refuses():
    with fails("use_dora with AdaLoRA"):
        peft_config({"peft_type": "ADALORA", "use_dora": True}, "config")
    with fails("use_dora with lora_bias"):
        peft_config({"use_dora": True, "lora_bias": True}, "config")


def test_types_that_differ(tmp_path):
    """A magnitude of another type than the factors; of two in one leaf, fp32."""
    name = "kind_dora_llama"
    tensors = stored(g.folder(name))
    at = "base_model.model.model.layers.0.self_attn.{}_proj.lora_magnitude_vector".format
    half = {at("q"): tensors[at("q")].astype(np.float16)}
    half[at("v")] = tensors[at("v")].astype(jnp.bfloat16)
    folder = changed(tmp_path, name, {}, half)
    node = read("fused", folder)[-1].adapters["model"]["layers"]["0"]["self_attn"]["qkv"]["kernel"]
    assert node.magnitude.dtype == jnp.float32 and node.a.dtype == jnp.float32
    np.testing.assert_array_equal(node.magnitude[:16], half[at("q")].astype("f4"))


def test_the_base_is_needed_where_a_part_is_adapted():
    name, _, params, survey, _ = read("fused")
    abstract = jax.eval_shape(lambda: params)
    with fails(f"{g.folder(name)}: 'model/layers/0/self_attn/qkv/kernel': .* pass its values"):
        lora.peft.load(g.folder(name), abstract, survey, mapping=table(False))
