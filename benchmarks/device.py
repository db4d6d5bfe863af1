"""What a real accelerator says of the compiled figures: peak memory against the plan, and times of steps, in turns.

    benchmarks/device.sh                # at most eight minutes; writes results/device-CARD.json
    benchmarks/device.sh --tiny         # the same programs in tiny sizes, also on the CPU
    benchmarks/device.sh --sections methods    # measures a part again; the others stay in the file

It needs this checkout and JAX for the device, nothing else. What the time did not suffice for is listed in the results.

steps    eight layers of Llama 3 8B in bfloat16 and in NF4: jlora, the same LoRA by hand, merged in the step, and full
         fine-tuning.
bank     K adapters on K batches as one program, against one adapter on all of their tokens.
methods  a step of every method on an MLP of the sizes of Llama 3 8B, against LoRA.
memory   of each of the steps: the peak of a process of its own, and the plan, by the compiler alone.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from benchmarks import _measure, _transformer
from benchmarks._device import FORMS, LLAMA, RANK, TINY, Runner, adam, filled, llama, one_device_mesh
from benchmarks.methods import METHODS
from jlora._plan.gpu_cards import CARDS

SECTIONS = ("steps", "bank", "methods", "memory")
Rows = dict[str, dict[str, Any]]
TOPOLOGIES = {card.name: f"{key}:1" for key, card in CARDS.items()}
TOPOLOGIES |= {"TPU v5 lite": "v5e:1x1", "TPU v6 lite": "v6e:1x1", "cpu": "cpu:1"}


def peak(options: argparse.Namespace, form: str, base: str) -> dict[str, Any]:
    """The peak of this process, which runs one step and nothing else; None if the device does not count it."""
    with jax.set_mesh(one_device_mesh()):
        run = Runner(*llama(options, form, base), key=None)
        for _ in range(2):
            jax.block_until_ready(run())
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak": stats.get("peak_bytes_in_use"), "limit": stats.get("bytes_limit")}


def planned(options: argparse.Namespace, form: str, base: str) -> dict[str, Any]:
    """The plan of the step for the device's kind, which needs no device."""
    step, args = llama(options, form, base)
    plan = jlora.plan(step, *args, topology=options.topology)
    return {"needed": plan.needed, "temporaries": plan.temporary_bytes, "hbm": plan.hbm, "fits": plan.fits}


def in_process(options: argparse.Namespace, task: str, form: str, base: str, **environment: str) -> dict[str, Any]:
    """What one task prints in a process of its own; the end of its error if it fails."""
    command = [sys.executable, "-m", "benchmarks.device", "--task", task, form, base, *options.flags]
    variables = os.environ | environment
    left = max(1.0, options.deadline - time.monotonic())
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=left)
    except subprocess.TimeoutExpired:
        return {"error": "no time left"}
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else {"error": done.stderr[-400:]}


def build(options: argparse.Namespace, makers: Mapping[str, Callable[[], Runner]]) -> tuple[dict[str, Runner], Rows]:
    """The steps, compiled side by side, and a row of results for each; a step that cannot be built has its error."""

    def make(name: str) -> Runner | str:
        if time.monotonic() > options.deadline - options.reserve:
            return "no time left"
        try:
            return makers[name]()
        except Exception as error:
            return "out of memory" if "RESOURCE_EXHAUSTED" in str(error) else f"{type(error).__name__}: {error}"[:400]

    with ThreadPoolExecutor(8) as pool:
        made = dict(zip(makers, pool.map(make, makers), strict=True))
    runners = {name: run for name, run in made.items() if isinstance(run, Runner)}
    return runners, {name: {} if isinstance(run, Runner) else {"error": run} for name, run in made.items()}


def timed(options: argparse.Namespace, makers: Mapping[str, Callable[[], Runner]]) -> Rows:
    """Seconds of one step in turns, with the ratio of each to the first of them, and what the compiler says."""
    runners, rows = build(options, makers)
    if not runners:
        return rows
    first = next(iter(runners))
    seconds = {
        name: [turn / runners[name].repeat for turn in turns]
        for name, turns in _measure.interleave(runners, options.rounds).items()
    }
    for name, run in runners.items():
        rows[name] |= {
            "seconds": seconds[name],
            "median": _measure.median(seconds[name]),
            f"of {first}": _measure.ratio(seconds, name, first),
            "compile_seconds": run.compile_seconds,
            "compiled_bytes": run.bytes(),
        }
    return rows


def steps(options: argparse.Namespace) -> dict[str, Rows]:
    """Times of all forms of both bases. Forms that do not train the base share its arrays."""
    out = {}
    for base, forms in FORMS.items():
        frozen = filled(llama(options, forms[0], base)[1][2], jax.random.key(0))

        def make(form: str, base: str = base, frozen: Any = frozen) -> Runner:
            with jax.set_mesh(one_device_mesh()):
                step, args = llama(options, form, base)
                return Runner(step, args, jax.random.key(0), None if form == "full" else frozen)

        out[base] = timed(options, {form: functools.partial(make, form) for form in forms})
    return out


def memory(options: argparse.Namespace) -> dict[str, Rows]:
    """For every form of both bases the peak of a process that runs nothing else, and the plan, without the device."""
    out: dict[str, Rows] = {}
    with ThreadPoolExecutor(8) as pool:
        plans = {
            (base, form): pool.submit(in_process, options, "plan", form, base, JAX_PLATFORMS="cpu")
            for base, forms in FORMS.items()
            for form in forms
            if options.topology and (not options.tiny or form == "jlora")
        }
        for base, forms in FORMS.items():
            for form in forms[: 1 if options.tiny else None]:
                measured = in_process(options, "peak", form, base)
                out.setdefault(base, {})[form] = measured
        for (base, form), plan in plans.items():
            out[base][form]["plan"] = plan.result()
    return out


def bank(options: argparse.Namespace) -> Rows:
    """K adapters at once against one adapter on as many tokens, in one run."""
    width = 64 if options.tiny else 1024
    sizes = _transformer.Sizes(width=width, hidden=4 * width)
    forward = functools.partial(_transformer.unrolled, heads=sizes.heads)
    as_bf16 = functools.partial(jax.tree.map, lambda a: a.astype(jnp.bfloat16))
    params = as_bf16(jax.jit(lambda key: _transformer.init(key, sizes))(jax.random.key(0)))

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = forward(params, tokens).astype(jnp.float32)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.roll(tokens, -1, 1)[..., None], -1))

    sites = jlora.trace(loss, params, jax.ShapeDtypeStruct((2, sizes.length), jnp.int32))
    target = {f".*/({'|'.join(_transformer.KERNELS)})": jlora.LoRA(RANK)}
    one = jlora.init(jax.random.key(1), sites, target)
    adapted, mapped = jlora.adapt(loss), jlora.bank.vmap(loss)

    def alone(members: int) -> Runner:
        batch = jax.ShapeDtypeStruct((members * 2, sizes.length), jnp.int32)
        step = adam(lambda a, p, x: adapted(p, a, x))
        return Runner(step, (one, (one, one), params, batch), jax.random.key(2), params, options.repeat)

    def together(members: int) -> Runner:
        many = jlora.bank.stack({str(k): one for k in range(members)})
        batch = jax.ShapeDtypeStruct((members, 2, sizes.length), jnp.int32)
        step = adam(lambda b, p, x: mapped(p, b, x).mean())
        return Runner(step, (many, (many, many), params, batch), jax.random.key(2), params, options.repeat)

    out = {}
    for members in (2,) if options.tiny else (4, 16):
        makers = {f"one adapter, {members} batches": alone, f"{members} adapters": together}
        out |= timed(options, {name: functools.partial(make, members) for name, make in makers.items()})
    return out


def methods(options: argparse.Namespace) -> Rows:
    """A step of every method on an MLP of two kernels; the times are in turns, and in units of LoRA's."""
    width, hidden, tokens = (128, 256, 64) if options.tiny else (4096, 14336, 8192)
    shapes = {"up": (width, hidden), "down": (hidden, width)}
    params = filled({name: jax.ShapeDtypeStruct(s, jnp.bfloat16) for name, s in shapes.items()}, jax.random.key(0))
    x = jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(jnp.tanh(x @ params["up"]) @ params["down"] - x).astype(jnp.float32))

    sites = jlora.trace(loss, params, x)

    def make(method: jlora.Method) -> Runner:
        init = functools.partial(jlora.init, jax.random.key(1), sites, {".*": method})
        adapter = jax.eval_shape(lambda params: init(params=params), params)  # a start may need long
        if any("place" in update.frozen for update in adapter.values()):
            adapter = init(params=params)  # random numbers are no places of entries
        apply = jlora.adapt(loss, on_dense="allow")
        step = adam(lambda a, p, x: apply(p, a, x))
        return Runner(step, (adapter, (adapter, adapter), params, x), jax.random.key(2), params, options.repeat)

    return timed(options, {name: functools.partial(make, method) for name, (method, _) in METHODS.items()})


def parse() -> argparse.Namespace:
    """The options, completed by what follows from them and from the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes and one round")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="default: all")
    parser.add_argument("--out", help="file to write (default: benchmarks/results/device-CARD.json)")
    parser.add_argument("--topology", help="for the plan (default: that of the device)")
    parser.add_argument("--task", nargs=3, metavar=("TASK", "FORM", "BASE"), help="of a process of its own")
    options = parser.parse_args()
    options.deadline = time.monotonic() + (3500.0 if options.tiny else 460.0)
    options.reserve = 0.0 if options.tiny or "memory" not in options.sections else 140.0  # for the peaks
    options.sizes, options.batch = (TINY, 1) if options.tiny else (LLAMA, 4)
    options.rounds, options.repeat = (1, 1) if options.tiny else (7, 5)
    if not options.task:
        options.topology = options.topology or TOPOLOGIES.get(jax.devices()[0].device_kind)
    options.flags = ["--tiny"] * options.tiny + (["--topology", options.topology] if options.topology else [])
    return options


def main() -> None:
    """Measures everything, prints the medians and writes the results."""
    options = parse()
    if options.task:
        task, form, base = options.task
        print(json.dumps({"peak": peak, "plan": planned}[task](options, form, base)))
        return
    result: dict[str, Any] = {
        "environment": _measure.environment(),
        "sizes": dataclasses.asdict(options.sizes) | {"batch": options.batch, "rank": RANK},
    }
    name = re.sub(r"\W+", "-", result["environment"]["device"].lower())
    out = _measure.RESULTS / f"device-{name}.json" if options.out is None else Path(options.out)
    if tuple(options.sections) != SECTIONS and out.exists():
        result = json.loads(out.read_text()) | result
    measures = {"steps": steps, "bank": bank, "methods": methods, "memory": memory}
    for section in options.sections:
        begin = time.monotonic()
        result[section] = measures[section](options)
        print(f"{section}: {time.monotonic() - begin:.0f} s", flush=True)
        _measure.save(out, result)
    show(result)
    print(f"Written: {out}")


def show(result: Mapping[str, Any]) -> None:
    """Prints the tables."""
    rows = [
        [base, form, *cells(row), result.get("memory", {}).get(base, {}).get(form)]
        for base, forms in result.get("steps", {}).items()
        for form, row in forms.items()
    ]
    print(_measure.table(["base", "step", "ms", "of jlora", "memory"], rows))
    for section in ("bank", "methods"):
        rows = [[name, *cells(row)] for name, row in result.get(section, {}).items()]
        print(f"\n{_measure.table([section, 'ms', 'ratio'], rows)}")


def cells(row: Mapping[str, Any]) -> list[str]:
    """Milliseconds and the ratio of a row, or its error."""
    if "error" in row:
        return [row["error"], ""]
    ratio = next(value for key, value in row.items() if key.startswith("of "))
    return [_measure.number(1000 * row["median"], 2), _measure.number(ratio)]


if __name__ == "__main__":
    main()
