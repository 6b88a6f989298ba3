"""What the tests share: adapters that matter, and comparisons to the dtype."""

from __future__ import annotations

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from hypothesis import settings

import lora_jax as lora
from lora_jax._config import ALL_LINEAR

# name -> (shape of a leaf, what its axes are)
GEOMETRIES = {
    "matrix": ((6, 5), lora.Geometry((0,), (1,))),
    "torch's": ((5, 6), lora.Geometry((1,), (0,))),
    "to heads": ((6, 2, 3), lora.Geometry((0,), (1, 2))),
    "from heads": ((2, 3, 6), lora.Geometry((0, 1), (2,))),
    "experts": ((3, 6, 5), lora.Geometry((1,), (2,), (0,))),
    "stacked last": ((6, 5, 3), lora.Geometry((0,), (1,), (2,))),
    "convolution": ((3, 3, 4, 5), lora.Geometry((0, 1, 2), (3,))),
    "two stacks": ((2, 6, 3, 5), lora.Geometry((1,), (3,), (0, 2))),
}


def installed(*names: str) -> bool:
    """Whether these packages are there: `tests/peft`, a folder alone, is none."""
    specs = map(importlib.util.find_spec, names)
    return all(spec is not None and spec.origin is not None for spec in specs)


@functools.cache
def peft_starts():
    """Where PEFT's initialisers start; see make_starts.py."""
    return dict(np.load(pathlib.Path(__file__).parent.parent / "data" / "peft_starts.npz"))


needs_peft = pytest.mark.skipif(not installed("peft", "torch"), reason="needs torch and peft")


def examples(n):
    """n examples where the profile of tests/conftest.py has 50: half of them in CI, 50 n by night."""
    return settings(max_examples=max(1, n * settings.default.max_examples // 50))


def lazy(make):
    """make(), outside of any trace and at its first use: each worker imports all modules of tests."""

    @functools.cache
    def value():
        with jax.ensure_compile_time_eval():
            return make()

    return value


def fails(match):
    return pytest.raises(lora.LoRAError, match=match)


def noisy(adapters, key=7, scale=0.1):
    """Adapters with every array random, so that nothing is zero by accident."""
    leaves, treedef = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    leaves = [x + rand.normal(k, x.shape, x.dtype, scale) for k, x in zip(keys, leaves)]
    return jax.tree.unflatten(treedef, leaves)


def tolerance(dtype, factor=64):
    """A few units in the last place of sums of moderate length."""
    return factor * float(jnp.finfo(dtype).eps)


def assert_close(got, want, dtype=jnp.float32, factor=64):
    """Equal to within the dtype, relative to the largest element of each leaf."""
    got_leaves, got_tree = jax.tree.flatten(got)
    want_leaves, want_tree = jax.tree.flatten(want)
    assert got_tree == want_tree, (got_tree, want_tree)
    for g, w in zip(got_leaves, want_leaves):
        g, w = (np.asarray(x, np.float64) for x in (g, w))
        assert g.shape == w.shape
        top = max(np.abs(w).max(initial=0.0), 1e-3)
        assert np.isfinite(g).all()
        np.testing.assert_allclose(g / top, w / top, atol=tolerance(dtype, factor), rtol=0)


def adapted(
    fn,
    params,
    *args,
    targets=ALL_LINEAR,
    rank=2,
    strict=True,
    plan="auto",
    method=None,
    **config,
):
    """(adapted function, noisy adapters) of a function of parameters. `method` makes other adapters
    of the parameters and LoRA's."""
    survey = lora.survey(fn, params, *args)
    config = lora.LoRAConfig(rank=rank, alpha=3 * rank, targets=targets, **config)
    adapters = noisy(lora.init(jax.random.key(0), params, config, survey))
    if method is not None:
        adapters = noisy(method(params, adapters), key=8)
    return lora.adapt(fn, strict=strict, plan=plan), adapters


def total(outputs):
    """One number that depends on every output."""
    return sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in jax.tree.leaves(outputs))


def value_and_grad(run):
    """Jitted: the outputs of run(adapters), and the gradient of their `total`."""
    return jax.jit(jax.grad(lambda ad: (lambda y: (total(y), y))(run(ad)), has_aux=True))


def assert_equals_dense(fn, params, *args, dtype=jnp.float32, factor=64, **config):
    """The adapted function and its gradient equal those of the plain one on merged weights."""
    f, adapters = adapted(fn, params, *args, **config)

    def dense(adapters):
        return fn(lora.merge(params, adapters), *args)

    (want_grads, want), (grads, got) = (
        value_and_grad(run)(adapters) for run in (dense, lambda ad: f(lora.bind(params, ad), *args))
    )
    base = jax.jit(lambda p: fn(p, *args))(params)
    assert any(
        not np.allclose(a, b, atol=1e-3)
        for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(want))
    ), "the adapters change nothing: the test could not fail"
    assert_close(got, want, dtype, factor)
    assert_close(grads, want_grads, dtype, 4 * factor)
    return f, adapters
