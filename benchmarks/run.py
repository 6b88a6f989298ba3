"""All benchmarks: `python benchmarks/run.py` prints tables of ratios, in Markdown.

    python benchmarks/run.py --only training --cases "q,v r=8" --arms hand,ours_auto --repeats 3

Arms whose package is not there are left out, and said to be.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform

# Before JAX and torch start: benchmarks/merging.py runs processes beside this one, and idle threads
# of torch would otherwise spin on the cores that the other arms are measured on.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import arms
import cases
import jax
from compiling import compiling
from inference import inference
from merging import merging
from training import training

SECTIONS = ("training", "inference", "merging", "compiling")
PACKAGES = ("lora_jax", "jax", "flax", "optax", "qwix", "quax", "torch", "peft")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choice = lambda name, known, help, sep=",": parser.add_argument(
        name, type=lambda s: _chosen(s.split(sep), known), default=list(known), help=help
    )
    choice("--only", SECTIONS, "sections, by commas")
    choice("--cases", cases.CASES, "training cases, by semicolons", ";")
    choice("--arms", arms.ARMS, "arms, by commas; hand is always there")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", help="also write the tables here")
    args = parser.parse_args()

    parts = []

    def show(text):
        parts.append(text)
        print(text + "\n", flush=True)

    show(_header(args.repeats))
    names = [n for n in arms.ARMS if n in args.arms or n == "hand"]
    for name in [n for n in names if arms.missing(n)]:
        show(f"`{name}` is left out: `pip install {arms.missing(name)}` brings it.")
        names.remove(name)
    if "training" in args.only:
        show(
            "## Training step, ratios to hand\n\n`loss`: largest relative difference in 5 updates."
        )
        for case in args.cases:
            show(f"### {case}\n\n" + training(cases.CASES[case], names, args.repeats))
    if "inference" in args.only:
        case = "all linears r=16"
        text = inference(cases.CASES[case], names, args.repeats)
        show(f"## Forward pass, ratios to the plain model: {case}\n\n" + text)
    if "merging" in args.only:
        show("## Merging\n\n" + merging(args.repeats))
    if "compiling" in args.only:
        show("## Compiling, ours over hand\n\n" + compiling(args.repeats))
    if args.out:
        with open(args.out, "w") as f:
            f.write("\n\n".join(parts) + "\n")


def _chosen(names, known):
    unknown = [n for n in names if n not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown} not among {list(known)}")
    return names


def _header(repeats):
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    device = jax.devices()[0]
    return (
        f"# Benchmarks, {datetime.date.today()}\n\n"
        f"{device.device_kind if device.platform != 'cpu' else _cpu()}; Python "
        f"{platform.python_version()}, {', '.join(versions)}. Times are medians (quartiles) of "
        f"{repeats} paired rounds."
    )


def _cpu():
    name = platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            names = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
