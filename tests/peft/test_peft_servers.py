"""Adapters for servers: what they cannot load is named before anything is written; the rest loads."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import fails

import lora_jax as lora
from lora_jax._core.paths import nest

MATRIX, STACK = lora.Geometry((0,), (1,)), lora.Geometry((1,), (2,), (0,))
CONV = lora.Geometry((0, 1, 2), (3,))
NAMES = {
    "q_proj": (6, 6),
    "up_proj": (5, 6),
    "embed_tokens": (9, 6),
    "lm_head": (9, 6),
    "norm": (6,),
}


def node(shape=(6, 6), rank=2, scale=1.0, geometry=MATRIX, cls=lora.LoRA):
    a, b = (np.ones(s, "f4") for s in geometry.factor_shapes(shape, rank))
    return lora.LoRA(a, b, scale, geometry)


def model(**nodes):
    """(adapters, mapping) of a layer's modules, named as Llama's."""
    at = lambda n: n if n in ("embed_tokens", "lm_head") else f"layers/0/{n}"
    last = lambda n: {"embed_tokens": "embedding", "norm": "scale"}.get(n, "kernel")
    leaves = {n: f"{at(n)}/{last(n)}" for n in NAMES}
    shape = lambda n: NAMES[n] if n in ("embed_tokens", "norm") else NAMES[n][::-1]
    params = nest({leaves[n]: jnp.zeros(shape(n)) for n in NAMES})
    torch = {f"model.{at(n).replace('/', '.')}.weight": s for n, s in NAMES.items()}
    mapping = lora.peft.mapping(torch, params)
    return nest({leaves[n]: x for n, x in nodes.items()}), mapping


def experts():
    params = {"mlp": {"experts": {"up": jnp.zeros((3, 6, 5))}}}
    rules = [lora.Rule("mlp/*", batch_axes=(0,), in_axes=(1,), out_axes=(2,))]
    survey = lora.select(params, lora.LoRAConfig(rank=2, targets="up", rules=rules))
    adapters = {"mlp": {"experts": {"up": node((3, 6, 5), geometry=STACK)}}}
    return params, survey, adapters


def convolution():
    params = {"conv": {"kernel": jnp.zeros((3, 3, 2, 4))}}
    dims = ("NHWC", "HWIO", "NHWC")
    survey = lora.survey(
        lambda p, x: jax.lax.conv_general_dilated(x, p["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=dims),
        params, jnp.zeros((1, 5, 5, 2)))  # fmt: skip
    entry = lora.peft.mapping({"conv.weight": (4, 2, 3, 3)}, params, survey)
    return {"conv": {"kernel": node((3, 3, 2, 4), geometry=CONV)}}, entry


DORA = node().with_magnitude(np.ones(6, "f4"))
EACH = [
    ({"q_proj": node(), "up_proj": node((6, 5), 3)}, {}, "ranks or alphas differ.*uniform_rank=True"),
    ({"q_proj": node(), "up_proj": node((6, 5), scale=2.0)}, {}, "ranks or alphas differ"),
    ({"q_proj": DORA}, {}, "DoRA.*lora.merge"),
    ({"q_proj": node(), "norm": lora.Full(np.ones(6, "f4"))}, {}, "modules_to_save.*serve the merged model"),
    ({"q_proj": node(), "embed_tokens": lora.Rows(np.ones((1, 6), "f4"), (3,), 9)}, {}, "rows of a table"),
    ({"q_proj": node()}, {"config": {"alora_invocation_tokens": [1]}}, "active for every token"),
]  # fmt: skip
OF_ONE = [
    ("vllm", {"q_proj": node(rank=513)}, {}, r"rank 513: .*lora.algebra.resize\(adapters, 512\)"),
    (
        "sglang-jax",
        {"q_proj": node(), "embed_tokens": node((9, 6))},
        {},
        "neither embedding nor head",
    ),
    ("sglang-jax", {"q_proj": node(), "lm_head": node((6, 9))}, {}, "neither embedding nor head"),
    (
        "sglang-jax",
        {"norm": lora.Full(np.ones(6, "f4"))},
        {},
        "target_modules: no module is adapted",
    ),
]
CASES = [(t, *c) for t in ("vllm", "sglang-jax") for c in EACH] + OF_ONE


@pytest.mark.parametrize("target, nodes, kwargs, match", CASES)
def test_what_a_server_cannot_load_is_not_written(tmp_path, target, nodes, kwargs, match):
    adapters, mapping = model(**nodes)
    with fails(f"(?s){target} cannot load these adapters.*{match}"):
        lora.peft.save(tmp_path / "a", adapters, mapping, target=target, **kwargs)
    assert not list(tmp_path.iterdir())
    lora.peft.save(tmp_path / "a", adapters, mapping, target="peft", **kwargs)  # which can


@pytest.mark.parametrize("target", ["vllm", "sglang-jax"])
def test_what_it_says_to_do_helps(tmp_path, target):
    adapters, mapping = model(q_proj=node(scale=0.5), up_proj=node((6, 5), 3))
    lora.peft.save(
        tmp_path, adapters, mapping, target=target, uniform_rank=8, task_type="CAUSAL_LM"
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (8, {}, {})
    assert sorted(config["target_modules"]) == ["model.layers.0.q_proj", "model.layers.0.up_proj"]


@pytest.mark.parametrize("target", ["vllm", "sglang-jax"])
def test_experts_are_split(tmp_path, target):
    params, survey, adapters = experts()
    fused = lora.peft.mapping({"mlp.experts.up": (3, 6, 5)}, params, survey, experts=["up"])
    with fails("experts in one tensor; split them"):
        lora.peft.save(tmp_path / "a", adapters, fused, target=target)
    torch = {f"mlp.experts.{i}.up_proj.weight": (5, 6) for i in range(3)}
    table = {r"mlp\.experts\.(\d+)\.up_proj": "mlp/experts/up[{1}]"}
    split = lora.peft.mapping(torch, params, survey, mapping=table)
    lora.peft.save(tmp_path / "b", adapters, split, target=target)
    again = lora.peft.load(tmp_path / "b", params, survey, mapping=split)
    np.testing.assert_allclose(*(lora.merge(params, x)["mlp"]["experts"]["up"] for x in (adapters, again.adapters)), atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("target", ["vllm", "sglang-jax"])
def test_a_convolution_is_refused(tmp_path, target):
    adapters, mapping = convolution()
    with fails("a convolution, which it does not adapt"):
        lora.peft.save(tmp_path / "a", adapters, mapping, target=target)


def test_a_target_that_is_none(tmp_path):
    adapters, mapping = model(q_proj=node())
    with fails("target='tgi': expected one of peft, vllm, sglang-jax"):
        lora.peft.save(tmp_path, adapters, mapping, target="tgi")


def test_whose_adapter_it_is_stays(tmp_path):
    """task_type, base, revision and unknown settings, through load and save; what is given wins."""
    adapters, mapping = model(q_proj=node())
    about = {"revision": "abc", "auto_mapping": {"base_model_class": "X"}, "later_setting": None}
    lora.peft.save(
        tmp_path / "a",
        adapters,
        mapping,
        task_type="CAUSAL_LM",
        base_model_name="some/base",
        config=about,
    )
    params = {"layers": {"0": {"q_proj": {"kernel": jnp.zeros((6, 6))}}}}
    with pytest.warns(UserWarning, match="'later_setting'"):
        found = lora.peft.load(tmp_path / "a", params)
    read = lambda name: json.loads((tmp_path / name / "adapter_config.json").read_text())
    want = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "some/base", **about}
    lora.peft.save(tmp_path / "b", found.adapters, found.mapping)
    assert {k: read("b")[k] for k in want} == want
    lora.peft.save(
        tmp_path / "c",
        found.adapters,
        found.mapping,
        base_model_name="other/base",
        task_type="SEQ_CLS",
    )
    assert (
        read("c")["base_model_name_or_path"] == "other/base" and read("c")["task_type"] == "SEQ_CLS"
    )
    assert "revision" not in read("c") and read("c")["later_setting"] is None
