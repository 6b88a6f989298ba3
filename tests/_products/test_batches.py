"""Products under vmap: what is not of the batch is read, and merged, once for all."""

import jax
import jax.numpy as jnp
import rand
from common import assert_close, noisy

import lora_jax as lora
from lora_jax._quantized.make import quantized

KEY = jax.random.key(0)


def test_gradients_of_each_example_merge_once():
    """In the merged plan no merged weight has an axis of examples."""
    d = 64
    params, x = {"w": rand.normal(KEY, (d, d)) / 8}, rand.normal(KEY, (5, 8, d))
    adapters = noisy(lora.init(KEY, params, lora.LoRAConfig(rank=2, targets="w")), key=1)
    fn = lambda p, x: jnp.tanh(x @ p["w"])
    apply = lora.adapt(fn, plan="merged")
    loss = lambda x, ad: jnp.sum(jnp.sin(apply(lora.bind(params, ad), x)))
    dense = lambda x, ad: jnp.sum(jnp.sin(fn(lora.merge(params, ad), x)))
    each, want = (jax.jit(jax.vmap(jax.grad(f, (0, 1)), (0, None))) for f in (loss, dense))
    assert_close(each(x, adapters), want(x, adapters), factor=256)
    assert f"tensor<5x{d}x{d}xf32>" not in each.lower(x, adapters).as_text()


def test_a_batched_and_an_unbatched_quantised_weight_of_one_input():
    w, v = rand.normal(KEY, (3, 64, 64)) / 8, rand.normal(KEY, (64, 64)) / 8
    q, other, x = quantized(w, "nf4"), quantized(v, "int8"), rand.normal(KEY, (5, 64))
    params = {"w": v, "v": v}
    adapters = noisy(lora.init(KEY, params, lora.LoRAConfig(rank=2, targets=["w", "v"])), key=1)
    fn = lambda p, x: x @ p["w"] + jnp.sin(x @ p["v"])
    apply = lora.adapt(fn)
    one = lambda w, v: apply(lora.bind({"w": w, "v": v}, adapters), x)
    plain = lambda w, v: fn(lora.merge({"w": w, "v": v}, adapters), x)
    got = jax.vmap(one, (0, None))(q, other)
    assert_close(got, jax.vmap(plain, (0, None))(q.value(), other.value()), factor=256)
