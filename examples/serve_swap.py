"""A server gets each new version of an adapter while it runs: train, export, load, unload the old.

A tiny Llama learns for a few steps; its adapter is written as a PEFT folder under a name of its
own, `NAME-v1`, `NAME-v2` …, checked for the server before anything is written. The server, vLLM or
any with its endpoints, is asked to load the new version, and only when it has it, to unload the old
one: requests to the old name go on until then. vLLM needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=True,
--enable-lora and --max-lora-rank 8; it must see the folder.

    python examples/serve_swap.py --server http://127.0.0.1:8000     # --help for the options

Expected (seed 0, a server with the base that serves `tuned-v1`; a minute when idle):
    loss 4.00 to 1.12 in 30 steps; tuned-v2 is loaded; tuned-v1 is unloaded
"""

import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import jax
import numpy as np
import optax
import tasks
from models.llama import mapping_of
from reporting import options, whole

import lora_jax as lora


def train(task, steps, seed):
    """(adapters, first loss, last loss)."""
    ids = np.stack([x["ids"] for x in task.train])
    survey = lora.survey(task.model.apply, {"params": task.params}, ids[:1, :-1])
    config = lora.LoRAConfig(rank=8, alpha=16, targets=["q_proj", "v_proj", "down_proj"])
    adapters = lora.init(jax.random.key(seed), task.params, config, survey)
    apply, tx = lora.adapt(task.model.apply), optax.adam(1e-2)

    @jax.jit
    def step(adapters, state, ids):
        def loss(adapters):
            logits = apply({"params": lora.bind(task.params, adapters)}, ids[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    state, losses = tx.init(adapters), []
    for i in range(steps):
        at = np.arange(32 * i, 32 * (i + 1)) % len(ids)
        adapters, state, value = step(adapters, state, ids[at])
        losses.append(float(value))
    return adapters, losses[0], losses[-1]


def versions(folder, name):
    """{number: name} of those that were exported."""
    found = (re.fullmatch(rf"{re.escape(name)}-v(\d+)", p.name) for p in folder.glob(f"{name}-v*"))
    return {int(m[1]): m[0] for m in sorted(filter(None, found), key=lambda m: int(m[1]))}


def post(server, endpoint, **body):
    """Asks the server; an answer that is no success is an error with the server's words."""
    request = urllib.request.Request(
        f"{server.rstrip('/')}/v1/{endpoint}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as e:
        raise RuntimeError(f"{endpoint} {body}: {e.code}: {e.read().decode()[:500]}") from None
    except urllib.error.URLError as e:
        raise SystemExit(f"no server at {server}: {e.reason}") from None


def swap(server, folder, name, adapters, mapping, target="vllm"):
    """Exports the next version, has it loaded, then the one before unloaded; (new, old or None)."""
    before = versions(folder, name)
    new = f"{name}-v{max(before, default=0) + 1}"
    lora.peft.save(folder / new, adapters, mapping, target=target, task_type="CAUSAL_LM")
    try:
        post(server, "load_lora_adapter", lora_name=new, lora_path=str((folder / new).absolute()))
    except BaseException:
        for path in (folder / new).iterdir():  # so that the next is compared with what is served
            path.unlink()
        (folder / new).rmdir()
        raise
    old = before.get(max(before, default=0))
    if old is not None:
        post(server, "unload_lora_adapter", lora_name=old)
    return new, old


def main(argv=None):
    parser = options(__doc__)
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="its address")
    parser.add_argument(
        "--folder", type=Path, default=Path("adapters"), help="that the server sees"
    )
    parser.add_argument("--name", default="tuned", help="of the versions, NAME-v1 …")
    parser.add_argument("--steps", type=whole(), default=30, help="of training")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    args = parser.parse_args(argv)
    if not args.server.startswith(("http://", "https://")):
        parser.error(f"--server {args.server}: expected http://host:port")
    task = tasks.tiny(16, args.seed, Path())
    adapters, first, last = train(task, args.steps, args.seed)
    args.folder.mkdir(parents=True, exist_ok=True)
    new, old = swap(args.server, args.folder, args.name, adapters, mapping_of(task.params))
    unloaded = "" if old is None else f"; {old} is unloaded"
    print(f"loss {first:.2f} to {last:.2f} in {args.steps} steps; {new} is loaded{unloaded}")


if __name__ == "__main__":
    main()
