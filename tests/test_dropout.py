"""Dropout: on the branch's input only; masks differ by layer, step and use; none without a key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lora

KEY = jax.random.key(5)
D = 64
X = jnp.ones((4, D))


def branches(fn, params, rate=0.5, key=KEY, x=X, **kwargs):
    """`fn` with A = identity and B = identity, so that an update's output is its dropped input."""
    survey = lora.survey(fn, params, x)
    rules = [lora.Rule("*", **kwargs)] if kwargs else []
    config = lora.LoRAConfig(rank=D, alpha=D, targets=list(params), dropout=rate, rules=rules)
    adapters = lora.init(KEY, params, config, survey)
    eye = lambda v: jnp.broadcast_to(jnp.eye(D), v.shape)
    adapters = jax.tree.map(eye, adapters)
    return lora.adapt(fn)(lora.bind(params, adapters, dropout_key=key), x)


ZERO = jnp.zeros((D, D))


def test_rate_scale_and_branch_only():
    fn = lambda p, x: x @ p["w"]
    out = np.asarray(branches(fn, {"w": ZERO}, rate=0.25))
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}
    assert abs((out == 0).mean() - 0.25) < 0.1
    np.testing.assert_allclose(
        branches(fn, {"w": ZERO}, key=None), X
    )  # deterministic without a key
    base = branches(fn, {"w": 2 * jnp.eye(D)}, rate=0.25)
    np.testing.assert_allclose(base - out, 2 * X, rtol=1e-6)  # the base's input is not dropped


def distinct(outs):
    outs = [np.asarray(o) for o in outs]
    return all(not np.array_equal(a, b) for i, a in enumerate(outs) for b in outs[:i])


def test_same_key_same_mask_other_key_other_mask():
    fn = lambda p, x: x @ p["w"]
    a, b = (branches(fn, {"w": ZERO}, key=KEY) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert distinct([a, branches(fn, {"w": ZERO}, key=jax.random.key(6))])


def test_masks_differ_by_leaf_and_use():
    fn = lambda p, x: (x @ p["w"], x @ p["w"], x @ p["v"])
    assert distinct(branches(fn, {"w": ZERO, "v": ZERO}))
    matmul = jax.jit(jnp.matmul)
    fn = lambda p, x: (matmul(x, p["w"]), matmul(x, p["w"]), matmul(x, p["v"]))
    assert distinct(branches(fn, {"w": ZERO, "v": ZERO}))


@pytest.mark.parametrize("join", ["stack", "concatenate", "of layers", "uneven", "with an array"])
def test_masks_of_joined_weights_are_those_of_each_alone(join):
    """Each part of the joined axis keeps its seed: the first steps drop what the leaf alone does,
    in whichever order they are joined."""
    layers = {"of layers": (2, 2), "uneven": (3, 1)}.get(join, ())
    shapes = [(n, D, D) for n in layers] or [(D, D)] * 2
    params = {name: jnp.zeros(s) for name, s in zip("wu", shapes)}
    joined = {
        "stack": lambda a, b: jnp.stack([a, b]),
        "concatenate": lambda a, b: jnp.concatenate([a[None], b[None]]),
        "with an array": lambda a, b: jnp.stack([a, jnp.ones((D, D)), b]),
    }.get(join, lambda a, b: jnp.concatenate([a, b]))
    scan = lambda ws, x: lax.scan(lambda c, w: (c, x @ w), 0.0, ws)[1]

    def check(a, b):
        out = branches(lambda p, x: scan(joined(p[a], p[b]), x), params)
        own = lambda p, x: scan(p[a] if layers else p[a][None], x)
        alone = branches(own, {a: params[a]})
        np.testing.assert_array_equal(out[: len(alone)], alone)
        assert distinct(out)
        # and one of them, where no loop cuts it
        last = branches(lambda p, x: x @ joined(p[a], p[b])[-1], params)
        one = branches(lambda p, x: x @ (p[b][-1] if layers else p[b]), {b: params[b]})
        np.testing.assert_array_equal(last, one)

    check("w", "u")
    check("u", "w")


JOINS = {
    "outputs": lambda ws: jnp.concatenate(ws, 1),
    "with an array": lambda ws: jnp.concatenate([*ws, jnp.zeros((D, D))], 1),
    "twice": lambda ws: jnp.concatenate([jnp.concatenate(ws[:2], 1), *ws[2:]], 1),
    "twice, later": lambda ws: jnp.concatenate([ws[0], jnp.concatenate(ws[1:], 1)], 1),
    "stacked": lambda ws: jnp.stack(ws, 1).reshape(D, 3 * D),
    "padded": lambda ws: sum(
        lax.pad(w, 0.0, ((0, 0, 0), (i * D, (2 - i) * D, 0))) for i, w in enumerate(ws)
    ),
}


@pytest.mark.parametrize("name", JOINS)
def test_masks_of_leaves_joined_in_one_product_are_those_of_each_alone(name):
    params = {n: jnp.zeros((D, D)) for n in "uvw"}
    out = branches(lambda p, x: x @ JOINS[name]([p[n] for n in "uvw"]), params)
    alone = [branches(lambda p, x, n=n: x @ p[n], {n: params[n]}) for n in "uvw"]
    np.testing.assert_array_equal(out[:, : 3 * D], jnp.concatenate(alone, 1))
    assert distinct(alone)
    two = {n: params[n] for n in "uv"}
    for fn in (jnp.add, lambda u, v: jnp.stack([u, v]).sum(0)):
        total = branches(lambda p, x, fn=fn: x @ fn(p["u"], p["v"]), two)
        np.testing.assert_array_equal(total, alone[0] + alone[1])


@pytest.mark.parametrize("remat", [False, True])
def test_masks_differ_by_scanned_layer(remat):
    wrap = jax.checkpoint if remat else lambda f: f
    fn = lambda p, x: lax.scan(wrap(lambda c, w: (c, x @ w)), 0.0, p["w"])[1]
    assert distinct(branches(fn, {"w": jnp.zeros((3, D, D))}))


def test_masks_differ_by_step_of_a_shared_weight():
    fn = lambda p, x: lax.scan(lambda c, _: (c, x @ p["w"]), 0.0, length=3)[1]
    assert distinct(branches(fn, {"w": ZERO}))

    def loop(p, x):
        return lax.while_loop(
            lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1].at[s[0]].set(x @ p["w"])),
            (0, jnp.zeros((3, *x.shape))))[1]  # fmt: skip

    assert distinct(branches(loop, {"w": ZERO}))


def test_gradient_uses_the_forward_mask():
    """Under remat the backward pass draws the mask again: it must be the forward pass's."""
    fn = lambda p, x: jax.checkpoint(lambda x, w: jnp.sin(x @ w))(x, p["w"])
    params = {"w": jnp.eye(D)}
    config = lora.LoRAConfig(rank=4, targets="w", dropout=0.5)
    adapters = jax.tree.map(lambda v: v + 0.1, lora.init(KEY, params, config))
    f = lora.adapt(fn)
    loss = lambda ad: jnp.sum(f(lora.bind(params, ad, dropout_key=KEY), X))
    forward = jax.jvp(loss, (adapters,), (adapters,))[1]  # no remat in forward mode
    grads = jax.grad(loss)(adapters)
    backward = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grads, adapters)))
    np.testing.assert_allclose(backward, forward, rtol=1e-4)


def test_conv_and_experts_drop_their_input():
    conv = lambda p, x: lax.conv_general_dilated(
        x[None], p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )[0]
    out = np.asarray(branches(conv, {"w": jnp.zeros((1, D, D))}))
    assert set(np.unique(out)) == {0.0, 2.0}
    ragged = lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([1, 3]))
    out = np.asarray(branches(ragged, {"w": jnp.zeros((2, D, D))}))
    assert set(np.unique(out)) == {0.0, 2.0}


def test_masks_are_the_same_with_64_bits():
    """Under `jax_enable_x64` random bits have 64 by default: the masks are those without it."""
    fn = lambda p, x: lax.scan(lambda c, w: (c, x @ w), np.float32(0), p["w"])[1]
    params = {"w": jnp.zeros((3, D, D))}
    want = branches(fn, params)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(branches(fn, params), want)
