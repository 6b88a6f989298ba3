"""Every public name has an example, which pytest runs as a doctest."""

import inspect
import os
import pickle
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lora_jax as lora


def public(module, prefix):
    """(name, object) of all that is public in a module and in the namespaces below it."""
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.ismodule(value):
            yield from public(value, f"{prefix}.{name}")
        elif not name.startswith("__"):
            yield f"{prefix}.{name}", value


def test_every_public_name_has_an_example():
    names = list(public(lora, "lora"))
    assert len(names) > 20
    assert [n for n, value in names if ">>>" not in (inspect.getdoc(value) or "")] == []


def test_types_of_signatures_are_public():
    """Each class of ours that an annotation names is a public name, or described where it stands."""
    names = dict(public(lora, "lora"))
    classes = {value.__name__ for value in names.values() if inspect.isclass(value)}
    classes |= {"Leaf", "Block"}  # described where they are met: in `Survey`, in `Entry`
    for name, value in names.items():
        own = vars(value).items() if inspect.isclass(value) else ()
        parts = [value, *(getattr(m, "fget", m) for key, m in own if key[0] != "_")]
        said = [str(a) for p in parts for a in getattr(p, "__annotations__", {}).values()]
        for word in {*re.findall(r"\b[A-Z]\w+", " ".join(said))} - classes:
            used = getattr(sys.modules[value.__module__], word, None)
            ours = inspect.isclass(used) and used.__module__.startswith("lora_jax")
            assert not ours or name == "lora.AdaptedWeight", (name, word)  # its insides


# In a process of its own: here the names are long imported.
FIRST_USE = """
import sys
import lora_jax as lora
assert not {"jax", "numpy", "flax"} & {*sys.modules}, "the package is imported without JAX"
import jax

def use(x):
    for name in lora.__all__:
        found = getattr(lora, name)
        assert getattr(lora, name) is found
        [getattr(found, n) for n in getattr(found, "__all__", ())]
    return x

jax.make_jaxpr(jax.jit(use))(1.0)
ours = {k: vars(m) for k, m in sys.modules.items() if k.startswith("lora_jax")}
made = [f"{m}.{k}" for m, all in ours.items() for k, v in all.items() if isinstance(v, jax.core.Tracer)]
assert not made, made
from lora_jax import *
assert adapt is lora.adapt and peft is lora.peft is sys.modules["lora_jax.peft"]
"""


def test_names_are_imported_when_they_are_first_used():
    """Also inside of a trace, which leaves nothing of itself in the modules."""
    env = os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(lora.__file__))}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_name_that_there_is_not():
    with pytest.raises(AttributeError, match="module 'lora_jax' has no attribute 'adpat'"):
        _ = lora.adpat
    with pytest.raises(ImportError, match="cannot import name 'adpat' from 'lora_jax'"):
        from lora_jax import adpat  # noqa: F401
    assert dir(lora) == sorted(lora.__all__) and lora.peft.__name__ == "lora_jax.peft"


def test_public_classes_and_functions_can_be_pickled():
    for name, value in public(lora, "lora"):
        assert pickle.loads(pickle.dumps(value)) is value, name


def test_the_version_stands_in_one_place_and_has_its_changes():
    root = Path(lora.__file__).parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    source = root / project["tool"]["hatch"]["version"]["path"]
    assert source == Path(lora.__file__)
    assert re.findall(r'^__version__ = "(.*)"$', source.read_text(), re.M) == [lora.__version__]
    released = re.findall(
        r"^## \[(\S+)\] - \d{4}-\d\d-\d\d$", (root / "CHANGELOG.md").read_text(), re.M
    )
    assert released[0] == lora.__version__
