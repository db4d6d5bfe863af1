"""Temporary bytes of one site: a product, with the gradients of the adapter and of the input.

They are counted in activations, arrays of float32 as large as the product. LoRA needs one, for the cotangent of the
product. A method that multiplies the output (DoRA, IA3, GLoRA) needs one more, for the gradient of the multiplier.
RoAd multiplies pairs of outputs: y, the cotangent of their rotation, and the reversed y or the cotangent of y live
together, three arrays, one of which is where the gradient of the input will be.

Products of small blocks have no limit here, since they are not at their minimum. OFT needs the cotangent g of the
product and g W^T, the latter with x for the gradient of the blocks: two arrays, one of them in the place of the result,
so 1.0. It takes 3.0, GraLoRA 4.0, and LoKr with a full second factor 4.0 (1024) and 2.5 (4096): XLA's CPU backend
transposes operands and results of a product whose batch axis, or contracted axis, is between others. Blocks as one
matrix with zeros (BD-LoRA) would take as many times the FLOPs as there are blocks.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from benchmarks import _measure
from benchmarks._measure import Bar

WIDTHS, TOKENS = (1024, 4096), 4096
LIMITS = {"LoRA": 1.05, "LoRA, 2 groups of 4": 1.05, "DoRA": 2.1, "IA3": 2.1, "GLoRA": 2.1, "RoAd": 2.1, "LoKr": 2.2}
LIMIT = 1.15  # of all other methods


def program(method: jlora.Method, width: int) -> _measure.Program:
    """The compiled gradients of `sum(sin(x W))`, x: (tokens, width), W: (width, width)."""
    params = {"w": jax.ShapeDtypeStruct((width, width), jnp.float32)}
    x = jax.ShapeDtypeStruct((TOKENS, width), jnp.float32)

    def forward(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["w"]

    def gradients(adapter: Any, params: Any, x: jax.Array) -> Any:
        return jax.grad(lambda a, x: jnp.sum(jnp.sin(jlora.adapt(forward)(params, a, x))), (0, 1))(adapter, x)

    sites = jlora.trace(forward, params, x)
    adapter = jax.eval_shape(lambda params: jlora.init(jax.random.key(0), sites, method, params=params), params)
    return _measure.compile(gradients, adapter, params, x)


def activations(program: _measure.Program, width: int) -> float:
    """The temporary bytes of a program in activations."""
    return program.temp_bytes / (4 * TOKENS * width)


def measure(methods: Mapping[str, jlora.Method]) -> tuple[dict[str, Any], list[Bar]]:
    """Rows and bars of some methods, LoRA among them, at both widths.

    LoKr has rank 8: at rank 16 its blocks of 32 x 32 are not of low rank.
    """
    rows, bars = {}, []
    for width in WIDTHS:
        flops = program(methods["LoRA"], width).flops
        for name, method in methods.items():
            compiled = program(jlora.LoKr(8) if name == "LoKr" else method, width)
            used = activations(compiled, width)
            rows[f"{name}, {width}"] = {"flops": compiled.flops / flops, "activations": used}
            bars.append(Bar(f"{name}, {width}: temporary activations", used, LIMITS.get(name, LIMIT)))
    return rows, bars


def show(rows: dict[str, Any], bars: list[Bar]) -> None:
    """Prints the figures, and the bars that they miss."""
    header = ["method, width", "FLOPs / LoRA", "temporary activations"]
    body = [[name, *(_measure.number(row[key]) for key in ("flops", "activations"))] for name, row in rows.items()]
    missed = [bar for bar in bars if not bar.passed]
    print(f"\n### one site with the gradient of its input\n\n{_measure.table(header, body)}\n", flush=True)
    print(_measure.verdicts(missed) if missed else f"All {len(bars)} bars pass.", flush=True)
