"""What PEFT wrote does in JAX what it does in torch; what we write is what PEFT wrote, to the bit."""

import functools
import json
import math
import re
import shutil
import warnings

import golden_models as g
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import fails, needs_peft, noisy
from safetensors.numpy import save_file

import lora_jax as lora

MOE_CONFIG = lora.LoRAConfig(
    rank=1,
    targets=["experts/gate_up_proj", "experts/down_proj", "out"],
    rules=[lora.Rule("experts/*", batch_axes=(0,), in_axes=(1,), out_axes=(2,))],
)
# folder: (function, parameters, mapping, tolerance): fp32 sums in another order, bf16 one rounding
MODELS = {
    "net_lora": (g.net, g.net_params, None, 1e-6),
    "net_bias_all": (g.net, g.net_params, None, 1e-6),
    "net_dora": (g.net, g.net_params, None, 1e-6),
    "net_rslora_patterns": (g.net, g.net_params, None, 1e-6),
    "conv_lora": (g.convnet, g.conv_params, None, 1e-6),
    "moe_plain": (g.moe, g.moe_params, None, 4e-6),
    "mha": (g.mha, g.mha_params, g.MHA_MAPPING, 1e-6),
    "llama_default": (g.llama, g.llama_params, None, 1e-6),
    "llama_bf16": (g.llama, g.llama_params, None, 4e-3),
    "llama_mts_lmhead": (g.llama, g.llama_params, None, 1e-6),
    "gpt2_default": (g.gpt2, g.gpt2_params, None, 1e-6),
}

# (5, 8) and (8, 5): which tensor is whose follows from the order of the torch module's parameters
LOAD = {"moe_plain": {"experts": ["gate_up_proj", "down_proj"]}}


def survey(name, params, fn):
    found = lora.survey(fn, params, g.inputs(name)[0])
    return lora.select(params, MOE_CONFIG, found) if name == "moe_plain" else found


def loaded(name, folder=None, **kwargs):
    fn, make, mapping, _ = MODELS[name]
    params = make(name)
    kwargs = {"mapping": mapping, **LOAD.get(name, {}), **kwargs}
    return params, lora.peft.load(
        folder or g.folder(name), params, survey(name, params, fn), **kwargs
    )


def outputs(fn, params, adapters, x):
    """The merged and the adapted function, compiled together."""

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # quicker
    def both(params, adapters, x):
        adapted = lora.adapt(fn)(lora.bind(params, adapters), x)
        return fn(lora.merge(params, adapters), x), adapted

    return jax.tree.map(np.asarray, both(params, adapters, x))


def assert_output(fn, params, adapters, name, tolerance=None):
    """The adapted and the merged function give what PEFT gave."""
    x, base, want = g.inputs(name)
    tolerance = tolerance or MODELS[name][3]
    assert np.abs(base - want).max() > 2 * tolerance, "the adapter changes nothing"
    for got in outputs(fn, params, adapters, x):
        np.testing.assert_allclose(got, want, atol=tolerance, rtol=0)


def stored(folder):
    return g.tensors(folder / "adapter_model.safetensors")


def assert_same_tensors(got, want):
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].dtype == want[key].dtype and got[key].shape == want[key].shape, key
        np.testing.assert_array_equal(
            got[key].view(np.uint8), want[key].view(np.uint8), err_msg=key
        )


def changed(tmp_path, name, config=None, tensors=None):
    """A copy of a golden adapter with other settings or tensors (None: without)."""
    out = tmp_path / "adapter"
    shutil.copytree(g.folder(name), out)
    settings = json.loads((out / "adapter_config.json").read_text()) | dict(config or {})
    (out / "adapter_config.json").write_text(json.dumps(settings))
    arrays = stored(out) | dict(tensors or {})
    save_file(
        {k: np.ascontiguousarray(v) for k, v in arrays.items() if v is not None},
        out / "adapter_model.safetensors",
    )
    return out


def test_scanned_layers():
    params = g.llama_params("llama_default", scanned=True)
    found_survey = lora.survey(g.llama, params, g.inputs("llama_default")[0])
    found = lora.peft.load(g.folder("llama_default"), params, found_survey)
    node = found.adapters["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert node.a.shape == (2, 16, 4) and node.b.shape == (2, 4, 16)
    assert "model/layers/self_attn/q_proj/kernel[{0,1}]" in str(found.mapping)
    assert_output(g.llama, params, found.adapters, "llama_default")


def test_scanned_layers_round_trip(tmp_path):
    params = g.llama_params("llama_default", scanned=True)
    found_survey = lora.survey(g.llama, params, g.inputs("llama_default")[0])
    table = {r"model\.layers\.(\d+)\.(.*)": "model/layers/{2}/kernel[{1}]"}
    table = {
        rf"model\.layers\.(\d+)\.self_attn\.{n}_proj": f"model/layers/self_attn/{n}_proj/kernel[{{1}}]"
        for n in "qv"
    }
    found = lora.peft.load(g.folder("llama_default"), params, found_survey, mapping=table)
    lora.peft.save(tmp_path, found.adapters, found.mapping)
    assert_same_tensors(stored(tmp_path), stored(g.folder("llama_default")))


@pytest.mark.parametrize("scanned", [False, True])
def test_several_torch_modules_in_one_fused_leaf(tmp_path, scanned):
    name = "llama_default"
    params = g.llama_params(name, scanned=scanned, fused=True)
    found_survey = lora.survey(g.llama, params, g.inputs(name)[0])
    at, first = ("", "[{1}, :, ") if scanned else ("{1}/", "[:, ")
    table = {
        r"model\.layers\.(\d+)\.self_attn\.q_proj": f"model/layers/{at}self_attn/qkv/kernel{first}0:16]",
        r"model\.layers\.(\d+)\.self_attn\.v_proj": f"model/layers/{at}self_attn/qkv/kernel{first}24:32]",
        r"model\.layers\.(\d+)\.self_attn\.k_proj": f"model/layers/{at}self_attn/qkv/kernel{first}16:24]",
    }
    found = lora.peft.load(g.folder(name), params, found_survey, mapping=table)
    assert_output(g.llama, params, found.adapters, name)
    shapes = {k: v.shape for k, v in g.base(name).items() if re.search("[qkv]_proj", k)}
    mapping = lora.peft.mapping(shapes, params, found_survey, mapping=table)
    adapters = noisy(found.adapters)  # k is trained too, through the ranks of all three
    lora.peft.save(tmp_path, adapters, mapping)
    again = lora.peft.load(tmp_path, params, found_survey, mapping=table)
    x = g.inputs(name)[0]
    want, got = (jax.jit(g.llama)(lora.merge(params, a), x) for a in (adapters, again.adapters))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_one_torch_module_split_into_leaves(tmp_path):
    name = "gpt2_default"
    params = g.gpt2_params(name, split=True)
    found_survey = lora.survey(g.gpt2, params, g.inputs(name)[0])
    found = lora.peft.load(g.folder(name), params, found_survey, mapping=g.GPT2_SPLIT)
    assert_output(g.gpt2, params, found.adapters, name)
    lora.peft.save(tmp_path / "same", found.adapters, found.mapping)  # A is still shared
    assert_same_tensors(stored(tmp_path / "same"), stored(g.folder(name)))
    adapters = noisy(found.adapters)
    lora.peft.save(tmp_path / "trained", adapters, found.mapping)
    again = lora.peft.load(tmp_path / "trained", params, found_survey, mapping=g.GPT2_SPLIT)
    assert again.config["r"] == 12  # three of rank 4, block-diagonal
    x = g.inputs(name)[0]
    want, got = (jax.jit(g.gpt2)(lora.merge(params, a), x) for a in (adapters, again.adapters))
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_experts_in_torch_layout():
    params = g.moe_params("moe_plain", transposed=False)
    rules = [lora.Rule("experts/*", batch_axes=(0,), in_axes=(2,), out_axes=(1,))]
    config = lora.LoRAConfig(rank=1, targets=["gate_up_proj", "down_proj", "out"], rules=rules)
    fn = lambda p, x: g.moe(p, x, transposed=False)
    targets = lora.select(params, config, lora.survey(fn, params, g.inputs("moe_plain")[0]))
    found = lora.peft.load(g.folder("moe_plain"), params, targets, **LOAD["moe_plain"])
    assert_output(fn, params, found.adapters, "moe_plain")


def as_old(tensors):
    """The tensors as PEFT 0.17 wrote them: A along the parameter's first axis."""
    out = dict(tensors)
    for at in ("experts", "experts.base_layer"):
        key = f"base_model.model.{at}.lora_%s.weight"
        a, b = tensors[key % "A"], tensors[key % "B"]
        e, r = 3, 2
        n_in, n_out = a.shape[1], b.shape[0]
        a, b = a.reshape(e, r, n_in), b.reshape(n_out, r, e)
        out[key % "A"] = b.transpose(2, 1, 0).reshape(e * r, n_out)
        out[key % "B"] = a.transpose(2, 1, 0).reshape(n_in, r * e)
    return out


def test_experts_of_older_versions(tmp_path):
    tensors = as_old(stored(g.folder("moe_plain")))
    folder = changed(tmp_path, "moe_plain", {"peft_version": "0.19.0"}, tensors)
    params, found = loaded("moe_plain", folder)
    assert_output(g.moe, params, found.adapters, "moe_plain")
    folder = changed(tmp_path / "b", "moe_plain", {"peft_version": None}, tensors)
    with fails("2 ways to assign"):  # 5 by 8 and 8 by 5: the shapes alone do not say it
        loaded("moe_plain", folder, experts=None)
    _, found = loaded("moe_plain", folder)
    assert_output(g.moe, params, found.adapters, "moe_plain")
    _, found = loaded("moe_plain", folder, experts=None, experts_a="out")
    assert_output(g.moe, params, found.adapters, "moe_plain")


def test_attention_without_the_doubled_delta():
    _, found = loaded("mha")
    once = loaded("mha", doubled_out_proj=False)[1].adapters["attn"]["out"]["kernel"]
    assert found.adapters["attn"]["out"]["kernel"].scale == 2 * once.scale


def test_the_first_matching_pattern_of_the_file_counts(tmp_path):
    patterns = {"alpha_pattern": {".*": 7, "c1d": 9}, "use_rslora": False}
    _, found = loaded("net_rslora_patterns", changed(tmp_path, "net_rslora_patterns", patterns))
    assert found.adapters["c1d"]["kernel"].scale == 7 / 3
    assert found.adapters["lin"]["kernel"].scale == 7 / 2
    patterns = {"alpha_pattern": {"c1d": 9, ".*": 7}, "use_rslora": True}
    _, found = loaded("net_lora", changed(tmp_path / "b", "net_lora", patterns))
    assert found.adapters["c1d"]["kernel"].scale == 9 / math.sqrt(3)
    assert found.adapters["lin"]["kernel"].scale == 7 / math.sqrt(3)


def test_lora_bias_is_added_to_the_bias(tmp_path):
    extra = np.arange(12, dtype=np.float32)
    key = "base_model.model.lin.lora_B.bias"
    folder = changed(tmp_path, "net_lora", {"lora_bias": True}, {key: extra})
    params, found = loaded("net_lora", folder)
    want = params["lin"]["bias"] + 5 / 3 * extra
    np.testing.assert_allclose(found.adapters["lin"]["bias"].value, want, rtol=1e-6)


def test_trainable_tokens(tmp_path):
    rows = np.arange(16, dtype=np.float32).reshape(2, 8)
    lin = {k: v for k, v in stored(g.folder("net_lora")).items() if ".lin." in k}
    without = {k: None for k in stored(g.folder("net_lora")) if k not in lin}
    key = "base_model.model.emb.token_adapter.trainable_tokens_delta"
    settings = {"trainable_token_indices": {"emb": [7, 2]}, "modules_to_save": None}
    folder = changed(tmp_path, "net_lora", settings, {**without, key: rows})
    params, found = loaded("net_lora", folder)
    node = found.adapters["emb"]["embedding"]
    assert isinstance(node, lora.Rows) and node.index == (7, 2)
    np.testing.assert_array_equal(
        lora.merge(params, found.adapters)["emb"]["embedding"][2], rows[1]
    )
    lora.peft.save(tmp_path / "out", found.adapters, found.mapping)
    assert_same_tensors(stored(tmp_path / "out"), stored(folder))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"emb": [7, 2]}


def test_adalora(tmp_path):
    e = np.array([[0.5], [-1.0], [2.0]], np.float32)
    a, b = (stored(g.folder("net_lora"))[f"base_model.model.lin.lora_{n}.weight"] for n in "AB")
    tensors = dict.fromkeys(stored(g.folder("net_lora")))
    at = "base_model.model.lin."
    tensors |= {at + "lora_A": a, at + "lora_B": b, at + "lora_E": e}
    settings = {"peft_type": "ADALORA", "init_r": 12, "lora_alpha": 32, "modules_to_save": None}
    settings["rank_pattern"] = {"lin.lora_E": [True] * 3 + [False] * 9}
    params, found = loaded("net_lora", changed(tmp_path, "net_lora", settings, tensors))
    merged = lora.merge(params, found.adapters)["lin"]["kernel"]
    want = params["lin"]["kernel"] + (b @ (a * e) * 32 / (12 + 1e-5)).T
    np.testing.assert_allclose(merged, want, atol=1e-6)


def test_the_base_table_beside_an_adapted_embedding(tmp_path):
    key = "base_model.model.emb.base_layer.weight"
    table = g.base("net_lora")["emb.weight"]
    params, found = loaded("net_lora", changed(tmp_path, "net_lora", {}, {key: table}))
    assert_output(g.net, params, found.adapters, "net_lora")
    other = table + (np.arange(11) == 3)[:, None].astype(np.float32)
    folder = changed(tmp_path / "b", "net_lora", {}, {key: other})
    with fails("1 rows differ from 'emb/embedding'"):
        loaded("net_lora", folder)
    assert loaded("net_lora", folder, keep_base=True)


def test_uniform_rank_for_vllm(tmp_path):
    params, found = loaded("net_rslora_patterns")
    lora.peft.save(tmp_path, found.adapters, found.mapping, uniform_rank=8)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 8 and config["rank_pattern"] == config["alpha_pattern"] == {}
    assert {x.shape[0] for k, x in stored(tmp_path).items() if "lora_A" in k} == {8}
    _, again = loaded("net_rslora_patterns", tmp_path)
    assert_output(g.net, params, again.adapters, "net_rslora_patterns")


def test_patterns_never_overlap(tmp_path):
    params = {n: {"kernel": jnp.ones((4, 4))} for n in ("lin", "block/lin", "a")}
    params = g.tree({f"{n}/kernel": v["kernel"] for n, v in params.items()})
    geometry = lora.Geometry((0,), (1,))

    def node(r):
        return lora.LoRA(jnp.ones((4, r)), jnp.ones((r, 4)), 3.0, geometry)

    names = {"lin.weight": (4, 4), "block.lin.weight": (4, 4), "a.weight": (4, 4)}
    mapping = lora.peft.mapping(names, params)
    adapters = {
        "lin": {"kernel": node(1)},
        "block": {"lin": {"kernel": node(2)}},
        "a": {"kernel": node(2)},
    }
    lora.peft.save(tmp_path, adapters, mapping)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"^lin": 1}
    again = lora.peft.load(tmp_path, params)
    assert again.adapters["lin"]["kernel"].scale == 3.0
    only = {"lin": {"kernel": node(1)}}
    lora.peft.save(tmp_path, only, mapping)  # "lin" in a list would mean "block.lin" too
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == "lin"
    jax.tree.map(np.testing.assert_array_equal, lora.peft.load(tmp_path, params).adapters, only)


def test_bf16_adapters(tmp_path):
    _, found = loaded("net_lora", dtype=jnp.bfloat16)
    assert found.adapters["lin"]["kernel"].a.dtype == jnp.bfloat16
    lora.peft.save(tmp_path, found.adapters, found.mapping)
    kept = stored(tmp_path)["base_model.model.lin.lora_A.weight"]
    assert kept.dtype == jnp.bfloat16
    _, again = loaded("net_lora", tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.adapters, found.adapters)
    lora.peft.save(tmp_path, found.adapters, found.mapping, dtype=np.float32)
    assert stored(tmp_path)["base_model.model.lin.lora_A.weight"].dtype == np.float32


def written(folder, tensors, **config):
    """An adapter as PEFT would write it: {name below the prefix: array}."""
    folder.mkdir(parents=True)
    base = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    ranks = {k.partition(".lora_A")[0]: v.shape[0] for k, v in tensors.items() if ".lora_A" in k}
    if not config.get("target_parameters"):
        base["rank_pattern"] = {m: r for m, r in ranks.items() if r != config.get("r", 2)}
    (folder / "adapter_config.json").write_text(json.dumps(base | config))
    arrays = {"base_model.model." + k: np.ascontiguousarray(v) for k, v in tensors.items()}
    save_file(arrays, folder / "adapter_model.safetensors")
    return folder


def pair(module, n_in, n_out, r=2, seed=0):
    draw = np.random.default_rng(seed)
    a, b = draw.normal(size=(r, n_in)), draw.normal(size=(n_out, r))
    return {f"{module}.lora_A.weight": a.astype("f4"), f"{module}.lora_B.weight": b.astype("f4")}


def delta(tensors, module, scale=2.0):
    a, b = (tensors[f"{module}.lora_{n}.weight"] for n in "AB")
    return scale * (b @ a)  # (out, in)


def test_heads_and_packed_keys_and_values(tmp_path):
    """q (heads, in, d), keys and values (2, heads, in, d), out (heads, d, in), as Gemma has them."""
    params = {"q": jnp.zeros((4, 6, 3)), "kv": jnp.zeros((2, 2, 6, 3)), "o": jnp.zeros((4, 3, 6))}

    def fn(p, x):
        q = jnp.einsum("td,hdk->thk", x, p["q"])
        k, v = jnp.einsum("sd,chdk->cshk", x, p["kv"])
        out = jnp.einsum("thk,sgk,sgk->thk", q, k, v)
        return jnp.einsum("thk,hkd->td", out, p["o"])

    tensors = (
        pair("a.q_proj", 6, 12) | pair("a.k_proj", 6, 6, seed=1) | pair("a.v_proj", 6, 6, seed=2)
    )
    tensors |= pair("a.o_proj", 12, 6, seed=3)
    folder = written(tmp_path / "in", tensors)
    table = {"a.q_proj": "q", "a.k_proj": "kv[0]", "a.v_proj": "kv[1]", "a.o_proj": "o"}
    found_survey = lora.survey(fn, params, jnp.ones((5, 6)))
    packed = lora.LoRAConfig(
        rank=1, targets=["q", "kv", "o"], rules=[lora.Rule("kv", batch_axes=(0,))]
    )
    for axes in (found_survey, lora.select(params, packed, found_survey)):
        found = lora.peft.load(folder, params, axes, mapping=table)
        merged = lora.merge(params, found.adapters)
        q = delta(tensors, "a.q_proj").reshape(4, 3, 6).transpose(0, 2, 1)
        np.testing.assert_allclose(merged["q"], q, atol=1e-5)
        for i, n in enumerate("kv"):
            want = delta(tensors, f"a.{n}_proj").reshape(2, 3, 6).transpose(0, 2, 1)
            np.testing.assert_allclose(merged["kv"][i], want, atol=1e-5)
        o = delta(tensors, "a.o_proj").reshape(6, 4, 3).transpose(1, 2, 0)
        np.testing.assert_allclose(merged["o"], o, atol=1e-5)
        rank = found.adapters["kv"].rank
        assert rank == (4 if axes is found_survey else 2)  # block-diagonal, or an A and a B each
        out = tmp_path / str(rank)
        lora.peft.save(out, found.adapters, found.mapping)
        assert_same_tensors(stored(out), stored(folder))


def test_layers_of_different_rank_in_one_stack(tmp_path):
    params = {"layers": {"q": {"kernel": jnp.zeros((3, 4, 5))}}}
    fn = lambda p, x: jax.lax.scan(
        lambda x, w: (jnp.tanh(x @ w @ w.T), None), x, p["layers"]["q"]["kernel"]
    )[0]
    tensors = pair("layers.0.q", 4, 5) | pair("layers.2.q", 4, 5, r=1, seed=1)
    folder = written(tmp_path / "in", tensors, alpha_pattern={"layers.2.q": 3})
    found = lora.peft.load(folder, params, lora.survey(fn, params, jnp.ones((2, 4))))
    merged = lora.merge(params, found.adapters)["layers"]["q"]["kernel"]
    np.testing.assert_allclose(merged[0], delta(tensors, "layers.0.q").T, atol=1e-5)
    np.testing.assert_array_equal(merged[1], 0)
    np.testing.assert_allclose(merged[2], delta(tensors, "layers.2.q", 3.0).T, atol=1e-5)


def test_fused_experts_split_into_leaves(tmp_path):
    """(layers, experts, in, out) leaves, gate and up apart; torch has them as one."""
    e, d, f = 3, 4, 5
    params = {"layers": {n: jnp.zeros((2, e, d, f)) for n in ("gate", "up")}}
    geometry = lora.Geometry((2,), (3,), (0, 1))
    rules = [lora.Rule("layers/*", in_axes=(2,), out_axes=(3,), batch_axes=(0, 1))]
    targets = lora.select(params, lora.LoRAConfig(rank=1, targets=["gate", "up"], rules=rules))
    assert targets["layers/up"].geometry == geometry
    tensors = {}
    for i in range(2):
        tensors |= pair(f"l.{i}.experts", d, 2 * f, r=2 * e, seed=i)
    folder = written(
        tmp_path / "in", tensors, target_modules=[], target_parameters=["experts.gate_up_proj"],
        peft_version="0.21.2",
    )  # fmt: skip
    table = {r"l\.(\d)\.experts\.gate_up_proj": ["layers/gate[{1}]", "layers/up[{1}]"]}
    found = lora.peft.load(folder, params, targets, mapping=table)
    merged = lora.merge(params, found.adapters)["layers"]
    for i in range(2):
        a = tensors[f"l.{i}.experts.lora_A.weight"].reshape(e, 2, d)
        b = tensors[f"l.{i}.experts.lora_B.weight"].reshape(2 * f, 2, e)
        want = 2.0 * np.einsum("eri,ore->eio", a, b)
        np.testing.assert_allclose(merged["gate"][i], want[..., :f], atol=1e-5)
        np.testing.assert_allclose(merged["up"][i], want[..., f:], atol=1e-5)
    lora.peft.save(tmp_path / "out", found.adapters, found.mapping)
    assert_same_tensors(stored(tmp_path / "out"), stored(folder))


def test_tied_embeddings(tmp_path):
    params = {"embed_tokens": {"embedding": jnp.ones((8, 4))}}

    def fn(p, ids):
        table = p["embed_tokens"]["embedding"]
        return table[ids] @ table.T

    found_survey = lora.survey(fn, params, jnp.zeros((1, 3), jnp.int32))
    table = np.arange(32, dtype=np.float32).reshape(8, 4)
    names = {"embed_tokens": "embed_tokens/embedding", "lm_head": "embed_tokens/embedding"}

    def load(folder, tensors, **config):
        folder = written(tmp_path / folder, tensors, **config)
        return lora.peft.load(folder, params, found_survey, mapping=names).adapters

    with fails("is the embedding and the head, but the file changes embed_tokens.weight alone"):
        load("one", {"embed_tokens.weight": table}, modules_to_save=["embed_tokens"])
    with fails("which the file changes differently"):
        load("two", {"embed_tokens.weight": table, "lm_head.weight": table + 1})
    both = load("same", {"embed_tokens.weight": table, "lm_head.weight": table})
    np.testing.assert_array_equal(both["embed_tokens"]["embedding"].value, table)
    tied = load("tied", {"embed_tokens.weight": table}, ensure_weight_tying=True)
    np.testing.assert_array_equal(tied["embed_tokens"]["embedding"].value, table)
    key = "embed_tokens.token_adapter.trainable_tokens_delta"
    rows = load("rows", {key: table[:2]}, trainable_token_indices=[5, 1])
    assert rows["embed_tokens"]["embedding"].index == (5, 1)


def test_the_naming_of_flax_is_found():
    params = g.tree({"params/layers_3/self_attn/q_proj/kernel": np.zeros((4, 5), np.float32)})
    names = {"model.layers.3.self_attn.q_proj.weight": (5, 4)}
    (entry,) = lora.peft.mapping(names, params["params"]).entries.values()
    assert str(entry.blocks[0]) == "layers_3/self_attn/q_proj/kernel"
    with fails("'model.layers.4.self_attn.q_proj.weight' .* no leaf of that name"):
        lora.peft.mapping({"model.layers.4.self_attn.q_proj.weight": (5, 4)}, params["params"])


def test_names_from_a_file_of_the_base_model():
    path = g.folder("net_lora") / "base.safetensors"
    params = g.net_params("net_lora")
    mapping = lora.peft.mapping(path, params, conv1d=["c1d"])
    assert len(mapping) == 7 and mapping["c1d.weight"].layout == "in_out"


@pytest.mark.parametrize(
    "table, match",
    [
        ({"(": "lin/kernel"}, "is not a regular expression and a leaf"),
        ({"lin": "{3}/kernel"}, "is not a regular expression and a leaf"),
        ({"lin": "{0:>999999999}"}, "no leaf '{0:>999999999}'"),
        ({"lin": 3}, "is not a regular expression and a leaf"),
        ({"lin": "line/kernel"}, "no leaf 'line/kernel'"),
        ({"lin": "lin/kernel[99]"}, "position 99 of an axis of size 8"),
        ({"lin": "lin/kernel[0, 0, 0]"}, "the leaf has 2 axes"),
        ({"lin": "c1d/kernel"}, "in 12, out 10"),
        ({"l.n": "lin/kernel", "li.": "c1d/kernel"}, "all match it"),
    ],
)
def test_bad_tables(table, match):
    with fails(match):
        lora.peft.load(g.folder("net_lora"), g.net_params("net_lora"), mapping=table)


# What cannot be used is one error that says what to do


def test_an_ambiguous_name_is_an_error():
    params = g.net_params("net_lora")
    params = {"a": params, "b": params}
    with fails("'lin.weight' .* may be: a/lin/kernel; b/lin/kernel"):
        lora.peft.load(g.folder("net_lora"), params)
    table = {r"([a-z0-9]+)": "b/{1}/kernel", "emb": "b/emb/embedding"}
    found = lora.peft.load(g.folder("net_lora"), params, mapping=table)
    assert set(found.adapters) == {"b"}


def test_all_missing_modules_are_listed():
    params = g.tree({"other/kernel": np.ones((8, 12), np.float32)})
    with fails(r"(?s)'c1d.weight'.*'emb.weight'.*'lin.weight'.*'head.bias'.*mapping="):
        lora.peft.load(g.folder("net_lora"), params)


def test_what_peft_would_ignore_is_an_error(tmp_path):
    a = np.ones((3, 10), np.float32)
    at = "base_model.model.head."
    extra = {at + "lora_A.weight": a, at + "lora_B.weight": np.ones((6, 3), np.float32)}
    with fails("target_modules leaves 'head' out"):
        loaded("net_bias_all", changed(tmp_path, "net_bias_all", {}, extra))
    with fails("expected a name that begins with 'base_model.model.'"):
        loaded("net_bias_all", changed(tmp_path / "b", "net_bias_all", {}, {"lin.x": a}))


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"init_lora_weights": "pissa"}, "trained against a changed base"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"peft_type": "BOFT"}, "expected one of LORA, ADALORA"),
        ({"scaling_of_2031": 3}, "'scaling_of_2031' is not a setting of PEFT"),
    ],
)
def test_settings_that_change_the_function_are_refused(tmp_path, settings, match):
    with fails(match):
        loaded("net_lora", changed(tmp_path, "net_lora", settings))


def test_magnitudes_and_their_setting_go_together(tmp_path):
    key = "base_model.model.lin.lora_magnitude_vector"
    with fails("has a, b, but not magnitude"):
        loaded("net_dora", changed(tmp_path / "1", "net_dora", {}, {key: None}))
    with fails("also has magnitude"):
        loaded("net_dora", changed(tmp_path / "2", "net_dora", {"use_dora": False}))
    with fails(r"a magnitude \(3,\), expected"):
        wrong = np.ones(3, np.float32)
        loaded("net_dora", changed(tmp_path / "3", "net_dora", {}, {key: wrong}))


def test_a_pair_that_does_not_fit_together(tmp_path):
    key = "base_model.model.lin.lora_B.weight"
    with fails("has a, but not b"):
        loaded("net_lora", changed(tmp_path, "net_lora", {}, {key: None}))
    with fails("different ranks"):
        wide = np.ones((12, 5), np.float32)
        loaded("net_lora", changed(tmp_path / "b", "net_lora", {}, {key: wide}))
    with fails("grouped convolution"):
        key = "base_model.model.conv.lora_B.weight"
        grouped = np.ones((8, 1, 1, 1), np.float32)
        loaded("conv_lora", changed(tmp_path / "c", "conv_lora", {}, {key: grouped}))


def test_a_square_value_of_unknown_layout(tmp_path):
    params = g.gpt2_params("gpt2_default")
    key = "base_model.model.transformer.h.0.attn.c_proj.weight"
    value = g.base("gpt2_default")["transformer.h.0.attn.c_proj.weight"]
    folder = changed(tmp_path, "gpt2_default", {"modules_to_save": ["c_proj"]}, {key: value})
    found_survey = lora.survey(g.gpt2, params, g.inputs("gpt2_default")[0])
    with fails("is square"):
        lora.peft.load(folder, params, found_survey)
    found = lora.peft.load(folder, params, found_survey, conv1d=["c_proj"])
    got = found.adapters["transformer"]["h"]["0"]["attn"]["c_proj"]["kernel"].value
    np.testing.assert_array_equal(got, value)


def test_a_square_value_beside_a_conv1d(tmp_path):
    """fan_in_fan_out speaks of adapted modules; of one saved in full its other weights do."""
    draw = np.random.default_rng(0)
    sizes = {"h.up.weight": (4, 6), "h.up.bias": 6, "h.proj.weight": (4, 4), "h.proj.bias": 4}
    full = {n: draw.normal(size=s).astype("f4") for n, s in sizes.items()}
    folder = written(tmp_path / "a", pair("head", 4, 4) | full, modules_to_save=["h"])
    kernel = lambda n: {"kernel": jnp.zeros((4, n)), "bias": jnp.zeros(n)}
    params = {"h": {"up": kernel(6), "proj": kernel(4)}, "head": kernel(4)}
    with fails("'h.proj.weight' .4, 4. is square"):
        lora.peft.load(folder, params)
    for conv1d in (["proj"], []):
        node = lora.peft.load(folder, params, conv1d=conv1d).adapters["h"]["proj"]["kernel"]
        want = full["h.proj.weight"] if conv1d else full["h.proj.weight"].T
        np.testing.assert_array_equal(node.value, want)


def test_a_mapping_that_lacks_a_leaf(tmp_path):
    params, found = loaded("net_lora")
    mapping = lora.peft.mapping({"lin.weight": (12, 8)}, params)
    with fails(r"(?s)'c1d/kernel' is in no entry.*'head/bias'"):
        lora.peft.save(tmp_path / "out", found.adapters, mapping)
    assert not (tmp_path / "out").exists()
    with fails("expected a TorchMapping"):
        lora.peft.save(tmp_path / "out", found.adapters, {"lin": "lin/kernel"})


def test_what_is_no_adapter_is_not_written(tmp_path):
    params, found = loaded("net_bias_all")
    with fails(r"(?s)'lin/kernel' is a .*not an adapter"):
        lora.peft.save(tmp_path / "out", params, found.mapping)
    node = type("Own", (lora.LoRA,), {})(
        jnp.ones((8, 2)), jnp.ones((2, 12)), 1.0, lora.Geometry((0,), (1,))
    )
    with fails("'lin/kernel' is a Own, not an adapter that PEFT has"):
        lora.peft.save(tmp_path / "out", {"lin": {"kernel": node}}, found.mapping)
    with fails("the tree holds no adapter"):
        lora.peft.save(tmp_path / "out", {}, found.mapping)
    with fails("lin.lora_A.weight' holds NaN"):
        lora.peft.save(
            tmp_path / "out", jax.tree.map(lambda x: x * jnp.nan, found.adapters), found.mapping
        )
    assert not (tmp_path / "out").exists()


def test_the_mapping_is_shown():
    _, found = loaded("mha")
    assert "attn/query/kernel, attn/key/kernel, attn/value/kernel" in str(found.mapping)
    assert len(found.mapping) == 2 and "attn.in_proj_weight" in list(found.mapping)


def test_nnx_modules():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self):
            w = g.net_params("net_bias_all")
            self.emb = nnx.Embed(11, 8, rngs=nnx.Rngs(0))
            self.lin, self.c1d, self.head = (
                nnx.Linear(*s, rngs=nnx.Rngs(0)) for s in ((8, 12), (12, 10), (10, 6))
            )
            self.emb.embedding[...] = w["emb"]["embedding"]
            for n in ("lin", "c1d", "head"):
                getattr(self, n).kernel[...] = w[n]["kernel"]

        def __call__(self, x):
            h = nnx.relu(self.c1d(nnx.relu(self.lin(self.emb(x)))))
            return self.head(h)

    net = Net()
    x, _, want = g.inputs("net_bias_all")
    fn = lambda net, x: net(x)
    found = lora.peft.load(g.folder("net_bias_all"), net, lora.survey(fn, net, x))
    got = lora.adapt(fn)(lora.bind(net, found.adapters), x)
    np.testing.assert_allclose(got, want, atol=1e-6)


@needs_peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("net_bias_all", "llama_bf16")])
@pytest.mark.parametrize("uniform", [False, 8])
def test_peft_loads_what_we_write(name, uniform, tmp_path):
    """The outputs of a torch model with the adapter that we wrote, noise added, are JAX's."""
    import torch_models

    fn = MODELS[name][0]
    params, found = loaded(name)
    adapters = noisy(found.adapters)
    lora.peft.save(tmp_path, adapters, found.mapping, uniform_rank=uniform)
    x = g.inputs(name)[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing adapter keys|were not used).*")
        got = torch_models.output(name, tmp_path, np.asarray(x))
    want = jax.jit(fn)(lora.merge(params, adapters), x)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


NET = {"r": 2, "lora_alpha": 5, "target_modules": ["lin", "c1d"]}
LLAMA = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}


@needs_peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, config",
    [
        ("net_lora", {**NET, "lora_bias": True, "target_modules": ["lin"]}),
        ("net_lora", {**NET, "bias": "lora_only"}),
        ("net_lora", {**NET, "bias": "all", "modules_to_save": ["head"]}),
        ("net_lora", {**NET, "trainable_token_indices": {"emb": [3, 0, 9]}}),
        (
            "net_lora",
            {**NET, "init_r": 4, "target_r": 2, "total_step": 10, "target_modules": ["lin"]},
        ),
        ("net_lora", {**NET, "rank_pattern": {"lin": 4}, "alpha_pattern": {".*": 3, "lin": 7}}),
        ("llama_default", {**LLAMA, "target_modules": "all-linear"}),
        ("llama_default", {**LLAMA, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
        ("llama_default", {**LLAMA, "target_modules": r".*\.(q|v)_proj", "use_rslora": True}),
        ("llama_default", {**LLAMA, "trainable_token_indices": [1, 5]}),
        ("llama_default", {**LLAMA, "modules_to_save": ["norm", "input_layernorm"]}),
        ("llama_default", {**LLAMA, "layers_to_transform": [1], "exclude_modules": ["down_proj"]}),
    ],
    ids=lambda v: "-".join(k for k in v if k not in NET) if isinstance(v, dict) else v,
)
def test_what_peft_writes(name, config, tmp_path):
    import torch_models

    fn, make, mapping, _ = MODELS[name]
    params, (x, _, _) = make(name), g.inputs(name)
    want = torch_models.written(name, tmp_path / "peft", np.asarray(x), config)
    found = lora.peft.load(tmp_path / "peft", params, lora.survey(fn, params, x), mapping=mapping)
    got = jax.jit(fn)(lora.merge(params, found.adapters), x)
    np.testing.assert_allclose(got, want, atol=4e-6 * np.abs(want).max(), rtol=0)
    lora.peft.save(tmp_path / "ours", found.adapters, found.mapping)
    again = torch_models.output(name, tmp_path / "ours", np.asarray(x))
    np.testing.assert_allclose(again, want, atol=4e-6 * np.abs(want).max(), rtol=0)


def test_a_mapping_prints_layers_that_are_alike_as_one():
    """The number of the layer is one in both names, whatever other numbers they have."""
    leaves = {"q": (4, 4), "k": (4, 2), "fc_0": (4, 6)}
    params = {
        f"h_{i}": {n: {"kernel": np.zeros(s, "f4")} for n, s in leaves.items()} for i in range(12)
    }
    params["h_2"]["fc_0"]["kernel"] = np.zeros((4, 8), "f4")
    params["scanned"] = {"up": {"kernel": np.zeros((3, 4, 6), "f4")}}
    names = {f"h.{i}.qk.weight": (6, 4) for i in range(12)}
    names |= {f"h.{i}.fc_0.weight": (8 if i == 2 else 6, 4) for i in range(12)}
    names |= {f"scanned.{i}.up.weight": (6, 4) for i in range(3)}
    table = {r"h\.(\d+)\.qk\.weight": ["h_{1}/q/kernel", "h_{1}/k/kernel"]}

    def fn(p, x):
        for i in range(12):
            q, k, fc = (x @ p[f"h_{i}"][n]["kernel"] for n in leaves)
            x = x + q * k.sum() * fc.sum()
        return jax.lax.scan(lambda x, w: ((x @ w)[:, :4], None), x, p["scanned"]["up"]["kernel"])[0]

    survey = lora.survey(fn, params, np.zeros((2, 4), "f4"))
    shown = str(lora.peft.mapping(names, params, survey, mapping=table)).split("\n")[2:]
    assert [line.split("  ")[0] for line in shown] == [
        "h.{0..11}.qk.weight",
        "h.{0,1,3..11}.fc_0.weight",
        "h.2.fc_0.weight",
        "scanned.{0..2}.up.weight",
    ]
    whole = "\n".join(shown)
    assert "h_{0..11}/q/kernel, h_{0..11}/k/kernel" in whole and "h_2/fc_0/kernel" in whole
    assert "h_{0,1,3..11}/fc_0/kernel" in whole and "scanned/up/kernel[{0..2}]" in whole
