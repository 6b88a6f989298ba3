"""Values that are not finite: refused by name where they are known, NaN where they are traced."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from common import fails
from hypothesis import given
from hypothesis import strategies as st

import lora_jax as lora

GEOMETRY = {
    "w": ((6, 5), lora.Geometry((0,), (1,))),
    "e": ((3, 6, 5), lora.Geometry((1,), (2,), (0,))),
}
PARAMS = {p: rand.normal(jax.random.key(i), s) for i, (p, (s, _)) in enumerate(GEOMETRY.items())}
algebra = lora.algebra


def adapters(seed, rank):
    def node(shape, g):
        a, b = g.factor_shapes(shape, rank)
        keys = jax.random.split(jax.random.key(seed))
        return lora.LoRA(rand.normal(keys[0], a), rand.normal(keys[1], b), 0.5, g)

    return {path: node(*sg) for path, sg in GEOMETRY.items()}


TWO = [adapters(1, 2), adapters(2, 3)]
KEY = jax.random.key(0)
CALLS = {  # name -> a function of two adapters whose result is a tree of arrays
    "combine": lambda two: algebra.combine(two, [0.5, 2.0]),
    "resize": lambda two: [algebra.resize(x, 1) for x in two],
    "ties": lambda two: algebra.ties(two, density=0.5, base=PARAMS)[0],
    "ties of a rank": lambda two: algebra.ties(two, rank=2)[0],
    "ties by weight": lambda two: algebra.ties(two, per_weight=True, base=PARAMS)[0],
    "dare": lambda two: algebra.dare(KEY, two, base=PARAMS)[0],
    "dare_ties": lambda two: algebra.dare(KEY, two, how="ties", base=PARAMS)[0],
    "prune": lambda two: algebra.prune(two, density=0.3, base=PARAMS)[0],
    "knots": lambda two: algebra.knots(two),
}
VALUES = {
    "compare": lambda two: algebra.compare(*two),
    "learned": lambda two: [algebra.learned(PARAMS, x) for x in two],
    "resize to an energy": lambda two: [algebra.resize(x, energy=0.9) for x in two],
}
bad = st.sampled_from([np.nan, np.inf, -np.inf])
place = st.tuples(
    st.integers(0, 1), st.sampled_from([*GEOMETRY]), st.sampled_from("ab"), st.integers(0, 10**6)
)


def spoilt(two, value, k, path, name, index):
    """The adapters with one number that is not finite."""
    node = two[k][path]
    array = getattr(node, name)
    array = array.ravel().at[index % array.size].set(value).reshape(array.shape)
    node = lora.LoRA(
        *((array, node.b) if name == "a" else (node.a, array)), node.scale, node.geometry
    )
    return [x | {path: node} if i == k else x for i, x in enumerate(two)]


@pytest.mark.parametrize("name", CALLS | VALUES)
@given(value=bad, at=place)
def test_known_values_are_refused_by_name(name, value, at):
    k, path, *_ = at
    with fails(rf"(?s)NaN or infinity:.*'{path}'") as caught:
        (CALLS | VALUES)[name](spoilt(TWO, value, *at))
    other = {"w": "e", "e": "w"}[path]
    assert f"'{other}'" not in str(caught.value)
    if "of adapters" in str(caught.value):
        assert f"'{path}' of adapters[{k}]" in str(caught.value)


JITTED = {name: jax.jit(call) for name, call in CALLS.items()}


@pytest.mark.parametrize("name", CALLS)
@given(at=place, value=bad)
def test_traced_values_pass_it_on(name, value, at):
    """The update of a leaf with one such number is not finite, those of others are."""
    k, path, *_ = at
    out = JITTED[name](spoilt(TWO, value, *at))
    out = out[k] if isinstance(out, list) else out
    finite = {
        p: all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(n)) for p, n in out.items()
    }
    assert not finite[path]
    if not {"ties", "prune", "knots"} & {*name.split()}:  # there the trim is of all leaves together
        assert finite[{"w": "e", "e": "w"}[path]]


def test_a_weight_or_a_base_that_is_not_finite():
    with fails(r"the weight of adapters\[1\]"):
        algebra.combine(TWO, [1.0, np.nan])
    with fails(r"the weight of adapters\[0\]"):
        algebra.ties(TWO, [{"w": np.inf, "e": 1.0}, 1.0], rank=1)
    base = PARAMS | {"w": PARAMS["w"].at[2, 3].set(np.nan)}
    with fails("'w' of the base"):
        algebra.ties(TWO, base=base)
    with fails("'w' of the base"):
        algebra.learned(base, TWO[0])
    config = lora.LoRAConfig(rank=1, targets=["w"])
    for one, two, name in ((base, PARAMS, "base"), (PARAMS, base, "tuned")):
        with fails(f"(?s)NaN or infinity:.*'w' of {name}"):
            algebra.extract(one, two, lora.select({"w": PARAMS["w"]}, config))


def test_a_stack():
    for k in (0, 1):
        bad = spoilt(TWO, np.nan, k, "e", "a", 3)
        with fails(rf"NaN or infinity:\n  - 'e' of adapters\[{k}\]"):
            algebra.stack(bad)
    stacked = algebra.stack(TWO)
    with fails("NaN or infinity:\n  - 'e'"):
        algebra.put(stacked, 0, bad[1])
    spoiled = jax.jit(lambda x: algebra.choose(algebra.put(stacked, 0, x), 0))(bad[1])
    assert not jnp.isfinite(spoiled["e"].a).all() and jnp.isfinite(spoiled["w"].a).all()


def test_no_comparison_under_jit():
    with fails("found traced ones: call lora.algebra.compare outside of jit"):
        jax.jit(lambda x: algebra.compare(x, TWO[1]).leaves["w"].norms)(TWO[0])


@given(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9), min_size=1))
def test_rows_that_changed_and_are_not_extracted(changed, taken):
    base = {"table": jnp.zeros((10, 3))}
    tuned = {"table": base["table"].at[jnp.asarray(sorted(changed), int), 1].set(1.0)}
    targets = lora.select(base, lora.LoRAConfig(rank=1, targets=(), rows={"table": sorted(taken)}))
    if lost := sorted(changed - taken):
        with fails(re.escape(f"'table': rows {', '.join(map(str, lost[:8]))}")):
            algebra.extract(base, tuned, targets)
    rows = algebra.extract(base, tuned, targets, drop=bool(lost))[0]["table"]
    np.testing.assert_array_equal(rows.value, tuned["table"][jnp.asarray(rows.index)])
