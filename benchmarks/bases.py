"""A torch base onto a Flax model: how fast, and with how much memory.

    python benchmarks/bases.py [--layers 32] [--hidden 4096] ...

Writes a Llama-shaped folder in bf16 to a temporary directory, then reads it in a process of its own
for each way: safetensors alone; `lora.peft.load_base` on a model with a leaf for each layer, and on
a scanned one; the same in NF4. Peak memory is that of the process, less what it held before.
--sparse writes no values, only their places: a small machine's disk is enough for 7B.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ARMS = {
    "safetensors.numpy.load_file": dict(plain=True),
    "load_base, a leaf each": dict(),
    "load_base, scanned": dict(scan=True),
    "load_base, scanned, fp32": dict(scan=True, dtype="float32"),
    "load_base, a leaf each, NF4": dict(quantize=True),
    "load_base, scanned, NF4": dict(scan=True, quantize=True),
}


def torch_shapes(args):
    d, f, kv = args.hidden, args.intermediate, args.hidden * args.kv // 8
    each = {f"self_attn.{n}_proj": (kv if n in "kv" else d, d) for n in "qkvo"}
    each |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    each |= {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
    names = {"model.embed_tokens.weight": (args.vocab, d), "model.norm.weight": (d,)}
    for i in range(args.layers):
        names |= {f"model.layers.{i}.{n}.weight": s for n, s in each.items()}
    return names


def write(folder, args):
    """One file, its values random, or none at all."""
    header, at = {}, 0
    for name, shape in torch_shapes(args).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype("f4").view("u4") >> 16
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if args.sparse:
            file.truncate(8 + len(text) + at)
        for start in range(0, 0 if args.sparse else at, noise.size * 2):
            file.write(noise.astype("u2").tobytes()[: at - start])
    return at


def shapes_of(args, scan):
    """(shapes, survey): of the scanned model of the examples, or with a leaf for each layer."""
    import jax
    from models.llama import Llama, LlamaConfig

    import lora_jax as lora

    if scan:
        heads = args.hidden // 64
        model = Llama(LlamaConfig(args.vocab, args.hidden, args.intermediate, args.layers, heads,
                                  heads * args.kv // 8, dtype="bfloat16"))  # fmt: skip
        ids = np.ones((1, 8), "i4")
        shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
        return shapes, lora.survey(model.apply, {"params": shapes}, ids)
    from lora_jax._core.paths import nest

    flat = {}
    for name, shape in torch_shapes(args).items():
        *parts, _ = name.split(".")
        last = "scale" if len(shape) == 1 else "embedding" if "embed_tokens" in parts else "kernel"
        shape = shape[::-1] if last == "kernel" else shape
        flat["/".join([*parts, last])] = jax.ShapeDtypeStruct(shape, "bfloat16")
    return nest(flat), None


def measure(folder, args, how):
    """{seconds, bytes of the result, peak}, of this process."""
    import jax

    import lora_jax as lora

    if how.get("plain"):
        from safetensors.numpy import load_file

        load = lambda: load_file(folder / "model.safetensors")
    else:
        shapes, survey = shapes_of(args, how.get("scan", False))
        quantize = {"targets": ["*_proj/kernel"], "double": True} if how.get("quantize") else None
        dtype = how.get("dtype", "bfloat16")
        load = lambda: jax.block_until_ready(
            lora.peft.load_base(folder, shapes, survey, dtype=dtype, quantize=quantize)
        )
        jax.device_put(np.ones(8)).block_until_ready()  # the client is there before,
        lora.quant, lora.peft.load_base  # noqa: B018  # and the code
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    cpu, result = time.process_time(), load()
    return dict(
        seconds=time.perf_counter() - start,
        cpu=time.process_time() - cpu,
        result=sum(x.nbytes for x in jax.tree.leaves(result)),
        peak=1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in dict(hidden=2048, intermediate=5504, layers=8, vocab=32000, kv=8).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sparse", action="store_true", help="a file of no values")
    parser.add_argument("--only", nargs="*", default=list(ARMS), help="some of the ways")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure(args.folder, args, ARMS[args.arm])))
        return
    with tempfile.TemporaryDirectory() as name:
        size = write(Path(name), args)
        print(f"{size / 1e9:.2f} GB of bf16\n")
        columns = ("way", "s", "processor s", "GB / processor s", "result, GB", "peak, GB", "ratio")
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for arm in args.only:
            command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm, "--folder", name]
            if "--only" in command:
                at = command.index("--only")
                command = command[:at] + command[at + 1 + len(args.only) :]
            out = subprocess.run(command, capture_output=True, text=True, check=False)
            if out.returncode:
                sys.exit(out.stderr)
            m = json.loads(out.stdout.splitlines()[-1])
            cells = [m["seconds"], m["cpu"], size / m["cpu"] / 1e9]
            cells += [m["result"] / 1e9, m["peak"] / 1e9, m["peak"] / m["result"]]
            cells = [f"{x:.2f}" for x in cells]
            print(f"| {arm} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent / "examples")]
    main()
