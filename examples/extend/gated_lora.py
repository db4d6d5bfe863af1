"""A method outside of jlora: LoRA with a trained gate for each rank.

W + s A diag(g) B,    A: (*stack, *in, rank),    g: (*stack, rank),    B: (*stack, rank, *out)
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.nn import initializers

import jlora
from jlora import extend


@dataclasses.dataclass(frozen=True)
class GatedLoRA(extend.Method):
    """Adds a low-rank product whose ranks are opened and closed by trained gates.

    Arguments:
        rank: of the product.
        alpha: the numerator of the scale alpha / rank; None makes the scale 1.
    """

    rank: int = extend.positive_integer(8)
    alpha: float | None = extend.nonzero(None)

    factors = {"a": "*stack *in rank", "gate": "*stack rank", "b": "*stack rank *out"}  # noqa: RUF012
    initializers = {"a": extend.kaiming, "gate": initializers.ones, "b": initializers.zeros}  # noqa: RUF012
    networks = ("a gate b",)

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"embed": jax.random.normal(keys[0], (50, 16)), "layers": jax.random.normal(keys[1], (3, 16, 16)) / 4}

    def model(params, tokens):
        x = params["embed"][tokens]
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
        return x @ params["embed"].T  # tied

    tokens = jnp.arange(6)
    adapter = jlora.init(keys[2], jlora.trace(model, params, tokens), {".*": GatedLoRA(rank=4, alpha=8)})
    print(jlora.summary(adapter, params))
    adapter = jax.tree.map(lambda a: a + 0.1, adapter)  # as if it were trained
    adapted = jax.jit(jlora.adapt(model, on_dense="error"))(params, adapter, tokens)
    merged = model(jlora.merge(params, adapter), tokens)
    assert jnp.allclose(adapted, merged, rtol=1e-4, atol=1e-4)
    print("adapted and merged agree")


if __name__ == "__main__":
    main()
