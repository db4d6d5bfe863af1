"""FourierFT: a few coefficients of the update's spectrum."""

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp
from jax import lax

from jlora._interpreter.site import Site
from jlora._ir.materialize import accumulation_dtype
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import axes as _axes
from jlora.methods._common import random_matrices as _random


@final
@dataclasses.dataclass(frozen=True)
class FourierFT(Method):
    """Adds the real part of an inverse discrete Fourier transform of a sparse spectrum: a dense update.

        W + s Re(IDFT2(F)),    F: (in, out), zero but for n trained coefficients

    One coefficient lies in each of n equal stretches of the spectrum, drawn from the seed and the same for all layers
    of a stack. They start at zero.

    Arguments:
        n: the number of coefficients.
        scaling: s.
        seed: of the places.

    Gao et al. 2024, Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, arXiv:2405.03003.
    """

    n: int = 1000
    scaling: float = 150.0
    seed: int = 0

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or _axes.too_many(site, self.n)

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        return {"c": jnp.zeros((*site.sizes("stack"), self.n), dtype)}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        _, inner, outer = _axes.letters(w, update.roles)
        spectrum = _random.scattered(update["c"], self.seed, w.size(inner), w.size(outer))
        delta = jnp.fft.ifft2(spectrum.astype(accumulation_dtype(spectrum.dtype))).real
        # In partitioned programs XLA's CPU transform fails on a gradient that is laid out by columns: this one is not.
        delta = lax.optimization_barrier(delta.reshape(-1)).reshape(delta.shape)
        return _axes.add_matrix(w, delta, update.roles, self.scaling * update.scale)
