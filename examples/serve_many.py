"""Serves SmolLM2-135M with 1 to 2,000 adapters: every row of a batch decodes with an adapter of its own.

    python examples/serve_many.py                       # about ten minutes on two cores
    python examples/serve_many.py --tiny                # a small model with random weights: half a minute
    python examples/serve_many.py --adapters 5 500 --rows 8 --slots 16

A server (`server.py`) has a fixed number of rows, and a pool with a fixed number of slots. Requests ask for adapters by
Zipf's law: few adapters are asked for often, most hardly ever. The queue is never empty, so that the rates are those of
a server at full load, and a reply's time starts when a row takes its request.

Writes a report, its figures as JSON, and a picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx
from tqdm import tqdm

import assets
import jlora
import report
import smollm
from server import Reply, Request, Server, bank_step, pooled, serve, single

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TINY = smollm.Config(512, 64, 128, 3, 4, 2, 1e-5, 1e4)
TARGETS = r".*/(query|value)/kernel"
ALONE = "one, without a bank"
PROMPTS = ("The film begins with", "My advice to a new cook is", "In the year 2050", "The most beautiful city is")


def skewed_names(rng: np.random.Generator, adapters: int, count: int, exponent: float = 1.3) -> list[str]:
    """Names of adapters, "0" to `adapters - 1`, by Zipf's law: "0" is asked for most."""
    return [str(k) for k in np.minimum(rng.zipf(exponent, count) - 1, adapters - 1)]


def stand_in(like: jlora.Adapter, name: str) -> jlora.Adapter:
    """An adapter that depends on its name alone: it stands for a file that is read."""
    rng = np.random.default_rng(int(name))
    return jax.tree.map(lambda a: 0.05 * rng.standard_normal(a.shape, np.float32), like)


@dataclass(frozen=True)
class Load:
    """What a server is measured with: rows of the server, and requests with prompts and replies of some length."""

    rows: int
    requests: int
    count: int
    prompts: Sequence[tuple[int, ...]]

    @property
    def positions(self) -> int:
        """How many positions a cache needs."""
        return max(map(len, self.prompts)) + self.count

    def draw(self, adapters: int, seed: int) -> list[Request]:
        """The requests. Replies differ in length, so that rows do not finish together."""
        rng = np.random.default_rng(seed)
        names = skewed_names(rng, adapters, self.requests)
        counts = rng.integers(max(1, self.count // 2), self.count + 1, self.requests)
        prompts = [self.prompts[k] for k in rng.integers(0, len(self.prompts), self.requests)]
        return [Request(name, prompt, int(count)) for name, prompt, count in zip(names, prompts, counts, strict=True)]


@dataclass
class Measured:
    """A server with what it has served so far.

    Arguments:
        server: the server.
        adapters: how many there are.
        replies: of all rounds.
        rates: tokens a second of each round.
        swaps: the names that were copied into a slot, one for each copy.
        megabytes: of the adapters on the device.
    """

    server: Server
    adapters: int
    megabytes: float
    swaps: list[str] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def run(self, load: Load, seed: int) -> None:
        """Serves the load once more."""
        begin = time.perf_counter()
        replies = list(serve(self.server, load.draw(self.adapters, seed), load.rows))
        self.rates.append(sum(len(reply.tokens) for reply in replies) / (time.perf_counter() - begin))
        self.replies += replies

    def figures(self) -> dict[str, Any]:
        """The median rate of the rounds, and times in seconds and swaps of all replies."""
        first, whole = ([reply.seconds[k] for reply in self.replies] for k in (0, -1))
        return {
            "adapters": self.adapters,
            "megabytes": self.megabytes,
            "tokens/s": statistics.median(self.rates),
            "rounds": self.rates,
            "first token p50": float(np.percentile(first, 50)),
            "first token p95": float(np.percentile(first, 95)),
            "reply p50": float(np.percentile(whole, 50)),
            "reply p95": float(np.percentile(whole, 95)),
            "swaps per request": len(self.swaps) / len(self.replies),
        }


def measure(servers: dict[str, Measured], load: Load, rounds: int) -> None:
    """Runs all servers in turns, so that a machine that slows down slows all of them; a first request compiles."""
    interval = 0.2 if sys.stderr.isatty() else 20.0
    with tqdm(total=(rounds + 1) * len(servers), unit="run", mininterval=interval, dynamic_ncols=True) as bar:
        for number in range(-1, rounds):
            for name, measured in servers.items():
                bar.set_description(name)
                if number < 0:
                    list(serve(measured.server, [Request("0", load.prompts[0][:1], 1)], load.rows))
                    measured.swaps.clear()
                else:
                    measured.run(load, number)
                bar.update()


def pool_server(step: Any, params: Any, like: jlora.Adapter, cache: Any, adapters: int, slots: int) -> Measured:
    """A server with a pool, whose adapters are read when they are asked for."""
    swaps: list[str] = []

    def read(name: str) -> jlora.Adapter:
        swaps.append(name)
        return stand_in(like, name)

    pool = jlora.bank.Pool(like, slots, source=read)
    return Measured(pooled(step, params, pool, cache), adapters, pool.nbytes / 1e6, swaps)


def swap_seconds(params: Any, like: jlora.Adapter) -> dict[str, float]:
    """The median time until another adapter serves: copied into a slot, or merged into the weights."""
    pool = jlora.bank.Pool(like, 1)
    adapters = {name: stand_in(like, name) for name in map(str, range(8))}
    for name, adapter in adapters.items():
        pool.put(name, adapter)
    merge = jax.jit(jlora.merge)
    calls = {"slot": lambda name: (pool.ids([name]), pool.bank), "merge": lambda name: merge(params, adapters[name])}
    seconds: dict[str, list[float]] = {kind: [] for kind in calls}
    for name in adapters:
        for kind, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call(name))
            seconds[kind].append(time.perf_counter() - begin)
    return {kind: float(np.median(times[1:])) for kind, times in seconds.items()}  # the first one compiles


def markdown(result: dict[str, Any]) -> str:
    """The report."""
    lines = [
        "# Many adapters in one server",
        "",
        f"{result['rows']} rows, {result['slots']} slots, {result['rounds']} x {result['requests']} requests a line, "
        f"LoRA of rank {result['rank']} on queries and values, {jax.devices()[0].device_kind}.",
        "",
        "| adapters | tokens/s | first token, s: p50, p95 | reply, s: p50, p95 | swaps per request | MB |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in result["servers"].items():
        lines.append(
            f"| {name} | {row['tokens/s']:.0f} | {row['first token p50']:.2f}, {row['first token p95']:.2f} | "
            f"{row['reply p50']:.2f}, {row['reply p95']:.2f} | "
            f"{row['swaps per request']:.2f} | {row['megabytes']:.1f} |"
        )
    swap = result["swap"]
    lines += ["", f"A swap takes {1e3 * swap['slot']:.1f} ms into a slot, {1e3 * swap['merge']:.1f} ms by merging."]
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws rates and the time to the first token against the number of adapters."""
    servers = dict(result["servers"])
    alone = servers.pop(ALONE)
    counts = [row["adapters"] for row in servers.values()]
    with plt.rc_context(report.STYLE):
        figure, (rates, waits) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        rates.plot(counts, [row["tokens/s"] for row in servers.values()], "o-", color=report.COLOURS["LoRA"])
        rates.axhline(alone["tokens/s"], color=report.COLOURS["head alone"], linestyle=":", label=ALONE)
        rates.set(xscale="log", ylim=(0, None), xlabel="adapters", ylabel="tokens a second")
        rates.legend(loc="lower left")
        for percentile, style in (("p50", "o-"), ("p95", "s--")):
            times = [row[f"first token {percentile}"] for row in servers.values()]
            waits.plot(counts, times, style, color=report.COLOURS["full"], label=percentile)
        waits.set(xscale="log", ylim=(0, None), xlabel="adapters", ylabel="seconds to the first token")
        waits.legend(loc="lower left")
        figure.savefig(path, dpi=130)
        plt.close(figure)


def load_model(tiny: bool) -> tuple[smollm.Forward, Any, smollm.Config, list[tuple[int, ...]]]:
    """The model as a function, its parameters and sizes, and the tokens of the prompts."""
    if tiny:
        graph, params = nnx.split(smollm.SmolLM(TINY, nnx.Rngs(0)))
        return smollm.forward(graph), params, TINY, [(1, 2, 3), (4, 5), (6, 7, 8, 9)]
    model, tokenizer = smollm.load(assets.smollm())
    graph, params = nnx.split(model)
    return smollm.forward(graph), params, model.config, [tuple(tokenizer.encode(text).ids) for text in PROMPTS]


def initial_adapter(forward: smollm.Forward, params: Any, config: smollm.Config, rank: int) -> jlora.Adapter:
    """An adapter of queries and values, whose form all others have."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    sites = jlora.trace(forward, shapes, jnp.zeros((1, 1), jnp.int32), smollm.empty_cache(config, 1, 2), 0)
    return jlora.init(jax.random.key(0), sites, {TARGETS: jlora.LoRA(rank)})


def arguments() -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model with random weights")
    parser.add_argument(
        "--adapters", type=int, nargs="+", default=[1, 5, 50, 500, 2000], help="default: 1 5 50 500 2000"
    )
    parser.add_argument("--rows", type=int, default=16, help="that are decoded together (default: 16)")
    parser.add_argument("--slots", type=int, default=64, help="of the pool, at least the rows (default: 64)")
    parser.add_argument("--requests", type=int, default=32, help="of a round (default: 32)")
    parser.add_argument("--count", type=int, default=24, help="tokens of the longest reply (default: 24)")
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA factors (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="in which all servers run in turns (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("runs/serve_many"), metavar="FOLDER")
    options = parser.parse_args()
    if options.slots < options.rows:
        parser.error("--slots must be at least --rows: every row may use another adapter")
    return options


def main() -> int:
    options = arguments()
    try:
        forward, params, config, prompts = load_model(options.tiny)
    except assets.AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    load = Load(options.rows, options.requests, options.count, prompts)
    like = initial_adapter(forward, params, config, options.rank)
    cache = smollm.empty_cache(config, load.rows, load.positions)
    alone, step = single(forward, params, stand_in(like, "0"), cache), bank_step(forward)
    servers = {ALONE: Measured(alone, 1, report.bytes_in_memory(like) / 1e6)}
    for adapters in options.adapters:
        servers[f"{adapters:,}"] = pool_server(step, params, like, cache, adapters, options.slots)
    measure(servers, load, options.rounds)
    result = {name: value for name, value in vars(options).items() if name not in ("out", "adapters")}
    result["servers"] = {name: measured.figures() for name, measured in servers.items()}
    result["swap"] = swap_seconds(params, like)
    result["environment"] = report.environment()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "serve_many.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, options.out / "serve_many.png")
    text = markdown(result)
    (options.out / "report.md").write_text(text + "\n\n![rates](serve_many.png)\n")
    print(f"{text}\n\nWritten to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
