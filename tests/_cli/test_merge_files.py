"""Adapters merged into base models on disk: PEFT's outputs, bytes that stay, memory that is bounded."""

import json
import os
import shutil
import tracemalloc

import golden_models as g
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import fails, needs_peft, tolerance
from make_golden import GOLDEN
from safetensors.numpy import save_file
from test_peft import MODELS, changed, delta, pair, stored, written

from lora_jax._cli import merge as _cli_merge
from lora_jax._cli.combine import combine_folders
from lora_jax._cli.merge import merge_files
from lora_jax._core.errors import LoRAError
from lora_jax.peft._safetensors import open_base

EXPERTS = ["gate_up_proj", "down_proj"]  # as the torch module has them


def base_file(name):
    return g.folder(name) / "base.safetensors"


def merged(tmp_path, name, folder=None, **kwargs):
    """The tensors of a golden base with its adapter merged."""
    experts = EXPERTS if name == "moe_plain" else None
    out = tmp_path / "merged.safetensors"
    merge_files(base_file(name), folder or g.folder(name), out, **{"experts": experts, **kwargs})
    return g.tensors(out)


def saved(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, {"format": "pt"})
    return path


def test_a_folder_in_a_base_that_cannot_be_read(tmp_path, monkeypatch):
    """`os.walk` passes over it, and its files were missing in the copy."""
    folder = hf_folder(tmp_path / "base", g.base("mha"))
    locked, scan = folder / "1_Pooling", os.scandir

    def scandir(path):
        if os.fspath(path) == os.fspath(locked):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with fails("base: cannot be read: .*Permission denied: '.*1_Pooling'"):
        merge_files(folder, g.folder("mha"), tmp_path / "out", conv1d=[])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", MODELS)
def test_the_plain_model_on_merged_weights_gives_pefts_output(name, tmp_path, monkeypatch):
    """Every kind of layer: Linear, Conv1D, convolutions, embedding, experts, attention, in full."""
    new, old = merged(tmp_path, name), g.base(name)
    fn, params_of, _, tol = MODELS[name]
    x, y_base, want = g.inputs(name)
    monkeypatch.setattr(g, "base", lambda name: new)
    got = jax.jit(fn)(params_of(name), x)
    assert np.abs(y_base - want).max() > 2 * tol
    np.testing.assert_allclose(got, want, atol=tol, rtol=0)
    assert new.keys() == old.keys()
    assert {k: v.dtype for k, v in new.items()} == {k: v.dtype for k, v in old.items()}


def test_what_is_not_touched_is_the_same_bytes(tmp_path):
    tensors = g.base("llama_default") | {"steps": np.arange(3), "mask": np.ones(2, bool)}
    path = saved(tmp_path / "base.safetensors", tensors)
    out = tmp_path / "out.safetensors"
    placed, _ = merge_files(path, g.folder("llama_default"), out)
    before, after = path.read_bytes(), out.read_bytes()
    base = open_base(path)
    start = base.files[path]
    assert len(before) == len(after) and before[:start] == after[:start]  # the header, metadata too
    differ = {
        n for n, t in base.tensors.items() if before[t.start : t.stop] != after[t.start : t.stop]
    }
    assert differ == set(placed.parts) and len(differ) == 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_sum_is_rounded_once(tmp_path, dtype):
    tensors = pair("a.q", 6, 4)
    folder = written(tmp_path / "adapter", tensors)
    base = np.random.default_rng(1).normal(size=(4, 6)).astype(dtype)
    path = saved(tmp_path / "base.safetensors", {"a.q.weight": base})
    merge_files(path, folder, tmp_path / "out")
    got = g.tensors(tmp_path / "out")["a.q.weight"]
    want = base.astype(np.float64) + delta(
        {k: v.astype(np.float64) for k, v in tensors.items()}, "a.q"
    )
    half = tolerance(dtype, 0.5) * np.abs(want) + tolerance(jnp.float32, 8)
    assert got.dtype == dtype and (np.abs(got.astype(np.float64) - want) <= half).all()


def hf_folder(folder, tensors, **config):
    """A sharded model as transformers writes it, and what else lies beside one."""
    names = sorted(tensors)
    shards = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, own in shards.items():
        saved(folder / file, {n: tensors[n] for n in own})
    where = {n: file for file, own in shards.items() for n in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("tokens")
    for unmerged in ("pytorch_model.bin", "adapter_config.json", ".hidden"):
        (folder / unmerged).write_text("old")
    saved(folder / "consolidated.safetensors", tensors)
    return folder


def test_a_sharded_folder(tmp_path):
    name = "llama_default"
    folder = hf_folder(tmp_path / "base", g.base(name), tie_word_embeddings=False)
    (folder / "linked").symlink_to("1_Pooling")
    steps = []
    _, left = merge_files(
        folder, g.folder(name), tmp_path / "out", progress=lambda *x: steps.append(x)
    )
    got = {n: t.read() for n, t in open_base(tmp_path / "out").tensors.items()}
    want = merged(tmp_path, name)
    assert got.keys() == want.keys() and len(got) > 4
    jax.tree.map(np.testing.assert_array_equal, got, dict(want))
    files = {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    shards = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert files == shards | {
        "config.json",
        "1_Pooling/config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
    }
    assert {str(p) for p in left} == {
        "pytorch_model.bin",
        "adapter_config.json",
        "consolidated.safetensors",
        "linked",
    }
    size = sum((folder / s).stat().st_size for s in shards)
    assert steps[-1] == (size, size)


def test_memory_is_that_of_one_tensor(tmp_path):
    """48 tensors of 1 MiB; numpy's memory is traced, JAX's arrays are counted while it writes."""
    names = [f"layers.{i}.q" for i in range(48)]
    mib = 1 << 20
    base = saved(tmp_path / "base", {f"{n}.weight": np.ones((512, 512), "f4") for n in names})
    tensors = {}
    for n in names:
        tensors |= pair(n, 512, 512)
    folder = written(tmp_path / "adapter", tensors)
    del tensors
    before, live = sum(x.nbytes for x in jax.live_arrays()), []

    def progress(done, total):
        live.append(sum(x.nbytes for x in jax.live_arrays()) - before)

    merge_files(base, folder, tmp_path / "warm")  # what is compiled and imported stays
    tracemalloc.start()
    merge_files(base, folder, tmp_path / "out", progress=progress)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "out").stat().st_size > 48 * mib and len(live) > 48
    assert peak < 6 * mib, f"{peak / mib:.1f} MiB"
    assert max(live) < 6 * mib, f"{max(live) / mib:.1f} MiB"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("sharded", [False, True])
def test_nothing_half_written_stays(tmp_path, monkeypatch, error, sharded):
    name = "llama_default"
    base = (
        hf_folder(tmp_path / "base", g.base(name), tie_word_embeddings=False)
        if sharded
        else base_file(name)
    )
    calls, whole = [], _cli_merge.merge

    def failing(params, adapters):
        calls.append(params)
        if len(calls) == 3:
            raise error
        return whole(params, adapters)

    monkeypatch.setattr(_cli_merge, "merge", failing)
    (tmp_path / "to").mkdir()
    raised = LoRAError if isinstance(error, OSError) else type(error)
    with pytest.raises(raised, match=r"cannot be written: disk full|^$"):
        merge_files(base, g.folder(name), tmp_path / "to" / "out")
    assert len(calls) == 3 and not list((tmp_path / "to").iterdir())


def test_what_is_there_is_never_written_over(tmp_path):
    mine = tmp_path / "mine"
    (mine / "folder").mkdir(parents=True)
    (mine / "file").write_text("mine")
    (mine / "link").symlink_to("nowhere")
    for out in list(mine.iterdir()):
        with fails("is there already"):
            merge_files(base_file("mha"), g.folder("mha"), out)
    assert sorted(p.name for p in mine.iterdir()) == ["file", "folder", "link"]
    assert (mine / "file").read_text() == "mine"
    assert not list((mine / "folder").iterdir())
    assert str((mine / "link").readlink()) == "nowhere"
    with fails("there is no folder"):
        merge_files(base_file("mha"), g.folder("mha"), tmp_path / "no" / "out")

    def meanwhile(done, total):
        (tmp_path / "out").write_text("mine")

    with fails("was made meanwhile"):
        merge_files(base_file("mha"), g.folder("mha"), tmp_path / "out", progress=meanwhile)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]
    assert (tmp_path / "out").read_text() == "mine"


def test_every_tensor_is_used_or_listed(tmp_path):
    rest = {k: v for k, v in g.base("net_lora").items() if k not in ("lin.weight", "head.bias")}
    rest["c1d.weight"] = rest["c1d.weight"][:, 1:]
    rest["head.weight"] = rest["head.weight"].T
    path = saved(tmp_path / "base", rest)
    with fails(
        r"(?s)update is of a weight \(10, 12\) or \(12, 10\); 'c1d.weight' is \(12, 9\).*"
        r"'lin.weight' \(low-rank, in 8, out 12\) is not in the base; nearest: lin.bias.*"
        r"'head.bias' \(saved in full\) is not in the base.*'head.weight' \(6, 10\) is saved in full; .* \(10, 6\)"
    ):
        merge_files(path, g.folder("net_lora"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantised_base_is_refused(tmp_path):
    base = g.base("llama_default")
    names = [n for n in base if n.endswith(("q_proj.weight", "v_proj.weight"))]
    path = saved(tmp_path / "u8", base | {names[0]: base[names[0]].astype(np.uint8)})
    with fails(f"'{names[0]}' is U8, expected one of F32, F16, BF16; a quantised base"):
        merge_files(path, g.folder("llama_default"), tmp_path / "out")
    gptq = {n.replace("q_proj.weight", "q_proj.qweight"): v for n, v in base.items()}
    path = saved(tmp_path / "gptq", gptq)
    with fails("its weight is quantised there"):
        merge_files(path, g.folder("llama_default"), tmp_path / "out")


# A square weight may be (out, in) or (in, out)


def test_a_square_conv1d_is_told_from_the_biases_of_the_base(tmp_path):
    name = "transformer.h.0.attn.c_proj"
    tensors = pair(name, 16, 16)
    folder = written(tmp_path / "in", tensors, target_modules=["c_proj"])  # the flag is not set
    got = merged(tmp_path, "gpt2_default", folder)[name + ".weight"]
    want = g.base("gpt2_default")[name + ".weight"] + delta(tensors, name).T
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_a_square_linear(tmp_path, bias):
    tensors = pair("a.q", 4, 4)
    folder = written(tmp_path / "in", tensors, fan_in_fan_out=not bias)
    base = {
        "a.q.weight": np.zeros((4, 4), "f4"),
        "a.up.weight": np.zeros((8, 4), "f4"),
        "a.up.bias": np.zeros(8, "f4"),
    }
    base |= {"a.q.bias": np.zeros(4, "f4")} if bias else {}
    merge_files(saved(tmp_path / "base", base), folder, tmp_path / "out")
    np.testing.assert_allclose(
        g.tensors(tmp_path / "out")["a.q.weight"], delta(tensors, "a.q"), atol=1e-6
    )


def test_a_square_weight_between_both_kinds_is_asked_for(tmp_path):
    tensors = pair("mid", 4, 4)
    folder = written(tmp_path / "in", tensors)
    zeros = lambda *shape: np.zeros(shape, "f4")
    base = {
        "lin.weight": zeros(8, 4),
        "lin.bias": zeros(8),
        "c.weight": zeros(4, 8),
        "c.bias": zeros(8),
    }
    path = saved(tmp_path / "base", base | {"mid.weight": zeros(4, 4), "mid.bias": zeros(4)})
    with fails("--conv1d mid, or --conv1d none"):
        merge_files(path, folder, tmp_path / "out")
    for conv1d, want in (["mid"], delta(tensors, "mid").T), ([], delta(tensors, "mid")):
        merge_files(path, folder, tmp_path / f"out{len(conv1d)}", conv1d=conv1d)
        got = g.tensors(tmp_path / f"out{len(conv1d)}")["mid.weight"]
        np.testing.assert_allclose(got, want, atol=1e-6)


# Experts


def test_experts_are_assigned_by_their_sizes(tmp_path):
    """(experts, 2f, d) and (experts, d, f), as most models have them: one way fits."""
    e, d, f = 3, 4, 5
    up, down = pair("m", d, 2 * f, r=2 * e), pair("m.base_layer", f, d, r=2 * e, seed=1)
    settings = {"target_modules": [], "peft_version": "0.21.2"}
    names = ["m.gate_up_proj", "m.down_proj"]
    folder = written(tmp_path / "in", up | down, target_parameters=names, **settings)
    base = {
        "m.gate_up_proj": np.zeros((e, 2 * f, d), "f4"),
        "m.down_proj": np.zeros((e, d, f), "f4"),
    }
    merge_files(saved(tmp_path / "base", base), folder, tmp_path / "out")
    got = g.tensors(tmp_path / "out")
    for name, at, of in (("gate_up_proj", "m", up), ("down_proj", "m.base_layer", down)):
        a = of[f"{at}.lora_A.weight"].reshape(e, 2, -1)
        b = of[f"{at}.lora_B.weight"].reshape(-1, 2, e)
        np.testing.assert_allclose(got[f"m.{name}"], 2 * np.einsum("ore,eri->eoi", b, a), atol=1e-5)


def test_experts_that_may_be_either_are_asked_for(tmp_path):
    with fails("(?s)several ways .* --experts gate_up_proj,down_proj"):
        merged(tmp_path, "moe_plain", experts=None)
    with fails("the sizes do not fit"):
        merged(tmp_path, "moe_plain", experts=EXPERTS[::-1], experts_a="last")


# Names, and tables that are the head as well


def test_names_that_two_encoders_have(tmp_path):
    """bert and vit each stand for a whole model; in a base with both neither is taken in silence."""
    weight = np.zeros((4, 6), "f4")
    base = {f"{first}.layer.{i}.q.weight": weight for first in ("bert", "vit") for i in range(2)}
    base["vit.layer.2.q.weight"] = weight
    folder = written(tmp_path / "a", pair("layer.0.q", 6, 4))
    file = saved(tmp_path / "base", base)
    with fails(r"'layer.0.q.weight' .* is not in the base; '\w+.layer.0.q.weight' has that name"):
        merge_files(file, folder, tmp_path / "out")
    merge_files(file, folder, tmp_path / "out", mapping={"layer.0.q": "vit.layer.0.q"})
    assert g.tensors(tmp_path / "out")["vit.layer.0.q.weight"].any()
    # What one of them alone has says which it is.
    both = written(tmp_path / "b", pair("layer.0.q", 6, 4) | pair("layer.2.q", 6, 4))
    merge_files(file, both, tmp_path / "vit")
    assert [k for k, v in g.tensors(tmp_path / "vit").items() if v.any()] == [
        "vit.layer.0.q.weight",
        "vit.layer.2.q.weight",
    ]


def test_names_with_one_part_less_or_more(tmp_path):
    want = merged(tmp_path, "gpt2_default")
    short = {k.removeprefix("transformer."): v for k, v in g.base("gpt2_default").items()}
    long = {"model." + k: v for k, v in g.base("gpt2_default").items()}
    for base, name in (
        (short, lambda k: k.removeprefix("transformer.")),
        (long, lambda k: "model." + k),
    ):
        out = tmp_path / str(len(next(iter(base))))
        merge_files(saved(out.with_suffix(".base"), base), g.folder("gpt2_default"), out)
        got = g.tensors(out)
        for k, v in want.items():
            np.testing.assert_array_equal(got[name(k)], v)


def tied_base(tmp_path, **config):
    base = {
        "model.embed_tokens.weight": np.ones((8, 4), "f4"),
        "model.q.weight": np.ones((4, 4), "f4"),
    }
    saved(tmp_path / "base" / "model.safetensors", base)
    settings = {"architectures": ["LlamaForCausalLM"], "vocab_size": 8, **config}
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings))
    return tmp_path / "base"


def test_a_table_that_is_the_head_too(tmp_path):
    table = {
        "model.embed_tokens.lora_embedding_A": np.ones((2, 8), "f4"),
        "model.embed_tokens.lora_embedding_B": np.ones((4, 2), "f4"),
    }
    alone = written(tmp_path / "alone", table)
    base = tied_base(tmp_path)
    with fails("'model.embed_tokens.weight' is the embedding and the head, but the file changes"):
        merge_files(base, alone, tmp_path / "out")
    merge_files(
        base, written(tmp_path / "tying", table, ensure_weight_tying=True), tmp_path / "out"
    )
    head = written(tmp_path / "head", pair("lm_head", 4, 8))
    with fails("'lm_head.weight' .* is not in the base.*tied to 'model.embed_tokens.weight'"):
        merge_files(base, head, tmp_path / "out2")
    shutil.rmtree(base)
    merge_files(tied_base(tmp_path, tie_word_embeddings=False), alone, tmp_path / "out3")
    got = g.tensors(tmp_path / "out3" / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_allclose(got, 1 + 2 * 2)  # scale 2, rank 2


# Rows, biases, tables


def test_rows_and_biases(tmp_path):
    rows = np.arange(16, dtype=np.float32).reshape(2, 8)
    at = "base_model.model."
    extra = {
        at + "emb.token_adapter.trainable_tokens_delta": rows,
        at + "lin.lora_B.bias": np.arange(12, dtype="f4"),
    }
    drop = dict.fromkeys(k for k in stored(g.folder("net_lora")) if ".lin." not in k)
    settings = {
        "trainable_token_indices": {"emb": [7, 2]},
        "modules_to_save": None,
        "lora_bias": True,
    }
    new = merged(tmp_path, "net_lora", changed(tmp_path, "net_lora", settings, drop | extra))
    old = g.base("net_lora")
    np.testing.assert_array_equal(new["emb.weight"][[7, 2]], rows)
    kept = [i for i in range(11) if i not in (2, 7)]
    np.testing.assert_array_equal(new["emb.weight"][kept], old["emb.weight"][kept])
    np.testing.assert_allclose(new["lin.bias"], old["lin.bias"] + 5 / 3 * np.arange(12), rtol=1e-6)
    far = changed(
        tmp_path / "b",
        "net_lora",
        settings | {"trainable_token_indices": {"emb": [7, 11]}},
        drop | extra,
    )
    with fails(r"'emb.weight': rows up to 11 of 8 features; 'emb.weight' is \(11, 8\)"):
        merged(tmp_path / "b", "net_lora", far)


def test_a_table_of_another_base(tmp_path):
    key = "base_model.model.emb.base_layer.weight"
    table = g.base("net_lora")["emb.weight"]
    merged(tmp_path, "net_lora", changed(tmp_path, "net_lora", {}, {key: table}))
    other = table + (np.arange(11) == 3)[:, None].astype(np.float32)
    folder = changed(tmp_path / "b", "net_lora", {}, {key: other})
    with fails("1 rows differ from 'emb.weight' of the base; .*--keep-base"):
        merged(tmp_path / "b", "net_lora", folder)
    assert merged(tmp_path / "b", "net_lora", folder, keep_base=True)
    short = changed(tmp_path / "c", "net_lora", {}, {key: table[:-1]})
    with fails(r"is of \(10, 8\), and 'emb.weight' of the base of \(11, 8\); take the base"):
        merged(tmp_path / "c", "net_lora", short)


def test_bases_that_are_not_as_they_should_be(tmp_path):
    adapter = g.folder("llama_default")
    (tmp_path / "empty").mkdir()
    with fails("expected model.safetensors, or model.safetensors.index.json"):
        merge_files(tmp_path / "empty", adapter, tmp_path / "out")
    (tmp_path / "empty" / "pytorch_model.bin").write_text("")
    with fails("only pytorch_model.bin: save it in PyTorch as safetensors"):
        merge_files(tmp_path / "empty", adapter, tmp_path / "out")
    cut = tmp_path / "cut"
    cut.write_bytes(base_file("llama_default").read_bytes()[:-1])
    with fails("cut: expected a safetensors file"):
        merge_files(cut, adapter, tmp_path / "out")
    folder = hf_folder(tmp_path / "hf", g.base("llama_default"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name, file = next(iter(index["weight_map"].items()))
    index["weight_map"]["more.weight"] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with fails("'more.weight' is in .* by the index, found in no file"):
        merge_files(folder, adapter, tmp_path / "out")
    index["weight_map"] = {name: "../" + file}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with fails("expected names of files"):
        merge_files(folder, adapter, tmp_path / "out")


@needs_peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*MODELS, *GOLDEN])
def test_peft_merges_to_the_same(name, tmp_path):
    import peft
    import torch
    import torch_models

    model = torch_models.based(name).to(torch.float32)
    want = peft.PeftModel.from_pretrained(model, g.folder(name)).merge_and_unload().state_dict()
    base = base_file(name)
    if name == "kind_tied_tokens":  # as transformers saves it, and as PEFT changes both
        with fails("'lm_head.weight' holds the values of 'model.embed_tokens.weight'"):
            merged(tmp_path, name)
        weights = {k: v for k, v in g.base(name).items() if k != "lm_head.weight"}
        base = saved(tmp_path / "base", weights)
    experts = EXPERTS if name == "moe_plain" else None
    merge_files(base, g.folder(name), tmp_path / "out", experts=experts)
    got = g.tensors(tmp_path / "out")
    eps = float(jnp.finfo(got[next(iter(got))].dtype).eps)
    for key, value in got.items():
        value, exact = value.astype(np.float32), want[key].numpy()
        if name == "kind_tied_both" and ("embed" in key or "head" in key):
            exact = (exact + g.base(name)[key]) / 2  # PEFT adds to the one array twice
        np.testing.assert_allclose(value, exact, atol=2e-7, rtol=eps, err_msg=key)


@needs_peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["net_rslora_patterns", "conv_lora", "moe_plain", "mha", "llama_default"]
)
def test_peft_loads_a_sum(name, tmp_path):
    import torch_models

    combine_folders(tmp_path / "sum", [g.folder(name)] * 2, [0.25, 0.75])
    x, _, want = g.inputs(name)
    got = torch_models.output(name, tmp_path / "sum", np.asarray(x))
    np.testing.assert_allclose(got, want, atol=4 * MODELS[name][3], rtol=0)
