"""One training step of an 8B-shaped Llama on one accelerator: `python benchmarks/gpu.py`.

LoRA of rank 16 on all linears, bf16 base, fp32 adapters, Adam; time, tokens a second, model FLOPs
utilisation, memory and compile time of each arm, on whatever accelerator is there. With `--ahead`
the columns that need no device: memory and bytes, by the real compiler.

    python benchmarks/gpu.py                                    # the five that matter most
    python benchmarks/gpu.py --save products --tokens 4 4096
    python benchmarks/gpu.py --ahead h100:1x1x1 --arms hand beside
    JAX_PLATFORMS=cpu python benchmarks/gpu.py --model tiny     # does it run?

The arms: `floor` has no adapters (forward pass and the gradient of its input); `hand` is LoRA
written into the layer; `factored`, `merged`, `beside` and `auto` are ours, by plan; `nf4` and
`nf4d` (doubly quantised) are ours on such a base, `dora` is ours; `full` trains every weight by
SGD. `nnx` has `nnx.LoRALinear` in the same model, `qwix` an `nnx.Linear` that qwix adapts. `peft`
is transformers' Llama with torch PEFT as HF's trainer runs it, fp32 adapters under autocast;
`peft_liger` all in bf16 with Liger's kernels; the two again on bitsandbytes' NF4. An arm whose
package is not there says so, and the others go on. `--torch` names a Python that has torch.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from typing import Any, NamedTuple

from measure import AHEAD, accessed, table

if "--ahead" in sys.argv:
    os.environ |= AHEAD

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lora

GIB, BF16, SCALE = 2**30, jnp.bfloat16, 2.0


class Shape(NamedTuple):
    layers: int
    width: int
    hidden: int
    heads: int
    kv: int  # heads of keys and values
    vocab: int

    @property
    def head(self) -> int:
        return self.width // self.heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        w, h, k = self.width, self.hidden, self.kv * self.head
        shapes = dict(q=(w, w), k=(w, k), v=(w, k), o=(w, w))
        return shapes | dict(gate=(w, h), up=(w, h), down=(h, w))


MODELS = {
    "8b": (Shape(32, 4096, 14336, 32, 8, 128256), (2, 4096)),
    "1b": (Shape(16, 2048, 8192, 32, 8, 128256), (4, 4096)),
    "tiny": (Shape(2, 64, 128, 4, 2, 256), (2, 32)),
}
PLANS = ("auto", "factored", "merged", "beside")
# {arm: what pip installs for it}
OTHERS = {"nnx": "", "qwix": "qwix==0.1.8"}
TORCH = {"peft": "torch==2.13.0 transformers==5.17.0 peft==0.21.2"}
TORCH |= {"peft_liger": TORCH["peft"] + " liger-kernel==0.8.5"}
TORCH |= {f"{n}_nf4": f"{packages} bitsandbytes==0.50.2" for n, packages in TORCH.items()}
ARMS = ("floor", "hand", *PLANS, "nf4", "nf4d", "dora", "full", *OTHERS, *TORCH)
# Arms of one and the same computation: their losses are to agree.
ALIKE = (("hand", *PLANS, *OTHERS, "peft", "peft_liger"), ("nf4", "peft_nf4", "peft_liger_nf4"))
DEFAULT = ("floor", "hand", "auto", "nf4", "dora")
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": jax.checkpoint_policies.nothing_saveable,
}
# What `lora.adapt` is given: see there.
SAVE = {
    "none": None,
    "products": "products",
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", default=list(DEFAULT), choices=ARMS)
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--unrolled", action="store_true", help="a loop in Python, and no scan")
    parser.add_argument("--tokens", type=int, nargs=2, metavar=("BATCH", "LENGTH"))
    parser.add_argument("--remat", choices=REMAT, default="none")
    parser.add_argument("--save", choices=SAVE, default="none", help="of our arms")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--torch", metavar="PYTHON", default=sys.executable, help="with torch")
    parser.add_argument("--ahead", metavar="TOPOLOGY", help="compile for h100:1x1x1 or v5e:1x1")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each arm as well")
    return parser.parse_args(argv)


# The model: a plain function of a tree, its layers scanned.


NAMES = ("q", "k", "v", "o", "gate", "up", "down")
SEEDS = ("ids", "embed", "head", *NAMES, *(f"{n}_{k}" for n in NAMES for k in "ab"))
SEEDS = {name: i for i, name in enumerate(SEEDS)}


def noise(name: str, *size: int):
    """Numbers in [0, 1) from integers alone, so that torch makes the same on its own device."""
    x = jax.lax.iota(jnp.uint32, math.prod(size)) + np.uint32(SEEDS[name] * 0x9E3779B9 % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    x = (x ^ (x >> np.uint32(16))) >> np.uint32(8)
    return x.reshape(size).astype(jnp.float32) * np.float32(2**-24)


def normal(name: str, *size: int, std: float):
    return (noise(name, *size) - np.float32(0.5)) * np.float32(12**0.5 * std)


def init(shape: Shape):
    weight = lambda name, *size: normal(name, *size, std=0.02).astype(BF16)
    ones = lambda *size: jnp.ones((*size, shape.width), BF16)
    layers = {name: weight(name, shape.layers, *size) for name, size in shape.linears.items()}
    layers |= {"norm_1": ones(shape.layers), "norm_2": ones(shape.layers)}
    embed = weight("embed", shape.vocab, shape.width)
    head = weight("head", shape.width, shape.vocab)
    return {"embed": embed, "layers": layers, "norm": ones(), "head": head}


def rms(x, scale):
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5)).astype(x.dtype) * scale


def rope(x):
    length, size = x.shape[1], x.shape[-1]
    turn = np.arange(length)[:, None] * (5e5 ** (-np.arange(0, size, 2) / size))
    cos, sin = (jnp.asarray(f(turn)[None, :, None], x.dtype) for f in (np.cos, np.sin))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


@jax.custom_vjp
def stand_in(q, k, v):
    """What a fused attention reads, writes and keeps, in place of one that needs the device's
    libraries to compile: for memory ahead of time."""
    times = q.shape[2] // k.shape[2]
    return q + jnp.repeat(k + v, times, 2)


def _stand_in_forward(q, k, v):
    out = stand_in(q, k, v)
    return out, (q, k, v, out, jnp.max(out.astype(jnp.float32), -1))


def _stand_in_backward(kept, g):
    q, k, v, out, top = kept
    gq = (g * (q + out) * top[..., None]).astype(q.dtype)
    few = lambda x: jnp.sum(x.reshape(*k.shape[:3], -1, k.shape[3]), 3).astype(k.dtype)
    return gq, few(gq) * v, few(g) * k


stand_in.defvjp(_stand_in_forward, _stand_in_backward)


def attention(q, k, v, how):
    if how == "ahead":
        return stand_in(q, k, v)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=how)


def linear(name, y, w, low_rank=None):
    """y·W, and with `low_rank` LoRA as written by hand."""
    if low_rank is None:
        return y @ w
    a, b = (low_rank[n].astype(BF16) for n in "ab")
    return y @ w + SCALE * ((y @ a) @ b)


def forward(
    shape: Shape, how, remat, unrolled, params, ids, added=None, adapters=None, linear=linear
):
    """Logits; `added` to the embeddings, `adapters` {linear: A and B} for `linear`."""

    def layer(x, weights):
        w, low_rank = weights
        dense = lambda name, y: linear(name, y, w[name], low_rank and low_rank[name])
        y = rms(x, w["norm_1"])
        heads = lambda y: y.reshape(*y.shape[:2], -1, shape.head)
        q, k, v = (heads(dense(name, y)) for name in "qkv")
        y = attention(rope(q), rope(k), v, how)
        x = x + dense("o", y.reshape(x.shape))
        y = rms(x, w["norm_2"])
        return x + dense("down", jax.nn.silu(dense("gate", y)) * dense("up", y)), None

    if REMAT[remat] is not None:
        layer = jax.checkpoint(layer, prevent_cse=False, policy=REMAT[remat])
    x = params["embed"][ids]
    x = x if added is None else x + added
    stacks = params["layers"], adapters
    if unrolled:
        for i in range(shape.layers):
            x, _ = layer(x, jax.tree.map(lambda w, i=i: w[i], stacks))
    else:
        x, _ = jax.lax.scan(layer, x, stacks)
    return rms(x, params["norm"]) @ params["head"]


def loss_of(logits, ids):
    logits = logits[:, :-1].astype(jnp.float32)
    right = jnp.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - right)


# The arms.


def by_hand(shape: Shape, rank: int):
    """{linear: {"a": (layers, in, rank), "b": (layers, rank, out)}}, B not zero."""
    layers = shape.layers
    return {
        n: {
            "a": normal(f"{n}_a", layers, n_in, rank, std=n_in**-0.5),
            "b": normal(f"{n}_b", layers, rank, n_out, std=0.02),
        }
        for n, (n_in, n_out) in shape.linears.items()
    }


def of_module(name: str, shape: Shape, rank: int):
    """`linear` by an NNX layer of each shape, which a step of the scan puts together."""

    def make(n_in: int, n_out: int):
        how = dict(use_bias=False, dtype=BF16, param_dtype=BF16, rngs=nnx.Rngs(0))
        if name == "nnx":
            return nnx.LoRALinear(n_in, n_out, lora_rank=rank, lora_dtype=BF16, **how)
        import qwix

        provider = qwix.LoraProvider(module_path=".*", rank=rank, alpha=SCALE * rank)
        layer, x = nnx.Linear(n_in, n_out, **how), jnp.ones((1, 1, n_in), BF16)
        return qwix.apply_lora_to_model(layer, provider, x, rngs=nnx.Rngs(0))

    abstract = {n: nnx.eval_shape(lambda s=s: make(*s)) for n, s in shape.linears.items()}
    parts = {n: nnx.split(layer, nnx.LoRAParam, ...) for n, layer in abstract.items()}
    scale = SCALE if name == "nnx" else 1.0  # it has no alpha

    def linear(n, y, w, low_rank):
        graph, *states = parts[n]
        a, b = low_rank["a"].astype(BF16), (scale * low_rank["b"]).astype(BF16)
        filled = [
            jax.tree.unflatten(jax.tree.structure(s), v) for s, v in zip(states, ([a, b], [w]))
        ]
        return nnx.merge(graph, *filled)(y)

    return linear


class Arm(NamedTuple):
    """loss(trained, base, ids), and what makes `trained` and `base` of the model's parameters."""

    loss: Any
    trained: Any
    base: Any
    tx: Any


def arm(name: str, o: argparse.Namespace, shape: Shape, how, params, ids) -> Arm:
    model = functools.partial(forward, shape, how, o.remat, o.unrolled)
    keep = lambda params: params
    if name in ("hand", *OTHERS):
        how = {} if name == "hand" else dict(linear=of_module(name, shape, o.rank))
        loss = lambda trained, base, ids: loss_of(model(base, ids, adapters=trained, **how), ids)
        return Arm(loss, lambda _: by_hand(shape, o.rank), keep, optax.adam(1e-4))
    if name == "floor":
        zeros = lambda _: jnp.zeros((*ids.shape, shape.width), BF16)
        loss = lambda trained, base, ids: loss_of(model(base, ids, trained), ids)
        return Arm(loss, zeros, keep, optax.sgd(1e-4))
    if name == "full":
        loss = lambda trained, _, ids: loss_of(model(trained, ids), ids)
        return Arm(loss, keep, lambda _: {}, optax.sgd(1e-4))
    abstract = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    survey = lora.survey(model, abstract(params), abstract(ids))
    paths = [f"layers/{n}" for n in shape.linears]
    config = lora.LoRAConfig(rank=o.rank, alpha=SCALE * o.rank, targets=paths)

    def trained(params):
        nodes = lora.init(jax.random.key(0), params, config, survey)
        hand = by_hand(shape, o.rank)
        for n, node in nodes["layers"].items():
            a, b = (hand[n][k].reshape(getattr(node, k).shape) for k in "ab")
            nodes["layers"][n] = lora.LoRA(a, b, node.scale, node.geometry)
        return lora.methods.dora(params, nodes) if name == "dora" else nodes

    def base(params):
        if not name.startswith("nf4"):
            return params
        return lora.quant.quantize(params, paths, survey=survey, double=name == "nf4d")

    fn = lora.adapt(model, plan=name if name in PLANS else "auto", save=SAVE[o.save])
    loss = lambda trained, base, ids: loss_of(fn(lora.bind(base, trained), ids), ids)
    return Arm(loss, trained, base, optax.adam(1e-4))


def step_of(arm: Arm):
    def step(trained, state, base, ids):
        value, grads = jax.value_and_grad(arm.loss)(trained, base, ids)
        updates, state = arm.tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


# What is measured.


def useful_flops(shape: Shape, tokens, remat: str, full: bool) -> float:
    """FLOPs of the products with weights, without attention: forward and input gradients, all again
    where it is rematerialised; and gradients of the weights, where these are trained."""
    in_layers = shape.layers * sum(map(math.prod, shape.linears.values()))
    head = shape.width * shape.vocab
    passes = 2 + full
    return 2 * math.prod(tokens) * ((passes + (remat == "full")) * in_layers + passes * head)


PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "TPU v5 lite": 197e12, "TPU v6": 918e12}


def timed(
    row: dict, seconds: float, name: str, o: argparse.Namespace, shape: Shape, tokens
) -> dict:
    row |= {"ms": 1e3 * seconds, "tokens/s": math.prod(tokens) / seconds}
    kind = jax.devices()[0].device_kind
    if peak := next((v for k, v in PEAK.items() if k in kind), None):
        row["MFU"] = useful_flops(shape, tokens, o.remat, name == "full") / seconds / peak
    return row


def measure(name: str, o: argparse.Namespace, shape: Shape, tokens) -> dict:
    make_ids = lambda: (noise("ids", *tokens) * shape.vocab).astype(jnp.int32)
    make = functools.partial(init, shape)
    if o.ahead:
        count = math.prod(map(int, o.ahead.split(":")[1].split("x")))
        where = NamedSharding(lora.parallel.topology_mesh(o.ahead, d=count), PartitionSpec())
        run = lambda f, *args: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            jax.eval_shape(f, *args),
        )
        how = "ahead"
    else:
        run = lambda f, *args: jax.jit(f)(*args)
        how = "cudnn" if jax.default_backend() == "gpu" else "xla"
    ids, params = run(make_ids), run(make)
    chosen = arm(name, o, shape, how, params, ids)
    trained = run(chosen.trained, params)
    base = run(chosen.base, params)
    state = run(chosen.tx.init, trained)
    del params
    start, spent = time.perf_counter(), time.process_time()
    lowered = step_of(chosen).lower(trained, state, base, ids)
    row = {"lowered s": time.process_time() - spent}
    start = time.perf_counter()
    compiled = lowered.compile()
    row["compiled s"] = time.perf_counter() - start
    memory = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes / GIB
    row |= {"temporaries GiB": memory.temp_size_in_bytes / GIB, "arguments GiB": kept}
    row["peak GiB"] = row["temporaries GiB"] + kept
    if o.ahead:
        row["GB accessed"] = (accessed(compiled) or math.nan) / 1e9
        return row
    times, losses = [], []
    for _ in range(o.steps):
        start = time.perf_counter()
        trained, state, value = compiled(trained, state, base, ids)
        losses.append(float(value))
        times.append(time.perf_counter() - start)
    row["losses"] = losses[:4]
    return timed(row, float(np.median(times[1:])), name, o, shape, tokens)


def measured(name: str, o: argparse.Namespace, shape: Shape, tokens) -> dict:
    package = OTHERS.get(name, "")
    if package and importlib.util.find_spec(package.split("==")[0]) is None:
        return {"not run": f"not installed: pip install {package}"}
    try:
        return measure(name, o, shape, tokens)
    except (jax.errors.JaxRuntimeError, lora.LoRAError) as e:
        return {"not run": str(e).splitlines()[0][:200]}


def in_torch(name: str, o: argparse.Namespace, shape: Shape, tokens) -> dict:
    """The row of an arm of torch, by another process: this one must not hold the device yet."""
    if o.ahead:
        return {"not run": "torch compiles for the device that is there"}
    if o.remat == "dots":
        return {"not run": "torch has no policy for products"}
    options = shape._asdict() | {"arm": name, "tokens": tokens, "rank": o.rank, "steps": o.steps}
    options |= {"remat": o.remat, "seeds": SEEDS, "install": TORCH[name]}
    script = str(pathlib.Path(__file__).with_name("gpu_torch.py"))
    done = subprocess.run([o.torch, script, json.dumps(options)], stdout=-1, stderr=-1, text=True)
    if done.returncode:
        return {"not run": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


COLUMNS = ("ms", "tokens/s", "MFU", "temporaries GiB", "arguments GiB", "peak GiB", "GB accessed")
COLUMNS += ("lowered s", "compiled s", "not run")


CLOSE = 1e-3  # bf16: 2^-8 of a logit on the way, less in the mean


def cell(x) -> str:
    return x if isinstance(x, str) else "" if x is None else f"{x:,.{0 if x > 1000 else 2}f}"


def agree(rows: dict[str, dict]) -> str:
    """How far the losses of the arms of one and the same computation are apart."""
    lines = []
    for alike in ALIKE:
        same = {n: np.array(r["losses"]) for n, r in rows.items() if "losses" in r and n in alike}
        if len(same) < 2:
            continue
        first, *rest = same
        apart = max(float(np.abs(same[n] / same[first] - 1).max()) for n in rest)
        if not apart < CLOSE:
            raise SystemExit(f"losses differ by {apart:.1e}: {same}")
        lines.append(f"losses of {', '.join(same)} agree to {apart:.1e}")
    return "\n".join(lines)


def main(argv=None) -> dict[str, dict]:
    o = parse(argv)
    shape, tokens = MODELS[o.model]
    shape = shape._replace(layers=o.layers or shape.layers)
    tokens = tuple(o.tokens or tokens)
    # First, as JAX takes the device's memory and keeps it.
    rows = {name: in_torch(name, o, shape, tokens) for name in o.arms if name in TORCH}
    where = o.ahead or jax.devices()[0].device_kind
    print(f"{where}; jax {jax.__version__}; {o.model}, {shape.layers} layers, tokens {tokens}, "
          f"remat {o.remat}, save {o.save}, rank {o.rank}", flush=True)  # fmt: skip
    for name in o.arms:
        if name not in TORCH:
            rows[name] = measured(name, o, shape, tokens)
        elif "seconds" in rows[name]:
            timed(rows[name], rows[name].pop("seconds"), name, o, shape, tokens)
        if o.json:
            print(json.dumps({"arm": name} | rows[name]), flush=True)
        gc.collect()
    rows = {name: rows[name] for name in o.arms}
    columns = [c for c in COLUMNS if any(c in r for r in rows.values())]
    print(
        table(("arm", *columns), [(n, *(cell(r.get(c)) for c in columns)) for n, r in rows.items()])
    )
    print(agree(rows))
    return rows


if __name__ == "__main__":
    main()
