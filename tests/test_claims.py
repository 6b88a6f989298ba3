"""docs/claims.md: each claim stands on its page, each test is there, and conditions hold."""

import ast
import functools
import math
import re

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
import rand
from jax.experimental import jet
from pages import ROOT

import lora_jax as lora

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs/claims.md").read_text().splitlines()
    if line.startswith("| [")
]
KEY = jax.random.key(0)
W = {"w": rand.normal(KEY, (64, 64)) / 8}
CONFIG = lora.LoRAConfig(rank=2, targets="w")
ADAPTERS = jax.tree.map(lambda x: x + 0.1, lora.init(KEY, W, CONFIG))


@functools.cache
def functions(file):
    return {f.name for f in ast.parse((ROOT / file).read_text()).body if hasattr(f, "name")}


@functools.cache
def text(page):
    return " ".join((ROOT / "docs" / page).read_text().split())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1][:40])
def test_the_claim_stands_and_has_its_test(row):
    page, claim, _, tests = row
    assert claim in text(re.search(r"\((.*)\)", page)[1])
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
    assert named and all(name in functions(file) for file, name in named)


def test_an_error_shows_twenty_and_a_count():
    with pytest.raises(lora.LoRAError, match=r"(?s)'w19'.*and 5 more") as error:
        lora.merge(W, {f"w{i:02}": ADAPTERS["w"] for i in range(25)})
    assert str(error.value).count("\n  - ") == 20


def test_adapt_forgotten_in_lax():
    """JAX looks at the operand before the weight can say what was meant."""
    with pytest.raises(ValueError, match="__jax_array__") as error:
        jax.lax.dot(jnp.ones((2, 64)), lora.bind(W, ADAPTERS)["w"])
    assert not isinstance(error.value, lora.LoRAError)


REFUSE = {
    "pissa": lambda q: lora.methods.pissa(q, ADAPTERS),
    "olora": lambda q: lora.methods.olora(q, ADAPTERS),
    "corda": lambda q: lora.methods.corda(q, ADAPTERS, {"w": jnp.eye(64)[None]}, mode="knowledge"),
    "lora_ga": lambda q: lora.methods.lora_ga(q, ADAPTERS, {"w": jnp.ones((64, 64))}),
    "extract": lambda q: lora.algebra.extract(q, W, lora.select(q, CONFIG)),
    "ties": lambda q: lora.algebra.ties([ADAPTERS], base=q),
    "dare": lambda q: lora.algebra.dare(KEY, [ADAPTERS], base=q),
    "prune": lambda q: lora.algebra.prune([ADAPTERS], density=0.5, base=q),
    "combine": lambda q: lora.algebra.combine([{"w": lora.Full(W["w"])}], base=q),
}


@pytest.mark.parametrize("name", REFUSE)
def test_what_refuses_codes(name):
    small = lora.quant.quantize(W, "w", "nf4")
    with pytest.raises(lora.LoRAError, match="quantised"):
        REFUSE[name](small)
    if name in ("ties", "prune", "pissa"):
        REFUSE[name](lora.quant.dequantize(small))


def test_taylor_mode_of_codes():
    small, x = lora.quant.quantize(W, "w", "nf4"), jnp.ones((2, 64))
    call = lora.adapt(lambda p, x: jnp.sin(x @ p["w"]))
    jet_of_jax = jax.numpy_dtype_promotion("standard")
    with jet_of_jax, pytest.raises(KeyError, match="optimization_barrier"):  # it has no rule
        jet.jet(lambda x: call(lora.bind(small, ADAPTERS), x), (x,), ((x,),))


def test_states_of_another_optimiser(tmp_path):
    """A state is compared by its leaves, so those that look alike pass, and others do not."""
    with ocp.CheckpointManager(tmp_path) as manager:
        state = optax.adam(1e-2).init(ADAPTERS)
        lora.checkpoint.save(manager, 1, ADAPTERS, base=W, state=state)
        manager.wait_until_finished()
        read = lambda tx: lora.checkpoint.restore(
            manager, ADAPTERS, base=W, state=tx.init(ADAPTERS)
        )
        for tx in (optax.adamw(1e-3), optax.nadam(1e-2), optax.lamb(1e-2)):
            assert read(tx).step == 1
        with pytest.raises(lora.LoRAError, match="was saved, but is not expected"):
            read(optax.sgd(1e-2))


def flops(jaxpr):
    """Of the matrix products, those of bodies included."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (inner, _), _ = eqn.params["dimension_numbers"]
            sizes = [eqn.invars[0].aval.shape[d] for d in inner]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(sizes)
        for value in eqn.params.values():
            for body in value if isinstance(value, tuple | list) else [value]:
                body = getattr(body, "jaxpr", body)
                total += flops(body) if hasattr(body, "eqns") else 0
    return total


@pytest.mark.parametrize(
    ("make", "of_in", "of_out"),
    [
        (lambda: lora.optim.riemannian(delta=1e-2), 4, 4),
        (lora.optim.lora_pro, 8, 10),
        (lambda: lora.optim.lora_rite(1e-2), 18, 18),
        (lambda: lora.optim.lora_muon(1e-2), 10, 10),
    ],
    ids=["riemannian", "pro", "rite", "muon"],
)
def test_flops_of_optimisers(make, of_in, of_out):
    tx, r = make(), 8

    def counted(n_in, n_out):
        shape = jax.ShapeDtypeStruct
        a, b = shape((n_in, r), jnp.float32), shape((r, n_out), jnp.float32)
        node = {"w": lora.LoRA(a, b, 1.0, lora.Geometry((0,), (1,)))}
        state = jax.eval_shape(tx.init, node)
        with jax.numpy_dtype_promotion("standard"):  # as optax needs it
            return flops(jax.make_jaxpr(tx.update)(node, state, node).jaxpr) / r**2

    # What grows with in and with out; products of r × r matrices are left out.
    assert (counted(400, 100) - counted(200, 100)) / 200 == of_in
    assert (counted(100, 400) - counted(100, 200)) / 200 == of_out
