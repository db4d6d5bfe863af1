"""Imports run from later packages to earlier ones, on few floors, and public names are listed."""

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jlora
import jlora.methods
from tests.support.source_files import FILES, ROOT, imported_modules, imports, module_name, package_of

# A package imports those before it. `_plan` stands apart: it knows nothing about LoRA.
PACKAGES = [
    "_compat",
    "_tree",
    "_plan",
    "_ir",
    "_ops",
    "_interpreter",
    "methods",
    "_trace",
    "optim",
    "_adapter",
    "quantized",
    "io",
    "bank",
    "nnx",
]
ONLY = {"_plan": {"_compat", "_tree"}}

# Modules of public names alone. They define nothing, and only the root, whose name is empty, imports them.
PUBLIC_NAMES = ["extend", "gguf", "hf", "kohya", "loralib", "peft"]
ORDER = [*PACKAGES, *PUBLIC_NAMES, "__main__", ""]


def imported_packages(package: str) -> set[str]:
    """Which other packages of jlora the files of one import."""
    files = [file for file in FILES if package_of(module_name(file)) == package]
    return {package_of(module) for file in files for module in imported_modules(file)} - {package}


def test_every_package_has_a_place():
    assert {package_of(module_name(file)) for file in FILES} == set(ORDER)


def test_packages_are_few():
    assert len(PACKAGES) <= 14


def test_floors_are_few():
    floors: dict[str, int] = {}
    for package in ORDER:
        floors[package] = 1 + max((floors[target] for target in imported_packages(package)), default=0)
    assert floors[""] == max(floors.values()) <= 10, floors


def later_modules(file: Path) -> set[str]:
    """Which modules of jlora a file imports that its package may not import."""
    package = package_of(module_name(file))
    earlier = set(PACKAGES[: PACKAGES.index(package)]) if package in PACKAGES else set(PACKAGES)
    allowed = ONLY.get(package, earlier) | {package} | (set(PUBLIC_NAMES) if not package else set())
    return {module for module in imported_modules(file) if package_of(module) not in allowed}


def test_packages_import_earlier_packages_only():
    assert {module_name(file): modules for file in FILES if (modules := later_modules(file))} == {}


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_modules_of_public_names_define_nothing(name: str):
    docstring, *statements = ast.parse((ROOT / f"{name}.py").read_text()).body
    assert isinstance(docstring, ast.Expr)
    assigned = [node for node in statements if not isinstance(node, ast.ImportFrom)]
    assert [ast.unparse(node).partition(" =")[0] for node in assigned] == ["__all__", "__docformat__"]


def test_no_import_cycle():
    edges = {module_name(file): imported_modules(file) - {module_name(file)} for file in FILES}
    while free := {module for module, targets in edges.items() if not targets & set(edges)}:
        edges = {module: targets for module, targets in edges.items() if module not in free}
    assert not edges, f"imported in a circle: {sorted(edges)}"


def test_flax_is_imported_by_its_bridge_alone():
    frameworks = {
        module_name(file): {name.split(".")[0] for name in imports(file)} & {"flax", "equinox", "haiku"}
        for file in FILES
    }
    allowed = {name: {"flax"} if package_of(name) == "nnx" else set() for name in frameworks}
    assert {name: imported - allowed[name] for name, imported in frameworks.items() if imported - allowed[name]} == {}


def exports(file: Path) -> dict[str, str]:
    """The names that a file imports `as` themselves, those for type checkers included, each with its module."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    return {a.asname: node.module or "" for node in nodes for a in node.names if a.asname}


def test_every_lazy_name_is_imported_from_the_module_that_type_checkers_read():
    methods = jlora.methods._MODULES
    assert exports(ROOT / "methods" / "__init__.py") == methods
    tables = jlora._LAZY | dict.fromkeys(jlora._LAZY_MODULES, "jlora")
    assert exports(ROOT / "__init__.py").items() >= tables.items() - methods.items()
    for name, module in tables.items():
        assert getattr(jlora, name) is getattr(importlib.import_module(module), name)


def test_every_exported_name_is_listed_and_exists():
    imported = {*exports(ROOT / "__init__.py"), *dir(jlora.methods)}
    assert set(jlora.__all__) == imported
    assert set(dir(jlora)) >= imported
    assert all(getattr(jlora, name) is not None for name in jlora.__all__)
    assert jlora.__version__ == importlib.metadata.version("jlora")
    with pytest.raises(AttributeError, match="no attribute 'LORA'"):
        _ = jlora.LORA  # pyright: ignore[reportAttributeAccessIssue]


def in_a_fresh_process(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


def test_import_loads_only_jax_and_the_core():
    """The other packages and the methods are imported when a name of theirs is first used."""
    loaded = in_a_fresh_process("import sys, jlora; print(*sorted(sys.modules))").split()
    assert "jax" in loaded
    heavy = {"orbax", "tensorstore", "optax", "safetensors", "flax", "qwix"}
    assert not heavy & {name.partition(".")[0] for name in loaded}
    assert "jax.experimental.pallas" not in loaded
    of_jlora = [name.removeprefix("jlora.") for name in loaded if name.startswith("jlora.")]
    core = {"_compat", "_tree", "_ir", "_ops", "_interpreter", "methods", "_trace", "_adapter"}
    assert {package_of(name) for name in of_jlora} == core
    assert not {name for name in of_jlora if re.match(r"methods\.[^_]", name)}
    public_calls = [name for name in of_jlora if name.startswith("_adapter.")]
    assert public_calls == [f"_adapter.{name}" for name in ("adapt", "init", "merge", "targets")]


def test_what_looks_like_a_module_can_be_imported():
    names = [*jlora._LAZY_MODULES, "io.loralib", "io.peft"]
    lines = [f"import jlora.{name} as module; import jlora; assert module is jlora.{name}, {name!r}" for name in names]
    assert in_a_fresh_process("\n".join([*lines, "print(len(jlora._LAZY_MODULES))"])) == str(len(names) - 2)


def test_names_of_modules_can_be_imported():
    program = """
from jlora.peft import Module, Names, load, save
from jlora.loralib import load as load_loralib
from jlora import io
print(Module is io.peft.Module, load is io.peft.load, load_loralib is io.loralib.load)
"""
    assert in_a_fresh_process(program) == "True True True"


def test_lazy_names_are_reached_in_every_way():
    program = """
import jlora
import jlora.methods
print(jlora.peft.load.__module__)
from jlora import load
print(load.__module__)
from jlora import *
print(loralib.load.__module__, riemannian.__module__)
from jlora.io import peft
print(peft.load is jlora.peft.load)
"""
    expected = ["jlora.io.peft.api", "jlora.io.checkpoint.orbax", "jlora.io.loralib", "jlora.optim.gradients", "True"]
    assert in_a_fresh_process(program).split() == expected
