"""The rules of the house, read from the source: imports run one way, and only documented JAX is used."""

import ast
from pathlib import Path

import pytest

import jlora

ROOT = Path(jlora.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Every module may import those before it, and its own line.
LAYERS = [
    ["_compat", "_paths", "_table"],
    ["_factored"],
    ["_product", "_context"],
    ["_contract", "_site", "_flops", "_program"],
    ["_method", "rules.structural", "rules.dot_general", "rules.gather", "rules.conv"],
    ["rules", "_control", "methods.lora", "methods.full", "_lower", "_optim"],
    ["_interpret", "methods", "_merge"],
    ["_trace"],
    ["_transform"],
    ["_dropout", "io", "io.orbax"],
    [""],
]


def name(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> set[str]:
    """Full names of all that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inner(file: Path) -> set[str]:
    """Which modules of jlora a file imports."""
    known = {name(f) for f in FILES}
    out = set()
    for full in imports(file):
        if full == "jlora" or full.startswith("jlora."):
            module = full.removeprefix("jlora").removeprefix(".")
            while module not in known:
                module = module.rpartition(".")[0]
            out.add(module)
    return out


def test_every_module_has_a_place():
    assert sorted(name(f) for f in FILES) == sorted(module for layer in LAYERS for module in layer)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_run_one_way(file: Path):
    level = {module: k for k, layer in enumerate(LAYERS) for module in layer}
    back = {module for module in inner(file) if level[module] >= level[name(file)]}
    assert not back, f"{name(file)} imports {back}, which stand later"


@pytest.mark.parametrize("file", FILES, ids=name)
def test_only_documented_jax(file: Path):
    private = {m for m in imports(file) if m.startswith(("jax._src", "jax.core", "jaxlib"))}
    assert not private or file.name == "_compat.py"


@pytest.mark.parametrize("file", FILES, ids=name)
def test_flax_is_never_imported(file: Path):
    assert not {m for m in imports(file) if m.split(".")[0] in ("flax", "equinox", "haiku")}


def test_init_only_reexports():
    body = ast.parse((ROOT / "__init__.py").read_text()).body
    assert all(isinstance(node, ast.ImportFrom) and node.names[0].asname for node in body[1:])
