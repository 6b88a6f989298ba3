"""The examples: their models against others' implementations, their readers against bad files."""

import ast
import hashlib
import http.server
import importlib.metadata
import json
import operator
import os
import re
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import classify
import fetch
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reporting
import reviews
import serve_swap
from common import assert_close, noisy
from models import bert
from models.convnet import ConvNet
from models.llama import Llama, LlamaConfig, empty_cache, generate, sample

import lora_jax as lora
from lora_jax._core.paths import nest
from lora_jax._nodes.node import is_node

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(p for p in EXAMPLES.glob("*.py") if "options(__doc__)" in p.read_text())


BENCHMARKS = EXAMPLES.parent / "benchmarks"


@pytest.mark.parametrize(
    "script", [*EXAMPLES.rglob("*.py"), *BENCHMARKS.rglob("*.py")], ids=lambda p: p.stem
)
def test_what_a_script_takes_from_another_is_there(script):
    """A script that takes minutes is run by no test: its imports at least are of what there is."""
    missing = []
    for node in ast.walk(ast.parse(script.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level or node.module is None:
            continue
        where = Path(*node.module.split(".")).with_suffix(".py")
        # as Python looks: beside the script first
        of = [f / where for f in (script.parent, BENCHMARKS, EXAMPLES) if (f / where).exists()]
        if of:
            body = ast.parse(of[0].read_text()).body
            there = {n for top in body for n in names_of(top)}
            missing += [f"{node.module}.{a.name}" for a in node.names if a.name not in there]
    assert not missing


def names_of(statement):
    """What a statement at the top of a module names."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in statement.names}
    return {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_short_and_say_what_to_expect(script):
    text = script.read_text()
    assert len(text.splitlines()) <= (200 if script.name == "train.py" else 150)  # the long one
    assert "Expected" in ast.get_docstring(ast.parse(text))
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--seed" in done.stdout


def test_odd_flags_are_refused_before_anything_runs(capsys):
    parser = reporting.options("A script.\n\nMore.")
    parser.add_argument("--steps", type=reporting.whole(10), default=3, help="of training")
    assert parser.parse_args(["--steps", "10"]).steps == 10
    assert "of training (default: 3)" in parser.format_help()
    for bad in ("0", "11", "x"):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(["--steps", bad])
        assert f"{bad}" in capsys.readouterr().err
    cluster = pytest.importorskip("cluster", reason="the examples extra has what it needs")
    for bad in ("data", "data=x", "data=8,", "model=8"):
        with pytest.raises(SystemExit, match="expected sizes of data, fsdp, tp"):
            cluster.make_mesh(bad)


def test_the_main_job_needs_its_extra_alone():
    """What `[examples]` has beyond `[quickstart]` is not imported."""
    extras = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())["project"]
    names = lambda extra: {
        re.match(r"[\w-]+", line)[0] for line in extras["optional-dependencies"][extra]
    }
    others = names("examples") - names("quickstart")
    found = importlib.metadata.packages_distributions()
    modules = [module for module, of in found.items() if others & set(of)]
    assert {"gguf", "matplotlib", "sklearn"} <= set(modules)
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({modules})); sys.argv[1:] = ['--help'];"
        "runpy.run_path('reviews_minilm.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=EXAMPLES, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.usefixtures("promotes")
def test_a_classifier_is_trained_saved_and_loaded(tmp_path, capsys):
    """The bar counts tokens, and says so while it compiles; PEFT's folder gives the same arrays."""
    config = bert.BertConfig(64, 16, 2, 4, 32, 12)
    ids, lengths = np.random.default_rng(0).integers(0, 64, (20, 12)), np.arange(20) % 12 + 1
    mask = (np.arange(12) < lengths[:, None]).astype(np.int32)
    batches = reviews.batches(ids, mask, ids[:, 0] % 2, 4, (6, 12))
    model = bert.Classifier(config)
    params = model.init(jax.random.key(0), *batches[0][:2])["params"]
    survey = lora.survey(model.apply, {"params": params}, *batches[0][:2])
    made = lora.LoRAConfig(rank=2, targets=["query", "value"], full="classifier")
    adapters = lora.init(jax.random.key(1), params, made, survey)
    apply = lora.adapt(model.apply)
    adapted = lambda params, ad, *x: apply({"params": lora.bind(params, ad)}, *x)
    arm = classify.Arm(adapters, adapted, lora.merge)
    trained = classify.fit("LoRA", arm, params, batches, 1e-2)
    assert len(trained.losses) == len(batches) == 5 and trained.tokens > 0
    said = capsys.readouterr().err
    assert "LoRA: compiling…:   0%" in said and f"LoRA: 100%|██████████| {lengths.sum()}/" in said

    mapping = bert.mapping(params, survey)
    lora.peft.save(tmp_path, trained.tree, mapping)
    loaded = lora.peft.load(tmp_path, params, survey, mapping=mapping).adapters
    jax.tree.map(np.testing.assert_array_equal, loaded, trained.tree)
    want = classify.predict("merged", model.apply, arm.finish(params, trained.tree), batches)
    got = classify.predict("loaded", apply, lora.bind(params, loaded), batches)
    np.testing.assert_array_equal(got, want)


@pytest.fixture
def promotes():
    """Others' models mix types."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("promotes")
@pytest.mark.filterwarnings("ignore")
def test_bert_is_that_of_transformers():
    transformers = pytest.importorskip("transformers", reason="no Flax models for this Python")
    config = bert.BertConfig(64, 16, 2, 4, 32, 12)
    theirs = transformers.FlaxBertModel(
        transformers.BertConfig(**{**vars(config), "hidden_act": "gelu"}), add_pooling_layer=False)  # fmt: skip
    flat = {}
    for path, x in jax.tree_util.tree_leaves_with_path(theirs.params):
        name = "/".join(k.key for k in path)
        name = name.replace("layer/", "layer_").replace("/self/", "/").replace("/dense", "")
        name = name.replace("output/LayerNorm", "LayerNorm")
        flat[name] = x + 0.1 * jax.random.normal(jax.random.key(len(name)), x.shape)
    _set_like(theirs, flat)
    ids = jax.random.randint(jax.random.key(0), (3, 12), 0, 64)
    mask = (jnp.arange(12) < jnp.array([12, 7, 3])[:, None]).astype(jnp.int32)
    got = bert.Bert(config).apply({"params": nest(flat)}, ids, mask)
    want = theirs(ids, mask).last_hidden_state
    real = mask[..., None].astype(bool)
    assert_close(jnp.where(real, got, 0), jnp.where(real, want, 0))


def _set_like(model, flat):
    """Gives a transformers model the same values, by the order of its own tree."""
    leaves = jax.tree_util.tree_leaves_with_path(model.params)
    model.params = jax.tree.unflatten(jax.tree.structure(model.params), list(flat.values()))
    assert len(leaves) == len(flat)


SMALL = LlamaConfig(vocab_size=50, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=4,
                    num_kv_heads=2, rope_theta=1e4)  # fmt: skip


def llama_params(config=SMALL):
    ids = jnp.zeros((1, 4), jnp.int32)
    return Llama(config).init(jax.random.key(0), ids)["params"]


@pytest.mark.slow
@pytest.mark.usefixtures("promotes")
@pytest.mark.filterwarnings("ignore")
def test_llama_is_that_of_transformers():
    transformers = pytest.importorskip("transformers", reason="no Flax models for this Python")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=SMALL.norm_eps, max_position_embeddings=32)  # fmt: skip
    theirs = transformers.FlaxLlamaForCausalLM(config)
    params = llama_params()
    layers = params["layers"]
    names = {"input_layernorm": "weight", "post_attention_layernorm": "weight"}

    def layer(i):
        one = jax.tree.map(lambda x: x[i], layers)
        return {k: {"weight": v["scale"]} if k in names else v for k, v in one.items()}

    model = {"embed_tokens": params["embed_tokens"], "norm": {"weight": params["norm"]["scale"]},
             "layers": {str(i): layer(i) for i in range(2)}}  # fmt: skip
    head = {"kernel": params["embed_tokens"]["embedding"].T}
    theirs.params = {"model": model, "lm_head": head}
    ids = jax.random.randint(jax.random.key(0), (3, 12), 0, 50)
    assert_close(Llama(SMALL).apply({"params": params}, ids), theirs(ids).logits, factor=256)


def test_llama_samples_and_adapts():
    params, ids = llama_params(), jnp.array([[1, 2, 3]])
    model = Llama(SMALL)
    out = generate(model.apply, params, ids, 5, jax.random.key(0), 1.0)
    assert out.shape == (1, 8) and np.array_equal(out[:, :3], ids)
    survey = lora.survey(model.apply, {"params": params}, ids)
    targets = lora.select(params, lora.LoRAConfig(rank=2), survey)
    assert len(targets) == 7 and all(t.geometry.batch_axes == (0,) for t in targets.lora.values())
    adapters = lora.init(jax.random.key(1), params, targets)
    adapted = lora.adapt(model.apply)  # it samples as it is
    same = generate(adapted, lora.bind(params, adapters), ids, 5, jax.random.key(0), 1.0)
    np.testing.assert_array_equal(same, out)


def test_llama_samples_through_a_cache_as_it_is_trained():
    """Adapted: each log-probability is that of the whole text at once; so is a prompt in parts."""
    params, ids = llama_params(), jnp.array([[1, 2, 3], [4, 5, 6]])
    model, n = Llama(SMALL), 5
    adapted = lora.adapt(model.apply)
    survey = lora.survey(model.apply, {"params": params}, ids)
    adapters = noisy(lora.init(jax.random.key(1), params, lora.LoRAConfig(rank=2), survey))
    bound = lora.bind(params, adapters)
    cache = empty_cache(SMALL, 2, 3 + n)
    new, logp = sample(adapted, bound, ids, cache, n, jax.random.key(0))
    assert new.shape == logp.shape == (2, n)
    whole = jnp.concatenate([ids, new], 1)
    logits = adapted({"params": bound}, whole)
    want = jnp.take_along_axis(jax.nn.log_softmax(logits[:, 2:-1]), new[..., None], -1)[..., 0]
    np.testing.assert_allclose(logp, want, atol=1e-5)
    first, cache = adapted({"params": bound}, whole[:, :4], cache=cache)
    rest, _ = adapted({"params": bound}, whole[:, 4:], cache=cache, start=4)
    assert_close(jnp.concatenate([first, rest], 1), logits)
    cold, _ = sample(adapted, bound, ids, cache, n, jax.random.key(0), 1e-6)
    greedy = generate(adapted, bound, ids, n, jax.random.key(0))
    np.testing.assert_array_equal(cold, greedy[:, 3:])


def test_convnet_surveys_every_kernel():
    model, x = ConvNet(), jnp.zeros((2, 8, 8, 1))
    variables = model.init(jax.random.key(0), x)
    survey = lora.survey(model.apply, variables, x)
    targets = lora.select(variables["params"], lora.LoRAConfig(rank=4), survey)
    assert {p.split("/")[0] for p in targets} == {"stem", "depthwise", "pointwise", "down"}
    assert targets.parameters == 3272


@pytest.mark.slow
@pytest.mark.usefixtures("promotes")
def test_a_sweep_is_its_solo_runs(monkeypatch):
    """Other ranks, alphas, rates and data in one step: each as alone, the padding still zero."""
    import sweep  # scikit-learn takes seconds

    settings = [sweep.SWEEP[i] for i in (4, 7)]
    model = sweep.Reader(width=16, layers=1)
    for name, value in dict(SWEEP=settings, model=model, adapted=lora.adapt(model.apply)).items():
        monkeypatch.setattr(sweep, name, value)
    params, firsts, streams, _ = sweep.data(0, 6, pretraining=1)
    many, state, rates, scales = sweep.start(firsts)
    together = jax.jit(jax.vmap(sweep.step, in_axes=(0, 0, None, 0, 0, 0)))
    batches = [np.stack(part, 1) for part in zip(*streams)]
    trained, losses = sweep.run(together, many, state, params, batches, rates, scales)
    for i, (setting, first) in enumerate(zip(settings, firsts)):
        start = first, sweep.init(first), params, streams[i]
        adapters, loss = sweep.run(jax.jit(sweep.step), *start, jnp.array(setting.rate))
        own = sweep.own(trained, i, first)
        # Adam divides by √v + 1e-8: what it makes of a gradient of that size is its rounding.
        assert_close(own, adapters, factor=1024)
        np.testing.assert_allclose(losses[i], loss, rtol=1e-5)
        moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), own, first)
        assert min(jax.tree.leaves(moved)) > 1e-4
        assert {n.scale for n in nodes(own)} == {setting.alpha / setting.rank}
        whole = jax.tree.map(operator.itemgetter(i), trained)
        count = lambda tree: sum(int(jnp.count_nonzero(x)) for x in jax.tree.leaves(tree))
        assert count(whole) == count(own) and max(n.rank for n in nodes(whole)) == 8
    assert together._cache_size() == 1


def nodes(adapters):
    return jax.tree.leaves(adapters, is_leaf=is_node)


def test_a_file_that_is_not_the_one_expected(tmp_path, monkeypatch):
    (tmp_path / "a.whl").write_bytes(b"tampered")

    def run(command, **kwargs):  # pip, delivering another file
        (Path(command[-1]) / "a.whl").write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    digest = hashlib.sha256(b"right").hexdigest()
    with pytest.raises(fetch.FetchError, match=f"(?s)a.whl of a==1 is not the file.*{digest}"):
        fetch.wheel("a==1", "a.whl", digest, tmp_path)
    assert (tmp_path / "a.whl").read_bytes() == b"tampered"  # nothing half-written
    assert [p.name for p in tmp_path.iterdir()] == ["a.whl"]
    (tmp_path / "a.whl").write_bytes(b"right")
    monkeypatch.setattr(fetch.subprocess, "run", None)  # offline
    assert fetch.wheel("a==1", "a.whl", digest, tmp_path) == tmp_path / "a.whl"


def test_a_failed_download(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "line one\nERROR: no network")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **k: failed)
    for get in (fetch.wheel, fetch.sdist):
        with pytest.raises(
            fetch.FetchError, match=r"(?s)could not be fetched.*no network.*pip download"
        ):
            get("a==1", "a.whl", "0" * 64, tmp_path)


def test_splits_share_no_text():
    rows = [(f"word{i} is {i % 7}", (-1) ** i * (i % 5) / 2) for i in range(200)]
    rows += [(t.upper() + " !", s) for t, s in rows[:50]]
    train, validation, test = reviews.splits(rows, seed=1, validation=30, test=40)
    texts = [{t.lower().rstrip(" !") for t, _ in part} for part in (train, validation, test)]
    assert (len(validation), len(test)) == (30, 40)
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    assert reviews.splits(rows, 1, 30, 40) == (train, validation, test)


def test_batches_fit_their_lengths():
    mask = np.arange(8) < np.arange(1, 9)[:, None]
    out = reviews.batches(np.ones((8, 8)), mask, np.arange(8), 2, (4, 8), np.random.default_rng(0))
    assert sorted(i for *_, labels in out for i in labels) == list(range(8))
    assert all(m.sum(1).max() <= m.shape[1] and x.shape == m.shape for x, m, _ in out)


# serve_swap.py wants a server: test_a_server_swaps_versions gives it one.
@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [p for p in SCRIPTS if p.name != "serve_swap.py"], ids=lambda p: p.name
)
def test_script_runs(script, tmp_path):
    """The real thing: downloads, minutes."""
    done = subprocess.run([sys.executable, script, *(["--out", str(tmp_path)] if "--out" in script.read_text() else [])],
                          capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


class Stub(http.server.BaseHTTPRequestHandler):
    """Answers as vLLM does: an adapter is loaded once, from a folder with PEFT's files, and has a name."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        loaded, name = self.server.loaded, body["lora_name"]
        status = 404
        if self.path == "/v1/load_lora_adapter":
            files = {p.name for p in Path(body["lora_path"]).iterdir()}
            good = {"adapter_config.json", "adapter_model.safetensors"} <= files
            status = 200 if good and name not in loaded and not self.server.full else 400
            if status == 200:
                loaded[name] = body["lora_path"]
        elif self.path == "/v1/unload_lora_adapter" and loaded.pop(name, None):
            status = 200
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"there is no room" if status == 400 else b"done")

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.loaded, server.full = {}, False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("promotes")
def test_a_server_swaps_versions(server, tmp_path, capsys, monkeypatch):
    """One version is served at any time after the first; what the server has is what was trained."""
    task = serve_swap.tasks.tiny(16, 0, tmp_path)
    adapters, first, last = serve_swap.train(task, 2, 0)
    monkeypatch.setattr(serve_swap, "train", lambda task, steps, seed: (adapters, first, last))
    monkeypatch.setattr(serve_swap.tasks, "tiny", lambda *args: task)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    run = [f"--server={url}", f"--folder={tmp_path}", "--name=tuned", "--steps=2"]
    serve_swap.main(run)
    assert "tuned-v1 is loaded\n" in capsys.readouterr().out and list(server.loaded) == ["tuned-v1"]
    server.full = True
    with pytest.raises(RuntimeError, match=r"load_lora_adapter .* 400: there is no room"):
        serve_swap.main(run)
    assert list(server.loaded) == ["tuned-v1"] and [p.name for p in tmp_path.iterdir()] == [
        "tuned-v1"
    ]
    server.full = False
    serve_swap.main(run)
    assert "tuned-v2 is loaded; tuned-v1 is unloaded" in capsys.readouterr().out
    mapping = serve_swap.mapping_of(task.params)
    survey = lora.survey(task.model.apply, {"params": task.params}, np.zeros((1, 8), np.int32))
    found = lora.peft.load(server.loaded["tuned-v2"], task.params, survey, mapping=mapping)
    want, got = (lora.merge(task.params, x) for x in (adapters, found.adapters))
    assert_close(got, want)
