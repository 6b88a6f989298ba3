"""Every way of spreading a step over devices, against one device: `python benchmarks/parallel.py`.

Five steps on eight simulated CPU devices, each mode from the same adapters and batches. The table
gives the largest difference of a loss and of an adapter from those of one device, relative to the
largest of each leaf, and the largest reduction in the compiled step, beside full fine-tuning's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import flax
import jax
import jax.numpy as jnp
import llama
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax.parallel._hlo import collectives

STEPS = 5
KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss of (params, batch), what is trained, and how the base is sharded over axes d and t.

    `make_loss` makes the loss from the PartitionSpec of its activations, or None.
    """

    make_loss: Callable
    params: dict
    config: lora.LoRAConfig
    batches: list
    specs: Callable[[str], P]

    @property
    def loss(self) -> Callable:
        return self.make_loss(None)

    def quantized(self, **how) -> Case:
        """The same, with the base's linear leaves in codes."""
        survey = lora.survey(self.loss, self.params, self.batches[0])
        params = lora.quant.quantize(self.params, list(self.config.targets), survey=survey, **how)
        return dataclasses.replace(self, params=params)

    @functools.cached_property
    def adapters(self):
        """Adapters with no zero in them: B as well has a gradient that is not rounding alone."""
        survey = lora.survey(self.loss, self.params, self.batches[0])
        adapters = lora.init(KEY, self.params, self.config, survey)
        leaves, treedef = jax.tree.flatten(adapters)
        keys = jax.random.split(KEY, len(leaves))
        noise = [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
        return treedef.unflatten([x + n for x, n in zip(leaves, noise)])

    def weight_specs(self, **axes: str | None):
        """PartitionSpecs, the axes d (data and FSDP) and t (tensor) as named, or replicated."""
        rename = lambda e: None if e is None else axes.get(e)
        return jax.tree_util.tree_map_with_path(
            lambda path, _: P(*map(rename, self.specs(jax.tree_util.keystr(path)))),
            self.params,
            is_leaf=quantized,
        )

    def base_specs(self, mesh, **axes: str | None):
        """The same, of the arrays: of a quantised weight those of its codes and constants."""
        specs = lambda x, spec: x.specs(spec, mesh) if quantized(x) else spec
        return jax.tree.map(specs, self.params, self.weight_specs(**axes), is_leaf=quantized)


def quantized(x) -> bool:
    return isinstance(x, lora.quant.Quantized)


TX = optax.adam(1e-2, eps=1e-4)


def stepper(loss, reduce=lambda x: x, average=lambda x: x):
    """(trained, state, params, batch) -> the same after a step, and the loss."""

    def step(trained, state, params, batch):
        f = lambda trained: reduce(loss(trained, params, batch))
        value, grads = jax.value_and_grad(f)(trained)
        updates, state = TX.update(average(grads), state, trained)
        return optax.apply_updates(trained, updates), state, average(value)

    return step


def trained_of(case: Case, full: bool, loss: Callable | None = None):
    """(a loss of (trained, params, batch), what it trains): the adapters, or all parameters."""
    loss = case.loss if loss is None else loss
    if full:
        return lambda trained, params, batch: loss(trained, batch), case.params
    adapted = lora.adapt(loss)
    return lambda adapters, params, batch: adapted(
        lora.bind(params, adapters), batch
    ), case.adapters


def mesh_of(shape, names, kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def run(step, trained, state, params, batches):
    """(losses, trained) after the steps."""
    losses = []
    for batch in batches:
        trained, state, value = step(trained, state, params, batch)
        losses.append(value)
    return np.asarray(jax.device_get(losses)), jax.device_get(trained)


def one_device(case, full=False):
    loss, trained = trained_of(case, full)
    step = jax.jit(stepper(loss))
    return *run(step, trained, TX.init(trained), case.params, case.batches), None


def named(case, shape, names, batch, full=False, kind=AxisType.Auto, **axes):
    """jit with NamedShardings, donation, and shardings pinned."""
    mesh = mesh_of(shape, names, kind)
    loss, trained = trained_of(case, full, case.make_loss(batch))
    on = lambda specs: jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
    with jax.set_mesh(mesh):
        params = jax.device_put(case.params, on(case.base_specs(mesh, **axes)))
        if "d" in axes and any(map(quantized, jax.tree.leaves(params, is_leaf=quantized))):
            params = lora.quant.gathered(params, "d")  # in its codes
        where = (
            on(case.base_specs(mesh, **axes)) if full else lora.parallel.shardings(params, trained)
        )
        state = TX.init(trained)
        states = lora.parallel.state_shardings(state, trained, where)
        trained, state = jax.device_put((trained, state), (where, states))
        trained, state = jax.tree.map(jnp.copy, (trained, state))  # the step donates them
        batches = [jax.device_put(b, NamedSharding(mesh, batch)) for b in case.batches]
        step = jax.jit(
            stepper(loss),
            donate_argnums=(0, 1),
            out_shardings=(where, states, NamedSharding(mesh, P())),
        )
        compiled = step.lower(trained, state, params, batches[0]).compile()
        return *run(compiled, trained, state, params, batches), compiled


def mapped(case, full=False, gather=False):
    """jax.shard_map with its check of what varies: the gradient is that of the mean of the losses.

    (The mean of the gradients would be N times too large: JAX has summed them already, as
    replicated adapters enter what varies.) With `gather`, the base and its adapters are spread over
    the devices, and each weight is gathered where it is used.
    """
    mesh = mesh_of((8,), ("d",))
    loss, trained = trained_of(case, full)
    weights = case.weight_specs(d="d" if gather else None)
    specs = case.base_specs(mesh, d="d" if gather else None)
    own = specs if full else lora.parallel.shardings(weights, trained)
    if gather:
        gathered = lambda p: jax.tree.map(functools.partial(_whole, axis="d"), p, weights)
        loss, _ = trained_of(case, full, lambda p, batch: case.loss(gathered(p), batch))
    states = lora.parallel.state_shardings(TX.init(trained), trained, own)
    step = jax.shard_map(
        stepper(loss, reduce=lambda x: jax.lax.pmean(x, "d")),
        mesh=mesh,
        in_specs=(own, states, specs, P("d")),
        out_specs=(own, states, P()),
    )
    step = jax.jit(step, donate_argnums=(0, 1))
    on = lambda tree, specs: jax.tree.map(
        lambda x, s: jax.device_put(jnp.copy(x), NamedSharding(mesh, s)), tree, specs
    )
    args = on(trained, own), on(TX.init(trained), states), on(case.params, specs)
    compiled = step.lower(*args, case.batches[0]).compile()
    return *run(step, *args, case.batches), compiled


def _whole(x, spec, axis):
    """A weight from its parts."""
    if axis not in spec:
        return x
    return jax.lax.all_gather(x, axis, axis=spec.index(axis), tiled=True)


def pmapped(case, full=False, base_axis=0):
    """jax.pmap, with the base replicated as flax does, or passed on by `in_axes=None`."""
    loss, trained = trained_of(case, full)
    mean = lambda x: jax.lax.pmean(x, "d")
    step = jax.pmap(
        stepper(loss, average=mean),
        axis_name="d",
        in_axes=(0, 0, base_axis, 0),
        donate_argnums=(0, 1),
    )
    # As flax.jax_utils.replicate, which in Flax 0.12.2 asks JAX for a function that is gone.
    replicate = functools.partial(jax.tree.map, lambda x: jnp.stack([x] * jax.device_count()))
    params = replicate(case.params) if base_axis == 0 else case.params
    args = replicate(trained), replicate(TX.init(trained)), params
    split = [jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), b) for b in case.batches]
    compiled = step.lower(*args, split[0]).compile()
    losses, trained = run(step, *args, split)
    return losses[:, 0], flax.jax_utils.unreplicate(trained), compiled


def transformer(width=48, hidden=80) -> Case:
    """Scanned and rematerialised, all linears. No axis of an activation is one of a weight's."""
    c = llama.Config(100, width, hidden, heads=4, layers=2, scan=True)
    batches = list(jax.random.randint(KEY, (STEPS, 8, 21), 0, c.vocab))

    def specs(path):
        kind = next((k for k in ("embed", "head", "o'", "down") if k in path), None)
        if "norm" in path or kind in ("embed", "head"):
            return P()
        return P(None, "t", "d") if kind else P(None, "d", "t")

    def make_loss(activations):
        model = llama.Llama(dataclasses.replace(c, activations=activations))
        return lambda p, ids: llama.loss(model.apply({"params": p}, ids), ids)

    return Case(
        make_loss,
        jax.jit(llama.Llama(c).init)(KEY, batches[0])["params"],
        lora.LoRAConfig(rank=7, alpha=14, targets=llama.ALL),
        batches,
        specs,
    )


def experts(width=48, hidden=80) -> Case:
    """A soft mixture of eight experts, of which each device holds its own."""
    keys = jax.random.split(KEY, 4)
    shapes = {"gate": (width, 8), "up": (8, width, hidden), "down": (8, hidden, width)}
    params = {n: jax.random.normal(k, s) / 7 for k, (n, s) in zip(keys, shapes.items())}

    def make_loss(spec):
        return functools.partial(loss, spec=spec)

    def loss(p, x, spec):
        gates = jax.nn.softmax(x @ p["gate"])
        y = jax.nn.gelu(jnp.einsum("btd,edf->btef", x, p["up"]))
        y = jnp.einsum("btef,efd,bte->btd", y, p["down"], gates)
        y = y if spec is None else jax.lax.with_sharding_constraint(y, spec)
        return jnp.mean((y - jnp.sin(x)) ** 2)

    config = lora.LoRAConfig(rank=7, alpha=14, targets=["up", "down"])
    batches = list(jax.random.normal(keys[3], (STEPS, 8, 21, width)))
    return Case(
        make_loss, params, config, batches, lambda path: P() if "gate" in path else P("t", "d")
    )


def explicit(width=48, hidden=80) -> Case:
    """Shardings in types: a function that says how each product is sharded, if that is unclear."""
    keys = jax.random.split(KEY, 3)
    shapes = {"up": (width, hidden), "down": (hidden, width)}
    params = {n: jax.random.normal(k, s) / 7 for k, (n, s) in zip(keys, shapes.items())}

    def loss(p, x):
        spread = jax.typeof(x).sharding.spec[0]
        out = {"out_sharding": P(spread, None, None)} if spread else {}
        up, down = _gathered(p["up"], 0), _gathered(p["down"], 1)
        hidden = jax.nn.gelu(jnp.einsum("btd,df->btf", x, up))
        y = jnp.einsum("btf,fd->btd", hidden, down, **out)
        return jnp.mean((y - jnp.sin(x)) ** 2)

    specs = lambda path: P("d", "t") if "up" in path else P("t", "d")
    config = lora.LoRAConfig(rank=7, alpha=14, targets=["up", "down"])
    batches = list(jax.random.normal(keys[2], (STEPS, 8, 21, width)))
    return Case(lambda _: loss, params, config, batches, specs)


def _gathered(w, axis):
    """A weight that is not sharded along `axis`, as FSDP wants it where it is used."""
    spec = list(jax.typeof(w).sharding.spec)
    if spec[axis] is None:
        return w
    spec[axis] = None
    return jax.sharding.reshard(w, P(*spec))


CASES = {f.__name__: functools.cache(f) for f in (transformer, experts, explicit)}
# Widths of which eight devices get whole blocks of 64, where a mode cuts these.
IN_CODES = {"transformer": (256, 512), "experts": (128, 256), "explicit": (512, 256)}
DOUBLE = {"nf4": True, "int8": False}


@functools.cache
def in_codes(name: str, format: str) -> Case:
    """A case on a quantised base."""
    case = CASES[name].__wrapped__(*IN_CODES[name])
    return case.quantized(format=format, double=DOUBLE[format])


def spread(case: str, shape, names: str, batch, **kwargs):
    """A mode of `named`: a mesh of axes d (data, FSDP), t (tensor, experts) and s (slices)."""
    return case, functools.partial(named, shape=shape, names=tuple(names), batch=batch, **kwargs)


D, T = dict(d="d"), dict(t="t")  # what the base is sharded over
MODES: dict[str, tuple[str, Callable]] = {
    "jit, data parallel": spread("transformer", (8,), "d", P("d")),
    "jit, FSDP": spread("transformer", (8,), "d", P("d"), **D),
    "jit, TP": spread("transformer", (2, 4), "dt", P("d"), **T),
    "jit, FSDP × TP": spread("transformer", (2, 4), "dt", P("d"), **D, **T),
    "jit, two slices": spread("transformer", (2, 2, 2), "sdt", P(("s", "d")), **D, **T),
    "jit, experts": spread("experts", (8,), "t", P(), **T),
    "jit, experts × FSDP": spread("experts", (2, 4), "dt", P("d"), **D, **T),
    "jit, explicit": spread("explicit", (2, 4), "dt", P("d"), kind=AxisType.Explicit, **T),
    "jit, explicit FSDP": spread("explicit", (8,), "d", P("d"), kind=AxisType.Explicit, **D),
    "shard_map": ("transformer", mapped),
    "shard_map, gathering": ("transformer", functools.partial(mapped, gather=True)),
    "pmap": ("transformer", pmapped),
    "pmap, in_axes=None": ("transformer", functools.partial(pmapped, base_axis=None)),
}


def sent(compiled, *kinds: str, types: str = "") -> list[tuple[int, ...]]:
    """The shapes that collectives of a compiled program work on, without 1s; of types that begin
    so, as in "u8 s8"."""
    begins = tuple(types.split()) or ""
    found = [c.array for c in collectives(compiled.as_text()) if c.kind in kinds]
    arrays = [array for array in found if array.startswith(begins)]
    dims = [re.findall(r"\d+", array.partition("[")[2]) for array in arrays]
    return [tuple(int(d) for d in of if d != "1") for of in dims]


def reductions(compiled) -> list[tuple[int, ...]]:
    """Those of all-reduces and reduce-scatters."""
    return sent(compiled, "all-reduce", "reduce-scatter")


def weight_sized(case: Case, shapes, packed: int = 1) -> list[tuple[int, ...]]:
    """Those that are an adapted weight, a layer or an expert of it, or a part of one, with so many
    numbers of its last axis in one."""
    survey = lora.survey(case.loss, case.params, case.batches[0])
    weights = [t.shape for t in lora.select(case.params, case.config, survey).lora.values()]
    weights = [(*w[:-1], w[-1] // packed) for w in weights]
    wholes = {w[i:] for w in weights for i in (0, 1) if len(w) - i >= 2}

    def part(shape, weight):
        fits = [w % s == 0 and w // s in (1, 2, 4, 8) for s, w in zip(shape, weight)]
        return len(shape) == len(weight) and all(fits)

    return [s for s in shapes if any(part(s, w) or part(s[::-1], w) for w in wholes)]


def difference(got, want) -> float:
    """The largest difference, relative to the largest element of each leaf."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want))
    return max(float(np.max(np.abs(g - w)) / np.max(np.abs(w))) for g, w in pairs)


@functools.cache
def reference(name: str, format: str | None = None):
    return one_device(CASES[name]() if format is None else in_codes(name, format))


def main() -> None:
    print(
        f"jax {jax.__version__}, {jax.device_count()} simulated CPU devices, {STEPS} steps, fp32\n"
    )
    line = "{:22} {:>8} {:>8}  {:18} {:>12} {:>18}"
    print(
        line.format(
            "mode", "losses", "adapters", "largest reduction", "weight-sized", "full fine-tuning"
        )
    )
    for name, (case_name, mode) in MODES.items():
        case = CASES[case_name]()
        found, differ, _ = compared(mode, case, reference(case_name))
        full = weight_sized(case, reductions(mode(case, full=True)[2]))
        largest = " × ".join(map(str, max(found, key=math.prod)))
        print(line.format(name, *differ, largest, len(weight_sized(case, found)), len(full)))
    for format in DOUBLE:
        main_in_codes(format)


def compared(mode, case, want):
    """(reductions, differences of losses and of adapters, the compiled step)."""
    losses, adapters, compiled = mode(case)
    pairs = (losses, want[0]), (adapters, want[1])
    return reductions(compiled), [f"{difference(*pair):.0e}" for pair in pairs], compiled


def main_in_codes(format: str) -> None:
    """On a quantised base, against one device on the same."""
    print(f"\n{format}, the weights gathered in codes and in floats")
    line = "{:22} {:>8} {:>8}  {:>8} {:>8}"
    print(line.format("mode", "losses", "adapters", "codes", "floats"))
    for name, (case_name, mode) in MODES.items():
        case = in_codes(case_name, format)
        try:
            _, differ, compiled = compared(mode, case, reference(case_name, format))
        except lora.LoRAError as e:
            print(f"{name:22} {e}")
            continue
        codes, floats = (sent(compiled, "all-gather", types=t) for t in ("u8 s8", "f32"))
        print(
            line.format(
                name, *differ, len(weight_sized(case, codes, 2)), len(weight_sized(case, floats))
            )
        )


if __name__ == "__main__":
    main()
