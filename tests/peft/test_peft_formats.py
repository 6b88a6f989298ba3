"""Adapters of other tools and of PEFT's other types: merged, they are what those tools merge."""

import json
import re
import shutil
import tempfile
import warnings
from pathlib import Path

import damage
import damage_outcome
import damage_work
import golden_models as g
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import examples, fails, needs_peft
from hypothesis import given
from test_peft_kinds import tree_of

import lora_jax as lora
from lora_jax._core.paths import flatten, nest
from lora_jax.peft._file import TENSORS
from lora_jax.peft._settings import OTHERS

FOLDER = g.GOLDEN.parent / "formats"
DELTAS = sorted(
    d.name
    for d in FOLDER.iterdir()
    if (d / "adapter_model.safetensors").exists() and d.name != "alora"
)
EXACT = sorted(
    p.parent.name for p in FOLDER.glob("*/merged.safetensors") if p.parent.name not in DELTAS
)
FILES = {"kohya": "some_style.safetensors"}


def tree(name, weights):
    """Leaves in Flax's layout, with torch's names; GPT-2's Conv1D lies so already."""
    if name == "mlx_experts":
        names = {k: k.replace(".", "/").replace("weight", "kernel") for k in weights}
        return nest({names[k]: jnp.asarray(np.moveaxis(w, -1, -2)) for k, w in weights.items()})
    p = tree_of(weights)
    if "c1d" in p and "kernel" in p["c1d"]:
        p["c1d"]["kernel"] = p["c1d"]["kernel"].T
    return p


def uses(params, x):
    """Each leaf once, as a module of its kind would use it."""
    out = jnp.zeros(())
    for path, w in flatten(params).items():
        if path.endswith("embedding"):
            out += jnp.sum(w[x.astype(int)])
        elif w.ndim == 2:
            out += jnp.sum(jnp.ones((3, w.shape[0])) @ w)
        elif w.ndim == 3:
            out += jnp.sum(jnp.einsum("bei,eio->beo", jnp.ones((2, *w.shape[:2])), w))
        elif w.ndim == 4:
            y = jnp.ones((1, 5, 5, w.shape[2]))
            dims = ("NHWC", "HWIO", "NHWC")
            out += jnp.sum(
                jax.lax.conv_general_dilated(y, w, (1, 1), "SAME", dimension_numbers=dims)
            )
        else:
            out += jnp.sum(w)
    return out


def opened(name, make=tree, folder=None, **kwargs):
    """(params, what was loaded, params as the tool merged them)."""
    base = g.tensors(FOLDER / name / "base.safetensors")
    merged = g.tensors(FOLDER / name / "merged.safetensors")
    params = make(name, base)
    survey = lora.survey(uses, params, jnp.zeros((2,)))
    folder = folder or FOLDER / name / FILES.get(name, ".")
    return params, lora.peft.load(folder, params, survey, **kwargs), make(name, {**base, **merged})


def assert_merged(params, found, want):
    """To the rounding of fp32, in which the tool computed."""
    got = lora.merge(params, found.adapters)
    for path, w in flatten(want).items():
        np.testing.assert_allclose(
            flatten(got)[path], w, atol=1e-6 * max(1, np.abs(w).max()), rtol=0
        )
    assert any(not np.array_equal(w, flatten(params)[p]) for p, w in flatten(want).items())


@pytest.mark.parametrize("name", DELTAS)
def test_other_types_of_peft_are_what_peft_merges(name, tmp_path):
    """All of the update, as a LoRA of the rank that it has; PEFT's LoRA when it is saved."""
    params, found, want = opened(name, energy=1.0)
    assert_merged(params, found, want)
    assert min(found.kept.values()) == 1 and "share of" in str(found)
    lora.peft.save(tmp_path, found.adapters, found.mapping)
    again = lora.peft.load(tmp_path, params, lora.survey(uses, params, jnp.zeros((2,))))
    assert again.config["peft_type"] == "LORA"
    assert_merged(params, again, want)


@pytest.mark.parametrize("name", EXACT)
def test_other_tools_files_are_what_they_merge(name, tmp_path):
    params, found, want = opened(name)
    assert found.format == name.partition("_")[0] and found.format in str(found)
    assert_merged(params, found, want)
    lora.peft.save(tmp_path, found.adapters, found.mapping)
    again = lora.peft.load(
        tmp_path, params, lora.survey(uses, params, jnp.zeros((2,))), mapping=found.mapping
    )
    assert_merged(params, again, want)


@needs_peft
@pytest.mark.parametrize("name", DELTAS)
def test_peft_merges_the_lora_that_is_written(name, tmp_path):
    import torch_models
    from make_formats import KINDS
    from peft import PeftModel

    _, found, _ = opened(name, energy=1.0)
    lora.peft.save(tmp_path, found.adapters, found.mapping)
    model = torch_models.KINDS[KINDS[name][0]]()
    base = g.tensors(FOLDER / name / "base.safetensors")
    model.load_state_dict({k: torch_models.as_torch(v) for k, v in base.items()})
    got = PeftModel.from_pretrained(model, tmp_path).merge_and_unload().state_dict()
    for key, want in g.tensors(FOLDER / name / "merged.safetensors").items():
        np.testing.assert_allclose(
            got[key], want, atol=2e-6 * max(1, np.abs(want).max()), err_msg=key
        )


@pytest.mark.parametrize("rank", [1, 3, 99])
def test_the_largest_singular_values_are_kept(rank):
    """No LoRA of the rank is nearer (Eckart and Young), and the share says how near."""
    params, found, want = opened("shira", rank=rank)
    change = np.asarray(want["lin"]["kernel"] - params["lin"]["kernel"])
    s = np.linalg.svd(change.astype(np.float64), compute_uv=False)
    rest = np.asarray(lora.merge(params, found.adapters)["lin"]["kernel"] - want["lin"]["kernel"])
    np.testing.assert_allclose(np.sum(rest**2), np.sum(s[rank:] ** 2), rtol=1e-6, atol=1e-11)
    assert found.kept["lin.weight"] == pytest.approx(np.sum(s[:rank] ** 2) / np.sum(s**2), abs=1e-6)
    assert found.adapters["lin"]["kernel"].rank == min(rank, len(s))


@pytest.mark.parametrize("rank", [0, 20, 300])
def test_singular_values_of_large_updates(rank):
    """In the space of their columns where they are few, or of all."""
    from lora_jax.peft._reduce import low_rank

    rng = np.random.default_rng(0)
    update = rng.normal(size=(400, rank)) @ rng.normal(size=(rank, 300))
    s = np.linalg.svd(update, compute_uv=False)
    for keep in (1, 7, 20):
        a, b, kept = low_rank(update, keep, None)
        rest = np.linalg.norm(update - b.astype(float) @ a) ** 2
        np.testing.assert_allclose(rest, np.sum(s[keep:] ** 2), atol=1e-12 * np.sum(s**2) + 1e-30)
        assert kept == pytest.approx(np.sum(s[:keep] ** 2) / np.sum(s**2) if rank else 1, abs=1e-8)
    assert len(low_rank(update, None, 1.0)[0]) == max(rank, 1)


def test_energy_gives_the_smallest_rank():
    _, found, _ = opened("fourierft", energy=0.8)
    for name, share in found.kept.items():
        rank = found.adapters[name.split(".")[0]]["kernel"].rank
        assert share >= 0.8 and opened("fourierft", rank=rank - 1)[1].kept[name] < 0.8


def test_stacked_and_fused_leaves_are_as_separate_ones(tmp_path):
    """Layers in one leaf, q and k in one kernel of it; the type reads its part of the base."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    modules = [f"layers.{i}.{n}" for i in range(2) for n in ("q", "k")]
    shapes = {"A": (2, 6), "B": (4, 2)}
    tensors = {f"base_model.model.{m}.hira_{s}": rng.normal(size=n).astype("f4")
               for m in modules for s, n in shapes.items()}  # fmt: skip
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "HIRA", "r": 2}))
    w = rng.normal(size=(2, 6, 8)).astype("f4")  # (layers, in, q and k)
    apart = {f"layers/{i}/{n}/kernel": jnp.asarray(w[i, :, 4 * j : 4 * j + 4])
             for i in range(2) for j, n in enumerate("qk")}  # fmt: skip
    want = lora.merge(nest(apart), lora.peft.load(tmp_path, nest(apart), energy=1.0).adapters)
    fused = {"layers": {"qk": jnp.asarray(w)}}
    survey = lora.survey(
        lambda p, x: jax.lax.scan(lambda x, w: (x, x @ w), x, p["layers"]["qk"]), fused, jnp.ones((3, 6)))  # fmt: skip
    table = {
        r"layers\.(\d)\.q": "layers/qk[{1}, :, 0:4]",
        r"layers\.(\d)\.k": "layers/qk[{1}, :, 4:8]",
    }
    found = lora.peft.load(tmp_path, fused, survey, mapping=table, energy=1.0)
    got = np.asarray(lora.merge(fused, found.adapters)["layers"]["qk"])
    assert set(found.kept) == {f"{m}.weight" for m in modules}
    for m in modules:
        i, j = int(m.split(".")[1]), "qk".index(m[-1])
        x = flatten(want)[f"{m.replace('.', '/')}/kernel"]
        np.testing.assert_allclose(got[i, :, 4 * j : 4 * j + 4], x, atol=1e-5)


def test_rank_or_energy_is_asked_for():
    for kwargs in ({}, {"rank": 2, "energy": 0.9}):
        with fails(r"LOHA adapter .* say of which rank, or which share"):
            opened("loha", **kwargs)
    assert opened("loha", rank=np.int64(2))[1].kept == opened("loha", rank=2)[1].kept
    with fails("expected an integer >= 1"):
        opened("loha", rank=0)
    with fails("expected a share in"):
        opened("loha", energy=2.0)
    with fails(r"this one is: lora.algebra.resize\(adapters, rank\)"):
        opened("mlx", rank=2)


@pytest.mark.parametrize("name", ["hira", "ia3", "oft", "miss_bat"])
def test_values_of_the_base_are_asked_for(name):
    """Where parameters are abstract: given apart, the result is the same."""
    params, found, _ = opened(name, energy=1.0)
    abstract = lambda n, w: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree(n, w)
    )
    with fails(r"pass values: lora.peft.load\(..., base=params\)"):
        opened(name, abstract, energy=1.0)
    again = opened(name, abstract, energy=1.0, base=params)[1]
    for a, b in zip(jax.tree.leaves(found.adapters), jax.tree.leaves(again.adapters), strict=True):
        np.testing.assert_array_equal(a, b)


def test_torch_chooses_the_same_frequencies():
    """Fisher and Yates' first places, which torch.randperm(12) gives for these seeds."""
    from lora_jax.peft._forms import _randperm

    assert sorted(_randperm(30, 30, 3)) == list(range(30))
    for first in range(31):
        np.testing.assert_array_equal(_randperm(30, first, 3), _randperm(30, 30, 3)[:first])


def flax(name, weights):
    """As Flax names modules in a list: down_blocks_0."""
    flat = flatten(tree(name, weights))
    return nest({re.sub(r"/(\d+)(?=/)", r"_\1", path): w for path, w in flat.items()})


@pytest.mark.parametrize("name", ["diffusers", "diffusers_plain", "kohya"])
def test_one_model_of_several(name):
    """By its name, whether the parameters have it or not; else the names are an error."""

    def unet(name, weights):
        return flax(name, weights)["unet"]

    for make in (flax, unet):
        params, found, want = opened(name, make, part="unet")
        keep = lambda p, m=make: p["unet"] if m is flax else p
        assert_merged(
            keep(params), lora.peft.PeftAdapter(keep(found.adapters), {}, found.mapping), keep(want)
        )
    assert "conv1" in str(found.mapping) and "unet" not in str(found.mapping)
    with fails("no leaf of that name"):
        opened(name, unet)
    with fails(
        "part='prior', but it has 'text_encoder', 'unet'" if name != "kohya" else "part='prior'"
    ):
        opened(name, flax, part="prior")


def test_old_names_of_diffusers(tmp_path):
    """Of attention processors, and of text encoders, with alphas beside."""
    from safetensors.numpy import save_file

    names = {
        "unet.mid.attn1.processor.to_q_lora": "unet.mid.attn1.to_q",
        "unet.mid.attn1.processor.to_out_lora": "unet.mid.attn1.to_out.0",
        "text_encoder.text_model.layers.0.self_attn.q_proj.lora_linear_layer": "text_encoder.text_model.layers.0.self_attn.q_proj",
        "unet.mid.proj.lora": "unet.mid.proj",
    }  # fmt: skip
    rng = np.random.default_rng(0)
    state = {f"{k}.down.weight": rng.normal(size=(2, 4)).astype("f4") for k in names}
    state |= {f"{k}.up.weight": rng.normal(size=(3, 2)).astype("f4") for k in names}
    state["unet.mid.proj.alpha"] = np.array(5.0, "f4")
    save_file(state, tmp_path / "a.safetensors")
    params = nest({n.replace(".", "/") + "/kernel": jnp.zeros((4, 3)) for n in names.values()})
    found = lora.peft.load(tmp_path / "a.safetensors", params, format="diffusers")
    merged = flatten(lora.merge(params, found.adapters))
    for old, new in names.items():
        want = (state[f"{old}.up.weight"] @ state[f"{old}.down.weight"]).T * (
            2.5 if old == "unet.mid.proj.lora" else 1
        )
        np.testing.assert_allclose(merged[new.replace(".", "/") + "/kernel"], want, atol=1e-6)


def test_a_full_fine_tuning_of_mlx(tmp_path):
    """Its weights are those that mlx-lm saves: leaves in full."""
    from safetensors.numpy import save_file

    base = {"layers.1.up.weight": np.zeros((3, 4), "f4"), "norm.weight": np.ones(3, "f4")}
    new = {k: v + np.arange(v.size, dtype="f4").reshape(v.shape) for k, v in base.items()}
    save_file(new, tmp_path / "adapters.safetensors")
    settings = {"fine_tune_type": "full", "lora_parameters": {"rank": 8, "alpha": 1, "scale": 20.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    params = tree("mlx", base)
    merged = lora.merge(params, lora.peft.load(tmp_path, params).adapters)
    jax.tree.map(np.testing.assert_array_equal, merged, tree("mlx", new))


def test_a_format_that_is_not_the_files():
    with fails("format='safetensors': expected one of peft, mlx, diffusers, kohya"):
        opened("kohya", format="safetensors")
    with fails("is a name of kohya"):
        opened("kohya", format="diffusers")
    with fails("no adapters.safetensors, which mlx-lm writes"):
        opened("loha", format="mlx")
    with fails("no adapter_model.safetensors, but adapters.safetensors"):
        opened("mlx", format="peft")
    with fails("expected a safetensors file, or a folder with pytorch_lora_weights"):
        opened("mlx", format="kohya")
    with fails("part='unet', but an adapter of mlx is of one model"):
        opened("mlx", part="unet")


# aLoRA


def test_an_alora_is_active_from_its_invocation_on(tmp_path):
    """By the mask of `choose`, of a batch and of each example, PEFT's logits; tokens are kept."""
    folder = FOLDER / "alora"
    io = g.tensors(folder / "io.safetensors")
    params = tree("alora", g.tensors(folder / "base.safetensors"))
    with fails(r"found.active\(ids\)"):
        lora.peft.load(folder, params)
    found = lora.peft.load(folder, params, ignore=["alora_invocation_tokens"])
    assert found.invocation_tokens == (3, 5) and "aLoRA" in str(found)
    ids = io["in_x"].astype(np.int32)
    stacked, apply = lora.algebra.stack([found.adapters]), lora.adapt(g.llama)

    def logits(ids):
        chosen = lora.algebra.choose(stacked, 0, found.active(ids))
        return apply(lora.bind(params, chosen), ids)

    one = lambda ids: logits(ids[None])[0]
    for call in (jax.jit(logits), jax.jit(jax.vmap(one))):
        np.testing.assert_allclose(call(ids), io["y"], atol=4e-6 * np.abs(io["y"]).max())
    merged = lora.merge(params, found.adapters)
    assert np.abs(jax.jit(g.llama)(merged, ids) - io["y"]).max() > 1e-3
    lora.peft.save(tmp_path, found.adapters, found.mapping)
    assert json.loads((tmp_path / "adapter_config.json").read_text())[
        "alora_invocation_tokens"
    ] == [3, 5]


# Damage


def damaged(tmp_path, name, config=None, change=None):
    """A copy of a golden folder with other settings, or other tensors."""
    from safetensors.numpy import save_file

    folder = shutil.copytree(FOLDER / name, tmp_path / name)
    if config is not None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if change is not None:
        path = next(p for p in folder.iterdir() if p.name not in ("base.safetensors", "merged.safetensors")
                    and p.suffix == ".safetensors")  # fmt: skip
        tensors = {k: np.array(v) for k, v in g.tensors(path).items()}
        change(tensors)
        save_file(tensors, path)
    return folder


def put(key, value):
    return lambda tensors: tensors.__setitem__(next(k for k in tensors if k.endswith(key)), value)


def drop(key):
    return lambda tensors: tensors.pop(next(k for k in tensors if k.endswith(key)))


ONES = lambda *shape: np.ones(shape, "f4")
DAMAGES = [
    ("loha", {"alpha": "x"}, None, "alpha: expected a number"),
    ("loha", {"r": 5}, None, "the configuration says 5"),
    ("loha", {"new": 1}, None, "'new' is not a setting of PEFT"),
    ("loha", {"target_modules": ["a"]}, None, "target_modules leaves 'lin' out"),
    ("loha", {"peft_type": "BOFT"}, None, "peft_type='BOFT', expected one of LORA"),
    ("loha", {"peft_type": "LOKR"}, None, "no leaf of that name|tensors that cannot be used"),
    ("loha", None, drop("lin.hada_w1_b"), "'lin': lacks hada_w1_b"),
    ("loha", None, drop("hada_t1"), "'a': lacks hada_t1"),
    ("loha", None, put("lin.hada_w1_b", ONES(2, 8)), "'lin': the shapes of its two factors differ"),
    ("loha", None, put("hada_t1", ONES(2, 2, 3)), "expected 4 axes"),
    ("loha", None, put("out.hada_w2_a", np.full((8, 2), np.nan, "f4")), "holds NaN or infinity"),
    ("loha", None, lambda t: t.update({k: np.full_like(v, 1e30) for k, v in t.items()}), "is not finite"),
    ("loha", None, lambda t: t.update({"base_model.model.out.lora_A.weight": ONES(2, 12)}), "a tensor of a LoRA"),
    ("lokr", None, put("lin.lokr_w1", ONES(3, 3)), r"'lin.weight' \(an update, in 12, out 12\)"),
    ("lokr", None, put("lin.lokr_w2_b", ONES(2, 4)), "'lin': its ranks differ"),
    ("miss", {"init_weights": "maybe"}, None, "init_weights: expected"),
    ("miss", {"init_weights": "bat"}, None, "expected 3 axes"),
    ("miss_mini", {"mini_r": 5}, None, "mini_r and the block's columns differ"),
    ("miss_bat", None, put("lin.miss_block", ONES(6, 2, 3)), "the sides of its blocks differ"),
    ("hira", None, drop("lin.hira_A"), "'lin': lacks hira_A"),
    ("vera", None, drop("vera_A"), "save it in PEFT with save_projection=True"),
    ("vera", None, put("vera_A", ONES(3, 4)), "in 8, but vera_A is"),
    ("vera", None, put("lin.vera_lambda_d", ONES(2)), "its ranks differ"),
    ("gralora", None, put("lin.gralora_A", ONES(3, 4, 4)), "its blocks differ"),
    ("fourierft", {"random_loc_seed": -1}, None, "random_loc_seed: expected an integer >= 0"),
    ("fourierft", None, put("lin.fourierft_spectrum", ONES(97)), "97 frequencies of a matrix of 96"),
    ("shira", None, put("lin.shira_indices", np.full((2, 20), 12, "i4")), "rows from 12 to 12 of 12"),
    ("shira", None, put("lin.shira_indices", np.full((2, 20), -1, "i4")), "rows from -1"),
    ("shira", None, put("lin.shira_indices", ONES(2, 20)), "type 'F32', expected one of I32, I64"),
    ("ia3", {"feedforward_modules": ["lin", "head"]}, None, "a vector along axis 1, as it scales inputs"),
    ("ia3", {"feedforward_modules": "("}, None, "is not a regular expression"),
    ("ia3", None, put("lin.ia3_l", ONES(11, 1)), r"'lin.weight' \(an update, in \?, out 11\)"),
    ("oft", {"coft": "yes"}, None, "coft: expected bool"),
    ("oft", {"num_cayley_neumann_terms": 1000}, None, "expected at most 64"),
    ("oft", None, put("lin.oft_R.weight", ONES(4, 2)), "no triangle has so many elements"),
    ("mlx", {"lora_parameters": {"rank": 2}}, None, "scale: expected a number"),
    ("mlx", {"lora_parameters": {"rank": 2, "scale": 1.0, "alpha": 16}}, None, "write the scale that was meant"),
    ("mlx", {"lora_parameters": [2]}, None, "rank: expected an integer"),
    ("mlx", {"lora_parameters": {"rank": 4, "scale": 1.0}}, None, "the configuration says 4"),
    ("mlx", {"fine_tune_type": "prompt"}, None, "fine_tune_type='prompt'"),
    ("mlx", None, drop("q_proj.lora_a"), "but not a"),
    ("mlx_experts", None, put("up.lora_b", ONES(3, 5, 1)), "not of as many experts and ranks"),
    ("kohya", None, drop("to_k.lora_down.weight"), "without its lora_down"),
    ("kohya", None, put("to_k.alpha", ONES(3)), "expected one number"),
    ("kohya", None, put("to_k.alpha", np.array(np.inf, "f4")), "holds NaN or infinity"),
    ("kohya", None, lambda t: t.update({"lora_unet_x.lora_mid.weight": ONES(2, 2)}), "not a tensor of a LoRA"),
    ("diffusers_plain", None, drop("to_k.lora_B.weight"), "but not b"),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, config, change, match", DAMAGES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_damaged_files(tmp_path, name, config, change, match):
    folder = damaged(tmp_path, name, config, change)
    rank = {} if name not in DELTAS else {"rank": 2}
    with fails(f"(?s){re.escape(str(tmp_path))}.*({match})"):
        opened(name, folder=folder / FILES.get(name, "."), **rank)


@pytest.mark.parametrize(
    "name, setting",
    [
        ("loha", "alpha"),
        ("miss", "mini_r"),
        ("miss", "init_weights"),
        ("fourierft", "random_loc_seed"),
    ],
)
def test_a_setting_that_is_null_is_peft_s_default(tmp_path, name, setting):
    folder = damaged(tmp_path, name, {setting: None})
    given = damaged(tmp_path / "given", name, {setting: OTHERS[name.upper()][1][setting]})
    found, want = (opened(name, folder=f, rank=2)[1].adapters for f in (folder, given))
    jax.tree.map(np.testing.assert_array_equal, found, want)


@pytest.mark.parametrize("name", ["loha", "mlx", "kohya", "diffusers"])
def test_bytes_that_are_cut_off(tmp_path, name):
    folder = shutil.copytree(FOLDER / name, tmp_path / name)
    path = next(p for p in folder.iterdir() if p.suffix == ".safetensors" and p.name not in ("base.safetensors", "merged.safetensors"))  # fmt: skip
    data = path.read_bytes()
    rank = {} if name not in DELTAS else {"rank": 2}
    for size in (0, 7, 8, 100, len(data) - 1):
        path.write_bytes(data[:size])
        with fails(str(path)):
            opened(name, folder=folder / FILES.get(name, "."), **rank)


NAMES_ON_DISK = {"mlx": "adapters.safetensors", "diffusers": "pytorch_lora_weights.safetensors"}
KNOWN: dict = {}


def tried(name, w):
    """Loads a damaged adapter: a LoRAError that names its folder, or finite adapters."""
    golden = FOLDER / name
    if name not in KNOWN:
        params = tree(name, g.tensors(golden / "base.safetensors"))
        KNOWN[name] = params, lora.survey(uses, params, jnp.zeros((2,)))
    folder = Path(tempfile.mkdtemp())
    try:
        damage_work.write(w, folder)
        on_disk = NAMES_ON_DISK.get(name.partition("_")[0], FILES.get(name, TENSORS))
        if (folder / TENSORS).is_symlink() or (folder / TENSORS).exists():
            (folder / TENSORS).rename(folder / on_disk)
        with warnings.catch_warnings(), damage_outcome.limited(5):
            warnings.simplefilter("ignore", UserWarning)
            rank = {"rank": 2} if name in DELTAS else {}
            path = folder / FILES.get(name, ".")
            found = lora.peft.load(path, *KNOWN[name], **rank)
    except lora.LoRAError as e:
        return damage_outcome.problem_of(str(e), folder)
    finally:
        shutil.rmtree(folder)
    finite = all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found.adapters))
    return None if finite else "not finite"


@pytest.mark.parametrize("name", [*DELTAS, *EXACT])
def test_damaged_at_random(name):
    @examples(8)
    @given(damage.cases(f"../formats/{name}"))
    def run(case):
        _, damages, w = case
        problem = tried(name, w)
        assert problem is None, f"{damages}: {problem}"

    run()


def test_metadata_of_diffusers_that_is_damaged(tmp_path):
    from safetensors.numpy import save_file

    tensors = g.tensors(FOLDER / "diffusers" / "pytorch_lora_weights.safetensors")
    for text, match in (("{", "not the JSON"), ('{"unet.r": "x"}', "r: expected an integer")):
        path = tmp_path / "a.safetensors"
        save_file(dict(tensors), path, metadata={"lora_adapter_metadata": text})
        with fails(f"(?s)lora_adapter_metadata.*{match}"):
            opened("diffusers", folder=path)
