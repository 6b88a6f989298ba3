"""Docstrings are plain text to read in a terminal; here they become reStructuredText.

`name` is a link, where there is such a name, other code in backticks is a literal, and `*` and `|`
mean themselves; docs/x.md is a link to that page. Google's sections are napoleon's part, and come
first.
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
PAGE = re.compile(r"docs/([\w/]+)\.md")
SPECIAL = re.compile(r"(?<!\\)([*|])|(?<=\w)(_)(?!\w)|(\\)(?![*|])")
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
    plain = lambda p: PAGE.sub(r":doc:`/\1`", SPECIAL.sub(r"\\\g<0>", p))
    return head + "".join(CODE.sub(code, p) if i % 2 else plain(p) for i, p in enumerate(parts))


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


FIELD = re.compile(r":(\w+) ([^:`]+): (.*)", re.S)


def together(lines: list[str]) -> list[str]:
    """ "rank, alpha: what they are" is one field of two names, which napoleon takes apart."""
    out, before = [], None
    for part in re.split(r"\n(?=:|\n)", "\n".join(lines)):
        if match := FIELD.fullmatch(part):
            kind, names, words = match[1], match[2].replace(", ", ","), match[3].split()
            if before and before[::2] == (kind, words):
                names = f"{before[1]},{names}"
                out.pop()
            before = kind, names, words
            part = f":{kind} {names}: {match[3]}"  # after a space there would be a type
        out.append(part)
    return "\n".join(out).split("\n")


def process(app, what, name, obj, options, lines):
    if what == "property":  # "‖ΔW‖, (n,): of each" begins with no type, as napoleon has it
        lines[:] = [*inspect.getdoc(obj).split("\n"), ""]
    # Nor is the first word of "Returns: adapters: what they are" one.
    plain = [re.sub(r"^(:returns: )(\*?)(.+?)\2 -- ", r"\1\3: ", line) for line in lines]
    lines[:] = rest(together(plain))


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
