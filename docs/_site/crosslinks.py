"""Links of the pages: each `lora.name` to the reference, and those to files outside of docs/."""

import importlib
import inspect
import re
from functools import cache
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.ext.intersphinx import missing_reference
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).parents[2]
# Pages of the site that stand elsewhere in the repository, and where the site has them.
HOMES = {"README.md": "index", "CHANGELOG.md": "changelog", "CONTRIBUTING.md": "contributing"}
# `lora.bind`, `lora.bind(params, adapters)`, `jax.jit`: a name of these packages, perhaps called.
PACKAGES = "lora|lora_jax|jax|jnp|optax|nnx|nn|flax|ocp|orbax|np|numpy"
NAME = re.compile(rf"((?:{PACKAGES})(?:\.\w+)+)(?:\(.*\))?", re.S)
LONG = {
    "lora": "lora_jax",
    "jnp": "jax.numpy",
    "nnx": "flax.nnx",
    "nn": "flax.linen",
    "ocp": "orbax.checkpoint",
    "np": "numpy",
}


@cache
def public() -> dict[str, str]:
    """{the name by which a public object was defined: its public name}."""
    found = {}

    def walk(module, prefix):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.ismodule(value):
                walk(value, f"{prefix}.{name}")
            else:
                found[f"{value.__module__}.{value.__qualname__}"] = f"{prefix}.{name}"

    walk(importlib.import_module("lora_jax"), "lora_jax")
    return found


def names_of(target: str, module: str | None) -> list[str]:
    """The full names that `target` may mean, in a docstring of `module`."""
    head, dot, rest = target.partition(".")
    long = LONG.get(head, head) + dot + rest
    near = [f"{space}.{target}" for space in (module, "lora_jax") if space]
    # One of another namespace, by its name alone: a class, or words joined, which no text has.
    alone = target[:1].isupper() or "_" in target
    far = [name for name in public().values() if alone and name.endswith(f".{target}")]
    return [public().get(long, long), *near, *far]


def resolve(app, env, node, contnode):
    """Names of `lora`, by any of their spellings; then those of other packages, as written out."""
    if node.get("refdomain") != "py":
        return None
    domain, target = env.domains["py"], node["reftarget"]
    for name in names_of(target, node.get("py:module")):
        if name in domain.objects:
            return domain.resolve_xref(
                env, node["refdoc"], app.builder, "obj", name, node, contnode
            )
    node["reftarget"] = names_of(target, None)[0]
    return missing_reference(app, env, node, contnode)


class Names(SphinxTransform):
    """A name in the code font, in a page, is a link to that name."""

    default_priority = 400

    def apply(self):
        for literal in list(self.document.findall(nodes.literal)):
            if isinstance(literal.parent, nodes.reference | nodes.title | addnodes.pending_xref):
                continue
            if "::" in literal.astext():
                literal["classes"].append("test")
            match = NAME.fullmatch(literal.astext())
            if not match or literal.get("classes"):
                continue
            reference = addnodes.pending_xref(
                refdomain="py",
                reftype="obj",
                reftarget=match[1],
                refdoc=self.env.docname,
                refexplicit=True,
                refwarn=False,
            )
            literal.replace_self(reference)
            reference += literal


class Papers(SphinxTransform):
    """arXiv:2106.09685 is a link to the paper."""

    default_priority = 402

    def apply(self):
        for text in list(self.document.findall(nodes.Text)):
            parts = re.split(r"(arXiv:\d{4}\.\d{4,5})", text.astext())
            inside = isinstance(text.parent, nodes.reference | nodes.literal | nodes.literal_block)
            if len(parts) > 1 and not inside:
                link = lambda p: nodes.reference(
                    p, p, refuri=f"https://arxiv.org/abs/{p.removeprefix('arXiv:')}"
                )
                new = [link(p) if i % 2 else nodes.Text(p) for i, p in enumerate(parts) if p]
                text.parent.replace(text, new)


class Files(SphinxTransform):
    """Links to what is not a page: into the repository, else a download, else (a folder) text."""

    default_priority = 401

    def apply(self):
        links = list(self.document.findall(addnodes.download_reference))
        links += [n for n in self.document.findall(addnodes.pending_xref) if n["reftype"] == "myst"]
        for link in links:
            self._file(link)

    def _file(self, link):
        target = link["reftarget"].partition("#")[0]
        if link.get("refdomain") == "doc":
            if not Path(target).is_absolute():
                return  # a page of the site
            path = Path(f"{target}.md")
        else:
            path = Path(self.env.relfn2path(target, self.env.docname)[1])
        path = path.resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            return  # Sphinx warns of it
        name = path.relative_to(ROOT).as_posix()
        if name in HOMES:
            link.replace_self(self._page(HOMES[name], link))
        elif self.config.crosslinks_files:
            url = f"{self.config.crosslinks_files}/{name}"
            link.replace_self(nodes.reference("", "", *link.children, refuri=url))
        elif path.is_dir() or path.suffix == ".md":
            link.replace_self(nodes.inline("", "", *link.children))

    def _page(self, docname, link):
        new = addnodes.pending_xref(
            refdomain="std",
            reftype="doc",
            reftarget=f"/{docname}",
            refdoc=self.env.docname,
            refexplicit=True,
            refwarn=True,
        )
        new += link.children
        return new


def frameworks(app, docname, source):
    """The pages of docs/with/ stand below their table, which a forge shows without this."""
    if docname == "with/README":
        pages = "\n".join(re.findall(r"^\| \[.*?\]\((\w+)\.md\)", source[0], re.M))
        source[0] += f"\n```{{toctree}}\n:hidden:\n{pages}\n```\n"


def setup(app):
    app.connect("source-read", frameworks)
    app.add_config_value("crosslinks_files", "", "env")
    app.add_transform(Names)
    app.add_transform(Files)
    app.add_transform(Papers)
    app.connect("missing-reference", resolve, priority=400)  # before intersphinx's own
    return {"parallel_read_safe": True}
