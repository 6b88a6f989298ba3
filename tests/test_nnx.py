"""NNX modules: what a call changes is changed in the user's own model, as with LoRA by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lora

pytestmark = pytest.mark.filterwarnings("ignore:.*nnx.capture:DeprecationWarning")
WIDTH, RANK, STEPS = 8, 2, 10
LAYERS = ("up", "down", "query", "value")


# ---------------------------------------------------------------- LoRA by hand
class Hand(nnx.Module):
    """A linear layer with LoRA beside it: W x + scale · B A x."""

    def __init__(self, linear, node):
        self.linear, self.scale = linear, node.scale
        self.a, self.b = nnx.LoRAParam(node.a), nnx.LoRAParam(node.b)

    def __call__(self, x, **kwargs):
        b = self.b[...].reshape(RANK, -1)  # (rank, heads · head width)
        y = self.linear(x, **kwargs)
        return y + self.scale * (x @ self.a[...] @ b).reshape(y.shape)


def by_hand(model, adapters):
    """A copy of the model with `Hand` for each adapted layer, and those layers."""
    model = nnx.clone(model)
    swapped = {}
    nodes = jax.tree_util.tree_leaves_with_path(
        adapters, is_leaf=lambda x: isinstance(x, lora.LoRA)
    )
    for keys, node in nodes:
        parent, names = model, [k.key for k in keys[:-1]]
        for name in names[:-1]:
            parent = parent[int(name)] if name.isdigit() else getattr(parent, name)
        hand = Hand(getattr(parent, names[-1]), node)
        setattr(parent, names[-1], hand)
        if getattr(parent, "twin", None) is hand.linear:
            parent.twin = hand
        swapped["/".join(names)] = hand
    return model, swapped


# ---------------------------------------------------------------- features
class Block(nnx.Module):
    def __init__(self, rngs, *, dropout=0.0, norm=False):
        self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.down = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs) if norm else None
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None

    def __call__(self, x, rngs=None):
        h = nnx.gelu(self.up(x))
        h = h if self.norm is None else self.norm(h)
        h = h if self.dropout is None else self.dropout(h, rngs=rngs)
        return x + self.down(h)


class Sows(Block):
    def __call__(self, x):
        self.sow(nnx.Intermediate, "inputs", x)
        y = super().__call__(x)
        self.sow(nnx.Intermediate, "outputs", y)
        return y


class Creates(Block):
    """Makes a variable, a submodule and a constant in its first call, changes them in the next."""

    def __call__(self, x):
        if not hasattr(self, "seen"):
            self.seen = nnx.BatchStat(jnp.zeros(()))
            self.late = nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(1))
            self.calls = 0
        self.seen[...] += jnp.sum(x)
        self.calls += 1
        return super().__call__(self.late(x))


class Shared(nnx.Module):
    """One block under two names, and one of its layers under two more."""

    def __init__(self, rngs):
        self.first = self.second = Block(rngs, dropout=0.3, norm=True)
        self.first.twin = self.first.up

    def __call__(self, x):
        return self.second.twin(self.second(self.first(x)))


class Decoder(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(2, WIDTH, decode=True, rngs=rngs)
        self.attn.init_cache((2, STEPS, WIDTH))

    def __call__(self, x):
        return self.attn(x[:, :1])  # a token


class Stack(nnx.Module):
    """Blocks that nnx.vmap made, run by nnx.scan, or blocks in a loop, each through `wrap`."""

    def __init__(self, rngs, wrap=lambda f: f, scanned=True):
        self.scanned, self.wrap = scanned, wrap
        make = lambda rngs: Block(rngs, dropout=0.3, norm=True)
        if scanned:
            self.blocks = nnx.split_rngs(splits=2)(nnx.vmap(make))(rngs)
        else:
            self.blocks = nnx.List([make(rngs), make(rngs)])

    def __call__(self, x):
        step = self.wrap(lambda x, block: block(x))
        if self.scanned:
            return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        for block in self.blocks:
            x = step(x, block)
        return x


FEATURES = {
    "dropout": lambda rngs: Block(rngs, dropout=0.5),
    "batchnorm": lambda rngs: Block(rngs, norm=True),
    "cache": Decoder,
    "sow": Sows,
    "creates": Creates,
    "shared": Shared,
    "scan": Stack,
    "scan of remat": lambda rngs: Stack(rngs, nnx.remat),
    "remat": lambda rngs: Stack(rngs, nnx.remat, scanned=False),
    "jit": lambda rngs: Stack(rngs, nnx.jit, scanned=False),
}


def forward(model, x):
    return model(x)


def made(name, dtype=jnp.float32):
    model = FEATURES[name](nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model, nnx.Param)))
    x = jax.random.normal(jax.random.key(1), (2, 3, WIDTH), dtype)
    targets = [lambda path, leaf: path.endswith(tuple(f"{n}/kernel" for n in LAYERS))]
    config = lora.LoRAConfig(rank=RANK, targets=targets)
    adapters = lora.init(jax.random.key(2), model, config, lora.survey(forward, model, x))
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(3), x.shape, x.dtype)
    return model, jax.tree.map(noise, adapters), x


def changed_by_calls(model):
    """What is not a parameter: counters, statistics, caches; and the constants."""
    state = nnx.state(model, nnx.Not(nnx.Param))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(k): np.asarray(jax.random.key_data(x) if is_key(x) else x)
            for k, x in leaves}  # fmt: skip


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "nnx.jit"])
@pytest.mark.parametrize("name", FEATURES)
def test_ten_steps_equal_lora_by_hand(name, wrap):
    model, adapters, x = made(name)
    hand, layers = by_hand(model, adapters)
    call = lora.adapt(forward)
    loss_of = lambda y: jnp.mean(jnp.square(y - 1))

    @wrap
    def ours(adapters, model, x):
        loss = lambda adapters, model: loss_of(call(lora.bind(model, adapters), x))
        loss, grads = nnx.value_and_grad(loss)(adapters, model)
        return loss, jax.tree.map(lambda p, g: p - 0.1 * g, adapters, grads)

    @wrap
    def theirs(model, x):
        diff = nnx.DiffState(0, nnx.LoRAParam)
        loss, grads = nnx.value_and_grad(lambda m: loss_of(m(x)), argnums=diff)(model)
        params = nnx.state(model, nnx.LoRAParam)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
        return loss

    for step in range(STEPS):
        loss, adapters = ours(adapters, model, x + step)
        np.testing.assert_allclose(loss, theirs(hand, x + step), rtol=1e-5)
        mine, expected = changed_by_calls(model), changed_by_calls(hand)
        assert mine.keys() == expected.keys()
        for k in mine:
            np.testing.assert_allclose(mine[k], expected[k], rtol=1e-5, atol=1e-6, err_msg=k)
        if name == "sow":
            assert len(mine) == 2
            nnx.pop(model, nnx.Intermediate), nnx.pop(hand, nnx.Intermediate)
    for path, layer in layers.items():
        node = adapters
        for key in [*path.split("/"), "kernel"]:
            node = node[key]
        np.testing.assert_allclose(node.a, layer.a[...], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(node.b, layer.b[...], rtol=1e-4, atol=1e-5)
