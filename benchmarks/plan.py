"""What LoRA on the largest models takes of every chip, by the word of the TPU compiler: no TPU is needed.

    python -m benchmarks.plan                                  # every row that is missing: hours on two cores
    python -m benchmarks.plan --rows block "70B v5e:16x16"     # some of them
    python -m benchmarks.plan --rows                           # none: prints the tables of what is there

All parameters are abstract. Results are kept as they come, and a run that was stopped goes on where it was.
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import jlora
from benchmarks import _byhand, _llama, _measure
from benchmarks._llama import SIZES, Sizes
from benchmarks._measure import Bar

OPTIMISER = optax.adam(1e-4)
FORMS = ("jlora", "by hand", "merged", "base", "full")


@dataclasses.dataclass(frozen=True)
class Row:
    """One model on one topology.

    Arguments:
        sizes: of the model.
        topology: its name.
        mesh: replicas, and devices of each along `data` and along `model`.
        batch: sequences in a step.
        forms: the steps to compile: `jlora`; the same LoRA `by hand`; `merged` inside the step; the `base`, all
            frozen, with a gradient to the embedded tokens; and `full` fine-tuning.
        rank: of the LoRA.
        kernels: a pattern of the kernels that are adapted.
        base: how the layers' kernels are held: `bf16` or `nf4`.
    """

    sizes: Sizes
    topology: str
    mesh: tuple[int, int, int]
    batch: int
    forms: tuple[str, ...] = FORMS[:3]
    rank: int = 16
    kernels: str = r"layers/(wq|wk|wv|wo|gate|up|down)"
    base: str = "bf16"


def _row(model: str, topology: str, forms: tuple[str, ...] = FORMS[:3], **changes: Any) -> Row:
    """One sequence of full length for every eight chips, which share each layer."""
    data = max(1, _chips(topology) // 8)
    row = Row(SIZES[model], topology, (1, data, _chips(topology) // data), data, forms)
    return dataclasses.replace(row, **changes)


def _chips(topology: str) -> int:
    return math.prod(int(n) for n in topology.split(":")[1].split("x"))


def _weak(topology: str) -> Row:
    """Eight layers of the 70B model on more and more replicas of 16 chips, each with two sequences."""
    replicas = _chips(topology) // 16
    sizes = dataclasses.replace(SIZES["Llama 3 70B"], layers=8)
    return Row(sizes, topology, (replicas, 2, 8), 2 * replicas, FORMS[:1])


def _nf4(model: str, topology: str, batch: int, length: int) -> Row:
    """A base in 4 bits, on few chips."""
    sizes = dataclasses.replace(SIZES[model], length=length)
    return _row(model, topology, sizes=sizes, batch=batch, base="nf4")


BLOCK = Sizes(8, 4096, 14336, 32, 8, length=2048)
WEAK = ("4x4", "4x8", "8x8", "8x16", "16x16")
PAPER = {"rank": 4, "kernels": r"layers/(wq|wv)"}

# The largest slice that does not hold the step, None where the least already does, and the smallest that holds it.
SMALLEST: dict[tuple[str, str], dict[str, tuple[str | None, str]]] = {
    ("Llama 3 8B", "bf16"): {"v5e": ("1x1", "2x2"), "v6e": (None, "1x1"), "v5p": (None, "2x2x1")},
    ("Llama 3 8B", "nf4"): {"v5e": (None, "1x1"), "v6e": (None, "1x1"), "v5p": (None, "2x2x1")},
    ("Llama 3 70B", "bf16"): {"v5e": ("2x4", "4x4"), "v6e": ("2x2", "2x4"), "v5p": (None, "2x2x1")},
    ("Llama 3 70B", "nf4"): {"v5e": ("1x1", "2x2"), "v6e": ("1x1", "2x2"), "v5p": (None, "2x2x1")},
    ("Llama 3 405B", "bf16"): {"v5e": ("8x8", "8x16"), "v6e": ("4x4", "4x8"), "v5p": ("2x2x2", "2x2x4")},
    ("Llama 3 405B", "nf4"): {"v5e": ("4x4", "4x8"), "v6e": ("2x4", "4x4"), "v5p": (None, "2x2x1")},
}


def _smallest() -> dict[str, Row]:
    out = {}
    for (model, base), kinds in SMALLEST.items():
        for kind, (small, enough) in kinds.items():
            for slice_, forms in ((small, FORMS[:1]), (enough, FORMS[:3])):
                if slice_ is not None:
                    name = f"{kind}:{slice_}"
                    out[f"{model.split()[-1]} {base} {name}"] = _row(model, name, forms, base=base)
    return out


ROWS = {
    "block": Row(BLOCK, "v5e:1x1", (1, 1, 1), 4),
    "70B v5e:16x16": _row("Llama 3 70B", "v5e:16x16", FORMS[:4]),
    "70B nf4 v5e:4x4": _nf4("Llama 3 70B", "v5e:4x4", batch=16, length=2048),
    **{f"weak {n}": _weak(f"v5e:{n}") for n in WEAK},
    "405B v5p:8x8x8": _row("Llama 3 405B", "v5p:8x8x8"),
    "GPT-3 v5p:4x4x4": _row("GPT-3 175B", "v5p:4x4x4", ("jlora", "by hand", "merged", "full"), **PAPER),
    **_smallest(),
}


def step(row: Row, form: str, mesh: AbstractMesh) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A jitted training step `(trained, state, params, tokens) -> (trained, state, loss)`, and abstract arguments."""
    params = _llama.params(row.sizes, mesh, _llama.BASES[row.base])
    tokens = _llama.array(mesh, (row.batch, row.sizes.length), _llama.WHOLE, jnp.int32)
    model = _llama.loss(row.sizes)
    with jax.sharding.use_abstract_mesh(mesh):
        sites = jlora.trace(model, params, tokens)
    adapter = jax.eval_shape(
        lambda: jlora.init(jax.random.key(0), sites, {row.kernels: jlora.LoRA(row.rank, alpha=2.0 * row.rank)})
    )
    adapter = jax.tree.map(_on, adapter, jlora.shardings(adapter, params))
    factors = {path: (update.factors["a"], update.factors["b"]) for path, update in adapter.items()}
    adapted, by_hand = jlora.adapt(model, on_dense="error"), _llama.loss(row.sizes, _byhand.usual(2.0))
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
    whole = NamedSharding(mesh, PartitionSpec())
    state = optax.tree_map_params(
        OPTIMISER,
        lambda leaf, like: _on(leaf, like.sharding),
        jax.eval_shape(OPTIMISER.init, trained),
        trained,
        transform_non_params=lambda leaf: _on(leaf, whole),
    )

    def run(trained: Any, state: Any, params: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(trained, params, tokens)
        updates, state = OPTIMISER.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, value

    out = jax.tree.map(lambda leaf: leaf.sharding.spec, (trained, state))
    jitted = jax.jit(run, donate_argnums=(0, 1), out_shardings=(*out, PartitionSpec()))
    return jitted, (trained, state, None if form == "full" else params, tokens)


def _on(leaf: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def measure(row: Row, form: str) -> dict[str, Any]:
    """The plan of one step."""
    mesh = AbstractMesh(row.mesh, _llama.AXES, axis_types=(AxisType.Auto,) * 3)
    start = time.perf_counter()
    jitted, args = step(row, form, mesh)
    plan = jlora.plan(jitted, *args, topology=row.topology)
    print(plan, flush=True)
    trained = sum(leaf.size for leaf in jax.tree.leaves(args[0]))
    return dataclasses.asdict(plan) | {"trained": trained, "seconds": time.perf_counter() - start}


def bars(result: dict[str, Any]) -> list[Bar]:
    """What jlora has to be, of the rows that are there."""
    out = []
    for name, found in result.items():
        if fitting(found, "jlora", "by hand"):
            ratio = found["jlora"]["temporary_bytes"] / found["by hand"]["temporary_bytes"]
            out.append(Bar(f"{name}: temporary bytes / by hand", ratio, 1.02))
        if fitting(found, "jlora", "base"):
            ours, base = (gathered(ROWS[name], found[form]) for form in ("jlora", "base"))
            out.append(Bar(f"{name}: gathers of weights / base's", ours / base, 1.0))
    largest = result.get("70B v5e:16x16", {})
    if fitting(largest, "jlora"):
        out.append(Bar("70B v5e:16x16: bytes a chip / 9 GB", largest["jlora"]["needed"] / 9e9, 1.0))
    small = result.get("70B nf4 v5e:4x4", {})
    if "jlora" in small:
        ratio = small["jlora"]["needed"] / small["jlora"]["hbm"]
        out.append(Bar("70B nf4 v5e:4x4: bytes a chip / its memory", ratio, 1.0))
    weak = [result[f"weak {n}"]["jlora"] for n in WEAK if fitting(result.get(f"weak {n}", {}), "jlora")]
    if len(weak) > 1:
        for key in ("flops", "temporary_bytes"):
            figures = [one[key] for one in weak]
            chips = f"{weak[0]['devices']} to {weak[-1]['devices']} chips"
            out.append(Bar(f"weak scaling, {chips}: {key}, largest / least", max(figures) / min(figures), 1.03))
    return out


def fitting(found: dict[str, Any], *forms: str) -> bool:
    """Whether all these steps were compiled and fit."""
    return all(form in found and found[form]["fits"] for form in forms)


def gathered(row: Row, plan: dict[str, Any]) -> int:
    """How often a kernel of a layer is gathered: what all devices along `data` have of one's part."""
    sizes = {2 * math.prod(shape[1:]) // row.mesh[2] for shape, _ in _llama.kernels(row.sizes).values()}
    return sum(c["count"] for c in plan["collectives"] if c["kind"] == "all-gather" and c["bytes"] in sizes)


def show(result: dict[str, Any]) -> None:
    """Prints the tables: steps, collectives and bars."""
    header = ["row", "step", "trained", "arguments", "temporaries", "all", "of GiB", "TFLOPs", "collectives GiB"]
    body = []
    for name, found in result.items():
        for form, plan in found.items():
            row = [name, form, f"{plan['trained']:.3g}"]
            if plan["fits"]:
                sizes = [plan["argument_bytes"], plan["temporary_bytes"], plan["needed"]]
                row += [*(f"{n / 2**30:.2f}" for n in sizes), f"{plan['hbm'] / 2**30:.2f}"]
                row += [f"{plan['flops'] / 1e12:.1f}", f"{moved(plan) / 2**30:.1f}"]
            else:
                row += ["", "", f"{plan['needed'] / 2**30:.2f}", f"{plan['hbm'] / 2**30:.2f}: does not fit", "", ""]
            body.append(row)
    print(f"\n### GiB and TFLOPs a chip\n\n{_measure.table(header, body)}")
    print(f"\n### the smallest slices, GiB a chip\n\n{slices(result)}")
    for name, found in result.items():
        forms = [form for form in FORMS if fitting(found, form)]
        if "base" in forms:
            print(f"\n### collectives of {name}, times\n\n{collectives({form: found[form] for form in forms})}")
    print(f"\n{_measure.verdicts(bars(result))}")


def slices(result: dict[str, Any]) -> str:
    """For every model, base and generation the smallest slice that holds the step, beside the next smaller one."""
    body = []
    for (model, base), kinds in SMALLEST.items():
        for kind, (small, enough) in kinds.items():
            names = [f"{model.split()[-1]} {base} {kind}:{n}" for n in (small, enough)]
            less, found = (result.get(name, {}) for name in names)
            if not fitting(found, "jlora", "by hand"):
                continue
            ours, hand, merged = found["jlora"], found["by hand"], found.get("merged", {})
            sizes = [ours["argument_bytes"], ours["temporary_bytes"], ours["needed"]]
            rest = [f"{ours['temporary_bytes'] / hand['temporary_bytes']:.3f}"]
            rest += [f"{one['needed'] / 2**30:.2f}" if one else "" for one in (merged, less.get("jlora"))]
            rest += [f"{moved(one) / 2**30:.1f}" for one in (ours, hand)]
            body.append([model, base, f"{kind}:{enough}", ours["devices"], *(f"{n / 2**30:.2f}" for n in sizes)])
            body[-1] += [f"{ours['hbm'] / 2**30:.2f}", *rest]
    header = ["model", "base", "slice", "chips", "arguments", "temporaries", "all", "of", "temporaries / by hand"]
    return _measure.table([*header, "merged: all", "next smaller: all", "sent", "by hand: sent"], body)


def draw(result: dict[str, Any], file: Path) -> None:
    """The smallest slices' chips: what fills their memory with jlora, and up to where the merged step goes."""
    rows = [
        (f"{model.removeprefix('Llama 3 ')} {base}, {kind}:{n}", result[f"{model.split()[-1]} {base} {kind}:{n}"])
        for (model, base), kinds in SMALLEST.items()
        for kind, (_, n) in kinds.items()
        if fitting(result.get(f"{model.split()[-1]} {base} {kind}:{n}", {}), "jlora")
    ]
    if not rows:
        return
    import matplotlib  # here, since the tests of plans do without it

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 0.6 + 0.27 * len(rows)), layout="constrained")
    for at, (_, found) in enumerate(rows):
        ours, merged = found["jlora"], found.get("merged")
        share = 100 / ours["hbm"]
        held = share * ours["argument_bytes"]
        axis.barh(at, held, color="#4c72b0", label="parameters, adapter, Adam")
        axis.barh(at, share * ours["needed"] - held, left=held, color="#dd8452", label="temporaries")
        if merged:
            place = share * merged["needed"]
            if place < 150:
                axis.plot([place] * 2, [at - 0.4, at + 0.4], color="black", linewidth=2, label="merged in the step")
            else:
                axis.text(158, at, f"{place:.0f}% >", va="center", ha="right", fontsize=8)
    axis.axvline(100, color="grey", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(rows)), [f"{name} ({found['jlora']['devices']})" for name, found in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 160)
    axis.set_xlabel("% of a chip's memory")
    handles, labels = axis.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), fontsize=8, loc="outside upper center", ncols=3)
    figure.savefig(file, dpi=150)


def moved(plan: dict[str, Any]) -> int:
    """Bytes of all collectives of a step on one chip."""
    return sum(c["bytes"] * c["count"] for c in plan["collectives"])


def collectives(plans: dict[str, Any], least: float = 1e6) -> str:
    """Every kind and shape of at least so many bytes in all, and how often each step runs it."""
    times = {form: {(c["kind"], c["shape"]): c for c in plan["collectives"]} for form, plan in plans.items()}
    keys = {key: c["bytes"] for found in times.values() for key, c in found.items() if c["bytes"] * c["count"] >= least}
    body = [
        [
            f"{kind} {shape}",
            f"{size:,}",
            *(found[kind, shape]["count"] if (kind, shape) in found else "" for found in times.values()),
        ]
        for (kind, shape), size in sorted(keys.items(), key=lambda item: -item[1])
    ]
    return _measure.table(["collective", "bytes", *times], body)


def main() -> None:
    """Reads the options, compiles what is missing, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), metavar="FORM")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "plan.json")
    options = parser.parse_args()
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.rows:
        row = ROWS[name]
        found = result.setdefault(name, {})
        for form in row.forms:
            if form in options.forms and form not in found:
                print(f"\n## {name}, {form}\n", flush=True)
                found[form] = measure(row, form)
                _measure.save(options.out, result)
    show({name: result[name] for name in ROWS if result.get(name)})
    draw(result, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
