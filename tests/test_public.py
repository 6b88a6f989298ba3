"""Every public name has an example, which pytest runs as a doctest."""

import inspect

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
