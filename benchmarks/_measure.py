"""What every benchmark shares: compile and cost a program, time programs against each other, judge and report."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm


@dataclass(frozen=True)
class Program:
    """A compiled program and what XLA says that it costs.

    Arguments:
        run: calls the program on the arguments that it was compiled for.
        flops: floating-point operations. XLA counts the body of a loop once, however often it runs.
        temp_bytes: memory beyond arguments and results.
        compile_seconds: XLA's own time, tracing and lowering not included.
    """

    run: Callable[[], Any]
    flops: float
    temp_bytes: int
    compile_seconds: float


def compile(function: Callable[..., Any], *args: Any) -> Program:
    """Compiles `function` for `args`; all arrays are arguments, as a closed-over one would become a constant."""
    lowered = jax.jit(function).lower(*args)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
    if costs is None or memory is None:
        raise NotImplementedError(f"XLA says nothing of costs or memory on {jax.default_backend()}.")
    return Program(lambda: compiled(*args), costs["flops"], memory.temp_size_in_bytes, seconds)


def interleave(calls: Mapping[str, Callable[[], Any]], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of every call in every round, after `warm` rounds that are not kept.

    Calls take turns, so that a machine which slows down slows all of them, and the turn starts one call later in
    every round, so that none always runs in the caches that the same neighbour left.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in tqdm(range(-warm, rounds), "timing"):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            begin = time.perf_counter()
            jax.block_until_ready(calls[name]())
            if number >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], numerator: str, denominator: str) -> float:
    """The median over rounds of one call's time in units of another's: both sides saw the same machine."""
    pairs = zip(seconds[numerator], seconds[denominator], strict=True)
    return statistics.median(a / b for a, b in pairs)


def lowering(
    traced: Mapping[str, tuple[Callable[[], Callable[..., Any]], tuple[Any, ...]]], rounds: int
) -> dict[str, list[float]]:
    """Seconds to trace and lower, in turns.

    Arguments:
        traced: by name, what makes a function that no cache of JAX has seen, and the arguments to trace it with.
        rounds: as in `interleave`.
    """
    calls = {name: (lambda make=make, args=args: jax.jit(make()).lower(*args)) for name, (make, args) in traced.items()}
    return interleave(calls, rounds)


@dataclass(frozen=True)
class Bar:
    """A ratio that a release has to stay below."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether it does; not-a-number never passes."""
        return self.value <= self.limit


def environment() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "platform": device.platform,
        "device": device.device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],  # wall times of a machine that was busy before say little
    }


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table, the first column to the left and the rest to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def verdicts(bars: Sequence[Bar]) -> str:
    """A markdown table of bars."""
    rows = [[b.name, f"{b.value:.4f}", f"{b.limit:.3f}", "pass" if b.passed else "FAIL"] for b in bars]
    return table(["bar", "ratio", "at most", ""], rows)


def save(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
