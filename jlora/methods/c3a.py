"""C3A: an update of circulant blocks."""

import dataclasses
from collections.abc import Mapping
from typing import final

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import positive_integer, switch
from jlora.methods._common.initializers import zeros
from jlora.methods._common.matrices import in_out, nearest
from jlora.methods._common.networks import add_structure
from jlora.methods._common.structures import Circulant


@final
@dataclasses.dataclass(frozen=True)
class C3A(Method):
    """Adds a matrix of circulant blocks: a dense update of any rank with in * out / block numbers.

        W + M / in,    M[(p, j), (q, i)] = c[q, p, (j - i) mod block],    c: (*stack, out / block, in / block, block)

    for the blocks p of the in side and q of the out side. The product with M is a circular correlation of each block of
    the input, in the Fourier domain a product of entries. The kernels c start at zero, at which the program is the
    base; the paper's library draws them.

    Arguments:
        block: the size of a block, which divides the in size and the out size.
        merge_in_16_bits: whether a weight of 16 bits may be summed with the update before the product, which costs
            less and rounds the update with the weight. Weights of 32 bits are, if that costs less.

    Chen et al. 2024, Parameter-Efficient Fine-Tuning via Circular Convolution, arXiv:2407.19342.
    """

    block: int = positive_integer(64)
    merge_in_16_bits: bool = switch(False)

    factors = {"c": "*stack out_blocks in_blocks block"}
    initializers = {"c": zeros}

    def unsupported_reason(self, site: Site) -> str:
        if site.unsupported_reason:
            return site.unsupported_reason
        n_in, n_out = in_out(site)
        if n_in % self.block == n_out % self.block == 0:
            return ""
        would = nearest(self.block, min(n_in, n_out), lambda n: n_in % n == n_out % n == 0)
        return f"block {self.block} does not divide both its in size {n_in} and its out size {n_out}; {would} would do"

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        return {"out_blocks": axes.count("*out") // self.block, "in_blocks": axes.count("*in") // self.block}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        n_in, n_out = update.axes.count("*in"), update.axes.count("*out")
        structure = Circulant(n_in, n_out, self.block)
        return add_structure(w, update, update["c"], structure, update.scale / n_in, may_round=self.merge_in_16_bits)
