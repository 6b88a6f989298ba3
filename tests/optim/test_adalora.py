"""AdaLoRA's training: the schedule, importances against NumPy, the mask, real ranks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from common import assert_close, examples, fails
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from zoo import IDS, Transformer

import lora_jax as lora
from lora_jax.optim._adalora import _falls, _scores, budget

KEY = jax.random.key(0)
SCHEDULE = dict(target_rank=2, steps=24, tinit=3, tfinal=6)
END = 18


@pytest.fixture(autouse=True)
def optax_promotes():
    """optax itself mixes types, as `beta ** count`."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# ---------------------------------------------------------------- the schedule
def test_a_schedule_in_numpy_s_integers():
    """The cubes of the budget are Python's: 3000³ is no int32."""
    adapters = {"w": lora.methods.AdaLoRA(jnp.ones((9, 8)), jnp.ones(8), jnp.ones((8, 9)),
                                          geometry=lora.Geometry((0,), (1,)))}  # fmt: skip
    masks = []
    for kind in (int, np.int32):
        settings = dict(tinit=kind(2), tfinal=kind(500), steps=kind(3000), interval=kind(1))
        tx = lora.optim.adalora(optax.sgd(0.1), target_rank=2, **settings)
        state = tx.init(adapters)._replace(step=jnp.int32(1200))
        masks.append(tx.update(adapters, state, adapters)[1].mask["w"].lam)
    assert masks[0].sum() == masks[1].sum() < 8


def test_the_schedule_of_the_readme():
    """72 matrices, init_r 12, target_r 8, tinit 500, tfinal 1500, total_step 3000."""
    of = dict(start=72 * 12, target=72 * 8, tinit=500, end=1500)
    values = {1: 864, 500: 864, 750: 697, 1000: 612, 1500: 576, 2000: 576, 3000: 576}
    assert {t: budget(t, **of) for t in values} == values


@examples(50)
@given(st.integers(1, 200), st.integers(0, 200), st.integers(0, 60), st.integers(1, 300))
def test_the_table_is_the_schedule(target, more, tinit, length):
    """`update` looks the budget up in a table of a step for each budget; and eq. 12, rounded down."""
    of = dict(start=target + more, target=target, tinit=tinit, end=tinit + length)
    falls = _falls(**of)
    assert len(falls) == more and falls == sorted(falls, reverse=True)
    for t in range(1, tinit + length + 3):
        left = 1 - (min(max(t, tinit), tinit + length) - tinit) / length
        exact = target + more * left**3
        assert target + sum(last >= t for last in falls) == budget(t, **of)
        assert exact - 1 - 1e-9 < budget(t, **of) <= exact + 1e-9


# ---------------------------------------------------------------- against NumPy
def shapes():
    """A matrix, a stack of three and a head in full: 4 matrices."""
    w = {"q": (5, 4), "experts": (3, 4, 6), "head": (6, 2)}
    params = {k: jax.ShapeDtypeStruct(s, "float32") for k, s in w.items()}
    rule = lora.Rule("experts", in_axes=(1,), out_axes=(2,), batch_axes=(0,))
    config = lora.LoRAConfig(rank=3, targets=["q", "experts"], rules=[rule], full="head")
    return lora.select(params, config)


def random(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape).astype(np.float32)), tree)


def start():
    full = {k: jnp.zeros(s) for k, s in (("q", (5, 4)), ("experts", (3, 4, 6)), ("head", (6, 2)))}
    return random(jax.eval_shape(lambda p: lora.methods.init_adalora(KEY, p, shapes()), full), 0)


class Reference:
    """Algorithm 1 of the paper, matrix by matrix, with SGD."""

    def __init__(self, adapters, interval, rate):
        self.interval, self.rate, self.t = interval, rate, 0
        self.w = {}
        for name in ("q", "experts"):
            n = adapters[name]
            for i in range(n.lam.size // 3):
                arrays = (x if n.lam.ndim == 1 else x[i] for x in (n.p, n.lam, n.q))
                self.w[name, i] = [np.asarray(x, np.float64) for x in arrays]
        zeros = lambda: {k: [0 * x for x in w] for k, w in self.w.items()}
        self.mean, self.spread = zeros(), zeros()
        self.kept = {k: np.ones(3, bool) for k in self.w}

    def step(self, grads):
        self.t += 1
        for (name, i), w in self.w.items():
            n = grads[name]
            arrays = (x if n.lam.ndim == 1 else x[i] for x in (n.p, n.lam, n.q))
            g = [np.asarray(x, np.float64) for x in arrays]
            for j in range(3):
                now = np.abs(w[j] * g[j])
                if self.t <= END:
                    mean, spread = self.mean[name, i], self.spread[name, i]
                    mean[j] = 0.85 * mean[j] + 0.15 * now
                    spread[j] = 0.85 * spread[j] + 0.15 * np.abs(now - mean[j])
                w[j] = w[j] - self.rate * g[j]
        if 3 < self.t <= END and (self.t % self.interval == 0 or self.t == END):
            self.allocate()
        if self.t > END or (self.t > 3 and self.t % self.interval == 0):
            for k, w in self.w.items():
                w[1] = w[1] * self.kept[k]

    def scores(self):
        out = {}
        for k in self.w:
            p, lam, q = (m * s for m, s in zip(self.mean[k], self.spread[k]))
            out[k] = lam + p.mean(0) + q.mean(1)
        return out

    def allocate(self):
        scores = self.scores()
        left = 1 - (self.t - 3) / (END - 3)
        b = int(8 + (12 - 8) * left**3 + 1e-9)
        threshold = sorted(np.concatenate(list(scores.values())))[-b]
        self.kept = {k: s >= threshold for k, s in scores.items()}
        for k, w in self.w.items():
            w[1] = w[1] * self.kept[k]


@functools.cache
def run(interval):
    """(the states, the adapters and the reference's) after each step of random gradients."""
    adapters = start()
    tx = lora.optim.adalora(optax.sgd(0.1), interval=interval, **SCHEDULE)
    state, reference = tx.init(adapters), Reference(adapters, interval, 0.1)
    update = jax.jit(tx.update)
    trail = []
    for t in range(1, 25):
        grads = random(adapters, t)
        updates, state = update(grads, state, adapters)
        adapters = optax.apply_updates(adapters, updates)
        reference.step(grads)
        kept = {k: v.copy() for k, v in reference.kept.items()}
        values = {k: [x.copy() for x in w] for k, w in reference.w.items()}
        trail.append((t, state, adapters, values, kept, reference.scores()))
    assert update._cache_size() == 1  # one step, compiled once
    return trail


def by_matrix(tree, field):
    return {
        (k, i): x
        for k in ("q", "experts")
        for i, x in enumerate(
            np.asarray(getattr(tree[k], field)).reshape(-1, *shape_of(tree, k, field))
        )
    }


def shape_of(tree, k, field):
    return getattr(tree[k], field).shape[k == "experts" :]


@pytest.mark.parametrize("interval", [1, 4])
def test_against_the_paper(interval):
    for t, state, adapters, values, kept, scores in run(interval):
        for j, field in enumerate(("p", "lam", "q")):
            for k, x in by_matrix(adapters, field).items():
                assert_close(x, values[k][j].astype(np.float32), factor=256)
        ours = _scores(state.sensitivity, state.uncertainty)
        for name, s in zip(("experts", "q"), ours):  # a dict's order
            for i, row in enumerate(np.asarray(s).reshape(-1, 3)):
                assert_close(row, scores[name, i].astype(np.float32), factor=256)
        for k, m in by_matrix(state.mask, "lam").items():
            np.testing.assert_array_equal(m, kept[k], str((t, k)))


@pytest.mark.parametrize("interval", [1, 4])
def test_the_budget_is_kept(interval):
    """Exactly b(t) singular values are not zero, at each allocation and after the last."""
    of = dict(start=12, target=8, tinit=3, end=END)
    for t, state, adapters, *_ in run(interval):
        left = sum(int(np.sum(np.asarray(adapters[k].lam) != 0)) for k in ("q", "experts"))
        allocates = t > END or (t > 3 and t % interval == 0)
        assert left == (budget(t, **of) if allocates or t == END else 12)
        masked = sum(int(np.sum(state.mask[k].lam)) for k in ("q", "experts"))
        assert masked == budget(t if allocates else max(3, t // interval * interval), **of)


def test_a_pruned_triplet_can_come_back():
    """Between allocations all λ train (section 4), so that the one that matters now wins."""
    node = lora.methods.AdaLoRA(
        jnp.ones((3, 2)), jnp.ones(2), jnp.ones((2, 4)), geometry=lora.Geometry((0,), (1,))
    )
    adapters = {"w": node}
    tx = lora.optim.adalora(optax.sgd(0.1), target_rank=1, steps=30, tinit=1, tfinal=6, interval=4)
    state, update, trail = tx.init(adapters), jax.jit(tx.update), []
    for t in range(1, 31):
        weak, strong = jnp.array([0.01, 1.0]), jnp.array([1.0, 0.01])
        grads = jax.tree.map(jnp.zeros_like, adapters)
        grads = {"w": dataclasses.replace(grads["w"], lam=weak if t <= 4 or t > 24 else strong)}
        updates, state = update(grads, state, adapters)
        adapters = optax.apply_updates(adapters, updates)
        trail.append((state.mask["w"].lam.tolist(), (adapters["w"].lam != 0).tolist()))
    assert trail[2] == ([True, True], [True, True])
    assert trail[3] == ([False, True], [False, True])  # step 4: pruned
    assert trail[4] == ([False, True], [True, True])  # and free again
    assert trail[23:] == [([True, False], [True, False])] * 7  # back; then the mask is fixed


@pytest.mark.slow
def test_equal_importances_are_counted_too():
    """Gradients of zero: all scores are zero, and still as many are kept as the budget says."""
    adapters = start()
    tx = lora.optim.adalora(optax.sgd(0.1), target_rank=1, steps=2, interval=1)
    zero = jax.tree.map(jnp.zeros_like, adapters)
    updates, state = tx.update(zero, tx.init(adapters), adapters)
    _, state = tx.update(updates, state, optax.apply_updates(adapters, updates))
    assert sum(int(state.mask[k].lam.sum()) for k in ("q", "experts")) == 4


@pytest.mark.parametrize("inner", [
    optax.adamw(1e-2, weight_decay=0.1),
    optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-2, 24))),
    optax.sgd(1e-2, momentum=0.9),
], ids=["adamw", "chain", "momentum"])  # fmt: skip
def test_around_any_optimiser(inner):
    """Also of a tree with frozen leaves: what is kept moves as the optimiser says, the rest is 0."""
    adapters = start()
    tree = {"params": {"q": jnp.ones((5, 4))}, "adapters": adapters}
    tx = lora.optim.trained_only(lora.optim.adalora(inner, interval=1, **SCHEDULE))
    state, plain = tx.init(tree), lora.optim.trained_only(inner).init(tree)
    update, own = jax.jit(tx.update), jax.jit(lora.optim.trained_only(inner).update)
    for t in range(6):
        grads = random(tree, t)
        want, plain = own(grads, plain, tree)
        updates, state = update(grads, state, tree)
        assert not updates["params"]["q"].any()
        old, tree = tree["adapters"], optax.apply_updates(tree, updates)
        pruned = tree["adapters"]["experts"].lam == 0
        got, want = updates["adapters"], want["adapters"]
        assert_close(got["head"], want["head"])
        assert_close(got["experts"].p, want["experts"].p)
        lam = jnp.where(pruned, -old["experts"].lam, want["experts"].lam)
        assert_close(got["experts"].lam, lam)
    n = sum(int(jnp.sum(tree["adapters"][k].lam == 0)) for k in ("q", "experts"))
    assert n == 12 - budget(6, start=12, target=8, tinit=3, end=END) > 0


# ---------------------------------------------------------------- real ranks
def masked_adapters():
    return run(1)[-1][2]


def test_pruned_is_the_masked_adapter():
    adapters = masked_adapters()
    small = lora.methods.pruned(adapters)
    params = {"q": jnp.ones((5, 4)), "experts": jnp.ones((3, 4, 6)), "head": jnp.ones((6, 2))}
    assert_close(lora.merge(params, small), lora.merge(params, adapters))
    ranks = {k: int(jnp.max(jnp.sum(adapters[k].lam != 0, -1))) for k in ("q", "experts")}
    assert {k: small[k].rank for k in ranks} == ranks and min(ranks.values()) < 3
    assert small["q"].scale == adapters["q"].scale


@pytest.mark.parametrize("lam, rank", [([0, 0, 5], 1), ([[0, 1, 0], [0, 0, 0]], 1),
                                       ([[1, 0, 2], [0, 3, 0]], 2)])  # fmt: skip
def test_pruned_by_hand(lam, rank):
    """A stack takes the largest rank of its weights."""
    lam = jnp.asarray(lam, jnp.float32)
    batch = lam.shape[:-1]
    g = lora.Geometry((1,), (2,), (0,)) if batch else lora.Geometry((0,), (1,))
    p, q = random((jnp.zeros((*batch, 4, 3)), jnp.zeros((*batch, 3, 5))), 1)
    node = lora.methods.AdaLoRA(p, lam, q, geometry=g, scale=0.5)
    got = lora.methods.pruned({"w": node})["w"]
    assert got.rank == rank
    assert_close(got.a @ got.b, (p * lam[..., None, :]) @ q)


def test_pruned_to_nothing_or_written_for_peft(tmp_path):
    g = lora.Geometry((0,), (1,))
    node = lambda lam: lora.methods.AdaLoRA(*random((jnp.zeros((4, 3)),), 1), jnp.asarray(lam),
                                    *random((jnp.zeros((3, 5)),), 2), geometry=g)  # fmt: skip
    adapters = {"v": {"kernel": node([0.0, 0, 0])}, "w": {"kernel": node([0.0, 2, 1])},
                "u": {"kernel": node([1.0, 0, 0])}}  # fmt: skip
    small = lora.methods.pruned(adapters)
    assert set(small) == {"w", "u"}
    params = {k: {"kernel": jnp.ones((4, 5))} for k in "uvw"}
    assert_close(lora.merge(params, small), lora.merge(params, adapters))
    mapping = lora.peft.mapping({f"{k}.weight": (5, 4) for k in "uvw"}, params)
    lora.peft.save(tmp_path, small, mapping)
    back = lora.peft.load(tmp_path, params).adapters
    assert (back["w"]["kernel"].rank, back["u"]["kernel"].rank) == (2, 1)
    assert_close(lora.merge(params, back), lora.merge(params, small))


def test_orthogonality():
    """‖PᵀP − I‖² + ‖QQᵀ − I‖², summed over matrices, and its gradient."""
    adapters = start()
    want = 0.0
    for k in ("q", "experts"):
        for p, q in zip(*(by_matrix(adapters, f).items() for f in ("p", "q"))):
            if p[0][0] == k:
                p, q = np.float64(p[1]), np.float64(q[1])
                want += np.sum((p.T @ p - np.eye(3)) ** 2) + np.sum((q @ q.T - np.eye(3)) ** 2)
    assert_close(lora.methods.orthogonality(adapters), np.float32(want))
    grads = jax.grad(lora.methods.orthogonality)(adapters)
    p = np.float64(adapters["q"].p)
    assert_close(grads["q"].p, (4 * p @ (p.T @ p - np.eye(3))).astype(np.float32), factor=256)
    assert not grads["q"].lam.any() and not grads["head"].value.any()


# ---------------------------------------------------------------- a model
@pytest.mark.slow
def test_trains_a_scanned_model_on_eight_devices(tmp_path):
    """From the base to real ranks, in one compiled step; saved and restored on the way."""
    model = Transformer(True)
    params = model.init(KEY, IDS)["params"]
    apply = lambda params, ids: model.apply({"params": params}, ids)
    survey = lora.survey(apply, params, IDS)
    config = lora.LoRAConfig(rank=3, targets=["query", "up"])
    adapters = jax.jit(lambda p: lora.methods.init_adalora(KEY, p, config, survey))(params)
    f = lora.adapt(apply)
    tx = lora.optim.adalora(
        optax.adam(3e-2), target_rank=1.5, steps=30, tinit=4, tfinal=10, interval=3
    )

    @jax.jit
    def step(params, adapters, state):
        def loss(ad):
            logits = f(lora.bind(params, ad), IDS)
            error = optax.softmax_cross_entropy_with_integer_labels(logits, IDS).mean()
            return error + 1e-3 * lora.methods.orthogonality(ad), error

        grads, error = jax.grad(loss, has_aux=True)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, error

    def count(ad):
        nodes = jax.tree.leaves(ad, is_leaf=lambda x: isinstance(x, lora.methods.AdaLoRA))
        return sum(int(jnp.sum(n.lam != 0)) for n in nodes), len(nodes)

    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = lambda x: P(*[None] * (x.ndim - 1), "model" if x.shape[-1] % 4 == 0 else None)
    params = jax.device_put(params, jax.tree.map(lambda x: NamedSharding(mesh, split(x)), params))
    where = lora.parallel.shardings(params, adapters)
    states = lora.parallel.state_shardings(jax.eval_shape(tx.init, adapters), adapters, where)
    up = states.sensitivity["layers"]["up"]["kernel"]
    assert up.q.spec == where["layers"]["up"]["kernel"].q.spec != P()
    adapters = jax.device_put(adapters, where)
    state = jax.jit(tx.init, out_shardings=states)(adapters)
    errors = []
    with ocp.CheckpointManager(tmp_path) as manager:
        for t in range(30):
            if t == 15:  # killed, and started again
                lora.checkpoint.save(manager, t, adapters, base=params, config=None, state=state)
                manager.wait_until_finished()
                found = lora.checkpoint.restore(manager, adapters, base=params, state=state)
                jax.tree.map(np.testing.assert_array_equal, found.state, state)
                adapters, state = found.adapters, found.state
            adapters, state, error = step(params, adapters, state)
            errors.append(float(error))
    assert errors[-1] < 0.9 * errors[0]
    # 2 leaves of 2 layers: 4 matrices of mean rank 1.5
    assert count(adapters) == (6, 2) and int(state.step) == 30
    small = lora.methods.pruned(adapters)
    merged = lora.merge(params, small)
    assert_close(merged, lora.merge(params, adapters))
    got = jax.jit(lambda p, ad: f(lora.bind(p, ad), IDS))(params, small)
    assert_close(got, jax.jit(apply)(merged, IDS), factor=256)


# ---------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: lora.optim.adalora(optax.sgd(1), target_rank=1, steps=10, tinit=5, tfinal=5),
         r"tinit=5, tfinal=5, steps=10: expected tinit < steps - tfinal(.|\n)*lora.optim.adalora\(optax"),
        (lambda: lora.optim.adalora(optax.sgd(1), target_rank=0, steps=10, interval=0, beta1=1.0, beta2=-1),
         r"target_rank=0(.|\n)*interval=0(.|\n)*beta1=1.0(.|\n)*beta2=-1"),
        (lambda: lora.optim.adalora(optax.sgd(1), target_rank=4, steps=10).init(start()),
         r"target_rank=4 is above the rank 3 of the adapters(.|\n)*LoRAConfig\(rank=12\)"),
        (lambda: lora.optim.adalora(optax.sgd(1), target_rank=1, steps=10).init({"w": jnp.ones(3)}),
         r"expected adapters of AdaLoRA, found none: adapters = lora.methods.init_adalora"),
        (lambda: (tx := lora.optim.adalora(optax.sgd(1), target_rank=1, steps=10)).update(
            start(), tx.init(start())), r"needs the parameters: tx.update\(grads, state, adapters\)"),
        (lambda: optax.inject_hyperparams(lora.optim.adalora)(optax.sgd(1), target_rank=1, steps=10).init(
            start()), r"made of arrays(.|\n)*steps=10(.|\n)*inject hyperparameters of what it wraps"),
        (lambda: lora.methods.orthogonality({"w": jnp.ones(3)}), "expected adapters of AdaLoRA"),
        (lambda: lora.methods.pruned({}), "expected adapters of AdaLoRA"),
        (lambda: jax.jit(lora.methods.pruned)(start()), r"not under jit: lora.methods.pruned\(adapters\) outside"),
    ],
)  # fmt: skip
def test_errors(call, match):
    with fails(match):
        call()
