"""Every adapter leaf's sharding from its base's, in every form that a base can have."""

import dataclasses
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_close, examples, fails, noisy
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax._core.paths import flatten

KEY = jax.random.key(0)
MESH = jax.make_mesh((2, 4), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
SHAPES = {
    "dense": {"kernel": (16, 32), "bias": (32,)},
    "heads": {"kernel": (16, 4, 8)},
    "out": {"kernel": (4, 8, 16)},
    "experts": (8, 16, 32),
    "layers": {"kernel": (3, 16, 32)},
    "table": (24, 16),
}
SPECS = {
    "dense": {"kernel": P("fsdp", "tp"), "bias": P("tp")},
    "heads": {"kernel": P("fsdp", "tp")},
    "out": {"kernel": P("tp", None, "fsdp")},
    "experts": P("tp", "fsdp"),
    "layers": {"kernel": P(None, ("fsdp", "tp"))},
    "table": P("tp", "fsdp"),
}
is_shape = lambda x: isinstance(x, tuple)
ABSTRACT = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, "float32"), SHAPES, is_leaf=is_shape)
CONFIG = lora.LoRAConfig(
    rank=2,
    targets=["dense", "heads", "out", "experts", "layers"],
    rules=[
        lora.Rule("heads", in_axes=(0,), out_axes=(1, 2)),
        lora.Rule("out", in_axes=(0, 1), out_axes=(2,)),
        lora.Rule("experts", in_axes=(1,), out_axes=(2,), batch_axes=(0,)),
        lora.Rule("layers", in_axes=(1,), out_axes=(2,), batch_axes=(0,)),
    ],
    full="dense/bias",
    rows={"table": [3, 5, 7]},
)
TARGETS = lora.select(ABSTRACT, CONFIG)
ADAPTERS = jax.eval_shape(lambda p: lora.init(KEY, p, TARGETS), ABSTRACT)
WANT = {
    "dense": {"kernel": (P("fsdp", None), P(None, "tp")), "bias": (P("tp"),)},
    "heads": {"kernel": (P("fsdp", None), P(None, "tp", None))},
    "out": {"kernel": (P("tp", None, None), P(None, "fsdp"))},
    "experts": (P("tp", "fsdp", None), P("tp", None, None)),
    "layers": {"kernel": (P(None, ("fsdp", "tp"), None), P(None, None, None))},
    "table": (P(None, "fsdp"),),
}


def on(mesh, specs):
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs)


def leaves(tree):
    return jax.tree.leaves(tree)


def placed(specs=SPECS, mesh=MESH):
    """The base as arrays on the mesh."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), ABSTRACT)
    return jax.device_put(zeros, on(mesh, specs))


def as_structs():
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), ABSTRACT, on(MESH, SPECS)
    )


def boxed(cls=nn.Partitioned, **kwargs):
    return jax.tree.map(lambda x, s: cls(x, names=tuple(s), **kwargs), ABSTRACT, SPECS)


def variables():
    """An NNX state of parameters with names, on no device."""
    return nnx.State(
        jax.tree.map(
            lambda x, s: nnx.Param(x, out_sharding=tuple(s), eager_sharding=False), ABSTRACT, SPECS
        )
    )


FORMS = {
    "specs": (lambda: SPECS, {}),
    "specs on a mesh": (lambda: SPECS, {"mesh": MESH}),
    "shardings": (lambda: on(MESH, SPECS), {}),
    "arrays": (placed, {}),
    "arrays and their mesh": (placed, {"mesh": MESH}),
    "shapes": (as_structs, {}),
    "nn.Partitioned": (boxed, {"mesh": MESH}),
    "nn.Partitioned with a mesh": (lambda: boxed(mesh=MESH), {}),
    "nn.LogicallyPartitioned": (
        lambda: boxed(nn.LogicallyPartitioned),
        {"mesh": MESH, "rules": [("fsdp", "fsdp"), ("tp", "tp")]},
    ),
    "rules in the box": (
        lambda: boxed(nn.LogicallyPartitioned, rules=(("fsdp", "fsdp"), ("tp", "tp"))),
        {"mesh": MESH},
    ),
    "nnx.Param": (variables, {"mesh": MESH}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    """One base said in many ways: A like the inputs, B like the outputs, rank replicated."""
    make, kwargs = FORMS[form]
    for adapters in (ADAPTERS, TARGETS):
        got = lora.parallel.shardings(make(), adapters, **kwargs)
        assert jax.tree.structure(got) == jax.tree.structure(ADAPTERS)
        want = leaves(WANT)
        if form != "specs" and form != "nn.Partitioned without a mesh":
            assert {x.mesh for x in leaves(got)} == {MESH}
            got = jax.tree.map(lambda x: x.spec, got)
        assert leaves(got) == want


def test_names_without_a_mesh_are_specs():
    got = lora.parallel.shardings(boxed(), ADAPTERS)
    assert leaves(got) == leaves(WANT)


def test_logical_names():
    """Names of the model are mapped as Flax maps them, also in plain specs."""
    rules = [("embed", "fsdp"), ("mlp", ("tp",)), ("heads", "tp")]
    names = {"up": P("embed", "mlp"), "q": P("embed", "heads"), "odd": P("unknown", "embed")}
    params = {k: jax.ShapeDtypeStruct((16, 32), "float32") for k in names}
    adapters = lora.select(params, lora.LoRAConfig(rank=2, targets=list(params)))
    got = lora.parallel.shardings(names, adapters, mesh=MESH, rules=rules)
    got = jax.tree.map(lambda x: x.spec, got)
    assert (got["up"].a, got["up"].b) == (P("fsdp", None), P(None, ("tp",)))
    assert (got["q"].a, got["q"].b) == (P("fsdp", None), P(None, "tp"))
    assert (got["odd"].a, got["odd"].b) == (P(None, None), P(None, "fsdp"))


def test_a_module_that_is_sharded():
    with jax.set_mesh(MESH):
        init = nnx.with_partitioning(nnx.initializers.ones_init(), ("fsdp", "tp"))
        model = nnx.Linear(16, 32, kernel_init=init, rngs=nnx.Rngs(0))
    adapters = lora.init(KEY, model, lora.LoRAConfig(rank=2, targets="kernel"))
    for kwargs in ({}, {"mesh": MESH}):
        got = lora.parallel.shardings(model, adapters, **kwargs)["kernel"]
        assert (got.a, got.b) == (
            NamedSharding(MESH, P("fsdp", None)),
            NamedSharding(MESH, P(None, "tp")),
        )


def test_what_is_not_partitioned():
    """One device stays one device; None is replicated, unconstrained is replicated."""
    params = {"q": jnp.zeros((8, 8))}
    adapters = lora.init(KEY, params, lora.LoRAConfig(rank=2, targets="q"))
    got = lora.parallel.shardings(params, adapters)
    assert set(leaves(got)) == {params["q"].sharding}
    assert leaves(lora.parallel.shardings({"q": None}, adapters)) == [P(None, None)] * 2
    assert leaves(lora.parallel.shardings({"q": P(P.UNCONSTRAINED, "tp")}, adapters)) == [
        P(None, None),
        P(None, "tp"),
    ]
    state = jax.eval_shape(optax.adam(1e-3).init, adapters)
    assert set(leaves(lora.parallel.state_shardings(state, adapters, got))) == {
        params["q"].sharding
    }


def test_several_slices():
    """A mesh whose outer axis goes between slices: nothing about it is special."""
    mesh = jax.make_mesh((2, 2, 2), ("slice", "fsdp", "tp"), axis_types=(AxisType.Auto,) * 3)
    specs = {"q": P(("slice", "fsdp"), "tp")}
    adapters = lora.select(
        {"q": jax.ShapeDtypeStruct((16, 8), "float32")}, lora.LoRAConfig(rank=2, targets="q")
    )
    got = lora.parallel.shardings(specs, adapters, mesh=mesh)["q"]
    assert (got.a.spec, got.b.spec) == (P(("slice", "fsdp"), None), P(None, "tp"))


@given(data=st.data())
@examples(60)
def test_no_axis_is_lost_or_doubled(data):
    """Whatever axes a geometry has: each mesh axis of the base is in A, in B, or, on the stack, in
    both, at the axis that it divides in the base."""
    ndim = data.draw(st.integers(2, 5))
    part = data.draw(st.permutations(range(ndim)))
    i, o = sorted(data.draw(st.lists(st.integers(1, ndim - 1), min_size=2, max_size=2)))
    i, o = (i, o) if i < o else (i, ndim)
    g = lora.Geometry(tuple(part[:i]), tuple(part[i:o]), tuple(part[o:]))
    names = data.draw(st.permutations(["fsdp", "tp"] + [None] * ndim))[:ndim]
    shape = tuple(data.draw(st.sampled_from([8, 16])) for _ in range(ndim))
    node = lora.LoRA(
        *(jax.ShapeDtypeStruct(s, "float32") for s in g.factor_shapes(shape, 3)), 1.0, g
    )
    got = lora.parallel.shardings({"w": P(*names)}, {"w": node}, mesh=MESH)["w"]
    for dims, sharding in ((g.a_dims, got.a), (g.b_dims, got.b)):
        assert [names[d] if d >= 0 else None for d in dims] == list(sharding.spec)
    node = jax.tree.map(lambda x, s: jax.device_put(jnp.zeros(x.shape), s), node, got)  # they fit


def test_uneven():
    """By default an error with every axis; on request replicated, and reported."""
    params = {k: jax.ShapeDtypeStruct((14, 32), "float32") for k in ("q", "k")}
    adapters = lora.select(params, lora.LoRAConfig(rank=2, targets=["q", "k"]))
    specs = {"q": P("tp", "fsdp"), "k": P(("fsdp", "tp"), None)}
    with fails(
        r"'q/a' \(14, 2\): axis 0, of size 14, over 'tp', 4 devices[\s\S]*'k/a'.*8 devices|"
        r"'k/a' \(14, 2\)[\s\S]*'q/a' \(14, 2\): axis 0, of size 14, over 'tp', 4 devices"
    ):
        lora.parallel.shardings(specs, adapters, mesh=MESH)
    with pytest.warns(UserWarning, match=r"replicated:\n  - 'k/a' .*\n  - 'q/a' \(14, 2\)"):
        got = lora.parallel.shardings(specs, adapters, mesh=MESH, uneven="replicate")
    assert (got["q"].a.spec, got["q"].b.spec) == (P(None, None), P(None, "fsdp"))


@pytest.mark.parametrize("call, match", [
    (lambda: lora.parallel.shardings({"q": P("x")}, ADAPTERS), r"'dense/kernel': the base has no such leaf; nearest: q"),
    (lambda: lora.parallel.shardings({**SPECS, "experts": P("tp", "ep")}, ADAPTERS, mesh=MESH),
     r"'experts': P[a-zA-Z]*\('tp', 'ep'\) names ep; the mesh has fsdp, tp.*rules"),
    (lambda: lora.parallel.shardings(ABSTRACT, ADAPTERS), r"'dense/bias': a ShapeDtypeStruct without a sharding[\s\S]*'layers/kernel'"),
    (lambda: lora.parallel.shardings({**SPECS, "experts": P(None, None, None, "tp")}, ADAPTERS), r"'experts': .*has 4 axes, the leaf 3"),
    (lambda: lora.parallel.shardings(on(jax.make_mesh((8,), ("tp",), axis_types=(AxisType.Auto,)), jax.tree.map(lambda _: P(), SPECS)), ADAPTERS, mesh=MESH),
     "'dense/bias': is sharded as .*, and not over the mesh that was passed"),
    (lambda: lora.parallel.shardings({**SPECS, "experts": P("tp", "tp")}, ADAPTERS, mesh=MESH), "'experts': .* names an axis of the mesh twice"),
    (lambda: lora.parallel.shardings({**SPECS, "experts": ("tp", None)}, ADAPTERS, mesh=MESH), r"'experts': the base has a tree there; a PartitionSpec is written P\('fsdp', 'tp'\)"),
    (lambda: lora.parallel.shardings(SPECS, SPECS), "expected adapters or Targets, found a tree with a P[a-zA-Z]* at 'dense/bias'"),
    (lambda: lora.parallel.shardings({**SPECS, "experts": P(3)}, ADAPTERS, mesh=MESH), "'experts': P.*: 3 is no name of an axis"),
    *((lambda mesh=mesh, kind=kind: lora.parallel.shardings({**SPECS, "experts": P(None, "tp", **{kind: {"fsdp"}})}, ADAPTERS, mesh=mesh),
       rf"'experts': is {kind} along fsdp; expected .*reshard\(leaf, P[a-zA-Z]*\(None, 'tp'\)\)")
      for kind in ("unreduced", "reduced") for mesh in (MESH, None)),
    (lambda: lora.parallel.shardings(SPECS, ADAPTERS, mesh=(4, 2)), r"expected a mesh, found a tuple: .*mesh=jax.make_mesh"),
    *((lambda rules=rules: lora.parallel.shardings(SPECS, ADAPTERS, mesh=MESH, rules=rules), r"(?s)rules=.*: expected pairs .*rules=\[\('embed', 'fsdp'\)")
      for rules in ({"tp": "fsdp"}, "ab", 5, ["ab"], [None], [("a", 3)], [(["a"], "tp")], [("a", ["tp", 1])])),
    (lambda: lora.parallel.state_shardings(ADAPTERS, ADAPTERS, jax.tree.map(lambda _: "tp", ADAPTERS)), "the shardings are of another tree"),
    (lambda: lora.parallel.shardings(SPECS, ADAPTERS, uneven="drop"), "uneven='drop': expected 'error' or 'replicate'"),
    (lambda: lora.parallel.state_shardings(ADAPTERS, ADAPTERS, SPECS), "the shardings are of another tree"),
])  # fmt: skip
def test_errors(call, match):
    with fails(match):
        call()


OPTIMISERS = {
    "adam": optax.adam(1e-3),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-3, 10))),
    "lora_plus": lora.optim.lora_plus(optax.adamw, 1e-3),
    "partition": optax.partition(
        {"a": optax.adam(1e-3), "b": optax.sgd(1e-3, momentum=0.9), "rest": optax.set_to_zero()},
        lambda tree: jax.tree.map(lambda x: x if x in ("a", "b") else "rest", lora.optim.labels(tree)),
    ),
    "masked": optax.masked(optax.adam(1e-3), {"dense": True, "heads": False, "out": True, "experts": False, "layers": True, "table": False}),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-3), 4),
    "inject": optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_state_follows_its_leaf(name):
    """Whatever is as large as an adapter leaf is sharded as that leaf, and the rest replicated."""
    tx = OPTIMISERS[name]
    shardings = lora.parallel.shardings(SPECS, ADAPTERS, mesh=MESH)
    with jax.numpy_dtype_promotion("standard"):
        init = tx.init if name != "MultiSteps" else tx.gradient_transformation().init
        state = jax.eval_shape(init, ADAPTERS)
        got = lora.parallel.state_shardings(state, ADAPTERS, shardings)
        assert jax.tree.structure(got) == jax.tree.structure(state)
        flat = dict(jax.tree_util.tree_leaves_with_path(state))
        followed = 0
        for keys, sharding in jax.tree_util.tree_leaves_with_path(got):
            end = [
                (k, s)
                for k, s in jax.tree_util.tree_leaves_with_path(shardings)
                if keys[-len(k) :] == k
            ]
            want = end[0][1] if end else NamedSharding(MESH, P())
            followed += bool(end)
            assert sharding == want and (end or flat[keys].shape == ())
        assert followed >= 3
        made = jax.jit(init, out_shardings=got)(
            jax.tree.map(lambda x: jnp.zeros(x.shape), ADAPTERS)
        )
        assert [x.sharding for x in leaves(made)] == leaves(got)


def test_another_scale_is_the_same_leaf():
    """Moments of adapters whose scale changed, as after growing, are sharded as well."""
    shardings = lora.parallel.shardings(SPECS, ADAPTERS, mesh=MESH)
    other = jax.tree.map(lambda n: n, ADAPTERS)
    other["experts"] = dataclasses.replace(other["experts"], scale=9.0)
    got = lora.parallel.state_shardings(
        jax.eval_shape(optax.adam(1e-3).init, other), ADAPTERS, shardings
    )
    assert leaves(got[0].mu) == leaves(shardings)
    assert got[0].mu["experts"].scale == 9.0
    assert lora.parallel.state_shardings(optax.adam(1e-3).init({}), {}, {})[0].count == P()
    with fails(r"(?s)no part of the tree.*'0/mu/q': a LoRA of \(8, 8\)"):
        q = jax.eval_shape(
            lambda: lora.init(KEY, {"q": jnp.ones((8, 8))}, lora.LoRAConfig(rank=2, targets="q"))
        )
        lora.parallel.state_shardings(jax.eval_shape(optax.adam(1e-3).init, q), ADAPTERS, shardings)


def test_factored_moments_are_replicated():
    """Adafactor's rows and columns have no leaf's shape."""
    params = {"q": jax.ShapeDtypeStruct((256, 256), "float32")}
    adapters = jax.eval_shape(
        lambda: lora.init(KEY, params, lora.LoRAConfig(rank=160, targets="q"))
    )
    shardings = lora.parallel.shardings({"q": P("fsdp", "tp")}, adapters, mesh=MESH)
    with jax.numpy_dtype_promotion("standard"):
        state = jax.eval_shape(optax.adafactor(1e-3).init, adapters)
    got = lora.parallel.state_shardings(state, adapters, shardings)
    assert {s.spec for s in leaves(got)} == {P()}


GALORE = {  # the leaf's axes but for those that became the rank
    "dense": {"kernel": (P("fsdp", None), P(None, "tp"))},
    "heads": {"kernel": (P("fsdp", None, None), P(None, "tp", None))},
    "out": {"kernel": (P(None, None, "fsdp"), P("tp", None, None))},  # 32 × 16: taller than wide
    "experts": (P("tp", "fsdp", None), P("tp", None, None)),
    "layers": {"kernel": (P(None, ("fsdp", "tp"), None), P(None, None, None))},
}


def test_the_state_of_galore():
    """Projector and moments are split as their leaf is, and what plain Adam trains as well; three
    steps, with a new subspace in the third, are those of one device."""
    tx = lora.optim.galore(1e-2, rank=3, update_proj_gap=2, targets=TARGETS)
    where = on(MESH, SPECS)
    states = lora.parallel.state_shardings(jax.eval_shape(tx.init, ABSTRACT), ABSTRACT, where)
    own = states[0].inner_states["galore"].inner_state
    for path, (projector, moments) in flatten(GALORE, is_leaf=is_shape).items():
        found = [flatten(part)[path].spec for part in (own.projector, own.mu, own.nu)]
        assert found == [projector, moments, moments], path
    adam = states[0].inner_states["adam"].inner_state
    assert adam.mu["table"] == where["table"] and adam.count.spec == P()

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), ABSTRACT)
    grads = [noisy(zeros, i, scale=1.0) for i in range(3)]
    spread = [jax.device_put(g, where) for g in grads]
    with jax.numpy_dtype_promotion("standard"):
        update, one = jax.jit(tx.update), tx.init(zeros)
        many = jax.jit(tx.init, out_shardings=states)(zeros)
        shard = jax.jit(tx.update, out_shardings=(where, states)).lower(spread[0], many).compile()
        for alone, g in zip(grads, spread):
            want, one = update(alone, one)
            got, many = shard(g, many)
            assert_close(got, want, factor=1024)
    assert [x.sharding for x in leaves(many)] == leaves(states)
    # But for the branch with new subspaces, what travels are projections alone: n·r·k at most.
    text = shard.as_text()
    sent = re.findall(r"= (.*) (all-\w+|collective-\w+)\(", text[text.index("ENTRY") :])
    assert {kind for _, kind in sent} == {"all-reduce"}
    sizes = [math.prod(map(int, x.split(","))) for x in re.findall(r"\[([\d,]+)\]", str(sent))]
    assert max(sizes) == 3 * 3 * 32


def test_a_tree_that_also_holds_the_base():
    tree = {"params": ABSTRACT, "adapters": ADAPTERS}
    own = lora.parallel.shardings(SPECS, ADAPTERS, mesh=MESH)
    state = jax.eval_shape(lora.optim.trained_only(optax.adam(1e-3)).init, tree)
    got = lora.parallel.state_shardings(state, tree, {"params": on(MESH, SPECS), "adapters": own})
    assert [s for s in leaves(got) if s.spec != P()] == [
        s for s in leaves(own) + leaves(own) if s.spec != P()
    ]


@pytest.mark.parametrize("rank", [2, 5])
def test_init_sharded(rank):
    """Under jit with out_shardings the same values, and no leaf is ever whole on one device."""
    n = 1024
    params = {
        "q": jax.ShapeDtypeStruct(
            (n, n), "float32", sharding=NamedSharding(MESH, P(("fsdp", "tp"), None))
        )
    }
    targets = lora.select(params, lora.LoRAConfig(rank=rank, targets="q"))
    where = lora.parallel.shardings(params, targets)
    make = functools.partial(lora.init, params=params, config=targets)
    f = jax.jit(make, out_shardings=where)
    got = f(KEY)
    jax.tree.map(np.testing.assert_array_equal, got, make(KEY))
    assert [x.sharding for x in leaves(got)] == leaves(where)
    memory = f.lower(KEY).compile().memory_analysis()
    own = n * rank * 4 // 8 + n * rank * 4  # B is replicated here: its axis is not sharded
    assert memory.output_size_in_bytes <= 1.01 * own + 64
    assert memory.temp_size_in_bytes < n * rank * 4  # A whole would be this


def test_merge_keeps_the_shardings():
    params = placed()
    adapters = noisy(
        jax.jit(
            lambda p: lora.init(KEY, p, TARGETS),
            out_shardings=lora.parallel.shardings(params, TARGETS),
        )(params)
    )
    merged = lora.merge(params, adapters)
    assert [x.sharding for x in leaves(merged)] == [x.sharding for x in leaves(params)]
    alone = lora.merge(jax.device_get(params), jax.device_get(adapters))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, alone)
