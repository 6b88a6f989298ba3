"""Random functions that mix moves and uses of one to three weights, against the merged weights:
of all plans, with LoRA or DoRA, dropout, and bases in few bits, in 16 and 32 bits.

`python tests/support/random_functions.py 1000` counts the outcomes: each function is right, value
and gradient, or refused by a LoRAError that names a leaf and a reason. Anything else is a fault,
and is shown with its seed: `python tests/support/random_functions.py 1 17` runs seed 17 alone.
"""

from __future__ import annotations

import collections
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax._quantized.make import quantized
from lora_jax._quantized.weight import Quantized

DTYPES = [jnp.float32, jnp.float32, jnp.bfloat16, jnp.float16]


class Program:
    """What is made of the weights, drawn once and run as often as it is traced."""

    def __init__(self, seed: int):
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        self.dtype = self.to = DTYPES[self.rng.integers(len(DTYPES))]
        self.steps: list[str] = []

    def run(self, params: dict, x: jax.Array) -> list:
        rng, self.steps = np.random.default_rng(self.seed + 1), []
        pool = [params[name] for name in sorted(params)]
        for _ in range(int(rng.integers(0, 6))):
            pool.append(self.moved(rng, pool, x))
        used = [pool[-1], *(pool[i] for i in range(len(params)))]
        return [self.used(rng, w, x) for w in used]

    def say(self, name: str) -> None:
        self.steps.append(name)

    def constant(self, rng, shape) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape).astype(self.dtype).astype(self.to))

    def moved(self, rng, pool: list, x: jax.Array) -> jax.Array:
        """A new array, of one or two of those that are there."""
        w = pool[int(rng.integers(len(pool)))]
        other = pool[int(rng.integers(len(pool)))]
        name = MOVES[int(rng.integers(len(MOVES)))]
        d = int(rng.integers(w.ndim))
        n = w.shape[d]
        self.say(f"{name}[{d}] of {w.shape}")
        slices = [slice(None)] * w.ndim
        along = lambda v: v.reshape([n if i == d else 1 for i in range(w.ndim)])
        match name:
            case "transpose":
                return w.transpose(rng.permutation(w.ndim))
            case "slice":
                slices[d] = slice(int(rng.integers(n)), None, int(rng.integers(1, 3)))
                return w[tuple(slices)]
            case "split":
                return jnp.split(w, [max(n // 2, 1)], d)[0]
            case "rev":
                return jnp.flip(w, d)
            case "roll":
                return jnp.roll(w, int(rng.integers(n)), d)
            case "pad":
                ends = [(int(rng.integers(2)), int(rng.integers(3))) if i == d else (0, 0)
                        for i in range(w.ndim)]  # fmt: skip
                return jnp.pad(w, ends, constant_values=float(rng.integers(2)))
            case "repeat":
                return jnp.repeat(w, 2, d)
            case "tile":
                return jnp.tile(w, [2 if i == d else 1 for i in range(w.ndim)])
            case "scalar":
                return w * self.constant(rng, ())
            case "row scale":
                return w * along(self.constant(rng, n))
            case "divide":
                return w / along(1 + jnp.abs(self.constant(rng, n)))
            case "data scale":
                return w * along(jnp.resize(x[0], n))
            case "mask":
                return jnp.where(along(jnp.asarray(rng.random(n) < 0.6)), w, jnp.zeros_like(w))
            case "constant":
                return w + self.constant(rng, w.shape)
            case "data":
                return w + jnp.resize(x, w.shape)
            case "add":
                return w + other if other.shape == w.shape else w - w.mean(d, keepdims=True)
            case "symmetric":
                return (w + w.T) / 2 if w.shape == w.shape[::-1] else -w
            case "concatenate":
                rest = lambda v: v.shape[:d] + v.shape[d + 1 :]
                fits = other.ndim == w.ndim and rest(other) == rest(w)
                return jnp.concatenate([w, other if fits else self.constant(rng, w.shape)], d)
            case "stack":
                return jnp.stack([w, other if other.shape == w.shape else w * 2], d)
            case "gather":
                index = jnp.asarray(rng.integers(-n, n + 2, size=int(rng.integers(1, 5))))
                mode = ("fill", "clip", "wrap")[int(rng.integers(3))]
                return jnp.take(w, index, axis=d, mode=mode, fill_value=float(rng.integers(2)))
            case "fill of two":
                at = tuple(jnp.asarray(rng.integers(0, k + 2, size=3)) for k in w.shape[:2])
                return w.at[at].get(mode="fill", fill_value=0)
            case "pick":
                return jax.lax.dynamic_index_in_dim(w, jnp.int32(x[0, 0] > 0), d, keepdims=False)
            case "vmapped pick":
                ids = jnp.asarray(rng.integers(0, n, size=3))
                return jax.vmap(lambda i: jax.lax.dynamic_index_in_dim(w, i, d, False))(ids)
            case "window":
                return jax.lax.dynamic_slice_in_dim(w, jnp.int32(x[0, 0] > 0), max(n - 1, 1), d)
            case "broadcast":
                return jnp.broadcast_to(w, (3, *w.shape))
            case "merge":
                k = min(d, w.ndim - 2)
                return w.reshape(*w.shape[:k], -1, *w.shape[k + 2 :]) if w.ndim > 1 else w
            case "split axis":
                k = 2 if n % 2 == 0 else 1
                return w.reshape(*w.shape[:d], k, n // k, *w.shape[d + 1 :])
            case "reduce":
                return w.sum(d) if w.ndim > 1 else w
            case "select":
                same = other if other.shape == w.shape else -w
                return jax.lax.select(x[0, 0] > 0, w, same)
            case "stop":
                return w * 1
            case "cond":
                return jax.lax.cond(x[0, 0] > 0, lambda w: w * 2, lambda w: w, w)
            case "cast":
                return w.astype(jnp.float32).astype(self.to)
            case "hadamard":
                return w * self.constant(rng, w.shape)
            case "tanh":
                return jnp.tanh(w)
            case "set":
                slices[d] = 0
                return w.at[tuple(slices)].set(0)
        raise AssertionError(name)

    def used(self, rng, w: jax.Array, x: jax.Array) -> jax.Array:
        name = USES[int(rng.integers(len(USES)))]
        self.say(f"{name} of {w.shape}")
        if w.ndim == 0:
            return w * x
        fit = lambda *shape: jnp.resize(x, shape) * jnp.asarray(0.5, x.dtype)
        d = int(rng.integers(w.ndim))
        match name:
            case "dot":
                return jnp.tensordot(fit(3, w.shape[d]), w, ((1,), (d,)))
            case "dot left":
                return jnp.tensordot(w, fit(w.shape[d], 3), ((d,), (0,)))
            case "dot of two":
                k = min(2, w.ndim)
                return jnp.tensordot(fit(3, *w.shape[:k]), w, k)
            case "batched":
                xs = fit(w.shape[0], 3, w.shape[-1])
                return jnp.einsum("btd,b...d->bt...", xs, w) if w.ndim > 1 else fit(3, len(w)) @ w
            case "vmap":
                over = lambda x: jnp.tensordot(x, w, ((0,), (d,)))
                return jax.vmap(over)(fit(3, w.shape[d]))
            case "scan":
                if w.ndim < 2:
                    return fit(3, len(w)) @ w
                step = lambda c, layer: (c, jnp.tensordot(fit(3, w.shape[1]), layer, ((1,), (0,))))
                return jax.lax.scan(step, 0, w)[1]
            case "rows":
                ids = jnp.asarray(rng.integers(0, len(w), size=4))
                return jnp.tanh(w[ids])
            case "remat":
                run = jax.checkpoint(lambda w, x: jnp.tensordot(x, w, ((1,), (d,))))
                return run(w, fit(3, w.shape[d]))
            case "conv":
                if w.ndim != 3:
                    return jnp.tensordot(fit(3, w.shape[d]), w, ((1,), (d,)))
                return jax.lax.conv_general_dilated(
                    fit(2, 9, w.shape[1]), w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
                )
        raise AssertionError(name)


MOVES = [
    "transpose", "slice", "split", "rev", "roll", "pad", "repeat", "tile", "scalar", "row scale",
    "divide", "data scale", "mask", "constant", "data", "add", "symmetric", "concatenate", "stack",
    "gather", "fill of two", "pick", "vmapped pick", "window", "broadcast", "merge", "split axis",
    "reduce", "select", "stop", "cond", "cast", "hadamard", "tanh", "set",
]  # fmt: skip
USES = ["dot", "dot left", "dot of two", "batched", "vmap", "scan", "rows", "remat", "conv"]


def weights(rng, dtype) -> tuple[dict, dict, set[str]]:
    """One to three leaves of like shapes, with adapters along axes of all kinds: some with a
    magnitude, some with dropout, some over a quantised base; and what was drawn of these."""
    params, adapters, said = {}, {}, set()
    shape = tuple(int(n) for n in rng.integers(2, 7, size=rng.integers(2, 4)))
    dora, drops, few_bits = rng.random(3) < (0.25, 0.25, 0.15)
    for name in "uvw"[: rng.integers(1, 4)]:
        own = shape if rng.random() < 0.7 else tuple(rng.permutation(shape).tolist())
        kinds = rng.permutation(list("iob" if rng.random() < 0.4 else "ioo")[: len(own)])
        axes = {k: tuple(i for i, c in enumerate(kinds) if c == k) for k in "iob"}
        geometry = lora.Geometry(axes["i"], axes["o"], axes["b"])
        w, a, b = (rng.normal(size=s) for s in (own, *geometry.factor_shapes(own, 2)))
        params[name] = w.astype(dtype)
        if few_bits:
            said.add(FORMATS[int(rng.integers(len(FORMATS)))])
            params[name] = coded(params[name], max(said & {*FORMATS}), axes["i"] or (-2,))
        if adapters and rng.random() < 0.15:
            continue
        rate = KEPT if drops and rng.random() < 0.7 else 0.0
        node = lora.LoRA(a.astype("f"), b.astype("f"), 0.7, geometry, rate)
        if dora and axes["i"]:
            units = [own[d] for d in (*axes["b"], *axes["o"])]
            node = node.with_magnitude((np.abs(rng.normal(size=units)) + 0.5).astype("f"))
            said.add("DoRA")
        adapters[name] = node
        said |= {"dropout"} if rate else set()
    return params, adapters, said


FORMATS = ["nf4", "int4", "int8", "fp8"]
KEPT = 1e-7  # as a rate of dropout: all is done that dropout does, and nothing dropped


@functools.partial(jax.jit, static_argnums=(1, 2))
def coded(w: jax.Array, format: str, inner: tuple[int, ...]) -> Quantized:
    return quantized(w, format, in_axes=inner)


def total(ys: list) -> jax.Array:
    """One number that depends on all of them, on none so steeply that rounding would matter."""
    flat = [y.astype(jnp.float32).ravel() for y in ys]
    weighed = [jnp.sin(0.02 * y) * np.cos(np.arange(y.size, dtype="f")) for y in flat]
    return 50 * sum(map(jnp.sum, weighed))


def distance(got, want) -> float:
    """The largest error in any array, relative to its largest element, or to 1."""
    found = [0.0]
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        alike = (g == w) | (np.isnan(g) & np.isnan(w)) if g.shape == w.shape else False
        finite = np.abs(w[np.isfinite(w)]).max(initial=1.0)
        with np.errstate(invalid="ignore"):
            far = np.nan_to_num(np.abs(np.where(alike, 0, g - w)) / finite, nan=np.inf)
        found.append(float(far.max(initial=0.0)))
    return max(found)


def evaluated(fn: Callable, *args: Any) -> Any:
    """fn(*args), with constants for its arguments: XLA folds them, and compiles next to nothing."""
    jaxpr, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    flat = jax.tree.leaves(args)
    run = jax.jit(lambda: jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *flat))
    return jax.tree.unflatten(jax.tree.structure(shape), run())


def outcome(seed: int, plan: str | None = None) -> tuple[str, str]:
    """("right", "refused", "wrong", "raised" or "invalid", and what to say of it) of the function
    of `seed`; its plan is drawn as well, if none is given."""
    program = Program(seed)
    params, adapters, said = weights(program.rng, program.dtype)
    x = program.rng.normal(size=(4, 6)).astype(program.dtype)
    plans = ["auto", "factored", "auto" if "dropout" in said else "merged"]
    plan = plan or plans[int(program.rng.integers(3))]
    plain = lora.quant.dequantize(params)

    def ours(ad, params):
        bound = lora.bind(params, ad, dropout_key=jax.random.key(1))
        ys = lora.adapt(program.run, plan=plan)(bound, x)
        return total(ys), ys

    def dense(ad, plain, dtype=program.dtype):
        own = Program(seed)
        own.to = dtype
        ys = own.run(
            lora.merge(jax.tree.map(lambda w: w.astype(dtype), plain), ad), x.astype(dtype)
        )
        return total(ys), ys

    # With weights in 16 bits, what is rounded where is another matter: dense in fp32 is the truth.
    exact = functools.partial(dense, dtype=jnp.float32)
    derived = lambda fn: jax.value_and_grad(fn, has_aux=True)
    told = lambda: f"{plan}, {', '.join(sorted(said)) or 'LoRA'}: {'; '.join(program.steps)}"
    try:
        jax.make_jaxpr(derived(ours))(adapters, params)
    except lora.LoRAError as e:
        clear = all(line.count(": ") for line in str(e).split("\n") if "materialised by" in line)
        named = any(f"'{name}'" in str(e) for name in params)
        return ("refused" if named and clear else "raised"), f"{told()}: {e}"
    except Exception:
        error = traceback.format_exc()[-1500:]
        try:
            jax.make_jaxpr(dense)(adapters, plain)
        except (TypeError, ValueError):
            return "invalid", error
        return "raised", f"{told()}: {error}"
    every = lambda ad, params, plain: (
        derived(ours)(ad, params), derived(dense)(ad, plain), derived(exact)(ad, plain)
    )  # fmt: skip
    try:
        (got, grads), (near, near_grads), (truth, true_grads) = evaluated(
            every, adapters, params, plain
        )
    except Exception:
        return "raised", f"{told()}: {traceback.format_exc()[-1500:]}"
    # As near to the truth as the same function of merged weights, in its own type.
    eps = float(jnp.finfo(program.dtype).eps)
    off = [(distance(got[1], truth[1]), distance(near[1], truth[1]), 32 * eps)]
    off += [(distance(grads, true_grads), distance(near_grads, true_grads), 256 * eps)]
    right = all(own <= 4 * theirs + most for own, theirs, most in off)
    return ("right" if right else "wrong"), told() + ("" if right else f": {off}")


def main(count: int, first: int = 0) -> None:
    counts, why = collections.Counter(), collections.Counter()
    for seed in range(first, first + count):
        try:
            what, said = outcome(seed)
        except KeyboardInterrupt:  # counts until then
            break
        counts[what] += 1
        if what in ("wrong", "raised") or count == 1:
            print(seed, what, said, flush=True)
        if what == "refused":
            for line in said.split("\n"):
                if "materialised by" in line:
                    primitive = line.split("materialised by `")[1].split("`")[0]
                    reason = line.split(" at ", 1)[1].partition(": ")[2]
                    why[primitive, reason] += 1
                elif "never used" in line:
                    why["unused", ""] += 1
    print(dict(counts))
    for (primitive, reason), n in why.most_common():
        print(f"{n:6d}  {primitive}: {reason}")


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    main(*map(int, sys.argv[1:]))
