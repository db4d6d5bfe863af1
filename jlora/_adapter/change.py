"""What an update adds to its weight: two thin matrices if its factors give them, otherwise a matrix a layer."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._adapter.svd import Index, Layer, Pair, concatenated
from jlora._adapter.thin_factors import by_factors, contract
from jlora._interpreter.context import matrix_side
from jlora._ir.materialize import widest_dtype, without_maps
from jlora._ir.structured import with_matrices
from jlora._ir.weight import AdaptedWeight
from jlora._tree.leaves import layer_of
from jlora.methods._base import Update
from jlora.methods._common.factor_axes import HasAxes
from jlora.methods._common.networks import group_labels
from jlora.methods._lowering import lower_updates
from jlora.methods.lora import LoRA


def is_matrix(weight: HasAxes) -> bool:
    """Whether a site or an update has in and out axes, so that a low rank is possible."""
    return {"in", "out"} <= set(map(matrix_side, weight.roles))


def matrix_sizes(weight: HasAxes, side: str) -> tuple[int, ...]:
    """The sizes of the axes on a side of the matrix: "stack", "in" (a window included) or "out"."""
    return tuple(n for n, r in zip(weight.shape, weight.roles, strict=True) if matrix_side(r) == side)


def is_plain(update: Update) -> bool:
    """Whether an update is nothing but a LoRA: without an offset, of all its ranks, and of all layers."""
    is_masked = update.initial or update.rank_mask is not None or update.layers is not None
    return isinstance(update.method, LoRA) and not is_masked


def wide_dtype(*updates: Update) -> np.dtype:
    """The widest floating-point dtype of the updates' factors, at least float32: that of what is computed of them."""
    return widest_dtype([(update.factors, update.frozen, update.initial) for update in updates])


@dataclasses.dataclass(frozen=True)
class Change:
    """What an update adds to its weight.

        delta = base * (multipliers - 1) + sum of networks

    Arguments:
        update: the update, of a weight with or without a matrix form.
        leaf: the weight, quantised or not; None if it is not at hand, and the update does not depend on it.
        weight: the adapted weight without its base, with its factors as NumPy arrays.
    """

    update: Update
    leaf: Any
    weight: AdaptedWeight

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the stack axes."""
        return matrix_sizes(self.update, "stack")

    @functools.cached_property
    def labels(self) -> dict[str, str]:
        """The indices of every group of axes."""
        return group_labels(self.weight, self.update)

    @functools.cached_property
    def pair(self) -> tuple[Pair, float] | None:
        """A `(*stack, in, rank)`, B `(*stack, rank, out)` and their scale, in float32 or wider.

        The ranks of all networks are summed. None if there are no such factors, or if the sum is above the rank that a
        matrix of this size can have; the pair of a LoRA is its own, whatever its rank.
        """
        w = self.weight
        if w.maps or any(map(w.is_full_rank_network, w.networks)):
            return None
        n_in, n_out = (math.prod(matrix_sizes(self.update, side)) for side in ("in", "out"))
        if not w.networks:
            empty = np.zeros((*self.stack, n_in, 0), np.float32), np.zeros((*self.stack, 0, n_out), np.float32)
            return empty, 1.0
        pairs = [by_factors(w, network, self.labels) for network in w.networks]
        joined, scale = concatenated(pairs, [float(network.scale) for network in w.networks])
        is_low = is_plain(self.update) or joined[0].shape[-1] <= min(n_in, n_out)
        return (joined, scale) if is_low else None

    def layer(self, index: Index) -> Layer:
        """The change of one layer in float64: the thin matrices if there are some, else `(in, out)`."""
        if self.pair is not None:
            (a, b), scale = self.pair
            return scale * a[index].astype(np.float64), b[index].astype(np.float64)
        return self.matrix(index)

    def matrix(self, index: Index) -> np.ndarray:
        """The change of one layer as a matrix `(in, out)`, in float64."""
        if self.pair is not None:
            a, b = self.layer(index)
            return a @ b
        out = self.labels["*in"] + self.labels["*out"]
        value = self._value(out, dict(zip(self.labels["*stack"], index, strict=True)), np.float64)
        return value.reshape(math.prod(matrix_sizes(self.update, "in")), -1)

    def array(self) -> np.ndarray:
        """The change in the shape of the weight, in float32 or wider."""
        dtype = wide_dtype(self.update).type
        return self._value(self.weight.labels, {}, dtype).reshape(self.update.shape)

    def _value(self, out: str, position: Mapping[str, int], dtype: Any) -> np.ndarray:
        """The change with the axes `out`, at a position along the other axes."""
        w, sizes = self.weight, self.weight.sizes

        def at(array: np.ndarray, term: str) -> tuple[np.ndarray, str]:
            picked = array[tuple(position.get(index, slice(None)) for index in term)]
            return picked.astype(dtype), "".join(index for index in term if index not in position)

        total = np.zeros([sizes[index] for index in out], dtype)
        for network in w.networks:
            terms = [at(np.asarray(a), term) for a, term in zip(network.factors, network.terms, strict=True)]
            total += contract(terms, out, sizes) * dtype(network.scale)
        if not w.maps:
            return total
        before = self._base(position, out).astype(dtype)
        for m in w.maps:  # each with the product of the earlier ones, so that nothing cancels
            factor = contract([at(np.asarray(m.array), m.indices)], out, sizes)
            total += before * (factor - 1)
            before = before * factor
        return total

    def _base(self, position: Mapping[str, int], out: str) -> np.ndarray:
        """The base with the axes `out`, at a position along the other axes."""
        axes = self.weight.axes
        index = {axis: position[name] for axis, name in enumerate(axes) if name in position}
        names = "".join(name for name in axes if name not in position)
        base = layer_of(self.leaf, index).reshape([self.weight.size(name) for name in names])
        return base.transpose([names.index(name) for name in out])


def change_of(path: str, update: Update, leaf: Any) -> Change:
    """What an update adds to its weight.

    Arguments:
        path: of the weight.
        update: the update; its dropout key is ignored.
        leaf: the weight, quantised or not; None if it is not at hand.

    Raises:
        ValueError: if the update depends on the weight, and that is missing or has another shape.
    """
    if leaf is not None and tuple(leaf.shape) != update.shape:
        raise ValueError(
            f"{path} has shape {tuple(leaf.shape)} in params, but the adapter was initialised for {update.shape}. Pass "
            "the base parameters of this adapter."
        )
    method = update.method
    needs_leaf = bool(np.any(update.scale)) and (method.depends_on_weight or method.is_multiplicative)
    if not needs_leaf or leaf is not None:
        w = _lower(dataclasses.replace(update, key=None), leaf if needs_leaf else None)
        if not w.maps or leaf is not None:
            return Change(update, leaf, w.map_arrays(lambda array, term: (np.asarray(array), term)))
    name = type(method).__name__
    raise ValueError(f"{path}: the update of {name} depends on the base. Pass params, the base parameters.")


@jax.jit
def _lower(update: Update, leaf: Any) -> AdaptedWeight:
    """The networks and the multipliers of an update, without the base."""
    leaf = jnp.zeros(update.shape, wide_dtype(update)) if leaf is None else leaf
    return dataclasses.replace(without_maps(with_matrices(lower_updates([{"": update}], leaf, ""))), base=None)
