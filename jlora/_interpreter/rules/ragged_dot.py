"""Expert products: `ragged_dot_general` of rows in groups, each with a kernel of its own."""

from jlora._compat import Eqn
from jlora._interpreter.context import Context, Value
from jlora._interpreter.rules.forms import Plan, dense_plan
from jlora._interpreter.rules.product_labels import label_product, place_maps
from jlora._interpreter.rules.products import multiply
from jlora._interpreter.rules.registry import register_rule
from jlora._ir.algebra import merge_indices
from jlora._ir.materialize import fold_full_rank
from jlora._ir.weight import AdaptedWeight, TensorNetwork


@register_rule("ragged_dot_general")
def ragged_dot_general(ctx: Context, eqn: Eqn, x: Value, f: Value, group_sizes: Value) -> list[Value] | None:
    """Adds a ragged product with each network to that with the base; the rows of the activation are ragged."""
    dims = eqn.params["ragged_dot_dimension_numbers"]
    contracted, batch = dims.dot_dimension_numbers
    groups = tuple(dims.rhs_group_dimensions)
    if not isinstance(f, AdaptedWeight) or isinstance(group_sizes, AdaptedWeight) or len(groups) != 1:
        return None
    x = ctx.to_array(eqn, x)
    rows = tuple(k for k in range(x.ndim) if k not in (*contracted[0], *batch[0]))
    if rows != tuple(dims.lhs_ragged_dimensions):
        return None
    f, folded = fold_full_rank(merge_indices(ctx.with_dropout_keys(f, 0)))
    if not _is_supported(f, groups[0], batch[1]):
        return None
    # An update of a kernel that all groups share is no ragged product: it would reach the rows that are in no group.
    folded = folded or (ctx.trace_only and not any(f.index(c).origins for c in f.axes[groups[0]]))
    plan = dense_plan(f) if folded else Plan(f)
    labels = label_product(f, x.shape, contracted, batch, groups=groups)
    maps = place_maps(f.maps, labels, x.dtype)
    if maps is None:
        return None
    return multiply(ctx, eqn, x, f, labels, maps, plan=plan, group_sizes=group_sizes)


def _is_supported(f: AdaptedWeight, group_axis: int, batch_axes: tuple[int, ...]) -> bool:
    """Whether the axis of the groups has one index, and each network is a ragged product."""
    group, batch = f.axes[group_axis], set("".join(f.axes[k] for k in batch_axes))
    return len(group) == 1 and all(_is_ragged(n, group, batch) for n in f.networks)


def _is_ragged(n: TensorNetwork, group: str, batch: set[str]) -> bool:
    """Whether some factor has the groups, and each that has them has the batch axes, as a ragged product needs."""
    terms = [term for term in n.terms if group in term]
    return bool(terms) and all(batch <= set(term) for term in terms)
