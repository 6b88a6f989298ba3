"""PEFT's names of tensors: which module one is of, and what it is there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax._core.errors import LoRAError

# What the name of a module may have in it beside what one of Python's attributes may.
SIGNS = str.maketrans("-+:@", "____")

NO_NAME = "expected a dotted name of letters, digits and _-+:@, as torch's are"

# PEFT keeps a model in two wrappers, by these names.
PREFIX = "base_model.model."

# The last part of a key, and what it is. Anything else is a parameter in full (modules_to_save).
TAILS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "b_bias",
    "lora_embedding_A": "table_a",
    "lora_embedding_B": "table_b",
    "lora_A": "a",
    "lora_B": "b",
    "lora_E": "e",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "rows",
}

# The name of an adapter, which PEFT leaves out of its files, behind the name of a parameter.
NAMED = re.compile(
    r"(\.(?:lora_(?:embedding_)?[ABE]|lora_magnitude_vector|trainable_tokens_delta))"
    r"\.(\w+?)(?=\.weight$|\.bias$|$)"
)


def is_name(name: str) -> bool:
    """Whether it is a parameter's: attributes of Python's in a row, of any script. Names come into
    messages and into expressions as they are.

    >>> is_name("h.0.größe.weight"), is_name("h..weight"), is_name("h.a b")
    (True, False, False)
    """
    parts = name.translate(SIGNS).split(".")
    return len(name) <= 512 and all(part and f"_{part}".isidentifier() for part in parts)


def split(key: str) -> tuple[str, str | None]:
    """(module, one of `TAILS`' kinds) of a tensor, or (its whole name, None).

    Modules may have names such as "lora_gate", so only the end says what PEFT put there.

    >>> split("base_model.model.block.lora_gate.lora_A.default.weight")
    ('block.lora_gate', 'a')
    """
    found = NAMED.search(name := key.removeprefix(PREFIX))
    # A state dict that was saved as it is has the name of the adapter in it; this is PEFT's own.
    if found is not None and found[2] == "default":
        name = name[: found.end(1)] + name[found.end() :]
    tail = next((t for t in TAILS if name.endswith("." + t)), None)
    return (name, None) if tail is None else (name.removesuffix("." + tail), TAILS[tail])


def way_on(keys: Sequence[str]) -> str:
    """What `rename` makes PEFT's names of these, or ""."""
    ways: dict[str, str] = {}
    for key in keys:
        found = NAMED.search(key)
        if "_orig_mod." in key:  # torch.compile's
            ways[r"_orig_mod\."] = ""
        if found is not None and found[2] not in ("weight", "bias", "default"):
            ways[rf"(lora_\w+|_delta)\.{found[2]}\b"] = r"\1"
        if found is None and key.endswith((".lora_A", ".lora_B")):
            ways[r"(\.lora_[AB])$"] = r"\1.weight"
        plain = key.replace("_orig_mod.", "")
        before = plain.partition(PREFIX)[0] if PREFIX in plain else ""
        # DistributedDataParallel's "module.".
        if before:
            ways["^" + re.escape(before)] = ""
        elif not plain.startswith(PREFIX):
            ways[r"^(?!base_model\.model\.)"] = PREFIX
    return f"lora.peft.load(..., rename={ways})" if ways else ""


def renamed(
    tensors: Mapping[str, Any], rename: Mapping[str, str], where: object
) -> Mapping[str, Any]:
    """The tensors under the names that the caller's expressions make of theirs."""
    if not isinstance(rename, Mapping):
        raise LoRAError(f"rename: expected {{expression: text}}, found {type(rename).__name__}")
    out: dict[str, Any] = {}
    for name, stored in tensors.items():
        new = name
        for old, text in rename.items():
            try:
                new = re.sub(old, text, new)
            except (re.error, IndexError, TypeError) as e:
                raise LoRAError(
                    f"rename: {old!r}: {text!r} is not a regular expression and a text ({e}): "
                    f"rename={{'^': 'base_model.model.'}}"
                ) from None
        # Two names that become one would lose a tensor.
        if new in out or not is_name(new):
            raise LoRAError(
                f"{where}: rename makes '{name}' {new!r}, which is no name, or taken; "
                "end the expression with $, or name more of what is before it"
            )
        out[new] = stored
    return out
