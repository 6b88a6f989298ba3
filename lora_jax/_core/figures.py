"""Figures of results: written whole or not at all, and shown in notebooks below their table."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import os
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_jax._core.errors import LoRAError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextlib.contextmanager
def needs_matplotlib() -> Generator[None, None, None]:
    """Says what to install where an import of matplotlib fails."""
    try:
        yield
    except ImportError as e:
        if (e.name or "").partition(".")[0] != "matplotlib":
            raise
        raise LoRAError("a plot needs matplotlib: pip install 'lora_jax[plot]'") from e


def written(figure: Figure, path: str | os.PathLike | None) -> Figure:
    """The figure, and its file, which is replaced once the new one is complete."""
    if path is not None:
        path = Path(path)
        # Beside the target, so that the replacement is atomic; the suffix says the format.
        new = path.with_name(f".{os.getpid()}.{path.name}")
        try:
            figure.savefig(new)
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
    return figure


class Shown:
    """A result that a notebook shows as its printed table and its figure."""

    if TYPE_CHECKING:  # a method of each kind

        def plot(self) -> Figure: ...

    def _repr_png_(self) -> bytes | None:
        try:
            drawn = self.plot()
        # Without matplotlib, say, a notebook shows the table alone.
        except LoRAError:
            return None
        out = io.BytesIO()
        drawn.savefig(out, format="png")
        return out.getvalue()

    def _repr_html_(self) -> str:
        png = self._repr_png_()
        text = f"<pre>{html.escape(str(self))}</pre>"
        if png is None:
            return text
        data = base64.b64encode(png).decode()
        alt = type(self).__name__.lower()
        return f'{text}<img alt="{alt}" src="data:image/png;base64,{data}">'
