"""Memory of a LoRA step of SmolLM2-135M on the 4-bit blocks of its own file, against the same step on bfloat16 weights.

    PYTHONPATH=examples python -m benchmarks.quantized

Both compute in bfloat16. Bytes are reported by the compiler: of the arguments (base, adapter, optimiser) and of the
temporaries.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import assets
import jlora
import smollm
from benchmarks import _measure
from benchmarks._measure import Bar

TARGETS = r"layers/(attention|mlp)/\w+/kernel"


def memory(quantized: bool, tokens: jax.Array) -> dict[str, int]:
    """The compiled bytes of one step with AdamW on the adapter."""
    model, _ = smollm.load(assets.smollm(), quantized=quantized, dtype=jnp.bfloat16)
    graph, params = nnx.split(model)
    forward = smollm.forward(graph)
    adapter = jlora.init(jax.random.key(0), jlora.trace(forward, params, tokens), {TARGETS: jlora.LoRA(rank=8)})
    adapted, tx = jlora.adapt(forward, on_dense="error"), optax.adamw(1e-3)

    def loss(adapter: Any, params: Any, tokens: jax.Array) -> jax.Array:
        logits, _ = adapted(params, adapter, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens[:, 1:])
        return losses.mean()

    def step(adapter: Any, state: Any, params: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(adapter, params, tokens)
        updates, state = tx.update(gradients, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    args = (adapter, jax.eval_shape(tx.init, adapter), params, tokens)
    stats = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile().memory_analysis()
    if stats is None:
        raise NotImplementedError(f"XLA reports no memory on {jax.default_backend()}: use the CPU.")
    return {"arguments": stats.argument_size_in_bytes, "temporaries": stats.temp_size_in_bytes}


def main() -> None:
    """Reads the options, compiles, prints and writes."""
    parser = _measure.parser(__doc__, "quantized.json")
    parser.add_argument("--batch", type=int, default=2, help="sequences (default: 2)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence (default: 64)")
    options = parser.parse_args()
    tokens = jnp.zeros((options.batch, options.length), jnp.int32)
    rows = {"4-bit blocks": memory(True, tokens), "bfloat16": memory(False, tokens)}
    body = [[name, *(f"{n / 1e6:.1f}" for n in (*row.values(), sum(row.values())))] for name, row in rows.items()]
    print(_measure.table(["base", "arguments MB", "temporaries MB", "both"], body))
    quantized, bfloat16 = (sum(row.values()) for row in rows.values())
    bars = [Bar("bytes of a step on 4-bit blocks / on bfloat16", quantized / bfloat16, 0.45)]
    print(f"\n{_measure.verdicts(bars)}")
    sizes = {"batch": options.batch, "length": options.length}
    _measure.save(options.out, {"environment": _measure.environment(), "options": sizes, "rows": rows})


if __name__ == "__main__":
    main()
