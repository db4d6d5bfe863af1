"""One training step of every method against LoRA of the same rank: on a transformer, and on a single large kernel.

    python -m benchmarks.methods                  # about five minutes on two cores
    python -m benchmarks.methods --rounds 0       # prints the compiled costs alone

FLOPs and temporary bytes are XLA's own counts. Wall times are from one run in which all steps run in turns; every ratio
is the median over rounds of the ratios of one round. Dense methods are marked as dense and have no bar.
"""

import argparse
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import jlora
from benchmarks import _measure, _transformer
from benchmarks._measure import Bar

RANK = 16
OPTIMISER = optax.adamw(1e-3)

# All are compared with LoRA(16): the rank of every update is 16 if the method has a rank.
METHODS: dict[str, jlora.Method] = {
    "LoRA": jlora.LoRA(RANK),
    "LoRA, offset": jlora.LoRA(RANK, start="orthogonal", offset=True),
    "LoRA-FA": jlora.LoRA(RANK, freeze_a=True),
    "LoRA, 2 groups of 4": jlora.GroupedLoRA(RANK, groups=4, enable=(True, False, True, False)),
    "DoRA": jlora.DoRA(RANK),
    "Additive": jlora.Additive(RANK),
    "Hadamard, k = 2": jlora.Hadamard(8, 2),
    "Hadamard of additive": jlora.Hadamard(4, 2, "additive"),
    "LoHa": jlora.LoHa(4),
    "LoKr": jlora.LoKr(RANK),
    "VeRA": jlora.VeRA(RANK),
    "AdaLoRA": jlora.AdaLoRA(RANK),
    "LoRA-XS": jlora.LoRAXS(RANK),
    "MiSS": jlora.MiSS(RANK),
    "DeLoRA": jlora.DeLoRA(RANK),
    "HRA": jlora.HRA(RANK),
    "IA3": jlora.IA3(),
}
DENSE: dict[str, jlora.Method] = {
    "Hadamard of tanh": jlora.Hadamard(RANK, 2, "tanh"),
    "HiRA": jlora.HiRA(RANK),
    "OFT": jlora.OFT(RANK),
    "BOFT": jlora.BOFT(RANK),
    "FourierFT": jlora.FourierFT(1000),
    "RandLoRA": jlora.RandLoRA(RANK),
    "SHiRA": jlora.SHiRA(RANK),
    "Full": jlora.Full(),
}


def transformer(method: jlora.Method, options: argparse.Namespace) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A step of next-token prediction, every kernel of every layer adapted."""
    sizes = _transformer.Sizes()
    forward = partial(_transformer.unrolled, heads=sizes.heads)
    keys = jax.random.split(jax.random.key(0), 3)
    params = jax.jit(lambda key: _transformer.init(key, sizes))(keys[0])
    tokens = jax.random.randint(keys[1], (options.batch, sizes.length), 0, sizes.vocabulary)
    targets = {f".*/({'|'.join(_transformer.KERNELS)})": method}

    def loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
        following = jnp.roll(tokens, -1, axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, following).mean()

    return step(forward, loss, keys[2], targets, params, tokens)


def kernel(method: jlora.Method, options: argparse.Namespace) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A step through one square kernel, tanh and a mean squared error."""
    keys = jax.random.split(jax.random.key(0), 3)
    width = options.width
    params = {"w": jax.random.normal(keys[0], (width, width)) / width**0.5}
    x = jax.random.normal(keys[1], (8, options.tokens // 8, width))

    def forward(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["w"])

    def loss(y: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(y - x))

    return step(forward, loss, keys[2], {"w": method}, params, x)


def step(
    forward: Any, loss: Any, key: jax.Array, targets: dict[str, jlora.Method], params: Any, batch: jax.Array
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """`(adapter, state, params, batch) -> (adapter, state, loss)`, with AdamW on the adapter, and its arguments."""
    sites = jlora.trace(forward, params, batch)
    adapter = jax.jit(lambda params: jlora.init(key, sites, targets, params=params))(params)
    apply = jlora.adapt(forward)
    tx = optax.masked(OPTIMISER, jlora.mask)

    def run(adapter: Any, state: Any, params: Any, batch: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(lambda a: loss(apply(params, a, batch), batch))(adapter)
        updates, state = tx.update(gradients, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    return run, (adapter, tx.init(adapter), params, batch)


# A step function and its arguments.
Program = tuple[Callable[..., Any], tuple[Any, ...]]

PROGRAMS: dict[str, Callable[[jlora.Method, argparse.Namespace], Program]] = {
    "transformer": transformer,
    "kernel": kernel,
}


def count_weight_sized(function: Callable[..., Any], args: tuple[Any, ...], width: int) -> int:
    """How many arrays of the kernel's shape the compiled step computes."""
    text = jax.jit(function).lower(*args).compile().as_text() or ""
    entry = text[text.index("ENTRY") :]
    operations = re.findall(rf"= f32\[{width},{width}\]\S* (\w+)", entry)
    return sum(operation not in ("parameter", "bitcast", "copy") for operation in operations)


def measure(form: str, options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Costs and times of all steps in one form, and the bars of those that are not dense."""
    steps: dict[str, Program] = {}
    programs: dict[str, _measure.Program] = {}
    for name, method in tqdm((METHODS | DENSE).items(), f"compiling, {form}"):
        run, args = steps[name] = PROGRAMS[form](method, options)
        programs[name] = _measure.compile(run, *args)
    seconds = _measure.interleave({name: program.run for name, program in programs.items()}, options.rounds)
    lora = programs["LoRA"]
    rows = {
        name: {
            "parameters": sum(f.size for update in steps[name][1][0].values() for f in update.factors.values()),
            "flops": program.flops / lora.flops,
            "temp_bytes": program.temp_bytes / lora.temp_bytes,
            "seconds": _measure.median(seconds[name]),
            "of_lora": _measure.ratio(seconds, name, "LoRA") if options.rounds else None,
            "dense": name in DENSE,
        }
        for name, program in programs.items()
    }
    bars = []
    for name in METHODS:
        bars.append(Bar(f"{name}: FLOPs / LoRA", rows[name]["flops"], 1.10))
        bars.append(Bar(f"{name}: temporary bytes / LoRA", rows[name]["temp_bytes"], 1.15))
        if form == "kernel":
            count = count_weight_sized(*steps[name], options.width)
            bars.append(Bar(f"{name}: temporaries as large as the weight", count, 0))
    return rows, bars


def show(form: str, rows: dict[str, Any], bars: list[Bar]) -> None:
    """Prints the figures of one form, and the bars that it misses."""
    header = ["method", "parameters", "FLOPs", "temporary bytes", "seconds", "of LoRA", ""]
    body = [
        [
            name,
            f"{row['parameters']:,}",
            *(_measure.number(row[key]) for key in ("flops", "temp_bytes", "seconds", "of_lora")),
            "dense" if row["dense"] else "",
        ]
        for name, row in rows.items()
    ]
    missed = [bar for bar in bars if not bar.passed]
    print(f"\n### {form}, FLOPs and bytes in units of LoRA's\n\n{_measure.table(header, body)}\n", flush=True)
    print(_measure.verdicts(missed) if missed else f"All {len(bars)} bars pass.", flush=True)


def main() -> None:
    """Reads the options, measures, prints and writes."""
    parser = _measure.parser(__doc__, "methods.json")
    parser.add_argument("--forms", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), help="default: both")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; 0 only prints compiled costs (default: 5)")
    parser.add_argument("--batch", type=int, default=8, help="sequences of the transformer (default: 8)")
    parser.add_argument("--width", type=int, default=4096, help="of the single kernel (default: 4096)")
    parser.add_argument("--tokens", type=int, default=1024, help="of the single kernel (default: 1024)")
    _measure.run_forms(parser.parse_args(), "methods", measure, show)


if __name__ == "__main__":
    main()
