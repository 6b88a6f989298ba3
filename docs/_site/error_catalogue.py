"""Every message of `LoRAError`, read from the source: how it begins, what is wrong, what to do.

`python docs/_site/error_catalogue.py` prints them; the page docs/errors.md is made of them.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "lora_jax"


@dataclasses.dataclass(frozen=True)
class Message:
    """text: its first line; lines: those below it; fix: its last; then where it is raised."""

    text: str
    lines: tuple[str, ...]
    fix: str
    file: Path
    function: str
    line: int


@cache
def source(file: Path) -> ast.Module:
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node
    return tree


@cache
def nodes(tree: ast.AST) -> list[ast.AST]:
    """All of a tree, which is looked through many times."""
    return [*ast.walk(tree)]


@cache
def returned(function: ast.AST) -> list[ast.AST]:
    """What it returns or yields."""
    kinds = ast.Return | ast.Yield | ast.YieldFrom
    return [n.value for n in nodes(function) if isinstance(n, kinds) and n.value is not None]


@cache
def module_file(module: str) -> Path | None:
    at = PACKAGE.parent / Path(*module.split("."))
    found = [f for f in (at.with_suffix(".py"), at / "__init__.py") if f.is_file()]
    return found[0] if found else None


def enclosing(node: ast.AST, kind) -> ast.AST | None:
    while (node := getattr(node, "parent", None)) is not None:
        if isinstance(node, kind):
            return node
    return None


@cache
def table(file: Path) -> dict[str, ast.AST | tuple[str, str]]:
    """{name: its top-level definition, or (module, name) of where it is imported from}."""
    out = {}
    for node in ast.walk(source(file)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_jax"):
            out |= {a.asname or a.name: (node.module, a.name) for a in node.names}
    for node in source(file).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                out[name] = node
            case ast.Assign(targets=targets, value=value):
                out |= {t.id: value for t in targets if isinstance(t, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                out[name] = value
    return out


def defined(file: Path, name: str) -> tuple[Path, ast.AST] | None:
    """The top-level definition that a name of this file means, in whichever file of the package."""
    found = table(file).get(name)
    if isinstance(found, tuple):
        module, name = found
        return defined(at, name) if (at := module_file(module)) else None
    return (file, found) if found is not None else None


def assigned(node: ast.AST, name: str) -> list[ast.AST]:
    """What the function around `node` assigns to a name of its own."""
    function = enclosing(node, FUNCTION)
    found = []
    while function is not None:
        for n in nodes(function):
            if isinstance(n, ast.Assign):
                for target in n.targets:
                    if isinstance(target, ast.Name) and target.id == name:
                        found.append(n.value)
                    elif isinstance(target, ast.Tuple) and isinstance(n.value, ast.Tuple):
                        found += [
                            v
                            for t, v in zip(target.elts, n.value.elts)
                            if isinstance(t, ast.Name) and t.id == name
                        ]
            elif isinstance(n, ast.NamedExpr) and n.target.id == name:
                found.append(n.value)
        if found:
            return found
        function = enclosing(function, FUNCTION)
    return found


FUNCTION = ast.FunctionDef | ast.Lambda


def own(text: str) -> list[str]:
    """What is left of a text without its ‹placeholders›, which may be nested: the parts between."""
    parts, depth = [""], 0
    for c in text:
        depth += c == "‹"
        if not depth:
            parts[-1] += c
        elif c == "›" and (depth := depth - 1) == 0:
            parts.append("")
    return parts


def says_something(text: str) -> bool:
    return any(c.isalpha() for c in "".join(own(text)))


def either(a: str, b: str) -> str:
    simple = lambda t: t[1:-1] if own(t) == ["", ""] else t
    if a == b:
        return a
    return f"‹{' | '.join(simple(t) for t in (a, b) if t)}›"


def constants(file: Path, node: ast.AST) -> str | None:
    """'a', 'b', 'c', where a name in capitals holds a table of strings."""
    if isinstance(node, ast.Name) and node.id.isupper() and (found := defined(file, node.id)):
        try:
            value = ast.literal_eval(found[1])
        except ValueError:
            if not isinstance(found[1], ast.Dict):
                return None
            value = [k.value for k in found[1].keys if isinstance(k, ast.Constant)]
        if isinstance(value, str):
            return value
        if isinstance(value, tuple | list | dict | set) and all(isinstance(v, str) for v in value):
            return ", ".join(map(repr, value))
    return None


def placeholder(node: ast.AST) -> str:
    """A value that is known when it runs, by its name."""
    match node:
        case ast.Name(id=name):
            word = name
        case ast.Attribute(attr="__name__", value=value):
            return "‹type›" if "type" in ast.unparse(value) else placeholder(value)
        case ast.Attribute(attr=name):
            word = name
        case ast.Subscript(value=value):
            return placeholder(value)
        case ast.Call(func=ast.Attribute(attr="join"), args=[inner]):
            return placeholder(inner)
        case ast.Call(func=ast.Name(id=name), args=[inner, *_]) if name in WRAPPERS:
            return placeholder(inner)
        case ast.Call(func=ast.Name(id="nearest")):
            word = "nearest names"
        case ast.Call(func=ast.Name(id="len"), args=[inner]):
            return "‹number of " + placeholder(inner).strip("‹›") + "›"
        case ast.Call(func=ast.Name(id="type")):
            word = "type"
        case ast.Call(func=ast.Attribute(value=value)):
            return placeholder(value)
        case ast.Call(func=ast.Name(id=name)):
            word = name
        case ast.IfExp(body=body) | ast.BoolOp(values=[body, *_]):
            return placeholder(body)
        case ast.GeneratorExp(generators=[g]) | ast.ListComp(generators=[g]):
            return placeholder(g.iter)
        case ast.BinOp(left=left):
            return placeholder(left)
        case _:
            word = "…"
    word = word.strip("_").replace("_", " ")
    return f"‹{SHORT.get(word, word)}›"


WRAPPERS = "sorted tuple list set map str repr quoted int float min max sum dict".split()
SHORT = {
    "e": "reason",
    "cls": "class",
    "p": "leaf",
    "name": "name",
    "n": "number",
    "t": "target",
    "k": "name",
    "x": "value",
    "v": "value",
    "i": "number",
}


def text_of(file: Path, node: ast.AST, depth: int = 0) -> str:
    """The text of an expression, with ‹placeholders›."""
    if depth > 6:
        return placeholder(node)
    again = lambda n, f=file: text_of(f, n, depth + 1)
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(map(again, values))
        case ast.FormattedValue(value=value):
            inner = again(value)
            return inner
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return again(left) + again(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=_):
            return again(left)
        case ast.IfExp(body=body, orelse=orelse):
            a, b = again(body), again(orelse)
            return either(a, b)
        case ast.Call(func=ast.Attribute(attr="format", value=value), args=args):
            text = again(value)
            for arg in args:
                text = text.replace("{}", again(arg), 1)
            return text.replace("{{", "{").replace("}}", "}")
        case ast.Call(func=ast.Attribute(attr="join", value=ast.Constant(value=by)), args=[inner]):
            items = [text for text in texts_of(file, inner, depth + 1)]
            if items and not (isinstance(inner, ast.Call) and inner.func.id == "map"):
                return by.join(items)
            listed = inner.args[-1] if isinstance(inner, ast.Call) and inner.args else inner
            return constants(file, listed) or placeholder(inner)
        case ast.Call(func=ast.Name(id=name)) if name in WRAPPERS or name == "nearest":
            return placeholder(node)
        case ast.Name() if text := constants(file, node):
            return text
        case ast.Name(id=name):
            for value in assigned(node, name):
                if isinstance(
                    value, ast.Constant | ast.JoinedStr | ast.BinOp | ast.IfExp | ast.Call
                ):
                    text = again(value)
                    if " " in text or "(" in text:
                        return text
            if (found := defined(file, name)) and isinstance(found[1], ast.expr):
                return text_of(*found, depth + 1)
        case ast.Call(func=ast.Name(id=name)):
            if (found := defined(file, name)) and isinstance(found[1], ast.FunctionDef):
                for n in nodes(found[1]):
                    if isinstance(n, ast.Return) and n.value is not None:
                        text = text_of(found[0], n.value, depth + 1)
                        if " " in text or "(" in text:
                            return text
    return placeholder(node)


def texts_of(file: Path, node: ast.AST, depth: int = 0) -> list[str]:
    """The texts that an expression of several may hold."""
    if depth > 6:
        return []
    again = lambda n, f=file: texts_of(f, n, depth + 1)
    match node:
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [t for item in items for t in again(item)]
        case ast.Starred(value=value):
            return again(value)
        case ast.GeneratorExp(elt=elt) | ast.ListComp(elt=elt):
            return again(elt)
        case ast.IfExp(body=body, orelse=orelse):
            return again(body) + again(orelse)
        case ast.BinOp(left=left, op=ast.Mult()):
            return again(left)
        case ast.BinOp(left=left, op=ast.Add(), right=right) if not is_text(node):
            return again(left) + again(right)
        case ast.Call(func=ast.Name(id=name), args=args) if name in WRAPPERS and args:
            return again(args[-1])
        case ast.Call(func=ast.Attribute(attr="values"), args=[]):
            return []
        case ast.Name(id=name):
            found = [t for v in gathered(node, name) for t in again(v)]
            return found
        case ast.Attribute(attr=name, value=ast.Name(id="self")):
            return [t for v in gathered(node, name, ast.ClassDef) for t in again(v)]
        case ast.Call(func=ast.Name(id=name)) if found := defined(file, name):
            return [t for v in returned(found[1]) for t in texts_of(found[0], v, depth + 1)]
        case ast.Call(func=ast.Attribute(attr=name, value=ast.Name(id="self"))):
            around = enclosing(node, ast.ClassDef)
            for f in around.body if around else []:
                if isinstance(f, ast.FunctionDef) and f.name == name:
                    return [t for v in returned(f) for t in again(v)]
            return []
    text = text_of(file, node, depth)
    return [text] if says_something(text) or "|" in text else []


def is_text(node: ast.AST) -> bool:
    return (
        any(
            isinstance(n, ast.JoinedStr)
            or (isinstance(n, ast.Constant) and isinstance(n.value, str))
            for n in (node.left, node.right)
        )
        if isinstance(node, ast.BinOp)
        else False
    )


def gathered(node: ast.AST, name: str, around=FUNCTION) -> Iterator[ast.AST]:
    """What is assigned, appended and added to a list within the function around `node`."""
    holder = enclosing(node, around)
    own = lambda n: (
        (isinstance(n, ast.Name) and n.id == name)
        or (isinstance(n, ast.Attribute) and n.attr == name)
    )
    for n in nodes(holder) if holder is not None else ():
        match n:
            case ast.Assign(targets=[target], value=value) if own(target):
                yield value
            case ast.AugAssign(target=target, value=value) if own(target):
                yield value
            case ast.Call(func=ast.Attribute(attr="append" | "extend", value=value), args=[x]) if (
                own(value)
            ):
                yield x


# Where the cure begins: at a call, or at a verb that says what to do.
VERBS = """
    Adapt Bind Give Leave Pass The Use To adapt add another adapt attach bind choose compare copy
    did drop exclude expected give leave list load make map merge name nearest one pad pass pip
    place put read rename resize restore say save select start survey take train untie untied write
    call cast
""".split()
# A call, an argument, a command, or what stands for one: ‹survey call›.
CALL = (
    r"(?:\w+(?:, \w+)* = )?(?:lora|nnx|tx|jax|flax|optax|ocp|manager|found|‹class›)\.[\w.‹›]*\("
    r"|\w+=[\[{\"'\w]|--?[a-z]|pip |‹[\w ]*\bcall›"
)
CURE = re.compile(rf"(?:: |; |(?<=\w)\. )(?=(?:{CALL}|(?:{'|'.join(VERBS)})\b))")


def cause_and_cure(text: str) -> tuple[str, str]:
    """What is wrong, and what to do: the message's own words. The cure may be empty."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "‹") - (c == "›")
        if depth == 0 and (at := CURE.match(text, i)):
            return text[:i], text[at.end() :]
    return text, ""


@cache
def messages() -> tuple[Message, ...]:
    """All of them, by file; a message that stands in several places is one."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(source(file)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                continue
            kind = node.func.id
            if kind not in ("LoRAError", "Misfit", "raise_all") or file.name == "errors.py":
                continue
            text, lines, fix = text_of(file, node.args[0]), (), ""
            if kind == "raise_all":
                lines = tuple(dict.fromkeys(map(named, texts_of(file, node.args[1]))))
                fix = text_of(file, node.args[2]) if len(node.args) > 2 else ""
            if not (says_something(text) or lines):
                continue  # the words of another error, handed on
            top = node
            while not isinstance(top.parent, ast.Module):
                top = top.parent
            at = (file, getattr(top, "name", ""), node.lineno)
            key = (named(text), lines)
            found.setdefault(key, Message(*key, named(fix), *at))
    return (*found.values(), *further(tuple(found.values())))


# Their texts are results: reasons, tables, differences.
PRINTERS = ("_propose.py", "inspect.py", "diff.py", "_memory.py", "_learned.py", "coverage.py")


def further(known: tuple[Message, ...]) -> list[Message]:
    """Lines that are made elsewhere, and handed to the error: what a function of a file that raises
    appends, yields or returns as a text with something filled in."""
    said = {line for m in known for line in (m.text, m.fix, *m.lines)}
    whole = "\n".join(said)
    out = []
    for file in [*dict.fromkeys(m.file for m in known), PACKAGE / "checkpoint/_grow.py"]:
        if file.name in PRINTERS:
            continue
        for node in ast.walk(source(file)):
            match node:
                case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name), args=[*_, value]):
                    if name.strip("_") not in ("append", "add", "wrong"):
                        continue
                # Also beside what it is about, and what to give: (field, message, value).
                case ast.Yield(value=ast.Tuple(elts=[_, value, _])):
                    pass
                case ast.Yield(value=value) | ast.Return(value=value):
                    pass
                case ast.Assign(targets=[ast.Subscript()], value=value):
                    pass
                case ast.Assign(targets=[ast.Name(id="problem" | "why")], value=value):
                    pass
                case ast.AugAssign(value=value):
                    pass
                case _:
                    continue
            function = enclosing(node, ast.FunctionDef)
            if value is None or (function and (function.name.startswith("__") or _shows(function))):
                continue
            top = node
            while not isinstance(top.parent, ast.Module):
                top = top.parent
            for text in map(named, texts_of(file, value)):
                prose = "".join(own(text))
                odd = "\n" in text or text[0] in " ;,(<" or text.startswith("Quantized(")
                if len(prose.split()) >= 3 and text not in whole and text not in said and not odd:
                    said.add(text)
                    out.append(Message(text, (), "", file, getattr(top, "name", ""), node.lineno))
    return out


def _shows(function: ast.FunctionDef) -> bool:
    """Whether it makes what is printed of a result, and no error."""
    shows = ("to_json", "describe", "help", "_table", "_span", "_named", "_guess")
    return function.name in shows or "_repr" in function.name


def named(text: str) -> str:
    """A path in quotes is a leaf's."""
    return text.replace("'‹path›'", "'‹leaf›'")


@cache
def pattern(text: str) -> re.Pattern:
    return re.compile(".*?".join(map(re.escape, own(text))), re.S)


def missing(message: str) -> list[str]:
    """The lines of a message that the catalogue does not have."""
    known = messages()
    whole = [pattern(m.text) for m in known if says_something(m.text)]
    texts = [t for m in known for t in (m.fix, *m.lines)]
    lines = whole + [pattern(t) for t in texts if says_something(t)]
    if any(p.fullmatch(message) for p in whole):
        return []
    # "'leaf': what is wrong with it", of which what is wrong may come from elsewhere.
    ways = lambda line: [line, *(line[m.end() :] for m in re.finditer(r": |' |\) ", line))]
    own = [line.removeprefix("  - ") for line in message.split("\n")]
    return [o for o in own if not any(p.fullmatch(w) for p in lines for w in ways(o) if w)]


# Which public function raises it.


@cache
def uses(file: Path, name: str) -> frozenset[tuple[Path, str]]:
    """The definitions of the package that one of them names."""
    found = defined(file, name)
    if found is None:
        return frozenset()
    out = set()
    for node in nodes(found[1]):
        if isinstance(node, ast.Name):
            out.add((found[0], node.id))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if module := imported_module(found[0], node.value.id):
                out.add((module, node.attr))
    return frozenset(h for f, n in out if (h := home(f, n)) and h != (found[0], name))


def imported_module(file: Path, name: str) -> Path | None:
    found = table(file).get(name)
    return module_file(".".join(found)) if isinstance(found, tuple) else None


@cache
def home(file: Path, name: str) -> tuple[Path, str] | None:
    found = defined(file, name)
    if found is None or not isinstance(found[1], ast.FunctionDef | ast.ClassDef):
        return None
    return found[0], found[1].name


def raisers(public: dict[str, str]) -> dict[tuple[Path, str], list[str]]:
    """{a definition: public names that reach it, the nearest first}; `public` is {name: module}."""
    out: dict[tuple[Path, str], list[tuple[int, str]]] = {}
    for name, module in public.items():
        start = home(module_file(module), name.rpartition(".")[2])
        seen, level, depth = set(), {start} - {None}, 0
        while level:
            for at in level:
                out.setdefault(at, []).append((depth, name))
            seen |= level
            level = {n for at in level for n in uses(*at)} - seen
            depth += 1
    return {at: [name for _, name in sorted(names)] for at, names in out.items()}


if __name__ == "__main__":
    for m in messages():
        print(f"{m.file.relative_to(PACKAGE)}:{m.line} {m.function}")
        cause, cure = cause_and_cure(m.text)
        print(f"    {cause!r}\n    => {cure or m.fix!r}")
        for line in m.lines:
            print("      - {!r}\n        => {!r}".format(*cause_and_cure(line)))
