"""Full: a trained difference of the weight's own shape."""

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import axes as _axes


@final
@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Adds a difference of the weight's own shape: for biases, norms, heads, whatever has no low-rank form.

        W + D,    D: the shape of W, zero at the start

    It adapts every floating-point parameter that the program uses, and costs what training that parameter costs. On
    biases alone it is BitFit.

    Ben Zaken et al. 2021, BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models,
    arXiv:2106.10199.
    """

    def unsupported_reason(self, site: Site) -> str:
        return "" if site.is_trainable else site.unsupported_reason

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        return {"d": jnp.zeros(site.shape, dtype)}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        return _axes.add(w, [(update["d"], "".join(w.axes))], {}, update.scale)
