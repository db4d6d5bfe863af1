"""The files of jlora, and what each of them imports."""

import ast
import functools
from pathlib import Path

import jlora

ROOT = Path(jlora.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    return module.partition(".")[0]


@functools.cache
def imports(file: Path) -> set[str]:
    """Full names of all that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@functools.cache
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
