"""Files of other tools, brought to PEFT's names and settings: mlx-lm, diffusers, kohya.

What comes out is an `AdapterFile` as if PEFT had written it, so that all that follows knows one
format. No tensor is read but kohya's alphas, which are single numbers.
"""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_jax._core.errors import LoRAError, quoted, raise_all
from lora_jax.peft._arguments import as_path, check_texts, one_of
from lora_jax.peft._config import peft_config
from lora_jax.peft._file import (
    AGAIN,
    CONFIG,
    TENSORS,
    AdapterFile,
    Stored,
    open_adapter,
    parse_json,
    read_config,
    read_tensors,
    reading,
)
from lora_jax.peft._keys import PREFIX
from lora_jax.peft._settings import as_alpha

MLX = "adapters.safetensors"

DIFFUSERS = "pytorch_lora_weights.safetensors"

FORMATS = ("peft", "mlx", "diffusers", "kohya")

# Names of tables, whose lora_a runs along the tokens as that of a product does along its inputs.
TABLE = re.compile(r"(.*\.)?(\w*emb\w*|wte|wpe)", re.I)

# The ends of diffusers' and kohya's names, over the years.
ENDS = [
    (re.compile(rf"(?P<module>.+?)(\.lora_{up}|\.lora_{old}|\.lora\.{old}|\.lora_linear_layer\.{old}"
                rf"|(?P<out>\.to_out)?_lora\.{old})\.weight"), kind)
    for up, old, kind in (("A", "down", "lora_A.weight"), ("B", "up", "lora_B.weight"))
] + [
    (re.compile(r"(?P<module>.+)\.alpha"), "alpha"),
    (re.compile(r"(?P<module>.+)\.lora_B\.bias"), "lora_B.bias"),
    (re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.weight)?"), "lora_magnitude_vector"),
]  # fmt: skip

# The models that a file of diffusers or kohya may have adapters of.
PARTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")

KOHYA = {
    "lora_unet": "unet",
    "lora_transformer": "transformer",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
}

# The longest first, as lora_te begins lora_te1 as well.
FLAT = re.compile(rf"({'|'.join(sorted(KOHYA, key=len, reverse=True))})_(.+)")


def open_any(
    folder: str | os.PathLike,
    max_bytes: int | None = None,
    rename: Mapping[str, str] | None = None,
    format: str | None = None,
    part: str | None = None,
) -> AdapterFile:
    """Opens an adapter of any tool.

    Args:
      folder: that of PEFT, mlx-lm or diffusers, or one safetensors file.
      format: one of `FORMATS`; None: by the names of the files and of the tensors.
      part: of which model, where a file has several: one of `PARTS`.
    """
    if format is not None:
        one_of(format, FORMATS, "format")
    check_texts(part=part)
    path = as_path(folder)
    alone = _is(path)
    single = path if alone else path / DIFFUSERS
    # In this order, where a folder holds several.
    names = {TENSORS: "peft", MLX: "mlx", DIFFUSERS: "single"}
    found = "single" if alone else next((f for n, f in names.items() if _is(path / n)), None)
    wanted = "single" if format in ("diffusers", "kohya") else format or found or "peft"
    if wanted != "single" and part is not None:
        raise LoRAError(
            f"{path}: part={part!r}, but an adapter of {wanted} is of one model: part=None"
        )
    if wanted == "peft":
        return open_adapter(folder, max_bytes, rename)
    if wanted == "mlx":
        if not _is(path / MLX):
            raise LoRAError(f"{path}: no {MLX}, which mlx-lm writes")
        config = read_config(path / CONFIG)
        tensors, _ = read_tensors(path / MLX, max_bytes, rename)
        return _mlx(path, config, tensors)
    if not _is(single):
        raise LoRAError(f"{path}: expected a safetensors file, or a folder with {DIFFUSERS}")
    tensors, metadata = read_tensors(single, max_bytes, rename)
    # Both tools give their one file any name: only those of its tensors tell them apart.
    flat = any(FLAT.match(name) for name in tensors)
    own = "kohya" if flat else "diffusers"
    if format not in (None, own):
        raise LoRAError(
            f"{path}: format={format!r}, but '{next(iter(tensors))}' is a name of {own}: "
            f"format={own!r}"
        )
    return _Single(AdapterFile(path, {}, tensors, single, own), metadata).read(part)


def _is(path: Path) -> bool:
    with reading(path):
        return path.is_file()


def _mlx(folder: Path, config: Mapping[str, Any], stored: Mapping[str, Stored]) -> AdapterFile:
    """mlx-lm: y = W·x + scale · ((x·lora_a)·lora_b); the same scale for every module."""
    where, failures = folder / CONFIG, []
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora", "full"):
        raise LoRAError(f"{where}: fine_tune_type={quoted(str(kind), 40)}, expected lora or dora")
    # A full fine-tuning has no factors to scale.
    given: Any = config.get("lora_parameters") if kind != "full" else {"rank": 1, "scale": 1.0}
    p: dict[str, Any] = given if isinstance(given, dict) else {}
    rank, scale, dropout = p.get("rank", 0), p.get("scale", "none"), p.get("dropout") or 0.0
    if type(rank) is not int or not 1 <= rank < 1 << 24:
        failures.append(f"lora_parameters: rank: expected an integer >= 1, found {rank!r:.40}")
    if type(scale) not in (int, float) or not abs(scale) < 1e12:
        failures.append(f"lora_parameters: scale: expected a number, found {scale!r:.40}")
    if "alpha" in p:
        failures.append(
            "lora_parameters: alpha: old releases of mlx-lm multiply scale by alpha / rank, later "
            "ones pass it over; write the scale that was meant, and leave alpha out"
        )
    raise_all(f"{where}: not a configuration of mlx-lm that can be loaded:", failures)
    tensors: dict[str, Stored] = {}
    for name, t in stored.items():
        new, turned = _of_mlx(name, t)
        tensors[PREFIX + new] = turned
    model = config.get("model")
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": as_alpha(rank, scale),
        "lora_dropout": dropout,
        "use_dora": kind == "dora",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model if isinstance(model, str) else None,
        # A table that is the head as well is adapted as both.
        "ensure_weight_tying": True,
    }
    return AdapterFile(folder, settings, tensors, folder / MLX, "mlx")


def _of_mlx(name: str, t: Stored) -> tuple[str, Stored]:
    """PEFT's name of a tensor, and the tensor turned to PEFT's order."""
    module, _, last = name.rpartition(".")
    table = TABLE.fullmatch(module) is not None
    if last == "m":
        return f"{module}.lora_magnitude_vector", t
    if last not in ("lora_a", "lora_b"):
        return name, t
    # In an embedding the factors are parameters, in other layers modules with a weight.
    end = ("lora_embedding_" if table else "lora_") + last[-1].upper() + ".weight" * (not table)
    # lora_a (in, rank), lora_b (rank, out); PEFT has (rank, in) and (out, rank).
    if len(t.shape) == 2:
        t = t.turned(1, 0)
    # Experts: lora_a (E, rank, in) stays, lora_b (E, out, rank) is turned to (out, rank, E).
    elif len(t.shape) == 3 and last == "lora_b":
        t = t.turned(1, 2, 0)
    return f"{module}.{end}", t


class _Single:
    """One file of diffusers or kohya."""

    def __init__(self, file: AdapterFile, metadata: Mapping[str, Any]):
        self.file, self.metadata = file, metadata
        self.failures: list[str] = []
        self.modules: dict[tuple[str, str], dict[str, str]] = {}  # (part, module): {end: key}
        self.first: dict[str, int] = {}  # part: rank of its first module
        self.configs: dict[str, Callable[[str, int], float] | None] = {}

    def read(self, part: str | None) -> AdapterFile:
        for name in self.file.tensors:
            self._sort(name)
        parts = list(dict.fromkeys(p for p, _ in self.modules))
        if part is not None and part not in parts:
            self.failures.append(f"part={part!r}, but it has {', '.join(map(repr, parts))}")
        chosen = part if part is not None else parts[0] if len(parts) == 1 else None
        tensors, ranks, alphas, dora = {}, {}, {}, False
        for (own, module), ends in self.modules.items():
            if part is not None and own != part:
                continue
            # Where `params` hold several models, the name keeps the part in front.
            name = module if chosen is not None or not own else f"{own}.{module}"
            alpha, a = ends.pop("alpha", None), ends.get("lora_A.weight")
            if a is None:
                self.failures.append(
                    f"'{next(iter(ends.values()), alpha)}': without its lora_down; {AGAIN}"
                )
                continue
            rank = (self.file.shape(a) or (1,))[0]
            # A rank of 0 is refused by `parse`, with the name of the tensor; here it would divide.
            ranks[name] = max(rank, 1)
            alphas[name] = self._alpha(own, module, ranks[name], alpha)
            dora |= "lora_magnitude_vector" in ends
            for end, key in ends.items():
                tensors[f"{PREFIX}{name}.{end}"] = self.file.tensors[key]
        raise_all(f"{self.file.path}: tensors that cannot be used:", self.failures)
        # The commonest value is the setting, so that patterns name the fewest modules.
        most = lambda values: collections.Counter(values.values()).most_common(1)[0][0]
        rank, alpha = most(ranks), most(alphas)
        settings = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            # Without ^ a pattern is the end of a name, and may be that of another module too.
            "rank_pattern": {"^" + re.escape(n): r for n, r in ranks.items() if r != rank},
            "alpha_pattern": {"^" + re.escape(n): a for n, a in alphas.items() if a != alpha},
            "use_dora": dora,
        }
        file = self.file
        return AdapterFile(file.folder, settings, tensors, file.path, file.format, chosen)

    def _sort(self, name: str) -> None:
        known = ((pattern.fullmatch(name), end) for pattern, end in ENDS)
        found, end = next((k for k in known if k[0]), (None, ""))
        if found is None:
            self.failures.append(
                f"'{name}': not a tensor of a LoRA (lora_A, lora_B, lora_down, lora_up, alpha); "
                "leave it out of the file, or rename= it to one"
            )
            return
        module = found["module"]
        if self.file.format == "kohya":
            flat = FLAT.fullmatch(module)
            own, module = (KOHYA[flat[1]], flat[2]) if flat else ("", module)
        else:
            first, _, rest = module.partition(".")
            own, module = (first, rest) if first in PARTS else ("", module)
            # Old releases: to_out_lora for to_out.0, self_attn.to_q for q_proj, a processor
            # between.
            module += ".to_out.0" if found.groupdict().get("out") else ""
            module = re.sub(r"\.self_attn\.to_(\w+?)(\.0)?$", r".self_attn.\1_proj", module)
            module = module.replace(".processor.", ".")
        ends = self.modules.setdefault((own, module), {})
        if end in ends:
            self.failures.append(f"'{name}': the same tensor as '{ends[end]}'")
        ends[end] = name

    def _alpha(self, part: str, module: str, rank: int, key: str | None) -> float:
        """A tensor's, that of diffusers' metadata, or the rank, as the tools take it: kohya of each
        module, diffusers of the first."""
        if key is not None:
            if self.file.shape(key) not in ((), (1,)):
                self.failures.append(f"'{key}' {self.file.shape(key)}: expected one number")
                return rank
            return float(self.file.read(key).reshape(()))
        if part not in self.configs:
            self.configs[part] = self._config(part)
        scale = self.configs[part]
        if scale is not None:
            return as_alpha(rank, scale(module, rank))
        # None anywhere: kohya takes the rank of the module, diffusers that of the first one.
        return rank if self.file.format == "kohya" else self.first.setdefault(part, rank)

    def _config(self, part: str) -> Callable[[str, int], float] | None:
        """The scales that diffusers' metadata give; it has the settings of PEFT's LoraConfig."""
        text = self.metadata.get("lora_adapter_metadata")
        if not isinstance(text, str):
            return None
        where = f"{self.file.path}, its lora_adapter_metadata"
        raw, start = parse_json(text.encode(), where), f"{part}." if part else ""
        # One text for all models: the settings of each begin with its part.
        own = {k.removeprefix(start): v for k, v in raw.items() if k.startswith(start)}
        return peft_config(own, where, names=len(self.file.tensors)).scale if own else None
