"""What all benchmarks share: compiled costs, wall times in turns, limits, tables and result files."""

import argparse
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jax

from jlora._ops import rows

T = TypeVar("T")

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Program:
    """A compiled program and its costs as reported by XLA.

    Arguments:
        run: calls the program on the arguments that it was compiled for.
        flops: floating-point operations. XLA counts the body of a loop once, however often it runs.
        temp_bytes: memory in bytes beyond arguments and results.
        compile_seconds: XLA's own time, without tracing and lowering.
    """

    run: Callable[[], Any]
    flops: float
    temp_bytes: int
    compile_seconds: float


@dataclass(frozen=True)
class Bar:
    """A ratio that a release must not exceed."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the ratio is within its limit; not-a-number never is."""
        return self.value <= self.limit


def compile(function: Callable[..., Any], *args: Any) -> Program:
    """Compiles `function` for `args`. All arrays must be arguments: a closed-over array would become a constant."""
    lowered = jax.jit(function).lower(*args)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
    if costs is None or memory is None:
        raise NotImplementedError(f"XLA reports no costs or no memory on {jax.default_backend()}: use the CPU.")
    return Program(lambda: compiled(*args), costs["flops"], memory.temp_size_in_bytes, seconds)


def compile_counted(function: Callable[..., Any], *args: Any) -> Program:
    """As `compile`; the FLOPs of products by blocks of rows, which run in loops, are counted without the loops."""
    program = compile(function, *args)
    if "jlora_rows" not in str(jax.make_jaxpr(function)(*args)):
        return program
    blocks, rows.BLOCKS = rows.BLOCKS, 1
    try:
        return replace(program, flops=compile(lambda *args: function(*args), *args).flops)
    finally:
        rows.BLOCKS = blocks


def interleave(calls: Mapping[str, Callable[[], Any]], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of every call in every round, after `warm` rounds that are not recorded; without rounds nothing runs.

    The calls run in turns, so that a machine that slows down slows all of them. Each round starts one call later than
    the round before, so that no call always runs on the caches that the same neighbour has filled.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in progress(range(-warm, rounds), "timing") if rounds else ():
        start = number % len(names)
        for name in names[start:] + names[:start]:
            begin = time.perf_counter()
            jax.block_until_ready(calls[name]())
            if number >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def progress(items: Iterable[T], title: str) -> Iterable[T]:
    """The items, with a bar if tqdm is installed: on a machine with an accelerator there may be nothing but JAX."""
    try:
        return importlib.import_module("tqdm").tqdm(items, title)
    except ImportError:
        return items


def lowering(
    traced: Mapping[str, tuple[Callable[[], Callable[..., Any]], tuple[Any, ...]]], rounds: int
) -> dict[str, list[float]]:
    """Seconds to trace and lower each function, in turns.

    Arguments:
        traced: for each name a call that makes a function which no cache of JAX has seen, and the arguments to trace it
            with.
        rounds: as in `interleave`.
    """
    calls = {name: (lambda make=make, args=args: jax.jit(make()).lower(*args)) for name, (make, args) in traced.items()}
    return interleave(calls, rounds)


def median(seconds: Sequence[float]) -> float | None:
    """The median, or None if nothing was timed."""
    return statistics.median(seconds) if seconds else None


def ratio(seconds: Mapping[str, Sequence[float]], numerator: str, denominator: str) -> float:
    """The median over rounds of one call's time divided by another's: both sides saw the same machine."""
    pairs = zip(seconds[numerator], seconds[denominator], strict=True)
    return statistics.median(a / b for a, b in pairs)


def environment() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "platform": device.platform,
        "device": device.device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],  # wall times of a busy machine mean little
    }


def parser(description: str | None, result: str) -> argparse.ArgumentParser:
    """A parser with the option `--out`, whose default is a file in `results/`."""
    out = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument(
        "--out", type=Path, default=RESULTS / result, help=f"file to write (default: benchmarks/results/{result})"
    )
    return out


def run_forms(
    options: argparse.Namespace,
    key: str,
    measure: Callable[[str, argparse.Namespace], tuple[dict[str, Any], list[Bar]]],
    show: Callable[[str, dict[str, Any], list[Bar]], None],
) -> None:
    """Measures and prints every form that the options name, and saves the figures.

    Other forms in the result file are kept. Without timed rounds a form replaces none that has times. Nothing is saved
    if `out` is None.

    Arguments:
        options: with `forms`, `rounds` and `out`; all but these are recorded in the result file.
        key: the name of a form's rows in the result file.
        measure: gives the rows and the bars of one form.
        show: prints them.
    """
    recorded = {name: value for name, value in vars(options).items() if name not in ("forms", "out", "rounds")}
    out: Path | None = options.out
    result: dict[str, Any] = json.loads(out.read_text()) if out and out.exists() else {}
    for form in options.forms:
        machine = environment()  # before the load that this makes
        rows, bars = measure(form, options)
        show(form, rows, bars)
        if out and (options.rounds or not result.get(form, {}).get("rounds")):
            verdicts = [asdict(bar) | {"passed": bar.passed} for bar in bars]
            result |= {"environment": machine, "options": recorded}
            result[form] = {key: rows, "bars": verdicts, "rounds": options.rounds, "environment": machine}
            save(out, result)


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; empty if there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, the first column aligned left and the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def verdicts(bars: Sequence[Bar]) -> str:
    """A Markdown table of bars."""
    rows = [[b.name, f"{b.value:.4f}", f"{b.limit:.3f}", "pass" if b.passed else "FAIL"] for b in bars]
    return table(["bar", "ratio", "at most", ""], rows)


def save(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
