"""Only documented JAX is used outside of `_compat/`, and parameters of control flow are read there alone."""

import ast

import jax
import jax.numpy as jnp
import pytest

from jlora._compat import bodies
from tests.support.source_files import FILES, module_name, package_of

# Modules without a promise of stability, and those of `jax.experimental` that JAX documents as usable.
UNDOCUMENTED = ("jax._src", "jax.core", "jax.interpreters", "jax.extend", "jax.experimental", "jaxlib")
DOCUMENTED = ("jax.experimental.mesh_utils", "jax.experimental.multihost_utils")
ELSEWHERE = [file for file in FILES if package_of(module_name(file)) != "_compat"]


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


def test_only_documented_jax():
    assert {module_name(file): names for file in ELSEWHERE if (names := undocumented(file.read_text()))} == {}


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


def test_parameters_of_control_flow_are_read_in_one_place():
    assert {module_name(file): names for file in ELSEWHERE if (names := read_parameters(file.read_text()))} == {}
