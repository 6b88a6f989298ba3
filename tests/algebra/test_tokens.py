"""An adapter for each token: what the dense weights of that token's adapter give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from common import assert_close, examples, fails, noisy
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora

KEY = jax.random.key(0)
GEOMETRY = lora.Geometry((0,), (1,))


def drawn(i, *shape, dtype=jnp.float32):
    return rand.normal(jax.random.fold_in(KEY, i % 1000), shape).astype(dtype)


def node(i, shape, rank, geometry=GEOMETRY, dtype=jnp.float32):
    a, b = geometry.factor_shapes(shape, rank)
    return lora.LoRA(
        drawn(i, *a, dtype=dtype), drawn(-i - 1, *b, dtype=dtype), 0.5 * i + 1, geometry
    )


def dense(x, w, node, slots):
    """x_t · (W + A_k·B_k) for each token, k its slot; the last one, -1, is empty."""
    each = w + jnp.einsum("kir,kro->kio", node.a, node.b, precision="highest")
    slots = jnp.broadcast_to(slots, x.shape[:-1])
    return jnp.einsum("...i,...io->...o", x, each[slots], precision="highest")


@examples(6)
@given(
    shapes=st.sampled_from([((5,), (5,)), ((2, 3), (2, 3)), ((2, 3), (2, 1)), ((2, 3), (1, 3))]),
    sizes=st.sampled_from([(4, 6), (6, 4), (5, 5)]),
    ranks=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    how=st.sampled_from(["plain", "transposed", "checkpoint", "vmap"]),
    seed=st.integers(0, 99),
)
def test_each_token_gets_its_own(shapes, sizes, ranks, dtype, how, seed):
    """Values and gradients: ranks, dtypes, shapes, and one number for a whole axis of tokens."""
    positions, of_slots = shapes
    zoo = [{"w": node(i, sizes, r, dtype=dtype)} for i, r in enumerate(ranks)]
    stacked = lora.algebra.stack(zoo, capacity=3)
    x, w = drawn(seed, *positions, sizes[0], dtype=dtype), drawn(-seed, *sizes, dtype=dtype)
    slots = jax.random.randint(jax.random.key(seed), of_slots, -1, len(ranks))
    turned = how == "transposed"
    fn = lora.adapt(lambda p, x: x @ (p["w"].T if turned else p["w"]))
    if turned:
        swap = lambda n: lora.LoRA(n.b.mT, n.a.mT, 1.0, GEOMETRY)
        params, given_ = {"w": w.T}, lambda s: {"w": swap(s["w"])}
    else:
        params, given_ = {"w": w}, lambda s: s

    def ours(stacked, x):
        call = lambda slots, x: fn(
            lora.bind(params, lora.algebra.choose(given_(stacked), slots)), x
        )
        if how == "checkpoint":
            call = jax.checkpoint(call)
        if how == "vmap" and len(positions) == len(of_slots) > 1 and of_slots[0] > 1:
            return jax.vmap(call)(slots, x)
        return call(slots, x)

    full = lambda tree: jax.tree.map(lambda v: v.astype(jnp.float32), tree)
    want = lambda stacked, x: dense(x, full(w), stacked["w"], slots)
    loss = lambda f: lambda *args: jnp.sum(jnp.sin(f(*args).astype(jnp.float32)))
    both = lambda f: lambda *args: (f(*args), jax.grad(loss(f), (0, 1))(*args))
    got, (y, grads) = jax.jit(both(ours))(stacked, x), both(want)(full(stacked), full(x))
    if dtype == "bfloat16":  # sin of what is rounded: the gradients' errors are the values'
        assert_close(got[0], y, dtype, factor=16)
        assert_close(got[1], grads, dtype, factor=64)
    else:
        assert_close(got, (y, grads), factor=256)


D, LAYERS = 8, 2
PARAMS = {
    "layers": drawn(1, LAYERS, D, D) / 3,
    "experts": drawn(2, 3, D, D) / 3,
    "head": drawn(3, D, 5) / 3,
}
RULES = [lora.Rule("experts", batch_axes=(0,), in_axes=(1,), out_axes=(2,))]


def fn(p, x):
    """Scanned layers, a mixture of experts, a head; no token sees another."""
    x, _ = jax.lax.scan(jax.checkpoint(lambda x, w: (x + jnp.tanh(x @ w), None)), x, p["layers"])
    x = x + jnp.tanh(x @ p["layers"][0].reshape(2, D // 2, D).reshape(D, D)[:, ::-1])
    x = jnp.einsum("btef,bte->btf", jnp.einsum("btd,edf->btef", x, p["experts"]), x[..., :3])
    return x @ p["head"]


APPLY = lora.adapt(fn)
SURVEY = lora.survey(fn, PARAMS, jnp.ones((1, 1, D)))


def make(seed, rank, targets=("layers", "experts", "head")):
    rules = RULES if "experts" in targets else ()
    config = lora.LoRAConfig(rank=rank, targets=[*targets], rules=rules)
    return noisy(lora.init(jax.random.key(seed), PARAMS, config, SURVEY), key=seed, scale=0.3)


ZOO = [make(1, 2), make(2, 3, ("layers", "head")), make(3, 1, ("experts",))]
X = drawn(4, 4, 6, D)
SLOTS = jax.random.randint(KEY, (4, 6), -1, 3)


def ours(stacked, slots, x):
    return APPLY(lora.bind(PARAMS, lora.algebra.choose(stacked, slots)), x)


def merged(stacked, slots, x):
    """All tokens by each adapter's merged weights, of which each token keeps its own."""
    count = len(jax.tree.leaves(stacked)[0])
    each = [lora.merge(PARAMS, lora.algebra.choose(stacked, i)) for i in range(-1, count - 1)]
    outs = jnp.stack([fn(p, x) for p in each])
    slots = jnp.broadcast_to(slots, x.shape[:-1])
    return jnp.take_along_axis(outs, slots[None, ..., None] + 1, 0)[0]


def value_and_gradients(f):
    loss = lambda stacked, slots, x: jnp.sum(jnp.sin(f(stacked, slots, x)))
    return jax.jit(lambda *args: (f(*args), jax.grad(loss, (0, 2))(*args)))


@pytest.mark.slow
def test_a_model_with_a_scan_and_experts():
    stacked = lora.algebra.stack(
        ZOO, capacity=6
    )  # of more slots than examples, and fewer than tokens
    got = value_and_gradients(ours)(stacked, SLOTS, X)
    assert_close(got, value_and_gradients(merged)(stacked, SLOTS, X), factor=1024)
    by_vmap = jax.vmap(lambda s, slot, x: ours(s, slot[None], x[None])[0], (None, 0, 0))
    assert_close(jax.jit(by_vmap)(stacked, SLOTS, X), got[0], factor=1024)
    # one for each example: a number for all of its tokens, and by the scalar's own way
    one = lambda s, i, x: ours(s, i, x[None])[0]
    by_scalar = jax.vmap(one, (None, 0, 0))(stacked, SLOTS[:, 0], X)
    assert_close(ours(stacked, SLOTS[:, :1], X), by_scalar, factor=256)
    # aLoRA's mask with a number for each token
    mask = X[..., 0] > 0
    some = lora.algebra.choose(stacked, SLOTS, mask)
    want = ours(stacked, jnp.where(mask, SLOTS, -1), X)
    assert_close(APPLY(lora.bind(PARAMS, some), X), want, factor=256)


@pytest.mark.parametrize("spec, kind", [
    (P("m"), AxisType.Auto), (P(None, "m"), AxisType.Auto), (P(), AxisType.Explicit)
], ids=["slots", "axes", "typed"])  # fmt: skip
def test_sharded(spec, kind):
    """Along the slots, or along the factors' own first axis, and the batch, also where shardings
    are part of types: as on one device."""
    params = {"w": drawn(1, 16, 8)}
    stacked = lora.algebra.stack([{"w": node(i, (16, 8), 8)} for i in range(6)], capacity=7)
    x, slots = drawn(2, 8, 3, 16), jax.random.randint(KEY, (8, 3), -1, 7)
    f = lora.adapt(lambda p, x: x @ p["w"])

    def run(params, stacked, slots, x):
        loss = lambda stacked, x: jnp.sum(
            jnp.sin(f(lora.bind(params, lora.algebra.choose(stacked, slots)), x))
        )
        return jax.value_and_grad(loss, (0, 1))(stacked, x)

    want = jax.jit(run)(params, stacked, slots, x)
    mesh = jax.make_mesh((8,), ("m",), axis_types=(kind,))
    on = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    base = P("m") if kind is AxisType.Auto else P()
    with jax.set_mesh(mesh):
        args = on(params, base), on(stacked, spec), on(slots, P("m")), on(x, P("m"))
        got = jax.jit(run)(*args)
    assert_close(jax.device_get(got), jax.device_get(want), factor=256)


def test_another_choice_compiles_nothing_and_has_its_plan():
    stacked = lora.algebra.stack(ZOO)
    call = jax.jit(ours)
    call(stacked, SLOTS, X), call(stacked, SLOTS[::-1], X)
    assert call._cache_size() == 1
    bound = lora.bind(PARAMS, lora.algebra.choose(stacked, SLOTS))
    assert "by slot: summed" in str(lora.coverage(fn, bound, X))


def test_a_slot_that_is_not_finite_spoils_its_own_tokens():
    stacked = lora.algebra.stack(ZOO)
    spoilt = jax.tree.map(lambda v: v.at[1].set(jnp.nan), stacked)
    y, (grads, _) = value_and_gradients(ours)(spoilt, SLOTS, X)
    np.testing.assert_array_equal(np.isnan(y).any(-1), SLOTS == 1)
    for g in jax.tree.leaves(grads):
        assert np.isnan(g[1]).any() and np.isfinite(g[jnp.array([0, 2])]).all()


def test_no_slot():
    stacked = lora.algebra.stack(ZOO)
    for number in (3, -2, 99):
        y = jax.jit(ours)(stacked, SLOTS.at[1, 2].set(number), X)
        np.testing.assert_array_equal(
            np.isnan(y).all(-1), jnp.zeros((4, 6), bool).at[1, 2].set(True)
        )
    with fails("no slot has the number -2, 3: expected -1, the base, or 0 to 2"):
        lora.algebra.choose(stacked, np.array([[0, 3, -2]]))
    with fails("expected integers as an index, found float32"):
        lora.algebra.choose(stacked, jnp.ones((1, 2)))
    wide = lora.algebra.choose(stacked, np.array([[255, 0]], "uint8").astype("int8"))
    assert wide["head"].slots.tolist() == [[-1, 0]]


def test_what_is_no_product():
    """Look-ups and convolutions have no tokens that are followed, and say which leaf it is."""
    slots = jnp.zeros((2, 5), int)
    kernel = {"k": drawn(1, 3, 4, 6)}
    conv = lambda p, x: jax.lax.conv_general_dilated(
        x, p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    stack = lora.algebra.stack([{"k": node(1, (3, 4, 6), 2, lora.Geometry((0, 1), (2,)))}])
    within = lambda p, x: jax.jit(lambda k, x: conv({"k": k}, x))(p["k"], x)
    for strict, fn in ((True, conv), (False, conv), (True, within)):
        with fails("'k' is adapted token by token"):
            bound = lora.bind(kernel, lora.algebra.choose(stack, slots))
            lora.adapt(fn, strict=strict)(bound, jnp.ones((2, 5, 4)))
    with fails(r"'head' is multiplied by .*\(2, 5\) positions; expected slots .* found \(5,\)"):
        head = {"head": lora.algebra.stack(ZOO[:1])["head"]}
        bound = lora.bind({"head": PARAMS["head"]}, lora.algebra.choose(head, slots[0]))
        lora.adapt(lambda p, x: x @ p["head"])(bound, jnp.ones((2, 5, D)))
    with fails("cannot be merged, which would be for all"):
        lora.merge(PARAMS, lora.algebra.choose(lora.algebra.stack(ZOO), SLOTS))
    dora = lora.methods.dora(PARAMS, ZOO[0])
    with fails("is a DoRA, which changes more than an update"):
        stacked = lora.algebra.stack([dora], base=PARAMS)
        lora.bind(PARAMS, lora.algebra.choose(stacked, slots))


def test_weights_of_one_input_share_a_loop():
    """Rows with large factors of their own: q, k and v as the dense weights of each."""
    sizes = {"q": (128, 9), "k": (128, 5), "v": (128, 7)}
    params = {n: drawn(i, *s) / 11 for i, (n, s) in enumerate(sizes.items())}
    zoo = [{n: node(7 * i + j, s, 8) for j, (n, s) in enumerate(sizes.items())} for i in range(3)]
    stacked = lora.algebra.stack(zoo, capacity=40)
    x, slots = drawn(9, 4, 2, 128), jnp.array([[0, 2], [-1, 1], [1, 1], [2, 0]])
    f = lora.adapt(lambda p, x: [x @ p[n] for n in sizes])

    def ours(stacked, slots, x):
        return f(lora.bind(params, lora.algebra.choose(stacked, slots)), x)

    want = lambda stacked, slots, x: [dense(x, params[n], stacked[n], slots) for n in params]
    loss = lambda f: lambda *args: sum(jnp.sum(jnp.sin(y / 9)) for y in f(*args))
    both = lambda f: jax.jit(lambda *args: (f(*args), jax.grad(loss(f), (0, 2))(*args)))
    assert_close(both(ours)(stacked, slots, x), both(want)(stacked, slots, x), factor=256)
    jaxpr = str(jax.make_jaxpr(lambda: ours(stacked, slots, x))())
    assert jaxpr.count("= update_by_slot") == 1
    bound = lora.bind(params, lora.algebra.choose(stacked, slots))
    assert str(lora.coverage(f.__wrapped__, bound, x)).count("by slot: one by one, summed") == 3
    alone = jax.jit(ours)(stacked, slots.at[3, 1].set(77), x)
    for y in alone:
        np.testing.assert_array_equal(
            np.isnan(y).all(-1), jnp.zeros((4, 2), bool).at[3, 1].set(True)
        )


def test_a_number_for_each_example_under_vmap():
    """Values and gradients of numbers (B, 1), and their cost: also in a scan, under jit and remat, by
    a number that was mapped twice."""
    stacked = lora.algebra.stack([make(i, 2, ("layers", "head")) for i in range(5)])
    x, slots = drawn(5, 6, 4, D), jnp.array([0, 3, -1, 2, 3, 4])

    def fn(p, x):
        x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["layers"])
        return x @ p["head"]

    f = lora.adapt(fn)
    call = lambda s, i, x: f(lora.bind(PARAMS, lora.algebra.choose(s, i)), x)
    each = jax.vmap(call, (None, 0, 0))
    twice = jax.vmap(each, (None, 0, 0))
    tokens = lambda s, i, x: call(s, i[:, None], x)
    half = lambda tree: jax.tree.map(lambda v: v / 2, tree)
    stacks = jax.tree.map(lambda v: jnp.stack([v] * 6), stacked)

    def others(stacked, slots, x):
        """Whose values are the same, at whatever cost."""
        merged = lora.adapt(fn, plan="merged")
        by = lambda f, tree: lambda i, x: f(lora.bind(PARAMS, tree(i)), x)
        own = lambda i: lora.algebra.choose(stacked, i)
        return (
            twice(stacked, slots.reshape(2, 3), x.reshape(2, 3, 4, D)).reshape(6, 4, 5),
            jax.checkpoint(each)(stacked, slots, x),
            jax.vmap(jax.checkpoint(call), (None, 0, 0))(stacked, slots, x),
            jax.vmap(call)(stacks, slots, x),  # a stack for each example
            jax.vmap(by(merged, own))(slots, x),
            # arrays that were changed since they were chosen
            jax.vmap(by(f, lambda i: half(own(i))))(slots, x) - each(half(stacked), slots, x),
        )

    def found(way):
        compiled = value_and_gradients(way).lower(stacked, slots, x).compile()
        cost = compiled.cost_analysis()
        return compiled(stacked, slots, x), (cost["flops"], cost["bytes accessed"])

    want, cost = found(tokens)
    got, costs = found(each)
    assert_close(got, want, factor=256)
    np.testing.assert_allclose(costs, cost, rtol=0.02)
    *same, zero = jax.jit(others)(stacked, slots, x)
    assert_close([*same, 1 + zero], [want[0]] * 5 + [jnp.ones_like(zero)], factor=256)
    for way in (tokens, each, jax.checkpoint(each)):
        jaxpr = str(jax.make_jaxpr(way)(stacked, slots, x))
        assert jaxpr.count("= update_by_slot") == 2
