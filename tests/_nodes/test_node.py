"""The protocol: every class of nodes keeps it, and so does one that nobody has heard of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from common import GEOMETRIES, assert_close, fails
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax._core.geometry import RANK
from lora_jax._nodes.node import array_names

KEY = jax.random.key(0)
R = 2


def static():
    return dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outer(lora.methods.Node):
    """u ⊗ v of a kernel (in, out), with all that a node may say of itself."""

    u: jax.Array  # (in,)
    v: jax.Array  # (out,)
    temper: float = static()

    shape = property(lora.methods.Node.spanned)
    dims = {"u": (0,), "v": (1,)}  # noqa: RUF012

    def factors(self, frozen=None):
        u = self.u * self.temper
        return lora.LoRA(u[:, None], self.v[None], 1.0, lora.Geometry((0,), (1,)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Least(lora.methods.Node):
    """Two coordinates in a frozen basis: what a node must say, and no more."""

    x: jax.Array  # (R,)
    shape: tuple[int, ...] = static()

    def factors(self, frozen=None):
        if not isinstance(frozen, lora.LoRA):
            raise lora.LoRAError("expected its basis")
        return dataclasses.replace(frozen, a=jax.lax.stop_gradient(frozen.a) * self.x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grown(lora.methods.Node):
    """No update that is added: each weight times exp(x)."""

    x: jax.Array  # ()
    shape: tuple[int, ...] = static()
    lost = "rescaled"

    def weight(self, base, path, key=None):
        return base * jnp.exp(self.x)


def draw(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32))


def made(kind, name):
    """(base, node, frozen) of a leaf of one of the GEOMETRIES."""
    shape, g = GEOMETRIES[name]
    a, b = map(lambda s: draw(*s), g.factor_shapes(shape, R))
    batch, out = ([shape[d] for d in axes] for axes in (g.batch_axes, g.out_axes))
    _, n_in, n_out = g.sizes(shape)
    plain = lora.LoRA(a, b, 0.5, g)
    node, frozen = {
        "LoRA": lambda: (plain, None),
        "DoRA": lambda: (plain.with_magnitude(draw(*batch, *out)), None),
        "Full": lambda: (lora.Full(draw(*shape)), None),
        "Rows": lambda: (lora.Rows(draw(2, *shape[1:]), (3, 1), shape[0]), None),
        "VeRA": lambda: (
            lora.methods.VeRA(draw(*batch, R), draw(*batch, *out), shape=shape, geometry=g),
            {"a": draw(n_in + 1, R), "b": draw(R + 1, n_out)},
        ),
        "LoRAXS": lambda: (
            lora.methods.LoRAXS(draw(*batch, R, R), shape=shape, geometry=g, scale=0.5),
            {"w": plain},
        ),
        "AdaLoRA": lambda: (lora.methods.AdaLoRA(a, draw(*batch, R), b, geometry=g), None),
        "Outer": lambda: (Outer(draw(shape[0]), draw(shape[1]), 0.5), None),
        "Least": lambda: (Least(draw(R), shape), {"w": plain}),
        "Grown": lambda: (Grown(jnp.float32(0.5), shape), None),
    }[kind]()
    return draw(*shape) + 1, node, frozen


ANY = ["LoRA", "DoRA", "Full", "VeRA", "LoRAXS", "AdaLoRA", "Least", "Grown"]
CASES = [(k, n) for k in ANY for n in ("matrix", "from heads", "two stacks")]
CASES += [("Rows", "matrix"), ("Outer", "matrix")]
every = pytest.mark.parametrize("kind, name", CASES)


@every
def test_it_knows_its_leaf(kind, name):
    """And no other, nor does it pass with an array of another size."""
    base, node, _ = made(kind, name)
    shape = base.shape
    assert node.shape == shape and node.misfit(shape) is None
    for other in (shape[::-1], (*shape, 3), shape[1:], (shape[0] + 1, *shape[1:])):
        if other != shape:
            assert node.misfit(other).startswith(f"the leaf has shape {other}")
    ranks = sum(d == RANK for dims in node.dims.values() for d in dims)
    for array, dims in node.dims.items():
        x = getattr(node, array)
        for axis, d in enumerate(dims):
            larger = jnp.concatenate([x, x], axis)
            if d != RANK or ranks > 1:
                assert "expected" in dataclasses.replace(node, **{array: larger}).misfit(shape)
        fewer = dataclasses.replace(node, **{array: x[0]})
        assert fewer.misfit(shape) is not None


@every
def test_merged_is_the_base_and_its_update(kind, name):
    base, node, frozen = made(kind, name)
    plain = lora.methods.factors({"w": node}, frozen)["w"]
    got = plain.merged(base)
    assert got.shape == base.shape and got.dtype == base.dtype
    assert not np.allclose(got, base, atol=1e-2)
    if kind == "Grown":
        return assert_close(got, base * np.exp(np.float32(0.5)))
    if kind == "Full":
        return assert_close(got, node.value)
    weight = plain.weight(base, "w")
    v = base + weight.delta()
    if kind == "DoRA":
        axes = node.geometry.in_axes
        m = jnp.expand_dims(node.magnitude, axes)  # batch and output axes are in order here
        v = m * v / jnp.sqrt(jnp.sum(v**2, axes, keepdims=True))
    assert_close(got, v, factor=256)
    if node.lost is None:
        assert_close(plain.merged(got, -1.0), base, factor=256)
    else:
        with fails(f"'w' was {node.lost}"):
            lora.unmerge({"w": base}, {"w": plain})


@every
def test_specs_and_labels_are_of_its_structure(kind, name):
    base, node, _ = made(kind, name)
    structure, size = jax.tree.structure(node), dict(zip("abcd", base.shape))
    specs, labels = node.specs(P(*"abcd"[: base.ndim])), node.labels()
    assert jax.tree.structure(specs) == jax.tree.structure(labels) == structure
    for x, spec in zip(jax.tree.leaves(node), jax.tree.leaves(specs)):
        assert len(spec) in (0, x.ndim)
        assert all(d is None or size[d] == n for d, n in zip(spec, x.shape))
    names = jax.tree.leaves(labels)
    assert len(set(names)) == len(names) == len(array_names(node))
    assert all(isinstance(n, str) for n in names) and "frozen" not in names
    masked = dataclasses.replace(node, **{array_names(node)[0]: optax.MaskedNode()})
    assert set(jax.tree.leaves(masked.labels())) <= set(names)  # as under `optax.partition`


@every
def test_factors_are_the_same_update(kind, name):
    base, node, frozen = made(kind, name)
    params, adapters = {"w": base}, {"w": node}
    plain = lora.methods.factors(adapters, frozen)
    assert lora.methods.factors(plain, frozen)["w"] is plain["w"]
    own = type(node).factors is lora.methods.Node.factors
    assert (plain["w"] is node) == own
    if frozen is None:
        assert_close(lora.merge(params, adapters), lora.merge(params, plain))
        assert_close(node.merged(base), plain["w"].merged(base))
        return
    for call in (lora.bind, lora.merge):
        with fails(rf"'w' is a {kind}\nlora.{call.__name__}\(params, lora.methods.factors"):
            call(params, adapters)
    with fails(f"'w' is a {kind}: expected its"):
        lora.methods.factors(adapters)


@pytest.mark.parametrize("kind", dict(CASES))
def test_a_checkpoint_brings_it_back(kind, tmp_path):
    """The class comes from what is passed, shapes here; of the library's own nothing need be."""
    base, node, _ = made(kind, "matrix")
    params, adapters = {"w": base}, {"w": node}
    with ocp.CheckpointManager(tmp_path) as manager:
        assert lora.checkpoint.save(manager, 1, adapters, base=params)
        manager.wait_until_finished()
        shapes = jax.eval_shape(lambda: adapters)
        found = lora.checkpoint.restore(manager, shapes, base=params).adapters
        jax.tree.map(np.testing.assert_array_equal, found, adapters)
        assert jax.tree.structure(found) == jax.tree.structure(adapters)
        other = lora.Full(base) if kind != "Full" else Grown(jnp.float32(0), base.shape)
        with fails(f"kind {kind.lower()} was saved, found {type(other).__name__.lower()}"):
            lora.checkpoint.restore(manager, {"w": other}, base=params)
        if kind in ("Outer", "Least", "Grown"):
            with fails(rf"not the library's own:\n.*'w' is a {kind.lower()}\npass adapters like"):
                lora.checkpoint.restore(manager, base=params)
        else:
            found = lora.checkpoint.restore(manager, base=params).adapters
            jax.tree.map(np.testing.assert_array_equal, found, adapters)


# ---------------------------------------------------------------- a node of the user's own


PARAMS = {"up": draw(6, 5), "down": draw(5, 4), "bias": draw(4)}
OWN = {
    "up": Outer(draw(6), draw(5), 0.5),
    "down": Grown(jnp.float32(0.1), (5, 4)),
    "bias": lora.Full(draw(4)),
}
OUTER = {"up": OWN["up"]}


def fn(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"] + p["bias"]


def dense(adapters):
    """The formulas, by hand."""
    up, down = adapters["up"], adapters["down"]
    return {
        "up": PARAMS["up"] + up.temper * jnp.outer(up.u, up.v),
        "down": PARAMS["down"] * jnp.exp(down.x),
        "bias": adapters["bias"].value,
    }


def test_the_transform_and_its_gradient():
    x = draw(3, 6)
    ours = lambda ad: jnp.sum(jnp.sin(lora.adapt(fn)(lora.bind(PARAMS, ad), x)))
    theirs = lambda ad: jnp.sum(jnp.sin(fn(dense(ad), x)))
    assert_close(*(jax.jit(jax.value_and_grad(f))(OWN) for f in (ours, theirs)), factor=256)
    assert_close(lora.merge(PARAMS, OWN), dense(OWN))
    assert_close(lora.unmerge(lora.merge(PARAMS, OUTER), OUTER), PARAMS)
    with fails(r"(?s)'bias' was trained in full.*'down' was rescaled"):
        lora.unmerge(PARAMS, OWN)


def test_a_frozen_tree_of_nodes_and_one_that_all_share():
    basis = lora.LoRA(draw(6, R), draw(R, 5), 0.5, lora.Geometry((0,), (1,)))
    adapters = {"up": Least(draw(R), (6, 5))}
    want = PARAMS["up"] + 0.5 * (basis.a * adapters["up"].x) @ basis.b
    plain = lora.methods.factors(adapters, {"up": basis})
    assert_close(lora.merge(PARAMS, plain)["up"], want)
    with fails("'up' is a Least: expected its basis"):
        lora.methods.factors(adapters, {"elsewhere": basis})
    adapters["a"] = lora.methods.VeRA(
        draw(R), draw(4), shape=(5, 4), geometry=lora.Geometry((0,), (1,))
    )
    shared = {"a": draw(5, R), "b": draw(R, 4)}  # a leaf of the name of a part of what is shared
    assert lora.methods.factors({"a": adapters["a"]}, shared)["a"].shape == (5, 4)
    with fails(r"(?s)'up' is a Least: expected its basis"):
        lora.methods.factors(adapters, shared)


def test_optimisers():
    """Trained and no more; LoRA+ trains them at A's rate."""
    tree = {"params": PARAMS, "adapters": OWN}
    labels = lora.optim.labels(tree)
    assert jax.tree.leaves(labels["adapters"]) == ["full", "grown_x", "outer_u", "outer_v"]
    assert set(jax.tree.leaves(labels["params"])) == {"frozen"}
    ones = jax.tree.map(jnp.ones_like, tree)
    for tx in (
        lora.optim.trained_only(optax.sgd(0.5)),
        lora.optim.lora_plus(optax.sgd, 0.5, ratio=16),
    ):
        updates, _ = tx.update(ones, tx.init(tree), tree)
        assert not any(map(np.any, jax.tree.leaves(updates["params"])))
        assert all(np.all(x == -0.5) for x in jax.tree.leaves(updates["adapters"]))


def test_devices():
    specs = {"up": P("x", "y"), "down": P("x"), "bias": P("y")}
    of = lora.parallel.shardings(specs, OWN)
    assert (of["up"].u, of["up"].v) == (P("x"), P("y"))
    assert (of["down"].x, of["bias"].value) == (P(), P("y"))
    adam, _ = lora.parallel.state_shardings(optax.adam(1e-3).init(OWN), OWN, of)
    assert (adam.mu["up"].u, adam.nu["up"].v, adam.count) == (P("x"), P("y"), P())
    numbers = lora.parallel.memory(PARAMS, OWN, optax.adam(1e-3)).parts
    assert numbers["adapters"].total == 4 * (6 + 5 + 1 + 4)


def test_a_stack_of_factors():
    other = {"up": dataclasses.replace(OWN["up"], u=draw(6) + 1)}
    plain = [lora.methods.factors(ad) for ad in (OUTER, other)]
    stacked = lora.algebra.stack(plain)
    for i, ad in enumerate((OUTER, other)):
        got = lora.merge(PARAMS, lora.algebra.choose(stacked, i))
        assert_close(got, lora.merge(PARAMS, ad))
    with fails(r"no factors yet:\n.*'up' is a Outer\n.*pass lora.methods.factors"):
        lora.algebra.stack([OUTER])
    with fails(r"have no factors:\n.*'down' is a Grown\n"):
        lora.algebra.stack([{"down": OWN["down"]}])


def test_a_state_and_a_checkpoint(tmp_path):
    tx = optax.adam(1e-3)
    state = tx.init(OWN)
    with ocp.CheckpointManager(tmp_path) as manager:
        lora.checkpoint.save(manager, 1, OWN, base=PARAMS, state=state)
        manager.wait_until_finished()
        zeros = jax.tree.map(jnp.zeros_like, OWN)
        found = lora.checkpoint.restore(manager, zeros, base=PARAMS, state=state)
        jax.tree.map(np.testing.assert_array_equal, (found.adapters, found.state), (OWN, state))
        warmer = OWN | {"up": dataclasses.replace(OWN["up"], temper=2.0)}
        with fails(r"'up': temper 0.5 was saved, found 2.0"):
            lora.checkpoint.restore(manager, warmer, base=PARAMS)


def test_what_does_not_fit_is_said():
    with fails(r"'down': the leaf has shape \(5, 4\); expected u of \(5,\), found \(6,\)"):
        lora.bind(PARAMS, {"down": OWN["up"]})
    with fails(r"'up': the leaf has shape \(6, 5\), the adapter was made for \(5, 4\)"):
        lora.bind(PARAMS, {"up": OWN["down"]})

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Nothing(lora.methods.Node):
        x: jax.Array
        shape: tuple[int, ...] = static()

    with pytest.raises(NotImplementedError, match="Nothing needs `factors` or `weight`"):
        lora.bind(PARAMS, {"up": Nothing(draw(2), (6, 5))})


def test_factors_with_more_beside_them(tmp_path):
    """A class of the user's that is a `LoRA`: stacked and grown as one."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True, eq=False)
    class Tagged(lora.LoRA):
        tag: str = dataclasses.field(default="", metadata=dict(static=True))

    node = lambda rank, b: {
        "up": Tagged(draw(6, rank), b, 0.5, lora.Geometry((0,), (1,)), tag="mine")
    }
    small, large = node(2, draw(2, 5)), node(3, jnp.zeros((3, 5)))
    chosen = lora.algebra.choose(lora.algebra.stack([small, large]), 0)
    assert type(chosen["up"]) is Tagged and chosen["up"].tag == "mine"
    assert_close(lora.merge(PARAMS, chosen), lora.merge(PARAMS, small))
    with ocp.CheckpointManager(tmp_path) as manager:
        lora.checkpoint.save(manager, 1, small, base=PARAMS)
        manager.wait_until_finished()
        grown = lora.checkpoint.restore(manager, large, base=PARAMS, rank="grow").adapters
    assert type(grown["up"]) is Tagged and grown["up"].rank == 3
    assert_close(lora.merge(PARAMS, grown), lora.merge(PARAMS, small))


def test_dropout_is_that_of_its_factors():
    class Dropped(Outer):
        def factors(self, frozen=None):
            return dataclasses.replace(super().factors(), dropout=0.5)

    jax.tree_util.register_dataclass(Dropped)
    adapters = {"up": Dropped(draw(6), draw(5), 0.5)}
    apply = lora.adapt(lambda p, x: x @ p["up"])
    for key in (None, KEY):
        got, want = (
            apply(lora.bind(PARAMS, ad, dropout_key=key), draw(3, 6))
            for ad in (adapters, lora.methods.factors(adapters))
        )
        assert_close(got, want)
    assert not np.allclose(got, apply(lora.bind(PARAMS, adapters), draw(3, 6)))


NOT = ["x", None, [1], 1j, float("nan"), object(), True, 10**400, jnp.ones(2)]


@pytest.mark.parametrize("name", ["scale", "dropout", "geometry", "shape", "index", "length"])
def test_what_is_static_is_checked_where_a_node_is_made(name):
    array, matrix = jnp.ones((2, 2)), lora.Geometry((0,), (1,))
    nodes = [
        lora.LoRA(array, array, 1.0, matrix),
        lora.methods.LoRAXS(array, shape=(2, 2), geometry=matrix),
        lora.Rows(array, (0, 1), 2),
    ]
    own = [n for n in nodes if name in vars(n)]
    rows = [(0, 2), (0, 0), (0, -1), (), 1] if name == "index" else []
    for node in own:
        for value in NOT + rows:
            if (name == "shape" and type(value) is list) or (
                name == "length" and type(value) is int
            ):
                continue
            with fails(f"{name}=.* of a {type(node).__name__}: expected"):
                dataclasses.replace(node, **{name: value})
    assert own and dataclasses.replace(nodes[0], scale=np.float32(2)).scale == 2
    with fails("scale=.*expected a finite number"):
        jax.jit(lambda s: lora.LoRA(array, array, s, matrix))(1.0)


@pytest.mark.parametrize("call", [lora.bind, lora.merge, lora.parallel.shardings])
@pytest.mark.parametrize("value", [*NOT[:6], {"x": 1}])
def test_what_is_no_array_is_said(call, value):
    node = lora.LoRA(jnp.ones((2, 1)), value, 1.0, lora.Geometry((0,), (1,)))
    where = P() if call is lora.parallel.shardings else jnp.ones((2, 2))
    with fails("adapter of 'w' holds what is no array"):
        call({"w": where}, {"w": node})
    with fails(r"there are 1 rows, and value has \(2,\)"):
        lora.merge({"w": jnp.ones((3, 2))}, {"w": lora.Rows(jnp.ones((2, 2)), (0,), 3)})


@pytest.mark.parametrize("verb", [lora.bind, lora.merge, lora.unmerge])
@pytest.mark.parametrize(
    "leaf, own, match",
    [
        ("int32", "float32", "of int32, to which an update in floats would be rounded"),
        ("int8", "int8", "of int8, to which an update in floats would be rounded"),
        ("bool", "bfloat16", "of bool, to which an update in floats would be rounded"),
        ("float32", "complex64", "the adapter is complex, the leaf of float32"),
        ("bfloat16", "complex64", "the adapter is complex, the leaf of bfloat16"),
        (">f4", "float32", ">f4 is no type of JAX's"),
        ("object", "float32", "object is no type of JAX's"),
        ("float32", ">f4", ">f4 is no type of JAX's"),
    ],
)
def test_a_leaf_holds_what_the_node_makes_of_it(verb, leaf, own, match):
    """1 + 0.4 is no integer, and a complex update has no place in a real weight."""
    geometry = lora.Geometry((0,), (1,))
    node = lora.LoRA(np.ones((4, 1), own), np.ones((1, 3), own), 0.4, geometry)
    with fails(f"'w': .*{match}"):
        verb({"w": np.ones((4, 3), leaf)}, {"w": node})


def test_whole_numbers_may_be_trained_in_full():
    merged = lora.merge({"w": np.ones(3, "int32")}, {"w": lora.Full(np.arange(3, dtype="int32"))})
    np.testing.assert_array_equal(merged["w"], [0, 1, 2])
