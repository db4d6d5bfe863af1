"""One slice of a weight at positions that scalars hold: `dynamic_slice`."""

import functools

import jax
from jax import lax

from jlora._compat import Eqn
from jlora._interpreter.context import Context, Value
from jlora._interpreter.rules.lookup import finish_lookup
from jlora._interpreter.rules.registry import register_rule
from jlora._ir import lazy
from jlora._ir.algebra import map_index, merge_indices, relabel
from jlora._ir.materialize import without_maps_along
from jlora._ir.structured import structured, with_matrices
from jlora._ir.weight import AdaptedWeight


@register_rule("dynamic_slice")
def dynamic_slice(ctx: Context, eqn: Eqn, f: Value, *starts: Value) -> list[Value] | None:
    """Slices every array that has the index of an axis that is sliced."""
    if not isinstance(f, AdaptedWeight) or any(isinstance(start, AdaptedWeight) for start in starts):
        return None
    sizes = eqn.params["slice_sizes"]
    sliced = [k for k, n in enumerate(f.shape) if sizes[k] != n]
    matrices, f = structured(f), with_matrices(f)
    changed = without_maps_along(f, sliced)
    factored, f = changed is f, merge_indices(changed)
    if any(len(f.axes[k]) > 1 for k in sliced):
        return None
    (base,) = lazy.bind(eqn, f.base, *starts)
    rows = f
    for k in sliced:
        rows = map_index(rows, f.axes[k], functools.partial(_slice_array, start=starts[k], size=sizes[k]), sizes[k])
    indexed = [f.axes[k] for k in sliced if sizes[k] == 1]
    rows = relabel(rows, base, f.axes)
    return [finish_lookup(ctx, eqn, f, rows, indexed, [], matrices=matrices, factored=factored)]


def _slice_array(a: jax.Array, axis: int, *, start: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(a, start, size, axis)
