"""x_t · M[s_t] in each of its ways: the same values, derivatives and batches as by indexing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from common import assert_close

from lora_jax._core.geometry import SLOT
from lora_jax._products.plan import RUN, SLOT_WAYS, way_by_slot
from lora_jax._products.slot_ways import Choice
from lora_jax._products.slots import chosen

KEY = jax.random.key(0)
SLOTS, IN, OUT = 4, 6, 3


def drawn(i, *shape):
    return rand.normal(jax.random.fold_in(KEY, i), shape)


def by_index(x, m, s):
    """(T, g, in), (slots, in, out), (T,) -> (T, g, out)."""
    y = jnp.einsum("tgi,tio->tgo", x, m[s], precision="highest")
    return jnp.where((s >= 0)[:, None, None], y, 0)


def product(way):
    how = Choice(
        ("t", "g", "i"),
        (SLOT, "i", "o"),
        ("t",),
        ("t", "g", "o"),
        SLOTS,
        jnp.dtype("f4"),
        None,
        way,
    )
    return lambda x, m, s: chosen(x, m, s, how)


def gradient(f):
    return lambda x, m, s: jax.grad(lambda *v: jnp.sum(jnp.sin(f(*v, s))), (0, 1))(x, m)


def second(f):
    each = lambda *args: sum(jnp.sum(jnp.cos(g)) for g in gradient(f)(*args))
    return lambda x, m, s: jax.grad(each, (0, 1))(x, m, s)


def forward(f):
    return lambda x, m, s: jax.jvp(lambda x, m: f(x, m, s), (x, m), (jnp.cos(x), jnp.cos(m)))


def in_batch(f, axes=(0, None, 0)):
    """The gradient of a batch of them: of what the batch shares it is the sum."""

    def whole(x, m, s):
        many = [v if a is None else jnp.stack([v, v[::-1]]) for v, a in zip((x, m, s), axes)]
        return gradient(lambda x, m, s: jax.vmap(f, axes)(x, m, s))(*many)

    return whole


def of_each(f):
    """A gradient for each of a batch of rows, and for each of a batch of stacks."""

    def whole(x, m, s):
        two = lambda v: jnp.stack([v, v])
        rows = jax.vmap(gradient(f), (0, None, 0))(two(x), m, two(s))
        return rows, jax.vmap(gradient(f), (None, 0, None))(x, two(m), s)

    return whole


TRANSFORMS = {
    "value": lambda f: f,
    "gradient": gradient,
    "second": second,
    "jvp": forward,
    "batch": in_batch,
    "batch of stacks": functools.partial(in_batch, axes=(0, 0, 0)),
    "batch of slots": functools.partial(in_batch, axes=(None, None, 0)),
    "each": of_each,
}


@pytest.mark.parametrize("sizes", [(IN, OUT), (OUT, IN)])
@pytest.mark.parametrize("way", SLOT_WAYS)
def test_ways(way, sizes):
    """Up and down, with rows of the base, under each transform and combinations of them."""
    s = jnp.array([0, 2, -1, 3, 2])
    args = drawn(1, 5, 2, sizes[0]), drawn(2, SLOTS, *sizes), s
    run = lambda f: [transform(f)(*args) for transform in TRANSFORMS.values()]
    assert_close(jax.jit(lambda: run(product(way)))(), jax.jit(lambda: run(by_index))(), factor=256)


@pytest.mark.parametrize("way", SLOT_WAYS)
def test_long_runs(way):
    """Runs of one slot, of the base, and of all in one block of rows."""
    mixed = jax.random.randint(KEY, (2 * RUN,), -1, SLOTS)
    one = lambda k: jnp.full(RUN, k)
    s = jnp.concatenate([one(2), one(-1), mixed, one(0)])
    args = drawn(1, len(s), 1, IN), drawn(2, SLOTS, IN, OUT), s
    run = lambda f: (f(*args), gradient(f)(*args))
    assert_close(jax.jit(lambda: run(product(way)))(), jax.jit(lambda: run(by_index))(), factor=256)


@pytest.mark.parametrize("sizes", [(IN, OUT), (OUT, IN)])
@pytest.mark.parametrize("way", SLOT_WAYS)
def test_what_has_no_slot_and_what_is_not_finite(way, sizes):
    """Each spoils its own rows, and its own part of the gradient, alone."""
    f, x, m = product(way), drawn(1, 4, 1, sizes[0]), drawn(2, SLOTS, *sizes)
    s = jnp.array([0, 2, -1, 3])
    spoilt = lambda y: np.isnan(np.asarray(y)).reshape(len(y), -1)
    rows = spoilt(f(x, m, jnp.array([SLOTS, 2, -2, 3])))
    assert (rows == np.array([1, 0, 1, 0], bool)[:, None]).all()
    rows = spoilt(f(x, m.at[2].set(jnp.nan).at[1].set(jnp.inf), s))
    assert (rows == np.array([0, 1, 0, 0], bool)[:, None]).all()
    weight = jnp.array([1, jnp.nan, 1, 1])[:, None, None]
    slots = spoilt(jax.grad(lambda m: jnp.sum(f(x, m, s) * weight))(m))
    assert (slots == np.array([0, 0, 1, 0], bool)[:, None]).all()
    slots = spoilt(jax.grad(lambda m: jnp.sum(f(x.at[2].set(jnp.nan), m, s)))(m))
    assert not slots.any()  # a row of the base


@pytest.mark.parametrize("way", SLOT_WAYS)
def test_sums_of_16_bit_rows_are_wide(way):
    """The gradient of one slot over more rows than bf16 can count to."""
    s, x = jnp.full(600, 2), jnp.ones((600, 1, IN), "bfloat16")
    how = Choice(
        ("t", "g", "i"), (SLOT, "i", "o"), ("t",), ("t", "g", "o"), SLOTS, x.dtype, None, way
    )
    loss = lambda m: jnp.sum(chosen(x, m, s, how).astype(jnp.float32))
    got = jax.jit(jax.grad(loss))(jnp.ones((SLOTS, IN, OUT), "bfloat16"))
    np.testing.assert_array_equal(got[2].astype(jnp.float32), np.full((IN, OUT), 600.0))


def test_plan():
    """By shape and platform; see the table in `plan`."""
    way = functools.partial(way_by_slot, itemsize=4, platform="cpu", local=True)
    # rows with one each, of few large matrices or of many
    assert way(64, 1, 512, 8, 64) == way(64, 1, 512, 8, 512) == "one by one"
    assert way(8, 1, 512, 32, 64) == way(8, 1, 32, 512, 64) == "one by one"
    # few terms
    assert way(8, 1, 8, 512, 64) == way(8, 128, 16, 512, 512) == "summed"
    # the gradient of a stack, and tokens that may have runs of one slot
    assert way(8, 1, 8, 512, 64, sums=False) == way(1024, 1, 8, 512, 64) == "one by one"
    assert way(8, 128, 512, 8, 64) == way(8, 128, 512, 8, 512) == "gathered"
    assert way(64, 1, 512, 8, 2) == way(1024, 1, 512, 8, 4) == "concatenated"
    # no loop over rows that lie on several devices, nor where a step is a kernel
    assert way(64, 1, 512, 8, 512, local=False) == "gathered"
    # there a row's matrix is read within its product: once, where all side by side are all read
    far = functools.partial(way, itemsize=2)
    for platform in ("gpu", "tpu"):
        assert far(64, 1, 4096, 16, 64, platform=platform) == "gathered"
        assert far(8, 1, 4096, 16, 64, platform=platform) == "gathered"
        assert far(1024, 1, 4096, 16, 64, platform=platform) == "concatenated"
        assert far(64, 1, 4096, 16, 8, platform=platform) == "concatenated"
        # the gradient of a stack is written, row by row
        assert far(64, 1, 4096, 16, 64, platform=platform, sums=False) == "concatenated"
