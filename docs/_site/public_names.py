"""`{names} lora_jax.algebra`: the reference of a namespace, every name of its `__all__`."""

import dataclasses
import importlib
import inspect
import re

from docstrings import prose
from sphinx.util.docutils import SphinxDirective

from lora_jax.methods import Node

# What the interpreter asks of a weight, and nobody else.
INSIDE = {
    "AdaptedWeight": "drops apart scaled narrowed settled folded looked_up array gained".split()
}


def first_sentence(value) -> str:
    text = " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split())
    return prose(re.split(r"(?<=[^.]\.)(?<!\beq\.) ", text)[0].removesuffix(":"))


def kind(value) -> str:
    if inspect.isclass(value):
        return "autoexception" if issubclass(value, Exception) else "autoclass"
    return "autofunction" if callable(value) else "autodata"


def left_out(value) -> list[str]:
    """Fields, which the docstring has, and of a node what `Node` says of each."""
    fields = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    node = inspect.isclass(value) and value is not Node and issubclass(value, Node)
    return fields + (list(vars(Node)) if node else INSIDE.get(value.__name__, []))


def rest(module: str) -> str:
    """A table of the names, then each of them."""
    space = importlib.import_module(module)
    names = [n for n in space.__all__ if not inspect.ismodule(getattr(space, n))]
    lines = [f".. py:module:: {module}", ""]
    lines += [".. list-table::", "   :widths: 25 75", "   :class: names", ""]
    for name in names:
        lines += [f"   * - :py:obj:`{name}`", f"     - {first_sentence(getattr(space, name))}"]
    lines.append("")
    for name in names:
        value = getattr(space, name)
        lines += [f".. {kind(value)}:: {name}"]
        if inspect.isclass(value):
            lines += ["   :members:"]
        if left := left_out(value):
            lines += [f"   :exclude-members: {', '.join(left)}"]
        lines += [""]
    return "\n".join(lines)


class Names(SphinxDirective):
    required_arguments = 1

    def run(self):
        text = f"```{{eval-rst}}\n{rest(self.arguments[0])}\n```"
        return self.parse_text_to_nodes(text)


def setup(app):
    app.add_directive("names", Names)
    return {"parallel_read_safe": True}
