"""`{errors}`: every message of `LoRAError`, by namespace and first words, with what to do."""

import importlib
import inspect
import re

from crosslinks import public
from docutils import nodes
from error_catalogue import PACKAGE, cause_and_cure, messages, raisers
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
# Where a message says what is wrong and leaves what to do to its place: by file.
ADVICE = {
    "peft/_forms": "save the adapter again with the PEFT that trained it",
    "peft/_reduce": "take an earlier checkpoint, or merge it in PEFT (merge_and_unload)",
    "peft/_deltas": "take an earlier checkpoint, or merge it in PEFT (merge_and_unload)",
    "peft/_config": "write adapter_config.json again with PEFT's save_pretrained, or pass over a "
    "setting: lora.peft.load(..., ignore=[...])",
    "peft/_patterns": "simplify the expression in the configuration; a list of names will do",
    "peft/_file": "copy the file again, and look at its path and rights",
    "peft/_files": "give another path",
    "peft/_formats": "say which tool wrote it: lora.peft.load(..., format=...)",
    "peft/_hub": "look at the name, the revision and the network, or download the folder first",
    "peft/_safetensors": "copy the folder again, with all its files",
    "peft/_load": "say which leaf it is: lora.peft.load(..., mapping={...})",
    "peft/_save": "change the leaves that are named, or leave them out",
    "peft/_save_base": "give parameters that `like` has: lora.peft.save_base(out, params, like)",
    "peft": "print the mapping, and say which leaf is meant: mapping={...}",
    "checkpoint": "look at the directory; another step: lora.checkpoint.restore(..., step=...)",
    "quant": "give the parameters as lora.quant.quantize took or returned them",
    "parallel": "give axes whose product is the number of devices",
    "methods": "pass what the method's initialiser returned, and parameters that it was made for",
    "algebra": "give adapters of one base, as from lora.init",
    "_cli": "name the folders as in lora-jax --help; nothing was written",
    "_core": "give what the message says was expected",
    "_quantized": "choose another format, or double=False: lora.quant.quantize(params, ...)",
    "_nodes": "give the adapters with what made them, lora.init(key, params, config)",
    "": "give what the message says was expected, in the call that it names",
}
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
            end += re.match(r"'[^']*'|[^\s,;)]*", text[end:]).end()
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


def advice(m) -> str:
    file = m.file.relative_to(PACKAGE).with_suffix("").as_posix()
    while file and file not in ADVICE:
        file = file.rpartition("/")[0]
    return ADVICE[file]


def entry(m, by: list[str]) -> nodes.definition_list_item:
    """The message, up to its cure; the lines below it; what to do; who raises it."""
    cause, cure = cause_and_cure(m.text)
    body = nodes.definition()
    lines = [cause_and_cure(line) for line in m.lines]
    if lines:
        items = nodes.bullet_list()
        for what, todo in lines:
            item = paragraph(nodes.literal(what, what))
            if todo:
                item += [nodes.Text(" → "), *inline(todo)]
            items += nodes.list_item("", item)
        body += items
    todo = cure or m.fix
    if not (todo or (lines and all(c for _, c in lines))):
        todo = advice(m)
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
