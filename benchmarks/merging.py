"""Errors of the three ways to merge an adapter that was trained on a quantised base.

    python -m benchmarks.merging

The program of the page on files (`jlora/io/README.md`) for every format: a small model is quantised, LoRA is trained on
it, and the merged models are compared with the adapted one.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import jlora
from benchmarks import _measure

WIDTH, ROWS, OUTPUTS, BLOCKS, STEPS, RATE = 64, 256, 16, 2, 100, 3e-3
# The format, and whether the adapter starts as LoftQ does.
BASES = {
    "NF4": ("nf4", False),
    "NF4, started by LoftQ": ("nf4", True),
    "int4, blocks of 32": ("int4", False),
    "int8": ("int8", False),
    "fp8": ("fp8", False),
}


def model(params: Any, x: jax.Array) -> jax.Array:
    """Two residual blocks and a head."""
    for block in params["blocks"]:
        x = x + jax.nn.gelu(x @ block["up"]) @ block["down"]
    return x @ params["head"]


def weights(key: jax.Array) -> Any:
    """Random weights."""

    def matrix(n: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, n), shape) / shape[0] ** 0.5

    blocks = [
        {"up": matrix(2 * k, WIDTH, 4 * WIDTH), "down": matrix(2 * k + 1, 4 * WIDTH, WIDTH)} for k in range(BLOCKS)
    ]
    return {"blocks": blocks, "head": matrix(2 * BLOCKS, WIDTH, OUTPUTS)}


def row(name: str) -> dict[str, Any]:
    """The loss of the adapted model, and of each merged one with the relative error of its logits."""
    format_, is_loftq = BASES[name]
    params, x = weights(jax.random.key(0)), jax.random.normal(jax.random.key(1), (ROWS, WIDTH))
    sites = jlora.trace(model, params, x)
    adapter = jlora.init(jax.random.key(2), sites, {"blocks.*": jlora.LoRA(rank=8)})
    base = jlora.quantize(params, sites, {"blocks.*": format_})
    if is_loftq:
        base, adapter = jlora.loftq(adapter, params, base)
    target, tx = model(params, x) + 3 * x[:, :OUTPUTS], optax.adam(RATE)

    def loss_of(logits: jax.Array) -> jax.Array:
        return jnp.mean((logits - target) ** 2)

    @jax.jit
    def train(adapter: Any, base: Any) -> Any:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            adapter, state = carry
            gradients = jax.grad(lambda adapter: loss_of(jlora.adapt(model)(base, adapter, x)))(adapter)
            updates, state = tx.update(gradients, state)
            return (optax.apply_updates(adapter, updates), state), None

        return jax.lax.scan(step, (adapter, tx.init(adapter)), length=STEPS)[0][0]

    apply = jax.jit(jlora.adapt(model))
    before = float(loss_of(apply(base, adapter, x)))
    trained = train(adapter, base)
    logits = apply(base, trained, x)
    merged = {
        "dequantised base": jlora.merge(base, trained),
        "original float base": jlora.merge(params, trained),
        "quantised again": jlora.merge(base, trained, requantize=True),
    }
    outputs = {way: apply(new, {}, x) for way, new in merged.items()}
    errors = {way: float(jnp.linalg.norm(y - logits) / jnp.linalg.norm(logits)) for way, y in outputs.items()}
    losses = {way: float(loss_of(y)) for way, y in outputs.items()}
    leaf = base["blocks"][0]["up"]
    bits = 8 * sum(a.nbytes for a in jax.tree.leaves(leaf)) / (WIDTH * 4 * WIDTH)
    return {
        "before": before,
        "adapted": float(loss_of(logits)),
        "errors": errors,
        "losses": losses,
        "bits of a weight": bits,
    }


def table(rows: dict[str, Any]) -> str:
    """Errors, and losses in brackets."""

    def cell(row: dict[str, Any], way: str) -> str:
        error = f"{row['errors'][way]:.1e}" if row["errors"][way] > 1e-5 else f"**{row['errors'][way]:.0e}**"
        return f"{error} ({row['losses'][way]:.3f})"

    ways = next(iter(rows.values()))["errors"]
    header = ["base", "loss of the adapted model", *(f"merged onto the {way}" for way in list(ways)[:2]), list(ways)[2]]
    body = [[name, f"{row['adapted']:.3f}", *(cell(row, way) for way in ways)] for name, row in rows.items()]
    return _measure.table(header, body)


def main() -> None:
    """Reads the options, trains, prints and writes."""
    parser = _measure.parser(__doc__, "merging.json")
    options = parser.parse_args()
    rows = {name: row(name) for name in _measure.progress(BASES, "bases")}
    print(table(rows))
    _measure.save(options.out, {"environment": _measure.environment(), "rows": rows})


if __name__ == "__main__":
    main()
