"""Which form a product takes: update and base apart, or summed before the product. The planner decides by FLOPs."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jlora import _compat
from jlora._ir.algebra import merge_indices
from jlora._ir.lazy import LazyArray
from jlora._ir.materialize import fold, fold_full_rank, with_dense_base
from jlora._ir.probe import Probe
from jlora._ir.sizes import is_static, is_wide
from jlora._ir.structured import StructuredNetwork, with_matrices
from jlora._ir.weight import AdaptedWeight, TensorNetwork
from jlora._ops import planner
from jlora._ops.blocks import with_zero_blocks
from jlora._tree.short_forms import short_count


class Plan(NamedTuple):
    """How a product with an adapted weight is computed.

    Arguments:
        weight: the weight, to whose base was added what is summed with it.
        merged: networks that are merged into the base, with a gradient of their own. The weight does not have them.
        form: the name of the form.
        why: what decided on it.
        is_dense: whether an update without thin factors was added to the base.
        added: FLOPs of adding to the base, in the forward pass.
    """

    weight: AdaptedWeight
    merged: tuple[StructuredNetwork, ...] = ()
    form: str = planner.FACTORED
    why: str = ""
    is_dense: bool = False
    added: float = 0


def plan_product(f: AdaptedWeight, x: Any, contracted: Sequence[int], batch: Sequence[int], rows: Any) -> Plan:
    """The form of a product with a weight.

    Arguments:
        f: the weight, without picks.
        x: the activation.
        contracted, batch: the axes of the weight that are summed, and that the result shares with the activation.
        rows: the number of rows of the activation, of one element of the batch.
    """
    inputs, shared = ({c for k in axes for c in f.axes[k]} for axes in (contracted, batch))
    f = with_matrices(f, lambda n: set(n.inputs) == inputs and not shared & set(n.outputs))
    if f.maps or any(len(axis) > 1 for axis in f.axes) or any(map(f.is_full_rank_network, f.networks)):
        f = with_matrices(f)
    if _compat.has_no_mesh(x, *(() if isinstance(f.base, LazyArray) else (f.base,))):
        f = with_zero_blocks(f, *_sides(f, contracted, batch))
    f, is_folded = fold_full_rank(merge_indices(f))
    if is_folded:
        return dense_plan(f)
    inputs, outputs = _sides(f, contracted, batch)
    if f.maps:
        return Plan(f)
    choices = [_choice(n, f, x, inputs, outputs, rows) for n in f.networks]
    why = "; ".join(dict.fromkeys(choice.why for choice in choices if choice.why))
    return _carried_out(f, [choice.form for choice in choices], why)


def _sides(f: AdaptedWeight, contracted: Sequence[int], batch: Sequence[int]) -> tuple[list[str], list[str]]:
    """The indices that are summed, and those of the result alone."""
    free = [k for k in range(len(f.axes)) if k not in (*contracted, *batch)]
    inputs, outputs = (dict.fromkeys(c for k in axes for c in f.axes[k]) for axes in (contracted, free))
    return list(inputs), list(outputs)


def dense_plan(f: AdaptedWeight) -> Plan:
    """The form of a product with a weight to whose base an update as large as itself was added."""
    why = "the update is as large as the weight"
    return Plan(f, form=planner.DENSE_SUM, why=why, is_dense=True, added=f.base.size)


def _carried_out(f: AdaptedWeight, forms: Sequence[str], why: str) -> Plan:
    pairs = list(zip(f.networks, forms, strict=True))
    changed = [n for n, form in pairs if form != planner.FACTORED]
    if not changed:
        return Plan(f, why=why)
    is_dense = any(isinstance(n, StructuredNetwork) for n in changed)
    added = f.base.size + sum(map(_matrix_flops, changed))
    if planner.DENSE_SUM in forms:  # with the gradient of the whole weight, a structured one saves nothing
        return Plan(fold(f, changed), (), planner.DENSE_SUM, why, is_dense, added)
    merged = tuple(n for n in changed if isinstance(n, StructuredNetwork))
    apart = tuple(n for n, form in pairs if form == planner.FACTORED)
    f = with_dense_base(dataclasses.replace(f, networks=apart))
    return Plan(f, merged, planner.MERGED, why, is_dense, added)


def _matrix_flops(n: TensorNetwork) -> float:
    """The FLOPs of computing the matrix of a network."""
    if isinstance(n, StructuredNetwork):
        assert n.structure is not None
        return n.structure.matrix_flops
    return 2 * math.prod(_sizes(n).values())


def _sizes(n: TensorNetwork) -> dict[str, int]:
    """The sizes of all indices of a network's factors."""
    pairs = zip(n.factors, n.terms, strict=True)
    return {c: size for array, term in pairs for c, size in zip(term, array.shape, strict=True)}


class _Choice(NamedTuple):
    form: str
    why: str


def _choice(
    n: TensorNetwork, f: AdaptedWeight, x: Any, inputs: Collection[str], outputs: Collection[str], rows: Any
) -> _Choice:
    """The form of one network."""
    is_narrow = jnp.finfo(f.dtype).bits < 32
    if isinstance(n, StructuredNetwork):
        assert n.structure is not None
        if is_narrow and not n.may_round:
            return _Choice(planner.FACTORED, f"a sum in {f.dtype} would round the update")
        if not is_static(rows):
            return _Choice(planner.FACTORED if n.structure.is_branch else planner.MERGED, "symbolic sizes")
        size = planner.ProductSize(rows, f.size(n.inputs), f.size(n.outputs))
        return _cheapest(planner.structure_flops(size, n.structure))
    if isinstance(n, Probe):
        return _Choice(planner.FACTORED, "")
    if n.key is not None or n.latent:
        return _Choice(planner.FACTORED, "random numbers act between the factors")
    size = _matrix_sizes(n, f, inputs, outputs)
    if size is None:
        return _Choice(planner.FACTORED, "")
    if not all(map(is_static, (rows, *size))):
        return _Choice(planner.FACTORED, "symbolic sizes")
    flops = planner.matrices_flops(planner.ProductSize(rows, *size[:2]), size[2])
    best = _cheapest(flops)
    if best.form == planner.FACTORED:
        return best
    if min(size[:2]) < planner.SMALL:
        return _Choice(planner.FACTORED, "a weight this small takes no time")
    if is_narrow:
        return _Choice(planner.FACTORED, f"a sum in {f.dtype} would round the update")
    if isinstance(f.base, LazyArray) or not _compat.has_no_mesh(x, f.base):
        return _Choice(planner.FACTORED, "the base is quantised or sharded")
    return best


def _cheapest(flops: Mapping[str, float]) -> _Choice:
    counts = ", ".join(f"{form} {short_count(float(count))}" for form, count in flops.items())
    return _Choice(planner.cheapest(flops), f"{counts} FLOPs")


def _matrix_sizes(
    n: TensorNetwork, f: AdaptedWeight, inputs: Collection[str], outputs: Collection[str]
) -> tuple[int, int, int] | None:
    """The in size, out size and rank of a network that is a product of two matrices, None if it is not one."""
    sizes = _sizes(n) | f.sizes
    wide = {name for name, size in sizes.items() if is_wide(size)}
    terms = {frozenset(wide & set(term)) for term in n.terms}
    terms = [term for term in terms if not any(term < other for other in terms)]  # a vector is a part of a matrix
    if len(terms) != 2:
        return None
    a, b = sorted(terms, key=lambda term: not term & set(inputs))
    rank, stack = (a & b) - set(f.labels), a & b & set(f.labels)
    if not rank or a - b != wide & set(inputs) or b - a != (wide & set(outputs)) - stack:
        return None
    n_in, n_out, r = (math.prod(sizes[c] for c in names) for names in (a - b, b - a, rank))
    return n_in, n_out, r
