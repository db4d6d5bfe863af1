"""LoKr: a Kronecker product."""

import dataclasses
import math
from typing import Any, final

import jax

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import axes as _axes
from jlora.methods._common import initializers as _start


@final
@dataclasses.dataclass(frozen=True)
class LoKr(Method):
    """Adds a Kronecker product, the larger factor (or both) of low rank where that is smaller.

        W + s C (x) D,    C: (a, c),    D: (b, d) or A B with A: (b, rank), B: (rank, d),    in = a b,    out = c d

    In letters `ac, bd -> (a b), (c d)`; a stacked weight has one pair a layer. Of a convolution, `in` are its channels,
    and D has the window in front, (*window, b, d), or A: (*window, b, rank). D (or B) starts at zero.

    Arguments:
        rank: the rank of D; None keeps D whole. D is whole as well where the rank is at least half of its larger side.
        alpha: the numerator of the scale alpha / rank; None makes the scale 1. Without low rank the scale is 1.
        factor: the size a and c (where it divides); -1 takes the divisor nearest below the square root.
        decompose_both: gives C low rank too, where the rank is less than half of its larger side.
        dropout: the share of the branch's input that is dropped in training, in [0, 1).

    Yeh et al. 2023, arXiv:2309.14859; Edalati et al. 2022, KronA, arXiv:2212.10650.
    """

    rank: int | None = 8
    alpha: float | None = None
    factor: int = -1
    decompose_both: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor < 1 and self.factor != -1:
            raise ValueError(f"LoKr's factor is a whole number from 1 on, or -1 for the most even, not {self.factor}.")

    def _split(self, sizes: tuple[int, ...]) -> tuple[int, int]:
        """The joint axis as (major, minor)."""
        n = math.prod(sizes)
        majors = [k for k in range(1, n + 1) if n % k == 0 and _axes.blocks_fit(sizes, n // k)]
        most = math.isqrt(n) if self.factor == -1 else self.factor
        major = max(k for k in majors if k <= most)
        return major, n // major

    def _low(self, one: int, other: int) -> bool:
        return self.rank is not None and self.rank < max(one, other) / 2

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        stack, window = site.sizes("stack"), site.sizes("window")
        (a, b), (c, d) = self._split(_axes.channels(site)), self._split(site.sizes("out"))
        keys = jax.random.split(key, 4)

        def make(k: int, shape: tuple[int, int], init: Any = _start.kaiming) -> jax.Array:
            return _start.stacked(init, keys[k], stack, shape, dtype)

        def wide(k: int, n_out: int, init: Any = _start.kaiming) -> jax.Array:
            return make(k, (math.prod(window) * b, n_out), init).reshape(*stack, *window, b, n_out)

        arrays = {}
        if self.decompose_both and self._low(a, c):
            arrays |= {"ca": make(0, (a, self.rank or 0)), "cb": make(1, (self.rank or 0, c))}
        else:
            arrays |= {"c": make(0, (a, c))}
        if self._low(b, d):
            return arrays | {"a": wide(2, self.rank or 0), "b": make(3, (self.rank or 0, d), _start.zeros)}
        return arrays | {"d": wide(2, d, _start.zeros)}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        stack, _, outer = _axes.letters(w, update.roles)
        inner, window = _axes.within(w, update.roles)
        sizes = [tuple(w.index(c).size for c in cs) for cs in (inner, outer)]
        w, inner, row = _axes.blocks(w, inner, self._split(sizes[0])[1])
        w, outer, column = _axes.blocks(w, outer, self._split(sizes[1])[1])
        one, two = _axes.ranks(w, 2)
        if "ca" in update.factors:
            pairs = [(update["ca"], stack + inner + one), (update["cb"], stack + one + outer)]
        else:
            pairs = [(update["c"], stack + inner + outer)]
        if "a" in update.factors:
            pairs += [(update["a"], stack + window + row + two), (update["b"], stack + two + column)]
        else:
            pairs += [(update["d"], stack + window + row + column)]
        wide, axes = update["a" if "a" in update.factors else "d"], len(stack + window) + 2
        if window and wide.ndim != axes:
            raise ValueError(
                f"A factor of {_axes.name(w)} has shape {wide.shape}: LoKr's D or A of a convolution has one axis "
                f"for each of the window, {axes} in all. The one here divides the window with the channels."
            )
        is_low = "a" in update.factors or "ca" in update.factors
        scale = self.alpha / self.rank if self.alpha is not None and self.rank and is_low else 1.0
        rank = self.rank or 0
        return _axes.add(w, pairs, {one: rank, two: rank}, scale * update.scale, **_axes.dropout(update, stack))
