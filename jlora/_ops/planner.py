"""Which form of a product with an update costs least, by FLOPs that static shapes give.

Of T rows with a weight (n, m), forward, the gradient of the input and that of the update, beyond the base's 4 T n m:

    factored       (x A) B with rank r                       6 T r (n + m)
    factored       x M(theta) by the structure               3 apply(T)
    dense sum      x (W + M), with the gradient x^T g of     2 T n m + n m + 3 times computing M (twice for a structure)
                   the whole weight; M = A B: 2 n m r
    merged forward x (W + M), the gradient of theta by the   n m + computing M + apply(T)
                   structure

The sums round the update with the weight, in its dtype: in 16 bits that loses small updates, which a branch of its own
keeps.
"""

from collections.abc import Mapping
from typing import NamedTuple

from jlora._ir.structured import Structure

FACTORED = "factored"
DENSE_SUM = "dense sum"
MERGED = "merged forward, structured gradient"


SMALL = 64  # below this size of a side FLOPs do not decide on the time, and thin factors stay apart


class ProductSize(NamedTuple):
    """One product of a stack: rows of the activation, and sizes of the weight."""

    rows: int
    n_in: int
    n_out: int

    @property
    def whole_gradient(self) -> float:
        """FLOPs of x^T g, and of adding a matrix to the weight."""
        return (2 * self.rows + 1) * self.n_in * self.n_out


def matrices_flops(size: ProductSize, rank: int) -> dict[str, float]:
    """The FLOPs of every form of an update A B of some rank, beyond those of the base."""
    return {
        FACTORED: 6 * size.rows * rank * (size.n_in + size.n_out),
        DENSE_SUM: size.whole_gradient + 6 * size.n_in * size.n_out * rank,
    }


def structure_flops(size: ProductSize, structure: Structure) -> dict[str, float]:
    """The FLOPs of every form of an update with a structure, beyond those of the base."""
    apply = structure.apply_flops(size.rows)
    return {
        FACTORED: 3 * apply,
        MERGED: size.n_in * size.n_out + structure.matrix_flops + apply,
        DENSE_SUM: size.whole_gradient + 2 * structure.matrix_flops,
    }


def cheapest(flops: Mapping[str, float]) -> str:
    """The form with the fewest FLOPs; of equal ones the first."""
    return min(flops, key=lambda form: flops[form])
