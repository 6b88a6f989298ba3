"""The house: imports between rooms run down, and what is private stays where it is."""

import ast
from functools import cache
from pathlib import Path

import lora_jax as lora

PACKAGE = Path(lora.__file__).parent
FILES = {
    "lora_jax." + ".".join(f.relative_to(PACKAGE).with_suffix("").parts): f
    for f in PACKAGE.rglob("*.py")
}
MODULES = {
    name.removesuffix(".__init__"): f for name, f in FILES.items() if f != PACKAGE / "__init__.py"
}

# From the ground up: a room imports only rooms that stand on a lower level.
LEVELS = [
    {"_core"},
    {"_config", "_quantized"},
    {"_nodes"},
    {"_bind", "_products", "_targets"},
    {"_interpret", "_merge", "algebra"},
    {"_adapt", "_survey"},
    {"_doors", "_select"},
    {"_attach", "_init"},
    {"methods", "parallel"},
    {"checkpoint", "optim", "quant"},
    {"peft"},
    {"_cli"},
    {"__main__"},
]
LEVEL = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}
PRIVATE = ("jax._src", "jax.interpreters", "jax.extend", "re._", "sre_")


def room(module: str) -> str:
    return module.split(".")[1]


def imported(module: str, at_import: bool = False):
    """(module, name) of everything that a file imports; `at_import`: outside of functions alone."""
    tree = ast.parse(MODULES[module].read_text())
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole, "") if whole in MODULES else (node.module, alias.name)


def below(module: str) -> frozenset[str]:
    return frozenset(m for m, _ in imported(module, at_import=True) if m in MODULES)


@cache
def stands_on(module: str) -> frozenset[str]:
    return below(module).union(*map(stands_on, below(module)))


@cache
def depth(module: str) -> int:
    return 1 + max(map(depth, below(module)), default=0)


def test_every_room_has_a_level():
    assert {room(m) for m in MODULES} == set(LEVEL)


def test_imports_run_down():
    up = [
        f"{module} imports {other}"
        for module in MODULES
        for other, _ in imported(module)
        if other in MODULES and room(other) != room(module)
        if LEVEL[room(other)] >= LEVEL[room(module)]
    ]
    assert not up


def test_private_names_stay_in_their_room():
    out = [
        f"{module} imports {name} of {other}"
        for module in MODULES
        for other, name in imported(module)
        if other in MODULES and name.startswith("_") and room(other) != room(module)
    ]
    assert not out


def test_what_jax_and_python_keep_private_is_used_in_one_file():
    users = {m for m in MODULES for other, _ in imported(m) if other.startswith(PRIVATE)}
    assert users == {"lora_jax._core.compat"}


def test_the_house_is_flat():
    assert max(map(depth, MODULES)) <= 19
    assert len(stands_on("lora_jax._bind")) <= 14
    assert not any(room(m) == "_interpret" for m in stands_on("lora_jax._bind"))


def test_thirty_names_at_the_top_each_with_one_home():
    spaces = [n for n in lora.__all__ if (PACKAGE / n).is_dir()]
    assert len(lora.__all__) <= 31 and len(spaces) == 7
    names = [(lora, n) for n in lora.__all__ if n not in spaces]
    names += [(getattr(lora, space), n) for space in spaces for n in getattr(lora, space).__all__]
    homes = [id(getattr(home, name)) for home, name in names]
    assert len(homes) == len(set(homes))


def test_what_checkers_read_at_the_top_is_what_is_imported_when_it_is_used():
    """The imports under TYPE_CHECKING, those of `__getattr__`, and `__all__` are one list."""
    top = ast.parse((PACKAGE / "__init__.py").read_text()).body
    (block,) = (x for x in top if isinstance(x, ast.If) and ast.unparse(x.test) == "TYPE_CHECKING")
    read = {(x.module, name.name) for x in block.body for name in x.names}
    used = {(f"lora_jax.{home}", n) for home, names in lora._HOMES.items() for n in names}
    assert read == used | {("lora_jax", n) for n in lora.__all__ if (PACKAGE / n).is_dir()}
    assert {name for _, name in read} == set(lora.__all__)
