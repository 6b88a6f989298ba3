"""Optimisers of two factors: the identities that define them, in every geometry, and training."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rand
from common import assert_close, fails, tolerance
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax.optim._lora_rite import _decay
from lora_jax.optim._pairs import columns, power, with_columns
from lora_jax.optim._precondition import FREE, nearest_gradients


@pytest.fixture(autouse=True)
def optax_promotes():
    """optax itself mixes types, as `beta ** count`."""
    with jax.numpy_dtype_promotion("standard"):
        yield


SHAPES = {
    "heads": (16, 2, 12),
    "experts": (3, 2, 8, 24),
}
CONFIG = lora.LoRAConfig(
    rank=4,
    alpha=12,
    targets=list(SHAPES),
    rules=[
        lora.Rule("heads", in_axes=(0,), out_axes=(1, 2)),
        lora.Rule("experts", in_axes=(1, 2), out_axes=(3,), batch_axes=(0,)),
    ],
)
ABSTRACT = {name: jax.ShapeDtypeStruct(s, "float32") for name, s in SHAPES.items()}
TARGETS = lora.select(ABSTRACT, CONFIG)
is_lora = lambda x: isinstance(x, lora.LoRA)
map_nodes = functools.partial(jax.tree.map, is_leaf=is_lora)
product = functools.partial(jnp.matmul, precision="highest")


def normal(seed, *shape, dtype=jnp.float32):
    return rand.normal(jax.random.key(seed), shape, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def random_adapters(seed=0, dtype=jnp.float32):
    adapters = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, TARGETS), ABSTRACT)
    leaves, treedef = jax.tree.flatten(adapters)
    leaves = [normal(seed + i, *x.shape, dtype=dtype) for i, x in enumerate(leaves)]
    return treedef.unflatten(leaves)


def sizes(node):
    return node.geometry.sizes(node.shape)


@jax.jit
def gradients(adapters, weights):
    """g_A = s·G·Bᵀ and g_B = s·Aᵀ·G of gradients G (n, in, out) of the weights."""

    def leaf(node, g):
        a, bt = columns(node)
        return with_columns(node, node.scale * product(g, bt), node.scale * product(g.mT, a))

    return map_nodes(leaf, adapters, weights)


@functools.partial(jax.jit, static_argnums=1)
def some_weights(adapters, seed=50):
    return map_nodes(lambda n: normal(seed, *sizes(n), dtype=n.a.dtype), adapters)


@jax.jit
def products(adapters):
    """s·A·B (n, in, out)."""
    return map_nodes(lambda n: n.scale * product(columns(n)[0], columns(n)[1].mT), adapters)


@jax.jit
def equivalent(adapters, d):
    """s·(dA·B + A·dB)."""

    def leaf(node, d):
        (a, bt), (da, dbt) = columns(node), columns(d)
        return node.scale * (product(da, bt.mT) + product(a, dbt.mT))

    return map_nodes(leaf, adapters, d)


@jax.jit
def projections(node):
    """P_A (n, in, in) and P_B (n, out, out)."""
    qs = [jnp.linalg.qr(x)[0] for x in columns(node)]
    return [product(q, q.mT) for q in qs]


@jax.jit
def in_another_basis(adapters):
    """A·Q⁻¹ and Q·B, with Q of condition 4, its singular values from 0.5 to 2, and of norm 3."""

    def leaf(node):
        n, r = sizes(node)[0], node.rank
        q1, q2 = (jnp.linalg.qr(normal(s, n, r, r, dtype=node.a.dtype))[0] for s in (90, 91))
        sigma = 3 * jnp.geomspace(0.5, 2, r, dtype=node.a.dtype)[:, None]
        q, inverse = product(q1, sigma * q2), product(q2.mT, q1.mT / sigma)
        a, bt = columns(node)
        return with_columns(node, product(a, inverse), product(bt, q.mT))

    return map_nodes(leaf, adapters)


def run(tx, steps):
    """The changes of the products in `steps` steps down ½‖s·A·B − T‖², each from the start; the G of
    this depends on the product alone. In a function of the adapters."""

    @jax.jit
    def changes(start):
        want = some_weights(start)

        def step(carry, _):
            adapters, state = carry
            g = jax.tree.map(jnp.subtract, products(adapters), want)
            updates, state = tx.update(gradients(adapters, g), state, adapters)
            new = optax.apply_updates(adapters, updates)
            return (new, state), jax.tree.map(jnp.subtract, products(new), products(start))

        return jax.lax.scan(step, (start, tx.init(start)), None, length=steps)[1]

    return changes


def largest(tree):
    return max(np.abs(np.asarray(x)).max() for x in jax.tree.leaves(tree))


def difference(got, want):
    return largest(jax.tree.map(np.subtract, *to_numpy(got, want))) / largest(want)


def to_numpy(*trees):
    return jax.tree.map(np.asarray, trees)


INVARIANT = {
    "riemannian": optax.chain(lora.optim.riemannian(delta=0.0), optax.sgd(1e-2)),
    "lora_pro, X = 0": optax.chain(lora.optim.lora_pro(delta=0.0, x="zero"), optax.sgd(0.1)),
    "lora_pro, symmetry": optax.chain(lora.optim.lora_pro(delta=0.0, x="symmetry"), optax.sgd(0.1)),
    "rite": lora.optim.lora_rite(1.0),
    "muon": lora.optim.lora_muon(10.0, weight_decay=0.01),
}
OTHERS = {"adam": optax.adam(0.1), "sgd": optax.sgd(1e-3)}


@pytest.mark.parametrize("name", [*INVARIANT, *OTHERS])
def test_invariance(name):
    """The change of s·A·B does not depend on how it is split, in one step and in four, nor on the
    sign of s; of RITE and Muon, not on how much of it is s, either."""
    start = random_adapters()
    other = in_another_basis(start)
    # A negative alpha is as good as another: s·A·B is what is trained.
    other = map_nodes(lambda n: dataclasses.replace(n, a=-n.a, scale=-n.scale), other)
    if name in ("rite", "muon"):
        other = map_nodes(lambda n: dataclasses.replace(n, a=n.a / 8, scale=n.scale * 8), other)
    assert difference(products(other), products(start)) < 1e-6
    changes = run((INVARIANT | OTHERS)[name], 4)
    got, want = changes(other), changes(start)
    first = lambda tree: jax.tree.map(lambda x: np.asarray(x)[0], tree)
    one, four = difference(first(got), first(want)), difference(got, want)
    if name in INVARIANT:
        assert one < 1e-5 and four < 1e-4
    else:
        assert one > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rite", "muon"])
def test_invariance_in_double(name):
    with jax.enable_x64():
        start = {"heads": random_adapters(0, jnp.float64)["heads"]}
        changes = run(INVARIANT[name], 4)
        assert difference(changes(in_another_basis(start)), changes(start)) < 1e-13


def assert_equivalent(update, want):
    """The equivalent gradient of update(g, adapters) is want(node, G), for every leaf."""

    @jax.jit
    def both(adapters, weights):
        d = update(gradients(adapters, weights), adapters)
        return equivalent(adapters, d), map_nodes(want, adapters, weights), d

    adapters = random_adapters()
    got, wanted, d = both(adapters, some_weights(adapters))
    assert_close(got, wanted)
    return d


def test_riemannian_identity():
    """dA·B + A·dB = s·(G·P_B + P_A·G), and with δ the formula of the paper."""

    def want(node, g):
        pa, pb = projections(node)
        return node.scale**2 * (product(pa, g) + product(g, pb))

    assert_equivalent(
        lambda g, ad: lora.optim.riemannian(0.0).update(g, optax.EmptyState(), ad)[0], want
    )

    def damped(node, g):
        (a, bt), (ga, gbt) = columns(node), columns(g)
        inverse = lambda x: jnp.linalg.inv(product(x.mT, x) + 0.5 * jnp.eye(4))
        return with_columns(g, product(ga, inverse(bt)), product(gbt, inverse(a)))

    adapters = random_adapters()
    g = gradients(adapters, some_weights(adapters))
    got, _ = jax.jit(lora.optim.riemannian(0.5).update)(g, optax.EmptyState(), adapters)
    assert_close(got, jax.jit(functools.partial(map_nodes, damped))(adapters, g))


@pytest.mark.parametrize("x", [*FREE, "random"])
def test_lora_pro_identity(x):
    """The equivalent gradient is G − (I − P_A)·G·(I − P_B) whatever X."""

    def with_random_x(node, g):
        (a, bt), (ga, gbt) = columns(node), columns(g)
        free = lambda aa, *_: normal(3, *aa.shape)
        da, db = nearest_gradients(a, bt.mT, ga, gbt.mT, node.scale, free, 0.0)
        return with_columns(node, da, db.mT)

    def update(g, adapters):
        if x == "random":
            return map_nodes(with_random_x, adapters, g)
        return lora.optim.lora_pro(delta=0.0, x=x).update(g, optax.EmptyState(), adapters)[0]

    def want(node, g):
        pa, pb = projections(node)
        return g - product(g - product(pa, g), jnp.eye(g.shape[-1]) - pb)

    assert_equivalent(update, want)


def test_lora_pro_stays_near_the_gradients():
    """The Sylvester equation's X is a minimum of ‖dA − g_A‖² + ‖dB − g_B‖²."""
    with jax.enable_x64():
        adapters = random_adapters(0, jnp.float64)
        g = gradients(adapters, some_weights(adapters))
        node, gn = adapters["heads"], g["heads"]
        (a, bt), (ga, gbt) = columns(node), columns(gn)
        of = functools.partial(nearest_gradients, a, bt.mT, ga, gbt.mT, node.scale, delta=0.0)

        @jax.jit
        def distance(shift):
            da, db = of(free=lambda *args: FREE["sylvester"](*args) + shift)
            return jnp.sum((da - ga) ** 2) + jnp.sum((db - gbt.mT) ** 2)

        zero = jnp.zeros((1, 4, 4))
        assert largest(jax.grad(distance)(zero)) < 1e-10 * distance(zero)
        assert distance(1e-3 * normal(1, 1, 4, 4, dtype=jnp.float64)) > distance(zero)


def test_lora_fa_identity():
    """With A fixed and g_B corrected, the equivalent gradient is P_A·G."""
    tx = lora.optim.lora_fa(optax.identity(), corrected=True)
    update = lambda g, adapters: tx.update(g, tx.init(adapters), adapters)[0]
    d = assert_equivalent(update, lambda node, g: product(projections(node)[0], g))
    assert not any(np.any(n.a) for n in d.values())
    adapters = random_adapters()
    tx = lora.optim.lora_fa(optax.identity())
    d, _ = tx.update(adapters, tx.init(adapters))
    assert_close([d["heads"].b, d["heads"].a], [adapters["heads"].b, jnp.zeros((16, 4))])


@pytest.mark.parametrize("corrected", [False, True])
def test_lora_fa_of_an_embedding(corrected):
    """There A starts at zero, and B is what was drawn: with A fixed nothing would ever be learnt.
    Corrected, the equivalent gradient is G·P_B."""
    node = random_adapters()["heads"]
    adapters = {"table": dataclasses.replace(node, embedding=True)}
    g = some_weights(adapters)
    tx = lora.optim.lora_fa(optax.identity(), corrected=corrected)
    d, _ = tx.update(gradients(adapters, g), tx.init(adapters), adapters)
    assert not np.any(d["table"].b)
    if corrected:
        want = {"table": product(g["table"], projections(node)[1])}
        assert_close(equivalent(adapters, d), want, factor=512)
    else:
        assert_close(d["table"].a, gradients(adapters, g)["table"].a)


@pytest.mark.parametrize("scan", [False, True])
def test_lora_fa_costs(scan):
    """Under jit the gradient of A is not computed and no input is kept for it: the compiled step is
    that of a model in which A is a constant."""
    layers, tokens, width = 4, 512, 128
    params = {"w": jnp.ones((layers, width, width))}
    unstacked = {str(i): jnp.ones((width, width)) for i in range(layers)}

    def fn(p, x):
        if scan:
            return jax.lax.scan(lambda x, w: (jax.nn.gelu(x @ w), None), x, p["w"])[0]
        for w in p.values():
            x = jax.nn.gelu(x @ w)
        return x

    params = params if scan else unstacked
    x = jnp.ones((tokens, width))
    survey = lora.survey(fn, params, x)
    adapters = lora.init(
        jax.random.key(0), params, lora.LoRAConfig(rank=4, targets=[*params]), survey
    )
    apply = lora.adapt(fn, plan="factored")
    fixed = lambda n: dataclasses.replace(n, a=jax.lax.stop_gradient(n.a))

    def compiled(tx, freeze=lambda adapters: adapters):
        def step(adapters, state):
            loss = lambda ad: jnp.sum(apply(lora.bind(params, freeze(ad)), x) ** 2)
            updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
            return optax.apply_updates(adapters, updates), state

        args = adapters, tx.init(adapters)
        c = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()
        dots = len(re.findall(r" dot\(|custom-call", c.as_text()))
        return dots, c.cost_analysis()["flops"], c.memory_analysis().temp_size_in_bytes

    full, ours = compiled(optax.adam(1e-3)), compiled(lora.optim.lora_fa(optax.adam(1e-3)))
    constant = compiled(lora.optim.lora_fa(optax.adam(1e-3)), lambda ad: map_nodes(fixed, ad))
    assert ours == constant
    assert full[0] > ours[0] and full[1] > ours[1]
    assert full[2] - ours[2] >= (layers - 1) * x.nbytes  # the first layer's input is an argument


def reference_rite(a, bt, ga, gbt, scale, state, t, b1=0.9, b2=0.999, eps=1e-6):
    """The paper's algorithm in numpy by QR, as the authors' code; one weight; both sides."""
    out = []
    for i, (g, y) in enumerate([(ga, bt), (gbt, a)]):
        m, old, v, rho = state[i]
        u, r = np.linalg.qr(y)
        inverse = np.linalg.pinv(r)
        g = g @ inverse / scale
        p = u.T @ old
        moved = p @ v @ p.T
        lost = np.max(np.linalg.eigvalsh(v) - np.linalg.eigvalsh(moved))
        d1, d2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (b1, b2))
        rho = d2 * (rho + max(lost, 0))
        v = d2 * moved + (1 - d2) * g.T @ g / len(g)
        w, e = np.linalg.eigh(v)
        m = d1 * m @ p.T + (1 - d1) * g @ (e / (np.sqrt(np.maximum(w, 0) + rho) + eps)) @ e.T
        state[i] = m, u, v, rho
        out.append(m @ inverse.T / scale)
    return out


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.999999])
def test_rite_s_decay_is_exact_in_fp32(beta):
    for t in (1, 2, 3, 1000, 10**6):
        want = beta * np.expm1((t - 1) * np.log(beta)) / np.expm1(t * np.log(beta)) if beta else 0
        np.testing.assert_allclose(
            _decay(beta, jnp.int32(t)), want, rtol=4 * tolerance("float32", 1)
        )


def test_rite_is_the_paper_s():
    """In another basis, QR for the polar one, and in fp64, the same steps, over five of them."""
    adapters = {"heads": random_adapters()["heads"]}
    tx = lora.optim.scale_by_lora_rite()
    state, update = tx.init(adapters), jax.jit(tx.update)
    zeros = np.zeros((4, 4))
    want_state = [(np.zeros((p, 4)), np.zeros((q, 4)), zeros, 0.0) for p, q in [(16, 24), (24, 16)]]
    for t in range(1, 6):
        g = gradients(adapters, some_weights(adapters, t))
        node = adapters["heads"]
        sides = [np.asarray(x[0], np.float64) for n in (node, g["heads"]) for x in columns(n)]
        want = reference_rite(*sides, node.scale, want_state, t)
        updates, state = update(g, state, adapters)
        assert_close([x[0] for x in columns(updates["heads"])], want, factor=256)
        adapters = optax.apply_updates(adapters, jax.tree.map(lambda u: -0.5 * u, updates))
    escaped = state.escaped["heads"]
    off = [x.item() - s[3] for x, s in zip((escaped.a, escaped.b), want_state)]
    assert max(map(abs, off)) < tolerance(jnp.float32) * largest(state.nu)  # of its eigenvalues
    assert largest(escaped) > 1e-3 * largest(state.nu)  # the bases did turn


def test_rite_without_memory_is_muon():
    adapters = random_adapters()
    g = gradients(adapters, some_weights(adapters))
    rite, muon = (
        lora.optim.scale_by_lora_rite(0.0, 0.0, eps=0.0),
        lora.optim.scale_by_lora_muon(0.0),
    )
    got, want = (jax.jit(tx.update)(g, tx.init(adapters), adapters)[0] for tx in (rite, muon))

    def leaf(node):
        _, i, o = sizes(node)
        x, y = columns(node)
        return with_columns(node, 2 * i**0.5 * x, 2 * o**0.5 * y)

    assert_close(got, map_nodes(leaf, want))


def test_muon_is_steepest_descent_in_the_spectral_norm():
    """Each half of the product's change is ½·msign of the projected gradient."""
    adapters = random_adapters()
    weights = some_weights(adapters)
    tx = lora.optim.scale_by_lora_muon(0.0)
    d, _ = jax.jit(tx.update)(gradients(adapters, weights), tx.init(adapters), adapters)

    def leaf(node, d, g):
        (a, bt), (da, dbt), (pa, pb) = columns(node), columns(d), projections(node)
        halves = node.scale * product(da, bt.mT), node.scale * product(a, dbt.mT)
        svds = (jnp.linalg.svd(x, full_matrices=False) for x in (product(g, pb), product(pa, g)))
        return halves, [product(u[..., :4], v[:, :4]) / 2 for u, _, v in svds]

    for got, want in jax.jit(functools.partial(map_nodes, leaf))(adapters, d, weights).values():
        assert_close([*got], want)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_muon_does_not_see_the_size_of_a_gradient(size):
    adapters = random_adapters()
    g = gradients(adapters, some_weights(adapters))
    tx = lora.optim.scale_by_lora_muon(0.0)
    step = jax.jit(lambda g: tx.update(g, tx.init(adapters), adapters)[0])
    assert_close(step(jax.tree.map(lambda x: x * np.float32(size), g)), step(g), factor=64)


def test_muon_decays_the_product():
    adapters = random_adapters()
    schedule = optax.linear_schedule(0.5, 0.25, 1)
    tx = lora.optim.lora_muon(schedule, weight_decay=0.2, other=optax.sgd(1.0))
    nothing, state = jax.tree.map(jnp.zeros_like, adapters), tx.init(adapters)
    update = jax.jit(tx.update)
    for keep in (1 - 0.2 * 0.5, 1 - 0.2 * 0.25):
        updates, state = update(nothing, state, adapters)
        new = optax.apply_updates(adapters, updates)
        before, after = to_numpy(products(adapters), products(new))
        assert_close(after, jax.tree.map(functools.partial(np.multiply, keep), before))
        adapters = new


# Training: every kind of leaf, every transformation.


def fn(p, x):
    x = p["table"][x]
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]
    return jnp.tanh(jnp.einsum("td,dhk->thk", x, p["heads"])).reshape(-1, 16) @ p["head"]


MODEL = {
    "table": (10, 8),
    "layers": (2, 8, 8),
    "heads": (8, 2, 8),
    "head": (16, 8),
}
PARAMS = {k: normal(i, *s) / 8**0.5 for i, (k, s) in enumerate(MODEL.items())}
IDS = jnp.arange(10).repeat(2)


@functools.cache
def model_adapters():
    """A DoRA, a stacked LoRA, a leaf in full and two rows of a table."""
    targets = ["layers", "heads"]
    config = lora.LoRAConfig(rank=2, alpha=4, targets=targets, full="head", rows={"table": [1, 2]})
    adapters = lora.init(jax.random.key(0), PARAMS, config, lora.survey(fn, PARAMS, IDS))
    return adapters | lora.methods.dora({"heads": PARAMS["heads"]}, {"heads": adapters["heads"]})


APPLY = lora.adapt(fn)
WANT = fn(jax.tree.map(lambda x: x + 0.3 * normal(9, *x.shape), PARAMS), IDS)


def loss(adapters):
    return jnp.mean((APPLY(lora.bind(PARAMS, adapters), IDS) - WANT) ** 2)


GRADIENT = jax.jit(jax.value_and_grad(loss))
METHODS = {
    "riemannian sgd": optax.chain(lora.optim.riemannian(1e-2), optax.sgd(0.05)),
    "riemannian adam": optax.chain(lora.optim.riemannian(), optax.adam(1e-2)),
    "lora_pro sgd": optax.chain(lora.optim.lora_pro(1e-2), optax.sgd(0.1)),
    "lora_pro adam": optax.chain(lora.optim.lora_pro(), optax.adam(1e-2)),
    "rite": optax.chain(
        optax.clip_by_global_norm(1e6), lora.optim.lora_rite(1e-2, weight_decay=1e-2)
    ),
    "muon": lora.optim.lora_muon(3e-2, weight_decay=1e-2, other=optax.adam(1e-2)),
    "fa": lora.optim.lora_fa(optax.adam(1e-2)),
    "fa corrected": lora.optim.lora_fa(optax.adam(1e-2), corrected=True),
}


@pytest.mark.parametrize("name", METHODS)
def test_training(name):
    """From B = 0 the loss falls, with a leaf of each kind; all leaves move, but LoRA-FA's A, which
    has no state."""
    tx, start = METHODS[name], model_adapters()
    state = tx.init(start)

    @jax.jit
    def step(adapters, state, g):
        updates, state = tx.update(g, state, adapters)
        return optax.apply_updates(adapters, updates), state

    end, last, (first, g) = start, state, GRADIENT(start)
    for _ in range(40):
        end, last = step(end, last, g)
        value, g = GRADIENT(end)
    assert value < 0.6 * first
    assert jax.tree.structure(last) == jax.tree.structure(state)
    moved = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), start, end)
    labels = jax.tree.leaves(lora.optim.labels(start))
    frozen = {"a"} if name.startswith("fa") else set()
    assert jax.tree.leaves(moved) == [label not in frozen for label in labels]
    if frozen:
        sizes = sum(x.size for x, of in zip(jax.tree.leaves(start), labels) if of != "a")
        assert sum(x.size for x in jax.tree.leaves(last)) == 2 * sizes + 1


@pytest.mark.parametrize("make", [lora.optim.lora_rite, lora.optim.lora_muon])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_inject_hyperparams(make, weight_decay):
    """Numbers may be arrays of the state, as `optax.inject_hyperparams` makes them."""
    adapters = {"heads": random_adapters()["heads"]}
    g = gradients(adapters, some_weights(adapters))
    found = []
    for of in (make, optax.inject_hyperparams(make)):
        tx = of(learning_rate=0.1, weight_decay=weight_decay)
        update, state = jax.jit(tx.update), tx.init(adapters)
        for _ in range(2):
            updates, state = update(g, state, adapters)
        found.append(updates)
    assert_close(*found)


PLAIN = ["riemannian sgd", "lora_pro sgd", "rite", "muon", "fa corrected"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_jit_is_eager(name):
    tx, adapters = METHODS[name], {"heads": random_adapters()["heads"]}
    g = gradients(adapters, some_weights(adapters))
    state = jax.jit(tx.update)(g, tx.init(adapters), adapters)[1]
    assert_close(jax.jit(tx.update)(g, state, adapters), tx.update(g, state, adapters), factor=256)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_a_stack_is_its_layers(name):
    tx = METHODS[name]
    stacked = {"experts": random_adapters()["experts"]}
    geometry = lora.Geometry((0, 1), (2,))
    layer = lambda tree, i: {
        "experts": dataclasses.replace(
            tree["experts"], a=tree["experts"].a[i], b=tree["experts"].b[i], geometry=geometry
        )
    }
    update = jax.jit(tx.update)
    state, states = tx.init(stacked), [tx.init(layer(stacked, i)) for i in range(3)]
    for seed in range(2):
        g = gradients(stacked, some_weights(stacked, seed))
        updates, state = update(g, state, stacked)
        for i in range(3):
            alone, states[i] = update(layer(g, i), states[i], layer(stacked, i))
            assert_close(layer(updates, i), alone, factor=256)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_bf16(name):
    """Products in fp32, whatever the adapters are; updates in the gradients' type."""
    tx, adapters = METHODS[name], {"heads": random_adapters()["heads"]}
    adapters = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapters)
    g = jax.tree.map(lambda x: x.astype(jnp.bfloat16), gradients(adapters, some_weights(adapters)))
    state = tx.init(adapters)
    updates, after = jax.jit(tx.update)(g, state, adapters)
    own = [x for x in jax.tree.leaves(state) if x.ndim]
    if name in ("rite", "muon"):
        assert own and all(x.dtype == jnp.float32 for x in own)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(updates))
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (g, adapters))
    want, _ = jax.jit(tx.update)(exact[0], tx.init(exact[1]), exact[1])
    assert_close(updates, want, jnp.bfloat16, factor=4)


@pytest.mark.parametrize("name", ["riemannian sgd", "lora_pro sgd", "rite", "muon"])
def test_zero_b(name):
    """At B = 0 nothing is divided by zero, and the first step leaves A where it is, but for decay."""
    start = {"heads": random_adapters()["heads"]}
    start["heads"] = dataclasses.replace(start["heads"], b=jnp.zeros_like(start["heads"].b))
    first = jax.tree.map(lambda x: x[0], run(METHODS[name], 2)(start))
    g = gradients(start, some_weights(start))
    updates, _ = jax.jit(METHODS[name].update)(g, METHODS[name].init(start), start)
    assert largest(updates["heads"].a) <= 2e-4 * largest(start["heads"].a)
    assert bool(jnp.isfinite(first["heads"]).all() and jnp.any(first["heads"]))


def test_power_of_a_singular_matrix():
    gram = jnp.diag(jnp.array([4.0, 1.0, 0.0]))
    assert_close(power(gram, -0.5), jnp.diag(jnp.array([0.5, 1.0, 0.0])))
    assert_close(power(gram, -1, 1.0), jnp.diag(jnp.array([0.2, 0.5, 1.0])))
    assert_close(power(jnp.zeros((3, 3)), -1), jnp.zeros((3, 3)))


def test_masks():
    """Under optax.partition by leaf kinds, and in one tree with frozen leaves."""
    adapters = {name: model_adapters()[name] for name in ("heads", "head")}
    kind = lambda label: "factors" if label in ("a", "b") else "rest"
    labels = lambda tree: jax.tree.map(kind, lora.optim.labels(tree))
    for tx in (lora.optim.riemannian(), lora.optim.scale_by_lora_muon()):
        both = optax.partition({"factors": tx, "rest": optax.sgd(0.5)}, labels)
        g = jax.tree.map(jnp.ones_like, adapters)
        updates, _ = jax.jit(both.update)(g, both.init(adapters), adapters)
        assert_close(updates["head"].value, jnp.full((16, 8), -0.5))
        assert_close(updates["heads"].magnitude, jnp.full((2, 8), -0.5))
        assert np.any(np.asarray(updates["heads"].b) != 1)
    apart = optax.partition(dict.fromkeys(("a", "b", "full", "magnitude"), tx), lora.optim.labels)
    with fails("A and B together"):
        apart.update(g, apart.init(adapters), adapters)
    tree = {"params": PARAMS, "adapters": adapters}
    grads = jax.tree.map(jnp.ones_like, tree)
    for tx in (
        lora.optim.lora_rite(0.1),
        lora.optim.lora_fa(optax.adam(0.1)),
        lora.optim.trained_only(lora.optim.riemannian()),
    ):
        updates, _ = jax.jit(tx.update)(grads, tx.init(tree), tree)
        assert largest(updates["params"]) == 0
        assert np.any(np.asarray(updates["adapters"]["heads"].b) != 1)


def test_errors():
    adapters = random_adapters()
    for tx in (
        lora.optim.riemannian(),
        lora.optim.lora_pro(),
        lora.optim.scale_by_lora_rite(),
        lora.optim.lora_muon(0.1),
    ):
        with fails(r"needs the adapters.*tx.update\(grads, state, adapters\)"):
            tx.update(adapters, tx.init(adapters))
    with fails("x='best': expected one of 'sylvester', 'zero', 'symmetry'"):
        lora.optim.lora_pro(x="best")


def test_eight_devices():
    """Sharded factors, moments and parameters, with the shardings that the library gives them: the
    updates of one device."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    specs = {"heads": P("fsdp", None, "tp"), "experts": P(None, None, "fsdp", "tp")}
    adapters = random_adapters()
    g = gradients(adapters, some_weights(adapters))
    weights = {name: normal(0, *shape) for name, shape in SHAPES.items()}
    where = lora.parallel.shardings(specs, adapters, mesh=mesh)
    where_weights = {k: jax.NamedSharding(mesh, s) for k, s in specs.items()}
    txs = [METHODS[name] for name in PLAIN]
    galore = lora.optim.galore(0.1, rank=2, update_proj_gap=1, targets=TARGETS)

    @jax.jit
    def updates(g, adapters, weights):
        # Of GaLore the updates alone: the signs of singular vectors, and of its moments, are anyone's.
        galore_updates, _ = galore.update(weights, galore.init(weights), weights)
        return [tx.update(g, tx.init(adapters), adapters) for tx in txs], galore_updates

    trees = g, adapters, weights
    spread = [jax.device_put(x, to) for x, to in zip(trees, (where, where, where_weights))]
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(spread))
    assert_close(updates(*spread), updates(*trees), factor=1024)


def test_states_are_sharded_like_the_adapters():
    adapters = random_adapters()
    specs = lora.parallel.shardings(dict.fromkeys(SHAPES, P("fsdp")), adapters)
    for tx, parts in (
        (lora.optim.scale_by_lora_rite(), ("mu", "basis")),
        (lora.optim.scale_by_lora_muon(), ("mu",)),
    ):
        state = lora.parallel.state_shardings(jax.eval_shape(tx.init, adapters), adapters, specs)
        for part in parts:
            assert getattr(state, part)["heads"].a == P("fsdp", None)
            assert getattr(state, part)["experts"].b == P("fsdp", None, None)
    rite = lora.parallel.state_shardings(
        jax.eval_shape(lora.optim.scale_by_lora_rite().init, adapters), adapters, specs
    )
    for part in (rite.nu, rite.escaped):  # a weight of the stack has its own
        assert part["experts"].a == P("fsdp", None, None, None)
        assert part["experts"].b == P("fsdp", None, None)
