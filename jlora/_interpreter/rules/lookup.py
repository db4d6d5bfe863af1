"""What a lookup yields: rows that are still a weight, or an activation with the update added to it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._compat import Eqn
from jlora._interpreter.context import Context, Role, Value
from jlora._ir import lazy
from jlora._ir.algebra import align_axes
from jlora._ir.explicit_mesh import under_auto_axes
from jlora._ir.probe import probes
from jlora._ir.sizes import is_wide
from jlora._ir.structured import StructuredNetwork
from jlora._ir.weight import AdaptedWeight, TensorNetwork
from jlora._ops.contraction import apply_network, name_intermediate, network_flops
from jlora._ops.inputs import record_lookup
from jlora._ops.maps import apply_maps, form_of

Bounds = tuple[jax.Array, str]  # which rows are within bounds, and the indices of its axes


def finish_lookup(
    ctx: Context,
    eqn: Eqn,
    f: AdaptedWeight,
    rows: AdaptedWeight,
    indexed: Sequence[str],
    batched: Sequence[str],
    in_bounds: Bounds | None = None,
    matrices: Sequence[StructuredNetwork] = (),
    *,
    factored: bool = True,
) -> Value:
    """The rows as an activation if they are vectors; rows that are matrices are still a weight.

    Arguments:
        ctx, eqn: the lookup.
        f: the weight.
        rows: what was looked up.
        indexed: the labels of the axes along which rows were looked up.
        batched: those of the axes that the lookup runs along.
        in_bounds: which rows are within bounds, if the others are filled. The fill value may be NaN, and so may the
            cotangent of such a row: it is masked, so that it does not reach the factors.
        matrices: the networks whose matrices were computed, as large as the weight.
        factored: whether no map was computed as a matrix.
    """
    wide_axes = [axis for axis in rows.axes if any(is_wide(rows.index(c).size) and rows.index(c).origins for c in axis)]
    if not indexed or len(wide_axes) > 1:
        return rows
    roles: dict[str, Role] = dict.fromkeys(f.labels, "out")
    roles |= dict.fromkeys("".join(indexed), "in")
    roles |= dict.fromkeys("".join(batched), "stack")
    added = 0 if probes([rows]) else sum(_added_flops(rows, n) for n in rows.networks if n.factors)
    added += sum(n.structure.matrix_flops for n in matrices if n.structure)
    factored, form = factored and not matrices, form_of((), rows.maps)
    why = "" if factored else "the update is computed as a matrix, of which rows are read"
    ctx.record(eqn, f, roles, factored=factored, added=added, form=form if factored else "dense", why=why)
    mask, mask_term = in_bounds or (None, "")
    return under_auto_axes(functools.partial(_evaluate, mask_term=mask_term), rows.base)(rows, mask)


def _evaluate(rows: AdaptedWeight, mask: jax.Array | None, *, mask_term: str) -> jax.Array:
    """The base's rows after the maps, plus what the networks add to the rows within bounds."""
    value = _mapped_rows(rows, mask, mask_term)
    if probes([rows]):
        return value + record_lookup(rows).astype(value.dtype)
    for n in rows.networks:
        y = _evaluate_network(rows, n, value.dtype)
        if mask is not None:
            y = jnp.where(align_axes(mask, mask_term, rows.labels), y, jnp.zeros((), y.dtype))
        value = value + y.reshape(value.shape)
    return value


def _mapped_rows(rows: AdaptedWeight, mask: jax.Array | None, mask_term: str) -> jax.Array:
    """The base's rows after the maps; those out of bounds as they are, and no matrix gets a gradient from them."""
    value = lazy.materialize(rows.base)
    apply = functools.partial(apply_maps, of_input=False, precision=lax.Precision.HIGHEST)
    if mask is None or not rows.mapped:
        return apply(value, rows.labels, rows.sizes, rows.maps)
    split = value.reshape([rows.size(c) for c in rows.labels])
    is_within = align_axes(mask, mask_term, rows.labels)
    within = jnp.where(is_within, split, jnp.zeros((), split.dtype))
    mapped = apply(within, rows.labels, rows.sizes, rows.maps)
    return jnp.where(is_within, mapped, split).reshape(value.shape)


def _looked_up(rows: AdaptedWeight, n: TensorNetwork) -> tuple[jax.Array, str, TensorNetwork]:
    """The factor that was looked up, which has the rows' new indices; its indices; the network of the others."""
    new = {index.name for index in rows.indices if not index.origins}
    first, *others = sorted(zip(n.factors, n.terms, strict=True), key=lambda pair: not new & set(pair[1]))
    return *first, TensorNetwork(tuple(a for a, _ in others), tuple(t for _, t in others), n.scale)


def _added_flops(rows: AdaptedWeight, n: TensorNetwork) -> Any:
    """The FLOPs of the network's rows in products."""
    _, term, rest = _looked_up(rows, n)
    return network_flops(term, rest, rows.labels, rows.sizes)


def _evaluate_network(rows: AdaptedWeight, n: TensorNetwork, dtype: jnp.dtype) -> jax.Array:
    """The network's rows. The factor that was looked up is the activation.

    The product is at full precision: a lookup in the merged weight has no product, and is exact.
    """
    head, term, rest = _looked_up(rows, n)
    if not rest.factors:
        head = head * jnp.asarray(n.scale, head.dtype)
    head, full = name_intermediate(head.astype(dtype)), lax.Precision.HIGHEST
    y = apply_network(head, term, rest, rows.labels, dtype=dtype, precision=full)
    return jnp.broadcast_to(y, [rows.size(c) for c in rows.labels])


def mark_gathered(rows: AdaptedWeight, f: AdaptedWeight, indexed: Sequence[str]) -> AdaptedWeight:
    """The rows with a note of the parameter axes along which several rows were looked up."""
    origins = dict.fromkeys(origin for c in "".join(indexed) for origin in f.index(c).origins)
    return dataclasses.replace(rows, gathered_axes=(*rows.gathered_axes, *origins))
