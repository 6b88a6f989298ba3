"""Models as people write them: Linen, NNX, bare functions of arrays, and those of transformers."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import rand
from flax import nnx
from jax import lax

import lora_jax as lora

VOCAB, WIDTH, WIDE = 50, 16, 24
K = jax.random.key(5)


def normal(i, *shape):
    return rand.normal(jax.random.fold_in(K, i), shape) / 2


IDS = jnp.array([[5, 3, 9, 11, 2], [7, 8, 1, 4, 2]])
X, IMAGE = normal(1, 2, 5, WIDTH), normal(2, 2, 8, 8, 3)


# ---------------------------------------------------------------- Linen
class Block(nn.Module):
    """A pre-norm transformer block, shaped for nn.scan: (carry, input) -> (carry, output)."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(nn.LayerNorm()(x))
        h = nn.gelu(nn.Dense(WIDE, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH, name="down")(h), None


class Transformer(nn.Module):
    """Two blocks, in a loop or as one scanned and rematerialised; the head is the embedding."""

    scanned: bool = False

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(VOCAB, WIDTH, name="embed")
        x = embed(ids)
        if self.scanned:
            stack = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            x, _ = stack(name="layers")(x, None)
        else:
            for i in range(2):
                x, _ = Block(name=f"layer_{i}")(x)
        return embed.attend(nn.LayerNorm()(x))


class ConvNet(nn.Module):
    """Convolution, depthwise convolution, batch norm, dropout; `features` is a second method."""

    @nn.compact
    def __call__(self, x, train=True):
        return nn.Dense(3, name="head")(self.features(x, train))

    @nn.compact
    def features(self, x, train=True):
        x = nn.Conv(8, (3, 3), strides=2, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Conv(16, (3, 3), feature_group_count=8, name="depthwise")(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.3, deterministic=not train)(x)
        return nn.gelu(nn.Conv(8, (1, 1), name="pointwise")(x)).mean((1, 2))


class Experts(nn.Module):
    """Three experts made by nn.vmap, summed, and a head; of one input each, or of one for all."""

    shared: bool = False

    @nn.compact
    def __call__(self, x):
        experts = nn.vmap(
            nn.Dense, in_axes=None if self.shared else 0, axis_size=3,
            variable_axes={"params": 0}, split_rngs={"params": True},
        )  # fmt: skip
        x = x if self.shared else jnp.stack([x, -x, 2 * x])
        return nn.Dense(3, name="head")(nn.tanh(experts(8, name="experts")(x)).sum(0))


class Latents(nn.Module):
    """Learned queries attend to the input, as in Perceiver, DETR and Q-Former."""

    @nn.compact
    def __call__(self, x):
        latents = self.param("latents", nn.initializers.normal(1.0), (3, WIDTH))
        latents = jnp.broadcast_to(latents, (x.shape[0], 3, WIDTH))
        h = nn.MultiHeadDotProductAttention(num_heads=2, name="cross")(latents, x)
        return nn.Dense(3, name="head")(nn.tanh(h).mean(1))


# name -> (layer, its input, its leaves); a Dense head follows, which "all-linear" leaves out
LAYERS = {
    "MultiHeadDotProductAttention": (
        nn.MultiHeadDotProductAttention(num_heads=2), X, ["query,key,value,out"]),
    "Conv, grouped, circular": (
        nn.Conv(8, (3,), feature_group_count=4, padding="CIRCULAR"), X, [""]),
    "ConvTranspose": (nn.ConvTranspose(6, (3, 3), strides=(2, 2)), IMAGE, [""]),
    "ConvTranspose, transposed": (
        nn.ConvTranspose(6, (3, 3), strides=(2, 2), transpose_kernel=True), IMAGE, [""]),
    "ConvLocal": (nn.ConvLocal(4, (3,)), X, [""]),
    "DenseGeneral": (nn.DenseGeneral((2, 4), axis=(-2, -1)), IMAGE, [""]),
    "DenseGeneral, batched": (nn.DenseGeneral(4, axis=-1, batch_dims=(0,)), X, [""]),
    "Einsum": (nn.Einsum((16, 2, 4), "btd,dhk->bhtk"), X, [""]),
    "LSTMCell": (nn.RNN(nn.LSTMCell(6)), X, ["cell/ii,if,ig,io,hi,hf,hg,ho"]),
    "GRUCell": (nn.RNN(nn.GRUCell(6)), X, ["cell/ir,iz,in,hr,hz,hn"]),
    "Embed into Dense": (nn.Sequential([nn.Embed(VOCAB, 6), nn.Dense(4)]), IDS, ["layers_1"]),
}  # fmt: skip


# ---------------------------------------------------------------- NNX
class NnxBlock(nnx.Module):
    """A pre-norm block with a convolution."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.conv = nnx.Conv(WIDTH, WIDE, (3,), rngs=rngs)
        self.down = nnx.Linear(WIDE, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.down(nnx.gelu(self.conv(x)))


class NnxTransformer(nnx.Module):
    """Two blocks in a loop, or stacked by nnx.vmap and run by nnx.scan, each through `wrap`."""

    def __init__(self, rngs: nnx.Rngs, scanned: bool = False, wrap=lambda f: f):
        self.scanned, self.wrap = scanned, wrap
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        if scanned:
            self.layers = nnx.split_rngs(splits=2)(nnx.vmap(NnxBlock))(rngs)
        else:
            self.layers = nnx.List([NnxBlock(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        step = self.wrap(lambda x, block: block(x))
        if self.scanned:
            x = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        else:
            for block in self.layers:
                x = step(x, block)
        return self.head(x)


def split_state():
    graph, state = nnx.split(NnxTransformer(nnx.Rngs(0)))
    return lambda s, x: nnx.merge(graph, s)(x), state


def split_params():
    graph, params, rest = nnx.split(NnxTransformer(nnx.Rngs(0), wrap=nnx.remat), nnx.Param, ...)
    return lambda p, x: nnx.merge(graph, p, rest)(x), params


def pure_dict():
    graph, state = nnx.split(NnxTransformer(nnx.Rngs(0)))

    def fn(p, x):
        own = jax.tree.map(lambda v: v, state)
        nnx.replace_by_pure_dict(own, p)
        return nnx.merge(graph, own)(x)

    return fn, nnx.to_pure_dict(state)


def whole_module():
    return lambda module, x: module(x), NnxTransformer(nnx.Rngs(0))


# (function of parameters, parameters) of one NNX model, in the ways that people hold one
NNX_FORMS = (split_state, split_params, pure_dict, whole_module)


# ---------------------------------------------------------------- functions of arrays
def kv_packed(p, x):
    """Gemma: keys and values in one parameter (2, heads, d, k)."""
    k, v = jnp.einsum("btd,chdk->cbthk", x, p["kv_einsum"]["w"])
    return jnp.einsum("bthk,bshk->bths", jnp.tanh(k), v)


def dispatched(p, x):
    """Experts by dispatch to the slots of each, (tokens, experts, slots)."""
    dispatch = jax.nn.one_hot(jnp.arange(20).reshape(2, 5, 2) % 6, 6)[:, :, 0].reshape(2, 5, 3, 2)
    slots = jnp.einsum("btd,btes->besd", x, dispatch)
    return jnp.einsum("besk,btes->btk", jnp.einsum("besd,edk->besk", slots, p["experts"]), dispatch)


def ragged(p, x):
    return lax.ragged_dot(x.reshape(10, WIDTH), p["experts"], jnp.array([2, 5, 3]))


def two_orders(p, x):
    """One leaf name, once in × out and once out × in."""
    return jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"].T


def fused(p, x):
    """One product for queries, keys and values that are stored apart."""
    q, k, v = jnp.split(x @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1), 3, axis=-1)
    return jnp.tanh(q) * jnp.tanh(k) * v


FUSED = {"k": (16, 8), "q": (16, 8), "v": (16, 8)}
KV, STACK = {"kv_einsum": {"w": (2, 2, 16, 4)}}, {"experts": (3, 16, 8)}
KERNELS = {"a": {"kernel": (16, 8)}, "b": {"kernel": (12, 8)}}
OWN = [lora.Rule("kv_einsum/w", batch_axes=(0,))]
# name -> (function, shapes of the parameters, rules, geometry of each leaf)
BARE = {
    "one A for keys and values": (kv_packed, KV, (), [((2,), (0, 1, 3))]),
    "keys and values apart": (kv_packed, KV, OWN, [((2,), (1, 3), (0,))]),
    "dispatched experts": (dispatched, STACK, (), [((1,), (2,), (0,))]),
    "ragged experts": (ragged, STACK, (), [((1,), (2,), (0,))]),
    "fused in the model": (fused, FUSED, (), [((0,), (1,))] * 3),
    "both orders": (two_orders, KERNELS, (), [((0,), (1,)), ((1,), (0,))]),
}
# What is not a product of the leaf itself: name -> (function, what a survey says, what the error)
DERIVED = {
    "weight norm": (
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0)), "mul, div", "mul"),
    "product of weights": (lambda p, x: x @ (p["w"] @ p["v"].T), "dot_general", "dot_general"),
    "only returned": (lambda p, x: (x, p["w"].T), "unused", "output"),
}  # fmt: skip


# ---------------------------------------------------------------- transformers 4.57
SIZES = dict(
    vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=24, max_position_embeddings=32,
)  # fmt: skip
BERT = (
    "encoder/layer/#/attention/self/query,key,value",
    "encoder/layer/#/attention/output/dense",
    "encoder/layer/#/intermediate,output/dense",
)
VIT = ("encoder/layer/#/attention/attention/query,key,value", *BERT[1:])
DECODER = (
    "model/layers/#/self_attn/q_proj,k_proj,v_proj,o_proj",
    "model/layers/#/mlp/gate_proj,up_proj,down_proj",
)
OPT = ("self_attn/q_proj,k_proj,v_proj,out_proj", "fc1,fc2")
CROSS = "encoder_attn/q_proj,k_proj,v_proj,out_proj"
# class -> (configuration, settings, what "all-linear" means: not the embeddings, not the head)
HUGGING_FACE = {
    "FlaxBertModel": ("BertConfig", SIZES, BERT),
    "FlaxRobertaForSequenceClassification": (
        "RobertaConfig", SIZES | dict(num_labels=3),
        (*("roberta/" + p for p in BERT), "classifier/dense"),
    ),
    "FlaxGPT2LMHeadModel": (
        "GPT2Config", dict(vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=2, n_head=2),
        ("transformer/h/#/attn/c_attn,c_proj", "transformer/h/#/mlp/c_fc,c_proj"),
    ),
    "FlaxLlamaForCausalLM": ("LlamaConfig", SIZES, DECODER),
    "FlaxGemmaForCausalLM": (
        "GemmaConfig",
        SIZES | dict(num_key_value_heads=1, head_dim=8, hidden_activation="gelu_pytorch_tanh"),
        DECODER,
    ),
    "FlaxOPTForCausalLM": (
        "OPTConfig",
        dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, ffn_dim=24,
             max_position_embeddings=32, num_attention_heads=2, word_embed_proj_dim=16),
        tuple("model/decoder/layers/#/" + p for p in OPT),
    ),
    "FlaxBartForConditionalGeneration": (
        "BartConfig",
        dict(vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1,
             encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
             decoder_ffn_dim=24, max_position_embeddings=32),
        tuple(f"model/{part}/layers/0/{p}" for part, ps in
              (("encoder", OPT), ("decoder", (*OPT, CROSS))) for p in ps),
    ),
    "FlaxViTForImageClassification": (
        "ViTConfig",
        dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
             image_size=8, patch_size=4, num_labels=3),
        (*("vit/" + p for p in VIT), "vit/embeddings/patch_embeddings/projection"),
    ),
}  # fmt: skip
