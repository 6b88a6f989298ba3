"""Every product that is no part of the model's own passes is at the highest precision.

At the default one, an fp32 product is made of bf16 passes on a TPU and of TF32 on a GPU. The model
below asks for HIGH, so that its products, and those beside them, are told apart from ours.
"""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rand
from common import lazy, noisy

import lora_jax as lora

HIGH, HIGHEST = jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST
PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")

PARAMS = lazy(lambda: {name: rand.normal(jax.random.key(i), shape)
          for i, (name, shape) in enumerate({"up": (8, 6), "down": (6, 8)}.items())})  # fmt: skip
X = lazy(lambda: rand.normal(jax.random.key(7), (5, 8)))
CONFIG = lora.LoRAConfig(rank=2, alpha=3, targets=["up", "down"])
TARGETS = lazy(lambda: lora.select(PARAMS(), CONFIG))
ONE = lazy(lambda: noisy(lora.init(jax.random.key(0), PARAMS(), CONFIG), key=1))
TWO = lazy(lambda: noisy(ONE(), key=2))
DORA = lazy(lambda: noisy(lora.methods.dora(PARAMS(), ONE()), key=3))
ADALORA = lazy(lambda: noisy(lora.methods.init_adalora(jax.random.key(0), PARAMS(), CONFIG)))
XS = lazy(
    lambda: lora.methods.init_lora_xs(jax.random.key(0), PARAMS(), CONFIG)
)  # adapters, frozen
VERA = lazy(lambda: lora.methods.init_vera(jax.random.key(0), PARAMS(), CONFIG))
TABLE = lazy(lambda: {"up": lora.Rows(jnp.ones((2, 6)), (1, 3), 8)})
STACKED = lazy(lambda: lora.algebra.stack([ONE(), TWO()], capacity=3))
SGD = optax.sgd(0.1)
SLOTS = lazy(lambda: lora.optim.per_slot(SGD).init(STACKED()))
GRADIENTS = lazy(lambda: jax.tree.map(jnp.sin, PARAMS()))
MOMENTS = lazy(lambda: {p: jnp.eye(w.shape[0])[None] + 0.1 for p, w in PARAMS().items()})


def model(p, x):
    return jnp.matmul(jnp.tanh(jnp.matmul(x, p["up"], precision=HIGH)), p["down"], precision=HIGH)


def loss(p):
    return jnp.sum(model(p, X()) ** 2)


DEEP = lazy(lambda: PARAMS() | {"head": jnp.ones((8, 2))})  # all linear layers but the head
SURVEY = lazy(lambda: lora.survey(lambda p, x: model(p, x) @ p["head"], DEEP(), X()))


def adapted(plan):
    """The gradient of an adapted function, whose merged weights are ours."""
    call = lora.adapt(loss, plan=plan)
    return lambda: jax.value_and_grad(lambda ad: call(lora.bind(PARAMS(), ad)))(DORA())


def step(tx, made=ONE):
    def call():
        adapters = made()
        with jax.numpy_dtype_promotion("standard"):  # optax
            return tx.update(adapters, tx.init(adapters), adapters)

    return call


def each(*calls):
    return lambda: [call() for call in calls]


# name -> a call. What is below in VALUES depends on values, and is traced by its parts alone.
CALLS = {
    "survey": lambda: (lora.survey(model, PARAMS(), X()), jnp.ones(()))[1],
    "select": lambda: (lora.select(PARAMS(), CONFIG), jnp.ones(()))[1],
    "init": lambda: lora.init(jax.random.key(0), PARAMS(), CONFIG),
    "bind": lambda: [jax.tree.leaves(lora.bind(PARAMS(), ad)) for ad in (ONE(), DORA(), TABLE())],
    "adapt": each(*map(adapted, ("factored", "merged"))),
    "coverage": lambda: (lora.coverage(model, lora.bind(PARAMS(), ONE()), X()), jnp.ones(()))[1],
    "merge": lambda: [lora.merge(PARAMS(), ad) for ad in (ONE(), DORA(), TABLE(), ADALORA())],
    "unmerge": lambda: lora.unmerge(PARAMS(), ONE()),
    "algebra.combine": lambda: lora.algebra.combine([ONE(), TWO()], [0.5, 2.0]),
    "algebra.scaled": lambda: lora.algebra.scaled(ONE(), -1.0),
    "algebra.resize": lambda: lora.algebra.resize(ONE(), 1),
    "algebra.ties": lambda: [
        lora.algebra.ties([ONE(), TWO()], rank=1, passes=p)[0] for p in (None, 1)
    ],
    "algebra.dare": lambda: lora.algebra.dare(jax.random.key(0), [ONE(), TWO()], base=PARAMS())[0],
    "algebra.prune": lambda: lora.algebra.prune([ONE()], density=0.5, rank=1)[0],
    "algebra.knots": lambda: lora.algebra.knots([ONE(), TWO()]),
    "algebra.stack": lambda: lora.algebra.stack([ONE(), TWO()]),
    "algebra.put": lambda: lora.algebra.put(STACKED(), 1, ONE()),
    "algebra.choose": lambda: lora.algebra.choose(STACKED(), 1),
    "methods.dora": lambda: lora.methods.dora(PARAMS(), ONE()),
    "methods.init_vera": lambda: lora.methods.init_vera(jax.random.key(0), PARAMS(), CONFIG),
    "methods.init_lora_xs": lambda: lora.methods.init_lora_xs(jax.random.key(0), PARAMS(), CONFIG),
    "methods.init_adalora": lambda: lora.methods.init_adalora(jax.random.key(0), PARAMS(), CONFIG),
    "methods.factors": lambda: [
        lora.methods.factors(*XS()), lora.methods.factors(*VERA())
    ],
    "methods.orthogonality": lambda: jax.grad(lora.methods.orthogonality)(ADALORA()),
    "methods.pissa": lambda: [lora.methods.pissa(PARAMS(), ONE(), niter=n) for n in (None, 1)],
    "methods.olora": lambda: lora.methods.olora(PARAMS(), ONE()),
    "methods.orthogonal": lambda: lora.methods.orthogonal(jax.random.key(0), ONE()),
    "methods.on_original": lambda: lora.methods.on_original(ONE(), TWO()),
    "methods.low_rank_gradients": lambda: lora.methods.low_rank_gradients(loss, PARAMS(), ONE()),
    "methods.lora_ga": lambda: lora.methods.lora_ga(PARAMS(), ONE(), GRADIENTS()),
    "methods.lora_one": lambda: lora.methods.lora_one(ONE(), ONE()),
    "methods.second_moments": lambda: lora.methods.second_moments(model, PARAMS(), ONE(), X()),
    "methods.corda": lambda: lora.methods.corda(PARAMS(), ONE(), MOMENTS(), mode="instruction"),
    "optim.labels": lambda: (lora.optim.labels(ONE()), jnp.ones(()))[1],
    "optim.trained_only": step(lora.optim.trained_only(optax.sgd(0.1))),
    "optim.lora_plus": step(lora.optim.lora_plus(optax.adam, 0.1)),
    "optim.lora_fa": step(lora.optim.lora_fa(optax.sgd(0.1), corrected=True)),
    "optim.riemannian": step(lora.optim.riemannian()),
    "optim.lora_pro": each(
        *(step(lora.optim.lora_pro(x=x)) for x in ("sylvester", "zero", "symmetry"))
    ),
    "optim.lora_rite": step(lora.optim.lora_rite(0.1)),
    "optim.scale_by_lora_rite": step(lora.optim.scale_by_lora_rite()),
    "optim.lora_muon": step(lora.optim.lora_muon(0.1)),
    "optim.scale_by_lora_muon": step(lora.optim.scale_by_lora_muon()),
    "optim.adalora": step(lora.optim.adalora(optax.sgd(0.1), target_rank=1, steps=9), ADALORA),
    "optim.galore": step(lora.optim.galore(0.1, rank=2), PARAMS),
    "optim.scale_by_galore": step(lora.optim.scale_by_galore(rank=2), PARAMS),
    "optim.per_slot": step(lora.optim.per_slot(optax.sgd(0.1)), STACKED),
    "optim.join": lambda: lora.optim.join(SGD, STACKED(), SLOTS(), 0, ONE()),
    "optim.by_slot": lambda: lora.optim.by_slot(jnp.ones(3), jnp.array([0, 1, -1]), 2),
    "quant.quantize": lambda: lora.quant.quantize(PARAMS(), ["up"]),
    "quant.dequantize": lambda: lora.quant.dequantize(lora.quant.quantize(PARAMS(), ["up"])),
    "quant.loftq": lambda: lora.quant.loftq(PARAMS(), ONE(), ["up", "down"]),
}  # fmt: skip

# These look at values, so they run, and what they bind is written down.
VALUES = {
    "algebra.extract": lambda: lora.algebra.extract(PARAMS(), GRADIENTS(), TARGETS()),
    "algebra.compare": lambda: lora.algebra.compare(ONE(), TWO()),
    "algebra.learned": lambda: lora.algebra.learned(PARAMS(), ONE()),
    "methods.pruned": lambda: lora.methods.pruned(ADALORA()),
    "optim.leave": lambda: lora.optim.leave(SGD, STACKED(), SLOTS(), 0),
    "methods.eva": lambda: lora.methods.eva(ONE(), MOMENTS()),
    "methods.propose": lambda: [
        lora.methods.propose(DEEP(), SURVEY(), moments=MOMENTS()),
        lora.methods.propose(DEEP(), SURVEY(), gradients=ONE()),
    ],
    "quant.errors": lambda: lora.quant.errors(PARAMS(), lora.quant.quantize(PARAMS(), ["up"])),
}

NO_PRODUCTS = {  # files, places and names alone
    "quant.gguf_weight", "quant.bitsandbytes_weight", "quant.from_qwix", "quant.gathered", "parallel.shardings",
    "parallel.state_shardings", "parallel.topology_mesh", "parallel.memory", "parallel.forecast",
    "checkpoint.save", "checkpoint.restore", "checkpoint.fingerprint", "peft.load", "peft.save",
    "peft.mapping", "peft.load_base", "peft.save_base", "attach", "detach",
}  # fmt: skip


def public():
    """The dotted names of all public functions."""
    for name in lora.__all__:
        x = getattr(lora, name)
        if isinstance(x, types.ModuleType):
            yield from (f"{name}.{n}" for n in x.__all__ if not isinstance(getattr(x, n), type))
        elif not isinstance(x, type):
            yield name


def test_no_function_is_missing():
    assert {*public()} == {*CALLS, *VALUES, *NO_PRODUCTS}


def precisions(jaxpr):
    """(primitive, precision) of each product in a jaxpr and in those inside."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name in PRODUCTS:
            yield eqn.primitive.name, eqn.params["precision"]
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from precisions(value)


@contextlib.contextmanager
def written_down(found: list):
    """All products that are bound, also those of jitted functions, which are traced anew."""
    primitives = {jax.lax.dot_general_p, jax.lax.conv_general_dilated_p}
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        for p in primitives:
            bind = p.bind
            patch.setattr(p, "bind", lambda *args, p=p, bind=bind, **params: (
                found.append((p.name, params["precision"])), bind(*args, **params))[1])  # fmt: skip
        yield


def check(found, models_own: bool):
    allowed = {HIGHEST, HIGH} if models_own else {HIGHEST}
    for primitive, precision in found:
        both = precision if isinstance(precision, tuple) else (precision,) * 2
        assert {*both} <= allowed, f"{primitive} at {precision}"


MODELS_OWN = {"adapt", "methods.low_rank_gradients", "methods.second_moments"}
PRODUCTS_IN = {  # at least: a test that finds none would be none
    "merge", "unmerge", "bind", "adapt", "algebra.resize", "algebra.ties", "algebra.dare",
    "algebra.knots", "algebra.compare", "algebra.learned", "methods.pissa", "methods.orthogonal",
    "methods.orthogonality", "methods.corda", "methods.low_rank_gradients", "quant.loftq",
    "methods.propose", "optim.riemannian", "optim.galore",
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_traced(name):
    found = [*precisions(jax.make_jaxpr(CALLS[name])())]
    assert found or name not in PRODUCTS_IN
    check(found, name in MODELS_OWN)


@pytest.mark.parametrize("name", VALUES)
def test_run(name):
    SURVEY()  # the model's own products are not written down
    found = []
    with written_down(found):
        VALUES[name]()
    assert found or name not in PRODUCTS_IN
    check(found, models_own=False)


def test_a_default_is_found():
    """Both ways of reading see a product at the default precision."""
    call = lambda: jax.jit(jnp.matmul)(np.ones((2, 2)), np.ones((2, 2)))
    with pytest.raises(AssertionError, match="dot_general at None"):
        check(precisions(jax.make_jaxpr(call)()), models_own=False)
    found = []
    with written_down(found):
        call()
    with pytest.raises(AssertionError, match="dot_general at None"):
        check(found, models_own=False)
