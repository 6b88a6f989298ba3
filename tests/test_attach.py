"""`attach`: Flax's own loops, trainers' and samplers' code, on a module that holds its adapters."""

import copy
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import rand
from flax import nnx
from flax.training.train_state import TrainState
from support.common import assert_close, fails, noisy
from test_nnx import (
    FEATURES,
    RANK,
    WIDTH,
    Block,
    by_hand,
    changed_by_calls,
    contents,
    made,
    variables,
)

import lora_jax as lora

pytestmark = pytest.mark.filterwarnings("ignore:.*nnx.capture:DeprecationWarning")
SLOW = {"sow", "dropout", "batchnorm", "creates", "cache", "scan", "scan of remat", "remat", "jit"}


def train(model, steps, wrap=nnx.jit):
    """The loop of Flax's docs; returns the losses."""
    optimizer = nnx.Optimizer(model, optax.sgd(0.01, momentum=0.5), wrt=nnx.LoRAParam)

    @wrap
    def step(model, optimizer, x):
        loss_of = lambda model: jnp.mean(jnp.square(model(x) - 1))
        diff = nnx.DiffState(0, nnx.LoRAParam)
        loss, grads = nnx.value_and_grad(loss_of, argnums=diff)(model)
        optimizer.update(model, grads)
        return loss

    keys = jax.random.split(jax.random.key(5), steps)
    return [step(model, optimizer, rand.normal(k, (8, 4, WIDTH))) for k in keys]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in FEATURES]
)
def test_the_loop_of_flax_equals_lora_by_hand(name):
    model, adapters, _ = made(name)
    hand, layers = by_hand(model, adapters)
    adapted = lora.attach(model, adapters)
    before = changed_by_calls(model)
    assert_close(train(adapted, 3), train(hand, 3), factor=256)
    assert_close(changed_by_calls(adapted), changed_by_calls(hand), factor=256)
    if name not in ("sow", "creates"):  # new attributes: of the module that was called
        assert_close(changed_by_calls(model), changed_by_calls(hand), factor=256)
    assert name == "creates" or any(
        k not in before or not np.array_equal(x, before[k])
        for k, x in changed_by_calls(adapted).items()
    )
    _, trained = lora.detach(adapted)
    assert jax.tree.structure(trained) == jax.tree.structure(adapters)
    for path, layer in layers.items():
        node = trained
        for key in [*path.split("/"), "kernel"]:
            node = node[key]
        assert_close((node.a, node.b), (layer.a[...], layer.b[...]), factor=256)


def test_what_a_call_creates_is_created_in_the_model_too():
    model, adapters, x = made("creates")
    adapted = lora.attach(model, adapters)
    plain = lora.merge(model, adapters)
    for _ in range(2):
        assert_close(adapted(x), plain(x))
    for module in (model, adapted):
        assert module.calls == plain.calls
        assert_close(changed_by_calls(module), changed_by_calls(plain))
    assert type(adapted.late) is nnx.BatchNorm


# ---------------------------------------------------------------- what it is
class Tied(nnx.Module):
    """A table that is looked up, and multiplied by another module."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.embed = nnx.Embed(10, WIDTH, rngs=rngs)
        self.head = Head(self.embed)

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def hidden(self, ids, layers=1):
        for block in self.blocks[:layers]:
            ids = block(self.embed(ids))
        return {"x": ids, "layers": layers, "name": "hidden"}

    def words(self, n):
        yield from (self(jnp.array([i])) for i in range(n))

    @property
    def table(self):
        return self.embed.embedding[...]

    @property
    def first(self):
        return self.blocks[0]

    @property
    def size(self):
        return {"vocabulary": 10}


class Head(nnx.Module):
    def __init__(self, embed):
        self.table = embed.embedding

    def __call__(self, x):
        return x @ self.table[...].T


CONFIG = lora.LoRAConfig(rank=RANK, targets=["up", "down", "embedding"])


def tied(config=CONFIG):
    model = Tied(nnx.Rngs(0))
    ids = jnp.array([[1, 2, 3], [4, 5, 6]])
    fn = lambda model, ids: model(ids)
    adapters = lora.init(jax.random.key(0), model, config, lora.survey(fn, model, ids))
    return model, noisy(adapters), ids


@nnx.jit
def by_parts(model, ids):
    x = model.embed(ids)
    return {
        "whole": model(ids),
        "part": x,
        "part of a list": model.blocks[1](x),
        "part of a part": model.first.up(x),
        "leaf of another module": model.head(x),
        "method": model.hidden(ids)["x"],
        "generator": list(model.words(2)),
        "property": model.table,
    }


def test_parts_methods_and_properties_are_adapted():
    model, adapters, ids = tied()
    adapted, plain = lora.attach(model, adapters), lora.merge(model, adapters)
    assert isinstance(adapted, Tied) and type(adapted).__name__ == "Tied"
    assert_close(by_parts(adapted, ids), by_parts(plain, ids))
    assert adapted.hidden(ids, layers=1)["name"] == "hidden"
    assert adapted.size == plain.size and adapted.first is adapted.blocks[0]
    gradient = lambda m, ids: jnp.sum(jnp.square(m.head(m.blocks[0](m.embed(ids)))))
    diff = nnx.DiffState(0, nnx.LoRAParam)
    got = nnx.jit(nnx.grad(gradient, argnums=diff))(adapted, ids)
    want = jax.jit(jax.grad(lambda ad: gradient(lora.merge(model, ad), ids)))(adapters)
    assert_close(
        got["blocks"][0]["up"]["kernel_lora_a"][...], want["blocks"]["0"]["up"]["kernel"].a
    )
    assert_close(got["embed"]["embedding_lora_b"][...], want["embed"]["embedding"].b)


def test_variables_are_shared_and_the_base_is_frozen():
    model, adapters, ids = tied()
    adapted = lora.attach(model, adapters)
    own = {p: v for p, v in variables(adapted).items() if not isinstance(v, nnx.LoRAParam)}
    assert all(own[p] is v for p, v in variables(model).items()) and own.keys() == {
        *variables(model)
    }
    grads = nnx.grad(lambda m: jnp.sum(m(ids)))(adapted)
    trained, rest = nnx.split_state(grads, nnx.LoRAParam, ...)
    assert all(map(jnp.any, jax.tree.leaves(trained)))
    assert not any(map(jnp.any, jax.tree.leaves(rest)))
    assert all(type(v) is nnx.LoRAParam for v in variables(trained).values())
    back, same = lora.detach(adapted)
    assert type(back) is Tied and contents(back) == contents(model)
    assert all(v is variables(model)[p] for p, v in variables(back).items())
    assert_close(same, adapters, factor=0)


@pytest.mark.parametrize(
    "config",
    [
        lora.LoRAConfig(rank=2, targets="up", full=["bias"]),
        lora.LoRAConfig(rank=2, targets="up", rows={"embedding": (1, 4)}),
    ],
    ids=["full", "rows"],
)
def test_other_nodes(config):
    model, adapters, ids = tied(config)
    check_equal(model, adapters, ids)


def test_dora():
    model, adapters, ids = tied(lora.LoRAConfig(rank=2, targets="up"))
    check_equal(model, lora.methods.dora(model, adapters), ids)


@pytest.mark.slow
def test_adalora():
    model, _, ids = tied(CONFIG)
    config = lora.LoRAConfig(rank=2, targets=["up", "down"])
    check_equal(model, noisy(lora.methods.init_adalora(jax.random.key(0), model, config)), ids)


def check_equal(model, adapters, ids):
    adapted = lora.attach(model, adapters)
    loss_of, diff = lambda m, x: jnp.sum(m(x) ** 2), nnx.DiffState(0, nnx.LoRAParam)
    loss, got = nnx.jit(nnx.value_and_grad(loss_of, argnums=diff))(adapted, ids)
    merged = lambda adapters: loss_of(lora.merge(model, adapters), ids)
    want_loss, want = jax.jit(jax.value_and_grad(merged))(adapters)
    assert_close(loss, want_loss)
    nnx.update(adapted, got)
    assert_close(lora.detach(adapted)[1], want, factor=64)


def test_a_variable_that_holds_a_tree_and_containers():
    class Odd(nnx.Module):
        def __init__(self):
            w = lambda i: rand.normal(jax.random.key(i), (WIDTH, WIDTH)) / 8
            self.tree = nnx.Param({"q": w(0), "k": w(1)})
            self.list = nnx.List([nnx.Param(w(3))])
            self.dict = nnx.data({"w": nnx.Param(w(4))})

        def __call__(self, x):
            tree = self.tree.get_raw_value()
            for w in (tree["q"], tree["k"], self.list[0][...], self.dict["w"][...]):
                x = x + x @ w
            return x

    model = Odd()
    config = lora.LoRAConfig(rank=2, targets=[lambda path, x: True])
    adapters = noisy(lora.init(jax.random.key(0), model, config))
    assert len(jax.tree.leaves(adapters)) == 8
    check_equal(model, adapters, jnp.ones((2, WIDTH)))


def test_copies_files_and_no_second_trace():
    model, adapters, ids = tied()
    adapted, traces = lora.attach(model, adapters), []

    @nnx.jit
    def call(model, ids):
        traces.append(1)
        return model(ids)

    want = call(adapted, ids)
    others = [
        lora.attach(model, adapters),
        nnx.clone(adapted),
        nnx.merge(*nnx.split(adapted)),
        copy.deepcopy(adapted),
        pickle.loads(pickle.dumps(adapted)),
    ]
    for other in others:
        assert type(other) is type(adapted)
        assert_close(call(other, ids), want, factor=0)
    assert len(traces) == 1
    assert type(lora.attach(model, adapters, plan="merged")) is not type(adapted)


def test_orbax(tmp_path):
    model, adapters, ids = tied()
    adapted, fresh = lora.attach(model, adapters), lora.attach(model, noisy(adapters, 3))
    with ocp.StandardCheckpointer() as files:
        files.save(tmp_path / "a", nnx.to_pure_dict(nnx.state(adapted, nnx.LoRAParam)))
        files.wait_until_finished()
        like = nnx.to_pure_dict(nnx.state(fresh, nnx.LoRAParam))
        nnx.update(fresh, files.restore(tmp_path / "a", like))
    assert_close(fresh(ids), adapted(ids), factor=0)


def test_dropout_of_the_adapters():
    config = lora.LoRAConfig(rank=2, targets=["up", "down"], dropout=0.5)
    model, adapters, ids = tied(config)
    adapted = lora.attach(model, adapters, rngs=nnx.Rngs(7))
    key = nnx.Rngs(7).dropout()
    bound = lora.bind(model, adapters, dropout_key=key)
    assert_close(adapted(ids), lora.adapt(Tied.__call__)(bound, ids))
    assert not np.array_equal(adapted(ids), adapted(ids))
    adapted.eval()
    assert_close(adapted(ids), lora.merge(model, adapters)(ids))
    without = lora.attach(model, adapters)
    with fails(r"lora.attach\(model, adapters, rngs=nnx.Rngs\(0\)\), or adapted.eval\(\)"):
        without(ids)
    without.eval()
    assert_close(without(ids), adapted(ids))


# ---------------------------------------------------------------- errors
def test_errors_of_nnx():
    model, adapters, _ = tied()
    adapted = lora.attach(model, adapters)
    other = lora.init(jax.random.key(0), {"q": jnp.ones((4, 4))}, lora.LoRAConfig(2, targets="q"))
    with fails("'q' is adapted, but the parameters have no such leaf"):
        lora.attach(model, other)
    with fails(r"attached already: model, adapters = lora.detach\(adapted\)"):
        lora.attach(adapted, adapters)
    for verb in ("bind", "merge"):
        with fails(rf"lora.detach\(adapted\), then lora.{verb}\(model, adapters\)"):
            getattr(lora, verb)(adapted, adapters)
    with fails(r"holds its adapters: lora.attach\(model, adapters\)"):
        lora.attach(model)
    with fails(r"expected adapters, found parameters"):
        lora.attach(model, nnx.state(model))
    with fails(r"found the function 'forward': lora.adapt\(fn\)"):

        def forward(x): ...  # fmt: skip

        lora.attach(forward, adapters)
    with fails(r"found a dict; of parameters it is lora.bind\(params, adapters\)"):
        lora.attach({"w": jnp.ones(3)}, adapters)
    with fails(r"found the module Tied: .* or lora.attach\(model, adapters\)"):
        lora.adapt(model)
    with fails(
        r"expected nnx.Rngs, found a int: lora.attach\(model, adapters, rngs=nnx.Rngs\(0\)\)"
    ):
        lora.attach(model, adapters, rngs=0)
    with fails("found a Tied: model, adapters"):
        lora.detach(model)
    with fails("plan='fast' is not one of"):
        lora.attach(model, adapters, plan="fast")
    vera, _ = lora.methods.init_vera(jax.random.key(0), model, lora.LoRAConfig(2, targets="up"))
    with fails("'blocks/0/up/kernel' is a VeRA(?s:.*)lora.methods.factors"):
        lora.attach(model, vera)


def test_strict():
    class Half(Tied):
        def __call__(self, ids):
            return jnp.tanh(self.blocks[0].up.kernel[...])

    model = Half(nnx.Rngs(0))
    adapters = noisy(lora.init(jax.random.key(0), model, lora.LoRAConfig(2, targets="up")))
    with fails(
        r"(?s)in `__call__`, 2 of 2.*'blocks/0/up/kernel' \(8, 8\) is materialised by `tanh`"
        r".*'blocks/1/up/kernel' \(8, 8\) is never used"
        r".*`lora.attach\(model, adapters, strict=False\)`"
    ):
        lora.attach(model, adapters)(None)
    loose = lora.attach(model, adapters, strict=False)
    assert_close(loose(None), lora.merge(model, adapters)(None))


# ---------------------------------------------------------------- Linen
class MLP(nn.Module):
    width: int = WIDTH

    def setup(self):
        self.up, self.down = nn.Dense(self.width), nn.Dense(WIDTH)
        self.dropout = nn.Dropout(0.5, deterministic=False)

    def encode(self, x):
        return nn.gelu(self.up(x))

    def __call__(self, x):
        return self.down(self.dropout(self.encode(x)))


class Compact(nn.Module):
    options: dict | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(MLP(name="mlp")(x))
        self.sow("intermediates", "h", x)
        return nn.Dense(3)(x)


def linen(model):
    x = rand.normal(jax.random.key(1), (4, WIDTH))
    rest = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
    params = rest.pop("params")
    config = lora.LoRAConfig(rank=2, targets=[lambda path, leaf: path.endswith("kernel")])
    adapters = noisy(lora.init(jax.random.key(0), params, config))
    bound, merged = lora.bind(params, adapters), lora.merge(params, adapters)
    return {"params": bound, **rest}, {"params": merged, **rest}, x


MODELS = [pytest.param(MLP(), marks=pytest.mark.slow), Compact(), Compact({"a": [1]})]


@pytest.mark.parametrize("model", MODELS, ids=["setup", "compact", "dict"])
def test_linen(model):
    bound, merged, x = linen(model)
    adapted = lora.attach(model)
    how = dict(
        rngs={"dropout": jax.random.key(5)},
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda m, name: isinstance(m, nn.BatchNorm),
    )
    want = model.apply(merged, x, **how)
    assert_close(adapted.apply(bound, x, **how), want)
    assert_close(jax.jit(lambda v: adapted.apply(v, x, **how))(bound), want)
    assert_close(adapted.apply(merged, x, **how), want, factor=0)
    del how["capture_intermediates"]
    ours, theirs = adapted.bind(bound, **how), model.bind(merged, **how)
    assert_close(ours(x), theirs(x))
    stats = lambda m: {k: v for k, v in m.variables.items() if k == "batch_stats"}
    assert_close(stats(ours), stats(theirs))
    y = ours(x)
    assert not np.array_equal(y, ours(x))  # other masks
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    assert_close(adapted.init_with_output(rngs, x), model.init_with_output(rngs, x), factor=0)


def test_linen_methods():
    model = MLP()
    bound, merged, x = linen(model)
    adapted, want = lora.attach(model), model.apply(merged, x, method="encode")
    for method in ("encode", MLP.encode, adapted.encode, model.encode, lambda m, x: m.encode(x)):
        assert_close(adapted.apply(bound, x, method=method), want)
    assert_close(adapted.bind(bound).encode(x), want)
    assert_close(nn.apply(lambda m, x: m.encode(x), adapted)(bound, x), want)
    only_up = type("Up", (MLP,), {"__call__": MLP.encode})()
    with fails(
        r"(?s)in `apply`, 1 of 2.*'down/kernel' \(8, 8\) is never used"
        r".*`lora.attach\(module, strict=False\)`"
    ):
        lora.attach(only_up).apply(bound, x)
    assert_close(lora.attach(only_up, strict=False).apply(bound, x), want)


class Nested(nn.Module):
    """Children from fields, of lists and of compact methods."""

    inner: nn.Module

    def setup(self):
        self.mlp, self.layers = MLP(), [nn.Dense(WIDTH), nn.Dropout(0.5, deterministic=False)]
        self.parts = {"norm": Compact()}

    def __call__(self, x):
        x = self.inner(self.mlp(x))
        for layer in self.layers:
            x = layer(x)
        return self.parts["norm"](x)

    def noise(self, x):
        return self.mlp.encode(x) + jax.random.normal(self.make_rng("dropout"), x.shape)


def test_children_of_a_bound_module_and_its_random_numbers():
    """Any of them in any order, as those of the plain module: outputs, masks, statistics."""
    model = Nested(nn.Sequential([nn.Dense(WIDTH), nn.Dropout(0.5, deterministic=False)]))
    bound, merged, x = linen(model)
    how = dict(rngs={"dropout": jax.random.key(5)}, mutable=["batch_stats", "intermediates"])
    ours, theirs = lora.attach(model).bind(bound, **how), model.bind(merged, **how)
    calls = [
        lambda m: m.layers[1](x),  # before the whole has set them up
        lambda m: m(x),
        lambda m: m.mlp(x),
        lambda m: m.mlp.dropout(x),
        lambda m: m.inner(x),
        lambda m: m.inner.layers[0](x),
        lambda m: m.noise(x),
        lambda m: m.layers[0](x),
        lambda m: m.parts["norm"](x),
        lambda m: m(x),
    ]
    for call in calls:
        assert_close(call(ours), call(theirs))
        changed = ({k: v for k, v in m.variables.items() if k != "params"} for m in (ours, theirs))
        assert_close(*changed)
    with fails("'mlp/up/kernel' was used as an array"):
        model.bind(bound).mlp(x)


def test_interceptors():
    """Those around a call change it, and no call after it."""
    model = nn.Sequential([nn.Dense(WIDTH), nn.Dense(3)])
    bound, merged, x = linen(model)

    def doubled(method, args, kwargs, context):
        y = method(*args, **kwargs)
        return 2 * y if isinstance(context.module, nn.Dense) else y

    adapted, attached = lora.adapt(model.apply), lora.attach(model)
    ways = [
        lambda v: adapted(v, x),
        lambda v: attached.apply(v, x),
        lambda v: attached.bind(v)(x),
    ]
    for call in ways:
        for _ in range(2):
            assert_close(call(bound), model.apply(merged, x))
            with nn.intercept_methods(doubled):
                assert_close(call(bound), model.apply(merged, x))


class Odd(nn.Module):
    """Returns what is no array, and writes words."""

    options: dict | None = None

    @nn.compact
    def __call__(self, x, name="odd"):
        return {"y": nn.Dense(3, name="up")(x), "name": name, "none": None, "width": 3}

    def words(self, x):
        yield from (self(x, n) for n in ("a", "b"))


@pytest.mark.parametrize("options", [None, {"a": [1]}])
def test_what_a_linen_module_returns_need_be_no_array(options):
    model, x = Odd(options), jnp.ones((2, WIDTH))
    params = model.init(jax.random.key(0), x)["params"]
    adapters = noisy(lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets="up")))
    adapted, bound = lora.attach(model), {"params": lora.bind(params, adapters)}
    plain = model.bind({"params": lora.merge(params, adapters)})
    found = [adapted.apply(bound, x), *adapted.bind(bound).words(x)]
    for y, want in zip(found, [plain(x), *plain.words(x)], strict=True):
        assert_close(y.pop("y"), want.pop("y"))
        assert y == want


def test_a_linen_module_is_the_same_by_its_fields():
    model = MLP()
    bound, _, x = linen(model)
    adapted, traces = lora.attach(model), []

    def call(model, variables):
        traces.append(1)
        return model.apply(variables, x, method="encode")

    jitted = jax.jit(call, static_argnums=0)
    copies = [lora.attach(MLP()), adapted.copy(), adapted.clone(), copy.deepcopy(adapted)]
    for other in [adapted, *copies, pickle.loads(pickle.dumps(adapted))]:
        assert isinstance(other, MLP) and other == adapted and hash(other) == hash(adapted)
        jitted(other, bound)
    assert len(traces) == 1
    assert adapted != model and adapted.copy(width=3).width == 3
    back = lora.detach(adapted)
    assert type(back) is MLP and back == model
    grads = jax.grad(lambda v: jnp.sum(adapted.apply(v, x, method="encode")), allow_int=True)(bound)
    assert jnp.any(grads["params"]["up"]["kernel"].b.value)


def test_errors_of_linen():
    model = MLP()
    _, merged, _ = linen(model)
    with fails(r"no parameters, and so no adapters: lora.attach\(module\).apply\("):
        lora.attach(model, merged)
    with fails(r"dropout_key=key"):
        lora.attach(model, rngs=nnx.Rngs(0))
    with fails(r"bound to variables already(?s:.*)lora.attach\(module\).bind"):
        lora.attach(model.bind(merged))
    with fails("attached already"):
        lora.attach(lora.attach(model))
    with fails(r"the module MLP: lora.adapt\(model.apply\)"):
        lora.adapt(model)
    with fails(r"found dict: lora.adapt\(lambda params, x"):
        lora.adapt(merged)


def test_train_state(tmp_path):
    """The adapters are the state's parameters, and the base is an argument of the step."""
    model, ids = nn.Sequential([nn.Dense(WIDTH), nn.gelu, nn.Dense(3)]), jnp.ones((2, WIDTH))
    base = model.init(jax.random.key(0), ids)["params"]
    config = lora.LoRAConfig(rank=2, targets="kernel")
    adapters = lora.init(jax.random.key(0), base, config)
    apply = lora.attach(model).apply
    new = lambda params: TrainState.create(
        apply_fn=apply, params=params, tx=optax.sgd(1e-2, momentum=0.9)
    )

    @jax.jit
    def step(state, base, x):
        def loss_of(adapters):
            y = state.apply_fn({"params": lora.bind(base, adapters)}, x)
            return jnp.mean(jnp.square(y - 1))

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=grads), loss

    state, losses = new(adapters), []
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for i in range(4):
            if i == 2:
                parts = dict(config=config, state=(state.step, state.opt_state))
                lora.checkpoint.save(manager, i, state.params, base=base, **parts)
            state, loss = step(state, base, ids)
            losses.append(loss)
    assert losses[3] < losses[0]
    fresh = new(adapters)
    found = lora.checkpoint.restore(
        tmp_path / "run", adapters, base=base, config=config, state=(fresh.step, fresh.opt_state)
    )
    count, opt_state = found.state
    again = fresh.replace(params=found.adapters, step=count, opt_state=opt_state)
    for want in losses[2:]:
        again, loss = step(again, base, ids)
        assert_close(loss, want, factor=0)
    assert_close((again.params, again.step), (state.params, state.step), factor=0)
