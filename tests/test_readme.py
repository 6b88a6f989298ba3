"""The README is one page: every snippet runs as pasted, and what it says is there is there."""

import re
import tomllib
import xml.etree.ElementTree as ET

import pytest
from pages import ROOT, assert_prints, snippets

import lora_jax as lora

TEXT = (ROOT / "README.md").read_text()
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.S)
SNIPPETS = snippets("README.md")
LINKS = re.findall(r"\]\(([^)]+)\)", PROSE)


@pytest.mark.parametrize("i", range(len(SNIPPETS)))
def test_snippet(i):
    code, printed = SNIPPETS[i]
    assert printed, "a snippet prints a result, and the page shows it"
    assert_prints(code, printed)


def test_it_is_one_page():
    """The links of the support matrix, to tests, and the picture are not counted."""
    words = [w for w in re.sub(r"\]\([^)]*\)", "]", PROSE).split() if re.search(r"\w", w)]
    assert len(words) <= 700
    assert len([x for x in LINKS if not x.startswith(("tests/", ".ci/", "docs/pictures/"))]) <= 12
    ((code, _),) = SNIPPETS
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize("link", sorted(set(LINKS)))
def test_link(link):
    assert (ROOT / link).exists()


def test_names_and_extras():
    """Each `lora.x.y` of the tables is public; each extra of the commands is one."""
    names = set(re.findall(r"`lora\.([a-z_.]+)", PROSE))
    assert len(names) > 8
    for name in names:
        value = lora
        for part in name.split("."):
            assert part in value.__all__, name
            value = getattr(value, part)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r"'\.\[(\w+)\]'", TEXT)) <= set(project["optional-dependencies"])


def test_the_picture():
    root = ET.parse(ROOT / "docs/pictures/dataflow.svg").getroot()
    shown = " ".join(root.itertext())
    assert all(name in shown for name in ("params", "adapters", "adapt(fn)", "optax", "merge"))


FORGE = {
    "GITHUB_SERVER_URL": "https://forge.example",
    "GITHUB_REPOSITORY": "someone/lora_jax",
    "GITHUB_REF_NAME": "v1.2.3",
}


@pytest.mark.parametrize("forge", [FORGE, {}], ids=["release", "local"])
def test_on_an_index(forge, monkeypatch):
    """Where a release is built, each link and the picture have an address; else none is broken."""
    core = pytest.importorskip("hatchling.metadata.core", reason="the test extra has it")
    from hatchling.plugin.manager import PluginManager

    for name in FORGE:
        monkeypatch.delenv(name, raising=False)
    for name, value in forge.items():
        monkeypatch.setenv(name, value)
    project = core.ProjectMetadata(str(ROOT), PluginManager()).core
    fences = lambda text: re.findall(r"^```.*?^```$", text, re.M | re.S)
    assert fences(project.readme) == fences(TEXT)
    home = "https://forge.example/someone/lora_jax"
    at = {x: f"{home}/{'raw' if x.endswith('.svg') else 'blob'}/v1.2.3/{x}" for x in LINKS}
    shown = re.findall(r"\]\(([^)]+)\)", project.readme)
    assert shown == ([at[x] for x in LINKS] if forge else [])
    assert re.sub(r"\]\([^)]*\)|[][!]", "", TEXT) == re.sub(
        r"\]\([^)]*\)|[][!]", "", project.readme
    )
    assert all(url.startswith(home) for url in project.urls.values())
    assert bool(project.urls) == bool(forge)
