"""Bases of transformers' torch models, on Flax's: the values, their outputs, and the way back."""

import json
import re
import shutil
import tracemalloc

import base_models as models
import golden_models as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from base_models import BASES, Config
from common import assert_close, fails, noisy
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from models import bert
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax._core.paths import flatten, nest

KEY = jax.random.key(0)
NAMES = {"gpt2": {"rename": models.GPT2_NAMES}, "vit": {"rename": models.VIT_NAMES},
         "bert": {"rename": bert.NAMES, "ignore": bert.UNUSED}}  # fmt: skip
slow = lambda *case: pytest.param(*case, marks=pytest.mark.slow)
CASES = [
    ("llama_tied", models.Llama(Config(tied=True, scan=True))),
    slow("llama_tied", models.Llama(Config(scan=True))),  # the head is filled as well
    slow("llama_untied", models.Llama(Config(bias=True))),
    ("llama_untied", models.Llama(Config(bias=True, scan=True, kernels=True))),
    ("llama_bf16", models.Llama(Config(kernels=True))),
    slow("llama_fp16", models.Llama(Config(tied=True))),
    slow("mixtral", models.Llama(Config(experts="mixtral"))),
    ("mixtral", models.Llama(Config(experts="mixtral", scan=True))),
    slow("qwen3_moe", models.Llama(Config(experts="qwen", scan=True))),
    ("gpt2", models.GPT2()),
    slow("gpt2", models.GPT2(scan=True)),
    slow("vit", models.ViT()),
    ("vit", models.ViT(scan=True)),
    ("bert", models.Bert()),
]


def surveyed(name, model):
    """(shapes, survey, input, what torch gives for it) of a Linen model."""
    x, want = models.inputs(name)
    shapes = jax.eval_shape(model.init, KEY, x)["params"]
    return shapes, lora.survey(model.apply, {"params": shapes}, x), x, want


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("name, model", CASES)
def test_outputs_are_torch_s_and_the_files_come_back(tmp_path, name, model):
    shapes, survey, x, want = surveyed(name, model)
    params = lora.peft.load_base(BASES / name, shapes, survey, **NAMES.get(name, {}))
    assert_close(jax.jit(model.apply)({"params": params}, x), want)
    lora.peft.save_base(tmp_path / "new", params, survey, like=BASES / name, **NAMES.get(name, {}))
    assert files(tmp_path / "new") == files(BASES / name)


@pytest.mark.parametrize("name, tied", [slow("llama_tied", True), ("llama_untied", False)])
def test_nnx(tmp_path, name, tied):
    x, want = models.inputs(name)
    make = lambda: models.NNXLlama(tied, not tied, rngs=nnx.Rngs(0))
    shapes, call = nnx.eval_shape(make), lambda model, x: model(x)
    survey = lora.survey(call, shapes, x)
    model = lora.peft.load_base(BASES / name, shapes, survey)
    assert isinstance(model, models.NNXLlama)
    assert_close(model(x), want)
    lora.peft.save_base(tmp_path / "new", model, survey, like=BASES / name)
    assert files(tmp_path / "new") == files(BASES / name)


# Fused, split: by a mapping, which names what has other names alone


def test_fused_kernels():
    """q, k and v of torch are parts of a kernel, scanned or not."""
    x, want = models.inputs("llama_bf16")
    stored = load_file(BASES / "llama_bf16" / "model.safetensors")
    for scanned in (False, True):
        flat = {}
        for key, value in stored.items():
            *parts, _ = key.split(".")
            kind = (
                "embedding" if "embed_tokens" in key else "kernel" if value.ndim == 2 else "scale"
            )
            flat["/".join([*parts, kind])] = value.T if kind == "kernel" else value
        flat = golden._fused(flat)
        at, parts = "model/layers/{1}/self_attn/qkv/kernel[", ("0:16", "16:24", "24:32")
        if scanned:
            pairs = {k: (k, k.replace("/0/", "/1/")) for k in flat if "/0/" in k}
            both = {
                k.replace("/0/", "/"): np.stack([flat[i] for i in ks]) for k, ks in pairs.items()
            }
            flat = {k: v for k, v in flat.items() if "/layers/" not in k} | both
            at = "model/layers/self_attn/qkv/kernel[{1}, "
        shapes = nest({k: jax.ShapeDtypeStruct(v.shape, "float32") for k, v in flat.items()})
        mapping = {rf"model\.layers\.(\d+)\.self_attn\.{n}_proj": f"{at}:, {part}]"
                   for n, part in zip("qkv", parts)}  # fmt: skip
        survey = lora.survey(golden.llama, shapes, x)
        params = lora.peft.load_base(BASES / "llama_bf16", shapes, survey, mapping=mapping)
        assert_close(golden.llama(params, x), want)
        got = {k: np.asarray(v) for k, v in flatten(params).items()}
        assert all(np.array_equal(got[k], v.astype("f4")) for k, v in flat.items())


def test_split_kernels():
    """c_attn of torch is three leaves here; its square c_proj lies as the others' biases say."""
    stored = load_file(BASES / "gpt2" / "model.safetensors")
    at = r"transformer\.h\.(\d+)\.attn\.c_attn"
    leaves = lambda last: [f"transformer/h/{{1}}/attn/{n}/{last}" for n in "qkv"]
    mapping = {at: leaves("kernel"), at + r"\.bias": leaves("bias")}
    flat = {}
    for key, value in stored.items():
        *parts, last = key.split(".")
        last = {"weight": "scale" if value.ndim == 1 else "kernel"}.get(last, last)
        last = "embedding" if parts[-1] in ("wte", "wpe") else last
        if "c_attn" in parts:
            split = zip("qkv", np.split(value, 3, -1))
            flat |= {"/".join([*parts[:-1], n, last]): part for n, part in split}
        else:
            flat["/".join([*parts, last])] = value
    shapes = nest({k: jax.ShapeDtypeStruct(v.shape, "float32") for k, v in flat.items()})
    params = lora.peft.load_base(BASES / "gpt2", shapes, mapping=mapping)
    got = {k: np.asarray(v) for k, v in flatten(params).items()}
    assert got.keys() == flat.keys() and all(np.array_equal(got[k], flat[k]) for k in flat)
    both = {k: v for k, v in stored.items() if not k.endswith("wte.weight")}
    assert lora.peft.mapping(BASES / "gpt2", shapes, mapping=mapping).entries.keys() > both.keys()


def test_square_weights_of_two_kinds_are_asked_for(tmp_path):
    shapes = {"a.weight": (4, 4), "a.bias": (4,), "b.weight": (4, 8), "b.bias": (8,),
              "c.weight": (8, 4), "c.bias": (8,)}  # fmt: skip
    w = {k: np.random.default_rng(0).normal(size=s).astype("f4") for k, s in shapes.items()}
    save_file(w, tmp_path / "model.safetensors")
    params = nest({f"{k[0]}/{k[2:].replace('weight', 'kernel')}": jax.ShapeDtypeStruct(s, "float32")
                   for k, s in {**shapes, "c.weight": (4, 8)}.items()})  # fmt: skip
    with fails(r"'a.weight' \(4, 4\) is square.*conv1d=\['a'\]"):
        lora.peft.load_base(tmp_path, params)
    for conv1d, want in ((["a", "b"], w["a.weight"]), (["b"], w["a.weight"].T)):
        got = lora.peft.load_base(tmp_path, params, conv1d=conv1d)
        np.testing.assert_array_equal(got["a"]["kernel"], want)


# Types, places, codes


def test_types_and_shardings():
    """Each leaf is in its own type and where its sharding says; what it holds is the same."""
    shapes, survey, _, _ = surveyed("llama_untied", models.Llama(Config(bias=True, scan=True)))
    mesh = jax.make_mesh((2, 2), ("a", "b"))
    spec = lambda x: PartitionSpec(*(None, "a", "b")[: x.ndim]) if x.ndim > 1 else PartitionSpec()
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16", sharding=NamedSharding(mesh, spec(x))),
        shapes,
    )
    params = lora.peft.load_base(BASES / "llama_untied", like, survey)
    plain = lora.peft.load_base(BASES / "llama_untied", shapes, survey)
    for (path, x), want in zip(flatten(params).items(), flatten(plain).values()):
        assert x.sharding == flatten(like)[path].sharding, path
        np.testing.assert_array_equal(x, want.astype(jnp.bfloat16))
    half = lora.peft.load_base(BASES / "llama_untied", shapes, survey, dtype="float16")
    assert {x.dtype for x in jax.tree.leaves(half)} == {np.dtype("float16")}
    with fails("dtype='int8': expected a floating-point type"):
        lora.peft.load_base(BASES / "llama_untied", shapes, survey, dtype="int8")


def test_numbers_that_a_type_does_not_hold(tmp_path):
    save_file({"q.weight": np.full((3, 4), 7e4, "f4")}, tmp_path / "model.safetensors")
    params = {"q": {"kernel": jax.ShapeDtypeStruct((4, 3), "float16")}}
    with fails(r"'q/kernel' float16: 'q.weight' \(F32\) holds a number that float16 does not"):
        lora.peft.load_base(tmp_path, params)
    params = lora.peft.load_base(tmp_path, params, dtype="float32")
    save_file({"q.weight": np.zeros((3, 4), "f2")}, tmp_path / "model.safetensors")
    with fails("'q.weight'.*'q/kernel' holds NaN, infinity, or a number that float16 does not"):
        lora.peft.save_base(tmp_path / "new", params, like=tmp_path / "model.safetensors")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("double, placed", [(False, True), (True, False)])
def test_quantised_on_the_way(double, placed):
    """As `lora.quant.quantize` makes it of the whole tree."""
    model = models.Llama(Config(experts="mixtral", scan=True))
    shapes, survey, _, _ = surveyed("mixtral", model)
    plain = lora.peft.load_base(BASES / "mixtral", shapes, survey)
    if placed:
        mesh = jax.make_mesh((2,), ("a",))
        at = NamedSharding(mesh, PartitionSpec(None, "a"))
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at) if x.ndim > 1 else x,
            shapes,
        )
    how = {"targets": ["w1/kernel", "q_proj/kernel"], "format": "nf4", "double": double}
    got = lora.peft.load_base(BASES / "mixtral", shapes, survey, quantize=how)
    want = lora.quant.quantize(plain, survey=survey, **how)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    if placed:
        q = got["layers"]["self_attn"]["q_proj"]["kernel"]
        assert q.codes.sharding == NamedSharding(mesh, q.specs((None, "a"), mesh).codes)


def test_settings_of_quantise():
    shapes, survey, _, _ = surveyed("llama_tied", models.Llama(Config(tied=True)))
    load = lambda how: lora.peft.load_base(BASES / "llama_tied", shapes, survey, quantize=how)
    assert load("int8")["layers_0"]["mlp"]["up_proj"]["kernel"].format == "int8"
    with fails("'bits' is none of its settings: quantize={"):
        load({"bits": 4})
    with fails("format='nf5': expected one of"):
        load("nf5")


# What does not fit


def test_an_untied_base_on_a_tied_model(tmp_path):
    shapes, survey, x, want = surveyed("llama_bf16", models.Llama(Config(tied=True)))
    untied = "'lm_head.weight' differs from 'model.embed_tokens.weight'.*untied and the model tied"
    for known in (survey, None):
        with fails(untied):
            lora.peft.load_base(BASES / "llama_bf16", shapes, known)
    # a head that is stored beside the table, and the same, is one
    shutil.copytree(BASES / "llama_tied", tmp_path / "both")
    file = tmp_path / "both" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, file)
    _, _, x, want = surveyed("llama_tied", models.Llama(Config(tied=True)))
    for known in (survey, None):
        params = lora.peft.load_base(tmp_path / "both", shapes, known)
        assert_close(models.Llama(Config(tied=True)).apply({"params": params}, x), want)
        lora.peft.save_base(tmp_path / str(known is None), params, known, like=tmp_path / "both")
        assert files(tmp_path / str(known is None)) == files(tmp_path / "both")


def test_a_head_of_its_own_is_not_lost(tmp_path):
    """A tied folder stores no head."""
    shapes, survey, _, _ = surveyed("llama_tied", models.Llama())
    params = lora.peft.load_base(BASES / "llama_tied", shapes, survey)
    params["lm_head"]["kernel"] += 1
    with fails("'lm_head/kernel' differs from 'embed_tokens/embedding'.*tie_word_embeddings=False"):
        lora.peft.save_base(tmp_path / "new", params, survey, like=BASES / "llama_tied")


def test_what_is_left_on_either_side():
    """One error, with both."""
    shapes, survey, _, _ = surveyed("llama_untied", models.Llama(Config(scan=True)))
    with fails(r"(?s)do not fit each other.*q_proj.bias' \(of shape \(16,\)\).*ignore=\[r'model"):
        lora.peft.load_base(BASES / "llama_untied", shapes, survey)
    lora.peft.load_base(BASES / "llama_untied", shapes, survey, ignore=[r".*\.bias"])
    shapes, survey, _, _ = surveyed("llama_bf16", models.Llama(Config(bias=True, scan=True)))
    with fails(r"leaf 'layers/mlp/down_proj/bias' \(2, 16\): no tensor is it; nearest: model.*"):
        lora.peft.load_base(BASES / "llama_bf16", shapes, survey)
    with fails(r"(?s)strata.0.*no leaf of that name.*leaf 'layers/self_attn/k_proj/bias'"):
        lora.peft.load_base(BASES / "llama_bf16", {"layers": shapes["layers"]}, survey,
                            rename={"layers": "strata"})  # fmt: skip


def test_fewer_layers(tmp_path):
    """Of a stack, a position without a tensor; or a tensor without a position."""
    shapes, survey, _, _ = surveyed("llama_bf16", models.Llama(Config(scan=True)))
    with fails(
        r"leaf 'layers/mlp/down_proj/kernel' \(2, 24, 16\): no tensor is .*kernel\[1\], one of 1"
    ):
        lora.peft.load_base(BASES / "llama_bf16", shapes, survey, ignore=[r".*layers\.1.*"])
    less = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), shapes["layers"]
    )
    with fails("layers.1.*a stack of 1, without 1"):
        lora.peft.load_base(BASES / "llama_bf16", {**shapes, "layers": less}, survey)


def test_two_tensors_for_one_part():
    shapes, survey, _, _ = surveyed("llama_bf16", models.Llama(Config(scan=True)))
    mapping = {r"model\.layers\.\d+\.mlp\.up_proj": "layers/mlp/up_proj/kernel[0]"}
    with fails(
        "leaf 'layers/mlp/up_proj/kernel': .*layers.0.* and .*layers.1.* fall on the same part"
    ):
        lora.peft.load_base(BASES / "llama_bf16", shapes, survey, mapping=mapping)


def test_leaves_that_are_no_parameters(tmp_path):
    """Kept as they are; of a shape alone nothing can be made."""
    save_file({"q.weight": np.ones((3, 4), "f4")}, tmp_path / "model.safetensors")
    params = {"q": {"kernel": jax.ShapeDtypeStruct((4, 3), "float32")}, "step": jnp.int32(3)}
    assert lora.peft.load_base(tmp_path, params)["step"] == 3
    with fails("leaf 'step' int32: not floating-point, and a shape alone; pass its value"):
        lora.peft.load_base(tmp_path, {**params, "step": jax.ShapeDtypeStruct((), "int32")})


def test_a_module_with_more_than_parameters():
    """Of shapes alone, as of `nnx.eval_shape`: its parameters are filled."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.model, self.drop = (
                models.NNXLlama(bias=True, rngs=rngs),
                nnx.Dropout(0.5, rngs=rngs),
            )

    model = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    with fails("leaf 'drop/rngs/.*' .*: not floating-point.*nnx.split"):
        lora.peft.load_base(BASES / "llama_untied", model)
    _, params, _ = nnx.split(model, nnx.Param, ...)
    params = lora.peft.load_base(BASES / "llama_untied", params)
    assert isinstance(params, nnx.State)
    want = lora.peft.load_base(
        BASES / "llama_untied", nnx.eval_shape(lambda: models.NNXLlama(bias=True, rngs=nnx.Rngs(0)))
    )
    np.testing.assert_array_equal(
        params["model"]["layers"][1]["mlp"]["up_proj"]["kernel"].get_value(),
        want.layers[1].mlp.up_proj.kernel.get_value(),
    )


@pytest.mark.parametrize("scan", [False, True])
def test_memory(tmp_path, scan):
    """Beside the result there is one tensor."""
    layers, shape = 8, (512, 256)
    value = np.random.default_rng(0).normal(size=shape).astype("f4")
    save_file(
        {f"layers.{i}.q.weight": value + i for i in range(layers)}, tmp_path / "m.safetensors"
    )
    if scan:
        params = {"layers": {"q": {"kernel": jax.ShapeDtypeStruct((layers, 256, 512), "float32")}}}
        fn = lambda p, x: jax.lax.scan(lambda x, w: (x, x @ w), x, p["layers"]["q"]["kernel"])
        survey = lora.survey(fn, params, jnp.ones((1, 256)))
    else:
        leaf = {"kernel": jax.ShapeDtypeStruct((256, 512), "float32")}
        params, survey = {f"layers_{i}": {"q": leaf} for i in range(layers)}, None
    lora.peft.load_base(tmp_path, params, survey)  # what is imported and traced once
    tracemalloc.start()
    try:
        got = lora.peft.load_base(tmp_path, params, survey)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    result = sum(x.nbytes for x in jax.tree.leaves(got))
    assert result == layers * value.nbytes
    assert peak < result + 1.25 * value.nbytes


def test_what_is_no_base_is_not_written(tmp_path):
    shapes, survey, _, _ = surveyed("llama_tied", models.Llama(Config(tied=True)))
    params = lora.peft.load_base(BASES / "llama_tied", shapes, survey)
    save = lambda p, to: lora.peft.save_base(tmp_path / to, p, survey, like=BASES / "llama_tied")
    with fails(r"'layers_0/mlp/up_proj/kernel' is Quantized.*lora.quant.dequantize"):
        save(lora.quant.quantize(params, "up_proj/kernel"), "new")
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), params)
    with fails("'embed_tokens/embedding' holds NaN"):
        save(bad, "new")
    assert list(tmp_path.iterdir()) == []
    save(params, "new")
    with fails("new is there already, and is left as it is"):
        save(params, "new")


# Damaged folders


def sharded(folder):
    shutil.copytree(BASES / "llama_untied", folder)
    return folder / "model.safetensors.index.json", sorted(folder.glob("model-*"))


def rewritten(file, change):
    save_file(change(load_file(file)), file)


def indexed(index, change):
    content = json.loads(index.read_text())
    content["weight_map"] = change(content["weight_map"])
    index.write_text(json.dumps(content))


DAMAGE = {
    "cut off": (lambda i, f: f[1].write_bytes(f[1].read_bytes()[:-7]), "expected a safetensors file"),
    "cut in its header": (lambda i, f: f[1].write_bytes(f[1].read_bytes()[:99]), "expected a safet"),
    "empty": (lambda i, f: f[1].write_bytes(b""), "expected a safetensors file"),
    "noise": (lambda i, f: f[1].write_bytes(bytes(range(256)) * 9), "expected a safetensors file"),
    "a missing shard": (lambda i, f: f[2].unlink(), "cannot be read"),
    "a shard that is a folder": (lambda i, f: (f[2].unlink(), f[2].mkdir()), "not a regular file"),
    "index: no JSON": (lambda i, f: i.write_text("{"), "not the JSON that is expected"),
    "index: no map": (lambda i, f: i.write_text("{}"), "expected weight_map"),
    "index: a path": (lambda i, f: indexed(i, lambda m: {**m, "x": "../x"}), "expected names of files"),
    "index: another file": (
        lambda i, f: indexed(i, lambda m: {**m, "model.norm.weight": f[0].name}),
        "'model.norm.weight' is in .* by the index, found in",
    ),
    "index: a tensor too many": (
        lambda i, f: indexed(i, lambda m: {**m, "model.x.weight": f[0].name}),
        "'model.x.weight' is in .* by the index, found in no file",
    ),
    "a tensor twice": (
        lambda i, f: rewritten(f[1], lambda t: {**t, "lm_head.weight": np.ones((64, 16), "f4")}),
        "'lm_head.weight' is in model-",
    ),
    "a tensor more": (
        lambda i, f: rewritten(f[1], lambda t: {**t, "model.x.weight": np.ones((4, 4), "f4")}),
        r"(?s)'model.x.weight' \(of shape \(4, 4\)\): no leaf of that name.*ignore=\[r'model",
    ),
    "a type that is none": (
        lambda i, f: rewritten(f[0], lambda t: {k: v.astype("i4") for k, v in t.items()}),
        r"\(.*\) is I32, expected one of F32, F16, BF16",
    ),
    "another shape": (
        lambda i, f: rewritten(f[1], lambda t: {k: np.ones(np.add(v.shape, 1), "f4") for k, v in t.items()}),
        r"of shape \(.*\), does not fit",
    ),
    "only a pickle": (
        lambda i, f: [i.unlink(), *(x.rename(x.with_suffix(".bin")) for x in f)],
        "no safetensors files, only .*bin: save it in PyTorch as safetensors",
    ),
    "no folder": (lambda i, f: shutil.rmtree(i.parent), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_folders(tmp_path, how):
    damage, match = DAMAGE[how]
    shapes, survey, _, _ = surveyed("llama_untied", models.Llama(Config(bias=True)))
    damage(*sharded(tmp_path / "base"))
    with fails(match):
        lora.peft.load_base(tmp_path / "base", shapes, survey)
    with fails(match):
        lora.peft.save_base(tmp_path / "new", shapes, survey, like=tmp_path / "base")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"ignore": "pooler"}, r"ignore='pooler': expected a list of texts: ignore=\['pooler'\]"),
        ({"ignore": ["("]}, "not a regular expression"),
        ({"rename": {"(": ""}}, "rename: '\\(': '' is not a regular expression"),
        ({"rename": {r"\.\d+\.": "."}}, "which is no name, or taken"),
        ({"mapping": {"(": "x"}}, "is not a regular expression and a leaf"),
        ({"folder": 3}, "expected the path of a folder, found int"),
    ],
)
def test_arguments(arguments, match):
    shapes = surveyed("llama_tied", models.Llama(Config(tied=True)))[0]
    arguments = {"folder": BASES / "llama_tied", "params": shapes, **arguments}
    with fails(match):
        lora.peft.load_base(**arguments)


# From a folder to PEFT's


def test_mapping_of_a_folder_and_of_an_index():
    """The same for a folder, its index, and the names and shapes."""
    shapes, survey, _, _ = surveyed("llama_untied", models.Llama(Config(bias=True, scan=True)))
    folder = BASES / "llama_untied"
    files = sorted(folder.glob("model-*"))
    names = {n: x.shape for f in files for n, x in load_file(f).items()}
    found = lora.peft.mapping(folder, shapes, survey)
    assert found == lora.peft.mapping(folder / "model.safetensors.index.json", shapes, survey)
    assert found.entries == lora.peft.mapping(names, shapes, survey).entries
    assert found["model.layers.1.mlp.up_proj.weight"].layout == "out_in"
    again = lora.peft.load_base(folder, shapes, survey, mapping=found)
    jax.tree.map(np.testing.assert_array_equal, again, lora.peft.load_base(folder, shapes, survey))
    shapes, survey, _, _ = surveyed("bert", models.Bert())
    found = lora.peft.mapping(BASES / "bert", shapes, survey, **NAMES["bert"])
    assert "encoder.layer.0.attention.self.query.weight" in found  # the name that PEFT knows
    with fails("pooler.weight.*no leaf"):
        lora.peft.mapping(BASES / "bert", shapes, survey, rename=bert.NAMES)


def test_adapters_of_experts_by_module(tmp_path):
    """A module for each expert in torch, a stack of layers and experts here: written and read."""
    model = models.Llama(Config(experts="mixtral", scan=True))
    shapes, survey, x, _ = surveyed("mixtral", model)
    params = lora.peft.load_base(BASES / "mixtral", shapes, survey)
    config = lora.LoRAConfig(rank=2, targets=["w1/kernel", "w2/kernel", "q_proj/kernel"])
    adapters = noisy(lora.init(KEY, params, config, survey))
    node = adapters["layers"]["block_sparse_moe"]["experts"]["w1"]["kernel"]
    assert node.geometry == lora.Geometry((2,), (3,), (0, 1))  # each its own A and B
    mapping = lora.peft.mapping(BASES / "mixtral", params, survey)
    lora.peft.save(tmp_path, adapters, mapping, task_type="CAUSAL_LM")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.block_sparse_moe.experts.3.w1.lora_A.weight"
    np.testing.assert_array_equal(stored[name], node.a[1, 3].T)
    back = lora.peft.load(tmp_path, params, survey).adapters
    jax.tree.map(np.testing.assert_array_equal, back, adapters)
    adapted = jax.jit(lora.adapt(model.apply))({"params": lora.bind(params, adapters)}, x)
    merged = jax.jit(model.apply)({"params": lora.merge(params, adapters)}, x)
    assert_close(adapted, merged)


SHORT = '''
shapes = jax.eval_shape(model.init, key, ids)["params"]
survey = lora.survey(model.apply, {"params": shapes}, ids)
params = lora.peft.load_base(base, shapes, survey)
adapters = lora.init(key, params, lora.LoRAConfig(rank=4, targets="all-linear"), survey)
apply, tx = lora.adapt(model.apply), optax.sgd(0.1)
loss = lambda adapters: xent(apply({"params": lora.bind(params, adapters)}, ids)[:, :-1], ids[:, 1:]).mean()
state = tx.init(adapters)
for _ in range(3):
    updates, state = tx.update(jax.jit(jax.grad(loss))(adapters), state)
    adapters = optax.apply_updates(adapters, updates)
lora.peft.save(folder, adapters, lora.peft.mapping(base, params, survey), task_type="CAUSAL_LM")
'''  # fmt: skip


def trained(base, model, ids, folder):
    """Runs the 11 lines; returns what they define."""
    import optax

    xent = optax.softmax_cross_entropy_with_integer_labels
    lines = {"jax": jax, "lora": lora, "optax": optax, "xent": xent, "key": KEY, "base": base,
             "model": model, "ids": ids, "folder": folder}  # fmt: skip
    exec(SHORT, lines)
    return lines


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, config", [("llama_tied", {"tied": True}), ("llama_untied", {"bias": True})]
)
@pytest.mark.filterwarnings("ignore")
def test_from_hugging_face_to_peft_in_fifteen_lines(tmp_path, name, config):
    """A folder, a scanned model, adapters, training, PEFT's folder; the logits are those of PEFT,
    and those of transformers on the merged model that is written."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    assert len(SHORT.strip().splitlines()) <= 15
    ids, _ = models.inputs(name)
    t = trained(BASES / name, models.Llama(Config(scan=True, **config)), ids, tmp_path / "adapter")
    want = t["apply"]({"params": lora.bind(t["params"], t["adapters"])}, ids)
    merged = lora.merge(t["params"], t["adapters"])
    lora.peft.save_base(tmp_path / "merged", merged, t["survey"], like=BASES / name)
    load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base, x = load(BASES / name), torch.from_numpy(np.array(ids)).long()
    with torch.no_grad():
        before = base(x).logits.numpy()
        adapted = (
            peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(x).logits.numpy()
        )
        whole = load(tmp_path / "merged").eval()(x).logits.numpy()
    assert np.abs(before - adapted).max() > 1e-2 * np.abs(before).max()
    assert_close(want, adapted)
    assert_close(want, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name, model", CASES)
@pytest.mark.filterwarnings("ignore")
def test_transformers_load_what_is_written(tmp_path, name, model):
    """Other values than those that were read: the outputs of both are equal."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from make_bases import BASES as KINDS
    from make_bases import HEADS

    shapes, survey, x, _ = surveyed(name, model)
    params = lora.peft.load_base(BASES / name, shapes, survey, **NAMES.get(name, {}))
    params = jax.tree.map(lambda w: w + 0.1 * rand.normal(KEY, w.shape).astype(w.dtype), params)
    if name == "llama_tied" and "lm_head" in params:
        params["lm_head"]["kernel"] = params["embed_tokens"]["embedding"].T
    if KINDS[name][2] != "float32":  # values that the files hold
        params = jax.tree.map(lambda w: w.astype(KINDS[name][2]).astype("float32"), params)
    new = tmp_path / "new"
    lora.peft.save_base(new, params, survey, like=BASES / name, **NAMES.get(name, {}))
    kind = getattr(transformers, KINDS[name][0] + HEADS.get(KINDS[name][0], "ForCausalLM"))
    theirs = kind.from_pretrained(new, dtype=torch.float32).eval()
    x_torch = torch.from_numpy(np.array(x))
    with torch.no_grad():
        y = theirs(x_torch.long() if x.dtype == jnp.int32 else x_torch)
    want = y.logits if "logits" in y else y.last_hidden_state
    assert_close(model.apply({"params": params}, x), want.numpy())


def test_the_golden_folders_are_small():
    sizes = [p.stat().st_size for p in BASES.rglob("*") if p.is_file()]
    assert sum(sizes) < 1_500_000
    text = (BASES / "README.md").read_text()
    assert all(re.search(rf"`{d.name}`", text) for d in BASES.iterdir() if d.is_dir())
