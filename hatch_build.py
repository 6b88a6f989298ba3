"""What the package says of itself on an index: a README whose links work there, and addresses.

The repository's address stands in no file. The forge tells it to the workflow that builds a
release: GITHUB_SERVER_URL, GITHUB_REPOSITORY, and the tag, GITHUB_REF_NAME. Elsewhere there are no
addresses, and a relative link is its words alone.
"""

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

FENCED = re.compile(r"(^```.*?^```$)", re.M | re.S)
RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)]*)\)")


def repository(environ) -> tuple[str, str] | None:
    """(address, tag or branch), where a forge builds."""
    names = ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_REF_NAME")
    if not all(environ.get(name) for name in names):
        return None
    server, name, ref = (environ[n] for n in names)
    return f"{server}/{name}", ref


def description(text: str, at: tuple[str, str] | None) -> str:
    """Markdown with its relative links made absolute, code left as it is."""

    def absolute(match):
        image, words, path = match.groups()
        if at is None:
            return words
        return f"{image}[{words}]({at[0]}/{'raw' if image else 'blob'}/{at[1]}/{path})"

    parts = FENCED.split(text)  # the odd ones are code
    return "".join(p if i % 2 else RELATIVE.sub(absolute, p) for i, p in enumerate(parts))


def urls(at: tuple[str, str] | None) -> dict[str, str]:
    if at is None:
        return {}
    page = lambda path: f"{at[0]}/blob/{at[1]}/{path}"
    return {
        "Repository": at[0],
        "Documentation": page("docs/index.md"),
        "Changelog": page("CHANGELOG.md"),
        "Issues": f"{at[0]}/issues",
    }


class CustomMetadataHook(MetadataHookInterface):
    def update(self, metadata):
        at = repository(os.environ)
        text = description((Path(self.root) / "README.md").read_text(), at)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls(at)
