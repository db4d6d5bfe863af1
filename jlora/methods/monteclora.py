"""MonteCLoRA: a LoRA whose A is drawn from a trained distribution in training."""

import dataclasses
from collections.abc import Mapping
from typing import final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.hyperparameters import fraction, nonzero, number, positive_integer, scale_of, switch
from jlora.methods._common.initializers import Initializer
from jlora.methods._common.matrices import rank_too_high
from jlora.methods._common.networks import add_network
from jlora.methods.lora import LoRA, pair_initializers

_LEAST_VARIANCE, _LEAST_CONCENTRATION = 1e-3, 1e-6


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return jax.random.uniform(key, shape, dtype)


@final
@dataclasses.dataclass(frozen=True)
class MonteCLoRA(Method):
    """Adds a product of two thin matrices, the first of which is drawn from a trained distribution in training.

        W + s A B,                                  the mean: without a key, and merged
        W + s (A + t sum_k p_k Z_k diag(c)) B,      with the keys of `jlora.with_dropout`; new for every key

    with s = alpha / rank, Z_k standard normal `(in, rank)`, k = 1 ... samples, and

        c_r^2 = exp(2 spread_r) q_r,    q_r chi-squared with `rank` degrees of freedom, the diagonal of a Wishart matrix
        p = softmax(log m - mean(log m) + C z),    m = exp(mixture),    z standard normal,
        C C^T = diag((1 - 2 / samples) / m + sum(1 / m) / samples^2),    which approximates a Dirichlet distribution

    A: (*stack, *in, rank), B: (*stack, rank, *out), spread: (*stack, rank), mixture: (*stack, samples). A and B start
    as those of a LoRA, spread and mixture uniform in [0, 1).

    Arguments:
        rank, alpha, rank_stabilized: as for `LoRA`.
        samples: how many matrices Z_k are drawn.
        sample_scale: t.
        dropout: the dropout rate of the branch's input, in [0, 1).

    Sengupta et al. 2024, Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of Low-Rank
    Adaptation, arXiv:2411.04358.
    """

    rank: int = positive_integer(8)
    alpha: float | None = nonzero(None)
    rank_stabilized: bool = switch(False)
    samples: int = positive_integer(8)
    sample_scale: float = number(1e-4)
    dropout: float = fraction(0.0)

    factors = {**LoRA.factors, "spread": "*stack rank", "mixture": "*stack samples"}
    is_sampled = True

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rank_stabilized)

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or rank_too_high(site, self.rank)

    def initializers_for(self, site: Site) -> Mapping[str, Initializer]:
        return {**pair_initializers(None, None, False, site), "spread": _uniform, "mixture": _uniform}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        a = update.joined("a")
        if update.key is not None:
            draw = jnp.vectorize(self._noise, signature="(),(r),(k),(n)->(n,r)")
            a = a + draw(update.key, update["spread"], update["mixture"], a[..., 0]).astype(a.dtype)
        terms = [(a, "*stack *in rank"), (update["b"], "*stack rank *out")]
        return add_network(w, update, terms, self.scale * update.scale)

    def _noise(self, key: jax.Array, spread: jax.Array, mixture: jax.Array, rows: jax.Array) -> jax.Array:
        """What is added to A of one layer, `(in, rank)`; `rows` has the length of in."""
        normal_key, squares_key, mixture_key = jax.random.split(jax.random.fold_in(key, 1), 3)
        squares = jax.random.chisquare(squares_key, self.rank, (self.rank,), spread.dtype)
        deviation = jnp.sqrt(jnp.maximum(jnp.exp(2 * spread) * squares, _LEAST_VARIANCE))
        concentration = jnp.maximum(jnp.exp(mixture), _LEAST_CONCENTRATION)
        logs, inverse = jnp.log(concentration), 1 / concentration
        variance = inverse * (1 - 2 / self.samples) + inverse.sum() / self.samples**2
        z = jax.random.normal(mixture_key, mixture.shape, mixture.dtype)
        shares = jax.nn.softmax(logs - logs.mean() + jnp.sqrt(jnp.maximum(variance, _LEAST_CONCENTRATION)) * z)
        # The mixture of independent normal matrices is one, with the square root of the sum of the squared shares.
        mixed = jnp.linalg.norm(shares) * jax.random.normal(normal_key, (rows.size, self.rank), spread.dtype)
        return self.sample_scale * mixed * deviation[None]
