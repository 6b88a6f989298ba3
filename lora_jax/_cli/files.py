"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from lora_jax._core.errors import LoRAError


@contextlib.contextmanager
def replacing(out: Path):
    """A path beside `out` for what becomes `out` if all goes well, and is removed otherwise."""
    if os.path.lexists(out):
        raise LoRAError(f"{out} is there already, and is left as it is; give another path")
    if not out.parent.is_dir():
        raise LoRAError(f"{out}: there is no folder {out.parent}")
    new = out.parent / f".{out.name}.{os.getpid()}.partial"
    try:
        yield new
        if os.path.lexists(out):
            raise LoRAError(f"{out} was made meanwhile, and is left as it is; give another path")
        os.rename(new, out)
    finally:
        if new.is_dir():
            shutil.rmtree(new)
        new.unlink(missing_ok=True)
