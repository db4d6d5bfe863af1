"""Builders of adapted weights: tensor networks and maps from factors with declared axes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jlora._interpreter.context import Role
from jlora._ir.algebra import widened
from jlora._ir.structured import Structure, StructuredNetwork
from jlora._ir.weight import AdaptedWeight, AxisMap, TensorNetwork, fresh_indices
from jlora.methods._common.division import split_group, splits_evenly
from jlora.methods._common.factor_axes import GROUPS, STACKS, WeightAxes

Term = tuple[jax.Array, str]  # a factor and its declared axes


class HasDropout(Protocol):
    """A method with a dropout rate, which may be 0."""

    @property
    def dropout(self) -> float: ...


class UpdateLike(Protocol):
    """The attributes of an update that the builders use."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def roles(self) -> tuple[Role, ...]: ...
    @property
    def key(self) -> Any: ...
    @property
    def rank_mask(self) -> Any: ...
    @property
    def member(self) -> Any: ...
    @property
    def method(self) -> HasDropout: ...


def weight_name(w: AdaptedWeight) -> str:
    """The path of a weight for an error message; inside a merge the path is empty."""
    return ", ".join(path for path in w.paths if path) or "the weight"


def group_labels(w: AdaptedWeight, update: UpdateLike) -> dict[str, str]:
    """The indices of the weight in every group of axes.

    Arguments:
        w: the weight.
        update: its update, which has the roles of the axes.

    Returns:
        the indices by group, `{"*in": "i", "*out": "ho", ...}`.
    """
    axes = WeightAxes.of(update)
    return {group: "".join(w.axes[axis] for axis in axes.axes(group)) for group in GROUPS}


def add_network(
    w: AdaptedWeight,
    update: UpdateLike,
    terms: Sequence[Term],
    scale: float | jax.Array,
    labels: Mapping[str, str] | None = None,
    latent: str = "",
) -> AdaptedWeight:
    """Adds `scale * product of factors` to a weight; axes that the weight lacks are summed over.

    Arguments:
        w: the weight.
        update: the update, with its dropout key, rank mask and member.
        terms: factors, each with its declared axes, `(a, "*stack *in rank")`. A factor has one array axis for each axis
            of the weight, or one for each group (except for `*stack` and `*layers`).
        scale: a multiplier; if it is an array, it multiplies the rank mask, or without one the first factor.
        labels: the indices of every group, from `group_labels`, with more entries for parts of the weight's axes that
            the declarations name. By default `group_labels(w, update)`.
        latent: an axis of one factor, as for `TensorNetwork`; only for an update with a key.

    Raises:
        ValueError: if the shape of a factor does not match its declared axes.
    """
    labels = dict(group_labels(w, update) if labels is None else labels)
    if update.member is not None:
        terms = [(array, f"member {declared}") for array, declared in terms]
    terms = [*_masked_rank(update, terms), *terms]
    if isinstance(scale, jax.Array):
        (first, declared), *rest = terms
        first = widened(first, scale.dtype)  # a random matrix may be narrower than what is trained
        terms, scale = [(first * scale.astype(first.dtype), declared), *rest], 1.0
    names = dict.fromkeys(token for _, declared in terms for token in declared.split() if token not in labels)
    labels |= zip(names, fresh_indices([w.used(), *labels.values()], len(names)), strict=True)
    axes = WeightAxes.of(update)
    factors = tuple(_reshape_to_indices(w, axes, array, declared, labels, names) for array, declared in terms)
    indices = tuple("".join(labels[token] for token in declared.split()) for _, declared in terms)
    network = TensorNetwork(factors, indices, scale)
    if update.key is not None and (update.method.dropout or latent):
        rate = update.method.dropout
        drawn = {"rate": rate, "latent": labels.get(latent, "")}
        network = dataclasses.replace(network, key=update.key, key_term=labels["*stack"], **drawn)
    if update.member is not None:
        network = dataclasses.replace(network, picks=(update.member,), picked=labels["member"], pick_terms=("",))
    return dataclasses.replace(w, networks=(*w.networks, network))


def add_matrix(w: AdaptedWeight, update: UpdateLike, matrix: jax.Array, scale: float | jax.Array) -> AdaptedWeight:
    """Adds `scale * matrix` to a weight, with a matrix as large as the weight: a dense update.

    Arguments:
        w, update: as for `add_network`.
        matrix: the difference, `(*stack, in, out)`.
        scale: as for `add_network`.
    """
    return add_network(w, update, [(matrix, "*stack *in *out")], scale)


def add_structure(
    w: AdaptedWeight,
    update: UpdateLike,
    theta: jax.Array,
    structure: Structure,
    scale: float | jax.Array,
    *constants: jax.Array,
    shared: Sequence[jax.Array] = (),
    may_round: bool = False,
) -> AdaptedWeight:
    """Adds `scale * M(theta)` to a weight: a matrix as large as the weight, given by a small array.

    Arguments:
        w, update: as for `add_network`.
        theta: the array, with the axes of the stack first.
        structure: M.
        scale: as for `add_network`.
        constants: the further arrays of M, with the axes of the stack first.
        shared: those after them, which all layers of a stack share.
        may_round: whether the sum with a weight of 16 bits may be chosen, which rounds the update with the weight.
    """
    labels = group_labels(w, update)
    terms = []
    for number, array in enumerate((theta, *map(lax.stop_gradient, constants))):
        own = " ".join(f"array{number}_{k}" for k in range(array.ndim - len(labels["*stack"])))
        terms.append((array, f"*stack {own}"))
    for number, array in enumerate(map(lax.stop_gradient, shared)):
        terms.append((array, " ".join(f"shared{number}_{k}" for k in range(array.ndim))))
    (*_, n) = add_network(w, update, terms, scale).networks
    fields = {field.name: getattr(n, field.name) for field in dataclasses.fields(n)}
    fields |= {"structure": structure, "inputs": labels["*in"], "outputs": labels["*out"], "may_round": may_round}
    network = StructuredNetwork(**fields)
    return dataclasses.replace(w, networks=(*w.networks, network))


def scale_axes(w: AdaptedWeight, update: UpdateLike, vector: jax.Array, declared: str) -> AdaptedWeight:
    """Multiplies a weight, base and networks, by a vector along some of its axes.

    Arguments:
        w, update: as for `add_network`.
        vector: the multipliers.
        declared: the axes of the vector, `"*stack *out"`.
    """
    labels = group_labels(w, update)
    term = "".join(labels[token] for token in declared.split())
    vector = _reshape_to_indices(w, WeightAxes.of(update), vector, declared, labels, ())
    return add_map(w, AxisMap(vector, term))


def map_axes(w: AdaptedWeight, update: UpdateLike, blocks: jax.Array, group: str) -> AdaptedWeight:
    """Multiplies one side of a weight, base and networks, by a block-diagonal matrix.

        new[n b + k] = sum over q of  blocks[n, k, q] * old[n b + q],    along the joint axis of a group

    Products apply the blocks to the activation, and never to the weight. If blocks end within an axis that they do not
    divide, (3, 4) in blocks of 6, they are one block as large as the side.

    Arguments:
        w, update: as for `add_network`.
        blocks: (*stack, size / b, b, b), or (*stack, 1, b, b) if all are equal.
        group: the axes that are mapped, "*in" or "*out".
    """
    labels, size = group_labels(w, update), blocks.shape[-1]
    if not splits_evenly([w.size(c) for c in labels[group]], size):
        count = math.prod(w.size(c) for c in labels[group]) // size
        blocks = _block_diagonal(jnp.broadcast_to(blocks, (*blocks.shape[:-3], count, size, size)))
        size = blocks.shape[-1]
    w, number, part = split_group(w, labels[group], size)
    old = fresh_indices([w.used()], len(part))
    indices = labels["*stack"] + ("" if blocks.shape[-3] == 1 else number) + part
    array = blocks.reshape([w.size(c) for c in indices + part])
    return add_map(w, AxisMap(array, indices + old, part, old))


def _block_diagonal(blocks: jax.Array) -> jax.Array:
    """All blocks as one, (*stack, 1, size, size)."""
    *stack, number, size, _ = blocks.shape
    full = jnp.zeros((*stack, number, size, number, size), blocks.dtype)
    at = jnp.arange(number)
    full = full.at[..., at, :, at, :].set(jnp.moveaxis(blocks, -3, 0))
    return full.reshape(*stack, 1, number * size, number * size)


def add_map(w: AdaptedWeight, m: AxisMap) -> AdaptedWeight:
    """Applies a map to a weight: to the base as a map, and to each network as one more factor.

    Arguments:
        w: the weight.
        m: the map, of indices of the weight. Axes of size one are removed from it if it has matrices.
    """
    if m.new:
        lone = {c for c in m.kept if w.size(c) == 1}
        lone |= {q for k, q in zip(m.new, m.old, strict=True) if k in lone}
        kept = [c for c in m.indices if c not in lone]
        array = m.array.reshape([n for c, n in zip(m.indices, m.array.shape, strict=True) if c not in lone])
        new, old = ("".join(c for c in names if c not in lone) for names in (m.new, m.old))
        m = AxisMap(array, "".join(kept), new, old)
    summed = fresh_indices([w.used(), m.indices], len(m.old))
    before, indices = str.maketrans(m.new, summed), m.indices.translate(str.maketrans(m.old, summed))

    def mapped(n: TensorNetwork) -> TensorNetwork:
        terms = tuple(term.translate(before) for term in n.terms)
        return dataclasses.replace(n, factors=(*n.factors, m.array), terms=(*terms, indices))

    return dataclasses.replace(w, networks=tuple(map(mapped, w.networks)), maps=(*w.maps, m))


def _masked_rank(update: UpdateLike, terms: Sequence[Term]) -> list[Term]:
    has_rank = any("rank" in declared.split() for _, declared in terms)
    return [(lax.stop_gradient(update.rank_mask), "rank")] if update.rank_mask is not None and has_rank else []


def _reshape_to_indices(
    w: AdaptedWeight,
    axes: WeightAxes,
    array: jax.Array,
    declared: str,
    labels: Mapping[str, str],
    names: Mapping[str, None] | tuple[()],
) -> jax.Array:
    """A factor with one axis for each index of its term."""
    tokens = declared.split()
    widths = {token: len(axes.axes(token)) if token in GROUPS else 1 for token in tokens}
    joint = {token: widths[token] if token in STACKS else 1 for token in tokens}
    if array.ndim != sum(widths.values()):
        widths = joint
    new_shape, position = [], 0
    fits = array.ndim == sum(widths.values())
    for token in tokens if fits else ():
        dims = array.shape[position : position + widths[token]]
        position += widths[token]
        sizes = dims if token in names else tuple(w.size(index) for index in labels[token])
        fits = fits and math.prod(dims) == math.prod(sizes)
        new_shape += sizes
    if not fits:
        raise ValueError(
            f"A factor of {weight_name(w)} has shape {tuple(array.shape)}, which does not match its axes {declared!r} "
            f"for a weight of shape {axes.shape}. If every factor has one more leading axis (a stack of adapters), "
            "use jax.vmap."
        )
    return array if array.shape == tuple(new_shape) else array.reshape(new_shape)
