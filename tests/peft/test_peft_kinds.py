"""Every kind of adapter that PEFT writes: loaded it does the same, written again PEFT loads it."""

import json
import warnings

import golden_models as g
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import fails, needs_peft
from test_peft import assert_same_tensors, outputs, pair, stored, written

import lora_jax as lora
from lora_jax._core.paths import nest


def tree_of(w):
    """Linear kernels (in, out), convolutions (*window, in, out), tables and scales as they are."""
    flat = {}
    for key, value in w.items():
        module, _, last = key.replace(".", "/").rpartition("/")
        name = {1: "scale", 2: "kernel"}.get(value.ndim, "kernel")
        if last != "weight":
            flat[f"{module}/{last}"] = value
        elif "emb" in module:
            flat[f"{module}/embedding"] = value
        else:
            flat[f"{module}/{name}"] = value.transpose(*range(2, value.ndim), 1, 0)[...] if (
                value.ndim > 1
            ) else value  # fmt: skip
    return g.tree(flat)


def conv(p, x, stride, pad):
    letters = "DHW"[-(x.ndim - 2) :]
    dims = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    y = jax.lax.conv_general_dilated(x, p["kernel"], stride, pad, dimension_numbers=dims)
    return y + p["bias"] if "bias" in p else y


def convs(p, x):
    x = x.transpose(0, 2, 3, 1)
    h = jax.nn.relu(conv(p["a"], x, (2, 1), ((1, 1), (0, 0))))
    one = p["b"]["kernel"].ndim == 2  # a window of one position is a product
    h = g.dense(p["b"], h) if one else conv(p["b"], h, (1, 1), "VALID")
    h = jax.nn.relu(h).reshape(h.shape[0], -1, 4)
    h = jax.nn.relu(conv(p["c"], h, (2,), ((2, 2),)))[:, :12].reshape(-1, 2, 2, 3, 5)
    return conv(p["d"], h, (1, 1, 1), ((1, 1), (0, 0), (1, 1))).transpose(0, 4, 1, 2, 3)


def convs_dense(w):
    p = tree_of(w)
    p["b"]["kernel"] = p["b"]["kernel"].reshape(6, 4)
    return p


def gated(p, x):
    e = p["experts"]
    gate, up = jnp.split(jnp.einsum("bi,eio->beo", x, e["gate_up_proj"]), 2, -1)
    h = jnp.einsum("bei,eio->bo", jax.nn.relu(gate) * up, e["down_proj"])
    return g.dense(p["out"], h)


def gated_params(w, turned=False):
    p = tree_of(w)
    turn = (0, 2, 1) if turned else (0, 1, 2)
    p["experts"] = {
        n: jnp.asarray(w[f"experts.{n}"].transpose(turn)) for n in ("gate_up_proj", "down_proj")
    }
    return p


def classifier(p, x):
    h, c = jax.nn.relu(g.dense(p["lin"], p["emb"]["embedding"][x])), p["classifier"]
    return g.dense(c["out"], jnp.tanh(g.layer_norm(c["norm"], g.dense(c["dense"], h))))


def of_base(make, **kwargs):
    """A function of golden_models that reads a folder, as one of the base weights."""

    def params(w):
        kept, g.base = g.base, lambda name: w
        try:
            return make("", **kwargs)
        finally:
            g.base = kept

    return params


def llama_tied(w):
    p = of_base(g.llama_params)(w)
    del p["lm_head"]
    return p


def tied(p, ids):
    table = p["model"]["embed_tokens"]["embedding"]
    return g.llama({**p, "lm_head": {"kernel": table.T}}, ids)


EXPERT_AXES = lora.LoRAConfig(
    rank=1,
    targets=["experts/gate_up_proj", "experts/down_proj", "out"],
    rules=[lora.Rule("experts/*", batch_axes=(0,), in_axes=(1,), out_axes=(2,))],
)
BIASES = {
    **g.MHA_MAPPING,
    "out": "out/kernel",
    "attn.in_proj_bias": [f"attn/{n}/bias" for n in ("query", "key", "value")],
}
# model: (function, parameters of the base weights, arguments of load_peft)
KINDS = {
    "convs": (convs, tree_of, {}),
    "gated_plain": (gated, gated_params, {}),
    "gated_flagged": (gated, gated_params, {}),
    "gated_turned": (gated, lambda w: gated_params(w, turned=True), {}),
    "classifier": (classifier, tree_of, {}),
    "mha": (g.mha, of_base(g.mha_params), {"mapping": BIASES}),
    "net": (g.net, of_base(g.net_params), {}),
    "tied": (tied, llama_tied, {}),
    "untied": (g.llama, of_base(g.llama_params), {}),
    "two_layers": (g.llama, of_base(g.llama_params), {}),
    "gpt2": (g.gpt2, of_base(g.gpt2_params), {}),
}


def opened(folder, kind, make=None, **kwargs):
    fn, params, arguments = KINDS[kind]
    io = g.tensors(folder / "io.safetensors")
    x = io["in_x"].astype(np.int32) if io["in_x"].dtype == np.int64 else io["in_x"]
    params = (make or params)(g.tensors(folder / "base.safetensors"))
    found = lora.survey(fn, params, x)
    found = lora.select(params, EXPERT_AXES, found) if fn is gated else found
    return fn, params, x, lora.peft.load(folder, params, found, **{**arguments, **kwargs}), io


def assert_same(fn, params, adapters, x, want):
    for got in outputs(fn, params, adapters, x):
        np.testing.assert_allclose(got, want, atol=4e-6 * np.abs(want).max(), rtol=0)


def test_a_window_of_one_position_is_a_product(tmp_path):
    folder = g.folder("kind_convs")
    fn, params, x, found, io = opened(folder, "convs", convs_dense)
    assert_same(fn, params, found.adapters, x, io["y_adapter"])
    lora.peft.save(tmp_path, found.adapters, found.mapping)
    assert_same_tensors(stored(tmp_path), stored(folder))
    shapes = {k: v.shape for k, v in g.tensors(folder / "base.safetensors").items()}
    found_survey = lora.survey(fn, params, x)
    mapping = lora.peft.mapping(shapes, params, found_survey)
    lora.peft.save(tmp_path / "b", found.adapters, mapping)
    assert_same_tensors(stored(tmp_path / "b"), stored(folder))


def test_a_dilated_convolution(tmp_path):
    """PEFT's A is not dilated, so its function is not that of any kernel."""
    params = {"a": {"kernel": jnp.ones((3, 2, 4))}}
    dims = ("NWC", "WIO", "NWC")
    fn = lambda p, x: jax.lax.conv_general_dilated(
        x, p["a"]["kernel"], (1,), "SAME", rhs_dilation=(2,), dimension_numbers=dims
    )
    tensors = {
        "a.lora_A.weight": np.ones((1, 2, 3), "f4"),
        "a.lora_B.weight": np.ones((4, 1, 1), "f4"),
    }
    folder = written(tmp_path / "a", tensors, r=1)
    with fails("a dilated convolution"):
        lora.peft.load(folder, params, lora.survey(fn, params, jnp.ones((1, 8, 2))))


def test_a_linear_layer_is_no_convolution_of_several_positions(tmp_path):
    params = {"a": {"kernel": jnp.ones((3, 2, 4))}}
    fn = lambda p, x: jax.lax.conv_general_dilated(
        x, p["a"]["kernel"], (3,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    folder = written(tmp_path / "a", pair("a", 6, 4))
    with fails("in an order of their own"):
        lora.peft.load(folder, params, lora.survey(fn, params, jnp.ones((1, 9, 2))))


# Experts


def square(tmp_path, **config):
    tensors = pair("experts", 6, 6, r=6, seed=1)
    settings = {"target_modules": [], "target_parameters": ["experts.up"], **config}
    return written(tmp_path, tensors, **settings), tensors


def test_square_experts_need_to_be_told(tmp_path):
    params = {"experts": {"up": jnp.zeros((3, 6, 6))}}
    rules = [lora.Rule("experts/up", batch_axes=(0,), in_axes=(1,), out_axes=(2,))]
    targets = lora.select(params, lora.LoRAConfig(rank=1, targets=["up"], rules=rules))
    folder, tensors = square(tmp_path / "a", peft_version="0.21.2")
    with fails("2 ways to assign its tensors fit.*experts_a='in'"):
        lora.peft.load(folder, params, targets)
    with fails("experts_a='inputs': expected one of in, out"):
        lora.peft.load(folder, params, targets, experts_a="inputs")
    a = tensors["experts.lora_A.weight"].reshape(3, 2, 6)
    b = tensors["experts.lora_B.weight"].reshape(6, 2, 3)
    want = 2.0 * np.einsum("eri,ore->eio", a, b)
    for along, turn in (("in", (0, 1, 2)), ("out", (0, 2, 1))):
        found = lora.peft.load(folder, params, targets, experts_a=along)
        merged = lora.merge(params, found.adapters)["experts"]["up"]
        np.testing.assert_allclose(merged, want.transpose(turn), atol=1e-5)
        for mapping in (
            found.mapping,
            lora.peft.mapping({"experts.up": (3, 6, 6)}, params, targets, experts_a=along),
        ):
            out = tmp_path / along / str(mapping is found.mapping)
            lora.peft.save(out, found.adapters, mapping)
            assert_same_tensors(stored(out), stored(folder))


def test_the_order_of_experts_in_a_file_of_the_base():
    folder, params = (
        g.folder("kind_gated_plain"),
        gated_params(g.tensors(g.folder("kind_gated_plain") / "base.safetensors")),
    )
    found = lora.survey(gated, params, jnp.ones((4, 5)))
    targets = lora.select(params, EXPERT_AXES, found)
    base = {"experts.down_proj": (3, 4, 5), "experts.gate_up_proj": (3, 5, 8)}
    order = ["gate_up_proj", "down_proj"]
    mapping = lora.peft.mapping(base, params, targets, experts=order)
    assert list(mapping) == [f"experts.{n}" for n in order]
    with fails(r"depend on their order in the torch module.*experts=\["):
        lora.peft.mapping(folder / "base.safetensors", params, targets)
    mapping = lora.peft.mapping(folder / "base.safetensors", params, targets, experts=order)
    assert [n for n in mapping if "experts" in n] == [f"experts.{n}" for n in order]


# Tied weights


def test_rows_of_a_table_of_which_the_head_is_a_copy():
    with fails("'lm_head/kernel' holds the values of 'model/embed_tokens/embedding'"):
        opened(g.folder("kind_tied_tokens"), "untied")


def test_a_tied_update_on_untied_leaves():
    """With ensure_weight_tying the file holds the head's factors too."""
    folder = g.folder("kind_tied_both")
    fn, params, x, found, io = opened(folder, "untied")
    assert_same(fn, params, found.adapters, x, io["y_adapter"])


def test_embedding_and_head_are_both_named(tmp_path):
    folder = g.folder("kind_tied_both")
    fn, params, x, found, _ = opened(folder, "tied")
    shapes = {k: v.shape for k, v in g.tensors(folder / "base.safetensors").items()}
    table = shapes.pop("model.embed_tokens.weight")
    shapes |= {"model.embed_tokens.weight": table, "lm_head.weight": table}
    mapping = lora.peft.mapping(shapes, params, lora.survey(fn, params, x))
    lora.peft.save(tmp_path, found.adapters, mapping)
    base = [k for k in stored(folder) if k.endswith("base_layer.weight")]
    want = {k: v for k, v in stored(folder).items() if k not in base}
    assert_same_tensors(stored(tmp_path), want)
    del shapes["lm_head.weight"]
    mapping = lora.peft.mapping(shapes, params, lora.survey(fn, params, x))
    with fails("the mapping has one of the two"):
        lora.peft.save(tmp_path / "b", found.adapters, mapping)


def test_rows_of_a_kernel(tmp_path):
    params = {"lm_head": {"kernel": jnp.zeros((4, 6))}}
    found = lora.survey(lambda p, x: x @ p["lm_head"]["kernel"], params, jnp.ones((2, 4)))
    key = "lm_head.token_adapter.trainable_tokens_delta"
    settings = {"trainable_token_indices": {"lm_head": [1]}}
    folder = written(tmp_path / "a", {key: np.ones((1, 4), "f4")}, **settings)
    with fails("whose columns are torch's rows.*modules_to_save"):
        lora.peft.load(folder, params, found)


# What PEFT would take otherwise than it is meant is not written


def node(n_in, n_out, r=2):
    geometry = lora.Geometry((0,), (1,))
    return lora.LoRA(jnp.ones((n_in, r)), jnp.ones((r, n_out)), 1.0, geometry)


@pytest.mark.parametrize(
    "full, adapted",
    [("head", "lm_head"), ("head", "block.head"), ("blk", "blk.lin"), ("out", "lin")],
)
def test_a_name_in_modules_to_save_means_others_too(full, adapted, tmp_path):
    paths = {n: n.replace(".", "/") + "/kernel" for n in (full, adapted)}
    params = g.tree({p: np.ones((4, 4), "f4") for p in paths.values()})
    names = {f"{n}.weight": (4, 4) for n in paths}
    mapping = lora.peft.mapping(names, params, mapping=paths)
    flat = {paths[full]: lora.Full(jnp.ones((4, 4))), paths[adapted]: node(4, 4)}
    with fails(f"'{full}' is trained in full, which PEFT takes to mean '{adapted}"):
        lora.peft.save(tmp_path / "out", nest(flat), mapping)


def test_a_parameter_of_the_model_itself(tmp_path):
    params = {"scale": jnp.ones(4), "lin": {"kernel": jnp.ones((4, 4))}}
    mapping = lora.peft.mapping({"scale": (4,), "lin.weight": (4, 4)}, params)
    adapters = {"scale": lora.Full(jnp.ones(4)), "lin": {"kernel": node(4, 4)}}
    with fails("'scale' is a parameter of the model itself"):
        lora.peft.save(tmp_path / "out", adapters, mapping)


def test_layers_of_a_stack_that_are_not_adapted(tmp_path):
    """What the file did not hold is zero, and is not written; once trained it would be lost."""
    params = {"layers": {"q": {"kernel": jnp.zeros((3, 4, 5))}}}
    fn = lambda p, x: jax.lax.scan(
        lambda x, w: (jnp.tanh(x @ w @ w.T), None), x, p["layers"]["q"]["kernel"]
    )[0]
    folder = written(tmp_path / "in", pair("layers.1.q", 4, 5))
    found = lora.peft.load(folder, params, lora.survey(fn, params, jnp.ones((2, 4))))
    lora.peft.save(tmp_path / "out", found.adapters, found.mapping)
    assert_same_tensors(stored(tmp_path / "out"), stored(folder))
    trained = jax.tree.map(lambda x: x + 1, found.adapters)
    with fails("the mapping has 20 of 60 elements"):
        lora.peft.save(tmp_path / "out", trained, found.mapping)


# With torch: PEFT writes, JAX loads; JAX writes, PEFT loads

TWO = {"r": 2, "lora_alpha": 5}
EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
WRITTEN = [
    ("convs", {**TWO, "target_modules": ["a", "c"], "lora_bias": True}),
    ("convs", {"init_r": 3, "total_step": 9, "lora_alpha": 4, "target_modules": ["a", "b"]}),
    ("convs", {**TWO, "target_modules": ["a"], "modules_to_save": ["b", "c", "d"]}),
    ("gated_plain", {**TWO, **EXPERTS, "use_rslora": True}),
    ("gated_flagged", {**TWO, "target_modules": [], "target_parameters": ["down_proj"]}),
    ("gated_turned", {**TWO, **EXPERTS, "rank_pattern": {"experts.down_proj": 3}}),
    ("gated_turned", {**TWO, "target_modules": [], "target_parameters": ["out.weight", "down_proj"]}),
    ("classifier", {**TWO, "target_modules": r"(?!emb).*(lin|dense)", "modules_to_save": ["classifier.out"]}),
    ("classifier", {**TWO, "target_modules": ["lin"], "bias": "lora_only", "modules_to_save": ["norm"]}),
    ("mha", {**TWO, "target_modules": ["attn"], "use_rslora": True, "bias": "lora_only"}),
    ("mha", {**TWO, "target_modules": ["out"], "modules_to_save": ["attn"]}),
    ("net", {**TWO, "target_modules": ["lin", "c1d"], "init_lora_weights": "mica"}),
    ("net", {**TWO, "target_modules": ["emb", "c1d"], "alpha_pattern": {r"c\dd": 3, "1d": 4}}),
    ("tied", {**TWO, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ("tied", {**TWO, "target_modules": ["lm_head"], "ensure_weight_tying": True, "use_rslora": True}),
    ("untied", {**TWO, "target_modules": ["lm_head", "embed_tokens"]}),
]  # fmt: skip


@needs_peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind, config",
    WRITTEN,
    ids=[f"{k}-{'-'.join(n for n in c if n not in TWO)}" for k, c in WRITTEN],
)
def test_kinds_that_peft_writes(kind, config, tmp_path):
    import torch_models

    torch_models.write_kind(kind, tmp_path / "in", config)
    fn, params, x, found, io = opened(tmp_path / "in", kind)
    assert_same(fn, params, found.adapters, x, io["y_adapter"])
    lora.peft.save(tmp_path / "out", found.adapters, found.mapping)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        again = torch_models.kind_output(kind, tmp_path / "out")
    np.testing.assert_allclose(again, io["y_adapter"], atol=4e-6 * np.abs(again).max(), rtol=0)


def test_the_settings_say_that_weights_are_tied(tmp_path):
    found = opened(g.folder("kind_tied_both"), "tied")[3]
    lora.peft.save(tmp_path, found.adapters, found.mapping)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["ensure_weight_tying"] is True
