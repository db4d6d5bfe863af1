"""Full: a trained difference of the weight's own shape."""

import dataclasses
from typing import final

from jlora._interpreter.site import Site
from jlora.methods._base import Method
from jlora.methods._common.initializers import zeros


@final
@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Adds a difference of the weight's own shape: for biases, norms, heads and all else without a low-rank form.

        W + D,    D: the shape of W, zero at the start

    It adapts every floating-point parameter that the program uses, and costs what training that parameter costs. On
    biases alone it is BitFit.

    Ben Zaken et al. 2021, BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models,
    arXiv:2106.10199.
    """

    factors = {"d": "*weight"}
    initializers = {"d": zeros}
    networks = ("d",)

    def unsupported_reason(self, site: Site) -> str:
        return "" if site.is_trainable else site.unsupported_reason
