"""The library's messages, as the command line says them."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

CALL = re.compile(
    r"lora\.(?:peft\.(?:load|mapping|save)\(\.\.\., |algebra\.resize\(adapters, (?=\w+=))"
)


# What is said in other words than by a call.
WORDS = (
    (re.compile(r"\bmapping=(\{r?\"(?:[^\"\\]|\\.)*\": \"[^\"]*\"\})"), "--mapping FILE, with {}"),
    (re.compile(r"\bdtype='float32'()"), "--dtype fp32"),
    (re.compile(r"\bconv1d=\[\]()"), "--conv1d none"),
    (re.compile(r"\bconv1d=\['([\w.]+)'\]"), "--conv1d {}"),
    (re.compile(r"\b(?:rank|energy)=None, ()"), ""),
    (re.compile(r", (?:rank|energy)=None\b()"), ""),
    (re.compile(r"(?<!\()\brank=(-?\d+)"), "--rank {}"),
    (re.compile(r"(?<!\()\benergy=([-\d.e]+\d)"), "--energy {}"),
    (re.compile(r"(?<!\()\bdensity=([-\d.e]+\d)"), "--density {}"),
    (re.compile(r"pass its values in `params`()"), "load it in Python, with the values of params"),
    (
        re.compile(r"lora\.peft\.load\(\.\.\., rank=\) and written as one by lora\.peft\.save()"),
        "`lora-jax convert --rank 16`, and written as one by `lora-jax convert` of that",
    ),
    (
        re.compile(r"lora\.algebra\.resize\(adapters, rank\)()"),
        "lora-jax combine OUT SRC --rank 16",
    ),
    (
        re.compile(r"found = (--ignore alora_invocation_tokens), then for each batch .*"),
        "{}, which takes it as active for all tokens",
    ),
    (
        re.compile(
            r"restore (?:one|another step) by lora\.checkpoint\.restore\(\.\.\., step=\.\.\.\)()"
        ),
        "name another step, as FOLDER/STEP",
    ),
)


def in_flags(text: str) -> str:
    """A message with flags in the place of the library's arguments.

    >>> in_flags("if so: lora.peft.load(..., ignore=['a', 'b'], keep_base=True).")
    'if so: --ignore a --ignore b --keep-base.'
    >>> in_flags("lora.peft.load(..., rename={'^': 'base_model.model.'})")
    "--rename '^=base_model.model.'"
    """
    out, at = "", 0
    # `at` is where the text goes on that is not yet copied.
    for start, stop, flags in _calls(text):
        out, at = out + text[at:start] + flags, stop
    out += text[at:]
    for pattern, words in WORDS:
        out = pattern.sub(lambda m, words=words: words.format(_json(m[1])), out)
    return out


def _calls(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, stop, the same in flags) of the calls in a message."""
    for found in CALL.finditer(text):
        ends = (m.end() for m in re.compile(r"\)").finditer(text, found.end()))
        # A parenthesis may end the call or something in it: the first that makes it parse ends it.
        for stop in ends:
            try:
                call = ast.parse(f"f({text[found.end() : stop]}", mode="eval").body
            except SyntaxError:
                continue
            if isinstance(call, ast.Call):
                yield found.start(), stop, " ".join(map(_flag, call.keywords))
            break


def _flag(argument: ast.keyword) -> str:
    name = str(argument.arg)
    if name == "base":
        return "in Python, lora.peft.load(..., base=params)"
    flag = "--" + name.replace("_", "-")
    try:
        value = ast.literal_eval(argument.value)
    # Code, such as survey=lora.survey(fn, params, x).
    except ValueError:
        return "--params module:function, which returns (params, survey)"
    if name == "mapping":
        return f"--mapping FILE, with {json.dumps(value)}"
    if value is True:
        return flag
    if name == "rename":
        return " ".join(f"{flag} {shlex.quote(f'{k}={v}')}" for k, v in value.items())
    if name == "ignore":
        return " ".join(f"{flag} {shlex.quote(v)}" for v in value)
    if isinstance(value, list):
        return f"{flag} {','.join(map(str, value)) or 'none'}"
    return f"{flag} {value}"


def _json(text: str) -> Any:
    return json.dumps(ast.literal_eval(text)) if text.startswith("{") else text
