"""One training step of a transformer: jlora against LoRA by hand, merging in the step, and full fine-tuning.

    python -m benchmarks.step

All programs take the same tokens, factors and base parameters, all of them arguments, and the same AdamW. Wall times
are from one run in which the programs take turns, and every ratio of them is the median of the ratios of single rounds.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jlora
from benchmarks import _byhand, _measure, _transformer
from benchmarks._measure import Bar

Forward = Callable[[Any, jax.Array], jax.Array]
# (trainable, frozen, tokens) -> logits
Logits = Callable[[Any, Any, jax.Array], jax.Array]

FORMS = {"unrolled": _transformer.unrolled, "scanned": _transformer.scanned}
HANDS = ("by hand", "by hand, flattened")
OPTIMISER = optax.adamw(1e-3)


def training_step(logits: Logits) -> Callable[..., Any]:
    """`(trainable, state, frozen, tokens) -> (trainable, state, loss)`, next-token prediction with AdamW."""

    def loss(trainable: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        targets = jnp.roll(tokens, -1, axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(logits(trainable, frozen, tokens), targets).mean()

    def step(trainable: Any, state: Any, frozen: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(trainable, frozen, tokens)
        updates, state = OPTIMISER.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    return step


def by_hand(forward: Callable[..., jax.Array], product: Any) -> Logits:
    """The model with factors in its products."""
    return lambda factors, params, tokens: forward(_byhand.attach(params, factors), tokens, product=product)


def adapted(forward: Forward) -> Logits:
    """The base model, adapted."""
    apply = jlora.adapt(forward)
    return lambda adapter, params, tokens: apply(params, adapter, tokens)


def merging(forward: Forward) -> Logits:
    """The base model on parameters that are merged in the step."""
    return lambda adapter, params, tokens: forward(jlora.merge(params, adapter), tokens)


def full(forward: Forward) -> Logits:
    """The base model, all of it trained."""
    return lambda params, _, tokens: forward(params, tokens)


def measure(form: str, options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Costs, times and bars of the five steps for one form of the model."""
    sizes = _transformer.Sizes(layers=options.layers, width=options.width, hidden=4 * options.width)
    forward = partial(FORMS[form], heads=sizes.heads)
    keys = jax.random.split(jax.random.key(0), 3)
    params = _transformer.init(keys[0], sizes)
    params = _transformer.stack(params) if form == "scanned" else params
    tokens = jax.random.randint(keys[1], (options.batch, sizes.length), 0, sizes.vocabulary)

    sites = jlora.trace(forward, params, tokens)
    # No factor is zero, so that programs which agree are known to compute the same.
    nonzero = jax.nn.initializers.normal(0.01)
    method = jlora.LoRA(rank=options.rank, alpha=options.alpha, b_init=nonzero)
    adapter = jlora.init(keys[2], sites, {f".*/({'|'.join(_transformer.KERNELS)})": method})
    factors = {path: (update.factors["a"], update.factors["b"]) for path, update in adapter.items()}
    scale = options.alpha / options.rank

    # Whatever is adapted is wrapped anew whenever a step is made, so that tracing it is timed as for a new program.
    steps: dict[str, tuple[Callable[[], Logits], Any, Any]] = {
        "jlora": (lambda: adapted(lambda *args: forward(*args)), adapter, params),
        HANDS[0]: (lambda: by_hand(forward, _byhand.usual(scale)), factors, params),
        HANDS[1]: (lambda: by_hand(forward, _byhand.flattened(scale)), factors, params),
        "merge in the step": (lambda: merging(lambda *args: forward(*args)), adapter, params),
        "full fine-tuning": (lambda: full(lambda *args: forward(*args)), params, None),
    }

    make = {name: partial(lambda new: training_step(new()), new) for name, (new, _, _) in steps.items()}
    args = {name: (tree, OPTIMISER.init(tree), frozen, tokens) for name, (_, tree, frozen) in steps.items()}
    traced = {name: (make[name], args[name]) for name in ("jlora", HANDS[1], "full fine-tuning")}
    lowering = _measure.lowering(traced, options.lowerings)

    programs = {name: _measure.compile(make[name](), *args[name]) for name in steps}
    agree({name: float(programs[name].run()[-1]) for name in ("jlora", *HANDS, "merge in the step")})
    programs["forward of the base"] = _measure.compile(forward, params, tokens)
    seconds = _measure.interleave({name: p.run for name, p in programs.items()}, options.rounds)

    rows = {
        name: {
            "flops": p.flops,
            "temp_bytes": p.temp_bytes,
            "seconds": statistics.median(seconds[name]),
            "of_full": _measure.ratio(seconds, name, "full fine-tuning"),
            "lower_seconds": statistics.median(lowering[name]) if name in lowering else None,
            "compile_seconds": p.compile_seconds,
            "rounds": seconds[name],
        }
        for name, p in programs.items()
    }
    return rows, bars(rows, seconds, lowering)


def agree(losses: dict[str, float]) -> None:
    """Raises unless all steps report the same loss: the time of a wrong program is worth nothing."""
    if not max(losses.values()) - min(losses.values()) <= 1e-4 * abs(losses["jlora"]):
        raise AssertionError(f"The steps compute different losses: {losses}.")


def bars(rows: dict[str, Any], seconds: dict[str, list[float]], lowering: dict[str, list[float]]) -> list[Bar]:
    """What jlora has to be: the program that a careful hand would write, and well below full fine-tuning."""
    ours, whole = rows["jlora"], rows["full fine-tuning"]
    least = {key: min(rows[name][key] for name in HANDS) for key in ("flops", "temp_bytes")}
    faster = min(HANDS, key=lambda name: rows[name]["seconds"])
    return [
        Bar("FLOPs / better by hand", ours["flops"] / least["flops"], 1.005),
        Bar("temporary bytes / better by hand", ours["temp_bytes"] / least["temp_bytes"], 1.02),
        Bar("FLOPs / full fine-tuning", ours["flops"] / whole["flops"], 0.70),
        Bar("wall time / better by hand", _measure.ratio(seconds, "jlora", faster), 1.05),
        Bar("wall time / full fine-tuning", _measure.ratio(seconds, "jlora", "full fine-tuning"), 0.92),
        Bar("tracing and lowering / full fine-tuning", _measure.ratio(lowering, "jlora", "full fine-tuning"), 2.5),
    ]


def show(form: str, rows: dict[str, Any], judged: list[Bar]) -> None:
    """Prints the figures of one form."""
    header = ["step", "GFLOPs", "temporary MB", "seconds", "of full", "lowering s", "compiling s"]
    body = [
        [
            name,
            f"{row['flops'] / 1e9:.2f}",
            f"{row['temp_bytes'] / 1e6:.1f}",
            f"{row['seconds']:.3f}",
            f"{row['of_full']:.3f}",
            "" if row["lower_seconds"] is None else f"{row['lower_seconds']:.3f}",
            f"{row['compile_seconds']:.2f}",
        ]
        for name, row in sorted(rows.items(), key=lambda item: item[1]["seconds"])
    ]
    note = ", FLOPs with the body of the scan counted once" if form == "scanned" else ""
    print(f"\n### {form}{note}\n\n{_measure.table(header, body)}\n\n{_measure.verdicts(judged)}", flush=True)


def main() -> None:
    """Reads the options, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds")
    parser.add_argument("--lowerings", type=int, default=5, help="rounds of tracing and lowering")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step.json")
    options = parser.parse_args()

    result: dict[str, Any] = {
        "environment": _measure.environment(),
        "options": {k: v for k, v in vars(options).items() if k != "out"},
    }
    for form in options.forms:
        rows, judged = measure(form, options)
        show(form, rows, judged)
        result[form] = {"steps": rows, "bars": [asdict(b) | {"passed": b.passed} for b in judged]}
        _measure.save(options.out, result)


if __name__ == "__main__":
    main()
