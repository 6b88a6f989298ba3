"""Rows of a table that are trained: what is looked up is the row itself, to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from common import assert_close
from hypothesis import given
from hypothesis import strategies as st

import lora_jax as lora

IDS = jnp.array([[0, 3, 1], [5, 3, 4]])
INDEX = (1, 3)
LOOK_UPS = {
    "index": lambda w: w[IDS],
    "take": lambda w: jnp.take(w, IDS, axis=0),
    "scaled": lambda w: 2.0 * w[IDS],
    "transposed": lambda w: w.T[:, IDS],
    "cast first": lambda w: w.astype(jnp.bfloat16)[IDS],
    "scanned": lambda w: jax.lax.map(lambda ids: w[ids], IDS),
    "filled": lambda w: w.at[IDS + 3].get(mode="fill", fill_value=7.0),
}


def rows(size, seed=1):
    value = size * rand.normal(jax.random.key(seed), (2, 4))
    return {"table": lora.Rows(value, INDEX, 6)}


@pytest.mark.parametrize("name", LOOK_UPS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_what_is_looked_up_is_the_row(name, dtype):
    """Where the base is a million times larger, too; the gradient is that of a plain table."""
    fn = LOOK_UPS[name]
    params = {"table": (1e3 * rand.normal(jax.random.key(0), (6, 4))).astype(dtype)}
    # Values that the type holds: merged and cast to another type, others are rounded twice.
    adapters = jax.tree.map(lambda v: v.astype(dtype).astype(v.dtype), rows(1e-3))
    adapted = lora.adapt(lambda p: fn(p["table"]))
    got = adapted(lora.bind(params, adapters))
    want = fn(lora.merge(params, adapters)["table"])
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))

    total = lambda y: jnp.sum(jnp.sin(y.astype(jnp.float32)))
    grads = jax.grad(lambda ad: total(adapted(lora.bind(params, ad))))(adapters)
    dense = jax.grad(lambda ad: total(fn(lora.merge(params, ad)["table"])))(adapters)
    assert_close(grads, dense, dtype)


@given(st.integers(-20, 20), st.integers(-20, 20), st.integers(0, 99))
def test_whatever_the_sizes(large, small, seed):
    table = 10.0**large * rand.normal(jax.random.key(seed), (6, 4))
    adapters = rows(10.0**small, seed + 1)
    got = lora.adapt(lambda p: p["table"][IDS])(lora.bind({"table": table}, adapters))
    want = table.at[jnp.array(INDEX)].set(adapters["table"].value)[IDS]
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_a_tied_table():
    """Looked up and multiplied with: both gradients reach the rows."""
    params = {"table": rand.normal(jax.random.key(0), (6, 4))}
    adapters = rows(1.0)
    fn = lambda p: jnp.tanh(p["table"][IDS]) @ p["table"].T
    call = lora.adapt(fn)
    loss = lambda run: lambda ad: jnp.sum(jnp.sin(run(ad)))
    ours = loss(lambda ad: call(lora.bind(params, ad)))
    dense = loss(lambda ad: fn(lora.merge(params, ad)))
    assert_close(jax.value_and_grad(ours)(adapters), jax.value_and_grad(dense)(adapters))
