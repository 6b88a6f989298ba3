"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from pathlib import Path

from lora_jax._core.errors import LoRAError
from lora_jax.peft._file import partial, remove, writing


@contextlib.contextmanager
def replacing(out: Path) -> Generator[Path, None, None]:
    """A path beside `out` for what becomes `out` if all goes well, and is removed otherwise."""
    # Also a link that leads nowhere.
    if os.path.lexists(out):
        raise LoRAError(f"{out} is there already, and is left as it is; give another path")
    if not out.parent.is_dir():
        raise LoRAError(f"{out}: there is no folder {out.parent}")
    with writing(out):
        new = partial(out)
    try:
        yield new
        if os.path.lexists(out):
            raise LoRAError(f"{out} was made meanwhile, and is left as it is; give another path")
        with writing(out):
            os.rename(new, out)
    # The message names the final path: the one beside it is gone when someone reads it.
    except LoRAError as e:
        raise LoRAError(str(e).replace(str(new), str(out))) from e
    finally:
        remove(new)
