"""Fine-tuning steps for TPUs and GPUs that are not there: `python benchmarks/ahead_of_time.py`.

The compilers are the real ones (`pip install 'jax[tpu]'`, and `jax-cuda12-plugin` in jaxlib's own
version), so memory and collectives per device are real; nothing is executed. LoRA of rank 16 on
all linears, ours and written by hand into the modules, and full fine-tuning; see `pod.py` for the
model and its placement.

    python benchmarks/ahead_of_time.py v5e:16x16 --fsdp 16 --tokens 16 2048 --arms lora full
    python benchmarks/ahead_of_time.py --weak-scaling --json scaling.json --plot scaling.png
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib

from measure import AHEAD, table

os.environ |= AHEAD

import charts
import jax
from pod import ARMS, SHAPES, step
from weak_scaling import weak_scaling

import lora_jax as lora

GIB, MIB = 2**30, 2**20


def largest(plan: lora.parallel.Forecast) -> dict[str, float]:
    """{kind of collective: MiB of the largest}; they come with the most bytes first."""
    return {c.kind: round(c.bytes / MIB, 2) for c in reversed(plan.collectives)}


def row(plan: lora.parallel.Forecast) -> dict:
    """What the tables and the JSON file show of a forecast."""
    gib = lambda n: None if n is None else round(n / GIB, 3)
    return {
        "peak GiB": gib(plan.peak),
        "arguments GiB": gib(plan.arguments),
        "temporaries GiB": gib(plan.temporaries),
        "fits": plan.fits,
        "collectives GiB": gib(plan.collective_bytes),
        "largest MiB": largest(plan),
        "compiled s": round(plan.seconds, 1),
    }


def report(name: str, model: str, arguments) -> list[dict]:
    shape = SHAPES[model] | ({"layers": arguments.layers} if arguments.layers else {})
    chips = math.prod(map(int, name.split(":")[1].split("x")))
    tp = arguments.tp or chips // arguments.fsdp
    mesh = lora.parallel.topology_mesh(name, fsdp=arguments.fsdp, tp=tp)
    tokens = tuple(arguments.tokens)
    print(f"\n{name}, {dict(mesh.shape)}, {model}, {shape['layers']} layers, tokens {tokens}")
    rows = []
    for arm in arguments.arms:
        f, args, options = step(arm, mesh, tokens, shape)
        plan = lora.parallel.forecast(f, *args, **options)
        rows.append(row(plan))
        print(arm, rows[-1], flush=True)
        if arguments.verbose:
            print(plan, flush=True)
    facts = {"topology": name, "mesh": dict(mesh.shape), "model": model, "tokens": tokens}
    return [
        {**facts, "layers": shape["layers"], "arm": a} | r for a, r in zip(arguments.arms, rows)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("topology", nargs="*", default=["v5e:2x2"])
    parser.add_argument("--model", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--tokens", type=int, nargs=2, default=(4, 256), help="batch, sequence")
    parser.add_argument("--fsdp", type=int, default=2)
    parser.add_argument("--tp", type=int, help="the other axis; by default the rest of the chips")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["lora", "by_hand"])
    parser.add_argument("--verbose", action="store_true", help="each forecast in full")
    parser.add_argument("--weak-scaling", action="store_true", help="4 to 256 chips of v5e")
    parser.add_argument("--json", type=pathlib.Path, help="write the results there")
    parser.add_argument("--plot", type=pathlib.Path, help="of the weak scaling, as PNG")
    arguments = parser.parse_args()
    print(f"jax {jax.__version__}")
    if arguments.weak_scaling:
        rows = weak_scaling(arguments.layers)
        print(table(list(rows[0]), [tuple(r.values()) for r in rows]))
        if arguments.plot:
            what = "7B shape, FSDP on TPU v5e, 256 tokens a chip"
            charts.weak_scaling(rows, what).savefig(arguments.plot)
    else:
        rows = [r for name in arguments.topology for r in report(name, arguments.model, arguments)]
    if arguments.json:
        results = {"jax": jax.__version__, "rows": rows}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
