"""Products of an activation with consecutive factors that need its axes in other orders: by blocks of rows on the CPU.

A product with a contiguous contracted axis, such as LoRA's, needs none. Those of GraLoRA have a batch axis between
others, and one of LoKr's contracts such an axis.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from jlora._ir.algebra import align_axes
from jlora._ir.sizes import is_static, is_wide
from jlora._ops.pair_products import Factor, contract_pair, label_pair
from jlora._ops.rows import by_rows


@dataclasses.dataclass(frozen=True)
class Chain:
    """The product of an activation with several factors.

    Arguments:
        labels, terms, out: the indices of the activation, of each factor, and of the result.
        dtype: of the result.
        first, precision: as for `contract_pair`.
    """

    labels: str
    terms: tuple[str, ...]
    out: str
    dtype: Any
    first: bool
    precision: Any

    def __call__(self, x: jax.Array, *factors: jax.Array) -> jax.Array:
        labels, options = self.labels, {"first": self.first, "precision": self.precision}
        for k, factor in enumerate(factors):
            rest = "".join(self.terms[k + 1 :])
            dtype = x.dtype if rest else self.dtype
            x, labels = contract_pair(x, labels, factor, self.terms[k], self.out + rest, dtype=dtype, **options)
        return align_axes(x, labels, self.out)


def contract_by_rows(
    x: jax.Array,
    labels: str,
    factors: Sequence[Factor],
    out: str,
    *,
    over: str,
    dtype: Any,
    first: bool,
    precision: Any,
) -> tuple[jax.Array, str, int]:
    """The product of an activation with the next factors, if this needs another order of the activation's axes.

    Arguments:
        x, labels: the activation and its indices.
        factors: those that the activation has not met.
        out: the indices of the product with all of them, in order.
        over: as for `by_rows`.
        dtype, first, precision: as for `apply_network`.

    Returns:
        the product, its indices, and the number of factors in it: zero for the activation itself.
    """
    count = _count_together(x, labels, factors, out)
    arrays, terms = zip(*factors[:count], strict=True)
    is_last = count == len(factors)
    reached = _result_labels(labels, "".join(terms), out + "".join(term for _, term in factors[count:]))
    reached = "".join(c for c in out if c in reached) if is_last else reached
    chain = Chain(labels, terms, reached, dtype if is_last else x.dtype, first, precision)
    rows = [c for c in labels if c in reached and not any(c in term for term in terms)]
    order = _order_without_copies(x, chain, arrays)
    if not rows or (order is not None and (not is_last or order == "".join(c for c in out if c in order))):
        return x, labels, 0
    row = max(rows, key=lambda c: size if is_static(size := x.shape[labels.index(c)]) else 0)
    return by_rows(chain, x, *arrays, axes=(labels.index(row), reached.index(row)), over=over), reached, count


def _count_together(x: jax.Array, labels: str, factors: Sequence[Factor], out: str) -> int:
    """How many of the next factors are used in one function of the rows of `x`.

    These are all up to one after which the activation has at most half of its numbers, which is worth keeping for the
    backward pass.
    """
    sizes = {c: n for a, term in ((x, labels), *factors) for c, n in zip(term, a.shape, strict=True)}
    present = labels
    for k, (_, term) in enumerate(factors if all(map(is_static, sizes.values())) else ()):
        present = _result_labels(present, term, out + "".join(term for _, term in factors[k + 1 :]))
        if 2 * math.prod(sizes[c] for c in present) <= x.size:
            return k + 1
    return len(factors)


def _result_labels(labels: str, terms: str, keep: str) -> str:
    """The indices of a product in order, those of the activation first."""
    return "".join(c for c in dict.fromkeys(labels + terms) if c in keep)


def _order_without_copies(x: jax.Array, chain: Chain, factors: Sequence[jax.Array]) -> str | None:
    """The order of the result's axes of more than one entry; None if a product needs another order of its operand's.

    A product finds the axes of its activation in order if those of a batch are first, and the contracted ones are next
    or last.
    """
    pairs = zip((x, *factors), (chain.labels, *chain.terms), strict=True)
    labels, *terms = ("".join(c for c, n in zip(term, a.shape, strict=True) if is_wide(n)) for a, term in pairs)
    for k, term in enumerate(terms):
        keep = chain.out + "".join(terms[k + 1 :])
        labels, term = (_without_lone(names, other + keep) for names, other in ((labels, term), (term, labels)))
        pair = label_pair(labels, term, keep)
        inner, free = pair.contracted, (pair.x_free, pair.t_free)
        if not inner + pair.t_free:
            continue
        if labels not in (pair.batch + pair.x_free + inner, pair.batch + inner + pair.x_free):
            return None
        labels = pair.batch + "".join(free if chain.first else free[::-1])
    return labels


def _without_lone(labels: str, keep: str) -> str:
    return "".join(c for c in labels if c in keep)
