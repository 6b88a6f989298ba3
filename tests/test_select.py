"""Targets: patterns, all-linear, rules, and the parameter counts that papers publish."""

import copy
import dataclasses
import functools
import json
import operator
import re

import jax
import jax.numpy as jnp
import llama
import numpy as np
import pytest
import rand
from common import assert_close, examples, fails, noisy
from flax import linen as nn
from flax.core import freeze
from hypothesis import given
from hypothesis import strategies as st

import lora_jax as lora
from lora_jax._config import matches


def shapes(tree):
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=lambda x: isinstance(x, tuple)
    )


PARAMS = shapes({
    "embed": {"embedding": (100, 16)},
    "layers_0": {"q_proj": {"kernel": (16, 16), "bias": (16,)}, "v_proj": {"kernel": (16, 8)}},
    "layers_1": {"q_proj": {"kernel": (16, 16), "bias": (16,)}, "v_proj": {"kernel": (16, 8)}},
    "head": {"kernel": (16, 100)},
})  # fmt: skip


@pytest.mark.parametrize(("targets", "expected"), [
    ("q_proj", ["layers_0/q_proj/kernel", "layers_1/q_proj/kernel"]),
    (["q_proj", "v_proj/kernel"], [f"layers_{i}/{n}/kernel" for i in (0, 1) for n in ("q_proj", "v_proj")]),
    ("layers_1/q_proj", ["layers_1/q_proj/kernel"]),
    ("layers_0/*", ["layers_0/q_proj/kernel", "layers_0/v_proj/kernel"]),
    ("*[01]/v_proj", ["layers_0/v_proj/kernel", "layers_1/v_proj/kernel"]),
    (re.compile(r".*_1/[qv]_proj"), ["layers_1/q_proj/kernel", "layers_1/v_proj/kernel"]),
    (lambda path, x: x.shape == (16, 8), ["layers_0/v_proj/kernel", "layers_1/v_proj/kernel"]),
])  # fmt: skip
def test_patterns(targets, expected):
    assert list(lora.select(PARAMS, lora.LoRAConfig(rank=2, targets=targets))) == expected


def test_a_suffix_is_of_whole_names():
    assert not matches("proj", "a/q_proj/kernel") and not matches("q", "a/q_proj/kernel")


def test_exclude_and_rules():
    config = lora.LoRAConfig(
        rank=2,
        alpha=4,
        targets=["q_proj", "v_proj"],
        exclude="layers_0/v_proj",
        rules=[lora.Rule("layers_1/*", rank=4), lora.Rule("q_proj", alpha=8)],
    )
    targets = lora.select(PARAMS, config)
    assert {p: (t.rank, t.alpha, t.scale) for p, t in targets.lora.items()} == {
        "layers_0/q_proj/kernel": (2, 8, 4.0),
        "layers_1/q_proj/kernel": (4, 4, 1.0),  # the first rule that matches holds
        "layers_1/v_proj/kernel": (4, 4, 1.0),
    }
    assert (
        targets.parameters
        == 2 * 32 + 4 * 32 + 4 * 24
        == sum(t.parameters for t in targets.lora.values())
    )


def test_rank_stabilised_scale():
    config = lora.LoRAConfig(rank=16, alpha=8, targets="q_proj", rank_stabilized=True)
    assert lora.select(PARAMS, config)["layers_0/q_proj/kernel"].scale == 2.0


def test_boxes_and_frozen_dicts_are_transparent():
    boxed = jax.tree.map(lambda x: nn.Partitioned(x, ("a",) * x.ndim), PARAMS)
    config = lora.LoRAConfig(rank=2, targets="q_proj")
    expected = list(lora.select(PARAMS, config))
    assert list(lora.select(boxed, config)) == expected
    assert list(lora.select(freeze(PARAMS), config)) == expected


def test_the_table():
    text = str(
        lora.select(PARAMS, lora.LoRAConfig(rank=2, targets="v_proj", full="head", bias="all"))
    )
    both = r"layers_\{0,1\}/v_proj/kernel +2 +\(16, 8\) +\? +\(0\) +\(1\) +- +2 +16 +96"
    assert re.search(both, text)
    assert re.search(r"head/kernel +1 +\(16, 100\) +full", text)
    assert "layers_{0,1}/q_proj/bias" in text and "trained: 1,728 of 4,000" in text


def surveyed(**kwargs):
    model = llama.Llama(llama.Config(**kwargs))
    ids = jnp.zeros((2, 8), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    return params, lora.survey(model.apply, {"params": params}, ids)


@pytest.mark.parametrize("scan", [False, True])
def test_all_linear_leaves_out_embedding_and_head(scan):
    params, survey = surveyed(scan=scan)
    targets = lora.select(params, lora.LoRAConfig(rank=2), survey)
    assert {p.split("/")[-2] for p in targets} == set(llama.ALL)
    assert len(targets) == (7 if scan else 14)
    assert survey["head/kernel"].head and survey["embed/embedding"].kind == "embedding"
    kernel = targets["layers/q/kernel" if scan else "layer_0/q/kernel"]
    assert kernel.geometry.batch_axes == ((0,) if scan else ())


def test_heads():
    """Logits have a head; hidden states, which residual connections reach, have none."""
    ids = jnp.zeros((2, 8), jnp.int32)
    model = llama.Llama(llama.Config())
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    heads = lambda s: [p for p, leaf in s.leaves.items() if leaf.head]
    loss = lambda p, ids: llama.loss(model.apply({"params": p}, ids), ids)
    assert heads(lora.survey(loss, params, ids)) == ["head/kernel"]
    block = llama.Block(llama.Config())
    x = jnp.zeros((2, 8, 128))
    params = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
    assert heads(lora.survey(lambda p, x: block.apply({"params": p}, x)[0], params, x)) == []


def test_two_heads_and_a_cache():
    def fn(p, x):
        h = jnp.tanh(x @ p["body"])
        cache = h @ p["k"]
        h = jnp.tanh(x + cache @ p["o"])
        return h @ p["policy"], h @ p["value"], cache

    x = jnp.ones((2, 8))
    square, out = jnp.ones((8, 8)), jnp.ones((8, 3))
    params = {"body": square, "k": square, "o": square, "policy": out, "value": out}
    survey = lora.survey(fn, params, x)
    assert [p for p, leaf in survey.leaves.items() if leaf.head] == ["policy", "value"]


@pytest.mark.parametrize("loop", ["while", "scan"])
def test_what_a_loop_reads_is_no_head(loop):
    def fn(p, x):
        step = lambda i, h: h + jnp.tanh(h @ p["body"])
        n = 3 if loop == "scan" else jnp.int32(x[0, 0])
        return jax.lax.fori_loop(0, n, step, x @ p["first"])

    w = jnp.ones((8, 8))
    survey = lora.survey(fn, {"body": w, "first": w}, jnp.ones((2, 8)))
    assert list(lora.select({"body": w, "first": w}, lora.LoRAConfig(rank=2), survey)) == [
        "body",
        "first",
    ]


def stack(layers, **kernels):
    """A scanned stack, by shapes alone: 2-D kernels under one more axis."""
    return shapes({name: {"kernel": (layers, *shape)} for name, shape in kernels.items()})


def count(params, targets, rank):
    rules = [lora.Rule("*", in_axes=(1,), out_axes=(2,), batch_axes=(0,))]
    config = lora.LoRAConfig(rank=rank, targets=targets, rules=rules)
    return lora.select(params, config).parameters


def llama_shapes(layers, d, ff, kv=None):
    kv = kv or d
    return stack(
        layers, q=(d, d), k=(d, kv), v=(d, kv), o=(d, d), gate=(d, ff), up=(d, ff), down=(ff, d)
    )


SQUARE = lambda layers, d: stack(layers, q=(d, d), k=(d, d), v=(d, d), o=(d, d))
PUBLISHED = [
    # model, targets, rank, parameters (arXiv:2106.09685 tables 2 and 4, arXiv:2305.14314, model cards)
    (SQUARE(12, 768), "qv", 8, 294_912),  # RoBERTa-base
    (SQUARE(24, 1024), "qv", 8, 786_432),  # RoBERTa-large
    *[(SQUARE(96, 12288), "qv", r, int(n * 1e6)) for r, n in
      [(1, 4.718592), (2, 9.437184), (4, 18.874368), (8, 37.748736), (64, 301.989888)]],  # GPT-3
    (SQUARE(32, 4096), "qv", 8, 4_194_304),  # LLaMA-7B
    (SQUARE(32, 4096), "qkvo", 16, 16_777_216),
    (llama_shapes(32, 4096, 11008), llama.ALL, 64, 159_907_840),
    (llama_shapes(40, 5120, 13824), llama.ALL, 64, 250_347_520),  # 13B
    (llama_shapes(60, 6656, 17920), llama.ALL, 64, 487_587_840),  # 33B
    (llama_shapes(80, 8192, 22016), llama.ALL, 64, 799_539_200),  # 65B
    (llama_shapes(28, 3072, 8192, 1024), "qv", 32, 9_175_040),  # Llama-3.2-3B
    (llama_shapes(32, 4096, 14336, 1024), ("gate", "up", "down"), 1, 1_769_472),  # Llama-3.1-8B
    (llama_shapes(32, 4096, 14336, 1024), "qkvo", 1, 851_968),
]  # fmt: skip


@pytest.mark.parametrize(("params", "targets", "rank", "parameters"), PUBLISHED)
def test_published_parameter_counts(params, targets, rank, parameters):
    assert count(params, list(targets), rank) == parameters
    config = lora.LoRAConfig(
        rank=rank,
        targets=list(targets),
        rules=[lora.Rule("*", in_axes=(1,), out_axes=(2,), batch_axes=(0,))],
    )
    adapters = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, config), params)
    assert sum(x.size for x in jax.tree.leaves(adapters)) == parameters


@pytest.mark.parametrize("scan", [True, False])
def test_gpt3(scan):
    """175B parameters as shapes: survey, targets, init and table."""
    config = llama.Config(
        vocab=50257, width=12288, hidden=4 * 12288, heads=96, layers=96, scan=scan
    )
    model, ids = llama.Llama(config), jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    survey = lora.survey(model.apply, {"params": params}, ids) if scan else None
    targets = lora.select(params, lora.LoRAConfig(rank=8, targets=["q", "v"]), survey)
    adapters = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, targets), params)
    text = str(targets)
    assert sum(x.size for x in jax.tree.leaves(adapters)) == targets.parameters == 37_748_736
    assert "37,748,736" in text


def test_survey_of_packed_kernel_with_a_rule():
    """One kernel that packs keys and values: a rule gives each its own A and B."""
    params = {"kv_einsum": {"w": jnp.ones((2, 4, 16, 8))}}
    fn = lambda p, x: jnp.einsum("btd,ckdh->cbtkh", x, p["kv_einsum"]["w"])
    survey = lora.survey(fn, params, jnp.ones((3, 5, 16)))
    plain = lora.select(params, lora.LoRAConfig(rank=2, targets="kv_einsum"), survey)
    geometry = lora.Geometry(in_axes=(2,), out_axes=(0, 1, 3))
    assert plain["kv_einsum/w"].geometry == geometry
    ruled = lora.select(
        params,
        lora.LoRAConfig(
            rank=2, targets="kv_einsum", rules=[lora.Rule("kv_einsum/w", batch_axes=(0,))]
        ),
        survey,
    )
    assert ruled["kv_einsum/w"].geometry == lora.Geometry((2,), (1, 3), (0,))
    assert ruled.parameters == 2 * 2 * (16 + 32)


def test_survey_of_opposite_layouts():
    fn = lambda p, x: jnp.einsum("bd,dk->bk", x, p["w"])
    other = lambda p, x: jnp.einsum("bd,kd->bk", x, p["w"])
    x, w = jnp.ones((2, 4)), {"w": jnp.ones((4, 4))}
    assert lora.survey(fn, w, x)["w"].geometry == lora.Geometry((0,), (1,))
    assert lora.survey(other, w, x)["w"].geometry == lora.Geometry((1,), (0,))


def test_survey_table_names_every_use():
    def fn(p, ids):
        x = p["table"][ids]
        return (x + p["bias"]) @ p["table"].T

    text = str(
        lora.survey(
            fn,
            {"table": jnp.ones((10, 4)), "bias": jnp.ones(4), "n": jnp.arange(3)},
            jnp.array([1, 2]),
        )
    )
    assert re.search(r"table +\(10, 4\) +embedding.* +gather, dot_general +\(0\) +\(1\)", text)
    assert re.search(r"bias +\(4\) +other", text) and re.search(r"n +\(3\) +unused", text)


def test_a_name_that_stands_in_the_model_and_in_its_blocks():
    """The survey of {"params": ...} is that of the parameters, leaf by leaf, whatever is nested."""
    norm, block = {"scale": jnp.ones(4)}, {"kernel": jnp.ones((4, 4))}
    params = {"norm": norm, "dense": block, "layer": {"norm": norm, "dense": block}}
    params["out"] = jnp.ones((4, 2))

    def apply(variables, x):
        p = variables["params"]
        for part in (p, p["layer"]):
            x = jnp.tanh(x * part["norm"]["scale"] @ part["dense"]["kernel"])
        return x @ p["out"]

    survey = lora.survey(apply, {"params": params}, jnp.ones((2, 4)))
    targets = lora.select(params, lora.LoRAConfig(rank=2, targets="all-linear"), survey)
    assert set(targets) == {"dense/kernel", "layer/dense/kernel"}


EYE = jnp.eye(8)
NOT_AS_IT_IS = {
    "exponential": lambda w, v, h: h @ jnp.exp(w),
    "times another": lambda w, v, h: h @ (w @ v),
    "masked": lambda w, v, h: h @ (w * (EYE + 1)),
    "solved": lambda w, v, h: jnp.linalg.solve(w + 9 * EYE, h.T).T,
    "conjugate gradients": lambda w, v, h: jax.scipy.sparse.linalg.cg(lambda u: u @ w, h)[0],
    "while": lambda w, v, h: jax.lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, h - c[1] @ w**2), (0, jnp.zeros_like(h))
    )[1],
}


@pytest.mark.parametrize("how", NOT_AS_IT_IS)
def test_all_linear_leaves_nothing_out_in_silence(how):
    def fn(p, x):
        h = NOT_AS_IT_IS[how](p["w"], p["v"], jnp.tanh(x @ p["first"]))
        return jnp.tanh(h) @ p["head"]

    params = {"first": EYE, "w": EYE, "v": EYE, "head": jnp.ones((8, 3))}
    survey = lora.survey(fn, params, jnp.ones((2, 8)))
    with fails(r"'w' \(8, 8\) is used by no contraction.* but enters one after that: exclude="):
        lora.select(params, lora.LoRAConfig(rank=2), survey)
    targets = lora.select(params, lora.LoRAConfig(rank=2, exclude="w"), survey)
    assert "w" not in targets and "first" in targets
    assert targets.left["head"] == "the output head" and "contracted after" in targets.left["w"]
    assert "left out: w, excluded" in str(targets)


def test_what_meets_a_batch_axis_alone_is_a_scale():
    fn = lambda p, x: jnp.tanh(jnp.einsum("td,d->td", x @ p["w"], p["scale"])) @ p["head"]
    params = {"w": EYE, "scale": jnp.ones(8), "head": EYE}
    survey = lora.survey(fn, params, jnp.ones((2, 8)))
    assert survey["scale"].kind == "other"
    assert list(lora.select(params, lora.LoRAConfig(rank=2), survey)) == ["w"]


def test_experts_applied_to_all_tokens_have_one_rule():
    def fn(p, x):
        h = jnp.tanh(jnp.einsum("btd,edf->btef", x, p["w1"]))
        return jnp.tanh(jnp.einsum("btef,efd->bted", h, p["w2"]).sum(2)) @ p["head"]

    shape = {"w1": (3, 8, 5), "w2": (3, 5, 8), "head": (8, 2)}
    keys = jax.random.split(jax.random.key(0), 3)
    params = {n: rand.normal(k, s) for k, (n, s) in zip(keys, shape.items())}
    x = rand.normal(jax.random.key(1), (2, 4, 8))
    targets = lora.select(params, lora.LoRAConfig(rank=2), lora.survey(fn, params, x))
    assert {p: t.geometry.batch_axes for p, t in targets.lora.items()} == {"w1": (0,), "w2": (0,)}
    adapters = noisy(lora.init(jax.random.key(0), params, targets))
    assert_close(
        lora.adapt(fn)(lora.bind(params, adapters), x), fn(lora.merge(params, adapters), x)
    )


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_scale_behind_a_stack_makes_no_experts(axis):
    """Layers along any axis, also of kernels that are stored (out, in), and norms by einsum."""
    scale = lambda x, s: jnp.einsum("td,d->td", x, s)

    def layer(x, p):
        h = jnp.tanh(scale(x, p["pre"]) @ p["wi"])
        return x + scale(jnp.einsum("tf,df->td", h, p["wo"]), p["post"]), None

    def fn(p, x):
        layers = {n: jnp.moveaxis(w, min(axis, w.ndim - 1), 0) for n, w in p["layers"].items()}
        return scale(jax.lax.scan(layer, x, layers)[0], p["norm"]) @ p["head"]

    key = jax.random.key(0)
    shapes = {"pre": (8,), "wi": (8, 5), "wo": (8, 5), "post": (8,)}
    stacked = lambda s: (*s[: min(axis, len(s))], 3, *s[axis:])
    layers = {n: rand.normal(key, stacked(s)) / 3 for n, s in shapes.items()}
    params = {"layers": layers, "norm": jnp.ones(8), "head": rand.normal(key, (8, 2))}
    x = rand.normal(key, (4, 8))
    targets = lora.select(params, lora.LoRAConfig(rank=2), lora.survey(fn, params, x))
    rest = [d for d in range(3) if d != axis]
    found = {p: (t.geometry.batch_axes, t.geometry.in_axes) for p, t in targets.lora.items()}
    assert found == {
        "layers/wi": ((axis,), (rest[0],)),
        "layers/wo": ((axis,), (rest[1],)),
    }
    adapters = noisy(lora.init(key, params, targets))
    merged = lora.merge(params, adapters)
    assert_close(lora.adapt(fn)(lora.bind(params, adapters), x), fn(merged, x), factor=64)


INTEGERS = st.sampled_from([int, np.int8, np.int64, np.uint16])
CONFIGS = st.fixed_dictionaries({
    "rank": st.builds(lambda kind, n: kind(n), INTEGERS, st.integers(1, 4)),
    "alpha": st.sampled_from([1, 2.5, np.float32(0.5), np.array(2.0), jnp.float32(2)]),
    "targets": st.sampled_from(["q", ["q"], ("q", re.compile("v|o")), {"q", "v"}]),
    "rules": st.lists(st.builds(lora.Rule, st.just("q"), rank=st.integers(1, 4)), max_size=2),
    "rows": st.sampled_from([{}, {"e": [1, 2]}, {"e": np.arange(3)}, {"e": range(2)}, {re.compile("e|f"): [1]}]),
    "dtype": st.sampled_from([jnp.float32, "bfloat16", np.dtype("float16")]),
})  # fmt: skip


@given(CONFIGS)
@examples(50)
def test_configurations_are_values(settings):
    config = lora.LoRAConfig(**settings)
    again = lora.LoRAConfig.from_json(config.to_json())
    assert again == config == lora.LoRAConfig(**settings) and hash(again) == hash(config)
    assert type(config.rank) is int


def test_what_can_be_read_once_is_read_once():
    of = lambda rules, targets: lora.LoRAConfig(rules=rules, targets=targets)
    rules, targets = [lora.Rule("v"), lora.Rule("q")], ["q", "v"]
    assert of(iter(rules), (t for t in targets)) == of(rules, targets)
    assert of(dict(enumerate(rules)).values(), dict.fromkeys(targets).keys()) == of(rules, targets)


ODD = [
    None, True, np.True_, 0, -1, 4.0, 10**400, float("nan"), 1j, "", "8", b"q", [4], {4}, {"q": 1},
    object(), re.compile(b"q"), nn.Dense, np.array(4.0), np.arange(2), jnp.ones(2), jnp.int32(4),
    jax.ShapeDtypeStruct((), jnp.float32),
]  # fmt: skip


@pytest.mark.parametrize("cls, fixed", [(lora.LoRAConfig, {}), (lora.Rule, {"pattern": "q"})])
def test_any_value_is_taken_or_refused(cls, fixed):
    """Each field by odd values: a value that can be hashed and written, or an error with a call
    that works."""
    tried = refused = 0
    for field in dataclasses.fields(cls):
        for value in ODD:
            try:
                made = cls(**fixed | {field.name: value})
                config = lora.LoRAConfig(rules=[made]) if cls is lora.Rule else made
                assert lora.LoRAConfig.from_json(config.to_json()) == config
                assert hash(config) == hash(copy.deepcopy(config))
            except lora.LoRAError as e:
                refused += 1
                *_, call = str(e).splitlines()
                if call.startswith("lora.") and "..." not in call:
                    eval(call, {"lora": lora})
            tried += 1
    assert refused > tried / 2


@pytest.mark.parametrize("keys, value", [
    ("lora q/kernel rank", "x"), ("lora q/kernel rank", -1), ("lora q/kernel shape", [8, None]),
    ("lora q/kernel geometry in_axes", [5]), ("lora q/kernel geometry in_axes", 5),
    ("lora q/kernel scale", "nan"), ("lora q/kernel dropout", 7), ("lora q/kernel embedding", 1),
    ("full", [1]), ("full q/bias", None), ("rows", 3), ("rows e", 3), ("total", "a"), ("left", [1]),
    ("left q", 3), ("config rank", 0), ("config rows", [1]),
])  # fmt: skip
def test_targets_of_a_damaged_file(keys, value):
    params = {"q": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}, "e": jnp.ones((9, 8))}
    config = lora.LoRAConfig(rank=2, targets="q", full="bias", rows={"e": [1, 2]})
    fields = json.loads(lora.select(params, config).to_json())
    *inner, last = keys.split()
    functools.reduce(operator.getitem, inner, fields)[last] = value
    with fails("expected what Targets.to_json|invalid configuration"):
        lora.Targets.from_json(fields)


def test_check_of_what_is_trained_in_full_and_by_rows():
    params = {"q": jnp.ones((8, 8)), "b": jnp.ones(8), "e": jnp.ones((9, 8))}
    of = lambda index: lora.LoRAConfig(rank=2, targets="q", full="b", rows={"e": index})
    targets = lora.select(params, of([1, 2]))
    adapters = lora.init(jax.random.key(0), params, targets)
    targets.check(adapters)
    with fails(
        r"'e': expected Rows of \(9, 8\), rows \(1, 2\), found Rows of \(9, 8\), rows \(1, 3\)"
    ):
        targets.check(lora.init(jax.random.key(0), params, of([1, 3])))
    with fails(r"'b': expected Full of \(8,\), found Full of \(3,\)"):
        targets.check({**adapters, "b": lora.Full(jnp.ones(3))})


def test_targets_are_values_and_static_arguments():
    config = lora.LoRAConfig(rank=2, targets=["q_proj"], full="head")
    one, two = lora.select(PARAMS, config), lora.select(PARAMS, config)
    assert one == two and hash(one) == hash(two)
    assert lora.Targets.from_json(one.to_json()) == one
    traced = []
    f = jax.jit(lambda x, t: traced.append(t) or x * t.parameters, static_argnums=1)
    assert f(1, one) == f(1, two) and len(traced) == 1


@pytest.mark.parametrize("text", ["", "{}", "[", "[" * 100_000, "3", '{"a": 1}', '{"rules": [{}]}'])
def test_what_is_not_theirs_is_refused(text):
    with fails("expected what Targets.to_json"):
        lora.Targets.from_json(text)
    if text != "{}":
        with fails("expected what LoRAConfig.to_json|invalid"):
            lora.LoRAConfig.from_json(text)


def test_a_function_is_not_written():
    with fails("targets holds a function"):
        lora.LoRAConfig(targets=lambda path, x: True).to_json()
