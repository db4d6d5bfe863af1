"""The rules of the house, read from the source: imports run one way, and only documented JAX is used."""

import ast
from pathlib import Path

import pytest

import jlora

ROOT = Path(jlora.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Every module may import those before it. A method's file stands where `methods.*` does.
LAYERS = [
    ["_compat", "_hlo", "_hyperparameters", "_inverse", "_quantized", "_table", "_topology"],
    ["_deferred", "_paths", "quantized.gguf", "quantized.nf4"],
    ["_explicit", "_plan", "quantized"],
    ["_factored"],
    ["_cuts", "_product", "_context"],
    ["_middle"],
    ["_contract", "_site", "_flops", "_program"],
    ["_method", "rules.structural", "rules.dot_general", "rules.gather", "rules.conv"],
    ["rules", "_control", "methods._check", "methods._start", "methods._axes", "methods._random", "_lower", "_optim"],
    ["methods._norm", "methods._repeat", "methods._rotation", "methods.lora"],
    ["_interpret", "methods.*", "_merge", "_sharding"],
    ["methods"],
    ["_trace"],
    ["_transform"],
    ["_dropout", "_rank", "_gradients", "_budget", "_targets", "_to_lora", "_loftq", "_quantize", "io"],
    ["io._error", "io._pieces", "io._base", "io._names", "io._peft_config", "io._index"],
    ["io._raw"],
    ["io._arrays", "io._describe", "io._layout", "io._peft_base"],
    ["io._state", "io._peft_tensors"],
    ["io.orbax", "io._peft_vera", "io._peft_whole"],
    ["io._peft_read", "io.loralib"],
    ["io._peft_write"],
    ["io.peft"],
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


LEVEL = {module: k for k, layer in enumerate(LAYERS) for module in layer}


def place(module: str) -> str:
    return "methods.*" if module.startswith("methods.") and module not in LEVEL else module


def test_every_module_has_a_place():
    known = {module for layer in LAYERS for module in layer} - {"methods.*"}
    assert known <= {name(f) for f in FILES}
    assert all(place(name(f)) in LEVEL for f in FILES)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_run_one_way(file: Path):
    back = {module for module in inner(file) if LEVEL[place(module)] >= LEVEL[place(name(file))]}
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
