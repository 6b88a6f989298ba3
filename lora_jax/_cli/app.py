"""The commands of `lora-jax`: arguments in, text and exit codes out. The work is done elsewhere."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from lora_jax._cli.flags import in_flags
from lora_jax._cli.terminal import echo, merging, say
from lora_jax._core.errors import LoRAError

# This file imports no JAX outside of the commands: `--help` does not wait for it.

# The largest rank that a file may have.
MOST = (1 << 24) - 1

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class _Group(TyperGroup):
    """What a person can do something about is a message on stderr and status 1; Ctrl-C is 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                # The library's kind of warning: each as a line, without the file and the code.
                warnings.simplefilter("default", UserWarning)
                warnings.showwarning = lambda message, *_, **__: echo(
                    f"warning: {in_flags(str(message))}", err=True
                )
                return super().invoke(ctx)
        except LoRAError as e:
            echo(f"error: {in_flags(str(e))}", err=True)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        # An OSError too, but no trouble (`| head`): click ends quietly.
        except BrokenPipeError:
            raise
        except OSError as e:
            echo(f"error: {e}", err=True)
        raise typer.Exit(1)


def _examples(*lines: str) -> str:
    """The end of a help, a line each."""
    # One newline is a space there.
    return "\n\n".join(("Examples:", *lines))


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # As tables: rules where a person sees them. To import what draws them takes half of a help.
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="LoRA adapters on disk: look at them, convert, merge, combine and compare them.",
    epilog=_examples(
        "lora-jax inspect adapter/",
        "lora-jax merge --help          # the options of a command, and examples",
        "lora-jax --install-completion  # once: your shell completes what you type",
    ),
)


Ignore = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore", metavar="SETTING", help="A setting of adapter_config.json to pass over."
    ),
]

Rename = Annotated[
    list[str] | None,
    typer.Option(
        metavar="OLD=NEW",
        help="Replace a regular expression in the names of PEFT's tensors, such as "
        "^=base_model.model.",
    ),
]

Conv1d = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES", help="Modules with a square weight stored (in, out); none for none."
    ),
]

KeepBase = Annotated[
    bool,
    typer.Option("--keep-base", help="Keep the base's table where the adapter has another."),
]

Experts = Annotated[
    str | None,
    typer.Option(metavar="NAMES", help="The order of the parameters in a module of experts: a,b."),
]

Json = Annotated[bool, typer.Option("--json", help="JSON, for machines.")]


def _version(value: bool) -> None:
    if value:
        import lora_jax

        echo(lora_jax.__version__)
        raise typer.Exit


@app.callback()
def _all(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _renamed(texts: list[str] | None) -> dict[str, str]:
    """OLD=NEW, split at the last "=", which no name of a tensor has."""
    odd = [t for t in texts or () if "=" not in t]
    if odd:
        raise typer.BadParameter(f"expected OLD=NEW, found {odd[0]!r}", param_hint="--rename")
    return {old: new for old, _, new in (t.rpartition("=") for t in texts or ())}


def _names(text: str | None) -> list[str] | None:
    """a,b as a list; "none" as an empty one."""
    if text is None:
        return None
    return [] if text == "none" else [part.strip() for part in text.split(",") if part.strip()]


@app.command(
    epilog=_examples(
        "lora-jax inspect adapter/",
        "lora-jax inspect runs/mine/        # says where in it the checkpoints are",
        "lora-jax inspect checkpoints/300 --json",
    )
)
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="A PEFT folder, a checkpoint directory (or a step in it), a base model, or a "
            "folder with some of these in it."
        ),
    ],
    as_json: Json = False,
    ignore: Ignore = None,
    rename: Rename = None,
) -> None:
    """Show what is in an adapter: leaves, ranks, alphas, norms, sizes. No base model is needed."""
    from lora_jax._cli.inspect import inspect

    found = inspect(path, ignore or (), _renamed(rename))
    say(*([json.dumps(found.as_json())] if as_json else found.blocks()))


@app.command(
    epilog=_examples(
        "lora-jax convert adapter/ run/ --params model.safetensors",
        "lora-jax convert adapter/ run/ --params mymodel:params --mapping names.json",
        "lora-jax convert run/ adapter/                      # what `convert` wrote",
        "lora-jax convert checkpoints/300 adapter/ --torch model.safetensors",
    )
)
def convert(
    src: Annotated[Path, typer.Argument(help="A PEFT folder, or a checkpoint directory.")],
    dst: Annotated[Path, typer.Argument(help="The new one; it must not exist.")],
    params: Annotated[
        str | None,
        typer.Option(
            help="The JAX parameters: safetensors whose names are the leaves' paths, an orbax "
            "checkpoint, or module:function, which returns params or (params, survey). Only "
            "shapes are read. Not needed for a checkpoint that `convert` wrote."
        ),
    ] = None,
    mapping: Annotated[
        Path | None,
        typer.Option(help="JSON: {torch name or regular expression: leaf or leaves}."),
    ] = None,
    torch: Annotated[
        Path | None,
        typer.Option(
            help="The torch model's names and shapes: safetensors, or JSON {name: shape}."
        ),
    ] = None,
    to: Annotated[
        Literal["peft", "orbax"] | None, typer.Option(help="What SRC is not; not needed.")
    ] = None,
    experts: Experts = None,
    experts_a: Annotated[
        Literal["in", "out"] | None,
        typer.Option(help="What PEFT's lora_A of experts runs along."),
    ] = None,
    conv1d: Conv1d = None,
    keep_base: KeepBase = False,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Of the LoRA that a type of PEFT's that is none (LoHa, LoKr, …) becomes.",
            max=MOST,
        ),
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Or the smallest ranks that keep this share of ‖Δ‖².")
    ] = None,
    ignore: Ignore = None,
    rename: Rename = None,
) -> None:
    """Convert a PEFT folder to a checkpoint directory of lora_jax, or back; prints the mapping."""
    from lora_jax._cli.convert import convert

    more: dict[str, Any] = {"experts": _names(experts), "experts_a": experts_a, "rank": rank}
    more |= {"energy": energy, "conv1d": _names(conv1d), "keep_base": keep_base}
    more |= {"ignore": ignore or (), "rename": _renamed(rename)}
    say(str(convert(src, dst, params, mapping, torch, to, **more)))


@app.command(
    epilog=_examples(
        "lora-jax merge base/ adapter/ merged/",
        "lora-jax merge base.safetensors adapter/ merged.safetensors",
        "lora-jax merge base/ adapter/ merged/ --mapping names.json",
    )
)
def merge(
    base: Annotated[Path, typer.Argument(help="A safetensors file, or a folder of transformers.")],
    adapter: Annotated[Path, typer.Argument(help="A PEFT folder.")],
    out: Annotated[Path, typer.Argument(help="The new file or folder; it must not exist.")],
    mapping: Annotated[
        Path | None,
        typer.Option(help="JSON: {torch name or regular expression: name in the base}."),
    ] = None,
    conv1d: Conv1d = None,
    experts: Experts = None,
    experts_a: Annotated[
        Literal["first", "last"] | None,
        typer.Option(help="Which axis of their weights lora_A of experts runs along."),
    ] = None,
    keep_base: KeepBase = False,
    ignore: Ignore = None,
    rename: Rename = None,
) -> None:
    """Merge a PEFT adapter into a base model, one tensor at a time."""
    from lora_jax._cli.merge import merge_files
    from lora_jax.peft._file import read_json

    more: dict[str, Any] = {"experts": _names(experts), "experts_a": experts_a}
    more |= {"conv1d": _names(conv1d), "keep_base": keep_base}
    more |= {"ignore": ignore or (), "rename": _renamed(rename)}
    more |= {"mapping": None if mapping is None else read_json(mapping)}
    with merging() as (progress, starts):
        placed, left = merge_files(base, adapter, out, progress=progress, starts=starts, **more)
    if left:
        echo(f"left out: {', '.join(map(str, left))}", err=True)
    count = len(placed.parts)
    echo(f"{out}: {count} tensor{'s' * (count != 1)} of {base} changed")


@app.command(
    epilog=_examples(
        "lora-jax combine sum/ one/:0.5 two/:-1 --rank 16",
        "lora-jax combine soup/ one/ two/ three/ --method ties --energy 0.95",
    )
)
def combine(
    out: Annotated[Path, typer.Argument(help="The new PEFT folder; it must not exist.")],
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER[:WEIGHT]...", help="PEFT folders of one base; weight 1."),
    ],
    rank: Annotated[
        int | None, typer.Option(help="The rank of the result, by SVD.", max=MOST)
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Or the smallest ranks that keep this share of ‖Δ‖².")
    ] = None,
    method: Annotated[
        Literal["sum", "ties", "dare", "knots"], typer.Option(help="What is made of the updates.")
    ] = "sum",
    density: Annotated[
        float | None, typer.Option(help="The share of elements that these keep.", min=0, max=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="For what dare drops.", min=0, max=(1 << 32) - 1)] = 0,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="One rank and alpha for all, as vLLM needs.")
    ] = False,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option(help="The tensors' type.")
    ] = "fp32",
    ignore: Ignore = None,
    rename: Rename = None,
) -> None:
    """Write the weighted sum of adapters' updates, or a soup, exactly or of a smaller rank."""
    if rank is not None and energy is not None:
        raise typer.BadParameter("expected one of --rank and --energy", param_hint="--energy")
    # `min` includes 0, which the library would refuse by the name of its own argument.
    if density == 0:
        raise typer.BadParameter("expected more than 0", param_hint="--density")
    # The library would give leaves in full, base + Δ; here there is no base.
    if method in ("ties", "dare") and rank is None and energy is None:
        message = f"{method} is of full rank; give --rank or --energy"
        raise typer.BadParameter(message, param_hint="--method")
    import jax.numpy as jnp

    from lora_jax._cli.combine import combine_folders

    folders, weights = zip(*map(_weighted, adapters))
    kept: dict[str, Any] = {
        "rank": rank,
        "energy": energy,
        "uniform": uniform,
        "ignore": ignore or (),
    }
    kept |= {"method": method, "density": density, "seed": seed, "rename": _renamed(rename)}
    ranks = combine_folders(out, folders, weights, dtype=jnp.dtype(DTYPES[dtype]), **kept)
    # "8", or "4–16" where they differ.
    span = "–".join(map(str, sorted({min(ranks.values()), max(ranks.values())})))
    echo(f"{out}: {len(ranks)} update{'s' * (len(ranks) != 1)} of rank {span}")


def _weighted(text: str) -> tuple[str, float]:
    """ADAPTER:WEIGHT, unless a folder has that name."""
    folder, colon, weight = text.rpartition(":")
    # What is no number behind the colon is part of the name.
    if colon and not Path(text).exists():
        with contextlib.suppress(ValueError):
            return folder, float(weight)
    return text, 1.0


@app.command(
    epilog=_examples(
        "lora-jax diff one/ two/",
        "lora-jax diff one/ two/ --tolerance 1e-3 --json",
    )
)
def diff(
    first: Annotated[Path, typer.Argument(help="A PEFT folder.")],
    second: Annotated[Path, typer.Argument(help="Another one of the same base.")],
    tolerance: Annotated[
        float, typer.Option(help="Up to which relative distance two updates are equal.", min=0)
    ] = 0.0,
    as_json: Json = False,
    ignore: Ignore = None,
    rename: Rename = None,
) -> None:
    """Compare two PEFT folders. Exits with 0 if they are equal, 1 if they differ, 2 on trouble."""
    from lora_jax._cli.diff import diff_folders

    # Caught here, as 1 means that they differ.
    try:
        more = {"ignore": ignore or (), "rename": _renamed(rename)}
        found = diff_folders(first, second, tolerance=tolerance, **more)
    except (LoRAError, OSError) as e:
        echo(f"error: {in_flags(str(e))}", err=True)
        raise typer.Exit(2) from None
    say(*([json.dumps(found.as_json())] if as_json else found.blocks()))
    raise typer.Exit(0 if found.equal else 1)
