"""What adapters learned: against dense changes in float64; and figures of models of many shapes."""

import base64
import dataclasses
import functools
import re
import struct
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from common import examples, fails, noisy, tolerance
from figures import apart
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

import lora_jax as lora
from lora_jax._core.paths import nest
from lora_jax.algebra._learned_cells import layer_of, short_names

KEY = jax.random.key(0)
GEOMETRIES = {  # (shape, batch, in, out)
    "dense": ((12, 20), (), (0,), (1,)),
    "heads": ((12, 4, 6), (), (0,), (1, 2)),
    "out of heads": ((4, 6, 12), (), (0, 1), (2,)),
    "conv": ((3, 3, 4, 8), (), (0, 1, 2), (3,)),
    "experts": ((5, 8, 10), (0,), (1,), (2,)),
    "scanned": ((8, 6, 10), (1,), (0,), (2,)),
    "scanned experts": ((3, 8, 2, 10), (2, 0), (1,), (3,)),
    "a narrow leaf": ((2, 9), (), (0,), (1,)),
}


def pair(shape, batch, inner, outer, rank=3, seed=0):
    """(base, node) of random values."""
    g = lora.Geometry(inner, outer, batch)
    rng = np.random.default_rng(seed)
    a, b, base = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in (*g.factor_shapes(shape, rank), shape)
    )
    return base, lora.LoRA(a, b, 1.5, g)


def dense(node):
    """ΔW in the shape of the leaf, in float64, by NumPy."""
    labels = lambda dims: [25 if d < 0 else d for d in dims]
    a, b = (np.asarray(x, np.float64) for x in (node.a, node.b))
    g = node.geometry
    return node.scale * np.einsum(a, labels(g.a_dims), b, labels(g.b_dims), range(len(node.shape)))


def weights(x, g):
    """(n, in, out) in float64."""
    x = np.asarray(x, np.float64)
    return x.transpose(*g.batch_axes, *g.in_axes, *g.out_axes).reshape(g.sizes(x.shape))


def assert_learned(base, node):
    c = lora.algebra.learned({"w": base}, {"w": node}).leaves["w"]
    delta, w = weights(dense(node), node.geometry), weights(base, node.geometry)
    s = np.linalg.svd(delta, compute_uv=False)[:, : min(node.rank, *delta.shape[1:])]
    assert c.stack == tuple(node.shape[d] for d in node.geometry.batch_axes)
    assert (c.kind, c.rank, c.singular_values.shape) == ("lora", node.rank, s.shape)
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance(jnp.float32))
    np.testing.assert_allclose(c.singular_values, s, rtol=0, atol=tolerance(jnp.float32) * s.max())
    close(c.norm, np.linalg.norm(delta, axis=(1, 2)))
    close(c.base_norm, np.linalg.norm(w, axis=(1, 2)))
    close(c.ratio, np.linalg.norm(delta, axis=(1, 2)) / np.linalg.norm(w, axis=(1, 2)))
    p = s / s.sum(-1, keepdims=True)
    close(c.effective_rank, np.exp(-np.sum(p * np.log(p), -1)), rtol=1e-4)
    close(c.stable_rank, np.sum(s**2, -1) / s[:, 0] ** 2)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_equals_the_dense_change(name):
    assert_learned(*pair(*GEOMETRIES[name]))


@examples(6)
@given(st.permutations(range(4)), st.integers(0, 2), st.integers(1, 4), st.data())
def test_equals_the_dense_change_of_any_geometry(order, batch, rank, data):
    inner = data.draw(st.integers(batch + 1, 3))
    axes = (tuple(order[:batch]), tuple(order[batch:inner]), tuple(order[inner:]))
    assert_learned(*pair((2, 3, 4, 5), *axes, rank=rank))


def test_of_a_base_in_low_precision():
    base, node = pair(*GEOMETRIES["experts"])
    assert_learned(base.astype(jnp.bfloat16), node)
    found = lora.algebra.learned({"w": base.astype(jnp.bfloat16)}, {"w": lora.Full(base)}).leaves[
        "w"
    ]
    want = np.linalg.norm(np.asarray(base - base.astype(jnp.bfloat16).astype(jnp.float32)))
    np.testing.assert_allclose(found.norm, [want], rtol=1e-5)


def diagonal(*values):
    """A node whose singular values are these."""
    s = jnp.array(values, jnp.float32)
    g = lora.Geometry((0,), (1,))
    return lora.LoRA(jnp.eye(12)[:, : len(s)], s[:, None] * jnp.eye(len(s), 12), 1.0, g)


@pytest.mark.parametrize("values, effective, stable", [
    ([2, 2, 2, 2], 4, 4),
    ([3], 1, 1),
    ([5, 0, 0, 0], 1, 1),
    ([1, 1, 0, 0, 0], 2, 2),
    ([3, 1], 4 / 3**0.75, 10 / 9),  # exp(-¾·ln ¾ - ¼·ln ¼) = 4/3^¾
    ([0, 0, 0], 0, 0),
])  # fmt: skip
def test_ranks_of_known_spectra(values, effective, stable):
    found = lora.algebra.learned(None, {"w": diagonal(*values)}).leaves["w"]
    np.testing.assert_allclose(found.effective_rank, [effective], rtol=1e-5)
    np.testing.assert_allclose(found.stable_rank, [stable], rtol=1e-5)
    assert found.rank == len(values)


def test_no_update_is_formed():
    """The leaf would have 2^40 parameters, were it dense."""
    n = 2**20
    node = lora.LoRA(jnp.ones((n, 1)), jnp.ones((1, n)), 1.0, lora.Geometry((0,), (1,)))
    found = lora.algebra.learned(
        {"w": jax.ShapeDtypeStruct((n, n), jnp.float32)}, {"w": node}
    ).leaves["w"]
    np.testing.assert_allclose(found.singular_values, [[n]], rtol=1e-4)
    assert found.ratio is None and found.base_norm is None


PARAMS = {
    "dense": {"kernel": jnp.ones((12, 20)), "bias": jnp.zeros(20)},
    "table": rand.normal(KEY, (9, 8)),
}


def others():
    config = lora.LoRAConfig(
        rank=2, targets="dense/kernel", full="dense/bias", rows={"table": [1, 3]}
    )
    return noisy(lora.init(KEY, PARAMS, config))


def test_what_is_trained_in_full_and_by_rows():
    """The change is value − base; of rows, of those alone. From zeros the ratio is infinite."""
    ad = others()
    found = lora.algebra.learned(PARAMS, ad)
    bias, rows = found.leaves["dense/bias"], found.leaves["table"]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    close(bias.norm, [np.linalg.norm(ad["dense"]["bias"].value)])
    assert (bias.kind, bias.rank, bias.singular_values, bias.effective_rank) == (
        "full",
        *[None] * 3,
    )
    assert np.isinf(bias.ratio).all()
    before = np.asarray(PARAMS["table"])[[1, 3]]
    change = np.asarray(ad["table"].value) - before
    close(rows.norm, [np.linalg.norm(change)])
    close(rows.ratio, [np.linalg.norm(change) / np.linalg.norm(before)])
    close(rows.singular_values, np.linalg.svd(change, compute_uv=False)[None], rtol=1e-4)
    assert (rows.kind, rows.rank) == ("rows", 2)
    same = lora.algebra.learned(PARAMS, {"dense": {"bias": lora.Full(PARAMS["dense"]["bias"])}})
    assert same.leaves["dense/bias"].ratio == 0


def test_without_the_base():
    abstract = jax.eval_shape(lambda: PARAMS)
    for params in (None, abstract):
        found = lora.algebra.learned(params, others())
        assert found.unknown == ("dense/bias", "table") and [*found.leaves] == ["dense/kernel"]
        assert found.leaves["dense/kernel"].ratio is None
        assert "not known without the base's values: dense/bias, table" in str(found)


def test_of_boxes_and_modules():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.normal(1.0), ("a", "b"))
            return nn.Dense(5, kernel_init=init, name="up")(x)

    boxed = Net().init(KEY, jnp.ones((1, 4)))["params"]
    module = nnx.Dict(up=nnx.Linear(4, 5, rngs=nnx.Rngs(0)))
    config = lora.LoRAConfig(rank=2, targets="up")
    ad = noisy(lora.init(KEY, boxed, config))
    kernels = (boxed["up"]["kernel"].value, module.up.kernel[...])
    for params, kernel in zip((boxed, module), kernels):
        found = lora.algebra.learned(params, ad).leaves["up/kernel"]
        np.testing.assert_allclose(found.base_norm, [np.linalg.norm(kernel)], rtol=1e-5)


def test_the_table_has_a_row_for_each_leaf():
    base, node = pair(*GEOMETRIES["experts"])
    text = str(lora.algebra.learned({"w": base, **PARAMS}, {"w": node, **others()}))
    lines = text.splitlines()
    assert len(lines) == 2 + 4
    row = next(line for line in lines if line.startswith("w "))
    c = lora.algebra.learned({"w": base}, {"w": node}).leaves["w"]
    assert row.split()[:4] == ["w", "lora", "5", "3"]
    for x in (c.norm.mean(), c.ratio.mean(), c.effective_rank.mean()):
        assert f"{float(f'{x:.4g}'):g}" in row


@pytest.mark.parametrize("call, match", [
    (lambda: lora.algebra.learned(None, PARAMS), "expected adapters, as from lora.init, found ArrayImpl"),
    (lambda: lora.algebra.learned(PARAMS, {}), r"expected adapters, found an empty tree: lora.algebra.learned\(params"),
    (lambda: lora.algebra.learned(others(), PARAMS), r"found adapters: lora.algebra.learned\(params, adapters\)"),
    (lambda: lora.algebra.learned({"dense": {"kernel": jnp.ones((3, 20)), "bias": jnp.ones(20)}}, others()),
     r"(?s)'dense/kernel': the leaf has shape \(3, 20\).*'table' is adapted, but the parameters have no such leaf"),
    (lambda: lora.algebra.learned(PARAMS, jax.eval_shape(others)), "in their values, found abstract ones"),
    (lambda: jax.jit(lambda ad: lora.algebra.learned(PARAMS, ad).leaves["table"].norm)(others()), "found traced ones: call lora.algebra.learned outside of jit"),
    (lambda: jax.jit(lambda p: lora.algebra.learned(p, others()).leaves["table"].norm)(PARAMS), "found traced ones"),
    (lambda: lora.algebra.learned(None, {"b": lora.Full(jnp.ones(2))}).plot(), r"(?s)nothing to plot: the changes of b are not known.*learned\(params, adapters\)"),
])  # fmt: skip
def test_errors(call, match):
    with fails(match):
        call()


# ---------------------------------------------------------------- figures
def square(i, n=8, rank=3):
    return dataclasses.replace(pair((n, n), (), (0,), (1,), rank=rank, seed=i)[1])


def unrolled(layers):
    names = [f"attn/{n}/kernel" for n in "qkvo"] + [
        f"mlp/{n}/kernel" for n in ("up", "gate", "down")
    ]
    return {f"model/layers_{i}/{n}": square(i) for i in range(layers) for n in names}


FIGURES = {
    "one leaf": {"w": square(0)},
    "no layers": {f"encoder/{n}/kernel": square(i) for i, n in enumerate("abcd")},
    "16 layers and a head": {**unrolled(16), "head/kernel": lora.Full(jnp.ones((8, 5)))},
    "scanned with experts": {
        "layers/moe": pair((3, 4, 8, 8), (0, 1), (2,), (3,))[1],
        "layers/q": pair((3, 8, 8), (0,), (1,), (2,))[1],
    },
    "a hundred targets": {f"{a}{b}": square(0, rank=1) for a in "abcdefghij" for b in "klmnopqrst"},
    "of other ranks": {"0/w": square(0, rank=1), "1/w": square(1, rank=20, n=24)},
    "nothing learned": {"w": diagonal(0, 0)},
    "no low rank": {"layers_0/b": lora.Full(jnp.ones(3)), "layers_1/b": lora.Full(jnp.ones(3))},
}


def learned_of(flat):
    base = nest({p: jnp.full(n.shape, 0.5) for p, n in flat.items()})
    return lora.algebra.learned(base, nest(flat))


def found(name):
    return learned_of(FIGURES[name])


def png_size(data):
    """Checks the whole of a PNG's chunks; (width, height)."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure(name, tmp_path):
    path = tmp_path / "learned.png"
    figure = found(name).plot(path)
    assert isinstance(figure, Figure)
    width, height = png_size(path.read_bytes())
    assert (width, height) == tuple((figure.get_size_inches() * figure.dpi).astype(int))
    assert 400 <= width <= 6000 and 300 <= height <= 5000
    assert [p.name for p in tmp_path.iterdir()] == ["learned.png"]
    apart(figure)
    ranks = [n.rank for n in FIGURES[name].values() if isinstance(n, lora.LoRA)]
    assert len(figure.axes) == (3 if ranks else 1)
    assert figure.axes[0].get_title(loc="left").startswith("‖ΔW‖ / ‖W‖")
    if ranks:
        assert f"(of {max(ranks)})" in figure.axes[1].get_title(loc="left")
    if "layers" in name and name != "no layers":
        assert figure.axes[len(ranks) and 1].get_xlabel() == "layer"


def test_numbers_stand_in_both_panels_or_in_none():
    """Columns are as wide as the panel with most rows lets them be: biases have no rank."""
    flat = {f"h_{i}/kernel": square(i % 2) for i in range(25)}
    flat |= {p.replace("kernel", "bias"): lora.Full(jnp.ones(8)) for p in flat}
    size, rank, _ = learned_of(flat).plot().axes
    assert rows(size)[0] == ["bias", "kernel"]
    digits = [t.get_text() for axes in (size, rank) for t in axes.texts if "." in t.get_text()]
    assert rank.images[0].get_array().size == 25 and not digits


def rows(axes):
    """The names beside the rows, the groups before them."""
    groups = [t.get_text() for t in axes.texts if t.get_ha() == "right"]
    return [t.get_text() for t in axes.get_yticklabels()], groups


def test_what_the_cells_show():
    """By layer and target: of experts √Σ‖ΔW‖² / √Σ‖W‖² and the mean of the effective ranks."""
    learned = found("scanned with experts")
    figure = learned.plot()
    sizes, ranks = (axes.images[0].get_array().filled(np.nan) for axes in figure.axes[:2])
    assert rows(figure.axes[0]) == (["moe", "q"], [])
    moe, q = learned.leaves["layers/moe"], learned.leaves["layers/q"]
    both = (moe.norm.reshape(3, 4), moe.base_norm.reshape(3, 4))
    want = [np.linalg.norm(x, axis=1) for x in both]
    np.testing.assert_allclose(sizes, np.stack([want[0] / want[1], q.ratio]), rtol=1e-5)
    mean = moe.effective_rank.reshape(3, 4).mean(1)
    np.testing.assert_allclose(ranks, np.stack([mean, q.effective_rank]), rtol=1e-5)
    lines = figure.axes[2].get_lines()
    assert len(lines) == 12 + 1 + 3 + 1  # a line a weight, and the medians
    np.testing.assert_allclose(
        lines[0].get_ydata(), moe.singular_values[0] / moe.singular_values[0, 0]
    )


def test_rows_and_layers_in_the_order_of_the_model():
    """Layer 2 stands before layer 10; each name once, what several begin with before them all."""
    names = ["attn/k", "attn/q", "experts_2", "experts_10", "mlp/up"]
    flat = {f"model/layers_{i}/{n}/kernel": square(i) for i in range(12) for n in names}
    flat |= {"head/kernel": lora.Full(jnp.ones((8, 5))), "model/norm/scale": lora.Full(jnp.ones(8))}
    figure = learned_of(flat).plot()
    size, rank, spectra = figure.axes
    layers = [t.get_text() for t in rank.get_xticklabels()]
    assert layers == [*map(str, range(12))] and not size.get_xticks().size
    layered = ["k", "q", "experts_2", "experts_10", "up"]
    assert rows(size) == ([*layered, "head", "scale"], ["attn", "mlp", "model/norm"])
    assert rows(rank) == (layered, ["attn", "mlp"])  # what is in full has no spectrum
    assert size.images[0].get_array().shape == (7, 12) and len(rank.images[0].get_array()) == 5
    # The head is one cell, with its one value.
    head = size.images[0].get_array()[5]
    assert len({*head.tolist()}) == 1 and [t.get_text() for t in size.texts].count("1") == 2
    assert [t.get_text() for t in spectra.get_legend().get_texts()] == [
        "attn/k", "attn/q", "experts_2", "experts_10", "mlp/up",
    ]  # fmt: skip
    apart(figure)


def test_scanned_or_not_the_figure_is_the_same():
    """Layers × 7 projections: the same cells, names and numbers."""
    names = [f"attn/{n}/kernel" for n in "qkvo"] + [
        f"mlp/{n}/kernel" for n in ("up", "down", "gate")
    ]
    stacks = {n: pair((6, 8, 8), (0,), (1,), (2,), seed=i)[1] for i, n in enumerate(names)}
    layer = lambda x, i: lora.LoRA(x.a[i], x.b[i], x.scale, lora.Geometry((0,), (1,)))
    scanned = {f"model/layers/{n}": x for n, x in stacks.items()}
    unrolled = {f"model/layers/{i}/{n}": layer(x, i) for n, x in stacks.items() for i in range(6)}
    one, other = (learned_of(x).plot() for x in (scanned, unrolled))
    for a, b in zip(one.axes[:2], other.axes[:2]):
        assert rows(a) == rows(b) == (["k", "o", "q", "v", "down", "gate", "up"], ["attn", "mlp"])
        assert a.images[0].get_array().shape == (7, 6)
        np.testing.assert_allclose(a.images[0].get_array(), b.images[0].get_array(), rtol=1e-5)
    apart(one)


@given(
    st.lists(
        st.lists(
            st.sampled_from(["layers_1", "h", "3", "q", "kernel"]), min_size=1, max_size=4
        ).map("/".join),
        min_size=1,
        max_size=8,
        unique=True,
    ),
    st.booleans(),
)
def test_names_stay_distinct(paths, stacked):
    targets = list(dict.fromkeys(layer_of(p, stacked)[0] for p in paths))
    layered = {layer_of(p, stacked)[0] for p in paths if layer_of(p, stacked)[1] is not None}
    names = short_names(targets, layered)
    assert len({*names}) == len(targets) == len(names) and all(names)
    for name, target in zip(names, targets):
        rest = iter(target.split("/"))
        assert all(part in rest for part in name.split("/"))  # some of its parts, in their order
    assert len({layer_of(p, stacked) for p in paths}) == len(paths)  # a cell each


def test_a_file_is_replaced_when_the_new_one_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "learned.png"
    path.write_bytes(b"old")

    def broken(self, new, *args, **kwargs):
        new.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as m:
        m.setattr(Figure, "savefig", broken)
        with pytest.raises(OSError, match="disk full"):
            found("one leaf").plot(path)
    assert path.read_bytes() == b"old" and len([*tmp_path.iterdir()]) == 1
    found("one leaf").plot(path)
    png_size(path.read_bytes())
    found("one leaf").plot(tmp_path / "learned.svg")
    assert "<svg" in (tmp_path / "learned.svg").read_text()


def test_nothing_global_changes():
    import matplotlib
    import matplotlib.pyplot as plt

    before, open_ = dict(matplotlib.rcParams), plt.get_fignums()
    found("no layers").plot()
    assert dict(matplotlib.rcParams) == before and plt.get_fignums() == open_


def test_in_a_notebook():
    learned = found("no layers")
    width, _ = png_size(learned._repr_png_())
    text = learned._repr_html_()
    assert str(learned).splitlines()[0] in text
    data = base64.b64decode(re.search(r'src="data:image/png;base64,([^"]+)"', text)[1])
    assert png_size(data)[0] == width


def test_without_matplotlib(monkeypatch):
    learned = found("one leaf")
    monkeypatch.delitem(sys.modules, "lora_jax.algebra._learned_plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with fails(r"a plot needs matplotlib: pip install 'lora_jax\[plot\]'"):
        learned.plot()
    assert learned._repr_png_() is None
    assert learned._repr_html_() == f"<pre>{learned}</pre>"


@pytest.mark.filterwarnings("ignore:The chararray class")  # treescope looks at numpy.char
def test_through_treescope():
    treescope = pytest.importorskip("treescope", reason="an extra of the documentation")
    ad = others()
    learned = lora.algebra.learned(PARAMS, ad)
    assert "LoRA(" in treescope.render_to_text(ad)
    assert "Change(" in treescope.render_to_text(learned)
    html = treescope.render_to_html(learned, compressed=False)
    assert "data:image/png;base64" in html  # it shows the figure beside the value


def test_a_quantised_base():
    """Beside what is read of it."""
    params = {"w": rand.normal(jax.random.key(0), (8, 64)), "t": jnp.ones((8, 64)) / 3}
    q = lora.quant.quantize(params, ["w", "t"], double=True)
    node = lora.LoRA(jnp.ones((8, 1)), jnp.ones((1, 64)), 1.0, lora.Geometry((0,), (1,)))
    adapters = {"w": node, "t": lora.Rows(jnp.ones((2, 64)), (1, 3), 8)}
    got, want = (
        lora.algebra.learned(q, adapters),
        lora.algebra.learned(lora.quant.dequantize(q), adapters),
    )
    for path in adapters:
        np.testing.assert_allclose(got.leaves[path].ratio, want.leaves[path].ratio, rtol=1e-6)


@pytest.mark.parametrize("method", ["dora", "vera"])
def test_what_adds_no_update_of_its_own(method):
    params = {"w": jnp.ones((8, 6))}
    config = lora.LoRAConfig(rank=2, targets="w")
    if method == "dora":
        adapters = lora.methods.dora(params, lora.init(jax.random.key(0), params, config))
    else:
        adapters, _ = lora.methods.init_vera(jax.random.key(0), params, config)
    for base in (params, None):
        with fails("'w' is a (DoRA|VeRA)"):
            lora.algebra.learned(base, adapters)
