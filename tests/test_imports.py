"""Imports run from later packages to earlier ones, and only documented JAX is used outside of `_compat.py`."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jlora
import jlora.methods
from jlora._compat import bodies

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
    "extend",
    "_trace",
    "optim",
    "_adapter",
    "quantized",
    "io",
    "loralib",
    "peft",
    "bank",
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


# Modules without a promise of stability, and those of `jax.experimental` that JAX documents as usable.
UNDOCUMENTED = ("jax._src", "jax.core", "jax.interpreters", "jax.extend", "jax.experimental", "jaxlib")
DOCUMENTED = ("jax.experimental.mesh_utils", "jax.experimental.multihost_utils")
ELSEWHERE = [file for file in FILES if file != ROOT / "_compat.py"]


def is_in(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def dotted(node: ast.AST) -> str:
    """The name that a chain of attributes spells, empty if it does not start with a name."""
    if isinstance(node, ast.Attribute):
        start = dotted(node.value)
        return start and f"{start}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def undocumented(source: str) -> set[str]:
    """Undocumented names of JAX that a program imports or reaches by attributes, under whatever alias."""
    tree = ast.parse(source)
    names, full_names = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            full_names |= {
                a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            imported = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names |= set(imported.values())
            full_names |= imported
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (chain := dotted(node)):
            first, _, rest = chain.partition(".")
            names.add(f"{full_names.get(first, first)}.{rest}")
    return {
        name
        for name in names
        if is_in(name, UNDOCUMENTED) and not is_in(name, DOCUMENTED) and name != "jax.experimental"
    }


@pytest.mark.parametrize(
    "source",
    [
        "from jax._src import core",
        "import jax.extend.core as c",
        "import jax\njax.core.Tracer",
        "import jax as j\nj.interpreters.ad.Zero",
        "from jax import core\ncore.Jaxpr",
        "from jax import experimental\nexperimental.topologies.get_topology_desc",
    ],
)
def test_undocumented_names_are_seen(source: str):
    assert undocumented(source)
    assert not undocumented(
        "import jax\nfrom jax import lax\nfrom jax.experimental import mesh_utils\njax.jit(lax.add)"
    )


@pytest.mark.parametrize("file", ELSEWHERE, ids=module_name)
def test_only_documented_jax(file: Path):
    assert not undocumented(file.read_text())


def control_flow_parameters() -> set[str]:
    """The names of the parameters of all equations that hold programs."""

    @jax.custom_jvp
    def jvp(x):
        return x

    @jax.custom_vjp
    def vjp(x):
        return x

    @jax.custom_batching.custom_vmap
    def vmap(x):
        return x

    jvp.defjvp(lambda primals, tangents: (primals[0], tangents[0]))
    vjp.defvjp(lambda x: (x, None), lambda _, g: (g,))
    vmap.def_vmap(lambda size, batched, x: (x, batched[0]))
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def program(x):
        x, _ = jax.lax.scan(lambda c, _: (c + 1, None), x, length=2)
        x = jax.lax.while_loop(lambda c: c < 3, lambda c: c + 1, x)
        x = jax.lax.cond(x > 0, lambda: x, lambda: x + 1)
        spec = jax.sharding.PartitionSpec()
        x = jax.shard_map(jnp.sin, mesh=mesh, in_specs=spec, out_specs=spec)(x)
        return vmap(vjp(jvp(jax.checkpoint(jnp.sin)(jax.jit(jnp.sin)(x)))))

    eqns = [eqn for eqn in jax.make_jaxpr(program)(1.0).eqns if bodies(eqn)]
    names = {eqn.primitive.name for eqn in eqns}
    assert {"jit", "scan", "while", "cond", "shard_map", "custom_jvp_call", "custom_vmap_call"} <= names
    return {name for eqn in eqns for name in eqn.params}


PARAMETERS = control_flow_parameters()


def read_parameters(source: str) -> set[str]:
    """Parameters of control-flow equations that a program reads by name, if it reads parameters of equations at all."""
    tree = ast.parse(source)
    if not any(isinstance(node, ast.Attribute) and node.attr == "params" for node in ast.walk(tree)):
        return set()
    keys: list[ast.expr] = [node.slice for node in ast.walk(tree) if isinstance(node, ast.Subscript)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
            keys += node.args[:1]
    return {key.value for key in keys if isinstance(key, ast.Constant) and key.value in PARAMETERS}


def test_reads_of_parameters_are_seen():
    assert read_parameters("p = eqn.params\nx = p['jaxpr']") == {"jaxpr"}
    assert read_parameters("eqn.params.get('branches')") == {"branches"}


@pytest.mark.parametrize("file", ELSEWHERE, ids=module_name)
def test_parameters_of_control_flow_are_read_in_one_place(file: Path):
    assert not read_parameters(file.read_text())


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_flax_is_never_imported(file: Path):
    assert not {m for m in imports(file) if m.split(".")[0] in ("flax", "equinox", "haiku")}


def test_every_exported_name_is_listed_and_exists():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    imported = {a.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names if a.asname}
    imported |= set(jlora.methods.__all__)
    assert set(jlora.__all__) == imported
    assert set(dir(jlora)) >= imported
    assert all(getattr(jlora, name) is not None for name in jlora.__all__)
    assert jlora.__version__ == importlib.metadata.version("jlora")
    with pytest.raises(AttributeError, match="no attribute 'LORA'"):
        _ = jlora.LORA  # pyright: ignore[reportAttributeAccessIssue]


def in_a_fresh_process(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


def test_import_loads_only_jax():
    heavy = "orbax", "tensorstore", "optax", "safetensors", "flax", "qwix"
    assert in_a_fresh_process(f"import sys, jlora; print(sorted(sys.modules.keys() & {set(heavy)}))") == "[]"


@pytest.mark.parametrize("name", ["bank", "extend", "io", "loralib", "peft", "quantized", "io.loralib", "io.peft"])
def test_what_looks_like_a_module_can_be_imported(name: str):
    program = f"import jlora.{name} as module; import jlora; print(module is jlora.{name}, module.__name__)"
    assert in_a_fresh_process(program) == f"True jlora.{name}"


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
