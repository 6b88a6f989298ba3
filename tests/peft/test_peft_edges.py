"""An adapter goes where it belongs or nowhere, and each refusal offers a way on."""

import json
import re
import shutil
import warnings

import golden_models as g
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import fails
from hypothesis import given, settings
from hypothesis import strategies as st
from test_peft import changed, delta, loaded, pair, stored, written

import lora_jax as lora
from lora_jax.peft._file import open_adapter
from lora_jax.peft._names import WRAPPERS

PARTS = ["vision_tower", "text_encoder", "decoder", "encoder", "draft_model", "student", "audio"]


def params_of(path, shape=(6, 4)):
    tree = jnp.zeros(shape)
    for name in reversed(path.split("/")):
        tree = {name: tree}
    return tree


# Onto the wrong weights


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_a_name_that_tells_parts_apart_is_never_left_out(tmp_path_factory, data):
    """On either side, in front of or behind a wrapper's name: refused, with what it may be; given
    in a mapping, or where the rest stands for the whole model, it is loaded."""
    wrappers = st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=2)
    part = data.draw(st.sampled_from([None, *PARTS]))
    first = [*data.draw(wrappers), *([part] if part else []), *data.draw(wrappers)]
    torch, leaf = "layers.0.q", "layers_0/q/kernel"
    if data.draw(st.booleans()):
        torch = ".".join([*first, torch])
    else:
        leaf = "/".join([*first, leaf])
    tensors = pair(torch, 6, 4)
    folder = written(tmp_path_factory.mktemp("a") / "in", tensors)
    params = params_of(leaf)
    if part:
        with fails(rf"may be: {leaf}, but the names begin otherwise"):
            lora.peft.load(folder, params)
    mapping = {re.escape(torch): leaf} if part else None
    merged = lora.merge(params, lora.peft.load(folder, params, mapping=mapping).adapters)
    np.testing.assert_allclose(jax.tree.leaves(merged)[0], delta(tensors, torch).T, atol=1e-5)


@pytest.mark.parametrize("said, name", [(5, "q"), (3, "q"), (8, None)])
def test_a_rank_that_the_configuration_does_not_say(tmp_path, said, name):
    """PEFT would not load it; and alpha / 4 is not what alpha / 5 was."""
    settings = {"r": 4, "rank_pattern": {name: said}} if name else {"r": said, "rank_pattern": {}}
    tensors = pair("q", 6, 4, r=4)
    folder = written(tmp_path / "a", tensors, **settings)
    params = {"q": {"kernel": jnp.zeros((6, 4))}}
    with fails(rf"is of rank 4, and the configuration says {said}.*ignore=\['r'\]"):
        lora.peft.load(folder, params)
    found = lora.peft.load(folder, params, ignore=["r"])
    assert found.adapters["q"]["kernel"].scale == 1.0


@pytest.mark.parametrize("last", ["weight", "w", "table"])
@pytest.mark.parametrize("as_targets", [False, True])
def test_a_square_leaf_of_unknown_order(tmp_path, last, as_targets):
    """torch's `weight` is (out, in) and would get the transposed update; a survey or a rule says
    how it lies, and so does a name of Flax's."""
    tensors = pair("q", 5, 5)
    folder = written(tmp_path / "a", tensors)
    full = written(tmp_path / "b", {"q.weight": np.eye(5, k=1, dtype="f4")}, modules_to_save=["q"])
    params = {"q": {last: jnp.zeros((5, 5))}}
    survey = None
    if as_targets:
        survey = lora.select(params, lora.LoRAConfig(rank=2, targets="q/*"))
    for path in (folder, full):
        with fails(rf"q/{last}|'q.weight'.*its axes are not known.*survey=lora.survey"):
            lora.peft.load(path, params, survey)
    fn = lambda p, x: x @ p["q"][last].T
    found = lora.survey(fn, params, jnp.ones((2, 5)))
    rules = [lora.Rule("q/*", in_axes=(1,), out_axes=(0,))]
    ruled = lora.select(params, lora.LoRAConfig(rank=2, targets="q/*", rules=rules))
    for survey in (found, ruled):
        merged = lora.merge(params, lora.peft.load(folder, params, survey).adapters)
        np.testing.assert_allclose(merged["q"][last], delta(tensors, "q"), atol=1e-5)
    kernel = {"q": {"kernel": jnp.zeros((5, 5))}}
    merged = lora.merge(kernel, lora.peft.load(folder, kernel).adapters)
    np.testing.assert_allclose(merged["q"]["kernel"], delta(tensors, "q").T, atol=1e-5)


def test_a_square_table_is_not_turned(tmp_path):
    value = np.arange(25, dtype="f4").reshape(5, 5)
    folder = written(tmp_path / "a", {"emb.weight": value}, modules_to_save=["emb"])
    params = {"emb": {"embedding": jnp.zeros((5, 5))}}
    merged = lora.merge(params, lora.peft.load(folder, params).adapters)
    np.testing.assert_array_equal(merged["emb"]["embedding"], value)
    cube = written(tmp_path / "b", {"c.weight": np.ones((3, 3, 3), "f4")}, modules_to_save=["c"])
    with fails("its axes are not known"):
        lora.peft.load(cube, {"c": {"kernel": jnp.zeros((3, 3, 3))}})


# Names


NAMES = ["lora_gate", "lora_A", "lora_embedding", "base_layer_norm", "default", "lora_x.default",
         "modules_to_save_2", "token_adapter_2", "lora_B_proj", "original_module_2"]  # fmt: skip


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3), st.booleans())
def test_modules_with_names_like_peft_s_own(tmp_path_factory, names, bias):
    """Loaded, saved and loaded again: the same update, on the leaf of that name."""
    module = ".".join(["block", *names, "q"])
    tensors = pair(module, 6, 4)
    rest = {}
    if bias:
        tensors[f"{module}.lora_B.bias"] = np.ones(4, "f4")
        rest = {"lora_bias": True}
    folder = tmp_path_factory.mktemp("a")
    written(folder / "in", tensors, **rest)
    path = module.replace(".", "/")
    params = nested(path, bias)
    found = lora.peft.load(folder / "in", params)
    merged = lora.merge(params, found.adapters)
    leaf = merged
    for name in path.split("/"):
        leaf = leaf[name]
    np.testing.assert_allclose(leaf["kernel"], delta(tensors, module).T, atol=1e-5)
    if not bias:
        lora.peft.save(folder / "out", found.adapters, found.mapping)
        again = stored(folder / "out")
        for key, value in stored(folder / "in").items():
            np.testing.assert_array_equal(again[key], value)


def nested(path, bias):
    leaf = {"kernel": jnp.zeros((6, 4))} | ({"bias": jnp.zeros(4)} if bias else {})
    for name in reversed(path.split("/")):
        leaf = {name: leaf}
    return leaf


def test_a_module_named_lora_gate_in_full(tmp_path):
    value = np.ones((4, 6), "f4")
    name = "block.lora_gate.weight"
    params = {"block": {"lora_gate": {"kernel": jnp.zeros((6, 4))}}}
    folder = written(tmp_path / "a", {name: value}, modules_to_save=["lora_gate"])
    merged = lora.merge(params, lora.peft.load(folder, params).adapters)
    np.testing.assert_array_equal(merged["block"]["lora_gate"]["kernel"], value.T)
    with fails("not a tensor of plain LoRA"):
        lora.peft.load(written(tmp_path / "b", {name: value}), params)


RENAMED = {
    "no prefix": (lambda k: k.removeprefix("base_model.model."), {}),
    "compiled": (lambda k: k.replace("model.lin", "model._orig_mod.lin"), {}),
    "compiled whole": (lambda k: "_orig_mod." + k, {}),
    "a named adapter": (lambda k: re.sub(r"(lora_\w+)", r"\1.default_0", k), {}),
    "distributed": (lambda k: "module." + k, {}),
    "all of them": (
        lambda k: (
            "_orig_mod." + re.sub(r"(lora_\w+)", r"\1.style", k.removeprefix("base_model.model."))
        ),
        {},
    ),
}


@pytest.mark.parametrize("kind", RENAMED)
def test_names_that_peft_would_skip_offer_a_way_on(tmp_path, kind):
    """The call in the message, as it stands, loads what the adapter was."""
    old = {k: v for k, v in stored(g.folder("net_lora")).items() if "head" not in k}
    gone = dict.fromkeys(stored(g.folder("net_lora")))
    new = gone | {RENAMED[kind][0](k): v for k, v in old.items()}
    folder = changed(tmp_path, "net_lora", {"modules_to_save": None}, new)
    with pytest.raises(lora.LoRAError, match="rename=") as raised:
        loaded("net_lora", folder)
    rename = eval(re.search(r"rename=(\{.*\})", str(raised.value))[1])  # what a person would paste
    assert open_adapter(folder, rename=rename).tensors.keys() == old.keys()
    assert len(loaded("net_lora", folder, rename=rename)[1].mapping) == 3


def test_rename_is_checked():
    folder = g.folder("net_lora")
    for rename, match in (
        ({"(": ""}, "is not a regular expression"),
        ({"lin": "emb", "c1d": "emb"}, "no name, or taken"),
        ({".*": ""}, "no name, or taken"),
        ("lin", "expected {expression: text}"),
    ):
        with fails(match):
            open_adapter(folder, rename=rename)


# Settings of a newer PEFT


@pytest.mark.parametrize(
    "value, passes",
    [(None, True), (False, True), ({}, True), ("none", True), ("auto", True), (0, True),
     ({"a": None, "b": [False]}, True), (True, False), (2, False), ({"a": 1}, False), ([3], False)],
)  # fmt: skip
def test_a_setting_of_a_newer_peft(tmp_path, value, passes):
    """Nothing in any form is passed over with a warning and kept; anything else may be a switch."""
    folder = changed(tmp_path, "net_lora", {"newer": value})
    if not passes:
        with fails("'newer' is not a setting of PEFT"):
            loaded("net_lora", folder)
        return
    with pytest.warns(UserWarning, match="passed over: 'newer'"):
        found = loaded("net_lora", folder)[1]
    assert found.unknown == {"newer": value}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded("net_lora", folder, ignore=["newer"])
    lora.peft.save(tmp_path / "out", found.adapters, found.mapping, config=found.unknown)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["newer"] == value


# What PEFT would pass over is refused, and the call that the message gives takes it

Q = pair("layers.0.q", 6, 4)
LEFT_OUT = {
    "target_modules": (Q, {"target_modules": ["k"]}),
    "exclude_modules": (Q, {"exclude_modules": r"layers\.0\..*"}),
    "modules_to_save": (Q | {"layers.0.norm.weight": np.ones(4, "f4")}, {"modules_to_save": ["0"]}),
    "layers_to_transform": (Q, {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "no weight": ({k.removesuffix(".weight"): v for k, v in Q.items()}, {}),
    "base_layer": (Q | {"layers.0.q.bias": np.ones(4, "f4")}, {"bias": "all"}),
    "tokens": (Q, {"trainable_token_indices": {"emb": [1]}}),
    "saved": (Q, {"modules_to_save": ["head"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_peft_would_pass_over(tmp_path, case):
    tensors, settings = LEFT_OUT[case]
    folder = written(tmp_path / "a", tensors, **settings)
    q = {"kernel": jnp.zeros((6, 4)), "bias": jnp.zeros(4)}
    params = {"layers": {"0": {"q": q, "norm": {"scale": jnp.ones(4)}}}}
    with pytest.raises(lora.LoRAError, match=r"PEFT|none of its tensors") as error:
        lora.peft.load(folder, params)
    given = re.search(r"lora\.peft\.load\(\.\.\., (.*)\)$", str(error.value))
    found = lora.peft.load(folder, params, **eval(f"dict({given[1]})"))
    merged = lora.merge(params, found.adapters)["layers"]["0"]["q"]
    np.testing.assert_allclose(merged["kernel"], delta(Q, "layers.0.q").T, rtol=1e-6)
    assert merged["bias"].any() == (case == "base_layer")


def test_a_bias_of_an_update(tmp_path):
    """Without lora_bias PEFT has none; with it the file may lack it, as of a Linear without one."""
    bias = {"q.lora_B.bias": np.ones(4, "f4")}
    params = {"q": {"kernel": jnp.zeros((6, 4)), "bias": jnp.zeros(4)}}
    folder = written(tmp_path / "a", pair("q", 6, 4) | bias)
    with fails("'q' also has b_bias; PEFT would ignore it: set lora_bias in adapter_config.json"):
        lora.peft.load(folder, params)
    for tensors in ({}, bias):
        folder = written(tmp_path / str(len(tensors)), pair("q", 6, 4) | tensors, lora_bias=True)
        merged = lora.merge(params, lora.peft.load(folder, params).adapters)
        assert merged["q"]["bias"].tolist() == [2.0 * len(tensors)] * 4


def test_what_velora_keeps_for_training_is_passed_over(tmp_path):
    embed = {"q.lora_velora_embed": np.ones(3, "f4")}
    settings = {"velora_config": {"num_groups": 2, "init_type": "random", "scale": 1.0}}
    params = {"q": {"kernel": jnp.zeros((6, 4))}}
    found = lora.peft.load(written(tmp_path / "a", pair("q", 6, 4) | embed, **settings), params)
    want = lora.peft.load(written(tmp_path / "b", pair("q", 6, 4)), params)
    jax.tree.map(np.testing.assert_array_equal, found.adapters, want.adapters)


def test_an_attention_whose_out_proj_is_transposed(tmp_path):
    settings = json.loads((g.folder("mha") / "adapter_config.json").read_text())
    folder = shutil.copytree(g.folder("mha"), tmp_path / "a")
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"fan_in_fan_out": True}))
    with fails(r"which PEFT then adds transposed.*ignore=\['fan_in_fan_out'\]"):
        loaded("mha", folder)


# Added tokens, and stacks


def emb(rows, d=4):
    return {"lora_embedding_A": np.ones((2, rows), "f4"), "lora_embedding_B": np.ones((d, 2), "f4")}


@pytest.mark.parametrize(
    "tensors, rest",
    [
        ({f"emb.{k}": v for k, v in emb(68).items()}, {}),
        ({"emb.weight": np.ones((68, 4), "f4")}, {"modules_to_save": ["emb"]}),
        ({"lm_head.weight": np.ones((68, 4), "f4")}, {"modules_to_save": ["lm_head"]}),
        (pair("lm_head", 4, 68), {}),
        ({"emb.token_adapter.trainable_tokens_delta": np.ones((2, 4), "f4")},
         {"trainable_token_indices": {"emb": [3, 67]}}),
    ],
    ids=["table", "table in full", "head in full", "head", "rows"],
)  # fmt: skip
def test_added_tokens(tmp_path, tensors, rest):
    folder = written(tmp_path / "a", tensors, **rest)
    params = {"emb": {"embedding": jnp.ones((64, 4))}, "lm_head": {"kernel": jnp.zeros((4, 64))}}
    with fails("tokens were added: give the leaf 68 rows"):
        lora.peft.load(folder, params)
    more = {"emb": {"embedding": jnp.ones((68, 4))}, "lm_head": {"kernel": jnp.zeros((4, 68))}}
    lora.peft.load(folder, more)


@pytest.mark.parametrize("surveyed", [False, True])
def test_experts_on_a_leaf_without_a_batch_axis(tmp_path, surveyed):
    tensors = {k: v for i in range(3) for k, v in pair(f"m.experts.{i}.up", 6, 4, seed=i).items()}
    folder = written(tmp_path / "a", tensors)
    params = {"m": {"experts": {"up": {"kernel": jnp.zeros((3, 6, 4))}}}}
    fn = lambda p, x: jnp.einsum("td,edf->tef", x, p["m"]["experts"]["up"]["kernel"])
    survey = lora.survey(fn, params, jnp.ones((2, 6))) if surveyed else None
    rule = lora.Rule("m/experts/up/kernel", batch_axes=(0,), in_axes=(1,), out_axes=(2,))
    with fails(r"has no batch axis.*lora.Rule\('m/experts/up/kernel', batch_axes=\(0,\)"):
        lora.peft.load(folder, params, survey)
    config = lora.LoRAConfig(rank=2, targets="kernel", rules=[rule])
    found = lora.peft.load(folder, params, lora.select(params, config, survey))
    merged = lora.merge(params, found.adapters)["m"]["experts"]["up"]["kernel"]
    for i in range(3):
        np.testing.assert_allclose(merged[i], delta(tensors, f"m.experts.{i}.up").T, atol=1e-5)


# What is written


@pytest.mark.parametrize(
    "dtype, scale, value, match",
    [
        ("int8", 1.0, 1.0, "expected one of float32, float16, bfloat16"),
        ("float64", 1.0, 1.0, "expected one of float32, float16, bfloat16"),
        ("no type", 1.0, 1.0, "expected one of float32, float16, bfloat16"),
        ("float16", 1.0, 1e6, "a number that float16 does not"),
        (None, 1.0, np.inf, "holds NaN or infinity"),
        (None, 1e13, 1.0, "lora_alpha: expected a number"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path, dtype, scale, value, match):
    params = {"q": {"kernel": jnp.zeros((4, 3))}}
    a = np.full((4, 2), value, "f4")
    node = lora.LoRA(a, np.ones((2, 3), "f4"), scale, lora.Geometry((0,), (1,)))
    mapping = lora.peft.mapping({"q.weight": (3, 4)}, params)
    with fails(match):
        lora.peft.save(tmp_path / "out", {"q": {"kernel": node}}, mapping, dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_of_mlx(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"fine_tune_type": "lora"}')
    (tmp_path / "adapters.safetensors").write_bytes(b"")
    with fails("an adapter of mlx-lm: lora.peft.load"):
        open_adapter(tmp_path)
