"""What the gradient keeps of the forward pass: `lora.adapt(fn, save=)`."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
import rand
from common import adapted, assert_close, noisy
from flax import nnx
from jax._src.ad_checkpoint import saved_residuals

import lora_jax as lora

ROWS, WIDTH, HIDDEN, LAYERS = 8, 320, 384, 3  # products sum over more than 256 numbers


def layer(x, w):
    y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
    return x + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"]


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, p)[0]


def unrolled(p, x):
    for i in range(LAYERS):
        x = layer(x, jax.tree.map(lambda v, i=i: v[i], p))
    return x


def params():
    shapes = dict(gate=(WIDTH, HIDDEN), up=(WIDTH, HIDDEN), down=(HIDDEN, WIDTH))
    return {
        n: rand.normal(jax.random.key(i), (LAYERS, *s)) / s[0] ** 0.5
        for i, (n, s) in enumerate(shapes.items())
    }


X = rand.normal(jax.random.key(9), (ROWS, WIDTH))


def kept(fn, plan="factored", method=lambda _, ad: ad, **options):
    """{shape: number} of the residuals that are no arguments, rows in them."""
    p = params()
    _, ad = adapted(fn, p, X, targets=list(p))
    ad = method(p, ad)
    f = lora.adapt(fn, plan=plan, **options)
    found = collections.Counter()
    for aval, why in saved_residuals(lambda ad, x: jnp.sum(f(lora.bind(p, ad), x) ** 2), ad, X):
        found[aval.shape] += ROWS in aval.shape and "argument" not in why
    return +found


@pytest.mark.parametrize("plan", ["factored", "beside"])
def test_products_are_kept_once_and_nothing_else(plan):
    """Of each layer its input, its two products of the hidden size, and the x·A."""
    assert kept(scanned, plan, save="products") == {
        (LAYERS, ROWS, WIDTH): 1,
        (LAYERS, ROWS, HIDDEN): 2,
        (LAYERS, ROWS, 2): 3,
        (ROWS, WIDTH): 1,  # the output, of which the loss is a square
    }
    assert kept(scanned, plan)[LAYERS, ROWS, HIDDEN] > 4  # silu's parts, and what enters `down`


def test_without_a_loop_the_function_is_the_body():
    found = kept(unrolled, save="products")
    assert found[ROWS, HIDDEN] == 2 * LAYERS
    assert found[ROWS, HIDDEN] < kept(unrolled)[ROWS, HIDDEN]


@pytest.mark.parametrize("fn", [scanned, unrolled])
@pytest.mark.parametrize("save", ["products", jax.checkpoint_policies.nothing_saveable])
def test_gradients_are_the_same(fn, save):
    p = params()
    f, ad = adapted(fn, p, X, targets=list(p))
    g = lora.adapt(fn, save=save)
    loss = lambda f: lambda ad, x: jnp.sum(f(lora.bind(p, ad), x) ** 2)
    got, want = (jax.jit(jax.value_and_grad(loss(h), (0, 1)))(ad, X) for h in (g, f))
    assert_close(got, want)


def test_a_policy_of_the_model_is_kept():
    """The body's own checkpoint decides of what it holds."""
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jax.checkpoint(layer)(x, w), None), x, p)[0]
    assert (LAYERS, ROWS, HIDDEN) not in kept(fn, save="products")


def test_dora_keeps_what_lora_keeps():
    """Not the output after the gain beside the one before it."""
    p = params()
    _, ad = adapted(scanned, p, X, targets=list(p))
    temp = lambda ad, save: (
        jax.jit(jax.grad(lambda ad: jnp.sum(lora.adapt(scanned, save=save)(lora.bind(p, ad), X))))
        .lower(ad)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )
    dora = lora.methods.dora(p, ad)
    assert temp(dora, None) <= 1.05 * temp(ad, None)
    assert temp(dora, "products") <= 1.05 * temp(ad, "products")
    all_of_it = jax.checkpoint_policies.everything_saveable
    assert temp(dora, all_of_it) > 1.05 * temp(ad, None)
    size = lambda found: sum(n * LAYERS * ROWS * s[-1] for s, n in found.items() if len(s) == 3)
    found = kept(scanned, method=lora.methods.dora)
    assert size(found) <= size(kept(scanned))
    assert found[LAYERS, ROWS, HIDDEN] == 2  # the products: the activation is made again


def test_the_gradient_of_magnitudes_that_are_zero():
    """Where m = 0 the output says nothing of the product before it, and the gradient needs that."""
    p = params()
    _, ad = adapted(scanned, p, X, targets=list(p))
    dora = lora.methods.dora(p, ad)
    # not the same units of gate and up, whose product would have no gradient
    dora = {
        n: dataclasses.replace(d, magnitude=d.magnitude.at[:, i::3].set(0))
        for i, (n, d) in enumerate(dora.items())
    }
    got = jax.grad(lambda ad: jnp.sum(lora.adapt(scanned)(lora.bind(p, ad), X) ** 2))(dora)
    v = lora.merge(p, ad)  # weights in full, and the norm as if it were a number
    n = {k: jnp.linalg.norm(v[k], axis=1, keepdims=True) for k in p}
    paper = lambda m: jnp.sum(scanned({k: m[k][:, None] * v[k] / n[k] for k in p}, X) ** 2)
    of_m = jax.grad(paper)({k: d.magnitude for k, d in dora.items()})
    assert all(jnp.any(g[:, i::3] != 0) for i, g in enumerate(of_m.values()))
    assert_close({k: d.magnitude for k, d in got.items()}, of_m, factor=64)


@pytest.mark.parametrize("method", [lambda _, ad: ad, lora.methods.dora])
@pytest.mark.parametrize("save", [None, "products"])
def test_effects_in_order_are_not_repeated(method, save, capfd):
    """jax.checkpoint refuses them."""

    def fn(p, x):
        def step(x, w):
            jax.debug.print("a step", ordered=True)
            return jnp.tanh(x @ w["w"]), None

        return jax.lax.scan(step, x, p)[0]

    p, x = {"w": jnp.ones((2, 3, 3)) / 3}, jnp.ones((1, 3))
    _, ad = adapted(fn, p, x, targets=["w"])
    ad = method(p, ad)
    jax.grad(lambda ad: jnp.sum(lora.adapt(fn, save=save)(lora.bind(p, ad), x)))(ad)
    jax.effects_barrier()
    assert "a step" in capfd.readouterr().out


@pytest.mark.parametrize("door", ["bind", "attach"])
def test_of_nnx(door):
    """The same gradients, and less that is kept; also by the attached model's own methods."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
            self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

        def __call__(self, x):
            return x + self.down(jax.nn.silu(self.up(jax.nn.silu(x))))

    model, config = Net(nnx.Rngs(0)), lora.LoRAConfig(rank=2, targets="kernel")
    adapters = noisy(lora.init(jax.random.key(0), model, config))

    def loss(save, x):
        if door == "attach":
            return jnp.sum(lora.attach(model, adapters, save=save)(x) ** 2)
        return jnp.sum(lora.adapt(Net.__call__, save=save)(lora.bind(model, adapters), x) ** 2)

    grads = [jax.grad(functools.partial(loss, save))(X) for save in (None, "products")]
    assert_close(*grads, factor=64)
    kept = [len(saved_residuals(functools.partial(loss, save), X)) for save in (None, "products")]
    assert kept[1] < kept[0]


def test_unknown_save():
    with pytest.raises(lora.LoRAError, match="save='all' is neither None, \"products\" nor a pol"):
        lora.adapt(scanned, save="all")
