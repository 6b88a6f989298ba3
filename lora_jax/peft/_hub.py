"""Folders of the Hugging Face hub, by huggingface_hub's own cache."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from lora_jax._core.errors import LoRAError
from lora_jax.peft._arguments import as_path, check_texts

NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)

# What a model or an adapter consists of: no pickles, and no second copy in another format.
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def folder(
    name: str | os.PathLike, revision: str | None = None, subfolder: str | None = None
) -> Path:
    """A folder on this machine: the path itself, or the snapshot of a repository "user/name".

    The hub is asked where no file or folder has this name. Its answers are cached as
    huggingface_hub does it, and HF_HUB_OFFLINE=1 takes what is in the cache alone.

    Raises:
      LoRAError: huggingface_hub is not installed, or does not have it; a revision of a path; a
        subfolder that leads out of the folder.

    >>> import tempfile
    >>> here = tempfile.mkdtemp()
    >>> folder(here) == Path(here)
    True
    """
    found = as_path(name)
    check_texts(revision=revision)
    inside = as_path("" if subfolder is None else subfolder)
    if inside.is_absolute() or ".." in inside.parts:
        raise LoRAError(f"{name}: subfolder={subfolder!r}: expected a path inside the folder")
    # What is on this machine comes first, also a link that leads nowhere.
    if isinstance(name, str) and NAME.fullmatch(name) and not os.path.lexists(name):
        found = _snapshot(name, revision, subfolder)
    elif revision is not None:
        raise LoRAError(
            f"{name}: revision={revision!r}, but this is a path on this machine; revisions are of "
            "a repository of the hub, 'user/name'"
        )
    return found if subfolder is None else found / subfolder


def _snapshot(name: str, revision: str | None, subfolder: str | None) -> Path:
    hub = _hub(name)
    inside = "" if subfolder is None else f"{Path(subfolder).as_posix()}/"
    try:
        path = hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=[inside + f for f in FILES],
            # Checkpoints of the training lie in folders below; consolidated.* is the model again.
            ignore_patterns=[inside + "*/*", inside + "consolidated*"],
        )
    # LocalEntryNotFound, without a network, is the first two.
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as e:
        at = "" if revision is None else f", revision {revision!r}"
        raise LoRAError(
            f"{name}: no such folder here, and the hub does not give it{at}: "
            f"{type(e).__name__}: {ascii(str(e)[:300])[1:-1]}"
        ) from None
    return Path(path)


def _hub(name: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise LoRAError(
            f"{name}: there is no such folder; to take it from the Hugging Face hub: "
            "pip install 'lora_jax[hub]'"
        ) from None
    return huggingface_hub
