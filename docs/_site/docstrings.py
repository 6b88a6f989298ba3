"""Docstrings are plain text to read in a terminal; here they become reStructuredText.

`name` is a link, where there is such a name, other code in backticks is a literal, and `*` and `|`
mean themselves. Google's sections are napoleon's part, and come first.
"""

import dataclasses
import inspect
import re

import optax
from docutils import nodes
from sphinx import addnodes
from sphinx.domains.python import PyObject
from sphinx.util.inspect import stringify_signature
from sphinx.util.typing import stringify_annotation

CODE = re.compile(r"(\w?)`([^`]+)`(\w?)")
NAME = re.compile(r"[A-Za-z_][\w.]*")
SPECIAL = re.compile(r"(?<!\\)([*|])|(?<=\w)(_)(?!\w)")
# Fields and directives that napoleon has written, and doctests.
KEPT = re.compile(r"\s*(>>>|\.\.\. |\.\. |\.\.\.$)")


SCHEDULE = stringify_annotation(optax.ScalarOrSchedule, "smart", short_literals=False)


def code(match: re.Match) -> str:
    before, text, after = match.groups()
    text = " ".join(text.split())
    node = f":py:obj:`{text}`" if NAME.fullmatch(text) else f"``{text}``"
    return f"{before}\\ {node}" * bool(before) + node * (not before) + f"\\ {after}" * bool(after)


def prose(text: str) -> str:
    """One paragraph: what stands in backticks as code, and the rest without markup."""
    field = re.match(r"\s*:[^:`]+:", text)
    head = field[0] if field else ""
    parts = re.split(r"(\w?`[^`]+`\w?)", text[len(head) :])
    return head + "".join(
        CODE.sub(code, p) if i % 2 else SPECIAL.sub(r"\\\1\2", p) for i, p in enumerate(parts)
    )


def rest(lines: list[str]) -> list[str]:
    out, paragraph, doctest = [], [], False
    for line in [*lines, ""]:
        doctest = bool(line.strip()) and (doctest or line.lstrip().startswith(">>>"))
        if line.strip() and not doctest and not KEPT.match(line):
            paragraph.append(line)
            continue
        out += prose("\n".join(paragraph)).split("\n") if paragraph else []
        paragraph = []
        out.append(line)
    return out[:-1]


def process(app, what, name, obj, options, lines):
    # "Returns: adapters: what they are" is no type to napoleon's taste, but a sentence.
    plain = [re.sub(r"^(:returns: )\*(.+?)\* -- ", r"\1\2: ", line) for line in lines]
    # Before a space there would be a type: "rank, alpha: what they are" has two names.
    plain = [re.sub(r"^:\w+ (\w+, )+\w+:", lambda m: m[0].replace(", ", ","), x) for x in plain]
    lines[:] = rest(plain)


def several(app, doctree):
    """The space between names that `process` took away."""
    for comma in doctree.findall(addnodes.literal_strong):
        if comma.astext() == ",":
            comma.children = [nodes.Text(", ")]


def signature(app, what, name, obj, options, args, returns):
    """A dataclass's fields, where a `__new__` of its own would hide them; defaults as code."""
    if inspect.isclass(obj) and dataclasses.is_dataclass(obj):
        found = inspect.signature(obj.__init__)
        fields = list(found.parameters.values())[1:]
        found = found.replace(parameters=fields, return_annotation=found.empty)
        args = stringify_signature(found, unqualified_typehints=True)
    if not args:
        return None
    # What is no expression is not parsed, and then every comma begins a line.
    args = re.sub(r"<class '([\w.]+)'>", r"\1", args).replace("<factory>", "...")
    args = args.replace(SCHEDULE, "~optax.ScalarOrSchedule")
    return re.sub(r"<function (\w+)[^>]*>", r"\1", args), returns


def setup(app):
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-process-docstring", process, priority=900)  # after napoleon
    app.connect("doctree-read", several)
    return {"parallel_read_safe": True}
