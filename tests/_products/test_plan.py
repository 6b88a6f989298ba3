"""The plan of the low-rank contraction: its cost model, its numerics, and what it keeps."""

import collections
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rand
from by_hand import steps
from common import adapted, assert_close, assert_equals_dense, noisy
from jax._src.ad_checkpoint import saved_residuals
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax._products.plan import Costs, Plan, planned
from lora_jax.parallel._hlo import collectives

P = PartitionSpec
GRID = list(itertools.product((1, 16, 128, 1024, 8192), (256, 1024, 4096), (1, 8, 64, 256)))
PLANS = ("auto", "factored", "merged", "beside")


def dot_flops(f, *args) -> int:
    """FLOPs of the matrix products of the lowered program, the input of XLA."""
    text = jax.jit(f).lower(*args).as_text()
    total = 0
    for line in re.findall(r"dot_general .*", text):
        contracted = re.search(r"contracting_dims = \[([\d, ]*)\]", line).group(1)
        lhs, _, out = re.findall(r"tensor<([\dx]*)x\w+>", line)
        sizes = [int(n) for n in lhs.split("x")]
        summed = math.prod(sizes[int(d)] for d in contracted.split(",") if d.strip())
        total += 2 * summed * math.prod(int(n) for n in out.split("x"))
    return total


def linear(p, x):
    return x @ p["w"]


def single(rows, width, rank, plan, by_hand=False):
    """(forward, training step) of one linear layer, as functions of shapes."""
    size = jax.ShapeDtypeStruct
    x = size((rows, width), jnp.float32)
    params = {"w": size((width, width), jnp.float32)}
    config = lora.LoRAConfig(rank=rank, targets="w")
    ad = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, config))
    apply = lora.adapt(linear, plan=plan)

    def ours(ad, x, params):
        return apply(lora.bind(params, ad), x)

    def hand(ad, x, params):
        return x @ params["w"] + ad["w"].scale * ((x @ ad["w"].a) @ ad["w"].b)

    forward = hand if by_hand else ours

    def train(ad, x, params):
        return jax.value_and_grad(lambda ad, x: jnp.sum(forward(ad, x, params)), (0, 1))(ad, x)

    return forward, train, (ad, x, params)


ALLOWED = {
    (True, True): PLANS,
    (True, False): ("auto", "factored", "merged"),
    (False, True): ("auto", "factored", "beside"),
}


@pytest.mark.parametrize("mergeable, joinable", ALLOWED)
@pytest.mark.parametrize("rows,width,rank", GRID)
def test_auto_is_the_best_plan_of_the_model(rows, width, rank, mergeable, joinable):
    """In FLOPs and bytes at the machine's balance, base products included."""
    args = rows, width, [width], [rank], 4
    c = Costs.of(*args)

    def cost(plan, training):
        if not training:
            update = dict(factored=c.hidden + c.up, merged=c.merge, beside=c.hidden + c.join)
            return base + update[plan.infer]
        forward = dict(factored=c.up, merged=c.merge, beside=c.join)[plan.forward]
        backward = dict(factored=c.down, merged=c.merge, beside=c.join_back)[plan.backward]
        return 2 * base + c.hidden + forward + backward

    base = 2 * rows * width**2
    able = dict(mergeable=mergeable, joinable=joinable)
    auto, *fixed = (planned(mode, *args, **able) for mode in ALLOWED[mergeable, joinable])
    for training in (False, True):
        assert cost(auto, training) <= min(cost(plan, training) for plan in fixed)


@pytest.mark.parametrize("rows,width,rank", GRID)
def test_never_more_products_than_by_hand(rows, width, rank):
    forward, train, args = single(rows, width, rank, "auto")
    hand, hand_train, _ = single(rows, width, rank, "auto", by_hand=True)
    assert dot_flops(forward, *args) <= dot_flops(hand, *args)
    assert dot_flops(train, *args) <= dot_flops(hand_train, *args)


@pytest.mark.parametrize("rows,width,rank", [(8192, 256, 256), (128, 1024, 8)])
def test_counted_flops_are_those_of_the_cost_model(rows, width, rank):
    """Each plan's products are the terms of the module's table, to the last one."""
    base, low = 2 * rows * width**2, 2 * rows * width * rank  # low: any product with a factor
    merge = 2 * width**2 * rank
    for plan, want in {
        "factored": (base + 2 * low, 2 * base + 6 * low),
        "merged": (base + merge, 2 * base + 4 * low + 2 * merge),
        "beside": (base + 2 * low, 2 * base + 6 * low),
    }.items():
        forward, train, args = single(rows, width, rank, plan)
        assert (dot_flops(forward, *args), dot_flops(train, *args)) == want


def three(p, x):
    return jnp.tanh(x @ p["q"]) + (x @ p["k"]) * (x @ p["v"])


def test_weights_of_one_input_share_the_product_with_a():
    params = {n: jnp.ones((64, 48)) for n in "qkv"}
    x = jnp.ones((4, 32, 64))
    f, ad = adapted(three, params, x, targets=list("qkv"), plan="factored", rank=4)
    jaxpr = str(jax.make_jaxpr(lambda ad: f(lora.bind(params, ad), x))(ad))
    assert len(re.findall("= adapted_product", jaxpr)) == 1
    rows, d, k, r = 128, 64, 48, 4
    want = 3 * 2 * rows * d * k + 2 * rows * d * 3 * r + 3 * 2 * rows * r * k
    assert dot_flops(lambda ad: f(lora.bind(params, ad), x), ad) == want
    text = jax.jit(lambda ad: f(lora.bind(params, ad), x)).lower(ad).as_text()
    assert len(re.findall("dot_general ", text)) == 3 + 1 + 3
    # few rows: copying the A side by side would cost more than reading x three times
    few = jax.jit(lambda ad: f(lora.bind(params, ad), x[:1, :1])).lower(ad).as_text()
    assert len(re.findall("dot_general ", few)) == 3 + 3 + 3


def test_sharing_looks_through_casts():
    """Each layer of a mixed-precision model casts its input and its weight for itself."""

    def fn(p, x):
        return sum(x.astype(jnp.bfloat16) @ p[n].astype(jnp.bfloat16) for n in "qkv")

    params, x = {n: jnp.ones((64, 48)) for n in "qkv"}, jnp.ones((256, 64))
    f, ad = adapted(fn, params, x, targets=list("qkv"))
    assert "shared" in str(lora.coverage(fn, lora.bind(params, ad), x))
    text = jax.jit(lambda ad: f(lora.bind(params, ad), x)).lower(ad).as_text()
    assert len(re.findall("dot_general ", text)) == 3 + 1 + 3


def test_products_of_other_inputs_are_not_shared():
    def fn(p, x):
        return (x @ p["q"]) + (2 * x @ p["k"]) + (x.T @ p["v"]).T

    params, x = {n: jnp.ones((64, 64)) for n in "qkv"}, jnp.ones((64, 64))
    _, ad = adapted(fn, params, x, targets=list("qkv"))
    uses = lora.coverage(fn, lora.bind(params, ad), x).uses
    assert {u.plan for of_leaf in uses.values() for u in of_leaf} == {"merged (infer)"}


@pytest.mark.parametrize("plan", PLANS)
def test_factors_that_run_along_outputs_are_not_shared(plan):
    """Told to share A's rows among heads, of which q and k have different numbers."""

    def fn(p, x):
        q, k = (jnp.einsum("td,dhk->thk", x, p[n]) for n in "qk")
        return jnp.sum(q, 1) * jnp.sum(k, 1)

    params = {n: rand.normal(jax.random.key(2), (8, h, 6)) for n, h in (("q", 4), ("k", 5))}
    rules = [lora.Rule("*", in_axes=(0, 1), out_axes=(2,))]
    assert_equals_dense(
        fn, params, jnp.ones((16, 8)), targets=["q", "k"], rules=rules, plan=plan, strict=False
    )


def test_a_weight_that_depends_on_a_sibling_is_not_made_early():
    """k's weight is scaled by a value that q's product gives."""

    def fn(p, x):
        y = x @ p["q"]
        return y + x @ (p["k"] * y[0, 0])

    params, x = {n: rand.normal(jax.random.key(1), (8, 8)) for n in "qk"}, jnp.ones((16, 8))
    f, ad = adapted(fn, params, x, targets=["q", "k"])
    assert_close(f(lora.bind(params, ad), x), fn(lora.merge(params, ad), x))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradients_against_float64(plan, dtype):
    """Each plan within the dtype's bound of fp64 dense autodiff, and within twice LoRA by hand: the
    worst leaf of three draws."""
    ours, hand = np.max([errors_against_float64(plan, dtype, seed) for seed in (5, 6, 7)], 0)
    assert ours <= 32 * float(jnp.finfo(dtype).eps)
    assert ours <= 2 * hand, ours / hand


def errors_against_float64(plan, dtype, seed):
    """Relative errors (norms) of the worst leaf: (ours, by hand)."""
    key = jax.random.key(seed)
    rows, d, k, r, scale = 512, 32, 48, 4, 2.0
    names = ("q", "v")
    params = {
        n: rand.normal(jax.random.fold_in(key, i), (d, k)) / d**0.5 for i, n in enumerate(names)
    }
    x = rand.normal(jax.random.fold_in(key, 9), (2, rows // 2, d)).astype(dtype)
    params = jax.tree.map(lambda v: v.astype(dtype), params)
    fn = lambda p, x: jnp.tanh(x @ p["q"]) * (x @ p["v"])
    config = lora.LoRAConfig(rank=r, alpha=scale * r, targets=list(names))
    ad = noisy(lora.init(key, params, config), scale=0.1)

    def ours(ad, x):
        return jnp.sum(lora.adapt(fn, plan=plan)(lora.bind(params, ad), x).astype(jnp.float32) ** 2)

    def hand(ad, x):
        def layer(n):
            a, b = (v.astype(x.dtype) for v in (ad[n].a, ad[n].b))
            return x @ params[n] + scale * ((x @ a) @ b)

        return jnp.sum((jnp.tanh(layer("q")) * layer("v")).astype(jnp.float32) ** 2)

    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda v: np.asarray(v, np.float64), tree)

        def dense(ad, x):
            w = {n: wide(params)[n] + scale * ad[n].a @ ad[n].b for n in names}
            return jnp.sum(fn(w, x) ** 2)

        want = wide(jax.grad(dense, (0, 1))(wide(ad), wide(x)))

    def errors(loss):
        got = jax.jit(jax.grad(loss, (0, 1)))(ad, x)
        return [
            np.linalg.norm(np.asarray(g, np.float64) - w) / np.linalg.norm(w)
            for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want))
        ]

    return max(errors(ours)), max(errors(hand))


def test_auto_does_not_merge_where_bits_would_be_lost():
    """A weight of 1 and an update of 1e-4: in bf16 the merged weight would be the base."""
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    x = jnp.ones((4096, 64), jnp.bfloat16)
    node = lora.LoRA(jnp.full((64, 1), 1e-4), jnp.ones((1, 64)), 1.0, lora.Geometry((0,), (1,)))
    bound = lora.bind(params, {"w": node})
    plan = lambda p, x, **kw: lora.coverage(linear, p, x, **kw).uses["w"][0].plan
    assert plan(bound, x) == "factored"
    full = jax.tree.map(lambda v: v.astype(jnp.float32), (bound, x))
    assert plan(*full) == "merged"
    assert plan(*full, plan="factored") == "factored"
    assert plan(bound, x, plan="merged") == "merged"
    update = lambda plan: np.asarray(
        lora.adapt(linear, plan=plan)(bound, x) - x @ params["w"], np.float32
    )
    branch = jnp.full((64, 64), 1e-4) @ jnp.ones((64, 64))
    assert float(branch[0, 0]) > 0
    assert (update("merged") == 0).all()


def test_auto_does_not_merge_what_is_sharded():
    """There the rows of one device are not known, and the weight may be gathered."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params = {"w": jnp.ones((64, 64))}
    x = jnp.ones((4096, 64))
    f, ad = adapted(linear, params, x, targets="w")
    on_mesh = jax.device_put(x, NamedSharding(mesh, P("data")))
    plan = lambda x: lora.coverage(linear, lora.bind(params, ad), x).uses["w"][0].plan
    assert (plan(x), plan(on_mesh)) == ("merged", "factored")
    np.testing.assert_allclose(
        jax.jit(f)(lora.bind(params, ad), on_mesh), f(lora.bind(params, ad), x), rtol=1e-5
    )


def layers(p, x):
    for w in p:
        x = jnp.tanh(x @ w)
    return x


@pytest.mark.parametrize("plan", ["auto", "merged"])
def test_one_merged_weight_at_a_time(plan):
    """Temporary memory grows with the layers by what autodiff saves, not by their weights."""
    rows, d = 1024, 256
    weight = d * d * 4

    def temp(f, n, plan):
        params, x = [jnp.ones((d, d))] * n, jnp.ones((rows, d))
        _, ad = adapted(layers, params, x, targets=[str(i) for i in range(n)])
        apply = lora.adapt(layers, plan=plan)
        loss = lambda ad, params, x: jnp.sum(apply(lora.bind(params, ad), x))
        stats = jax.jit(f(loss)).lower(ad, params, x).compile().memory_analysis()
        return stats.temp_size_in_bytes

    assert temp(jax.grad, 8, plan) <= temp(jax.grad, 8, "factored") + weight
    grown, factored = (temp(jax.grad, 8, p) - temp(jax.grad, 2, p) for p in (plan, "factored"))
    assert grown <= factored + weight / 2
    forward = lambda loss: loss
    assert temp(forward, 16, plan) <= temp(forward, 8, plan) + weight / 2


def counted_collectives(f, *args):
    """{(kind, shape): count} of the compiled program."""
    found: collections.Counter = collections.Counter()
    for c in collectives(jax.jit(f).lower(*args).compile().as_text()):
        found[c.kind, c.array] += c.count
    return found


@pytest.mark.parametrize("spec", [P("data", None), P("data", "model"), P(None, "model")])
def test_collectives_are_those_of_the_hand_written_step(spec):
    """Batch and sequence sharded: no axis is merged, so nothing is gathered for an adapter."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    size = dict(width=64, hidden=128, heads=4, layers=1, tokens=(2, 64))
    (ours, args), (hand, hand_args) = steps(("q", "k", "v", "o", "gate", "up", "down"), 4, **size)

    def place(args):
        *trees, ids = args
        trees = jax.device_put(trees, NamedSharding(mesh, P()))
        return *trees, jax.device_put(ids, NamedSharding(mesh, spec))

    got, want = (counted_collectives(*x) for x in ((ours, *place(args)), (hand, *place(hand_args))))
    count = lambda found, kind: sum(n for (k, _), n in found.items() if k == kind)
    for kind in {k for k, _ in {**got, **want}}:
        assert count(got, kind) <= count(want, kind), (kind, got, want)
    weights = {"64,64", "64,128", "128,64"}
    reduced = [s for k, s in got if k in ("all-reduce", "reduce-scatter")]
    assert not any(s.split("[")[1].rstrip("]") in weights for s in reduced)


@pytest.mark.parametrize("plan", PLANS)
def test_explicit_sharding(plan):
    """Shardings in types: the result's is the plain model's."""
    mesh = jax.make_mesh(
        (2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    with jax.set_mesh(mesh):
        w = jax.device_put(rand.normal(jax.random.key(0), (16, 8)), P(None, "model"))
        x = jax.device_put(rand.normal(jax.random.key(1), (8, 16)), P("data", None))
        fn = lambda p, x: jnp.tanh(x @ p["w"])
        f, ad = adapted(fn, {"w": w}, x, targets="w", plan=plan)
        want = jax.jit(
            lambda ad: jax.value_and_grad(lambda ad: jnp.sum(fn(lora.merge({"w": w}, ad), x)))(ad)
        )(ad)
        got = jax.jit(
            lambda ad: jax.value_and_grad(lambda ad: jnp.sum(f(lora.bind({"w": w}, ad), x)))(ad)
        )(ad)
        assert_close(got, want)
        out = jax.jit(f)(lora.bind({"w": w}, ad), x)
        assert out.sharding.spec == fn({"w": w}, x).sharding.spec


def test_the_plan_shows():
    params = {"w": jnp.ones((64, 64)), "v": jnp.ones((64, 64))}
    fn = lambda p, x: (x @ p["w"]) + (x @ p["v"])
    _, ad = adapted(fn, params, jnp.ones((4096, 64)), targets=["w", "v"])
    table = str(lora.coverage(fn, lora.bind(params, ad), jnp.ones((4096, 64))))
    assert re.search(r"leaf +shape +status +plan +uses\n", table)
    assert re.search(r"low-rank +merged, shared +dot_general", table)
    assert str(Plan()) == "factored"
    assert str(Plan(infer="merged", shared=True)) == "merged (infer), shared"
    assert str(Plan("merged", "beside", "beside")) == "merged (infer), beside (forward, backward)"
    assert str(Plan(*["beside"] * 3)) == "beside"


def test_auto_puts_beside_on_a_gpu_where_that_moves_fewer_bytes(monkeypatch):
    """By the platform of the mesh in the types, or by JAX's default; never on CPUs or TPUs."""
    size = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    shapes = dict(q=(4096, 4096), gate=(4096, 14336), down=(14336, 4096))
    params = {n: size(*s) for n, s in shapes.items()}
    ad = jax.eval_shape(
        lambda p: lora.init(jax.random.key(0), p, lora.LoRAConfig(rank=16, targets=[*shapes])),
        params,
    )

    def plans(rows):
        def use(p, x, v):
            return x @ p["q"], (x + 1) @ p["gate"], v @ p["down"]

        args = lora.bind(params, ad), size(rows, 4096), size(rows, 14336)
        return {n: us[0].plan for n, us in lora.coverage(use, *args).uses.items()}

    assert set(plans(8192).values()) == {"factored"}
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert set(plans(8192).values()) == {"factored"}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert plans(8192) == {
        "q": "beside",
        "gate": "beside (infer, forward)",
        "down": "beside (backward)",
    }
    assert set(plans(256).values()) == {"factored"}  # few rows: to copy W costs more


def test_beside_writes_and_saves_one_array():
    """Of each use one product of the output's size, which is what a policy saves."""
    params, x = {n: jnp.ones((64, 48)) for n in "qkv"}, jnp.ones((256, 64))
    fn = lambda p, x: three(p, x) @ jnp.ones((48, 8))
    policy = jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims

    def saved(plan):
        f, ad = adapted(fn, params, x, targets=list("qkv"), plan=plan)
        loss = jax.checkpoint(lambda ad: jnp.sum(f(lora.bind(params, ad), x)), policy=policy)
        found = collections.Counter()
        for aval, why in saved_residuals(loss, ad):
            found[aval.shape] += "argument" not in why and "constant" not in why
        return found[256, 48], found[256, 64]

    assert (saved("beside"), saved("factored")) == ((3, 0), (6, 0))
    f, ad = adapted(fn, params, x, targets=list("qkv"), plan="beside")
    loss = lambda ad, x: jnp.sum(f(lora.bind(params, ad), x))
    jaxpr = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(ad, x))
    assert len(re.findall(r":f32\[256,48\] = dot_general", jaxpr)) == 3 + 1  # of the last layer
    assert len(re.findall(r":f32\[256,64\] = dot_general", jaxpr)) == 1  # the gradient of x


def test_what_beside_is_not_for_is_factored():
    """Here a result of another type than the operands'."""
    params, x = {"w": jnp.ones((6, 4), jnp.bfloat16)}, jnp.ones((3, 6), jnp.bfloat16)
    fn = lambda p, x: jax.lax.dot(x, p["w"], preferred_element_type=jnp.float32)
    f, ad = adapted(fn, params, x, targets="w", plan="beside")
    bound = lora.bind(params, ad)
    found = [lora.coverage(g, bound, x, plan="beside").uses["w"][0].plan for g in (fn, linear)]
    assert found == ["factored", "beside"]
    np.testing.assert_array_equal(f(bound, x), lora.adapt(fn, plan="factored")(bound, x))


def test_beside_a_quantised_weight():
    """Its numbers are read into the array that the factors stand in."""
    params = {n: rand.normal(jax.random.key(i), (64, 64)) for i, n in enumerate("qkv")}
    x = rand.normal(jax.random.key(9), (5, 64))
    _, ad = adapted(three, params, x, targets=list("qkv"))
    base = lora.quant.quantize(params, list("qkv"))

    def run(plan, base):
        f = lora.adapt(three, plan=plan)
        loss = lambda ad, x: jnp.sum(f(lora.bind(base, ad), x) ** 2)
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(ad, x)

    assert_close(run("beside", base), run("factored", lora.quant.dequantize(base)), factor=256)


def test_unknown_plan():
    with pytest.raises(
        lora.LoRAError, match="plan='fused' is not one of auto, factored, merged, beside"
    ):
        lora.adapt(linear, plan="fused")


def test_merged_refuses_dropout_and_lists_all_leaves():
    params = {"q": jnp.ones((4, 4)), "v": jnp.ones((4, 4))}
    fn = lambda p, x: (x @ p["q"]) + (x @ p["v"])
    config = lora.LoRAConfig(rank=2, dropout=0.25, targets=["q", "v"])
    ad = lora.init(jax.random.key(0), params, config)
    f = lora.adapt(fn, plan="merged")
    f(lora.bind(params, ad), jnp.ones((2, 4)))
    bound = lora.bind(params, ad, dropout_key=jax.random.key(1))
    with pytest.raises(lora.LoRAError, match=r"(?s)'q' has dropout 0.25.*'v' has dropout 0.25"):
        f(bound, jnp.ones((2, 4)))


def test_swapping_adapters_does_not_trace_again():
    traces = []

    def fn(p, x):
        traces.append(1)
        return x @ p["w"]

    params, x = {"w": jnp.ones((8, 8))}, jnp.ones((4, 8))
    config = lora.LoRAConfig(rank=2, targets="w")
    step = jax.jit(jax.grad(lambda ad, x: jnp.sum(lora.adapt(fn)(lora.bind(params, ad), x))))
    for i in range(5):
        step(lora.init(jax.random.key(i), params, config), x)
    assert len(traces) == 1 and step._cache_size() == 1


def test_optimiser_state_is_of_the_adapters_alone():
    params = {"w": jnp.ones((256, 256), jnp.bfloat16)}
    ad = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets="w"))
    state = optax.adam(1e-3).init(ad)
    moments = [v for v in jax.tree.leaves(state) if v.ndim]
    assert {v.dtype for v in moments} == {jnp.dtype(jnp.float32)}
    assert sum(v.size for v in moments) == 2 * (256 * 2 + 2 * 256)


@pytest.mark.parametrize("how", ["MultiSteps", "scan"])
def test_accumulation_adds_one_adapter_tree(how):
    """Memory of 8 micro-batches accumulated: one step's, and one tree of adapters."""
    key, d, n = jax.random.key(0), 128, 8
    params = [rand.normal(jax.random.fold_in(key, i), (d, d)) / d**0.5 for i in range(4)]
    ad = lora.init(key, params, lora.LoRAConfig(rank=4, targets=["0", "1", "2", "3"]))
    batches = jnp.ones((n, 512, d))
    apply = lora.adapt(layers)
    loss = lambda ad, x: jnp.mean(apply(lora.bind(params, ad), x) ** 2)
    bytes_of = lambda tree: sum(v.nbytes for v in jax.tree.leaves(tree))
    temp = lambda f, *args: jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes
    one = temp(jax.grad(loss), ad, batches[0])
    if how == "MultiSteps":
        opt = optax.MultiSteps(optax.adam(1e-3), n)
        more = bytes_of(opt.init(ad)) - bytes_of(optax.adam(1e-3).init(ad))
        assert more <= bytes_of(ad) + 64  # and three counters
        return

    def accumulated(ad, batches):
        add = lambda total, x: (jax.tree.map(jnp.add, total, jax.grad(loss)(ad, x)), None)
        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, ad), batches)[0]

    assert temp(accumulated, ad, batches) <= one + 2 * bytes_of(ad) + batches[0].nbytes + 4096
    want = jax.tree.map(lambda g: n * g, jax.grad(loss)(ad, batches[0]))
    assert_close(accumulated(ad, batches), want)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_few_rows_on_a_gpu_copy_no_weight(platform):
    """XLA makes one product of x·W and x·A there, and for it writes W beside A: unless kept apart."""
    fn = lora.adapt(lambda p, x: x @ p["w"])
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    node = lora.LoRA(shape(8, 2), shape(2, 8), 1.0, lora.Geometry((0,), (1,)))
    call = jax.jit(lambda node, w, x: fn(lora.bind({"w": w}, {"w": node}), x))
    step = jax.jit(jax.grad(lambda *args: call(*args).sum(), (0, 2)))
    of_each = jax.jit(jax.vmap(step, (None, None, 0)))
    second = jax.jit(lambda *args: jax.jvp(step, args, args)[0])
    # x from x·A, and g from g·Bᵀ
    for f, count in ((call, 1), (step, 2), (of_each, 2), (second, 2)):
        traced = f.trace(node, shape(8, 8), shape(3, 8))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.optimization_barrier") == count * (platform == "cuda")
