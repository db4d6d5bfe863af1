"""Imports run from later packages to earlier ones, and only documented JAX is used outside of `_compat.py`."""

import ast
from pathlib import Path

import pytest

import jlora

ROOT = Path(jlora.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# A package imports those before it. `_plan` stands apart: it knows nothing about LoRA.
PACKAGES = [
    "_compat",
    "_pretty",
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
    "",
]
ONLY = {"_plan": {"_compat", "_pretty", "_tree"}}


def module_name(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    return module.partition(".")[0]


def imports(file: Path) -> set[str]:
    """Full names of all that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_modules(file: Path) -> set[str]:
    """Which modules of jlora a file imports."""
    modules, out = {module_name(f) for f in FILES}, set()
    for full in imports(file):
        if full == "jlora" or full.startswith("jlora."):
            module = full.removeprefix("jlora").removeprefix(".")
            while module not in modules:
                module = module.rpartition(".")[0]
            out.add(module)
    return out


def test_every_package_has_a_place():
    assert {package_of(module_name(file)) for file in FILES} == set(PACKAGES)


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_packages_import_earlier_packages_only(file: Path):
    package = package_of(module_name(file))
    allowed = ONLY.get(package, set(PACKAGES[: PACKAGES.index(package)])) | {package}
    wrong = {module for module in imported_modules(file) if package_of(module) not in allowed}
    assert not wrong, f"{module_name(file)} imports {wrong}"


def test_no_import_cycle():
    edges = {module_name(file): imported_modules(file) - {module_name(file)} for file in FILES}
    while free := {module for module, targets in edges.items() if not targets & set(edges)}:
        edges = {module: targets for module, targets in edges.items() if module not in free}
    assert not edges, f"imported in a circle: {sorted(edges)}"


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_only_documented_jax(file: Path):
    private = {m for m in imports(file) if m.startswith(("jax._src", "jax.core", "jaxlib"))}
    assert not private or file.name == "_compat.py"


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_flax_is_never_imported(file: Path):
    assert not {m for m in imports(file) if m.split(".")[0] in ("flax", "equinox", "haiku")}


def test_init_only_reexports():
    body = ast.parse((ROOT / "__init__.py").read_text()).body
    assert all(isinstance(node, ast.ImportFrom) and node.names[0].asname for node in body[1:])
