"""In: an adapter that PyTorch's PEFT, mlx-lm, diffusers or kohya wrote, as an adapter tree."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._core.errors import quoted, raise_all
from lora_jax._core.nnx import state_of
from lora_jax._core.numbers import COUNT, refused
from lora_jax._core.paths import flatten, nest
from lora_jax._core.table import table
from lora_jax._survey import Survey
from lora_jax._targets import Targets
from lora_jax.peft._arguments import as_float, as_names
from lora_jax.peft._build import Build
from lora_jax.peft._config import PeftConfig, peft_config
from lora_jax.peft._deltas import check
from lora_jax.peft._experts import on_leaves
from lora_jax.peft._file import CONFIG
from lora_jax.peft._find import Finder, finish
from lora_jax.peft._formats import open_any
from lora_jax.peft._hub import folder as on_disk
from lora_jax.peft._mapping import Entry, TorchMapping, as_table, leaf_infos
from lora_jax.peft._orders import Orders
from lora_jax.peft._parse import parse
from lora_jax.peft._parts import Parsed, Update
from lora_jax.peft._reduce import reduced
from lora_jax.peft._settings import kept, unknown

if TYPE_CHECKING:
    import chex


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """What `lora.peft.load` found.

    Attributes:
      adapters: the adapter tree, for `bind` and `merge`.
      config: adapter_config.json; of another tool, the PEFT settings that mean the same.
      unknown: what it holds that PEFT 0.17 to 0.21 does not know; `lora.peft.save` writes it again.
      mapping: which leaf each torch parameter is: print it, and give it to `lora.peft.save`.
      format: "peft", "mlx", "diffusers" or "kohya".
      kept: {torch name: share of ‖ΔW‖² that its singular values keep} of types that are no LoRA.
      invocation_tokens: of an aLoRA, those behind which the adapters are to be used; else None.

    >>> import jax.numpy as jnp, lora_jax as lora, tempfile
    >>> params, folder = {"q_proj": {"kernel": jnp.zeros((4, 3))}}, tempfile.mkdtemp()
    >>> node = lora.LoRA(jnp.ones((4, 2)), jnp.ones((2, 3)), 0.5, lora.Geometry((0,), (1,)))
    >>> mapping = lora.peft.mapping({"q_proj.weight": (3, 4)}, params)
    >>> lora.peft.save(folder, {"q_proj": {"kernel": node}}, mapping)
    >>> found = lora.peft.load(folder, params)
    >>> found.adapters["q_proj"]["kernel"].rank, found.config["lora_alpha"], list(found.mapping)
    (2, 1, ['q_proj.weight'])
    """

    adapters: dict
    config: Mapping[str, Any]
    mapping: TorchMapping
    format: str = "peft"
    kept: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __str__(self):
        # The name is a stranger's: what would move a terminal's cursor is escaped.
        of = quoted(str(self.config.get("base_model_name_or_path") or ""))[1:-1]
        lines = [
            f"{self.config.get('peft_type', 'LORA')} in the format of {self.format}"
            f"{f', of {of}' if of else ''}: {len(self.mapping)} torch parameters"
        ]
        if self.invocation_tokens is not None:
            lines.append(f"active behind the tokens {list(self.invocation_tokens)} alone (aLoRA)")
        if self.kept:
            rows = [(name, f"{share:.6f}") for name, share in self.kept.items()]
            lines.append(table(("torch", "share of ‖ΔW‖²"), rows))
        return "\n".join(lines)

    @property
    def invocation_tokens(self) -> tuple[int, ...] | None:
        return tuple(self.config.get("alora_invocation_tokens") or ()) or None

    def active(self, ids: chex.Array) -> chex.Array:
        """For which tokens an aLoRA is active: from the last place of its invocation tokens on.

        Args:
          ids: (..., T) tokens, without a cache; of a sequence that has no invocation, none.

        Returns:
          (..., T) booleans, for `lora.algebra.choose`; all of them true if it is no aLoRA.

        >>> import jax.numpy as jnp, lora_jax as lora
        >>> found = lora.peft.PeftAdapter({}, {"alora_invocation_tokens": [3, 5]}, None)
        >>> found.active(jnp.array([[3, 5, 1, 3, 5, 2], [3, 1, 5, 3, 2, 2]])).astype(int)
        Array([[0, 0, 0, 1, 1, 1],
               [0, 0, 0, 0, 0, 0]], dtype=int32)
        """
        ids, tokens = jnp.asarray(ids), self.invocation_tokens
        if tokens is None:
            return jnp.ones(ids.shape, bool)
        # begins[..., i]: whether the invocation begins at i; it has to end within the sequence.
        ahead = jnp.pad(ids, [(0, 0)] * (ids.ndim - 1) + [(0, len(tokens))], constant_values=-1)
        at = lambda n: jax.lax.slice_in_dim(ahead, n, n + ids.shape[-1], axis=-1)
        begins = jnp.stack([at(n) == token for n, token in enumerate(tokens)]).all(0)
        place = jnp.arange(ids.shape[-1])
        last = jnp.where(begins, place, -1).max(-1, keepdims=True)
        return (last >= 0) & (place >= last)

    @property
    def unknown(self) -> dict[str, Any]:
        return unknown(self.config)


def load(
    folder: str | os.PathLike,
    params: Any,
    survey: Survey | Targets | None = None,
    *,
    mapping: Mapping[str, Any] | TorchMapping | None = None,
    dtype: Any = None,
    doubled_out_proj: bool = True,
    conv1d: Sequence[str] | None = None,
    experts: Sequence[str] | None = None,
    experts_a: str | None = None,
    keep_base: bool = False,
    ignore: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    max_bytes: int | None = None,
    format: str | None = None,
    part: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    base: Any = None,
    revision: str | None = None,
    subfolder: str | None = None,
) -> PeftAdapter:
    """Reads an adapter of PEFT, mlx-lm, diffusers or kohya, for the parameters of a JAX model.

    Every tensor of the file is used, unless `ignore` names it, or the call fails. The folder may
    come from a stranger: it is checked before anything is allocated, and nothing in it is run.

    PEFT's other additive types (LoHa, LoKr, MiSS, HiRA, VeRA, GraLoRA, FourierFT, SHiRA, IA3, OFT)
    are read as the update ΔW that they make, and brought to a LoRA by its singular values: say with
    `rank` or `energy` how much of it is to be kept; print the result for the share that was.

    Args:
      folder: of PEFT (adapter_config.json, adapter_model.safetensors), of mlx-lm
        (adapters.safetensors), or of diffusers; the path of one safetensors file of diffusers or
        kohya; or "user/name", a repository of the Hugging Face hub (pip install 'lora_jax[hub]').
      params: the base parameters. Their values are read only where the file changes a part of a
        leaf, or adds to a bias; else they may be abstract.
      survey: how the function uses each leaf, or the `Targets` made of it. Without one, matrices
        are in × out, but for square ones without a name of Flax's; all else is an error.
      mapping: {torch name, or regular expression for it: leaf, or list of leaves}. The name is a
        parameter's, or a module's for its weight. The leaf may use the expression's groups, and may
        be a part of a leaf: "layers/q/kernel[{1}]" is one of a stack, "qkv/kernel[:, 0]" one of a
        fused kernel. Several leaves are what a fused torch weight is split into, in the order of
        its outputs. What it does not name is found by names and shapes, and an error where that is
        not certain; a name may lack first parts such as "model" or "transformer", but none that
        tells parts apart.
      dtype: of the adapters; None for the type in which they are stored.
      doubled_out_proj: PEFT up to 0.21 adds the update of a MultiheadAttention's out_proj twice, in
        training as in inference; False for an adapter that was trained otherwise.
      conv1d: modules whose square weight is stored (in, out), as GPT-2's Conv1D, rather than (out,
        in); needed only for those that were saved in full.
      experts: the order of the adapted parameters in the torch module of the experts, such as
        ["gate_up_proj", "down_proj"], where their shapes do not say which tensor is whose.
      experts_a: what lora_A of the experts runs along, "in" or "out", where the shapes fit both.
        Since PEFT 0.19.1 it is "in", but for parameters (experts, in, out) of a module without
        `is_transposed`; up to 0.18 it is the first of the two axes.
      keep_base: use `params` although the file holds another table for an adapted embedding.
      ignore: settings of the configuration to pass over; "r" where the tensors have other ranks.
      rename: {regular expression: text} to be replaced in the names of the tensors, one after the
        other, where they are not PEFT's: {"^": "base_model.model."}, {r"_orig_mod\\.": ""}.
      max_bytes: how large the tensors may be together; default twice the base in fp32.
      format: "peft", "mlx", "diffusers" or "kohya"; None: by the names of files and tensors.
      part: "unet", "transformer", "text_encoder", "text_encoder_2" …: the model of which the
        adapter is to be taken, where a file has several and `params` are one of them.
      rank: at most, of the LoRA that stands for a type that is none.
      energy: in its place, the share of ‖ΔW‖² that each keeps, in (0, 1]; 1 is all of it.
      base: parameters as `params`, whose values are read in place of theirs: for types whose ΔW
        depends on the weights (HiRA, IA3, OFT), where `params` are abstract or quantised.
      revision, subfolder: of a repository of the hub; a subfolder also of a path.

    Returns:
      A `PeftAdapter`.

    Raises:
      LoRAError: a file that is missing, damaged or a pickle; a repository that the hub does not
        give; a setting that is not supported; a tensor that no leaf, or more than one, fits; a type
        that needs `rank`, `energy` or values. All that are found at once are listed.

    >>> import jax.numpy as jnp, lora_jax as lora, tempfile
    >>> params = {"q_proj": {"kernel": jnp.zeros((4, 3))}}
    >>> node = lora.LoRA(jnp.ones((4, 2)), jnp.ones((2, 3)), 0.5, lora.Geometry((0,), (1,)))
    >>> mapping = lora.peft.mapping({"q_proj.weight": (3, 4)}, params)
    >>> folder = tempfile.mkdtemp()
    >>> lora.peft.save(folder, {"q_proj": {"kernel": node}}, mapping)
    >>> loaded = lora.peft.load(folder, params)
    >>> print(loaded.mapping)
    torch          kind    leaf           shape   in   out  batch
    -------------  ------  -------------  ------  ---  ---  -----
    q_proj.weight  linear  q_proj/kernel  (4, 3)  (0)  (1)  -
    >>> loaded.adapters["q_proj"]["kernel"].scale
    0.5
    """
    dtype, ignore = as_float(dtype), as_names(ignore, "ignore") or ()
    conv1d, experts = as_names(conv1d, "conv1d"), as_names(experts, "experts")
    raise_all("lora.peft.load(...):", refused(max_bytes=(max_bytes, COUNT.or_none)))
    leaves = leaf_infos(params, survey)
    if max_bytes is None:
        # Twice the base in fp32, which no adapter needs; of a small base some may.
        max_bytes = max(8 * sum(math.prod(x.shape) for x in leaves.values()), 64 << 20)
    file = open_any(on_disk(folder, revision, subfolder), max_bytes, rename, format, part)
    # One file of diffusers or kohya has no settings beside it.
    where = file.folder if file.format in ("diffusers", "kohya") else file.folder / CONFIG
    config = peft_config(file.config, where, ignore, len(file.tensors))
    check(rank, energy, file.folder, config.kind)
    parsed = parse(file, config, doubled_out_proj=doubled_out_proj)
    finder = Finder(leaves, as_table(mapping), file.format == "kohya", file.part)
    found = _found(parsed, finder, config, conv1d, experts, experts_a)
    deltas = [(hit, d) for d in parsed.deltas if (hit := finder.update(d.update)) is not None]
    # All tensors have their leaves before a value is read.
    finish(finder, str(file.folder))
    values = flatten(state_of(params))
    if base is not None:
        given = {p: x for p, x in flatten(state_of(base)).items() if p in leaves}
        odd = [
            f"'{p}' {np.shape(x)}, but {leaves[p].shape} in `params`"
            for p, x in given.items()
            if np.shape(x) != leaves[p].shape
        ]
        raise_all(
            "base: expected parameters as `params`:",
            odd if given else ["it has none of their leaves"],
        )
        values |= given
    shares: dict[str, float] = {}
    if deltas:
        file, more, shares = reduced(file, config, deltas, finder, values, rank, energy)
        found += more
    build = Build(file, config, values, dtype)
    for entry, what in found:
        build.add(entry, what)
    nodes = build.nodes()
    # Last, as tensors and tables are read for it.
    build.failures += parsed.unequal(file)
    for t in parsed.tables:
        if not keep_base:
            # A table (rows, features) is no Conv1D's, also where it is square.
            build.compare(finder.value(t.name, t.shape), t)
    finish(finder, str(file.folder))
    raise_all(f"{file.folder}: cannot be used with these parameters:", build.failures)
    entries = {entry.name: entry for entry, _ in found}
    leaf_of = TorchMapping(entries, build.untouched, kept(file.config))
    return PeftAdapter(nest(nodes), dict(file.config), leaf_of, file.format, shares)


def _found(
    parsed: Parsed,
    finder: Finder,
    config: PeftConfig,
    conv1d: Sequence[str] | None,
    experts: Sequence[str] | None,
    along: str | None,
) -> list[tuple[Entry, Any]]:
    """[(entry, what the file holds for it)] of everything."""
    # None where nothing is found: `finder` has the failure.
    found: list[tuple[Entry | None, Any]] = [finder.update(u) or (None, u) for u in parsed.updates]
    for group in parsed.experts:
        for entry, u in on_leaves(group, finder, experts, along):
            # As the PEFT would store them that `save` writes for, not as this file does.
            found.append((dataclasses.replace(entry, swapped=_swapped_now(u, config)), u))
    orders = Orders({v.name: v.shape for v in parsed.values}, conv1d)
    # Where one is a Conv1D's, others may be: the file has a part of the model, and is no proof.
    unsure = conv1d is None and (config.fan_in_fan_out or True in orders.votes)
    for v in parsed.values:
        in_out = None if unsure else orders.in_out(v.name)
        found.append((finder.value(v.name, v.shape, in_out), v))
    for r in parsed.rows:
        found.append((finder.rows(r), r))
    return [(e, what) for e, what in found if e is not None]


def _swapped_now(update: Update, config: PeftConfig) -> bool:
    """Whether today's PEFT has A of these experts along their outputs; see `on_leaves`."""
    if config.version is None or config.version < (0, 19):
        return False
    return update.swapped != (config.version == (0, 19, 0))
