"""Many adapters at once: each example gets what its adapter alone gives, compiled once."""

import dataclasses
import functools
import operator

import chex
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
from lora_jax._nodes.node import is_node

KEY = jax.random.key(0)
D, LAYERS, EXPERTS = 12, 3, 4
SHAPES = {
    "table": (10, D),
    "layers": (LAYERS, D, D),
    "experts": (EXPERTS, D, D),
    "head": (D, 7),
    "bias": (7,),
}
PARAMS = {
    n: rand.normal(jax.random.fold_in(KEY, i), s) / 3 for i, (n, s) in enumerate(SHAPES.items())
}
IDS = jax.random.randint(KEY, (6, 5), 0, 10)


def fn(p, ids):
    """An embedding, scanned layers, a mixture of experts, a head: (T,) -> (T, 7)."""
    x = p["table"][ids]
    x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["layers"])
    x = jnp.einsum(
        "tef,te->tf", jnp.einsum("td,edf->tef", x, p["experts"]), jax.nn.softmax(x[:, :4])
    )
    return x @ p["head"] + p["bias"]


SURVEY = lora.survey(fn, PARAMS, IDS[0])
APPLY = lora.adapt(fn)
RULES = [lora.Rule("experts", batch_axes=(0,), in_axes=(1,), out_axes=(2,))]


def make(seed, rank=2, targets=("table", "layers", "experts", "head"), **kwargs):
    rules = RULES if "experts" in targets else ()
    config = lora.LoRAConfig(
        rank=rank, alpha=3 * rank + seed, targets=list(targets), rules=rules, **kwargs
    )
    return noisy(lora.init(jax.random.key(seed), PARAMS, config, SURVEY), key=seed, scale=0.3)


def alone(adapters, ids):
    return fn(PARAMS if adapters is None else lora.merge(PARAMS, adapters), ids)


def each(stacked, index, ids):
    """By a number of each example's own, inside of the vmap."""
    one = lambda i, ids: APPLY(lora.bind(PARAMS, lora.algebra.choose(stacked, i)), ids)
    return jax.vmap(one)(index, ids)


def taken(stacked, index):
    """(B, ...) adapters."""
    return jax.vmap(lora.algebra.choose, (None, 0))(stacked, index)


def gathered(stacked, index, ids):
    """By all numbers at once, in front of it."""
    one = lambda adapters, ids: APPLY(lora.bind(PARAMS, adapters), ids)
    return jax.vmap(one)(taken(stacked, index), ids)


ZOO = [
    make(1),
    make(2, rank=4),
    make(3, targets=("layers",)),
    make(4, rank=1, targets=("head", "table")),
]


def test_each_example_gets_its_own():
    """Other ranks, scales and targets, and none; under jit, and by one number for all."""
    stacked = lora.algebra.stack(ZOO)
    index = jnp.array([3, 0, -1, 2, 1, 0])
    want = jnp.stack([alone([*ZOO, None][i], ids) for i, ids in zip(index, IDS)])
    for call in (jax.jit(each), jax.jit(gathered)):
        assert_close(call(stacked, index, IDS), want, factor=256)
    for i in (2, -1):
        got = jax.jit(APPLY)(lora.bind(PARAMS, lora.algebra.choose(stacked, i)), IDS[0])
        assert_close(got, alone([*ZOO, None][i], IDS[0]), factor=256)
    for none in (9, -9):
        assert np.isnan(jax.jit(each)(stacked, jnp.array([none] * 6), IDS)).all()
        assert np.isnan(jax.jit(gathered)(stacked, jnp.array([none] * 6), IDS)).all()


def test_gradients_of_a_stack():
    """Gradients of the stack and of the input, as by the plain function on each example's merged weights."""
    zoo = ZOO[:2]
    stacked = lora.algebra.stack(zoo)
    index = [1, 0, -1, 0, 1, 0]
    x = rand.normal(KEY, (6, 5, D))
    fn = lambda p, x: jnp.tanh(x @ p["layers"][1]) @ p["head"]
    head = lora.adapt(fn, strict=False)

    def loss(stacked, x):
        one = lambda i, x: head(lora.bind(PARAMS, lora.algebra.choose(stacked, i)), x)
        return jnp.sum(jnp.sin(jax.vmap(one)(jnp.array(index), x)))

    def merged(stacked, x):
        each = (lora.merge(PARAMS, lora.algebra.choose(stacked, i)) for i in index)
        return sum(jnp.sum(jnp.sin(fn(p, row))) for p, row in zip(each, x))

    grad, want = (jax.jit(jax.grad(f, argnums=(0, 1)))(stacked, x) for f in (loss, merged))
    assert_close(grad, want, factor=256)


def test_what_is_trained_in_full():
    """An empty slot, and one whose adapter has no such leaf, is the base."""
    both = dict(full="bias", rows={"table": [1, 3]})
    zoo = [
        make(1, targets=("head",), **both),
        make(2, targets=("head",)),
        make(3, targets=("layers",), **both),
    ]
    stacked = lora.algebra.stack(zoo, base=PARAMS)
    index = jnp.array([2, 1, -1, 0, 2, 1])
    want = jnp.stack([alone([*zoo, None][i], ids) for i, ids in zip(index, IDS)])
    assert_close(each(stacked, index, IDS), want, factor=256)
    with fails(r"(?s)'table': is a Rows, and an empty slot.*base=params"):
        lora.algebra.stack(zoo)


@pytest.mark.slow
def test_nothing_is_compiled_anew():
    """Adding, replacing, removing and choosing: one trace, one program."""

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(stacked, index, ids):
        return each(stacked, index, ids)

    change = jax.jit(lora.algebra.put, donate_argnums=0)
    stacked = lora.algebra.stack(ZOO[:2], capacity=8, rank=4)
    run(stacked, jnp.arange(6), IDS)
    stacked = change(stacked, 5, ZOO[2])
    stacked = change(stacked, 0, ZOO[3])
    stacked = lora.algebra.put(stacked, 1, None)
    index = jnp.array([5, 0, 1, 5, 0, -1])
    got = run(stacked, index, IDS)
    zoo = {5: ZOO[2], 0: ZOO[3]}
    want = jnp.stack([alone(zoo.get(int(i)), ids) for i, ids in zip(index, IDS)])
    assert_close(got, want, factor=256)
    assert run._cache_size() == 1


def test_the_base_is_multiplied_once():
    """Its products have no batch axis of examples: FLOPs are those of the base and of the factors."""
    params = {"w": jnp.ones((64, 48))}
    node = lora.init(KEY, params, lora.LoRAConfig(rank=2, targets="w"))
    stacked = lora.algebra.stack([node] * 16)
    f = lora.adapt(lambda p, x: x @ p["w"])
    one = lambda adapters, x: f(lora.bind(params, adapters), x)
    run = lambda index, x: jax.vmap(one)(taken(stacked, index), x)
    cost = jax.jit(run).lower(jnp.zeros(16, int), jnp.ones((16, 8, 64))).compile().cost_analysis()
    base, factors = 2 * 16 * 8 * 64 * 48, 2 * 16 * 8 * 2 * (64 + 48)
    assert cost["flops"] <= 1.1 * (base + factors)


def test_sharded():
    """Factors and base over a mesh, as on one device."""
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(AxisType.Auto,) * 2)
    on = lambda spec: NamedSharding(mesh, spec)
    specs = {
        "table": P(),
        "layers": P(None, "d", "t"),
        "experts": P("t"),
        "head": P("t"),
        "bias": P(),
    }
    params = jax.device_put(PARAMS, jax.tree.map(on, specs))
    stacked = lora.algebra.stack(ZOO)
    own = lora.parallel.shardings(params, lora.algebra.choose(stacked, 0))
    stacked = jax.device_put(stacked, jax.tree.map(lambda s: on(P(None, *s.spec)), own))
    index, ids = jnp.array([3, 0, -1, 2, 1, 0]), jax.device_put(IDS, on(P("d")))
    one = lambda params, adapters, ids: APPLY(lora.bind(params, adapters), ids)
    run = jax.jit(lambda p, s, i, ids: jax.vmap(one, (None, 0, 0))(p, taken(s, i), ids))
    assert_close(
        jax.device_get(run(params, stacked, index, ids)),
        jax.device_get(each(lora.algebra.stack(ZOO), index, IDS)),
        factor=256,
    )


def test_decoding_with_a_cache():
    """One token at a time, each sequence with its adapter and its own keys and values."""
    params = {n: rand.normal(jax.random.fold_in(KEY, i), (D, D)) / 4 for i, n in enumerate("qkvo")}

    def step(p, cache, x, t):
        k, v = cache[0].at[t].set(x @ p["k"]), cache[1].at[t].set(x @ p["v"])
        w = jax.nn.softmax(jnp.where(jnp.arange(len(k)) <= t, k @ (x @ p["q"]), -1e9))
        return (k, v), (w @ v) @ p["o"]

    x = rand.normal(KEY, (3, 6, D))
    config = lora.LoRAConfig(rank=2, targets=["q", "v"])
    zoo = [noisy(lora.init(KEY, params, config), key=i) for i in range(2)]
    stacked, index = lora.algebra.stack(zoo), jnp.array([1, -1, 0])
    f = lora.adapt(step)

    @jax.jit
    def decode(cache, x, t):
        one = lambda adapters, cache, x: f(lora.bind(params, adapters), cache, x, t)
        return jax.vmap(one)(taken(stacked, index), cache, x)

    def run(decode, cache, x):
        outs = []
        for t in range(6):
            cache, y = decode(cache, x[..., t, :], t)
            outs.append(y)
        return jnp.stack(outs, -2)

    got = run(decode, (jnp.zeros((3, 6, D)), jnp.zeros((3, 6, D))), x)
    for i, adapters in enumerate((zoo[1], None, zoo[0])):
        p = params if adapters is None else lora.merge(params, adapters)
        want = run(functools.partial(step, p), (jnp.zeros((6, D)),) * 2, x[i])
        assert_close(got[i], want, factor=256)


@pytest.mark.parametrize("call, match", [
    (lambda: lora.algebra.stack([]), "expected 1 to 0 adapters, found 0"),
    (lambda: lora.algebra.stack(ZOO, capacity=2), "expected 1 to 2 adapters, found 4"),
    (lambda: lora.algebra.stack(ZOO, capacity=8.5), "capacity=8.5: expected an integer >= 1, or None"),
    (lambda: lora.algebra.stack(ZOO, rank=0), "rank=0: expected an integer >= 1, or None"),
    (lambda: lora.algebra.stack(ZOO, rank=3), r"(?s)'experts': expected a rank of at most 3, found 4.*'table'"),
    (lambda: lora.algebra.stack([PARAMS]), "expected adapters, as from lora.init, found ArrayImpl"),
    (lambda: lora.algebra.stack([{"w": make(1)["head"]}, {"w": make(1)["layers"]}]), r"'w': expected a LoRA of \(12, 7\), found a LoRA of \(3, 12, 12\)"),
    (lambda: lora.algebra.put(lora.algebra.stack(ZOO[2:3]), 0, ZOO[0]), r"(?s)'table' is no leaf of the stack.*make a new one"),
    (lambda: lora.algebra.put(lora.algebra.stack(ZOO[:1]), 0, ZOO[1]), "'layers': expected a rank of at most 2, found 4"),
    (lambda: lora.algebra.put(lora.algebra.stack(ZOO), 4, None), "number 4: expected 0 to 3"),
    (lambda: lora.algebra.put(lora.algebra.stack(ZOO), -1, None), "number -1: expected 0 to 3"),
])  # fmt: skip
def test_errors(call, match):
    with fails(match):
        call()


def test_a_stack_is_not_changed():
    stacked = lora.algebra.stack(ZOO)
    before = jax.tree.map(np.array, stacked)
    lora.algebra.put(stacked, 0, ZOO[2])
    jax.tree.map(np.testing.assert_array_equal, stacked, before)
    assert {n.scale for n in jax.tree.leaves(stacked, is_leaf=is_node)} == {1.0}


def test_many_trained_at_once():
    """K adapters over one base by vmap: each becomes what it would have become alone."""
    import optax

    config = lora.LoRAConfig(rank=2, targets=["layers", "head"])
    targets = lora.select(PARAMS, config, SURVEY)
    answers = jax.random.randint(KEY, IDS.shape, 0, 7)
    rates = jnp.array([1e-3, 3e-3, 1e-2, 3e-2])
    keys = jax.random.split(KEY, 4)

    def loss(adapters):
        logits = jax.vmap(lambda ids: APPLY(lora.bind(PARAMS, adapters), ids))(IDS)
        return optax.softmax_cross_entropy_with_integer_labels(logits, answers).mean()

    def train(key, rate):
        adapters = lora.init(key, PARAMS, targets)
        tx = optax.scale_by_adam()

        def step(carry, _):
            adapters, state = carry
            value, grads = jax.value_and_grad(loss)(adapters)
            updates, state = tx.update(grads, state)
            updates = jax.tree.map(lambda u: -rate * u, updates)
            return (optax.apply_updates(adapters, updates), state), value

        (adapters, _), values = jax.lax.scan(step, (adapters, tx.init(adapters)), length=10)
        return adapters, values

    with jax.numpy_dtype_promotion("standard"):
        many, values = jax.jit(jax.vmap(train))(keys, rates)
        for i in range(4):
            adapters, own = jax.jit(train)(keys[i], rates[i])
            np.testing.assert_allclose(values[i], own, rtol=1e-4)
            assert_close(jax.tree.map(operator.itemgetter(i), many), adapters, factor=4096)
    assert dataclasses.asdict(many["head"].geometry) == dataclasses.asdict(targets["head"].geometry)
    assert values[-1, -1] < values[-1, 0]


@examples(30)
@given(
    index=st.integers(-300, 300),
    dtype=st.sampled_from(["int8", "int16", "int32", "uint8", "uint32"]),
    how=st.sampled_from(["eager", "jit", "vmap"]),
)
def test_what_has_no_slot_is_nan(index, dtype, how):
    """-1 is the base, 0 to 2 are slots, every other number is an error or, where it is traced, NaN
    and not written."""
    info = np.iinfo(dtype)
    index = int(np.clip(index, info.min, info.max))
    node = lora.LoRA(jnp.ones((2, 1)), jnp.ones((1, 2)), 1.0, lora.Geometry((0,), (1,)))
    stacked = lora.algebra.stack([lora.algebra.scaled({"w": node}, i + 1) for i in range(3)])
    number = jnp.asarray(index, dtype)
    choose = {"eager": lora.algebra.choose, "jit": jax.jit(lora.algebra.choose)}
    choose["vmap"] = lambda s, i: jax.tree.map(
        lambda x: x[0], jax.vmap(lora.algebra.choose, (None, 0))(s, i[None])
    )
    if how == "eager" and not -1 <= index < 3:
        with fails(f"no slot has the number {index}: expected -1, the base, or 0 to 2"):
            choose[how](stacked, number)
    else:
        got = choose[how](stacked, number)["w"].b
        want = index + 1.0 if -1 <= index < 3 else np.nan
        np.testing.assert_array_equal(got, np.full((1, 2), want, np.float32))
    put = jax.jit(lambda s, i: lora.algebra.put(s, i, {"w": node}))(stacked, number)["w"].b
    changed = stacked["w"].b.at[index].set(1.0) if 0 <= index < 3 else stacked["w"].b
    np.testing.assert_array_equal(put, changed)


@pytest.mark.parametrize("index", [1.5, True, jnp.array([0.0]), None, "0", [[0], [0, 1]]])
def test_an_index_is_an_integer(index):
    with fails("expected integers as an index"):
        lora.algebra.choose(lora.algebra.stack(ZOO), index)


GEOMETRY = lora.Geometry((0,), (1,))
NODE = {"w": lora.LoRA(jnp.ones((2, 1)), jnp.ones((1, 2)), 1.0, GEOMETRY)}
STACK = lora.algebra.stack([NODE], capacity=4)
BY_TOKEN = lora.algebra.choose(STACK, jnp.zeros((1, 1), int))
of_type = lambda dtype: jax.tree.map(lambda x: x.astype(dtype), NODE)
large = {"w": dataclasses.replace(NODE["w"], scale=1e6)}


@pytest.mark.parametrize(
    "call, match",
    [
        *(
            (functools.partial(call, tree), "expected a stack, found:")
            for tree in (NODE, PARAMS, {}, None, BY_TOKEN)
            for call in (
                lambda tree: lora.algebra.choose(tree, 0),
                lambda tree: lora.algebra.choose(tree, jnp.array([0])),
                lambda tree: lora.algebra.put(tree, 0, NODE),
            )
        ),
        *(
            (functools.partial(lora.algebra.stack, x), "expected a list of adapter trees, found a")
            for x in (None, NODE, STACK, 3)
        ),
        (lambda: lora.algebra.stack([STACK]), "'w' is a stack, or a part of one"),
        (lambda: lora.algebra.put(STACK, 0, STACK), "'w' is a stack, or a part of one"),
        (lambda: lora.algebra.put(STACK, 0, of_type("complex64")), "'w': is complex"),
        (
            lambda: lora.algebra.put(lora.algebra.stack([of_type("float16")]), 0, large),
            "hold NaN or infinity",
        ),
        (lambda: lora.algebra.choose(STACK, 2**40), "no slot has the number 1099511627776"),
        (
            lambda: lora.algebra.choose(STACK, [0, 1], [True, False, True]),
            r"mask: expected one of \(2,\), as the index is, found \(3,\)",
        ),
        (lambda: lora.algebra.choose(STACK, 0, "x"), "mask: expected booleans, found <U1"),
        (lambda: lora.algebra.choose(STACK, 0, [True, False]), None),
    ],
)
def test_what_a_stranger_might_pass(call, match):
    if match is None:
        call()
    else:
        with fails(match):
            call()


# For some tokens alone

MASK = jnp.array([[0, 1, 1, 0, 1], [0, 0, 0, 1, 1]] * 3, bool)
LINEAR = [make(s, targets=("layers", "head"), rank=r) for s, r in ((1, 2), (2, 3))]


def by_token(stacked, index, mask, ids):
    """By a number of each example's own, and a mask of each example's own."""
    chosen = lambda i, m: lora.bind(PARAMS, lora.algebra.choose(stacked, i, m))
    return jax.vmap(lambda i, m, ids: APPLY(chosen(i, m), ids))(index, mask, ids)


def by_hand(stacked, index, mask, ids):
    """The update of x alone where the mask is true, at every product."""

    def one(i, mask, ids):
        ad = lora.algebra.choose(stacked, i)
        on = lambda x, node, n=...: jnp.where(mask[:, None], x @ node.a[n] @ node.b[n], 0)
        x = PARAMS["table"][ids]
        for n in range(LAYERS):
            x = x + jnp.tanh(x @ PARAMS["layers"][n] + on(x, ad["layers"], n))
        h = jnp.einsum("td,edf->tef", x, PARAMS["experts"])
        x = jnp.einsum("tef,te->tf", h, jax.nn.softmax(x[:, :4]))
        return x @ PARAMS["head"] + on(x, ad["head"]) + PARAMS["bias"]

    return jax.vmap(one)(index, mask, ids)


def test_some_tokens_of_each_example():
    """Scanned layers, a base of others' tokens, no adapter at all; values and gradients."""
    stacked, index = lora.algebra.stack(LINEAR), jnp.array([1, 0, -1, 0, 1, 0])
    ours, hand, plain = map(jax.jit, (by_token, by_hand, each))
    assert_close(ours(stacked, index, MASK, IDS), hand(stacked, index, MASK, IDS), factor=64)
    loss = lambda f: jax.grad(lambda st: jnp.sum(jnp.sin(f(st, index, MASK, IDS))))
    assert_close(loss(ours)(stacked), loss(hand)(stacked), factor=256)
    every = jnp.ones_like(MASK)
    assert_close(ours(stacked, index, every, IDS), plain(stacked, index, IDS), factor=64)


def test_a_mask_compiles_nothing_anew():
    stacked, index = lora.algebra.stack(LINEAR), jnp.array([1, 0, -1, 0, 1, 0])
    call = jax.jit(chex.assert_max_traces(by_token, 1))
    call(stacked, index, MASK, IDS), call(stacked, index[::-1], ~MASK, IDS)


def test_masks_that_do_not_fit():
    stacked = lora.algebra.stack(LINEAR)
    with fails(r"mask: expected booleans, found float32: .*mask > 0"):
        lora.algebra.choose(stacked, 0, jnp.ones(5))
    chosen = lora.algebra.choose(stacked, 0, MASK[0])
    with fails("cannot be merged, which would be for all"):
        lora.merge(PARAMS, chosen)
    with fails(
        r"'layers' is multiplied by .* \(4,\) positions; expected slots or a mask .* found \(5,\)"
    ):
        APPLY(lora.bind(PARAMS, chosen), IDS[0, :4])
    with fails("(?s)'head' is adapted token by token.*'layers' is adapted"):
        lora.adapt(fn, plan="merged")(lora.bind(PARAMS, chosen), IDS[0])
    table = lora.algebra.choose(lora.algebra.stack([make(1, targets=("table",))]), 0, MASK[0])
    for strict in (True, False):
        with fails("'table' is adapted token by token"):
            lora.adapt(fn, strict=strict)(lora.bind(PARAMS, table), IDS[0])
    full = lora.algebra.stack([make(1, targets=("head",), full="bias")], base=PARAMS)
    with fails("'bias' is a Full, which changes more than an update"):
        lora.bind(PARAMS, lora.algebra.choose(full, 0, MASK[0]))
    both = lambda p, x: x @ jnp.concatenate([p["layers"][0], p["layers"][1]], 1)
    with fails("adapted token by token"):
        lora.adapt(both)(lora.bind(PARAMS, {"layers": chosen["layers"]}), jnp.ones((5, D)))
