"""The indices of a product's axes: those of the weight, and new ones for the free axes of the activation."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from jlora._interpreter.context import Role
from jlora._ir.weight import AdaptedWeight, AxisMap, fresh_indices

AxisPairs = tuple[Sequence[int], Sequence[int]]  # axes of the activation and those of the weight that they meet


@dataclasses.dataclass(frozen=True)
class ProductLabels:
    """The indices of a product's axes.

    Arguments:
        x: of the activation.
        out: of the result.
        contracted: those that are summed.
        group: of the groups of a ragged product, empty for others.
        sizes: of all indices.
        roles: of the weight's indices.
    """

    x: str
    out: str
    contracted: str
    group: str
    sizes: dict[str, int]
    roles: dict[str, Role]


def label_product(
    f: AdaptedWeight,
    x_shape: Sequence[int],
    contracted: AxisPairs,
    batch: AxisPairs,
    *,
    x_is_left: bool = True,
    groups: Sequence[int] = (),
) -> ProductLabels:
    """Labels the axes of a product by the weight's indices, and the free axes of the activation by new ones.

    Arguments:
        f: the weight.
        x_shape: of the activation.
        contracted, batch: the axes of both that are summed, and that the result has in common.
        x_is_left: whether the activation is the left operand, so that its free axes are before the weight's.
        groups: the weight's axis that the groups of a ragged product run along.
    """
    (x_in, f_in), (x_batch, f_batch) = contracted, batch
    x_axes = {k: f.axes[j] for k, j in (*zip(x_in, f_in, strict=True), *zip(x_batch, f_batch, strict=True))}
    x_free = [k for k in range(len(x_shape)) if k not in x_axes]
    x_axes |= zip(x_free, fresh_indices([f.used()], len(x_free)), strict=True)
    f_free = [k for k in range(len(f.axes)) if k not in (*f_in, *f_batch, *groups)]
    free = "".join(x_axes[k] for k in x_free), "".join(f.axes[k] for k in f_free)
    roles: dict[str, Role] = {}
    for k, axis in enumerate(f.axes):
        roles |= dict.fromkeys(axis, "in" if k in f_in else "out" if k in f_free else "stack")
    return ProductLabels(
        x="".join(x_axes[k] for k in range(len(x_shape))),
        out="".join([*(x_axes[k] for k in x_batch), *(free if x_is_left else free[::-1])]),
        contracted="".join(f.axes[k] for k in f_in),
        group="".join(f.axes[k] for k in groups),
        sizes=f.sizes | {x_axes[k]: x_shape[k] for k in x_free},
        roles=roles,
    )


def place_maps(
    maps: Sequence[AxisMap], labels: ProductLabels, x_dtype: jnp.dtype
) -> tuple[list[AxisMap], list[AxisMap]] | None:
    """Divides maps into those of the activation and those of the result, None if one is of neither."""
    contracted, of_x = set(labels.contracted), set(labels.x + labels.group)
    before = [m for m in maps if set(m.kept) & contracted and set(m.kept) <= of_x and set(m.new) <= contracted]
    # A sum over an axis that the activation has too, such as one of a batch, is no sum of results.
    after = [m for m in maps if not set(m.kept) & contracted and not set(m.new) & of_x]
    if len(before) + len(after) < len(maps) or (before and not jnp.issubdtype(x_dtype, jnp.floating)):
        return None
    return before, after
