"""KaSA: a triple of singular values and vectors, in the place of the weight's last ones."""

import dataclasses
from typing import final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import choice, fraction, nonzero, positive_integer, scale_of
from jlora.methods._common.initializers import kaiming, stacked
from jlora.methods._common.matrices import as_matrix, in_out
from jlora.methods._common.networks import add_network


@final
@dataclasses.dataclass(frozen=True)
class KaSA(Method):
    """Takes the last singular triples out of a weight, and trains new ones in their place.

        W - U V + s A diag(e) B,    A: (*stack, *in, rank),    e: (*stack, rank),    B: (*stack, rank, *out)

    with s = alpha / rank. U (*stack, *in, rank), with the singular values, and V (*stack, rank, *out) are the last
    triples of the weight, which the paper regards as noise, and are frozen: `jlora.init(..., params=params)`. Add
    `jlora.kasa_penalty` to the loss: it keeps e small, and A and B near orthogonal matrices.

    Arguments:
        rank: how many triples.
        alpha: the numerator of the scale; None makes the scale 1.
        dropout: the dropout rate of the branch's input, in [0, 1).
        start: "triples" starts A, e and B at what was taken out, so that the program equals the base. "zero" starts B
            at zero, A and e at random, as the paper does: then the program starts without the last triples, and differs
            from the base. Arrays of 16 bits start within their rounding of the base, with `offset=True` at the base.

    Raises:
        ValueError: if a hyper-parameter is not valid, and from `jlora.init`, if the rank leaves nothing of the weight.

    Example:
        adapter = jlora.init(key, sites, jlora.KaSA(8), params=params)
        loss = task_loss + jlora.kasa_penalty(adapter)

    Wang et al. 2024, KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models, arXiv:2412.06071.
    """

    rank: int = positive_integer(8)
    alpha: float | None = nonzero(None)
    dropout: float = fraction(0.0)
    start: str = choice("triples", "zero")

    factors = {
        "a": "*stack *in triple",
        "e": "*stack triple",
        "b": "*stack triple *out",
        "u": "*stack *in triple",
        "v": "*stack triple *out",
    }

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank)

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("u", "v")

    @property
    def init_needs_weight(self) -> bool:
        return True

    def unsupported_reason(self, site: Site) -> str:
        smaller = min(in_out(site)) if not site.unsupported_reason else 0
        if site.unsupported_reason or self.rank < smaller:
            return site.unsupported_reason
        return f"rank {self.rank} is not below its smaller side {smaller}; lower the rank"

    def without_init_fields(self) -> "KaSA":
        return dataclasses.replace(self, start="triples")

    def sizes(self, axes: WeightAxes) -> dict[str, int]:
        return {"triple": self.rank}

    def init(self, key: jax.Array, site: Site, dtype: DTypeLike, base: jax.Array | None) -> dict[str, jax.Array]:
        assert base is not None
        matrix = as_matrix(base, site.roles)
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        a, e, b = u[..., -self.rank :], s[..., -self.rank :], vt[..., -self.rank :, :]
        arrays = {"a": a, "e": e / self.scale, "b": b, "u": a * e[..., None, :], "v": b}
        if self.start == "zero":
            a_key, e_key = jax.random.split(key)
            arrays["a"] = stacked(kaiming, a_key, site.sizes("stack"), a.shape[-2:], dtype)
            arrays |= {"e": jax.random.normal(e_key, e.shape), "b": jnp.zeros_like(b)}
        return {name: array.astype(dtype) for name, array in arrays.items()}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        a = update.joined("a") * update["e"][..., None, :]
        w = add_network(
            w, update, [(a, self.factors["a"]), (update["b"], self.factors["b"])], self.scale * update.scale
        )
        removed = [(update[name], self.factors[name]) for name in ("u", "v")]
        return add_network(w, dataclasses.replace(update, key=None), removed, -update.scale)
