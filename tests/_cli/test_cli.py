"""The command line: what it prints, what it writes, what it exits with."""

import io
import json
import math
import os
import re
import shlex
import subprocess
import sys

import golden_models as g
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from common import fails
from safetensors.numpy import save_file
from test_merge_files import EXPERTS, base_file, hf_folder, saved
from test_peft import MODELS, assert_same_tensors, changed, delta, pair, stored, written
from typer.main import get_command
from typer.testing import CliRunner

import lora_jax as lora
from lora_jax._cli import main as _cli
from lora_jax._cli import merge as _cli_merge
from lora_jax._cli.app import app
from lora_jax._cli.combine import combine_folders
from lora_jax._cli.convert import mapping_from_json, mapping_to_json, read_params
from lora_jax._cli.diff import diff_folders
from lora_jax._cli.merge import merge_files
from lora_jax._cli.terminal import merging, say
from lora_jax._cli.torch_adapter import norm, open_torch
from lora_jax._core.paths import flatten
from lora_jax._core.table import table


def run(*args, code=0):
    """stdout and stderr of a command that exits with `code`; a traceback is a failure."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.stdout if code == 0 or result.stdout else result.stderr


# The entry


def test_the_entry_of_a_process():
    """As a person runs it: stdout holds nothing but the answer, stderr nothing."""
    folder = os.path.dirname(os.path.dirname(lora.__file__))
    env = os.environ | {"PYTHONPATH": folder, "XLA_FLAGS": ""}
    args = [sys.executable, "-m", "lora_jax", "inspect", str(g.folder("mha")), "--json"]
    done = subprocess.run(args, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["parameters"] == 96


def test_usage():
    assert "merge" in run("--help") and run("-h") == run("--help")
    assert run("--version").strip() == lora.__version__
    run("inspect", code=2)
    run("nothing", code=2)
    run("combine", "out", "a", "--rank", "x", code=2)
    run("combine", "out", "a", "--dtype", "int8", code=2)
    run("combine", "out", "a", "--rank", "1", "--energy", "0.5", code=2)
    run("convert", "a", "b", "--to", "torch", code=2)


COMMANDS = get_command(app).commands

HELP = """
import sys
from lora_jax._cli.main import main
for args in {args}:
    sys.argv[1:] = args
    try:
        main()
    except SystemExit as e:
        assert not e.code, args
print("imported:", *{{"jax", "jaxlib", "numpy", "flax", "orbax", "optax"}} & {{*sys.modules}})
"""


def in_a_process(code, **env):
    folder = os.path.dirname(os.path.dirname(lora.__file__))
    env = os.environ | {"PYTHONPATH": folder, "COLUMNS": "200"} | env
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_help_does_not_wait_for_jax():
    """Nor do the version and what a shell asks for: none of them imports JAX or what uses it."""
    args = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    done = in_a_process(HELP.format(args=args))
    assert done.returncode == 0, done.stderr
    assert "Show what is in an adapter" in done.stdout
    assert done.stdout.splitlines()[-1] == "imported:"


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_examples_of_help(name):
    """Each is taken by the command that it is of."""
    command = COMMANDS[name] if name else get_command(app)
    title, *lines = command.epilog.split("\n\n")
    assert title == "Examples:" and lines and all(len(line) < 79 for line in lines)
    for line in lines:
        lora_jax, *args = shlex.split(line, comments=True)
        assert lora_jax == "lora-jax" and name in (None, args[0])
        if args[0] in COMMANDS and "--help" not in args:
            COMMANDS[args[0]].make_context(args[0], args[1:])


@pytest.mark.parametrize(
    "words, want",
    {
        "ins": "inspect",
        "combine --en": "--energy",
        "combine --method k": "knots",
        "convert --to o": "orbax",
        "": "inspect\nconvert\nmerge\ncombine\ndiff",
    }.items(),
)
def test_a_shell_completes(words, want):
    env = {"COMP_WORDS": f"lora-jax {words}", "COMP_CWORD": str(len(words.split()) or 1)}
    env["_LORA_JAX_COMPLETE"] = "complete_bash"
    done = in_a_process("from lora_jax._cli.main import main; main()", **env)
    assert (done.stdout.strip(), done.stderr) == (want, "")


@pytest.mark.parametrize("option", ["--show-completion", "--install-completion"])
def test_the_script_of_a_shell(tmp_path, option):
    """Shown, or written where the shell reads it. The shell is named, as none runs this test."""
    code = f"import sys; from lora_jax._cli.main import main; sys.argv[1:] = ['{option}', 'bash']; main()"
    env = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "HOME": str(tmp_path)}
    done = in_a_process(code, **env)
    assert (done.returncode, done.stderr) == (0, "")
    written = "".join(p.read_text() for p in tmp_path.rglob("*.sh"))
    script = done.stdout if option == "--show-completion" else written
    assert "complete -o default -F _lora_jax_completion lora-jax" in script


def test_without_typer(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as exit:
        _cli.main()
    assert exit.value.code == 1
    assert "pip install 'lora_jax[cli]'" in capsys.readouterr().err


# inspect


def rows(*args):
    found = json.loads(run("inspect", *args, "--json"))
    return {row["name"]: row for row in found["leaves"]}, found


@pytest.mark.parametrize("name", ["net_lora", "conv_lora", "mha", "moe_plain", "llama_bf16"])
def test_inspect_a_peft_folder(name, tmp_path):
    """Norms are those of the dense updates, bytes those of the file."""
    leaves, found = rows(g.folder(name))
    tensors = stored(g.folder(name))
    assert found["bytes"] == sum(x.nbytes for x in tensors.values())
    assert found["parameters"] == sum(x.size for x in tensors.values())
    zeros = {k: np.zeros(v.shape, "f4") for k, v in g.base(name).items()}
    experts = EXPERTS if name == "moe_plain" else None
    merge_files(saved(tmp_path / "base", zeros), g.folder(name), tmp_path / "out", experts=experts)
    dense = g.tensors(tmp_path / "out")
    want = sorted(
        np.linalg.norm(dense[n].astype("f8")) for n in dense if n in leaves or "experts." in n
    )
    norms = [r["norm"] if "norm" in r else np.linalg.norm(dense[n]) for n, r in leaves.items()]
    np.testing.assert_allclose(sorted(norms), want, rtol=1e-5)
    assert all(
        r["scale"] == pytest.approx(r["alpha"] / r["rank"])
        for n, r in leaves.items()
        if "rank" in r and name != "mha"
    )


def test_inspect_as_a_table():
    text = run("inspect", g.folder("net_lora"))
    lines = text.splitlines()
    assert lines[0].split() == [
        "name",
        "kind",
        "shape",
        "rank",
        "alpha",
        "scale",
        "norm",
        "dtype",
        "parameters",
        "bytes",
    ]
    assert ["emb.weight", "embedding", "(11,", "8)", "3", "5", "1.667"] == lines[3].split()[:7]
    assert "5 in all: 249 parameters, 996 bytes" in text and "modules_to_save=['head']" in text


def test_inspect_sorts_layers_by_number(tmp_path):
    tensors = pair("l.10.q", 4, 4) | pair("l.2.q", 4, 4)
    assert list(rows(written(tmp_path / "in", tensors))[0]) == ["l.2.q.weight", "l.10.q.weight"]


def checkpoint(folder, steps=(3, 7)):
    params = {"q": jnp.ones((6, 8)), "head": jnp.ones((8, 2))}
    config = lora.LoRAConfig(rank=2, alpha=6, targets="q", full="head")
    adapters = lora.init(jax.random.key(0), params, config)
    with ocp.CheckpointManager(folder) as manager:
        for step in steps:
            adapters["q"] = lora.LoRA(
                adapters["q"].a, jnp.full((2, 8), step, float), 3.0, lora.Geometry((0,), (1,))
            )
            lora.checkpoint.save(
                manager, step, adapters, base=params, config=config, metrics={"loss": 0.5}
            )
            manager.wait_until_finished()
    return params, adapters


def test_inspect_a_checkpoint(tmp_path):
    params, adapters = checkpoint(tmp_path / "run")
    leaves, found = rows(tmp_path / "run")
    assert found["step"] == 7 and found["metrics"] == {"loss": 0.5} and found["config"]["rank"] == 2
    assert (
        leaves["q"]["rank"] == 2
        and leaves["q"]["scale"] == 3.0
        and leaves["head"]["kind"] == "full"
    )
    want = np.linalg.norm(lora.merge(params, adapters)["q"] - params["q"])
    assert leaves["q"]["norm"] == pytest.approx(want, rel=1e-5)
    assert rows(tmp_path / "run" / "3")[1]["step"] == 3
    text = run("inspect", tmp_path / "run")
    assert "step: 7" in text and "base: leaves=2, parameters=64" in text


def test_inspect_a_runs_folder(tmp_path):
    """What is in it is named, to a depth; a folder that is itself something is shown, and says so."""
    checkpoint(tmp_path / "run" / "checkpoints")
    written(tmp_path / "run" / "out" / "best", pair("q", 6, 8))
    written(tmp_path / "run" / "a" / "b" / "c" / "deep", pair("q", 6, 8))
    text = run("inspect", tmp_path / "run", code=1)
    found = text.splitlines()[1:]
    at = tmp_path / "run" / "checkpoints"
    assert found[0] == f"  - {at}: checkpoints, of which {at / '7'} is the latest"
    assert found[1] == f"  - {tmp_path / 'run' / 'out' / 'best'}: an adapter" and len(found) == 2
    assert text.startswith(f"error: {tmp_path / 'run'}: it is no adapter itself; give the path")
    saved(tmp_path / "run" / "model.safetensors", {"q": np.ones((6, 8), "f4")})
    text, found = run("inspect", tmp_path / "run"), rows(tmp_path / "run")[1]
    assert f"in it: {at}: checkpoints" in text and {*found} == {
        "what", "files", "parameters", "bytes", "leaves",
    }  # fmt: skip


def shown(monkeypatch, width, *blocks):
    """What a person sees whose terminal is that wide, without its styles."""
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", str(width))
    say(*blocks)
    return re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())


def test_tables_at_a_terminal(monkeypatch):
    """Ruled, with all that the plain one has; names fold; plain where it is too narrow, or a text."""
    name = "base_model.layers.10.q_proj[x].weight"
    plain = table(("name", "shape", "rank"), [(name, (6, 4), 12), ("k", (6, 14), 4)])
    wide = shown(monkeypatch, 100, plain, "2 in all")
    assert wide != plain and "─" in wide and wide.rstrip().endswith("2 in all")
    assert [w.split() for w in plain.splitlines() if "--" not in w] == [
        w.split() for w in wide.splitlines()[:-1] if w.strip() and "─" not in w
    ]
    narrow = shown(monkeypatch, 60, plain)
    assert max(map(len, narrow.splitlines())) <= 60 and "(6, 14)" in narrow
    assert "".join(w.split()[0] for w in narrow.splitlines()[3:5]).startswith(name[:30])
    assert shown(monkeypatch, 30, plain) == plain + "\n"
    # Columns that are alike are said once where they are too many.
    many = table(
        ("name", "shape", "dtype", "rank"), [(name, (6, 4), "F32", 12), ("k", (6,), "F32", 12)]
    )
    narrow = shown(monkeypatch, 40, many)
    assert "each: dtype F32, rank 12" in narrow and narrow.count("F32") == 1 and "(6, 4)" in narrow
    assert "each:" not in shown(monkeypatch, 100, many)
    assert shown(monkeypatch, 100, "a\nb") == "a\nb\n"


def test_inspect_a_base(tmp_path):
    leaves, found = rows(base_file("mha"))
    assert found["what"] == "base" and leaves["attn.in_proj_weight"]["shape"] == [24, 8]
    folder = hf_folder(tmp_path / "hf", g.base("mha"))
    os.remove(folder / "adapter_config.json")
    assert rows(folder)[1]["parameters"] == found["parameters"]


def test_errors_are_the_librarys_text(tmp_path):
    assert "error: " in run("inspect", tmp_path / "no", code=1)
    file = g.folder("mha") / "adapter_model.safetensors"
    assert f"found: a file; its folder is {file.parent}" in run("inspect", file, code=1)
    folder = changed(tmp_path, "mha", {"later": 1})
    text = run("inspect", folder, code=1)
    assert "'later' is not a setting of PEFT" in text and "--ignore later" in text
    assert "2 in all" in run("inspect", folder, "--ignore", "later")


# merge


def test_merge(tmp_path):
    text = run(
        "merge",
        base_file("moe_plain"),
        g.folder("moe_plain"),
        tmp_path / "out",
        "--experts",
        "gate_up_proj,down_proj",
    )
    assert "3 tensors" in text
    assert "is there already" in run(
        "merge", base_file("mha"), g.folder("mha"), tmp_path / "out", code=1
    )
    folder = hf_folder(tmp_path / "hf", g.base("mha"))
    run("merge", folder, g.folder("mha"), tmp_path / "new", "--conv1d", "none")
    assert (tmp_path / "new" / "config.json").is_file()


def test_a_bar_of_a_merge(tmp_path, monkeypatch):
    """At a terminal: how many bytes, and which tensor; stdout is as without. In a log: nothing."""
    drawn = io.StringIO()
    for is_terminal in (True, False):
        monkeypatch.setattr(sys, "stderr", drawn if is_terminal else io.StringIO())
        monkeypatch.setattr(sys.stderr, "isatty", lambda t=is_terminal: t, raising=False)
        with merging() as (progress, shows):
            told = []
            starts = lambda *x, told=told, shows=shows: (told.append(x), shows(*x))
            args = (
                base_file("llama_default"),
                g.folder("llama_default"),
                tmp_path / f"{is_terminal}",
            )
            merge_files(*args, progress=progress, starts=starts)
        names = [f"model.layers.{i}.self_attn.{n}_proj.weight" for i in range(2) for n in "qv"]
        assert sorted(told, key=lambda x: x[1]) == told and {n for n, *_ in told} == {*names}
        assert [x[1:] for x in told] == [(i + 1, 4) for i in range(4)]
    assert "merging" in drawn.getvalue() and sys.stderr.getvalue() == ""


def test_ctrl_c(tmp_path, monkeypatch):
    def interrupted(params, adapters):
        raise KeyboardInterrupt

    monkeypatch.setattr(_cli_merge, "merge", interrupted)
    run("merge", base_file("mha"), g.folder("mha"), tmp_path / "out", code=130)
    assert not list(tmp_path.iterdir())


# convert


def params_file(path, name, separator="/"):
    flat = flatten(MODELS[name][1](name))
    save_file({k.replace("/", separator): np.ascontiguousarray(v) for k, v in flat.items()}, path)
    return path


@pytest.mark.parametrize("form", ["slashes", "manager"])
def test_convert_there_and_back(tmp_path, form):
    name = "llama_mts_lmhead"
    if form == "slashes":
        path = params_file(tmp_path / "params", name)
    else:
        path = tmp_path / "params"
        with ocp.CheckpointManager(path) as manager:
            manager.save(3, args=ocp.args.StandardSave(MODELS[name][1](name)))
    text = run("convert", g.folder(name), tmp_path / "run", "--params", path)
    assert "model/layers/{0,1}/self_attn/q_proj/kernel" in text, text
    found = lora.checkpoint.restore(tmp_path / "run", base=MODELS[name][1](name))
    assert found.step == 0 and found.data["peft"]["config"]["r"] == 4
    run("convert", tmp_path / "run", tmp_path / "back", "--to", "peft")
    assert_same_tensors(stored(tmp_path / "back"), stored(g.folder(name)))
    assert run("diff", g.folder(name), tmp_path / "back").startswith("equal: 6 parameters")


FUNCTION = """
import golden_models as g, lora_jax as lora

def both():
    params = g.{kind}_params("{name}")
    return params, lora.survey(g.{fn}, params, g.inputs("{name}")[0])

def alone():
    return both()[0]

def other():
    return {{"x": alone()}}
"""


@pytest.mark.parametrize("name", ["conv_lora", "mha"])
def test_convert_with_a_function_and_a_table(name, tmp_path, monkeypatch):
    """A survey for what is no matrix; a JSON table for names that differ; the golden output."""
    fn, make, table, tol = MODELS[name]
    source = FUNCTION.format(kind=name.partition("_")[0], fn=fn.__name__, name=name)
    (tmp_path / f"user_{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.json").write_text(json.dumps(table or {}))
    args = ["--params", f"user_{name}:both", *(["--mapping", "table.json"] if table else [])]
    text = run("convert", g.folder(name), "run", "--params", f"user_{name}:alone", code=1)
    assert "survey" in text if name == "conv_lora" else "attn/key/kernel" in text
    assert not (tmp_path / "run").exists()
    run("convert", g.folder(name), "run", *args)
    params, (x, _, want) = make(name), g.inputs(name)
    adapters = lora.checkpoint.restore("run", base=params).adapters
    got = jax.jit(fn)(lora.merge(params, adapters), x)
    np.testing.assert_allclose(got, want, atol=tol, rtol=0)
    run("convert", "run", "stored")  # the mapping is in the checkpoint
    run("convert", "run", "named", "--torch", base_file(name), *args)
    for out in ("stored", "named"):
        assert_same_tensors(stored(tmp_path / out), stored(g.folder(name)))
    assert "is of something else" in run(
        "convert", "run", "x", "--params", f"user_{name}:other", code=1
    )


def test_convert_a_checkpoint_of_training(tmp_path):
    adapters = checkpoint(tmp_path / "run")[1]
    assert "--torch model.safetensors" in run("convert", tmp_path / "run", tmp_path / "out", code=1)
    shapes = {"model.q.weight": [8, 6], "lm.weight": [2, 8], "model.norm.weight": [5]}
    table = {"model.q": "q", "lm": "head"}
    (tmp_path / "m.json").write_text(json.dumps(table | shapes))
    save_file({"q": np.ones((6, 8), "f4"), "head": np.ones((8, 2), "f4")}, tmp_path / "params")
    run(
        "convert",
        tmp_path / "run",
        tmp_path / "out",
        "--mapping",
        tmp_path / "m.json",
        "--params",
        tmp_path / "params",
    )
    got = stored(tmp_path / "out")
    np.testing.assert_array_equal(got["base_model.model.model.q.lora_A.weight"], adapters["q"].a.T)
    np.testing.assert_array_equal(got["base_model.model.lm.weight"], adapters["head"].value.T)


def test_convert_says_what_it_needs(tmp_path):
    folder, out = g.folder("llama_default"), tmp_path / "out"
    assert "--params is needed" in run("convert", folder, out, code=1)
    assert "in that form already" in run("convert", folder, out, "--to", "peft", code=1)
    assert "is a base model" in run("convert", base_file("mha"), out, code=1)
    for params, match in {
        "nowhere": "there is no such file",
        "nomodule:f": "No module named 'nomodule'",
        "json:nothing": "has no attribute 'nothing'",
        tmp_path: "holds no parameters",
    }.items():
        assert match in run("convert", folder, out, "--params", params, code=1)
    (tmp_path / "m.json").write_text("[")
    path = params_file(tmp_path / "params", "llama_default")
    args = ("--params", path, "--mapping", tmp_path / "m.json")
    assert "not the JSON" in run("convert", folder, out, *args, code=1)
    out.mkdir()
    assert "is there already" in run("convert", folder, out, "--params", path, code=1)
    assert not list(out.iterdir())


def test_a_mapping_in_json(tmp_path):
    name = "moe_plain"
    _, found = __import__("test_peft").loaded(name)
    again = mapping_from_json(json.loads(json.dumps(mapping_to_json(found.mapping))))
    assert again == found.mapping


def test_params_of_each_form(tmp_path):
    name = "net_lora"
    path = params_file(tmp_path / "dots", name, ".")
    want = jax.tree.map(jnp.shape, MODELS[name][1](name))
    assert jax.tree.map(jnp.shape, read_params(str(path))[0]) == want
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", MODELS[name][1](name))
    assert jax.tree.map(jnp.shape, read_params(str(tmp_path / "orbax"))[0]) == want


def test_params_of_a_sharded_folder(tmp_path):
    folder = hf_folder(tmp_path / "hf", g.base("net_lora"))
    tree, survey = read_params(str(folder))
    assert tree["lin"]["weight"].shape == (12, 8) and survey is None


# combine


@pytest.mark.parametrize("name", ["mha", "moe_plain"])
def test_two_halves_are_the_whole(name, tmp_path, monkeypatch):
    """The sum of an adapter's halves gives PEFT's outputs, exact, resized to its rank and uniform."""
    fn, make, _, tol = MODELS[name]
    x, _, want = g.inputs(name)
    folder, twice = g.folder(name), [0.25, 0.75]
    ranks = combine_folders(tmp_path / "sum", [folder] * 2, twice)
    resized = combine_folders(tmp_path / "low", [folder] * 2, twice, energy=1.0, uniform=True)
    for key, rank in open_torch(tmp_path / "sum").low_rank().items():
        assert rank.rank == max(
            2 * open_torch(folder).low_rank()[key].rank, 4 if name == "mha" else 0
        )
    assert max(resized.values()) < max(ranks.values())
    run_fn = jax.jit(fn)
    for out in ("sum", "low"):
        experts = EXPERTS if name == "moe_plain" else None
        merge_files(base_file(name), tmp_path / out, tmp_path / f"{out}.base", experts=experts)
        new = g.tensors(tmp_path / f"{out}.base")
        monkeypatch.setattr(g, "base", lambda name, new=new: new)
        np.testing.assert_allclose(run_fn(make(name), x), want, atol=4 * tol, rtol=0)


def test_combine(tmp_path):
    one, two = pair("m.q", 6, 4), pair("m.q", 6, 4, seed=1) | pair("m.v", 6, 5, seed=2)
    a = written(tmp_path / "a", one, task_type="CAUSAL_LM", base_model_name_or_path="base")
    b = written(tmp_path / "b:2", two, task_type="CAUSAL_LM")
    text = run("combine", tmp_path / "out", f"{a}:0.5", f"{b}:-2")
    assert "2 updates of rank 2–4" in text
    found = open_torch(tmp_path / "out")
    dense = {n: (x.scale * x.a @ x.b).T for n, x in found.low_rank().items()}
    want = 0.5 * delta(one, "m.q") - 2 * delta(two, "m.q")
    np.testing.assert_allclose(dense["m.q.weight"], want, atol=1e-5)
    np.testing.assert_allclose(dense["m.v.weight"], -2 * delta(two, "m.v"), atol=1e-5)
    config = found.file.config
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", None)
    run("combine", tmp_path / "r1", f"{a}:0.5", f"{b}:-2", "--rank", "1", "--dtype", "bf16")
    best = open_torch(tmp_path / "r1").low_rank()["m.q.weight"]
    values = np.linalg.svd(want, compute_uv=False)
    assert best.rank == 1 and norm(best) == pytest.approx(values[0], rel=0.02)
    assert stored(tmp_path / "r1")["base_model.model.m.q.lora_A.weight"].dtype == jnp.bfloat16
    run("combine", tmp_path / "plain", b)  # the name of a folder, not a weight
    np.testing.assert_allclose(
        norm(open_torch(tmp_path / "plain").low_rank()["m.v.weight"]),
        norm(open_torch(b).low_rank()["m.v.weight"]),
        rtol=1e-6,
    )
    run("combine", tmp_path / "energy", a, b, "--energy", "0.5")
    assert "is there already" in run("combine", tmp_path / "out", a, b, code=1)


def test_modules_without_a_parent_are_meant_alone(tmp_path):
    folder = written(tmp_path / "in", pair("lin", 4, 4), target_modules=["lin"])
    combine_folders(tmp_path / "out", [folder], [1.0])
    targets = open_torch(tmp_path / "out").config.targets
    assert "lin" in targets and "block.lin" not in targets


def test_what_cannot_be_combined_is_listed(tmp_path):
    text = run("combine", tmp_path / "out", g.folder("net_lora"), g.folder("net_bias_all"), code=1)
    for name in ("head.bias", "head.weight", "c1d.bias", "lin.bias"):
        assert f"'{name}' is saved in full" in text
    rows = {"emb.token_adapter.trainable_tokens_delta": np.ones((1, 4), "f4")}
    folder = written(tmp_path / "rows", rows, trainable_token_indices=[1])
    assert "'emb.weight' has new rows" in run("combine", tmp_path / "out", folder, code=1)
    old = changed(tmp_path, "moe_plain", {"peft_version": "0.18.1"})
    assert "lie otherwise before PEFT 0.19.1" in run("combine", tmp_path / "out", old, code=1)
    other = written(tmp_path / "other", pair("c1d", 5, 5))
    merged = run("combine", tmp_path / "out", g.folder("net_rslora_patterns"), other, code=1)
    assert "'c1d.weight'" in merged and "cannot be combined" in merged
    assert not (tmp_path / "out").exists()


def test_the_bases_table_is_kept(tmp_path):
    def folder(name, table):
        factors = {
            "emb.lora_embedding_A": np.ones((2, 8), "f4"),
            "emb.lora_embedding_B": np.ones((4, 2), "f4"),
        }
        return written(tmp_path / name, factors | {"emb.base_layer.weight": table})

    a, b, c = (folder(n, np.full((8, 4), v, "f4")) for n, v in (("a", 1), ("b", 1), ("c", 2)))
    run("combine", tmp_path / "out", a, b)
    np.testing.assert_array_equal(
        stored(tmp_path / "out")["base_model.model.emb.base_layer.weight"], np.ones((8, 4))
    )
    assert "the base's table, is another elsewhere" in run("combine", tmp_path / "no", a, c, code=1)


@pytest.mark.parametrize("method", ["ties", "dare", "knots"])
def test_soups(method, tmp_path):
    a, b = (written(tmp_path / n, pair("q", 6, 4, seed=i)) for i, n in enumerate("ab"))
    run("combine", tmp_path / "out", f"{a}:0.5", b, "--method", method, "--rank", 4,
        "--density", "0.5", "--seed", 3)  # fmt: skip
    trees = [open_torch(f).low_rank() for f in (a, b)]
    want = {
        "ties": lambda: lora.algebra.ties(trees, [0.5, 1], density=0.5, rank=4)[0],
        "dare": lambda: lora.algebra.dare(jax.random.key(3), trees, [0.5, 1], rate=0.5, rank=4)[0],
        "knots": lambda: lora.algebra.resize(lora.algebra.knots(trees, [0.5, 1], density=0.5), 4),
    }[method]()
    zeros = {"q.weight": jnp.zeros((4, 6))}
    got = lora.merge(zeros, open_torch(tmp_path / "out").low_rank())["q.weight"]
    np.testing.assert_allclose(got, lora.merge(zeros, want)["q.weight"], atol=1e-5)
    assert (
        np.abs(
            got - (0.5 * delta(pair("q", 6, 4), "q") + delta(pair("q", 6, 4, seed=1), "q"))
        ).max()
        > 0.1
    )


# DoRA


def test_dora_on_the_command_line(tmp_path):
    folder = g.folder("net_dora")
    leaves, found = rows(folder)
    assert leaves["lin.weight"]["kind"] == "linear, dora" and leaves["lin.weight"]["rank"] == 3
    assert leaves["lin.weight"]["norm"] is None  # the base's weight would be needed
    assert found["bytes"] == sum(x.nbytes for x in stored(folder).values())
    run("merge", base_file("net_dora"), folder, tmp_path / "merged")
    text = run("combine", tmp_path / "sum", folder, folder, code=1)
    assert "is a DoRA, whose change is no sum of updates" in text
    assert run("diff", folder, folder).startswith("equal: 3 parameters")
    key = "base_model.model.lin.lora_magnitude_vector"
    one = stored(folder)[key]
    other = changed(tmp_path, "net_dora", {}, {key: one + np.eye(1, 12, dtype="f4")[0]})
    found = diff_folders(folder, other)
    size = np.linalg.norm(one + np.eye(1, 12)[0])
    want = {"c1d.weight": 0, "emb.weight": 0, "lin.weight": 1 / max(size, np.linalg.norm(one))}
    assert found.distances == pytest.approx(want, rel=1e-6) and not found.equal
    plain = dict.fromkeys(k for k in stored(folder) if "magnitude" in k)
    plain = changed(tmp_path / "b", "net_dora", {"use_dora": False}, plain)
    assert math.isinf(diff_folders(folder, plain).distances["lin.weight"])


def test_convert_a_dora(tmp_path):
    name = "net_dora"
    path = params_file(tmp_path / "params", name)
    run("convert", g.folder(name), tmp_path / "run", "--params", path)
    leaves, _ = rows(tmp_path / "run")
    assert leaves["lin/kernel"]["kind"] == "dora" and leaves["lin/kernel"]["rank"] == 3
    run("convert", tmp_path / "run", tmp_path / "back")
    run(
        "convert",
        tmp_path / "run",
        tmp_path / "named",
        "--params",
        path,
        "--torch",
        base_file(name),
    )
    for out in ("back", "named"):
        assert_same_tensors(stored(tmp_path / out), stored(g.folder(name)))


# Experts


def test_convert_experts(tmp_path, monkeypatch):
    """The order of the parameters is asked for where neither shapes nor the file say it."""
    name, source = "moe_plain", EXPERTS_FUNCTION
    (tmp_path / "user_moe.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    args = ["--params", "user_moe:both"]
    assert "--experts gate_up_proj,down_proj" in run(
        "convert", g.folder(name), "run", *args, code=1
    )
    order = ["--experts", "gate_up_proj,down_proj"]
    run("convert", g.folder(name), "run", *args, *order)
    run("convert", "run", "back")
    text = run("convert", "run", "named", *args, "--torch", base_file(name), code=1)
    assert "depend on their order in the torch module" in text
    run("convert", "run", "named", *args, "--torch", base_file(name), *order)
    for out in ("back", "named"):
        assert_same_tensors(stored(tmp_path / out), stored(g.folder(name)))


EXPERTS_FUNCTION = """
import golden_models as g, lora_jax as lora
from test_peft import MODELS, survey

def both():
    params = g.moe_params("moe_plain")
    return params, survey("moe_plain", params, g.moe)
"""


def test_experts_whose_ranks_differ():
    """Which pair is whose follows from what the ranks divide, or is said to be unclear."""
    leaves, found = rows(g.folder("kind_gated_plain"))
    assert {r["rank"] for n, r in leaves.items() if "experts" in n} == {2, 4}
    assert found["unclear"] == []


def test_experts_that_are_unclear(tmp_path):
    tensors = pair("m", 4, 5, r=12) | pair("m.base_layer", 5, 4, r=12)
    settings = {"target_modules": [], "target_parameters": ["m.up", "m.down"]}
    folder = written(tmp_path / "a", tensors, alpha_pattern={"m.up": 3}, **settings)
    assert "which of its tensors are up and down the base says" in rows(folder)[1]["unclear"][0]
    text = run("combine", tmp_path / "out", folder, code=1)
    assert "the base says alone, and their ranks or alphas differ" in text


def test_the_sum_of_experts_whose_ranks_differ(tmp_path):
    """PEFT reads ranks by the parameters' names, and the tensors by their depth."""
    settings = {"target_modules": [], "peft_version": "0.21.2", "rank_pattern": {"m.a": 6}}
    settings["target_parameters"] = ["m.a", "m.b"]
    inner = pair("m.base_layer", 4, 5, r=18) | pair("m", 5, 4, r=12)
    outer = pair("m.base_layer", 4, 5, r=12) | pair("m", 5, 4, r=18)
    a, b = (written(tmp_path / n, t, r=4, **settings) for n, t in (("one", inner), ("two", outer)))
    run("combine", tmp_path / "sum", a, a)
    found = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    # 3 experts of rank 12 and 8.
    assert stored(tmp_path / "sum")["base_model.model.m.base_layer.lora_A.weight"].shape[0] == 36
    ranks = {"m.a": found["r"], "m.b": found["r"]} | found["rank_pattern"]
    assert ranks == {"m.a": 12, "m.b": 8}
    text = run("combine", tmp_path / "other", a, b, code=1)
    assert "'m': by their ranks its parameters stand in another order" in text


def test_a_sum_of_experts_of_unknown_ranks(tmp_path):
    flat = {k: v * (np.arange(len(v)) < 3)[:, None] for k, v in pair("m", 5, 4, r=12).items()}
    tensors = pair("m.base_layer", 4, 5, r=12) | flat
    settings = {"target_modules": [], "peft_version": "0.21.2", "r": 4}
    a = written(tmp_path / "a", tensors, target_parameters=["m.a", "m.b"], **settings)
    text = run("combine", tmp_path / "sum", a, "--energy", "0.9999", code=1)
    assert "the adapters do not say which of its tensors are whose" in text
    run("combine", tmp_path / "sum", a, "--energy", "0.9999", "--uniform")


# diff


def test_diff_exits_as_diff_does(tmp_path):
    same, other = g.folder("net_lora"), g.folder("net_bias_all")
    assert "equal: 4 parameters" in run("diff", other, other)
    text = run("diff", same, other, code=1)
    assert "head.bias: differs by up to" in text and "config: bias: None and 'all'" in text
    assert "in the first alone: c1d.weight, emb.weight, head.weight" in text
    run("diff", same, tmp_path, code=2)
    assert "compare adapters of one base" in run(
        "diff", g.folder("conv_lora"), written(tmp_path / "x", pair("conv", 5, 5)), code=2
    )


def test_diff_of_updates(tmp_path):
    one = pair("q", 6, 4)
    scaled = {k: v * (2.0 if "lora_A" in k else 0.5) for k, v in one.items()}
    noisy = {k: (v * (1.001 if "lora_B" in k else 1)).astype("f4") for k, v in one.items()}
    a, b, c = (written(tmp_path / n, t) for n, t in (("a", one), ("b", scaled), ("c", noisy)))
    assert diff_folders(a, b).distances["q.weight"] < 1e-7  # other factors, the same update
    found = json.loads(run("diff", a, c, "--json", code=1))
    assert found["distances"]["q.weight"] == pytest.approx(0.001 / 1.001, rel=1e-3)
    assert found["updates"]["q.weight"]["cosine"][0] == pytest.approx(1, abs=1e-5)
    run("diff", a, c, "--tolerance", "0.01")
    alpha = changed_config(tmp_path / "d", a, lora_alpha=8)
    text = run("diff", a, alpha, "--tolerance", "0.6", code=1)
    assert "config: lora_alpha: 4 and 8" in text
    order = changed_config(tmp_path / "e", a, target_modules=["q"], peft_version="0.1", bias="none")
    assert diff_folders(order, changed_config(tmp_path / "f", order, bias=None)).equal


def changed_config(out, folder, **config):
    tensors = {k.removeprefix("base_model.model."): v for k, v in stored(folder).items()}
    old = json.loads((folder / "adapter_config.json").read_text())
    return written(out, tensors, **(old | config))


def test_diff_of_kinds_that_do_not_compare(tmp_path):
    value = {"q.weight": np.ones((4, 6), "f4")}
    a = written(tmp_path / "a", pair("q", 6, 4))
    b = written(tmp_path / "b", value, modules_to_save=["q"])
    found = diff_folders(a, b)
    assert math.isinf(found.distances["q.weight"]) and not found.equal
    assert json.loads(run("diff", a, b, "--json", code=1))["distances"] == {"q.weight": None}
    with fails(r"has the shape .* in the first adapter and .* in the second"):
        diff_folders(
            b, written(tmp_path / "c", {"q.weight": np.ones((4, 5), "f4")}, modules_to_save=["q"])
        )
