"""Matrix products: `dot_general` with any dimension numbers, with the weight on either side."""

from jlora._compat import Eqn
from jlora._interpreter.context import Context, Value
from jlora._interpreter.rules.products import label_product, multiply, place_maps
from jlora._interpreter.rules.registry import register_rule
from jlora._interpreter.rules.weight_products import multiply_weights
from jlora._ir.algebra import merge_indices
from jlora._ir.materialize import fold_full_rank
from jlora._ir.weight import AdaptedWeight


@register_rule("dot_general")
def dot_general(ctx: Context, eqn: Eqn, left: Value, right: Value) -> list[Value] | None:
    """Adds the product with each network to the product with the base. The product of two weights is a weight."""
    if isinstance(left, AdaptedWeight) and isinstance(right, AdaptedWeight):
        product = multiply_weights(ctx, eqn, left, right)
        if product is not None:
            return [product]
        left, right = _materialize_one(ctx, eqn, left, right)
    x_is_left = isinstance(right, AdaptedWeight)
    x, f = (left, right) if x_is_left else (right, left)
    f, folded = fold_full_rank(merge_indices(ctx.with_dropout_keys(f, 0 if x_is_left else 1)))
    contracted, batch = (pair if x_is_left else pair[::-1] for pair in eqn.params["dimension_numbers"])
    labels = label_product(f, x.shape, contracted, batch, x_is_left=x_is_left)
    maps = place_maps(f.maps, labels, x.dtype)
    if maps is None:
        return None
    return multiply(ctx, eqn, x, f, labels, maps, folded=folded, x_is_left=x_is_left)


def _materialize_one(ctx: Context, eqn: Eqn, left: AdaptedWeight, right: AdaptedWeight) -> tuple[Value, Value]:
    """Leaves one weight of two: rows of a table or a vector are materialised, else the left one."""
    if (right.gathered_axes and not left.gathered_axes) or len(right.axes) < 2 <= len(left.axes):
        return left, ctx.materialize(eqn, right)
    return ctx.materialize(eqn, left), right
