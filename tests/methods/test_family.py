"""VeRA, LoRA-XS and AdaLoRA: each against its formula on dense weights, and their counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import rand
from common import GEOMETRIES, assert_close, fails, value_and_grad
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax._core.paths import flatten, map_with_path
from lora_jax._nodes.node import is_node

KEY = jax.random.key(0)


def adalora(*args):
    return lora.methods.init_adalora(*args), None


METHODS = {
    "vera": functools.partial(lora.methods.init_vera, rank=7),  # above the sides of some leaves
    "lora_xs": lora.methods.init_lora_xs,
    "adalora": adalora,
}
methods = pytest.mark.parametrize("method", METHODS)


def made(method, params, rules=(), survey=None, targets="w", **config):
    """What a method makes, with every array random: nothing is zero by accident, nor compiled."""
    config = lora.LoRAConfig(rank=2, alpha=3, targets=targets, rules=rules, **config)
    shapes = jax.eval_shape(lambda p: METHODS[method](KEY, p, config, survey), params)
    rng = np.random.default_rng(3)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape).astype(np.float32) / 2).astype(x.dtype)
    return jax.tree.map(draw, shapes)


def dense(xp, w, node, frozen):
    """The formula of the paper on one leaf, each weight of a stack by itself."""
    g = node.geometry
    n, i, o = g.sizes(w.shape)
    order = (*g.batch_axes, *g.in_axes, *g.out_axes)
    stack = lambda x, *shape: xp.reshape(x, (n, *shape))
    r = node.rank
    if isinstance(
        node, lora.methods.VeRA
    ):  # transposed, Λ_b B Λ_d A of the paper's kernel (out, in)
        a, b = frozen["a"][:i, :r].T, frozen["b"][:r, :o].T
        delta = xp.einsum("no,or,nr,ri->nio", stack(node.b, o), b, stack(node.d, r), a)
    elif isinstance(node, lora.methods.LoRAXS):
        a, b = stack(frozen.a, i, r), stack(frozen.b, r, o)
        delta = xp.einsum("nip,npq,nqo->nio", a, stack(node.r, r, r), b)
    else:
        p, q = stack(node.p, i, r), stack(node.q, r, o)
        delta = xp.einsum("nir,nr,nro->nio", p, stack(node.lam, r), q)
    out = stack(w.transpose(order), i, o) + node.scale * delta
    return out.reshape([w.shape[d] for d in order]).transpose(np.argsort(order))


def densely(params, adapters, frozen):
    """All leaves by the formula."""
    frozen = frozen if frozen is not None else {}
    shared = set(frozen) == {"a", "b"}
    flat = flatten(frozen, is_leaf=is_node)
    nodes = flatten(adapters, is_leaf=is_node)

    def leaf(path, w):
        of = frozen if shared else flat.get(path)
        return dense(jnp, w, nodes[path], of) if path in nodes else w

    return map_with_path(leaf, params)


def one_leaf(method, name):
    shape, g = GEOMETRIES[name]
    params = {"w": jnp.asarray(np.random.default_rng(1).normal(size=shape).astype(np.float32))}
    rule = lora.Rule("w", in_axes=g.in_axes, out_axes=g.out_axes, batch_axes=g.batch_axes)
    return params, *made(method, params, [rule])


@methods
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_formula(method, name):
    """By NumPy in fp64."""
    params, adapters, frozen = one_leaf(method, name)
    node = adapters["w"]
    of = {"vera": frozen, "lora_xs": frozen and frozen.get("w"), "adalora": None}[method]
    wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    want = dense(np, *map(wide, (params["w"], node, of)))
    plain = jax.jit(lora.methods.factors)(adapters, frozen)
    assert type(plain["w"]) is lora.LoRA and node.shape == params["w"].shape
    got = lora.merge(params, plain)["w"]
    assert_close(got, want.astype(np.float32))
    assert not np.allclose(got, params["w"], atol=1e-3)
    if name == "two stacks":
        assert_close(lora.methods.factors(adapters, frozen), plain)


@methods
@pytest.mark.parametrize("name", ["from heads", "stacked last", "two stacks"])
def test_sharded_along_the_axes_that_they_share(method, name):
    params, adapters, _ = one_leaf(method, name)
    names = P(*"abcd"[: params["w"].ndim])
    size = dict(zip(names, params["w"].shape))
    specs = lora.parallel.shardings({"w": names}, adapters)["w"]
    named = 0
    for x, spec in zip(jax.tree.leaves(adapters), jax.tree.leaves(specs)):
        assert len(spec) == x.ndim
        assert all(d is None or size[d] == n for d, n in zip(spec, x.shape))
        named += sum(d is not None for d in spec)
    batch = len(adapters["w"].geometry.batch_axes)
    others = params["w"].ndim - batch
    out = len(adapters["w"].geometry.out_axes)
    assert (
        named == {"vera": 2 * batch + out, "lora_xs": batch, "adalora": 3 * batch + others}[method]
    )


@methods
def test_initially_the_base(method):
    params = {"w": rand.normal(KEY, (6, 5))}
    adapters, frozen = METHODS[method](KEY, params, lora.LoRAConfig(rank=2, targets="w"))
    merged = lora.merge(params, lora.methods.factors(adapters, frozen))["w"]
    top = np.linalg.norm(params["w"], 2)
    assert np.abs(merged - params["w"]).max() <= {"lora_xs": 8 * 1e-5 * 4 * top}.get(method, 0)


@pytest.mark.parametrize("name", ["matrix", "experts", "stacked last", "convolution"])
def test_lora_xs_is_between_the_largest_singular_vectors(name):
    params, adapters, _ = one_leaf("lora_xs", name)
    g, w = adapters["w"].geometry, params["w"]
    rule = lora.Rule("w", in_axes=g.in_axes, out_axes=g.out_axes, batch_axes=g.batch_axes)
    config = lora.LoRAConfig(rank=2, targets="w", rules=[rule])
    f = lora.methods.init_lora_xs(KEY, params, config)[1]["w"]
    sizes = g.sizes(w.shape)
    flat = np.asarray(w, np.float64).transpose(*g.batch_axes, *g.in_axes, *g.out_axes)
    u, s, v = np.linalg.svd(flat.reshape(sizes), full_matrices=False)
    best = (u[:, :, :2] * s[:, None, :2]) @ v[:, :2]
    a, b = f.a.reshape(sizes[0], -1, 2), f.b.reshape(sizes[0], 2, -1)
    assert_close(a @ b, jnp.asarray(best, jnp.float32), factor=256)
    eye = np.broadcast_to(np.eye(2, dtype=np.float32), (sizes[0], 2, 2))
    assert_close(b @ b.mT, eye, factor=256)  # V's rows; so A is U·Σ
    assert (np.take_along_axis(np.asarray(a), np.abs(a).argmax(1)[:, None], 1) > 0).all()


def test_vera_is_shared_and_sliced():
    """PEFT: rows and columns of one A and one B, as large as the largest leaf."""
    params = {"q": jnp.ones((6, 9)), "v": jnp.ones((8, 3))}
    adapters, frozen = made("vera", params, targets=["q", "v"])
    assert (frozen["a"].shape, frozen["b"].shape) == ((8, 7), (7, 9))
    plain = lora.methods.factors(adapters, frozen)
    assert_close(plain["q"].a, frozen["a"][:6])
    assert_close(plain["v"].a, frozen["a"])
    assert_close(plain["v"].b, adapters["v"].d[:, None] * frozen["b"][:, :3] * adapters["v"].b)


def test_vera_starts_as_in_the_paper():
    """Section 3.2: b is zero, d is 0.1, A and B are He's, uniform: of variance 2 / fan-in."""
    config = lora.LoRAConfig(rank=2, targets="w")
    init = jax.jit(lambda w: lora.methods.init_vera(KEY, {"w": w}, config, rank=200))
    adapters, frozen = init(jnp.ones((300, 300)))
    assert np.all(adapters["w"].d == np.float32(0.1)) and not adapters["w"].b.any()
    for x, fan_in in ((frozen["a"], 300), (frozen["b"], 200)):
        assert np.abs(x).max() <= np.sqrt(6 / fan_in) and abs(np.var(x) * fan_in / 2 - 1) < 0.02
    again = init(jnp.zeros((300, 300)))[1]  # of the key and the leaves' shapes alone
    jax.tree.map(np.testing.assert_array_equal, again, frozen)


@methods
def test_gradients_are_those_of_the_formula(method):
    params = {"q": rand.normal(KEY, (6, 5)), "v": rand.normal(KEY, (5, 4))}
    fn = lambda p, x: jnp.tanh(x @ p["q"]) @ p["v"]
    x = rand.normal(KEY, (3, 6))
    adapters, frozen = made(method, params, targets=["q", "v"])
    ours = lambda ad: lora.adapt(fn)(lora.bind(params, lora.methods.factors(ad, frozen)), x)
    (got_grads, got), (grads, want) = (
        value_and_grad(run)(adapters)
        for run in (ours, lambda ad: fn(densely(params, ad, frozen), x))
    )
    assert_close(got, want)
    assert_close(got_grads, grads, factor=256)
    if frozen is not None:  # nothing flows to what is frozen
        loss = lambda f: jnp.sum(lora.methods.factors(adapters, f)["q"].b)
        assert not any(map(np.any, jax.tree.leaves(jax.grad(loss)(frozen))))


def test_vera_forms_no_gradient_of_what_is_shared():
    """The products of LoRA's step, but for that with the gradient of A: four of five."""
    params = {"w": jnp.ones((64, 64))}
    adapters, frozen = made("vera", params)
    x = jnp.ones((256, 64))
    fn = lora.adapt(lambda p, x: jnp.sin(x @ p["w"]).sum(), plan="factored")
    plain = lora.methods.factors(adapters, frozen)

    def flops(loss, ad):
        return jax.jit(jax.grad(loss)).lower(ad).compile().cost_analysis()["flops"]

    lora_step = flops(lambda ad: fn(lora.bind(params, ad), x), plain)
    vera_step = flops(
        lambda ad: fn(lora.bind(params, lora.methods.factors(ad, frozen)), x), adapters
    )
    assert lora_step - vera_step > 0.9 * (2 * 256 * 64 * 7)


def test_adalora_works_as_it_is():
    params = {"w": rand.normal(KEY, (6, 5))}
    adapters, _ = made("adalora", params, dropout=0.5)
    plain = lora.methods.factors(adapters)
    assert_close(lora.merge(params, adapters), lora.merge(params, plain))
    assert_close(lora.unmerge(lora.merge(params, adapters), adapters), params)
    fn, x = lora.adapt(lambda p, x: x @ p["w"]), jnp.ones((3, 6))
    for key in (None, KEY):  # its dropout is LoRA's
        got, want = (fn(lora.bind(params, ad, dropout_key=key), x) for ad in (adapters, plain))
        assert_close(got, want)
    assert not np.allclose(got, fn(lora.bind(params, plain), x))


@methods
def test_factors_are_for_all_that_takes_lora(method, tmp_path):
    params = {"w": {"kernel": rand.normal(KEY, (6, 5))}}
    adapters, frozen = made(method, params)
    plain = lora.methods.factors(adapters, frozen)
    delta = lora.merge(params, plain)["w"]["kernel"] - params["w"]["kernel"]
    twice = lora.merge(params, lora.algebra.combine([plain, plain]))["w"]["kernel"]
    assert_close(twice - params["w"]["kernel"], 2 * delta, factor=256)
    assert_close(lora.merge(params, lora.methods.dora(params, plain)), lora.merge(params, plain))
    chosen = lora.algebra.choose(lora.algebra.stack([plain]), 0)
    assert_close(lora.merge(params, chosen), lora.merge(params, plain))
    mapping = lora.peft.mapping({"w.weight": (5, 6)}, params)
    lora.peft.save(tmp_path, plain, mapping)
    back = lora.peft.load(tmp_path, params).adapters
    assert_close(lora.merge(params, back), lora.merge(params, plain))


@methods
def test_low_precision_and_leaves_in_full(method):
    """Adapters in bf16 stay so; leaves in full and by rows are as init makes them."""
    params = {"w": jnp.ones((6, 5)), "head": jnp.ones((5, 2)), "table": jnp.ones((4, 6))}
    kinds = dict(full="head", rows={"table": [1, 3]}, dtype=jnp.bfloat16)
    adapters, frozen = made(method, params, **kinds)
    assert {x.dtype.name for x in jax.tree.leaves((adapters, frozen))} == {"bfloat16"}
    plain = lora.methods.factors(adapters, frozen)
    assert {x.dtype.name for x in jax.tree.leaves(plain)} == {"bfloat16"}
    assert isinstance(plain["head"], lora.Full) and plain["table"] is adapters["table"]
    lora.merge(params, plain)


def abstract(config, layers, method=None, **shapes):
    """What of a tree of shapes is trained, counted without memory."""
    params = {
        f"layer_{i}": {n: {"kernel": jax.ShapeDtypeStruct(s, "float32")} for n, s in shapes.items()}
        for i in range(layers)
    }
    init = method or (lambda *args: lora.init(*args))
    made = jax.eval_shape(lambda p: init(KEY, p, config), params)
    return made[0] if isinstance(made, tuple) else made


def size(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def test_counts_of_the_papers():
    """VeRA: table 2 of arXiv:2310.11454, query and value; LoRA-XS: query, value and both outputs."""
    qv = lora.LoRAConfig(rank=1, targets=["query", "value"])
    vera = lambda rank: functools.partial(lora.methods.init_vera, rank=rank)
    base, large = (dict(query=(d, d), value=(d, d)) for d in (768, 1024))
    assert size(abstract(qv, 12, vera(1024), **base)) == 43_008
    assert size(abstract(qv, 24, vera(256), **large)) == 61_440
    shapes = large | dict(attention_output=(1024, 1024), output=(4096, 1024))
    for r in (4, 8, 12, 16, 20, 25):
        config = lora.LoRAConfig(rank=r, targets=list(shapes))
        assert size(abstract(config, 24, lora.methods.init_lora_xs, **shapes)) == 96 * r**2


def test_counts_of_llama():
    """Llama-3.2-3B: 28 layers of 3072, of which 8 heads of 128 are keys and values."""
    shapes = dict(q_proj=(3072, 3072), v_proj=(3072, 1024))
    config = lora.LoRAConfig(rank=32, targets=list(shapes))
    count = lambda *args: size(abstract(config, 28, *args, **shapes))
    assert count(lambda key, p, c: lora.methods.dora(p, lora.init(key, p, c))) == 9_289_728
    assert count(functools.partial(lora.methods.init_vera, rank=256)) == 129_024
    labels = lora.optim.labels(plain := abstract(config, 28, **shapes))
    parts = {k: 0 for k in set(jax.tree.leaves(labels))}
    for k, x in zip(jax.tree.leaves(labels), jax.tree.leaves(plain)):
        parts[k] += x.size
    assert parts["b"] == 3_670_016  # with A frozen
    wider = lora.LoRAConfig(rank=64, targets=list(shapes))
    assert size(abstract(wider, 28, lora.methods.init_adalora, **shapes)) == 18_353_664


@methods
def test_only_what_is_trained_is_in_the_tree(method):
    params = {"w": jnp.ones((6, 5)), "u": jnp.ones((4, 4))}
    adapters, _ = made(method, params)
    names = {"vera": ["vera_d", "vera_b"], "lora_xs": ["loraxs_r"],
             "adalora": ["adalora_p", "adalora_lam", "adalora_q"]}  # fmt: skip
    tree = {"params": params, "adapters": adapters}
    labels = lora.optim.labels(tree)
    assert jax.tree.leaves(labels["adapters"]) == names[method]
    for tx in (lora.optim.trained_only(optax.adamw(1e-2)), lora.optim.lora_plus(optax.adam, 1e-2)):
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = tx.update(jax.tree.map(jnp.ones_like, tree), tx.init(tree), tree)
        assert not any(map(np.any, jax.tree.leaves(updates["params"])))
        assert all(map(np.all, jax.tree.leaves(updates["adapters"])))


def of(method, call):
    params = {"w": rand.normal(KEY, (6, 5))}
    adapters, frozen = made(method, params)
    return call(params, adapters, frozen)


NO_FACTORS = r"no factors yet:\n.*'w' is a {}\n.*pass lora.methods.factors\(adapters, frozen\)"


@pytest.mark.parametrize(
    "method, call, match",
    [
        ("vera", lambda p, ad, _: lora.bind(p, ad),
         r"'w' is a VeRA\nlora.bind\(params, lora.methods.factors\(adapters, frozen\)\)"),
        ("lora_xs", lambda p, ad, _: lora.merge(p, ad),
         r"'w' is a LoRAXS\nlora.merge\(params, lora.methods.factors\(adapters, frozen\)\)"),
        ("vera", lambda p, ad, _: lora.unmerge(p, ad), r"lora.unmerge\(params, lora.methods.factors"),
        ("vera", lambda p, ad, _: lora.methods.factors(ad),
         r"'w' is a VeRA: expected its shared A and B: .*lora.methods.init_vera\(key, params, config\)"),
        ("vera", lambda p, ad, f: lora.methods.factors(ad, f | {"a": f["a"][:4]}),
         r"'w' .* a shared a of at least \(6, 7\), found \(4, 7\)"),
        ("vera", lambda p, ad, f: lora.methods.factors(ad, made("lora_xs", p)[1]), "expected its shared A"),
        ("lora_xs", lambda p, ad, _: lora.methods.factors(ad),
         "'w' is a LoRAXS: expected its singular vectors, found none: .*init_lora_xs"),
        ("lora_xs", lambda p, ad, f: lora.methods.factors(ad, {"w": made("lora_xs", {"w": p["w"].T})[1]["w"]}),
         r"expected singular vectors of \(\(6, 5\), 2"),
        ("vera", lambda p, ad, _: lora.bind({"w": p["w"].T}, ad),
         r"the leaf has shape \(5, 6\); expected b of \(6,\), found \(5,\)"),
        ("adalora", lambda p, ad, _: lora.bind(p, {"w": ad["w"].__class__(
            ad["w"].p, ad["w"].lam[:1], ad["w"].q, geometry=ad["w"].geometry)}),
         r"expected lam of \(2,\), found \(1,\)"),
        ("adalora", lambda p, ad, _: lora.bind({"w": p["w"].T}, ad), "expected p of"),
        ("adalora", lambda p, ad, _: lora.algebra.combine([ad, ad]), NO_FACTORS.format("AdaLoRA")),
        ("vera", lambda p, ad, _: lora.methods.dora(p, ad), NO_FACTORS.format("VeRA")),
        ("lora_xs", lambda p, ad, _: lora.algebra.stack([ad]), NO_FACTORS.format("LoRAXS")),
        ("vera", lambda p, ad, _: lora.algebra.ties([ad, ad], rank=1), "'w' is a VeRA; expected a LoRA"),
        ("vera", lambda p, ad, _: lora.peft.save(
            "x", ad, lora.peft.mapping({"w.weight": (5, 6)}, {"w": {"kernel": p["w"]}})),
         NO_FACTORS.format("VeRA")),
        ("vera", lambda p, *_: lora.methods.factors(p), "expected adapters, found a tree with a ArrayImpl at 'w'"),
        ("vera", lambda p, *_: lora.methods.init_vera(KEY, p, lora.LoRAConfig(targets="w", rank=1), rank=0),
         "rank=0: expected an integer"),
        ("vera", lambda p, *_: lora.methods.init_vera(KEY, p, {"rank": 3}), "expected a LoRAConfig or Targets, found dict"),
        ("lora_xs", lambda p, *_: lora.methods.init_lora_xs(
            KEY, {"w": jnp.ones((8, 4, 2))}, lora.LoRAConfig(rank=3, targets="w", rules=[
                lora.Rule("w", in_axes=(0,), out_axes=(2,), batch_axes=(1,))])), "rank 3"),
    ],
)  # fmt: skip
def test_errors(method, call, match):
    with fails(match):
        of(method, call)


def test_restored_into_another_kind(tmp_path):
    params = {"w": jnp.ones((6, 5))}
    adapters, _ = made("adalora", params)
    with ocp.CheckpointManager(tmp_path) as manager:
        lora.checkpoint.save(manager, 1, adapters, base=params)
        manager.wait_until_finished()
    with fails("kind adalora was saved, found lora"):
        lora.checkpoint.restore(tmp_path, lora.methods.factors(adapters), base=params)
