"""What a call is given, and what a stranger's folder may hold, is refused by name or taken as meant."""

import contextlib
import inspect
import itertools
import json
import os
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from common import fails
from safetensors.numpy import save_file
from test_peft import pair, written

import lora_jax as lora
from lora_jax.peft._experts import MAX_PAIRS

PARAMS = {"q": {"kernel": jnp.zeros((6, 4))}}


def base(folder, tensors, config=None):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


# A text where a list is meant, and types


@pytest.mark.parametrize(
    "arguments, match",
    [
        (
            {"ignore": "revision"},
            r"ignore='revision': expected a list of texts: ignore=\['revision'\]",
        ),
        ({"ignore": [3]}, r"ignore=\[3\]: expected a list of texts: ignore=\['name'\]"),
        ({"conv1d": "q"}, r"conv1d='q': expected a list of texts: conv1d=\['q'\]"),
        ({"conv1d": True}, "conv1d=True: expected a list"),
        ({"experts": "up"}, "experts='up': expected a list"),
        ({"dtype": "flaot32"}, "dtype='flaot32': expected a floating-point type"),
        ({"dtype": "int8"}, "dtype='int8': expected a floating-point type"),
        ({"mapping": {"q": "nope"}}, r":\n  - 'q.weight': no leaf 'nope'\nsay which leaf"),
        ({"mapping": {"q": []}}, r"mapping: 'q': \[\] is not a regular expression and a leaf"),
    ],
)
def test_arguments_of_load(tmp_path, arguments, match):
    """A text was taken for the list of its letters, of which "r" passes over another rank."""
    rank = 3 if "ignore" in arguments else 2
    folder = written(tmp_path / "a", pair("q", 6, 4, r=rank), r=2, rank_pattern={})
    with fails(match):
        lora.peft.load(folder, PARAMS, **arguments)


def test_groups_that_match_nothing_are_empty(tmp_path):
    folder = written(tmp_path / "a", pair("q", 6, 4))
    table = {r"(?P<first>no\.)?(?P<last>q)": "{first}{last}{1}/kernel"}
    assert lora.peft.load(folder, PARAMS, mapping=table).adapters["q"]["kernel"].rank == 2


def test_lists_of_names_of_the_other_calls(tmp_path):
    folder = base(tmp_path / "base", {"q.weight": np.ones((4, 6), "f4")})
    for call in (
        lambda **k: lora.peft.load_base(folder, PARAMS, **k),
        lambda **k: lora.peft.save_base(tmp_path / "new", PARAMS, like=folder, **k),
        lambda **k: lora.peft.mapping(folder, PARAMS, **k),
    ):
        with fails("conv1d='q': expected a list"):
            call(conv1d="q")
        with fails("ignore=3: expected a list"):
            call(ignore=3)
    with fails("experts='up': expected a list"):
        lora.peft.mapping(folder, PARAMS, experts="up")
    with fails("format=4: expected one of nf4"):
        lora.peft.load_base(folder, PARAMS, quantize=4)


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"uniform_rank": 2.5}, "uniform_rank=2.5: expected an integer >= 1"),
        ({"uniform_rank": "8"}, "uniform_rank='8': expected an integer >= 1"),
        ({"uniform_rank": -1}, "uniform_rank=-1: expected an integer >= 1"),
        ({"config": {"r": 99, "use_dora": True}}, "'r' follows.*\n.*'use_dora' follows"),
        ({"config": {"of": np.float32(1)}}, "config: expected settings that JSON can hold"),
        ({"config": {"of": float("nan")}}, "config: expected settings that JSON can hold"),
    ],
)
def test_arguments_of_save(tmp_path, arguments, match):
    """A rank that is none; a setting that the tensors do not have; one that no reader takes."""
    found = lora.peft.load(written(tmp_path / "a", pair("q", 6, 4)), PARAMS)
    with fails(match):
        lora.peft.save(tmp_path / "out", found.adapters, found.mapping, **arguments)
    assert not (tmp_path / "out").exists()


def test_a_warning_names_the_caller(tmp_path):
    folder = written(tmp_path / "a", pair("q", 6, 4), brand_new=False)
    with pytest.warns(UserWarning, match="passed over: 'brand_new'") as found:
        lora.peft.load(folder, PARAMS)
    assert found[0].filename == __file__


# Bases


def ia3(folder):
    return written(folder, {"q.ia3_l": np.full((4, 1), 2, "f4")}, peft_type="IA3")


def test_a_base_is_one_of_these_parameters(tmp_path):
    folder = ia3(tmp_path / "a")
    for wrong, match in (
        ({"q": {"kernel": jnp.ones((3, 4))}}, r"'q/kernel' \(3, 4\), but \(6, 4\) in `params`"),
        ({"z": {"kernel": jnp.ones((6, 4))}}, "it has none of their leaves"),
    ):
        with fails(f"base: expected parameters as `params`:\n  - {match}"):
            lora.peft.load(folder, PARAMS, energy=1.0, base=wrong)


def test_values_in_codes_are_asked_for_as_abstract_ones_are(tmp_path):
    params = {"q": {"kernel": jnp.ones((64, 64))}}
    coded = lora.quant.quantize(params, "q/kernel", "nf4")
    ones = np.full((64, 1), 2, "f4")
    folder = written(tmp_path / "a", {"q.ia3_l": ones}, peft_type="IA3")
    with fails(r"'q': 'q/kernel': .*pass values: lora.peft.load\(..., base=params\)"):
        lora.peft.load(folder, coded, rank=1)
    found = lora.peft.load(folder, coded, rank=1, base=params)
    node = found.adapters["q"]["kernel"]
    np.testing.assert_allclose(node.scale * node.a @ node.b, 1, atol=1e-6)


def test_rows_of_a_table_beside_a_head_in_codes(tmp_path):
    """The head cannot be the table's copy, and is not read as an array."""
    params = {"embed": {"embedding": jnp.ones((64, 32))}, "head": {"kernel": jnp.ones((32, 64))}}
    rows = {"embed.token_adapter.trainable_tokens_delta": np.ones((1, 32), "f4")}
    folder = written(tmp_path / "a", rows, trainable_token_indices=[3])
    with fails("'head/kernel' holds the values of 'embed/embedding'"):
        lora.peft.load(folder, params)
    coded = lora.quant.quantize(params, "head/kernel", "nf4")
    assert lora.peft.load(folder, coded).adapters["embed"]["embedding"].index == (3,)


# A stranger's folder


@pytest.mark.parametrize("name", ["adapter_config.json", "config.json", "index", "folder"])
def test_a_name_that_the_system_refuses(tmp_path, name):
    """A link of 300 letters: an error with the path, of whichever file it is."""
    if name == "folder":
        with fails("^a{300}: cannot be read"):
            lora.peft.load_base("a" * 300, PARAMS)
        return
    folder = base(tmp_path / "a", {"q.weight": np.ones((4, 6), "f4")})
    (folder / "model.safetensors").rename(folder / "adapters.safetensors")
    name = "model.safetensors.index.json" if name == "index" else name
    os.symlink("a" * 300, folder / name)
    load = lora.peft.load if name == "adapter_config.json" else lora.peft.load_base
    with fails(f"(?s){folder}.*cannot be read"):
        load(folder, PARAMS)


def test_a_link_to_no_config_is_no_folder_without_one(tmp_path):
    folder = base(tmp_path / "a", {"q.weight": np.ones((4, 6), "f4")})
    (folder / "config.json").symlink_to("nowhere")
    with fails("config.json: cannot be read"):
        lora.peft.load_base(folder, PARAMS)


def test_a_table_that_is_left_out_fills_no_head(tmp_path):
    """Loading took the head from it, and saving had no entry of it."""
    tensors = {"embed_tokens.weight": np.ones((8, 4), "f4"), "q.weight": np.ones((4, 6), "f4")}
    tied = {"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "tie_word_embeddings": True}
    folder = base(tmp_path / "a", tensors, tied)
    params = {**PARAMS, "lm_head": {"kernel": jnp.ones((4, 8))}}
    ignore = ["embed_tokens.*"]
    with fails("leaf 'lm_head/kernel' .*no tensor is it"):
        lora.peft.load_base(folder, params, ignore=ignore)
    with fails("leaf 'lm_head/kernel' .*no tensor is it"):
        lora.peft.save_base(tmp_path / "new", params, like=folder, ignore=ignore)


def test_the_way_on_names_tensors_as_the_file_does(tmp_path):
    tensors = {f"model.{n}.weight": np.ones((4, 6), "f4") for n in ("q", "extra")}
    folder = base(tmp_path / "a", tensors)
    with fails(r"ignore=\[r'model\\.extra\\.weight'\]"):
        lora.peft.load_base(folder, PARAMS, rename={r"^model\.": "net."})
    ignore = [r"model\.extra\.weight"]
    lora.peft.load_base(folder, PARAMS, rename={r"^model\.": "net."}, ignore=ignore)


def test_the_same_tensors_in_two_files_are_listed_in_their_order(tmp_path):
    folder, names = tmp_path / "a", [f"q{i}.weight" for i in range(9)]
    folder.mkdir()
    for file in "xy":
        save_file({n: np.ones((4, 6), "f4") for n in names}, folder / f"{file}.safetensors")
    index = {"weight_map": dict(zip(["a", "b"], ["x.safetensors", "y.safetensors"]))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with fails(".*".join([r"(?s)files do not belong together", *names])):
        lora.peft.load_base(folder, PARAMS)


def test_a_rotation_that_rounding_makes_singular(tmp_path):
    """1 + q is regular for every skew q, but for one so large that the 1 is lost."""
    large = np.array([[-1, -1, 2]], "f4") * 1e20
    folder = written(
        tmp_path / "a", {"q.oft_R.weight": large},
        peft_type="OFT", r=0, oft_block_size=3, use_cayley_neumann=False,
    )  # fmt: skip
    with fails("'q': its update cannot be computed: Singular matrix"):
        lora.peft.load(folder, {"q": {"kernel": jnp.ones((6, 4))}}, rank=2)


@pytest.mark.parametrize("neumann", [True, False])
@pytest.mark.parametrize("blocks", [1, 6])
def test_rotations_of_single_inputs_turn_nothing(tmp_path, blocks, neumann):
    """Where the block's size divides the inputs only as 1, PEFT stores (blocks, 0)."""
    none = np.zeros((blocks, 0), "f4")
    settings = {"peft_type": "OFT", "r": 0, "use_cayley_neumann": neumann}
    folder = written(tmp_path / "a", {"q.oft_R.weight": none}, **settings)
    node = lora.peft.load(folder, {"q": {"kernel": jnp.ones((6, 4))}}, rank=2).adapters
    np.testing.assert_array_equal(
        lora.merge({"q": {"kernel": jnp.ones((6, 4))}}, node)["q"]["kernel"], 1
    )


def test_the_rotated_features_of_a_table(tmp_path):
    """Of a table OFT turns what a look-up gives: table·R, R = (1 − q)(1 + q)⁻¹ for each block."""
    angles, table = np.array([[0.3], [-0.8]], "f4"), np.random.default_rng(0).normal(size=(5, 4))
    settings = {"peft_type": "OFT", "r": 0, "use_cayley_neumann": False}
    folder = written(tmp_path / "a", {"emb.oft_embedding_R.weight": angles}, **settings)
    params = {"emb": {"embedding": jnp.asarray(table, "f4")}}
    got = lora.merge(params, lora.peft.load(folder, params, rank=4).adapters)["emb"]["embedding"]
    want = np.concatenate(
        [
            part @ (np.eye(2) - q) @ np.linalg.inv(np.eye(2) + q)
            for part, (t,) in zip(np.split(table, 2, axis=1), angles)
            for q in [np.array([[0, t], [-t, 0]])]
        ],
        axis=1,
    )
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("tokens", [[[1], "a"], 3, [-1], [True], [1] * 1001])
def test_invocation_tokens_are_numbers(tmp_path, tokens):
    folder = written(tmp_path / "a", pair("q", 6, 4), alora_invocation_tokens=tokens)
    with fails("alora_invocation_tokens: expected at most 1000 token numbers"):
        lora.peft.load(folder, PARAMS, ignore=["alora_invocation_tokens"])


def test_what_is_printed_moves_no_cursor(tmp_path):
    name = "x\x1b[2J\ud800"
    folder = written(tmp_path / "a", pair("q", 6, 4), base_model_name_or_path=name)
    shown = str(lora.peft.load(folder, PARAMS))
    assert shown.isprintable() and r", of x\x1b[2J\ud800: 1 torch" in shown


@pytest.mark.parametrize("pairs", [MAX_PAIRS, MAX_PAIRS + 1])
def test_many_experts_of_one_name(tmp_path, pairs):
    """Parameters that all mean one leaf, and a last pair that fits none of them: as many look-ups
    as there are pairs and parameters, not one for each order of them."""
    cases = itertools.product(*[(c, c.upper()) for c in "upper"])
    names = ["".join(c) for c in itertools.islice(cases, pairs)]
    tensors = {}
    for i in range(pairs):
        module = "experts" + ".base_layer" * i
        tensors |= pair(module, 5 if i < pairs - 1 else 7, 4, r=6)
    settings = {"target_modules": [], "target_parameters": [f"experts.{n}" for n in names]}
    folder = written(tmp_path / "a", tensors, r=2, rank_pattern={}, **settings)
    params = {"experts": {"upper": jnp.zeros((3, 5, 4))}}
    fn = lambda p, x: jnp.einsum("etd,edf->etf", x, p["experts"]["upper"])
    survey = lora.survey(fn, params, jnp.ones((3, 2, 5)))
    many = f"{pairs} adapted parameters, but target_parameters has {pairs}"
    looked = lora.peft._find.Finder.expert
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora.peft._find.Finder, "expert", lambda *a: (calls.append(1), looked(*a))[1])
        with fails(many if pairs > MAX_PAIRS else "no leaves have these names and sizes"):
            lora.peft.load(folder, params, survey)
    assert len(calls) == (0 if pairs > MAX_PAIRS else 2 * pairs**2)


# Whatever an argument is

ODD = [3, -1, b"x", [1], [], {"x": "y"}, {1: 2}, object(), np.zeros(3), int, "\0", "x" * 5000, 10**30,
       {"q.weight": None}, {"q.weight": "ab"}, {3: (4, 6)}, {"q.weight": (-1, 2)}, complex(1, 1)]  # fmt: skip


@pytest.mark.parametrize("name", ["load", "save", "mapping", "load_base", "save_base"])
def test_whatever_an_argument_is(tmp_path, name, monkeypatch):
    """It is taken, or refused by a LoRAError; and nothing half written stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    params = {"q": {"kernel": jnp.zeros((6, 4))}}
    folder = written(tmp_path / "a", pair("q", 6, 4))
    save_file({"q.weight": np.zeros((4, 6), "f4")}, tmp_path / "base.safetensors")
    found = lora.peft.load(folder, params)
    given = {
        "load": {"folder": folder, "params": params},
        "save": {"folder": "new", "adapters": found.adapters, "mapping": found.mapping},
        "mapping": {"names": {"q.weight": (4, 6)}, "params": params},
        "load_base": {"folder": "base.safetensors", "params": params},
        "save_base": {"folder": "new", "params": params, "like": "base.safetensors"},
    }[name]
    call = getattr(lora.peft, name)
    for argument in inspect.signature(call).parameters:
        for value in ODD:
            with warnings.catch_warnings(), contextlib.suppress(lora.LoRAError):
                warnings.simplefilter("ignore")
                call(**{**given, argument: value})
            for path in tmp_path.glob("new"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not list(tmp_path.glob("*.partial"))
