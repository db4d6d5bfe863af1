"""One training step of a transformer: jlora against LoRA written by hand, merging in the step, and full fine-tuning.

    python -m benchmarks.step                  # about fifteen minutes on two cores
    python -m benchmarks.step --rounds 0       # prints the compiled costs alone

All programs take the same tokens, factors and base parameters as arguments, and use the same AdamW. Wall times are from
one run in which the programs run in turns; every ratio is the median over rounds of the ratios of one round.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jlora
from benchmarks import _byhand, _measure, _transformer
from benchmarks._measure import Bar

Forward = Callable[[Any, jax.Array], jax.Array]
# (trainable, frozen, tokens) -> logits
Logits = Callable[[Any, Any, jax.Array], jax.Array]

# How the layers run, and what they have: plain kernels, biases, or a gated MLP.
FORMS: dict[str, tuple[Callable[..., jax.Array], dict[str, bool]]] = {
    f"{name}{suffix}": (forward, options)
    for name, forward in (("unrolled", _transformer.unrolled), ("scanned", _transformer.scanned))
    for suffix, options in (("", {}), ("_biased", {"biases": True}), ("_swiglu", {"gated": True}))
}
BY_HAND = ("by hand", "by hand, flattened")
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
    """The model with the factors in its matmuls."""
    return lambda factors, params, tokens: forward(_byhand.attach(params, factors), tokens, product=product)


def adapted(forward: Forward) -> Logits:
    """The base model, adapted."""
    apply = jlora.adapt(forward)
    return lambda adapter, params, tokens: apply(params, adapter, tokens)


def merging(forward: Forward) -> Logits:
    """The base model on parameters that the step merges."""
    return lambda adapter, params, tokens: forward(jlora.merge(params, adapter), tokens)


def full(forward: Forward) -> Logits:
    """The base model, all of it trained."""
    return lambda params, _, tokens: forward(params, tokens)


class Step(NamedTuple):
    """One of the compared training steps.

    Arguments:
        make_logits: makes the function to train. Each call wraps it anew, so that no cache of JAX shortens its tracing.
        trainable: what the optimiser updates.
        frozen: the other parameters.
    """

    make_logits: Callable[[], Logits]
    trainable: Any
    frozen: Any


def make_steps(
    forward: Callable[..., jax.Array], params: Any, tokens: jax.Array, key: jax.Array, options: argparse.Namespace
) -> dict[str, Step]:
    """The five steps, with equal factors."""
    # No factor is zero, so that equal losses show that the programs compute the same.
    nonzero = jax.nn.initializers.normal(0.01)
    method = jlora.LoRA(rank=options.rank, alpha=options.alpha, b_init=nonzero)
    sites = jlora.trace(forward, params, tokens)
    adapter = jlora.init(key, sites, {f".*/({'|'.join(_transformer.KERNELS)})": method})
    factors = {path: (update.factors["a"], update.factors["b"]) for path, update in adapter.items()}
    scale = options.alpha / options.rank
    return {
        "jlora": Step(lambda: adapted(lambda *args: forward(*args)), adapter, params),
        BY_HAND[0]: Step(lambda: by_hand(forward, _byhand.standard(scale)), factors, params),
        BY_HAND[1]: Step(lambda: by_hand(forward, _byhand.flattened(scale)), factors, params),
        "merge in the step": Step(lambda: merging(lambda *args: forward(*args)), adapter, params),
        "full fine-tuning": Step(lambda: full(lambda *args: forward(*args)), params, None),
    }


def measure(form: str, options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Costs, times and bars of the five steps for one form of the model."""
    run, parts = FORMS[form]
    sizes = _transformer.Sizes(layers=options.layers, width=options.width, hidden=4 * options.width, **parts)
    forward = partial(run, heads=sizes.heads)
    keys = jax.random.split(jax.random.key(0), 3)
    params = _transformer.init(keys[0], sizes)
    params = _transformer.stack(params) if run is _transformer.scanned else params
    tokens = jax.random.randint(keys[1], (options.batch, sizes.length), 0, sizes.vocabulary)
    steps = make_steps(forward, params, tokens, keys[2], options)

    make = {name: partial(lambda step: training_step(step.make_logits()), step) for name, step in steps.items()}
    args = {name: (s.trainable, OPTIMISER.init(s.trainable), s.frozen, tokens) for name, s in steps.items()}
    traced = {name: (make[name], args[name]) for name in ("jlora", BY_HAND[1], "full fine-tuning")}
    lowering = _measure.lowering(traced, options.lowerings)

    programs = {name: _measure.compile(make[name](), *args[name]) for name in steps}
    check_losses({name: float(programs[name].run()[-1]) for name in ("jlora", *BY_HAND, "merge in the step")})
    programs["forward of the base"] = _measure.compile(forward, params, tokens)
    seconds = _measure.interleave({name: p.run for name, p in programs.items()}, options.rounds)

    rows = {
        name: {
            "flops": program.flops,
            "temp_bytes": program.temp_bytes,
            "seconds": _measure.median(seconds[name]),
            "of_full": _measure.ratio(seconds, name, "full fine-tuning") if options.rounds else None,
            "lower_seconds": _measure.median(lowering.get(name, [])),
            "compile_seconds": program.compile_seconds,
            "rounds": seconds[name],
        }
        for name, program in programs.items()
    }
    return rows, cost_bars(rows) + (time_bars(rows, seconds) if options.rounds else []) + lowering_bars(lowering)


def check_losses(losses: dict[str, float]) -> None:
    """Raises unless all steps report the same loss: the time of a wrong program means nothing."""
    if not max(losses.values()) - min(losses.values()) <= 1e-4 * abs(losses["jlora"]):
        raise AssertionError(f"The steps must compute the same loss; they computed {losses}.")


def cost_bars(rows: dict[str, Any]) -> list[Bar]:
    """Compiled costs: at most those of the better program by hand, and well below full fine-tuning.

    Temporary bytes also have to be fewer than those of the usual program by hand.
    """
    jlora_row, full_row = rows["jlora"], rows["full fine-tuning"]
    lowest = {key: min(rows[name][key] for name in BY_HAND) for key in ("flops", "temp_bytes")}
    return [
        Bar("FLOPs / better by hand", jlora_row["flops"] / lowest["flops"], 1.005),
        Bar("temporary bytes / better by hand", jlora_row["temp_bytes"] / lowest["temp_bytes"], 1.00),
        Bar("temporary bytes / usual by hand", jlora_row["temp_bytes"] / rows[BY_HAND[0]]["temp_bytes"], 0.999),
        Bar("FLOPs / full fine-tuning", jlora_row["flops"] / full_row["flops"], 0.70),
    ]


def time_bars(rows: dict[str, Any], seconds: dict[str, list[float]]) -> list[Bar]:
    """Wall times, against the same two programs."""
    faster = min(BY_HAND, key=lambda name: rows[name]["seconds"])
    return [
        Bar("wall time / better by hand", _measure.ratio(seconds, "jlora", faster), 1.03),
        Bar("wall time / full fine-tuning", _measure.ratio(seconds, "jlora", "full fine-tuning"), 0.92),
    ]


def lowering_bars(lowering: dict[str, list[float]]) -> list[Bar]:
    """Tracing and lowering, if it was timed."""
    if not lowering["jlora"]:
        return []
    return [Bar("tracing and lowering / full fine-tuning", _measure.ratio(lowering, "jlora", "full fine-tuning"), 2.5)]


def show(form: str, rows: dict[str, Any], bars: list[Bar]) -> None:
    """Prints the figures of one form."""
    header = ["step", "GFLOPs", "temporary MB", "seconds", "of full", "lowering s", "compiling s"]
    body = [
        [
            name,
            f"{row['flops'] / 1e9:.2f}",
            f"{row['temp_bytes'] / 1e6:.1f}",
            _measure.number(row["seconds"]),
            _measure.number(row["of_full"]),
            _measure.number(row["lower_seconds"]),
            _measure.number(row["compile_seconds"], 2),
        ]
        for name, row in sorted(rows.items(), key=lambda item: item[1]["seconds"] or 0.0)
    ]
    note = ", FLOPs with the body of the scan counted once" if form.startswith("scanned") else ""
    print(f"\n### {form}{note}\n\n{_measure.table(header, body)}\n\n{_measure.verdicts(bars)}", flush=True)


def main() -> None:
    """Reads the options, measures, prints and writes."""
    parser = _measure.parser(__doc__, "step.json")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="of the model (default: all)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds; 0 only prints compiled costs (default: 9)")
    parser.add_argument("--lowerings", type=int, default=5, help="rounds of tracing and lowering (default: 5)")
    parser.add_argument("--batch", type=int, default=8, help="sequences of 256 tokens (default: 8)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the transformer (default: 4)")
    parser.add_argument("--width", type=int, default=512, help="width of the residual stream (default: 512)")
    parser.add_argument("--rank", type=int, default=8, help="rank of the LoRA (default: 8)")
    parser.add_argument("--alpha", type=float, default=8.0, help="alpha of the LoRA (default: 8)")
    _measure.run_forms(parser.parse_args(), "steps", measure, show)


if __name__ == "__main__":
    main()
