"""A training step of a Llama-shaped model on a mesh, as shapes: with LoRA, or all of it.

Layers scanned and rematerialised; kernels and embedding over the axes `fsdp` and `tp` as in
Megatron-LM, tokens over `fsdp`; the base in bf16, Adam. What passes between layers is kept over
`fsdp` by batch: left to itself, the TPU compiler gathers all tokens to every chip where these are
few. Attention is multi-head, without shared keys and values.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import llama
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lora_jax as lora

P = PartitionSpec
SHAPES = {
    "7b": dict(vocab=32000, width=4096, hidden=11008, heads=32, layers=32),
    "70b": dict(vocab=32000, width=8192, hidden=28672, heads=64, layers=80),
}
ARMS = ("lora", "by_hand", "full", "nf4")
RANK = 16
INWARD = ("o", "down", "embed")


def spec(path, x) -> PartitionSpec:
    """Kernels (layers, in, out) and embedding (vocab, width) are split; norms lie everywhere."""
    if path[-1].key == "scale":
        return P()
    inward = any(key.key in INWARD for key in path)
    return P(*[None] * (x.ndim - 2), *(("tp", "fsdp") if inward else ("fsdp", "tp")))


def place(tree, shardings):
    """Shapes with these shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def step(arm: str, mesh: Mesh, tokens, shape: dict, rank=RANK, moments=jnp.float32):
    """(function, arguments, options) for `lora.parallel.forecast`: gradients, and Adam.

    `lora`: fp32 adapters on all linears; `by_hand`: the same, written into the modules; `nf4`: on a
    base of which the linears are in NF4, doubly quantised; `full`: every bf16 parameter, its
    moments in fp32 unless said otherwise, and no fp32 master copy.
    """
    by_batch = NamedSharding(mesh, P("fsdp"))
    config = llama.Config(
        **shape, scan=True, dtype=jnp.bfloat16, rank=rank, scale=2.0, activations=by_batch
    )
    model = llama.Llama(config)
    ids = jax.ShapeDtypeStruct(tokens, jnp.int32, sharding=by_batch)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    where = jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec(path, x)), params
    )
    params = place(params, where)

    if arm == "full":
        loss = lambda trained, base, ids: llama.loss(model.apply({"params": trained}, ids), ids)
        return _update(loss, params, where, None, ids, moments)
    survey = lora.survey(model.apply, {"params": params}, ids)
    lora_config = lora.LoRAConfig(rank=rank, alpha=2.0 * rank, targets=llama.ALL)
    make = lambda: lora.init(jax.random.key(0), params, lora_config, survey)
    trained = jax.eval_shape(make)
    where = lora.parallel.shardings(params, trained)
    apply = lora.adapt(model.apply)
    if arm == "nf4":
        params = _in_nf4(params, survey)

    def loss(trained, base, ids):
        return llama.loss(apply({"params": lora.bind(base, trained)}, ids), ids)

    if arm == "by_hand":
        hand = llama.Llama(dataclasses.replace(config, by_hand=llama.ALL))
        trained, where = _as_modules(trained), _as_modules(where)

        def loss(trained, base, ids):
            return llama.loss(hand.apply({"params": base, "lora": trained}, ids), ids)

    return _update(loss, place(trained, where), where, params, ids, jnp.float32)


def _update(loss, trained, where, base, ids, moments):
    opt = optax.adam(1e-4)
    wide = lambda tree: jax.tree.map(lambda x: x.astype(moments), tree)
    state = jax.eval_shape(lambda tree: opt.init(wide(tree)), trained)
    state_where = lora.parallel.state_shardings(state, trained, where)

    def update(trained, state, base, ids):
        value, grads = jax.value_and_grad(loss)(trained, base, ids)
        updates, state = opt.update(wide(grads), state)
        return optax.apply_updates(trained, updates), state, value

    options = dict(donate_argnums=(0, 1), out_shardings=(where, state_where, None))
    return update, (trained, place(state, state_where), base, ids), options


def _in_nf4(params, survey):
    """The linears' codes and constants lie as the weights do, and are gathered as codes."""
    make = lambda p: lora.quant.quantize(p, list(llama.ALL), survey=survey, double=True)

    def leaf(q, w):
        if not isinstance(q, lora.quant.Quantized):
            return w
        mesh = w.sharding.mesh
        specs = q.specs(w.sharding.spec, mesh)
        return place(q, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))

    is_leaf = lambda x: isinstance(x, lora.quant.Quantized)
    placed = jax.tree.map(leaf, jax.eval_shape(make, params), params, is_leaf=is_leaf)
    return lora.quant.gathered(placed, "fsdp")


def _as_modules(tree):
    """Our adapters' tree in the form of the hand-written model's collection."""
    is_node = lambda x: isinstance(x, lora.LoRA)
    tree = jax.tree.map(lambda n: {"a": n.a, "b": n.b}, tree, is_leaf=is_node)
    strip = lambda t: t["kernel"] if "kernel" in t else {k: strip(v) for k, v in t.items()}
    return {k: v if k == "kernel" else strip(v) for k, v in tree.items()}
