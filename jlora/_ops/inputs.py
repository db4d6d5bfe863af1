"""Statistics of the inputs of a weight, as the gradient of its probes."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._ir.algebra import align_axes
from jlora._ir.materialize import accumulation_dtype
from jlora._ir.probe import Probe, by_path, refuse
from jlora._ir.weight import AdaptedWeight, TensorNetwork
from jlora._ops.contraction import apply_network
from jlora._ops.pair_products import Groups, by_row


@jax.custom_vjp
def observe(h: jax.Array, rows: jax.Array) -> jax.Array:
    """A zero to add to the output, whose gradient records the inputs.

        cotangent of h:  [h_1 ... h_{k-1}, rows]        cotangent of rows:  rows

    With h = X P the gradient of P is X^T [X P_{1..k-1}, 1], and that of the number of rows is the number of rows. The
    cotangent of the result is not used.

    Arguments:
        h: the inputs times the probe, `(*rows, k)`.
        rows: `(*rows)`, one for a row that exists, zero for padding.
    """
    return jnp.zeros((), h.dtype)


def _forward(h: jax.Array, rows: jax.Array) -> tuple[jax.Array, Any]:
    return jnp.zeros((), h.dtype), (h, rows)


def _backward(residuals: Any, _: jax.Array) -> tuple[jax.Array, jax.Array]:
    h, rows = residuals
    return h.at[..., -1].set(rows), rows


observe.defvjp(_forward, _backward)


def record_product(
    x: jax.Array, labels: str, probes: Sequence[Probe], out: str, groups: Groups | None = None
) -> jax.Array:
    """Records the input of a product: a zero, to add to the output.

    Nothing is recorded if the product does not contract the in axes: then it is another use of the weight.

    Arguments:
        x, labels: the activation, and one index for every axis.
        probes: those of one parameter.
        out: the indices of the result.
        groups: of a ragged product.
    """
    first = probes[0]
    if not first.inputs <= set(labels) - set(out):
        return jnp.zeros((), jnp.float32)
    group = groups.name if groups else ""
    kept = "".join(dict.fromkeys([*(c for c in labels if c in out), *(c for c in first.terms[1] if c != group)]))
    dtype = compute_dtype(x, first)
    x = lax.stop_gradient(x).astype(dtype)
    parts = []
    for probe in probes:
        pairs = zip(probe.factors, probe.terms, strict=True)
        # Multipliers along out axes are no part of the input.
        used = [pair for k, pair in enumerate(pairs) if k != 1 and (not k or set(pair[1]) <= set(labels + kept))]
        network = TensorNetwork(tuple(a for a, _ in used), tuple(t for _, t in used), probe.scale)
        options: Any = {"dtype": dtype, "precision": lax.Precision.HIGHEST, "groups": groups}
        parts.append(apply_network(x, labels, network, kept + probe.terms[0][-1], **options))
    rows, term = first.factors[1], first.terms[1]
    if groups and group in term:
        rows, term = by_row(rows, term, groups, x.shape[labels.index(groups.row)])
    return record_rows(functools.reduce(jnp.add, parts), kept, rows, term)


def record_lookup(rows: AdaptedWeight) -> jax.Array:
    """Records which rows of a weight were looked up, as unit vectors: a zero, to add to them.

    Arguments:
        rows: what was looked up, with the rows of the probes. Those of a lookup along other axes record nothing.
    """
    zero = jnp.zeros((), jnp.float32)
    looked_up = {x.name for x in rows.indices if not x.origins or x.size == 1}
    for group in by_path(rows.networks):
        labels, first = group[0].terms[0][:-1], group[0]
        if set(labels) <= looked_up | set(first.terms[1]):
            parts = [align_axes(n.factors[0], n.terms[0][:-1] + "?", labels + "?") for n in group]
            h = functools.reduce(jnp.add, parts)
            exists = jnp.any(h != 0, -1).astype(h.dtype)  # rows out of bounds are zero
            exists = exists * align_axes(first.factors[1].astype(h.dtype), first.terms[1], labels)
            zero = zero + record_rows(h, labels, exists, labels).astype(zero.dtype)
    return zero


def record_rows(h: jax.Array, labels: str, rows: jax.Array, term: str) -> jax.Array:
    """Records inputs that were multiplied by the probe: a zero, to add to the output.

    Arguments:
        h: the inputs times the probe, with the axis of the probe last.
        labels: the indices of the other axes.
        rows, term: which rows exist, and the indices of its axes.
    """
    ones = jnp.broadcast_to(align_axes(rows.astype(h.dtype), term, labels), h.shape[:-1])
    return observe(h, ones + lax.full_like(h, 0, shape=()))  # in a `shard_map` both must vary along the same axes


def compute_dtype(x: jax.Array, probe: Probe) -> jnp.dtype:
    """The dtype of the statistics: float32, or a wider one of the probe or the input."""
    dtype = probe.factors[0].dtype
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        refuse(probe.path, "an input is complex")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return dtype
    return max(accumulation_dtype(x.dtype), dtype, key=lambda dtype: dtype.itemsize)
