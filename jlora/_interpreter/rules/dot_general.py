"""Matrix products: `dot_general` with any dimension numbers, with the weight on either side."""

import math

from jlora._compat import Eqn
from jlora._interpreter.context import Context, Value
from jlora._interpreter.rules.forms import plan_product
from jlora._interpreter.rules.product_labels import label_product, place_maps
from jlora._interpreter.rules.products import multiply
from jlora._interpreter.rules.registry import register_rule
from jlora._interpreter.rules.weight_products import multiply_weights
from jlora._ir.structured import with_matrices
from jlora._ir.weight import AdaptedWeight


@register_rule("dot_general")
def dot_general(ctx: Context, eqn: Eqn, left: Value, right: Value) -> list[Value] | None:
    """Adds the product with each network to the product with the base. The product of two weights is a weight."""
    if isinstance(left, AdaptedWeight) and isinstance(right, AdaptedWeight):
        left, right = with_matrices(left), with_matrices(right)
        product = multiply_weights(ctx, eqn, left, right)
        if product is not None:
            return [product]
        left, right = _materialize_one(ctx, eqn, left, right)
    x_is_left = isinstance(right, AdaptedWeight)
    x, f = (left, right) if x_is_left else (right, left)
    contracted, batch = (pair if x_is_left else pair[::-1] for pair in eqn.params["dimension_numbers"])
    rows = math.prod(n for k, n in enumerate(x.shape) if k not in (*contracted[0], *batch[0]))
    plan = plan_product(ctx.with_dropout_keys(f, 0 if x_is_left else 1), x, contracted[1], batch[1], rows)
    f = plan.weight
    labels = label_product(f, x.shape, contracted, batch, x_is_left=x_is_left)
    maps = place_maps(f.maps, labels, x.dtype)
    if maps is None:
        return None
    return multiply(ctx, eqn, x, f, labels, maps, plan=plan, x_is_left=x_is_left)


def _materialize_one(ctx: Context, eqn: Eqn, left: AdaptedWeight, right: AdaptedWeight) -> tuple[Value, Value]:
    """Leaves one weight of two: rows of a table or a vector are materialised, else the left one."""
    if (right.gathered_axes and not left.gathered_axes) or len(right.axes) < 2 <= len(left.axes):
        return left, ctx.materialize(eqn, right)
    return ctx.materialize(eqn, left), right
