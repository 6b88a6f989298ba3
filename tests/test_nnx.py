"""NNX modules: what a call changes is changed in the user's own model, as with LoRA by hand."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rand
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from support.common import assert_close, fails

import lora_jax as lora

pytestmark = pytest.mark.filterwarnings("ignore:.*nnx.capture:DeprecationWarning")
WIDTH, RANK, RATE = 8, 2, 0.002
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
        if getattr(parent, "upper", None) is hand.linear:
            parent.upper = hand
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
        self.calls = min(self.calls + 1, 2)  # each other number is traced anew
        return super().__call__(self.late(x))


class Shared(nnx.Module):
    """One block under two names, and one of its layers under two more."""

    def __init__(self, rngs):
        self.first = self.second = Block(rngs, dropout=0.3, norm=True)
        self.first.upper = self.first.up

    def __call__(self, x):
        return self.second.upper(self.second(self.first(x)))


class Decoder(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(2, WIDTH, decode=True, rngs=rngs)
        self.attn.init_cache((8, 10, WIDTH))

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
    x = rand.normal(jax.random.key(1), (8, 4, WIDTH), dtype)
    targets = [lambda path, leaf: path.endswith(tuple(f"{n}/kernel" for n in LAYERS))]
    config = lora.LoRAConfig(rank=RANK, targets=targets)
    adapters = lora.init(jax.random.key(2), model, config, lora.survey(forward, model, x))
    noise = lambda x: x + 0.1 * rand.normal(jax.random.key(3), x.shape, x.dtype)
    return model, jax.tree.map(noise, adapters), x


def changed_by_calls(model):
    """What is not a parameter: counters, statistics, caches; and the constants."""
    state = nnx.state(model, nnx.Not(nnx.Param))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(k): jax.random.key_data(x) if is_key(x) else x for k, x in leaves}


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def cases():
    """Each feature under nnx.jit, and at once: there every step is compiled anew."""
    for name in FEATURES:
        yield pytest.param(name, nnx.jit, 10, id=f"{name}-jit")
        fast = name in ("dropout", "batchnorm", "sow", "creates", "shared")
        marks = () if fast else pytest.mark.slow
        yield pytest.param(name, lambda f: f, 2, id=f"{name}-eager", marks=marks)


@pytest.mark.parametrize(("name", "wrap", "steps"), list(cases()))
def test_training_equals_lora_by_hand(name, wrap, steps):
    model, adapters, x = made(name)
    hand, layers = by_hand(model, adapters)
    call = lora.adapt(forward)
    loss_of = lambda y: jnp.mean(jnp.square(y - 1))

    @wrap
    def ours(adapters, model, x):
        loss = lambda adapters, model: loss_of(call(lora.bind(model, adapters), x))
        loss, grads = nnx.value_and_grad(loss)(adapters, model)
        return loss, jax.tree.map(lambda p, g: p - RATE * g, adapters, grads)

    @wrap
    def theirs(model, x):
        diff = nnx.DiffState(0, nnx.LoRAParam)
        loss, grads = nnx.value_and_grad(lambda m: loss_of(m(x)), argnums=diff)(model)
        params = nnx.state(model, nnx.LoRAParam)
        nnx.update(model, jax.tree.map(lambda p, g: p - RATE * g, params, grads))
        return loss

    before = changed_by_calls(model)
    for step in range(steps):
        rounding = 64 * (step + 1)  # of each step
        batch = rand.normal(jax.random.key(step), x.shape, x.dtype)
        loss, adapters = ours(adapters, model, batch)
        assert_close(loss, theirs(hand, batch), factor=rounding)
        mine, expected = changed_by_calls(model), changed_by_calls(hand)
        assert_close(mine, expected, factor=rounding)
        assert any(k not in before or not np.array_equal(mine[k], before[k]) for k in mine)
        if name == "sow":
            assert len(mine) == 2
            nnx.pop(model, nnx.Intermediate), nnx.pop(hand, nnx.Intermediate)
        before = changed_by_calls(model)
    for path, layer in layers.items():
        node = adapters
        for key in [*path.split("/"), "kernel"]:
            node = node[key]
        assert_close((node.a, node.b), (layer.a[...], layer.b[...]), factor=rounding)


# ---------------------------------------------------------------- what is shared, and what is not
def variables(model):
    return {p: x for p, x in nnx.iter_graph(model) if isinstance(x, nnx.Variable)}


def test_variables_are_shared_but_for_those_with_adapters():
    model, adapters, _ = made("shared")
    before = variables(model)
    values = {p: v.get_raw_value() for p, v in before.items()}
    bound = lora.bind(model, adapters)
    mine = variables(bound)
    assert mine.keys() == before.keys()
    own = {p for p in mine if mine[p] is not before[p]}
    assert own == {("first", name, "kernel") for name in ("up", "down")}
    assert bound.first is bound.second and bound.first.upper is bound.first.up
    assert all(v.get_raw_value() is values[p] for p, v in variables(model).items())
    ids = lambda model: {id(v) for v in variables(model).values()}
    assert not ids(lora.merge(model, adapters)) & ids(model)


def test_full_leaves_are_trained_and_nothing_else_has_a_gradient():
    model, _, x = made("sow")
    model.norm = nnx.data(nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0)))
    config = lora.LoRAConfig(rank=2, targets="up", full=["down/kernel", "norm/scale"])
    adapters = lora.init(jax.random.key(0), model, config)
    loss = lambda model, adapters: jnp.sum(lora.adapt(forward)(lora.bind(model, adapters), x) ** 2)
    assert not any(map(jnp.any, jax.tree.leaves(nnx.grad(loss)(model, adapters))))
    grads = nnx.grad(loss, argnums=1)(model, adapters)
    assert jnp.any(grads["down"]["kernel"].value) and jnp.any(grads["norm"]["scale"].value)
    assert len(nnx.pop(model, nnx.Intermediate)) == 2  # sown into the model, of both calls


def test_full_leaves_alone():
    model, _, x = made("creates")
    adapters = {"down": {"kernel": lora.Full(model.down.kernel[...] + 1)}}
    plain = lora.merge(model, adapters)
    assert_close(lora.adapt(forward)(lora.bind(model, adapters), x), plain(x))
    assert model.calls == 1
    assert_close(changed_by_calls(model), changed_by_calls(plain))


# ---------------------------------------------------------------- arguments beside the model
def test_random_numbers_and_modules_that_are_arguments():
    """`Rngs` in the call, and a module that shares a variable with the bound one."""
    model, adapters, x = made("dropout")
    other = nnx.List([model.dropout, nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0))])
    fn = lambda m, x, rngs, other: other[1](m(other[0](x), rngs=rngs))
    plain = lora.merge(model, adapters)
    other_plain = nnx.List([plain.dropout, nnx.clone(other[1])])
    rngs, rngs_plain = nnx.Rngs(5), nnx.Rngs(5)
    outs = []
    for _ in range(3):
        outs.append(lora.adapt(fn)(lora.bind(model, adapters), x, rngs=rngs, other=other))
        assert_close(outs[-1], fn(plain, x, rngs_plain, other_plain))
    assert_close(*map(changed_by_calls, (other, other_plain)))
    assert model.dropout.rngs.count[...] == rngs.default.count[...] == 3
    assert not np.array_equal(outs[0], outs[1])


def test_functional_form():
    """States that are arguments change as nnx.merge's do, and what is returned is a value."""
    model, adapters, x = made("dropout")
    plain = lora.merge(model, adapters)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params, rest, x):
        model = nnx.merge(graph, params, rest)
        return model(x), nnx.state(model, nnx.Not(nnx.Param))

    step = jax.jit(lambda ad, rest: lora.adapt(fn)(lora.bind(params, ad), rest, x))
    for count in range(3):
        y, rest = step(adapters, rest)
        assert_close(y, plain(x))
        assert rest["dropout"]["rngs"]["count"][...] == count + 1
    assert model.dropout.rngs.count[...] == 0
    y, _ = lora.adapt(fn)(lora.bind(params, adapters), rest, x)  # at once: in place, as by hand
    assert_close(y, plain(x))
    assert rest["dropout"]["rngs"]["count"][...] == 4
    with fails(
        r"Cannot mutate RngCount.*does not take as an argument. Pass it: lora.adapt\(lambda"
    ):
        lora.adapt(lambda p, x: nnx.merge(graph, p, rest)(x))(lora.bind(params, adapters), x)


def test_state_under_transforms_of_jax():
    """By hand the change is an error of NNX's; here it says what to write."""
    model, adapters, x = made("dropout")
    hand, _ = by_hand(model, adapters)
    graph, trained, rest = nnx.split(hand, nnx.LoRAParam, ...)
    with pytest.raises(flax.errors.TraceContextError, match="Cannot mutate RngCount"):
        jax.grad(lambda p: jnp.sum(nnx.merge(graph, p, rest)(x)))(trained)
    call = lora.adapt(forward)
    with fails(r"Cannot mutate RngCount.*nnx.value_and_grad\(lambda adapters, model, x: loss\("):
        jax.grad(lambda ad: jnp.sum(call(lora.bind(model, ad), x)))(adapters)
    assert model.dropout.rngs.count[...] == 0
    model.dropout.deterministic = True
    jax.grad(lambda ad: jnp.sum(call(lora.bind(model, ad), x)))(adapters)  # nothing changes


@pytest.mark.parametrize("name", ["sow", "creates", "dropout"])
def test_looking_changes_nothing(name):
    model, adapters, x = made(name)
    graph, before = nnx.graphdef(model), changed_by_calls(model)
    lora.survey(forward, model, x)
    found = lora.coverage(forward, bound := lora.bind(model, adapters), x)
    assert found.low_rank == ("down/kernel", "up/kernel")
    assert_close(changed_by_calls(model), before)
    assert nnx.graphdef(model) == graph == nnx.graphdef(lora.merge(model, adapters))
    assert changed_by_calls(bound).keys() == before.keys()


def test_the_error_of_a_module_that_is_called_alone():
    model, adapters, x = made("dropout")
    with fails(
        r"'up/kernel' was used as an array.*`call = lora.adapt\(lambda model, x: model\(x\)\)`"
    ):
        lora.bind(model, adapters)(x)
    with fails(r"'q' matches no leaf(?s:.*)lora.survey\(lambda model, x: model\(x\), model, x\)"):
        lora.init(jax.random.key(0), model, lora.LoRAConfig(rank=2, targets="q"))


# ---------------------------------------------------------------- whatever a call does
def _variable(m, x):
    m.total[...] += jnp.sum(x)


def _create(m, x):
    m.made = nnx.Variable(jnp.mean(x))


def _submodule(m, x):
    m.sub = Block(nnx.Rngs(3), norm=True)
    m.sub.norm.mean[...] += jnp.mean(x)


def _alias(m, x):
    m.alias = m.total


def _module(m, x):
    m.upper, m.mode = m.up, "warm"  # one layer under two names


def _nest(m, x):
    m.vessel = nnx.List([m.up, m.total, m.down])


def _remove(m, x):
    for name in ("made", "alias", "sub", "array", "upper", "vessel"):
        if hasattr(m, name):
            delattr(m, name)


def _replace(m, x):
    m.total = nnx.BatchStat(jnp.max(x))


def _constant(m, x):
    m.mode = "cold" if m.mode == "warm" else "warm"


def _array(m, x):
    m.array = x + 1


def _grow(m, x):
    m.log.append(nnx.Variable(jnp.sum(x)))


def _container(m, x):
    m.pair = nnx.data([m.total, {"x": x, "n": 3}])


def _metadata(m, x):
    m.total.set_metadata(note="seen")


DEEDS = [_variable, _create, _submodule, _alias, _module, _nest, _remove, _replace, _constant,
         _array, _grow, _container, _metadata]  # fmt: skip


class Doing(Block):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.total = nnx.BatchStat(jnp.zeros(()))
        self.log, self.mode, self.array = nnx.List([]), "warm", jnp.zeros(3)

    def __call__(self, x, deeds):
        for deed in deeds:
            deed(self, x)
        return super().__call__(x)


def contents(model):
    """{path: what stands there}, each object once; a constant, or a kind and its metadata."""
    kind = lambda x: type(x) if isinstance(x, nnx.Pytree | jax.Array) else x
    kind_of = lambda x: (type(x), x.get_metadata()) if isinstance(x, nnx.Variable) else kind(x)
    own = lambda path: not str(path[-1:]).startswith(("('_pytree__", "([")) and path
    return {p: kind_of(x) for p, x in nnx.iter_graph(model) if own(p)}


@settings(deadline=None, max_examples=20)
@given(st.lists(st.lists(st.sampled_from(DEEDS), max_size=4), min_size=1, max_size=3))
def test_whatever_a_call_does(calls):
    """Calls one after another leave the model as they leave a plain one: graph and values."""
    model = Doing(nnx.Rngs(0))
    adapters = lora.init(
        jax.random.key(0), model, lora.LoRAConfig(rank=2, targets="up,down".split(","))
    )
    plain = lora.merge(model, adapters)
    x = jnp.arange(2.0 * WIDTH).reshape(2, WIDTH) / WIDTH
    call = lora.adapt(Doing.__call__)
    for deeds in calls:
        bound = lora.bind(model, adapters)
        assert_close(call(bound, x, tuple(deeds)), plain(x, deeds))
        for now in (model, bound):
            assert contents(now) == contents(plain)
        states = (nnx.state(m, nnx.Not(nnx.Param)) for m in (model, plain))
        assert_close(*states)
        shared = nnx.state(bound, nnx.Not(nnx.Param))
        assert [id(v) for v in variables(shared).values()] == [
            id(v) for v in variables(nnx.state(model, nnx.Not(nnx.Param))).values()
        ]


@pytest.mark.parametrize("form", ["state", "module"])
def test_a_weight_that_comes_back_from_remat_stays_adapted(form):
    """`nnx.remat` writes each Variable back, with the weight as it came."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            return nnx.remat(lambda layer, x: jnp.tanh(layer(x)))(self.up, x)

    model = Net(nnx.Rngs(0))
    graph, state = nnx.split(model)
    fn, params = {
        "state": (lambda state, x: nnx.merge(graph, state)(x), state),
        "module": (lambda model, x: model(x), model),
    }[form]
    config = lora.LoRAConfig(rank=RANK, targets="up/kernel")
    x = jnp.ones((2, WIDTH))
    adapters = lora.init(jax.random.key(0), params, config, lora.survey(fn, params, x))
    adapters = jax.tree.map(lambda v: v + 0.1, adapters)
    call, want = lora.adapt(fn), fn(lora.merge(params, adapters), x)

    def twice(adapters):
        bound = lora.bind(params, adapters)
        first = call(bound, x)
        assert lora.coverage(fn, bound, x).low_rank  # still there
        return first, call(bound, x)

    # A module from outside of jit cannot be written to within it, by NNX's rule.
    for run in (twice, jax.jit(twice)) if form == "state" else (twice,):
        for got in run(adapters):
            assert_close(got, want)


def test_arrays_without_a_variable_around_them():
    """In the module and in containers: adapted, read, and changed as by the plain module."""

    class Bare(nnx.Module):
        def __init__(self):
            w = lambda i: rand.normal(jax.random.key(i), (WIDTH, WIDTH)) / 8
            self.w, self.more = nnx.data(w(0)), nnx.data([w(1), {"w": w(2)}])
            self.total = nnx.data(jnp.zeros(WIDTH))
            self.up = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))

        def __call__(self, x):
            self.total = self.total + x.sum(0)
            y = x @ self.w + x @ self.more[0]
            return jnp.tanh(self.up(y)) @ self.more[1]["w"] + self.total

    model, x = Bare(), rand.normal(jax.random.key(3), (2, WIDTH))
    found = lora.survey(forward, model, x)
    assert found["total"].kind == "other" and found["more/1/w"].head
    config = lora.LoRAConfig(rank=RANK, targets=["w", "more/*", "up/kernel"])
    adapters = jax.tree.map(lambda v: v + 0.1, lora.init(jax.random.key(0), model, config, found))
    plain, call = lora.merge(model, adapters), lora.adapt(forward)
    loss = lambda ad, run: jnp.sum(run(ad) ** 2)
    assert_close(
        nnx.grad(lambda ad, m: loss(ad, lambda ad: call(lora.bind(m, ad), x)))(
            adapters, nnx.clone(model)
        ),
        nnx.grad(lambda ad, m: loss(ad, lambda ad: lora.merge(m, ad)(x)))(
            adapters, nnx.clone(model)
        ),
        factor=256,
    )
    bound = lora.bind(model, adapters)
    for _ in range(2):
        assert_close(call(bound, x), plain(x))
        assert_close((model.total, bound.total), (plain.total, plain.total))


class Mapped(nnx.Module):
    """A layer in nnx.shard_map, which gives all Variables back."""

    def __init__(self):
        self.up = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))

    def __call__(self, x):
        mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        specs = jax.P(), jax.P("d")
        layer = lambda layer, x: jnp.tanh(layer(x))
        return nnx.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=specs[1])(self.up, x)


class Normed(nnx.Module):
    """nnx.SpectralNorm writes what it divides into its layer."""

    def __init__(self):
        self.up = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
        self.norm = nnx.SpectralNorm(self.up, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x, update_stats=True)


def with_adapters(model):
    adapters = lora.init(jax.random.key(0), model, lora.LoRAConfig(RANK, targets="kernel"))
    return model, jax.tree.map(lambda v: v + 0.1, adapters), jnp.linspace(-1, 1, 2 * WIDTH)


def test_variables_that_shard_map_gives_back():
    model, adapters, x = with_adapters(Mapped())
    x, call = x.reshape(2, WIDTH), lora.adapt(forward)
    ours = lambda ad, model: jnp.sum(jnp.sin(call(lora.bind(model, ad), x)))
    merged = lambda ad: jnp.sum(jnp.sin(lora.merge(model, ad)(x)))
    got = nnx.jit(nnx.value_and_grad(ours))(adapters, model)
    assert_close(got, jax.jit(jax.value_and_grad(merged))(adapters))


def test_a_weight_that_a_call_writes_is_no_low_rank_use():
    model, adapters, x = with_adapters(Normed())
    with fails("the call writes it into an NNX object, as an array"):
        lora.adapt(forward)(lora.bind(model, adapters), x.reshape(2, WIDTH))


def test_a_perturbation_has_its_gradient():
    class Perturbed(nnx.Module):
        def __init__(self):
            self.up = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
            self.at = nnx.Perturbation(jnp.zeros(WIDTH))

        def __call__(self, x):
            return jnp.sum(jnp.sin(self.up(x) + self.at[...]))

    model, adapters, x = with_adapters(Perturbed())
    x, of = x[:WIDTH], nnx.DiffState(0, nnx.Perturbation)
    want = nnx.grad(forward, argnums=of)(lora.merge(model, adapters), x)
    bound = lambda model, x: lora.adapt(forward)(lora.bind(model, adapters), x)
    attached = lora.attach(model, adapters)
    for got in (nnx.grad(bound, argnums=of)(model, x), nnx.grad(forward, argnums=of)(attached, x)):
        assert_close(got["at"].get_value(), want["at"].get_value())
        assert jnp.all(got["at"].get_value() != 0)


def test_references_are_refused():
    arrays = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    refs = jax.tree.map(jax.new_ref, arrays)
    config = lora.LoRAConfig(rank=2, targets="w", full="b")
    with fails(r"(?s)'b': it is a jax.Ref.*'w': it is a jax.Ref.*nnx.with_vars\(model, ref=False"):
        lora.init(jax.random.key(0), refs, config)
    adapters = lora.init(jax.random.key(0), arrays, config)
    for verb in (lora.bind, lora.merge):
        with fails("'w': it is a jax.Ref"):
            verb(refs, adapters)
