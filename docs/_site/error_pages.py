"""`{errors}`: every message of `LoRAError`, by namespace and first words, with what to do."""

import importlib
import inspect
import re
import tomllib
from pathlib import Path

from crosslinks import public
from docutils import nodes
from error_catalogue import PACKAGE, cause_and_cure, messages, raisers, says_something
from sphinx.util.docutils import SphinxDirective

GROUPS = {
    "": (
        "The flow",
        "`lora.select`, `lora.init`, `lora.bind`, `lora.adapt`, `lora.merge` and so on.",
    ),
    "algebra": ("lora.algebra", "Adapters as values."),
    "methods": ("lora.methods", "Methods beside LoRA."),
    "optim": ("lora.optim", "Optimisers of adapters."),
    "quant": ("lora.quant", "A quantised base."),
    "parallel": ("lora.parallel", "One device or a pod."),
    "checkpoint": ("lora.checkpoint", "Adapters on disk."),
    "peft": ("lora.peft", "PEFT's adapters and Hugging Face's base models in their files."),
    "_cli": ("lora-jax", "On the command line, beside those of the namespaces."),
}
# Where a message says what is wrong and leaves what to do to its place.
ADVICE = tomllib.loads((Path(__file__).parent / "cures.toml").read_text())
OPENING = re.compile(r"(?:\w+(?:, \w+)* = )?[A-Za-z_][\w.‹›]*\(|\b\w+=[\[{]?|pip install ")


def closing(text: str, at: int) -> int:
    """Where the bracket that opens at `at` is closed, and what is called on its result."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            chained = re.match(r"(?:\.\w+)*\(", text[i + 1 :])
            return closing(text, i + chained.end()) if chained else i + 1
    return len(text)


def code_spans(text: str):
    """(is it code, text): calls, with all that their brackets hold, are code."""
    at = 0
    while match := OPENING.search(text, at):
        end = match.end()
        if text[end - 1] in "([{":
            end = closing(text, end - 1)
        else:  # pip install 'lora_jax[hub]', rank=16
            end += re.match(r"'[^']*'|lambda [^;]*|[^\s,;)]*", text[end:]).end()
        yield False, text[at : match.start()]
        yield True, text[match.start() : end]
        at = end
    yield False, text[at:]


def inline(text: str) -> list[nodes.Node]:
    text = text.replace("`", "")
    make = lambda code, part: nodes.literal(part, part) if code else nodes.Text(part)
    return [make(code, part) for code, part in code_spans(text) if part]


def paragraph(*children, **options) -> nodes.paragraph:
    return nodes.paragraph("", "", *children, **options)


# What is expected is what to give.
WANTED = re.compile(r"expected ([^:]+?)(?:[,;]? found\b.*)?$")


def parts(text: str) -> tuple[str, str]:
    """What is wrong, where the message says that, and what to do."""
    cause, cure = cause_and_cure(text)
    if not says_something(cure):  # a call alone, that is made when it is raised
        cure = f"give {wanted[1]}" if (wanted := WANTED.search(cause)) else ""
    elif wanted := WANTED.match(cure):
        cure = f"give {wanted[1]}"
    if not says_something(cause):  # a place: what follows is what is wrong, and perhaps what to do
        cause, cure = text, cure if re.search(r"^give |^expected |[;=(]", cure) else ""
    return cause, re.sub("^expected ", "give ", cure)


def advice(m) -> str:
    file = m.file.relative_to(PACKAGE).with_suffix("").as_posix()
    if (own := f"{file}:{m.function}") in ADVICE:
        return " ".join(ADVICE[own].split())
    while file and file not in ADVICE:
        file = file.rpartition("/")[0]
    return " ".join(ADVICE[file].split())


def entry(m, by: list[str]) -> nodes.definition_list_item:
    """The message, up to its cure; the lines below it; what to do; who raises it."""
    cause, cure = parts(m.text)
    body = nodes.definition()
    lines = [parts(line) for line in m.lines]
    if lines:
        items = nodes.bullet_list()
        for what, todo in lines:
            item = paragraph(nodes.literal(what, what))
            if todo:
                item += [nodes.Text(" → "), *inline(todo)]
            items += nodes.list_item("", item)
        body += items
    todo = cure or m.fix
    if re.fullmatch(r"‹\w+›", todo):
        todo = "make the call that the message ends with: it is yours, corrected"
    if not (todo or (lines and all(c for _, c in lines))):
        wanted = WANTED.search(cause)
        todo = f"give {wanted[1]}" if wanted else advice(m)
    if todo:
        body += paragraph(nodes.strong("", "Cure: "), *inline(todo))
    where = f"{m.file.relative_to(PACKAGE.parent).as_posix()}"
    names = [nodes.literal(n, n) for n in by[:3]] or [nodes.literal(where, where)]
    said = paragraph(nodes.Text("Raised by "), classes=["raised"])
    for i, name in enumerate(names):
        said += [nodes.Text(", "), name] if i else [name]
    said += nodes.Text(" and others." if len(by) > 3 else ".")
    body += said
    term = nodes.term("", "", nodes.literal(cause, cause))
    return nodes.definition_list_item("", term, body)


def first_words(text: str) -> str:
    return re.sub(r"[^\w ]", "", re.sub(r"‹[^›]*›", "", text)).strip().lower()


def group(m) -> str:
    room = m.file.relative_to(PACKAGE).parts[0]
    return room if room in GROUPS else ""


class Errors(SphinxDirective):
    def run(self):
        names = {
            "lora" + name.removeprefix("lora_jax"): inspect.getmodule(value).__name__
            for name, value in public_objects()
        }
        reach = raisers(names)
        out = []
        every = messages()
        for m in every:
            self.env.note_dependency(str(m.file))
        for room, (title, text) in GROUPS.items():
            mine = [m for m in every if group(m) == room]
            section = nodes.section(ids=[f"errors-{room.strip('_') or 'flow'}"])
            section += nodes.title("", "", *heading(title))
            section += paragraph(*self.parse_inline(text)[0])
            section += nodes.definition_list(
                "",
                *(
                    entry(m, reach.get((m.file, m.function), []) or command(m))
                    for m in sorted(mine, key=lambda m: first_words(m.text))
                ),
                classes=["errors"],
            )
            out.append(section)
        return out


def heading(title: str):
    return [nodes.Text(title)] if " " in title else [nodes.literal(title, title)]


def command(m) -> list[str]:
    """A message of the command line, where its file is a command's."""
    commands = ("inspect", "merge", "convert", "combine", "diff")
    known = m.file.parent.name == "_cli"
    return [f"lora-jax {m.file.stem}"] if known and m.file.stem in commands else []


def public_objects():
    for name in public().values():
        module, _, attribute = name.rpartition(".")
        yield name, getattr(importlib.import_module(module), attribute)


def setup(app):
    app.add_directive("errors", Errors)
    return {"parallel_read_safe": True}
