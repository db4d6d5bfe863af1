"""Maps of a weight, applied to the activation that meets it or to the result: never to the weight itself."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._ir.algebra import align_axes
from jlora._ir.sizes import is_static
from jlora._ir.weight import AxisMap, TensorNetwork
from jlora._ops.pair_products import Groups, by_row, contract_pair
from jlora._ops.rows import by_rows


def apply_maps(
    x: jax.Array,
    labels: str,
    sizes: Mapping[str, int],
    maps: Sequence[AxisMap],
    *,
    of_input: bool,
    precision: Any = None,
    groups: Groups | None = None,
) -> jax.Array:
    """An activation after some maps, in its own shape.

    (M W) x is W (M^T x) if x meets the mapped axis, so the maps of an input act transposed, the last one first.

    Arguments:
        x: the activation; its axes may be composite.
        labels: the indices of all its axes.
        sizes: of the indices.
        maps: of the weight. The activation has all their indices, but for those of groups.
        of_input: whether the activation meets the weight, or else is the result of a product or of a lookup.
        precision: as in `jax.lax.dot_general`.
        groups: of a ragged product.
    """
    axes = _split(x.shape, labels, sizes)
    for m in reversed(maps) if of_input else maps:
        if groups and groups.name in m.indices:
            split = x.reshape([sizes[c] for c in labels])
            x = _apply(split, labels, m, of_input, precision, groups).reshape(x.shape)
            continue
        rows = [k for k, axis in enumerate(axes) if len(axis) == 1 and axis not in m.indices]
        row = max(rows, key=lambda k: x.shape[k] if is_static(x.shape[k]) else 0, default=None)
        fun = _RowMap(axes, tuple(sizes.items()), row, m.indices, m.new, m.old, of_input, precision)
        if row is None:
            x = fun(x, m.array)
        else:
            over = "y" if of_input else "x"  # the input of a product has other uses, its result has none
            x = by_rows(fun, x, m.array, axes=(row, row), over=over, is_elementwise=fun.is_elementwise(m.array))
    return x


def _split(shape: Sequence[Any], labels: str, sizes: Mapping[str, Any]) -> tuple[str, ...]:
    """The indices of each axis of an array."""
    axes = []
    for size in shape:
        count, product = 0, 1
        while count < len(labels) and (product != size or not count):
            product, count = product * sizes[labels[count]], count + 1
        axes.append(labels[:count])
        labels = labels[count:]
    axes[-1:] = [axes[-1] + labels] if axes else []
    return tuple(axes)


@dataclasses.dataclass(frozen=True)
class _RowMap:
    """A map as a function of the rows of an activation.

    Arguments:
        axes: the indices of each axis of the activation.
        index_sizes: of all indices.
        row: the axis of the rows.
        indices, new, old: as for `AxisMap`.
        of_input, precision: as for `apply_maps`.
    """

    axes: tuple[str, ...]
    index_sizes: tuple[tuple[str, Any], ...]
    row: int | None
    indices: str
    new: str
    old: str
    of_input: bool
    precision: Any

    def __call__(self, x: jax.Array, array: jax.Array) -> jax.Array:
        sizes = dict(self.index_sizes)
        if self.row is not None:
            sizes[self.axes[self.row]] = x.shape[self.row]
        labels, m = "".join(self.axes), AxisMap(array, self.indices, self.new, self.old)
        split = x.reshape([sizes[c] for c in labels])
        return _apply(split, labels, m, self.of_input, self.precision, None).reshape(x.shape)

    def is_elementwise(self, array: jax.Array) -> bool:
        """Whether there is no product of matrices."""
        return not self.new or _is_of_pairs(AxisMap(array, self.indices, self.new, self.old))


def form_of(before: Sequence[AxisMap], after: Sequence[AxisMap]) -> str:
    """The name that `explain` gives to a product between maps that sum over indices; empty without such maps."""
    sides = {"the input": before, "the output": after}
    names = [side for side, maps in sides.items() if any(m.new for m in maps)]
    return f"map of {' and '.join(names)}" if names else ""


def maps_of_sum(
    networks: tuple[TensorNetwork, ...], before: list[AxisMap], after: list[AxisMap]
) -> tuple[tuple[TensorNetwork, ...], list[list[AxisMap]]]:
    """Takes the last multipliers of the result out of the networks, if all have them: they multiply the sum (DoRA).

    The backward pass then needs the sum alone, for the gradients of what multiplies it and of what consumes it.

    Returns:
        the networks, and the maps of the activation, of the product with the base, and of the sum.
    """
    of_sum: list[AxisMap] = []
    while networks and after and not after[-1].new:
        places = [[k for k, a in enumerate(n.factors) if a is after[-1].array] for n in networks]
        if any(len(at) != 1 or len(n.factors) == 1 for at, n in zip(places, networks, strict=True)):
            break
        networks = tuple(_without_factor(n, at[0]) for at, n in zip(places, networks, strict=True))
        after, of_sum = after[:-1], [after[-1], *of_sum]
    return networks, [before, after, of_sum]


def _without_factor(n: TensorNetwork, k: int) -> TensorNetwork:
    return dataclasses.replace(n, factors=n.factors[:k] + n.factors[k + 1 :], terms=n.terms[:k] + n.terms[k + 1 :])


def _apply(x: jax.Array, labels: str, m: AxisMap, of_input: bool, precision: Any, groups: Groups | None) -> jax.Array:
    array, indices = m.array.astype(x.dtype), m.indices
    if not m.new:
        if groups and groups.name in indices:
            array, indices = by_row(array, indices, groups, x.shape[labels.index(groups.row)])
        return x * align_axes(array, indices, labels)
    with_old = labels.translate(str.maketrans(m.new, m.old))
    before, after = (labels, with_old) if of_input else (with_old, labels)
    has_groups = groups is not None and groups.name in indices
    if _is_of_pairs(m) and not has_groups:
        summed, reached = (m.new, m.old) if of_input else (m.old, m.new)
        return _map_pairs(x, before, array, indices, summed, reached)
    kept = after + (groups.name if has_groups and groups else "")
    y, ys = contract_pair(
        x, before, array, indices, kept, dtype=x.dtype, precision=precision, groups=groups if has_groups else None
    )
    return align_axes(y, ys, after)


def _is_of_pairs(m: AxisMap) -> bool:
    return len(m.new) == 1 and m.array.shape[m.indices.index(m.new)] == 2


def _map_pairs(x: jax.Array, labels: str, array: jax.Array, indices: str, summed: str, reached: str) -> jax.Array:
    """The same product for pairs of entries: elementwise products with the pair, and with the pair reversed."""
    axes, names = (indices.index(reached), indices.index(summed)), indices.replace(summed, "").replace(reached, "")
    after = labels.replace(summed, reached)
    straight, crossed = (jnp.diagonal(a, 0, *axes) for a in (array, jnp.flip(array, axes[1])))
    straight, crossed = (align_axes(a, names + reached, after) for a in (straight, crossed))
    return x * straight + lax.rev(x, (labels.index(summed),)) * crossed
