"""Models that others wrote, wrapped unedited."""

import functools
import importlib.util
import itertools
import warnings

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from common import assert_close, noisy
from flax import nnx
from zoo import (
    IDS,
    IMAGE,
    WIDTH,
    ConvNet,
    Experts,
    K,
    Latents,
    NnxTransformer,
    Transformer,
    X,
    normal,
)

import lora_jax as lora


def paths(*patterns, leaf="kernel"):
    """paths("h/#/q,k") = ["h/0/q/kernel", "h/0/k/kernel", "h/1/q/kernel", "h/1/k/kernel"]"""
    return [
        "/".join((*filter(None, parts), leaf)).replace("#", str(i))
        for pattern in patterns
        for i in range(2 if "#" in pattern else 1)
        for parts in itertools.product(*(p.split(",") for p in pattern.split("/")))
    ]


def loss(outputs):
    return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(outputs))


def check(fn, params, *args, expect, **config):
    """Adapts a plain function and asserts all that is promised of it.

    The leaves are exactly `expect`; each is low-rank; at first nothing changes, to the bit; outputs
    and gradients are those of the plain function on merged weights; and every factor matters.
    """
    config = lora.LoRAConfig(rank=2, alpha=6, **config)
    targets = lora.select(params, config, lora.survey(fn, params, *args))
    assert sorted(targets) == sorted(expect)
    adapters = lora.init(jax.random.key(0), params, targets)
    bound = lora.bind(params, adapters)
    coverage = lora.coverage(fn, bound, *args)
    assert sorted(coverage.low_rank) == sorted(expect), str(coverage)
    adapt = lora.adapt(fn)
    jax.tree.map(np.testing.assert_array_equal, adapt(bound, *args), fn(params, *args))

    adapters = noisy(adapters)
    ours = lambda ad: (loss(out := adapt(lora.bind(params, ad), *args)), out)
    dense = lambda ad: (loss(out := fn(lora.merge(params, ad), *args)), out)
    (_, got), got_grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(adapters)
    (_, want), want_grads = jax.jit(jax.value_and_grad(dense, has_aux=True))(adapters)
    assert_close(got, want)
    assert_close(got_grads, want_grads, factor=256)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(got_grads))
    return targets, adapters


def apply_of(model):
    return lambda p, *args: model.apply({"params": p}, *args)


# ---------------------------------------------------------------- transformers
@pytest.fixture
def their_rules():
    """transformers promotes integers and booleans, and warns that its Flax models are the last."""
    with warnings.catch_warnings(action="ignore"), jax.numpy_dtype_promotion("standard"):
        yield


def hugging_face(test):
    missing = importlib.util.find_spec("transformers") is None
    skip = pytest.mark.skipif(missing, reason="transformers 4.57 runs on Python 3.11's JAX alone")
    return skip(pytest.mark.usefixtures("their_rules")(test))


@functools.cache
def from_config(name):
    """(model, random parameters), as after `from_pretrained(..., _do_init=False)`."""
    import transformers

    config, settings, _ = zoo.HUGGING_FACE[name]
    config = getattr(transformers, config)(**settings)
    options = {"add_pooling_layer": False} if name == "FlaxBertModel" else {}
    model = getattr(transformers, name)(config, _do_init=False, **options)
    init = lambda key: noisy(model.init_weights(key, model.input_shape), scale=0.05)
    return model, jax.jit(init)(K)


# One with a fused projection, one with rotary positions, a decoder with an encoder, images.
FIRST = {
    "FlaxGPT2LMHeadModel",
    "FlaxLlamaForCausalLM",
    "FlaxBartForConditionalGeneration",
    "FlaxViTForImageClassification",
}


@hugging_face
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FIRST else pytest.mark.slow) for n in zoo.HUGGING_FACE],
)
def test_hugging_face(name):
    model, params = from_config(name)
    inputs = normal(0, 2, 3, 8, 8) if "ViT" in name else IDS
    expect = paths(*zoo.HUGGING_FACE[name][2])
    check(lambda p, x: model(x, params=p)[0], params, inputs, expect=expect)


@hugging_face
def test_gpt2_conv1d_is_stored_out_by_in():
    model, params = from_config("FlaxGPT2LMHeadModel")
    fn = lambda p, x: model(x, params=p).logits
    config = lora.LoRAConfig(rank=2, targets=["c_fc", "c_attn"])
    targets = lora.select(params, config, lora.survey(fn, params, IDS))
    assert {t.shape for t in targets.lora.values()} == {(64, 16), (48, 16)}
    assert {t.geometry for t in targets.lora.values()} == {lora.Geometry((1,), (0,))}
    # the embedding, which is the head as well, where it is asked for by name
    expect = ["transformer/wte/embedding", "transformer/h/1/attn/c_attn/kernel"]
    check(fn, params, IDS, targets=["wte", "1/attn/c_attn"], expect=expect)


@pytest.mark.slow
@hugging_face
def test_hugging_face_module_and_generate():
    """The Linen module below the class, and the whole loop of `generate`."""
    model, params = from_config("FlaxLlamaForCausalLM")
    position, mask = jnp.broadcast_to(jnp.arange(5), (2, 5)), jnp.ones((2, 5))
    apply = lambda p, x: model.module.apply({"params": p}, x, mask, position).logits
    _, adapters = check(apply, params, IDS, expect=paths(*zoo.DECODER))
    run = functools.partial(model.generate, max_new_tokens=4, do_sample=False, pad_token_id=0)
    generate = lambda p: run(IDS, params=p).sequences
    got = lora.adapt(generate)(lora.bind(params, adapters))
    np.testing.assert_array_equal(got, generate(lora.merge(params, adapters)))
    assert not np.array_equal(got, generate(params))


# ---------------------------------------------------------------- Linen
@pytest.mark.parametrize("name", zoo.LAYERS)
def test_linen_layer(name):
    layer, x, leaves = zoo.LAYERS[name]
    model = nn.Sequential([layer, nn.tanh, nn.Dense(3)])
    params = jax.jit(model.init)(K, x)["params"]
    check(apply_of(model), params, x, expect=paths(*("layers_0/" + p for p in leaves)))


def test_linen_boxes():
    """FrozenDict and nn.Partitioned are kept, and the path is that of the array inside."""
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", "model"))
    model = nn.Sequential([nn.Dense(6, kernel_init=init), nn.Dense(3)])
    params = flax.core.freeze(model.init(K, X)["params"])
    _, adapters = check(apply_of(model), params, X, expect=["layers_0/kernel"])
    for tree in (params, lora.bind(params, adapters), lora.merge(params, adapters)):
        assert isinstance(tree, flax.core.FrozenDict)
        assert isinstance(tree["layers_0"]["kernel"], nn.Partitioned)
        assert tree["layers_0"]["kernel"].names == ("data", "model")


BLOCK = ("attn/query,key,value,out", "up,down")


def test_linen_scan_and_remat():
    """Stacked kernels have stacked factors, and equal the unrolled model of the same weights."""
    loop = Transformer()
    unrolled = jax.jit(loop.init)(K, IDS)["params"]
    layers = [unrolled.pop(f"layer_{i}") for i in range(2)]
    params = {**unrolled, "layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}
    fn = apply_of(Transformer(scanned=True))
    targets, adapters = check(fn, params, IDS, expect=paths(*("layers/" + p for p in BLOCK)))
    query = adapters["layers"]["attn"]["query"]["kernel"]
    assert targets["layers/attn/query/kernel"].geometry == lora.Geometry((1,), (2, 3), (0,))
    assert (query.a.shape, query.b.shape) == ((2, 16, 2), (2, 2, 2, 8))

    def of_layer(i, node):
        inner, outer = ([d - 1 for d in axes] for axes in
                        (node.geometry.in_axes, node.geometry.out_axes))  # fmt: skip
        geometry = lora.Geometry(tuple(inner), tuple(outer))
        return lora.LoRA(node.a[i], node.b[i], node.scale, geometry)

    is_node = lambda x: isinstance(x, lora.LoRA)
    single = {}
    for i, layer in enumerate(layers):
        unrolled[f"layer_{i}"] = layer
        slice_ = functools.partial(of_layer, i)
        single[f"layer_{i}"] = jax.tree.map(slice_, adapters["layers"], is_leaf=is_node)
    got = jax.jit(lora.adapt(apply_of(loop)))(lora.bind(unrolled, single), IDS)
    assert_close(got, jax.jit(lora.adapt(fn))(lora.bind(params, adapters), IDS))


def test_linen_tied_head():
    """Embed.attend: one leaf is looked up and contracted, and adapted at both, if asked for."""
    model = Transformer()
    params = jax.jit(model.init)(K, IDS)["params"]
    config = dict(targets=["embed", "layer_0/*"], expect=["embed/embedding"])
    config["expect"] += paths(*("layer_0/" + p for p in BLOCK))
    check(apply_of(model), params, IDS, **config)
    survey = lora.survey(apply_of(model), params, IDS)
    linear = lora.select(params, lora.LoRAConfig(rank=2), survey)
    assert sorted(linear) == sorted(paths(*("layer_#/" + p for p in BLOCK)))


@pytest.mark.parametrize("shared, rules, geometry", [
    (False, (), lora.Geometry((1,), (2,), (0,))),
    (True, (), lora.Geometry((1,), (0, 2))),  # one input for all: one product, and one A
    (True, [lora.Rule("experts", batch_axes=(0,))], lora.Geometry((1,), (2,), (0,))),
])  # fmt: skip
def test_linen_vmapped_experts(shared, rules, geometry):
    model = Experts(shared)
    params = model.init(K, X)["params"]
    targets, _ = check(apply_of(model), params, X, expect=["experts/kernel"], rules=rules)
    assert targets["experts/kernel"].geometry == geometry


@pytest.mark.parametrize("options", [
    {"mutable": ["batch_stats"]}, {"train": False}, {"train": False, "method": "features"},
    {"train": False, "method": ConvNet.features},
])  # fmt: skip
def test_linen_apply_options(options):
    """mutable=, rngs=, method= and Python flags go through `lora.adapt(model.apply)` as they are."""
    model = ConvNet()
    variables = jax.jit(model.init)({"params": K, "dropout": K}, IMAGE)
    params, rngs = variables["params"], {"dropout": jax.random.key(3)}
    call = lambda apply, p: apply({**variables, "params": p}, IMAGE, rngs=rngs, **options)
    leaves = paths("conv,depthwise,pointwise") + paths("head") * ("method" not in options)
    survey = lora.survey(lambda p: call(model.apply, p), params)
    config = lora.LoRAConfig(rank=1, targets=leaves)
    adapters = noisy(lora.init(K, params, config, survey))
    got = call(lora.adapt(model.apply), lora.bind(params, adapters))
    assert_close(got, call(model.apply, lora.merge(params, adapters)))
    assert ("mutable" in options) == (isinstance(got, tuple) and "batch_stats" in got[1])


def test_linen_learned_queries():
    model = Latents()
    params = model.init(K, X)["params"]
    # Compiled whole: an operation at a time, JAX 0.10.0 rounds it otherwise than adapted.
    fn = jax.jit(apply_of(model))
    check(fn, params, X, expect=paths("cross/query,key,value,out"))


def test_linen_concatenated_kernels():
    """OptimizedLSTMCell concatenates its eight kernels into two, in each step of a scan."""
    model = nn.Sequential([nn.RNN(nn.OptimizedLSTMCell(6)), nn.Dense(3)])
    params = jax.jit(model.init)(K, X)["params"]
    gates = paths("layers_0/cell/if,ii,ig,io,hf,hi,hg,ho")
    check(apply_of(model), params, X, expect=gates, targets="*/cell/*")


# ---------------------------------------------------------------- NNX
NNX_BLOCK = ("attn/query,key,value,out", "conv,down")


@pytest.mark.parametrize("form", zoo.NNX_FORMS)
def test_nnx(form):
    fn, params = form()
    check(fn, params, IDS, expect=paths(*("layers/#/" + p for p in NNX_BLOCK)))


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.remat, nnx.jit], ids=["plain", "remat", "jit"])
def test_nnx_stacked(wrap):
    """Layers that nnx.vmap made and nnx.scan runs, each in nnx.remat or nnx.jit."""
    graph, params, rest = nnx.split(NnxTransformer(nnx.Rngs(0), True, wrap), nnx.Param, ...)
    fn = lambda p, x, rest: nnx.merge(graph, p, rest)(x)
    expect = paths(*("layers/" + p for p in NNX_BLOCK))
    targets, _ = check(fn, params, IDS, rest, expect=expect)
    assert targets["layers/attn/out/kernel"].geometry == lora.Geometry((1, 2), (3,), (0,))


# ---------------------------------------------------------------- bare arrays
def arrays(shapes):
    flat, treedef = jax.tree.flatten(shapes, is_leaf=lambda s: isinstance(s, tuple))
    return jax.tree.unflatten(treedef, [normal(10 + i, *s) for i, s in enumerate(flat)])


@pytest.mark.parametrize("name", zoo.BARE)
def test_bare_arrays(name):
    fn, shapes, rules, geometries = zoo.BARE[name]
    params = arrays(shapes)
    leaves = [jax.tree_util.keystr(keys, simple=True, separator="/")
              for keys, _ in jax.tree_util.tree_leaves_with_path(params)]  # fmt: skip
    targets, _ = check(fn, params, X, expect=leaves, targets=leaves, rules=rules)
    assert [t.geometry for t in targets.lora.values()] == [lora.Geometry(*g) for g in geometries]


@pytest.mark.parametrize("name", zoo.DERIVED)
def test_derived_weights_are_refused(name):
    """A survey says so; without one, strict mode names leaf, primitive and line."""
    fn, surveyed, primitive = zoo.DERIVED[name]
    params = arrays({"g": (8,), "v": (16, 8), "w": (16, 8)})
    config = lora.LoRAConfig(rank=2, targets=["w", "v"] if "product" in name else "w")
    use = rf"'w' \(16, 8\) is used by no contraction, convolution or look-up \({surveyed}\)"
    with pytest.raises(lora.LoRAError, match=use):
        lora.select(params, config, lora.survey(fn, params, X))
    adapters = noisy(lora.init(K, params, config))
    bound = lora.bind(params, adapters)
    where = rf"'w' \(16, 8\) is materialised by `{primitive}` at (the outputs|.*zoo.py)"
    with pytest.raises(lora.LoRAError, match=where):
        lora.adapt(fn)(bound, X)
    assert_close(lora.adapt(fn, strict=False)(bound, X), fn(lora.merge(params, adapters), X))


@pytest.mark.parametrize("permute", [lambda w, i: w[:, i], lambda w, i: w[i]])
def test_a_permuted_kernel_stays_low_rank(permute):
    order = jax.random.permutation(K, WIDTH)
    fn = lambda p, x: x @ permute(p["w"], order)
    params = arrays({"w": (WIDTH, WIDTH)})
    adapters = noisy(lora.init(K, params, lora.LoRAConfig(rank=2, targets="w")))
    bound = lora.bind(params, adapters)
    assert_close(lora.adapt(fn)(bound, X), fn(lora.merge(params, adapters), X))
    assert lora.coverage(fn, bound, X).materialised == ()


def test_dead_code_is_unused():
    fn = lambda p, x: (x @ p["dead"], x @ p["w"])[1]
    params = arrays({"dead": (16, 8), "w": (16, 8)})
    config = lora.LoRAConfig(rank=2, targets=["dead", "w"])
    with pytest.raises(lora.LoRAError, match=r"'dead' .* is never used"):
        lora.adapt(fn)(lora.bind(params, lora.init(K, params, config)), X)
