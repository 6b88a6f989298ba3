"""What tests/support/damage.py draws from: names, numbers, expressions and files that are wrong."""

import pickle

from hypothesis import strategies as st

PREFIX = "base_model.model."
EDGES = [0, 1, 2, 3, -1, 2**31, 2**40, 2**48, 2**63, 2**64, 10**30, True, None, 1.5, 1e308, "1", []]
NASTY = [*EDGES, -0.0, "", {}, [[]], [None]]
NASTY += ["all-linear", "none", False, [1, 2], {"a": "b"}, "/etc"]
EXPRESSIONS = [
    "(a+)+$", "(a|a)*b", "((a*)*)*b", "(", "(?i)lin", "a{99999}", "(?<=a)b", r"(.)\1", "[z-a]",
    ".*(lin|q_proj)", "lin|c1d", "^lin", r"layers\.\d+.*", "(?!x).*", "lin$", ".*", "(?:.*\\.)?head",
    "((a{300}){300}){300}",
]  # fmt: skip
NAMES = [
    "", ".", "..", "a..b", "/etc/passwd", "../../x", "C:\\x", "a\0b", "\ud800", "q\n", "\x1b[31m",
    "é", "x" * 513, "x" * 1_000_000, "__metadata__", PREFIX, PREFIX + ".", "lora_A.weight", " ",
]  # fmt: skip
MODULES = ["lin", "c1d", "emb", "head", "lin.base_layer", "attn", "out", "nothing", "lin.lin"]
MODULES += ["model.layers.0.self_attn.q_proj", "model.layers.7.self_attn.q_proj", "experts"]
TAILS = ["lora_A.weight", "lora_B.weight", "lora_A", "lora_B", "lora_E", "lora_embedding_A", "bias"]
TAILS += ["lora_embedding_B", "lora_B.bias", "lora_magnitude_vector", "weight", "lora_X.weight"]
TAILS += ["token_adapter.trainable_tokens_delta", "modules_to_save.weight", "original_module.bias"]
JSON = st.recursive(
    st.sampled_from(NASTY) | st.text(max_size=8) | st.integers() | st.floats(allow_nan=False),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
    max_leaves=6,
)
LARGE = [b"[" * 200_000, b'{"a":' * 200_000, b"[" + b"9" * 5000 + b"]", b'{"r": NaN}', b"\xff\xfe"]
LARGE += [b"", b"{}", b"[]", b"null"]
LARGE += [b" " * 70_000, b'{"a": 1, "a": 1}', b'{"r": 1e999}', b"\0" * 99]
LARGE += [pickle.dumps({"r": 1}), b"PK\3\4" + bytes(99)]
LARGE += [b"GGUF\3\0\0\0" + bytes(64), b'{"\\ud800": 1}']
