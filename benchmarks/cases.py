"""What is measured: the training cases, and the weights and data that all arms share."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import llama
from flax import traverse_util

SIZE = dict(vocab=256, width=512, hidden=1408, heads=8, layers=2)
TOKENS = (2, 512)


@dataclasses.dataclass(frozen=True)
class Case:
    targets: tuple[str, ...]
    rank: int
    scan: bool = False
    dtype: jnp.dtype = jnp.float32


CASES = {
    "q,v r=8": Case(("q", "v"), 8),
    "all linears r=16": Case(llama.ALL, 16),
    "all linears r=16 scan+remat": Case(llama.ALL, 16, scan=True),
    "all linears r=16 bf16": Case(llama.ALL, 16, dtype=jnp.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """A case made concrete.

    Attributes:
      config: of the plain model.
      params: the base, in the model's dtype.
      adapters: {path of the layer: {"a": (in, rank), "b": (rank, out)}}, fp32, neither zero.
      ids: the tokens.
    """

    case: Case
    config: llama.Config
    params: dict
    adapters: dict[tuple[str, ...], dict[str, jax.Array]]
    ids: jax.Array

    @property
    def model(self) -> llama.Llama:
        return llama.Llama(self.config)


def setup(case: Case, size=SIZE, tokens=TOKENS) -> Setup:
    config = llama.Config(**size, scan=case.scan, dtype=case.dtype, rank=case.rank, scale=2.0)
    ids = jax.random.randint(jax.random.key(0), tokens, 0, config.vocab)
    params = llama.Llama(config).init(jax.random.key(1), ids)["params"]
    params = jax.tree.map(lambda x: x.astype(case.dtype), params)
    adapters = {}
    for (*path, name), kernel in traverse_util.flatten_dict(params).items():
        if name == "kernel" and path[-1] in case.targets:
            key_a, key_b = jax.random.split(jax.random.key(len(adapters)))
            *stacked, n_in, n_out = kernel.shape
            adapters[tuple(path)] = {
                "a": jax.random.normal(key_a, (*stacked, n_in, case.rank)) / n_in**0.5,
                "b": jax.random.normal(key_b, (*stacked, case.rank, n_out)) * 0.02,
            }
    return Setup(case, config, params, adapters, ids)
