"""What a real accelerator says of the compiled figures: peak memory against the plan, and times of steps, in turns.

    benchmarks/device.sh                # at most eight minutes; writes results/device-CARD.json
    benchmarks/device.sh --tiny         # the same programs in tiny sizes, also on the CPU

It needs this checkout and JAX for the device, nothing else. What the time did not suffice for is listed in the results.

steps    some layers of Llama 3 8B in bfloat16 and in NF4: jlora, the same LoRA by hand, merged in the step, and full
         fine-tuning. The plan of each step by its compiler, the compiled bytes, and the peak of a process of its own.
bank     K adapters on K batches as one program, against one adapter on all of their tokens.
methods  a step of every method on one kernel, against LoRA.
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
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from benchmarks import _measure, _transformer
from benchmarks._device import FORMS, LLAMA, RANK, TINY, Runner, adam, llama, one_device_mesh
from benchmarks.methods import METHODS
from jlora._plan.gpu_cards import CARDS

TOPOLOGIES = {card.name: f"{key}:1" for key, card in CARDS.items()}
TOPOLOGIES |= {"TPU v5 lite": "v5e:1x1", "TPU v6 lite": "v6e:1x1", "cpu": "cpu:1"}


def is_out_of_memory(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error)


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


def steps(options: argparse.Namespace, left_out: list[str]) -> dict[str, Any]:
    """Plans, peaks and times of all forms of both bases."""
    out: dict[str, Any] = {}
    for base, forms in FORMS.items():
        rows: dict[str, Any] = {form: {} for form in forms}
        runners: dict[str, Runner] = {}
        with jax.set_mesh(one_device_mesh()):
            for form in forms:
                try:
                    step, args = llama(options, form, base)
                    shared = runners["jlora"].frozen if "jlora" in runners and form != "full" else None
                    runners[form] = Runner(step, args, jax.random.key(0), shared)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    rows[form]["error"] = "out of memory"
            seconds = _measure.interleave(runners, options.rounds)
        for form, run in runners.items():
            rows[form] |= {
                "seconds": seconds[form],
                "median": _measure.median(seconds[form]),
                "of jlora": _measure.ratio(seconds, form, "jlora"),
                "compile_seconds": run.compile_seconds,
                "compiled_bytes": run.bytes(),
            }
        runners.clear()
        out[base] = rows
    for base, rows in out.items():
        for form, row in rows.items():
            if time.monotonic() > options.deadline - options.reserve or (options.tiny and form != "jlora"):
                left_out.append(f"memory of {base}, {form}")
                continue
            row["memory"] = in_process(options, "peak", form, base, XLA_PYTHON_CLIENT_PREALLOCATE="false")
            row["plan"] = in_process(options, "plan", form, base, JAX_PLATFORMS="cpu") if options.topology else None
    return out


def bank(options: argparse.Namespace, left_out: list[str]) -> dict[str, Any]:
    """K adapters at once against one adapter on as many tokens, in one run."""
    sizes = _transformer.Sizes(width=64 if options.tiny else 1024, hidden=4 * (64 if options.tiny else 1024))
    forward = functools.partial(_transformer.unrolled, heads=sizes.heads)
    as_bf16 = functools.partial(jax.tree.map, lambda a: a.astype(jnp.bfloat16))
    params = as_bf16(jax.jit(lambda key: _transformer.init(key, sizes))(jax.random.key(0)))

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = forward(params, tokens).astype(jnp.float32)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.roll(tokens, -1, 1)[..., None], -1))

    tokens = jax.ShapeDtypeStruct((2, sizes.length), jnp.int32)
    sites = jlora.trace(loss, params, tokens)
    adapted, mapped = jlora.adapt(loss), jlora.bank.vmap(loss)
    runners = {}
    for members in (2,) if options.tiny else (4, 16):
        if time.monotonic() > options.deadline - options.reserve:
            left_out.append(f"{members} adapters at once")
            continue
        target = {f".*/({'|'.join(_transformer.KERNELS)})": jlora.LoRA(RANK)}
        one = jlora.init(jax.random.key(1), sites, target)
        many = jlora.bank.stack({str(k): one for k in range(members)})
        together = jax.ShapeDtypeStruct((members, 2, sizes.length), jnp.int32)
        alone = jax.ShapeDtypeStruct((members * 2, sizes.length), jnp.int32)
        for name, trained, batch, fun in (
            (f"{members} adapters", many, together, lambda b, p, x: mapped(p, b, x).mean()),
            (f"one adapter, {members} batches", one, alone, lambda a, p, x: adapted(p, a, x)),
        ):
            step = adam(fun)
            runners[name] = Runner(step, (trained, (trained, trained), params, batch), jax.random.key(2), params)
    return timed(runners, options.rounds)


def methods(options: argparse.Namespace, left_out: list[str]) -> dict[str, Any]:
    """A step of every method on one kernel; the times are in turns, and in units of LoRA's."""
    width = 64 if options.tiny else 4096
    params = {"w": (jax.random.normal(jax.random.key(0), (width, width)) / width**0.5).astype(jnp.bfloat16)}
    x = jax.ShapeDtypeStruct((2, 64 if options.tiny else 2048, width), jnp.bfloat16)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(jnp.tanh(x @ params["w"]) - x).astype(jnp.float32))

    sites, runners = jlora.trace(loss, params, x), {}
    for name, (method, _) in METHODS.items():
        if time.monotonic() > options.deadline - options.reserve:
            left_out.append(f"method {name}")
            continue
        adapter = jlora.init(jax.random.key(1), sites, {"w": method}, params=params)
        apply = jlora.adapt(loss, on_dense="allow")
        step = adam(lambda a, p, x, apply=apply: apply(p, a, x))
        runners[name] = Runner(step, (adapter, (adapter, adapter), params, x), jax.random.key(2), params)
    return timed(runners, options.rounds)


def timed(runners: dict[str, Runner], rounds: int) -> dict[str, Any]:
    """Times in turns, with the ratio of each to the first."""
    if not runners:
        return {}
    seconds, first = _measure.interleave(runners, rounds), next(iter(runners))
    return {
        name: {
            "seconds": seconds[name],
            "median": _measure.median(seconds[name]),
            f"of {first}": _measure.ratio(seconds, name, first),
            "compiled_bytes": run.bytes(),
        }
        for name, run in runners.items()
    }


def parse() -> argparse.Namespace:
    """The options, completed by what follows from them and from the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes and one round")
    parser.add_argument("--out", help="file to write (default: benchmarks/results/device-CARD.json)")
    parser.add_argument("--topology", help="for the plan (default: that of the device)")
    parser.add_argument("--task", nargs=3, metavar=("TASK", "FORM", "BASE"), help="of a process of its own")
    options = parser.parse_args()
    options.deadline = time.monotonic() + (3500.0 if options.tiny else 460.0)
    options.reserve = 60.0
    options.sizes, options.batch = (TINY, 1) if options.tiny else (LLAMA, 4)
    options.rounds = 1 if options.tiny else 7
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
    left_out: list[str] = []
    result: dict[str, Any] = {
        "environment": _measure.environment(),
        "sizes": dataclasses.asdict(options.sizes) | {"batch": options.batch, "rank": RANK},
        "left out": left_out,
    }
    name = re.sub(r"\W+", "-", result["environment"]["device"].lower())
    out = _measure.RESULTS / f"device-{name}.json" if options.out is None else Path(options.out)
    for section, measure in (("bank", bank), ("steps", steps), ("methods", methods)):
        result[section] = measure(options, left_out)
        _measure.save(out, result)
    rows = [
        [base, form, _measure.number(row.get("median")), _measure.number(row.get("of jlora")), row.get("memory")]
        for base, forms in result["steps"].items()
        for form, row in forms.items()
    ]
    print(_measure.table(["base", "step", "seconds", "of jlora", "memory"], rows))
    for section in ("bank", "methods"):
        cells = [[name, _measure.number(row["median"], 5)] for name, row in result[section].items()]
        print(f"\n{_measure.table([section, 'seconds'], cells)}")
    print(f"left out: {', '.join(left_out) or 'nothing'}. Written: {out}")


if __name__ == "__main__":
    main()
