"""Memory and FLOPs of a device for LoRA on the largest models, by the compilers for TPUs and GPUs, which need neither.

    python -m benchmarks.plan                                  # every missing row: two hours on two cores for TPUs
    python -m benchmarks.plan --rows block "70B v5e:16x16"     # some rows
    python -m benchmarks.plan --rows                           # no row: prints the tables of existing results

All parameters are abstract. Every result is written at once, and a run that was stopped continues with the next one.
A row is missing if it has no result of the compiler's version that is installed; other compilers' rows stay.
"""

import dataclasses
import functools
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

import jlora
from benchmarks import _byhand, _llama, _measure, _plan_report
from benchmarks._plan_rows import CARDS, FORMS, ROWS, Row

OPTIMISER = optax.adam(1e-4)


def step(row: Row, form: str, mesh: AbstractMesh) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A jitted training step `(trained, state, params, tokens) -> (trained, state, loss)`, and abstract arguments."""
    params = _llama.params(row.sizes, mesh, _llama.BASES[row.base], row.partition)
    tokens = _llama.array(mesh, (row.batch, row.sizes.length), _llama.BATCHED, jnp.int32)
    model = _llama.loss(row.sizes)
    with jax.sharding.use_abstract_mesh(mesh):
        sites = jlora.trace(model, params, tokens)
    adapter = jax.eval_shape(
        lambda: jlora.init(jax.random.key(0), sites, {row.kernels: jlora.LoRA(row.rank, alpha=2.0 * row.rank)})
    )
    adapter = jax.tree.map(_place, adapter, jlora.shardings(adapter, params))
    factors = {path: (update.factors["a"], update.factors["b"]) for path, update in adapter.items()}
    adapted, by_hand = jlora.adapt(model, on_dense="error"), _llama.loss(row.sizes, _byhand.standard(2.0))
    losses: dict[str, tuple[Any, Callable[..., jax.Array]]] = {
        "jlora": (adapter, lambda adapter, params, tokens: adapted(params, adapter, tokens)),
        "by hand": (factors, lambda factors, params, tokens: by_hand(_byhand.attach(params, factors), tokens)),
        "merged": (adapter, lambda adapter, params, tokens: model(jlora.merge(params, adapter), tokens)),
        "base": (
            _llama.array(mesh, (row.sizes.width,), PartitionSpec()),
            lambda start, params, tokens: model(params, tokens, start),
        ),
        "full": (params, lambda params, _, tokens: model(params, tokens)),
    }
    trained, loss = losses[form]
    replicated = NamedSharding(mesh, PartitionSpec())
    state = optax.tree_map_params(
        OPTIMISER,
        lambda leaf, like: _place(leaf, like.sharding),
        jax.eval_shape(OPTIMISER.init, trained),
        trained,
        transform_non_params=lambda leaf: _place(leaf, replicated),
    )

    def run(trained: Any, state: Any, params: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(trained, params, tokens)
        updates, state = OPTIMISER.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, value

    out = jax.tree.map(lambda leaf: leaf.sharding.spec, (trained, state))
    jitted = jax.jit(run, donate_argnums=(0, 1), out_shardings=(*out, PartitionSpec()))
    return jitted, (trained, state, None if form == "full" else params, tokens)


def _place(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """An abstract array with a sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def measure(row: Row, form: str) -> dict[str, Any]:
    """The plan of one step."""
    mesh = AbstractMesh(row.mesh, _llama.AXES, axis_types=(AxisType.Auto,) * 3)
    start = time.perf_counter()
    jitted, args = step(row, form, mesh)
    plan = jlora.plan(jitted, *args, topology=row.topology)
    tqdm.write(f"\n{row.topology}, {form}\n{plan}")
    trained = sum(leaf.size for leaf in jax.tree.leaves(args[0]))
    about = {"trained": trained, "seconds": time.perf_counter() - start, "versions": versions(row.topology)}
    return dataclasses.asdict(plan) | about


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(topology: str) -> dict[str, str]:
    """What decides the program that is compiled for a topology; without its compiler nothing."""
    compilers = ("jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12") if topology.split(":")[0] in CARDS else ("libtpu",)
    installed = {package: _version(package) for package in ("jax", "jaxlib", "optax", *compilers)}
    out = {package: version for package, version in installed.items() if version is not None}
    return out | {"python": platform.python_version()} if len(out) == len(installed) else {}


def is_missing(row: Row, plan: dict[str, Any] | None) -> bool:
    """Whether a row has to be compiled, and can be."""
    here = versions(row.topology)
    return bool(here) and (plan is None or plan.get("versions") != here)


def main() -> None:
    """Reads the options, compiles what is missing, prints and writes."""
    parser = _measure.parser(__doc__, "plan.json")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS), metavar="ROW", help="default: all rows")
    parser.add_argument(
        "--forms",
        nargs="+",
        choices=FORMS,
        default=list(FORMS),
        metavar="FORM",
        help=f"of {', '.join(FORMS)} (default: all)",
    )
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    missing = [
        (name, form)
        for name in options.rows
        for form in ROWS[name].forms
        if form in options.forms and is_missing(ROWS[name], results.get(name, {}).get(form))
    ]
    with tqdm(missing, unit="program", disable=not missing) as bar:
        for name, form in bar:
            bar.set_description(f"{name}, {form}")
            results.setdefault(name, {})[form] = measure(ROWS[name], form)
            _measure.save(options.out, results)
    results = {name: results[name] for name in ROWS if results.get(name)}
    _plan_report.show(results)
    _plan_report.draw(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
