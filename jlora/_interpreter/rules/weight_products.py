"""Products of two weights, `x @ (w @ v)`: the product is a weight again, with the networks of both.

    (W + sum of m) (V + sum of n)  =  W V  +  sum over n of (W n)  +  sum over m of m (V + sum of n)

Each network on the right stays low-rank, because only those of its factors are multiplied that have a contracted index.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jlora import _compat
from jlora._compat import Eqn
from jlora._interpreter.context import Context, Role
from jlora._ir import lazy
from jlora._ir.algebra import align_axes, concatenate_ranks, merge_indices, rename_indices, split_index
from jlora._ir.explicit_mesh import explicit_axes
from jlora._ir.materialize import accumulation_dtype, einsum, fold_full_rank, without_maps
from jlora._ir.probe import probes, refuse
from jlora._ir.weight import AdaptedWeight, Index, TensorNetwork, fresh_indices

Factor = tuple[jax.Array, str]  # an array and the indices of its axes
Part = tuple[list[Factor], float]  # the factors and the scale of a network, or of a base with its multipliers


def multiply_weights(ctx: Context, eqn: Eqn, left: AdaptedWeight, right: AdaptedWeight) -> AdaptedWeight | None:
    """The product of two weights as a weight, None if one of them has to be materialised.

    As in `x @ (w @ v)`, the left weight's contracted axes are "out", and the right one's are "in".
    """
    for probe in probes((left, right)):
        refuse(probe.path, f"it is multiplied with another parameter, at {ctx.where}")
    left, right = without_maps(left), without_maps(right)
    contracted, batch = eqn.params["dimension_numbers"]
    if not (_is_supported(left) and _is_supported(right)):
        return None
    aligned = _align(
        merge_indices(left), merge_indices(right), list(zip(*contracted, strict=True)), list(zip(*batch, strict=True))
    )
    if aligned is None:
        return None
    (left, left_folded), (right, right_folded) = map(fold_full_rank, aligned)
    inner = "".join(left.axes[k] for k in contracted[0])
    _record(ctx, eqn, (left, right), inner, batch[0], "in", not left_folded)
    _record(ctx, eqn, (right, left), inner, batch[1], "out", not right_folded)
    return concatenate_ranks(_Product(ctx, eqn, left, right, inner).value())


def _is_supported(f: AdaptedWeight) -> bool:
    has_dropout = any(n.key is not None for n in f.networks)
    return len(f.axes) > 1 and not f.gathered_axes and not has_dropout and not explicit_axes(f.base)


def _align(
    left: AdaptedWeight, right: AdaptedWeight, contracted: Sequence[tuple[int, int]], batch: Sequence[tuple[int, int]]
) -> tuple[AdaptedWeight, AdaptedWeight] | None:
    """Gives axes that meet the same indices, and all other indices different names; None if axes are split unlike."""
    used = "".join(dict.fromkeys(right.used()))
    right = rename_indices(right, dict(zip(used, fresh_indices([left.used()], len(used)), strict=True)))
    for j, k in (*contracted, *batch):
        left = _split_like(left, j, right, k)
        right = _split_like(right, k, left, j)
        pairs = list(zip(left.axes[j], right.axes[k], strict=False))
        if len(left.axes[j]) != len(right.axes[k]) or any(left.size(a) != right.size(b) for a, b in pairs):
            return None
        right = rename_indices(right, {b: a for a, b in pairs})
    return left, right


def _split_like(f: AdaptedWeight, axis: int, other: AdaptedWeight, other_axis: int) -> AdaptedWeight:
    """Splits an axis of one index into the sizes of the other weight's axis."""
    names = other.axes[other_axis]
    if len(f.axes[axis]) > 1:
        return f
    for k in range(len(names) - 1):
        # The name of the minor part must be new to the other weight too: borrow one that neither has.
        f = _split_fresh(f, f.axes[axis][-1], (other.size(names[k]), other.size(names[k + 1 :])), other.used())
    return f


def _split_fresh(f: AdaptedWeight, name: str, sizes: tuple[int, int], taken: str) -> AdaptedWeight:
    before = set(f.labels)
    f = split_index(f, name, sizes)
    (new,) = set(f.labels) - before
    return rename_indices(f, {new: fresh_indices([f.used(), taken])})


def _record(
    ctx: Context, eqn: Eqn, pair: Sequence[AdaptedWeight], inner: str, batch: Sequence[int], free: Role, factored: bool
) -> None:
    f, other = pair
    roles: dict[str, Role] = dict.fromkeys(f.labels, free)
    roles |= dict.fromkeys(inner, "out" if free == "in" else "in")
    roles |= dict.fromkeys("".join(f.axes[k] for k in batch), "stack")
    meeting = sum(a.size for a, term in f.arrays if set(term) & set(inner)) / max(f.size(inner), 1)
    ctx.record(eqn, f, roles, factored=factored, added=2 * other.base.size * meeting if factored else f.base.size)


@dataclasses.dataclass(frozen=True)
class _Product:
    """The product of two aligned weights.

    Arguments:
        ctx, eqn: the equation of the program.
        left, right: the weights. Axes that meet have the same indices.
        inner: the indices that are contracted.
    """

    ctx: Context
    eqn: Eqn
    left: AdaptedWeight
    right: AdaptedWeight
    inner: str

    def value(self) -> AdaptedWeight:
        """The product."""
        (base,) = lazy.bind(self.eqn, self.left.base, self.right.base)
        maps = (*self.left.maps, *self.right.maps)
        networks = self._networks()
        if any(set(m.indices) & set(self.inner) for m in maps):  # the product of the bases is a network
            if not lazy.is_zero(base):
                networks.append(_network(_joined(_base_part(self.left), _base_part(self.right))))
            base, maps = lazy.zeros(base.shape, base.dtype), ()
        reported = self.left.paths if self.ctx.trace_only or not self.left.is_dense else ()
        return AdaptedWeight(
            base,
            networks=tuple(networks),
            axes=self.axes,
            indices=tuple(map(self._index, "".join(self.axes))),
            paths=tuple(dict.fromkeys((*self.left.paths, *self.right.paths))),
            maps=maps,
            multiplied=reported,
        )

    @property
    def axes(self) -> tuple[str, ...]:
        """The batch axes, then the left weight's free axes, then the right one's."""
        (left_in, right_in), (left_batch, right_batch) = self.eqn.params["dimension_numbers"]
        free = [a for k, a in enumerate(self.left.axes) if k not in (*left_in, *left_batch)]
        free += [a for k, a in enumerate(self.right.axes) if k not in (*right_in, *right_batch)]
        return (*(self.left.axes[k] for k in left_batch), *free)

    def _index(self, name: str) -> Index:
        both = [f.index(name) for f in (self.left, self.right) if name in f.labels]
        return both[0]._replace(origins=tuple(dict.fromkeys(origin for x in both for origin in x.origins)))

    def _networks(self) -> list[TensorNetwork]:
        """The networks of the product; a lazy base is materialised here, and again for the gradient."""

        def networks(left: AdaptedWeight, right: AdaptedWeight) -> list[TensorNetwork]:
            return dataclasses.replace(self, left=left, right=right)._networks_of_arrays()

        is_lazy = isinstance(self.left.base, lazy.LazyArray) or isinstance(self.right.base, lazy.LazyArray)
        return (jax.checkpoint(networks) if is_lazy else networks)(self.left, self.right)

    def _networks_of_arrays(self) -> list[TensorNetwork]:
        """The left base with each network of the right weight, and each network of the left one with the whole right
        weight.
        """
        left, right = _base_part(self.left), _base_part(self.right)
        right_parts = [right, *map(_part, self.right.networks)]
        networks = [n for part in right_parts[1:] for n in self._multiply(part, [left])]
        return networks + [n for part in map(_part, self.left.networks) for n in self._multiply(part, right_parts)]

    def _multiply(self, part: Part, others: Sequence[Part]) -> list[TensorNetwork]:
        """One network for the product of a part with the sum of others; one for each if its factors do not allow that.

        The factors of `part` that have contracted indices are multiplied by the others, and its other factors stay.
        """
        others = [other for other in others if other[0]]  # lazy zeros have no factors
        if not others:
            return []
        factors, scale = part
        meeting = [pair for pair in factors if set(pair[1]) & set(self.inner)]
        rest = [pair for pair in factors if not set(pair[1]) & set(self.inner)]
        term = self._remaining(meeting, rest, others)
        sizes = self._sizes([*meeting, *(pair for other, _ in others for pair in other)])
        wide = {c for c in "".join(self.axes) if self._index(c).size > 1}
        is_small = math.prod(sizes[c] for c in term) <= max(self.left.base.size, self.right.base.size)
        if wide <= set(term) or not is_small:
            return [_network(_joined(part, other)) for other in others]
        product = functools.reduce(jnp.add, [self._contract(meeting, other, term, sizes) for other in others])
        is_first = bool(factors and meeting and factors[0] is meeting[0])
        return [_network(([(product, term), *rest] if is_first else [*rest, (product, term)], scale))]

    def _remaining(self, meeting: list[Factor], rest: list[Factor], others: Sequence[Part]) -> str:
        """The indices of the product of factors: those of the weight, and ranks that other factors have."""
        free = "".join(self.axes)
        met, ranks = ("".join(term for _, term in factors) for factors in (meeting, rest))
        present = {*met, *(c for other, _ in others for _, term in other for c in term)}
        shared = [c for c in dict.fromkeys(met) if c in ranks and c not in free]
        kept = [c for c in free if c in present]
        # An axis of the left weight is before the ranks, one of the right weight is after them.
        before = [c for c in kept if c in self.left.labels]
        return "".join([*before, *shared, *(c for c in kept if c not in before)])

    def _sizes(self, factors: Sequence[Factor]) -> dict[str, int]:
        return {c: n for array, term in factors for c, n in zip(term, array.shape, strict=True)}

    def _contract(self, meeting: list[Factor], other: Part, term: str, sizes: dict[str, int]) -> jax.Array:
        """The product of factors with the factors of another part, with the indices `term`."""
        factors, scale = other
        dtype = accumulation_dtype(_compat.aval(self.eqn.outvars[0]).dtype)
        terms = [t for _, t in (*meeting, *factors)]
        reached = "".join(c for c in term if any(c in t for t in terms))
        product = einsum(terms, [a for a, _ in (*meeting, *factors)], reached, dtype)
        product = product if scale == 1 else product * jnp.asarray(scale, dtype)
        spread = align_axes(product, reached, term)
        return jnp.broadcast_to(spread, [sizes[c] for c in term])


def _base_part(f: AdaptedWeight) -> Part:
    if lazy.is_zero(f.base):
        return [], 1.0
    base = lazy.materialize(f.base).reshape([f.size(c) for c in f.labels])
    return [(base, f.labels), *((m.array, m.indices) for m in f.maps)], 1.0


def _part(n: TensorNetwork) -> Part:
    return list(zip(n.factors, n.terms, strict=True)), n.scale


def _joined(first: Part, second: Part) -> Part:
    return [*first[0], *second[0]], first[1] * second[1]


def _network(part: Part) -> TensorNetwork:
    factors, scale = part
    return TensorNetwork(tuple(array for array, _ in factors), tuple(term for _, term in factors), scale)
