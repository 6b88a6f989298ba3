"""What one product costs by plan, ahead of time: `python benchmarks/beside.py --ahead h100:1x1x1`.

Megabytes accessed and temporaries of y = x·W + s·(x·A)·B for the weights of one x, on 8,192 rows in
bf16 with rank 16, and of `jax.vjp` of it, by the real compiler for a device that is not there.
`factored` and `beside` are ours. Ragged experts and convolutions are factored by every plan: what
`beside` would be there is written here by hand, [x, s·x·A]·[W; B] along the axis that is summed,
B in the middle of the window.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import re

from measure import AHEAD, accessed, table

if __name__ == "__main__":
    os.environ |= AHEAD

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lora

RANK, SCALE = 16, 2.0


def linears(params, x):
    return [x @ w for w in params]


def of_experts(params, x):
    return [jnp.einsum("etd,edk->etk", x, w) for w in params]


def ragged(params, x):
    experts = params[0].shape[0]
    sizes = jnp.full(experts, x.shape[0] // experts, jnp.int32)
    return [lax.ragged_dot(x, w, sizes) for w in params]


def convolution(params, x):
    conv = functools.partial(lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
    return [conv(x, w, dimension_numbers=("NHWC", "HWIO", "NHWC")) for w in params]


def joined(fn):
    """`beside` for the one weight of `fn`: A is like W but for its outputs, B is (..., r, out)."""

    def of_ours(w, a, b, x):
        h = jnp.asarray(SCALE, x.dtype) * fn([a.astype(x.dtype)], x)[0]
        pads = [((n - 1) // 2, n // 2, 0) for n in w.shape[:-2]] if x.ndim > 2 else []
        b = b.astype(x.dtype)
        if pads:  # B where the window's middle is
            b = lax.pad(b, jnp.zeros((), x.dtype), [*pads, (0, 0, 0), (0, 0, 0)])
        return fn([jnp.concatenate([w, b], -2)], jnp.concatenate([x, h], -1))

    return of_ours


# {name: (function of weights and x, shape of x, of the weights)}
ROWS = 8192
CASES = {
    "q (4096 → 4096)": (linears, (ROWS, 4096), [(4096, 4096)]),
    "q, k, v (4096 → 4096, 1024, 1024)": (
        linears, (ROWS, 4096), [(4096, 4096), (4096, 1024), (4096, 1024)]),
    "gate, up (4096 → 14336 each)": (linears, (ROWS, 4096), [(4096, 14336)] * 2),
    "down (14336 → 4096)": (linears, (ROWS, 14336), [(14336, 4096)]),
    "8 experts of 1024 rows (2048 → 1408)": (of_experts, (8, 1024, 2048), [(8, 2048, 1408)]),
    "8 experts of 4096 rows (2048 → 1408)": (of_experts, (8, 4096, 2048), [(8, 2048, 1408)]),
}  # fmt: skip
BY_HAND = {
    "8 ragged experts (2048 → 1408)": (ragged, (ROWS, 2048), [(8, 2048, 1408)]),
    "convolution 1×1 (512 → 512)": (convolution, (8, 32, 32, 512), [(1, 1, 512, 512)]),
    "convolution 3×3 (512 → 512)": (convolution, (8, 32, 32, 512), [(3, 3, 512, 512)]),
}


def program(name: str, plan: str):
    """(function of x, the factors and the weights; their types)."""
    fn, x, weights = (CASES | BY_HAND)[name]
    typed = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    x, params = typed(x), [typed(w) for w in weights]
    if plan == "beside" and name in BY_HAND:
        w = params[0].shape
        b = (*(1 for _ in w[:-2]), RANK, w[-1]) if len(w) > 3 else (*w[:-2], RANK, w[-1])
        nodes = [typed((*w[:-1], RANK), jnp.float32), typed(b, jnp.float32)]
        return lambda x, ab, params: joined(fn)(*params, *ab, x), (x, nodes, params)
    config = lora.LoRAConfig(rank=RANK, alpha=SCALE * RANK, targets="*")
    targets = lora.select(params, config, lora.survey(fn, params, x))
    nodes = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, targets), params)
    adapted = lora.adapt(fn, plan=plan)
    return lambda x, ab, params: adapted(lora.bind(params, ab), x), (x, nodes, params)


def of_cudnn(text: str) -> int:
    """Bytes of operands and results of cuDNN's convolutions, which XLA's analysis leaves out."""
    types = dict(re.findall(r"%([\w.-]+) = (\(.*?\)|\S+) ", text))
    calls = re.findall(r"= (.*) custom-call\((.*?)\),.* custom_call_target=\"__cudnn", text)
    met = " ".join(
        out + " ".join(types[n] for n in re.findall(r"%([\w.-]+)", ins)) for out, ins in calls
    )
    size = {"bf16": 2, "f32": 4}  # the workspace is of neither
    arrays = re.findall(r"\b(bf16|f32)\[([\d,]*)\]", met)
    return sum(size[dtype] * math.prod(map(int, shape.split(","))) for dtype, shape in arrays)


def compiled(f, args, where) -> tuple[float, float]:
    there = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    made = jax.jit(f).trace(*jax.tree.map(there, args)).lower().compile()
    bytes_ = (accessed(made) or math.nan) + of_cudnn(made.as_text())
    return bytes_ / 1e6, made.memory_analysis().temp_size_in_bytes / 2**20


def costs(name: str, plan: str, where) -> list[str]:
    """MB accessed and MiB of temporaries, forward, and of the whole of `jax.vjp`."""
    f, args = program(name, plan)
    x, nodes, params = args
    g = jax.eval_shape(f, *args)
    back = lambda x, ab, params, g: jax.vjp(lambda x, ab: f(x, ab, params), x, ab)[1](g)
    pair = compiled(f, args, where), compiled(back, (x, nodes, params, g), where)
    return [f"{bytes_:,.0f} ({temporaries:,.0f})" for bytes_, temporaries in pair]


def main(argv=None) -> list[tuple]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ahead", default="h100:1x1x1", help="compile for h100:1x1x1 or v5e:2x2")
    parser.add_argument("--cases", nargs="+", default=[*CASES, *BY_HAND], metavar="PART OF A NAME")
    parser.add_argument("--plans", nargs="+", default=["factored", "beside"])
    o = parser.parse_args(argv)
    count = math.prod(map(int, o.ahead.split(":")[1].split("x")))
    where = NamedSharding(lora.parallel.topology_mesh(o.ahead, d=count), PartitionSpec())
    rows = []
    for name in CASES | BY_HAND:
        if any(part in name for part in o.cases):
            found = [costs(name, plan, where) for plan in o.plans]
            rows.append((name, *(c for pair in zip(*found) for c in pair)))
            print(*rows[-1], sep=" | ", flush=True)
    heads = [f"{kind}: {plan}" for kind in ("forward", "backward") for plan in o.plans]
    print(f"{o.ahead}; jax {jax.__version__}; MB accessed (MiB of temporaries)")
    print(table(("weights of one x", *heads), rows))
    return rows


if __name__ == "__main__":
    main()
