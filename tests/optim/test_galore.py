"""GaLore: against numpy over a change of the subspace, its memory, and any tree of parameters."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rand
from common import assert_close, fails, tolerance

import lora_jax as lora


@pytest.fixture(autouse=True)
def optax_promotes():
    """optax itself mixes types, as `beta ** count`."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def normal(seed, *shape):
    return rand.normal(jax.random.key(seed), shape)


def trajectory(tx, params, gradients):
    """The updates of one gradient after the other, and the last state."""
    update = jax.jit(tx.update)
    state, out = tx.init(params), []
    for g in gradients:
        updates, state = update(g, state, params)
        out.append(updates)
    return out, state


def reference(gradients, rank, gap, scale, b1=0.9, b2=0.999, eps=1e-8):
    """Algorithm 2 in numpy, of one matrix; a singular vector keeps the sign of the one before it."""
    mu = nu = p = 0.0
    for t, g in enumerate(gradients):
        g = np.asarray(g, np.float64)
        wide = g.shape[0] <= g.shape[1]
        g = g if wide else g.T
        if t % gap == 0:
            new = np.linalg.svd(g)[0][:, :rank]
            p = new * np.where((new * p).sum(0) < 0, -1, 1)
        r = p.T @ g
        mu, nu = b1 * mu + (1 - b1) * r, b2 * nu + (1 - b2) * r**2
        n = (mu / (1 - b1 ** (t + 1))) / (np.sqrt(nu / (1 - b2 ** (t + 1))) + eps)
        yield scale * (p @ n if wide else (p @ n).T)


GRADIENTS = [{"wide": normal(i, 12, 20), "tall": normal(9 + i, 20, 12)} for i in range(5)]


def test_five_steps():
    """A wide and a tall matrix, with new subspaces at steps 0, 2 and 4; moments are kept."""
    tx = lora.optim.scale_by_galore(rank=3, update_proj_gap=2, scale=0.25)
    got, state = trajectory(tx, GRADIENTS[0], GRADIENTS)
    for name in ("wide", "tall"):
        want = reference([g[name] for g in GRADIENTS], 3, 2, 0.25)
        assert_close([u[name] for u in got], [*want], factor=256)
    shapes = lambda part: {name: x.shape for name, x in part.items()}
    assert shapes(state.projector) == {"wide": (12, 3), "tall": (3, 12)}
    assert shapes(state.mu) == shapes(state.nu) == {"wide": (3, 20), "tall": (20, 3)}
    fresh = reference([g["wide"] for g in GRADIENTS[4:]], 3, 2, 0.25)
    assert np.abs(next(fresh) - got[4]["wide"]).max() > 1e-2  # what losing the moments would do


def test_the_sign_of_a_singular_vector_does_not_matter():
    """Minus the gradient has the same subspace; an SVD may return any signs."""
    tx = lora.optim.scale_by_galore(rank=2, update_proj_gap=1)
    got, _ = trajectory(tx, GRADIENTS[0], GRADIENTS)
    flipped, _ = trajectory(tx, GRADIENTS[0], [jax.tree.map(lambda x: -x, g) for g in GRADIENTS])
    assert_close(flipped, jax.tree.map(lambda x: -x, got), factor=256)


def test_full_rank_is_adam():
    tx = lora.optim.galore(0.1, rank=12, scale=0.25)
    got, _ = trajectory(tx, GRADIENTS[0], GRADIENTS)
    want, _ = trajectory(optax.adam(0.25 * 0.1), GRADIENTS[0], GRADIENTS)
    assert_close(got, want)
    tree = {"w": normal(0, 4, 6), "bias": normal(1, 6), "scalar": normal(2)}
    got, _ = trajectory(lora.optim.galore(0.1, rank=1, weight_decay=0.1), tree, [tree])
    want, _ = trajectory(optax.adamw(0.1, weight_decay=0.1), tree, [tree])
    for name in ("bias", "scalar"):  # plain Adam, without α
        assert_close(got[0][name], want[0][name])


HEADS = {"q": (8, 2, 8), "out": (2, 8, 8), "layers": (3, 8, 12), "plain": (8, 8)}
CONFIG = lora.LoRAConfig(
    rank=1,
    targets=["q", "out", "layers"],
    rules=[
        lora.Rule("q", in_axes=(0,), out_axes=(1, 2)),
        lora.Rule("out", in_axes=(0, 1), out_axes=(2,)),
        lora.Rule("layers", in_axes=(1,), out_axes=(2,), batch_axes=(0,)),
    ],
)


def test_axes_come_from_targets():
    """Heads are merged as the leaf's use says, each of a stack has a subspace of its own, and what
    is no target is trained by plain Adam."""
    trees = [{k: normal(i, *s) for k, s in HEADS.items()} for i in range(3)]
    targets = lora.select(trees[0], CONFIG)
    got, _ = trajectory(
        lora.optim.galore(1.0, rank=2, update_proj_gap=2, targets=targets), trees[0], trees
    )
    flat = lambda t: {
        "q": t["q"].reshape(8, 16),
        "out": t["out"].reshape(16, 8),
        **{f"layer {i}": t["layers"][i] for i in range(3)},
    }
    want, _ = trajectory(
        lora.optim.galore(1.0, rank=2, update_proj_gap=2),
        flat(trees[0]),
        [flat(t) for t in trees],
    )
    assert_close([flat(t) for t in got], want, factor=256)
    adam, _ = trajectory(optax.adam(1.0), trees[0]["plain"], [t["plain"] for t in trees])
    assert_close([t["plain"] for t in got], adam)


def test_memory():
    """W and its gradient, mk each, and mr + 2rk of state, m ≤ k: by shapes and by the compiler."""
    m, k, r = 64, 192, 4
    params = {"tall": jax.ShapeDtypeStruct((k, m), "float32")}
    tx = lora.optim.scale_by_galore(rank=r)
    state = jax.eval_shape(tx.init, params)
    assert sum(x.size for x in jax.tree.leaves(state)) == m * r + 2 * r * k + 1
    compiled = (
        jax.jit(lambda g, s: tx.update(g, s), donate_argnums=1).lower(params, state).compile()
    )
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == 4 * (m * k + m * r + 2 * r * k + 1)
    assert memory.alias_size_in_bytes == 4 * (m * r + 2 * r * k + 1)
    adam = jax.eval_shape(optax.scale_by_adam().init, params)
    assert sum(x.size for x in jax.tree.leaves(adam)) == 2 * m * k + 1


def test_a_subspace_only_when_due():
    """It is found in a branch of a cond, and the projector stays the same in between."""
    tx = lora.optim.scale_by_galore(rank=3, update_proj_gap=3)
    params = GRADIENTS[0]
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params))
    (cond,) = (e for e in jaxpr.eqns if "eigh" in str(e))
    assert cond.primitive.name == "cond"
    assert sorted("eigh" in str(branch) for branch in cond.params["branches"]) == [False, True]
    projectors, state = [], tx.init(params)
    update = jax.jit(tx.update)
    for g in GRADIENTS:
        _, state = update(g, state)
        projectors.append(state.projector["wide"])
    same = [bool(jnp.all(x == y)) for x, y in itertools.pairwise(projectors)]
    assert same == [True, True, False, True]


@pytest.mark.slow
def test_training():
    """A regression in which every kind of leaf takes part; jit is eager."""
    params = {"up": normal(0, 8, 16) / 3, "stack": normal(1, 2, 16, 16) / 4, "bias": jnp.zeros(16)}
    x, want = normal(3, 32, 8), normal(4, 32, 16)

    def fn(p, x):
        x = jnp.tanh(x @ p["up"] + p["bias"])
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["stack"])[0]

    survey = lora.survey(fn, params, x)
    targets = lora.select(params, lora.LoRAConfig(rank=1), survey)
    loss = lambda p: jnp.mean((fn(p, x) - want) ** 2)
    tx = lora.optim.galore(0.03, rank=4, update_proj_gap=10, targets=targets)

    @functools.partial(jax.jit, static_argnums=2)
    def train(params, state, steps):
        def step(carry, _):
            params, state = carry
            value, g = jax.value_and_grad(loss)(params)
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, state), None, length=steps)

    (end, state), values = train(params, tx.init(params), 40)
    assert values[-1] < 0.7 * values[0]
    g = jax.grad(loss)(end)
    assert_close(jax.jit(tx.update)(g, state, end)[0], tx.update(g, state, end)[0], factor=256)


# name -> singular values of a matrix (96, 160)
SPECTRA = {
    "flat": np.linspace(1, 0.5, 96),
    "0.9": 0.9 ** np.arange(96.0),
    "1/i²": 1 / (1 + np.arange(96.0)) ** 2,
    "of rank 40": np.where(np.arange(96) < 40, 0.9 ** np.arange(96.0), 0),
}


@functools.cache
def spectrum(name, scale):
    """A matrix (96, 160) in fp64, and its left singular vectors."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(m, 96)))[0] for m in (96, 160))
    return scale * (u * SPECTRA[name]) @ v.T, u


@pytest.mark.parametrize("scale", [1.0, 1e-25])
def test_the_precision_of_a_subspace(scale):
    """That of the r largest singular values, to some ε·σ₁/gap where σ_r is 10⁻⁴ of σ₁, too, and
    orthonormal beyond. In G·Gᵀ alone those below √ε·σ₁ = 3·10⁻⁴·σ₁ are noise."""
    wide = {n: jnp.asarray(spectrum(n, scale)[0], jnp.float32) for n in SPECTRA}
    params = {"wide": wide, "tall": jax.tree.map(jnp.transpose, wide)}
    found = jax.jit(
        lambda g: [
            (tx := lora.optim.scale_by_galore(rank=r)).update(g, tx.init(g))[1].projector
            for r in (10, 40, 80)
        ]
    )(params)
    for projector, (way, name) in itertools.product(found, itertools.product(params, SPECTRA)):
        p = np.asarray(projector[way][name], np.float64)
        p = p if way == "wide" else p.T
        g, u = spectrum(name, scale)
        s, r = SPECTRA[name], p.shape[1]
        np.testing.assert_allclose(p.T @ p, np.eye(r), atol=tolerance(jnp.float32))
        if s[r - 1] >= 1e-4:
            sine = np.linalg.norm(u[:, r:].T @ p, 2)
            assert sine < tolerance(jnp.float32) / (s[r - 1] - s[r]), (name, r)
        lost = np.linalg.norm(g - p @ (p.T @ g)) / scale
        assert lost < np.linalg.norm(s[r:]) + tolerance(jnp.float32)


def test_no_gradient():
    """Zeros move nothing, and what comes next finds a subspace of its own."""
    tx = lora.optim.scale_by_galore(rank=3, update_proj_gap=1)
    zeros = jax.tree.map(jnp.zeros_like, GRADIENTS[0])
    (still, moved), _ = trajectory(tx, zeros, [zeros, GRADIENTS[0]])
    assert not any(np.any(x) for x in still.values())
    assert all(np.all(np.isfinite(x)) and np.any(x) for x in moved.values())


def test_bf16_and_masks():
    params = {"w": normal(0, 8, 12).astype(jnp.bfloat16), "table": normal(1, 8, 8)}
    tx = optax.partition(
        {"train": lora.optim.galore(0.1, rank=2), "freeze": optax.set_to_zero()},
        {"w": "train", "table": "freeze"},
    )
    (updates,), state = trajectory(tx, params, [params])
    assert updates["w"].dtype == jnp.bfloat16 and not np.any(updates["table"])
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state) if x.ndim)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), {"w": params["w"]})
    (want,), _ = trajectory(lora.optim.galore(0.1, rank=2), exact, [exact])
    assert_close(updates["w"], want["w"], jnp.bfloat16, factor=4)


def test_errors():
    with fails(r"rank=0: expected an integer >= 1"):
        lora.optim.galore(0.1, rank=0)
    targets = lora.select({k: normal(0, *s) for k, s in HEADS.items()}, CONFIG)
    with fails(r"(?s)'out': .* no such leaf.*'q': expected \(8, 2, 8\), found \(8, 8\)"):
        lora.optim.galore(0.1, targets=targets).init({"q": normal(0, 8, 8)})
