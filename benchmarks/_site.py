"""Temporary bytes of one site: a product, with the gradients of the adapter and of the input.

They are counted in activations, arrays of float32 as large as the product. LoRA needs one, for the cotangent g of the
product: the gradient of the input is where a second one can be.

A trained multiplier of the output (IA3, DoRA, RoAd) needs z = x W and g, and the cotangent of z is written over z, one
block of rows after the other. So do OFT and BOFT with g W^T. LoKr with two full factors needs g for both products, and
the gradient of the input of its own: two at most, as long as g W^T is a product of its own.

GLoRA needs z and g too, and its minimum is one: if g meets its shift before the cotangent of z is written, and that
meets W^T before the shift's gradient of the input is computed. XLA's CPU backend computes the latter first, in every
order of the program that was tried, so it has two and misses its limit.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from benchmarks import _measure
from benchmarks._measure import Bar

WIDTHS, TOKENS = (1024, 4096), 4096
LIMITS = {"LoRA": 1.05, "LoRA, 2 groups of 4": 1.05, "DoRA": 2.1, "LoKr": 2.2}
LIMIT = 1.15  # of all other methods


def gradients(method: jlora.Method, width: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The gradients of `sum(sin(x W))`, x: (tokens, width), W: (width, width), and their arguments."""
    params = {"w": jax.ShapeDtypeStruct((width, width), jnp.float32)}
    x = jax.ShapeDtypeStruct((TOKENS, width), jnp.float32)

    def forward(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["w"]

    def gradients(adapter: Any, params: Any, x: jax.Array) -> Any:
        return jax.grad(lambda a, x: jnp.sum(jnp.sin(jlora.adapt(forward)(params, a, x))), (0, 1))(adapter, x)

    sites = jlora.trace(forward, params, x)
    adapter = jax.eval_shape(lambda params: jlora.init(jax.random.key(0), sites, method, params=params), params)
    return gradients, (adapter, params, x)


def program(method: jlora.Method, width: int) -> _measure.Program:
    """The compiled gradients."""
    function, args = gradients(method, width)
    return _measure.compile(function, *args)


def activations(program: _measure.Program, width: int) -> float:
    """The temporary bytes of a program in activations."""
    return program.temp_bytes / (4 * TOKENS * width)


def measure(methods: Mapping[str, jlora.Method]) -> tuple[dict[str, Any], list[Bar]]:
    """Rows and bars of some methods, LoRA among them, at both widths."""
    rows, bars = {}, []
    for width in WIDTHS:
        flops = program(methods["LoRA"], width).flops
        for name, method in methods.items():
            function, args = gradients(method, width)
            compiled = _measure.compile_counted(function, *args)
            used, limit = activations(compiled, width), LIMITS.get(name, LIMIT)
            rows[f"{name}, {width}"] = {"flops": compiled.flops / flops, "activations": used, "limit": limit}
            bars.append(Bar(f"{name}, {width}: temporary activations", used, limit))
    return rows, bars


def show(rows: dict[str, Any], bars: list[Bar]) -> None:
    """Prints the figures, and the bars that they miss."""
    header = ["method, width", "FLOPs / LoRA", "temporary activations", "at most"]
    body = [
        [name, *(_measure.number(row[key]) for key in ("flops", "activations", "limit"))] for name, row in rows.items()
    ]
    missed = [bar for bar in bars if not bar.passed]
    print(f"\n### one site with the gradient of its input\n\n{_measure.table(header, body)}\n", flush=True)
    print(_measure.verdicts(missed) if missed else f"All {len(bars)} bars pass.", flush=True)
