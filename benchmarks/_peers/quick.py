"""Compiled costs of jlora's step against the committed ones: FLOPs, temporaries, kernels, equations, collectives.

The step is that of `benchmarks.step`, on a small model: its layers in a Python loop, in a scan, and in a loop on eight
simulated devices, the tokens divided by two and the kernels by four. No figure depends on the load of the machine.
"""

import json
import platform
from argparse import Namespace
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jlora
from benchmarks import _measure, _transformer, step
from benchmarks._measure import Bar
from jlora._plan.cost import cost
from jlora._plan.hlo import parse
from jlora._plan.kernels import kernels

RESULT = _measure.RESULTS / "costs.json"
SIZES = _transformer.Sizes(layers=2, vocabulary=512, length=64)
BATCH, OPTIONS = 4, Namespace(rank=16, alpha=32.0)
JLORA, BY_HAND, FULL = "jlora", "by hand, flattened", "full fine-tuning"
DEPENDS = ("jax", "machine")
# Of the committed figure; all others have to be equal or lower.
TOLERANCE = {"flops": 1.001, "temp_bytes": 1.01}

Costs = dict[str, dict[str, float]]


def programs() -> Costs:
    """The figures of every program, `"jlora, unrolled"` and so on."""
    jax.config.update("jax_num_cpu_devices", 8)
    return {
        f"{name}, {form}": figures(function, args)
        for form in ("unrolled", "scanned", "eight devices")
        for name, function, args in steps(form)
    }


def steps(form: str) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """The names of the steps of a form, their functions and arguments."""
    run, _ = step.FORMS["scanned" if form == "scanned" else "unrolled"]
    params = _transformer.init(jax.random.key(0), SIZES)
    params = _transformer.stack(params) if form == "scanned" else params
    tokens = jnp.zeros((BATCH, SIZES.length), int)
    made = step.make_steps(partial(run, heads=SIZES.heads), params, tokens, jax.random.key(1), OPTIONS)
    for name in (JLORA, BY_HAND, FULL):
        args = made[name].trainable, made[name].frozen, tokens
        trained, frozen, batch = divided(*args) if form == "eight devices" else args
        yield name, step.training_step(made[name].make_logits()), (trained, step.OPTIMISER.init(trained), frozen, batch)


def divided(trained: Any, frozen: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
    """The same arrays on eight devices: kernels and their factors by columns or by rows, tokens by sequence."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rows, columns = PartitionSpec("model", None), PartitionSpec(None, "model")
    specs = {kernel: rows if kernel in ("wo", "w2") else columns for kernel in _transformer.KERNELS}

    def place(path: Any, leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, NamedSharding(mesh, specs.get(path[-1].key, PartitionSpec())))

    batch = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
    if frozen is None:
        return jax.tree_util.tree_map_with_path(place, trained), None, batch
    frozen = jax.tree_util.tree_map_with_path(place, frozen)
    if all(isinstance(value, jlora.Update) for value in trained.values()):
        return jax.device_put(trained, jlora.shardings(trained, frozen)), frozen, batch

    def beside(path: str, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_rows, of_columns = specs[path.rsplit("/", 1)[-1]]
        placed = PartitionSpec(of_rows, None), PartitionSpec(None, of_columns)
        return jax.device_put((a, b), tuple(NamedSharding(mesh, spec) for spec in placed))

    return {path: beside(path, *pair) for path, pair in trained.items()}, frozen, batch


def figures(function: Any, args: tuple[Any, ...]) -> dict[str, float]:
    """What the compiler makes of a function."""
    traced = jax.jit(function).trace(*args)
    compiled = traced.lower().compile()
    text = parse(compiled.as_text() or "")
    costs, memory, sent = compiled.cost_analysis(), compiled.memory_analysis(), cost(text).collectives
    assert costs is not None
    assert memory is not None
    return {
        "flops": costs["flops"],
        "temp_bytes": memory.temp_size_in_bytes,
        "kernels": kernels(text).count,
        "equations": equations(traced.jaxpr.jaxpr),
        "collectives": sum(each.count for each in sent),
        "sent_bytes": sum(each.count * each.bytes for each in sent),
    }


def equations(jaxpr: Any) -> int:
    """The equations of a jaxpr and of those within it."""
    leaves = jax.tree.leaves([list(equation.params.values()) for equation in jaxpr.eqns])
    return len(jaxpr.eqns) + sum(equations(leaf) for leaf in leaves if hasattr(leaf, "eqns"))


def limits(costs: Costs) -> list[Bar]:
    """jlora's figures against those of by hand and of full fine-tuning in the same run."""
    out = []
    for name in (name for name in costs if name.startswith(f"{JLORA}, ")):
        form = name.removeprefix(f"{JLORA}, ")
        ours, hand, full = (costs[f"{each}, {form}"] for each in (JLORA, BY_HAND, FULL))
        for figure in ("flops", "temp_bytes", "collectives", "sent_bytes"):
            limit = hand[figure] * (1.005 if figure == "flops" else 1)
            out.append(Bar(f"{form}: {figure} of jlora, by hand", ours[figure], limit))
        if hand["flops"] <= 0.70 * full["flops"]:  # a large rank, or the body of a scan alone, cannot be within it
            out.append(Bar(f"{form}: FLOPs of jlora, full fine-tuning", ours["flops"], 0.70 * full["flops"]))
    return out


def growth(costs: Costs, committed: Costs) -> list[Bar]:
    """Every figure of jlora against the committed one.

    Raises:
        ValueError: if the committed figures are not those of the same programs.
    """
    if {name: set(row) for name, row in costs.items()} != {name: set(row) for name, row in committed.items()}:
        raise ValueError(f"{RESULT.name} has other programs or figures: run python -m benchmarks.peers --quick --write")
    return [
        Bar(f"{name}: {figure}", value, committed[name][figure] * TOLERANCE.get(figure, 1.0))
        for name, row in costs.items()
        if name.startswith(JLORA)
        for figure, value in row.items()
    ]


def environment() -> dict[str, Any]:
    """What the benchmark ran on; the figures depend on `DEPENDS` of it."""
    return _measure.environment() | {"machine": platform.machine()}


def check(costs: Costs, saved: Mapping[str, Any]) -> int:
    """Prints the figures and the limits that are missed; 1 if there are some."""
    header = ["program", *next(iter(costs.values()))]
    print(_measure.table(header, [[name, *map(_plain, row.values())] for name, row in costs.items()]))
    bars = limits(costs)
    committed, here = ({key: each[key] for key in DEPENDS} for each in (saved["environment"], environment()))
    if committed == here:
        bars += growth(costs, saved["programs"])
    else:
        print(f"The committed figures are of {committed}, and are not compared on {here}.")
    missed = [bar for bar in bars if not bar.passed]
    print("\n".join(f"FAIL {bar.name}: {_plain(bar.value)}, at most {_plain(bar.limit)}" for bar in missed))
    print(f"{len(bars) - len(missed)} of {len(bars)} limits are kept.")
    return int(bool(missed))


def main(write: bool) -> int:
    """Compiles, and writes the figures or compares them; the status of the program."""
    costs = programs()
    if write:
        _measure.save(RESULT, {"environment": environment(), "programs": costs})
    return check(costs, json.loads(RESULT.read_text()))


def _plain(value: float) -> str:
    return f"{value:,.0f}"
