"""google-tunix's trainer and sampler, with `attach` in the place of `qwix.apply_lora_to_model`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.common import assert_close, noisy

import lora_jax as lora

pytest.importorskip("tunix", reason="needs google-tunix")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


class Words:
    """A tokenizer of 32 words, which are numbers."""

    encode = staticmethod(lambda text, **_: [int(w) for w in text.split()])
    decode = staticmethod(lambda ids, **_: " ".join(map(str, ids)))
    bos_id, eos_id, pad_id = (staticmethod(lambda i=i: i) for i in (1, 2, 0))


def setting():
    from tunix.models.llama3.model import Llama3, ModelConfig
    from tunix.sft.peft_trainer import TrainingInput

    # The sampler takes the width for the size of the vocabulary, so they are equal.
    sizes = dict(num_layers=2, vocab_size=32, embed_dim=32, hidden_dim=32, num_heads=2, head_dim=8)
    config = ModelConfig(**sizes, num_kv_heads=1, rope_theta=10_000, norm_eps=1e-5)
    model = Llama3(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (6, 4, 12), 3, 32)
    data = [TrainingInput(input_tokens=t, input_mask=jnp.ones_like(t, bool)) for t in tokens]
    call = lambda m, input_tokens, input_mask, **rest: m(input_tokens, cache=None, **rest)[0]
    survey = lora.survey(call, model, **inputs(data[0]))
    config = lora.LoRAConfig(4, targets="all-linear")
    return model, lora.init(jax.random.key(0), model, config, survey), data


def inputs(batch):
    from tunix.sft import utils

    mask = batch.input_mask
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": mask,
        "positions": utils.build_positions_from_mask(mask),
        "attention_mask": utils.make_causal_attn_mask(mask),
    }


class Losses:
    """A hook of the trainer, of which all but one method do nothing."""

    def __init__(self):
        self.losses = []

    def on_train_step_end(self, trainer, step, loss):
        self.losses.append(float(loss))

    def __getattr__(self, name):
        return lambda *_: None


def trained(adapted, data, steps, folder=None):
    """The losses of tunix's trainer."""
    import orbax.checkpoint as ocp
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

    config = TrainingConfig(
        eval_every_n_steps=100,
        max_steps=steps,
        checkpoint_root_directory=folder,
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=1),
    )
    trainer, hook = PeftTrainer(adapted, optax.adamw(1e-2, eps=1e-3), config), Losses()
    trainer.with_gen_model_input_fn(inputs).with_training_hooks(hook)
    trainer.train(data)
    return hook.losses


def test_trainer_equals_our_loop_and_resumes(tmp_path):
    from tunix.sft.peft_trainer import _default_loss_fn

    model, adapters, data = setting()
    adapted = lora.attach(model, adapters)
    got = trained(adapted, data, 6)

    loss_of, tx = lora.adapt(_default_loss_fn), optax.adamw(1e-2, eps=1e-3)

    @jax.jit
    def step(adapters, state, batch):
        own = lambda adapters: loss_of(lora.bind(model, adapters), **inputs(batch))
        loss, grads = jax.value_and_grad(own)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, loss

    ours, state, want = adapters, tx.init(adapters), []
    for batch in data:
        ours, state, loss = step(ours, state, batch)
        want.append(float(loss))
    assert_close(got, want)
    assert_close(lora.detach(adapted)[1], ours, factor=64)

    parts = trained(lora.attach(model, adapters), data, 3, tmp_path)
    resumed = lora.attach(model, adapters)
    parts += trained(resumed, data, 6, tmp_path)
    assert_close(parts, got)
    assert_close(lora.detach(resumed)[1], lora.detach(adapted)[1], factor=64)


def test_sampler_generates_what_merged_weights_generate():
    from tunix.generate.sampler import CacheConfig, Sampler

    model, adapters, _ = setting()
    adapters = noisy(adapters, scale=0.3)
    cache = CacheConfig(cache_size=32, num_layers=2, num_kv_heads=1, head_dim=8)
    outs = []
    for m in (lora.attach(model, adapters), lora.merge(model, adapters), model):
        sampler = Sampler(m, Words, cache)
        outs.append(sampler(["3 4 5", "6 7"], max_generation_steps=8, return_logits=True))
    got, want, base = outs
    assert got.text == want.text != base.text
    for a, b in zip(got.logits, want.logits):
        np.testing.assert_allclose(a, b, atol=1e-5)
