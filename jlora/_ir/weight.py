"""The intermediate form: a weight as its base, maps and tensor networks, with every axis labelled by indices.

    W = maps(base) + sum over networks of  scale * einsum(factors, terms -> axes)

An index is named by one letter. The label of an axis is a string of indices, major first: `"i"` for a plain axis,
`"gh"` for a composite one. A network whose terms lack an index of the weight is constant along it.
"""

import dataclasses
import functools
import math
import string
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora._ir import lazy
from jlora._ir.sizes import is_wide
from jlora._tree.leaves import is_quantized

Origin = tuple[str, int]  # a path and an axis of the weight at that path
ArrayFn = Callable[[jax.Array, str], tuple[Any, str]]  # takes and returns an array and the indices of its axes


class Index(NamedTuple):
    """One index of a weight: its name, its size, and the axes of parameters that it came from."""

    name: str
    size: int
    origins: tuple[Origin, ...] = ()


def at_index(name: str, fn: Callable[[jax.Array, int], jax.Array], new: str | None = None) -> ArrayFn:
    """Applies `fn(array, axis)` to an array that has the index `name`, which is called `new` afterwards."""

    def apply(array: jax.Array, term: str) -> tuple[jax.Array, str]:
        if name not in term:
            return array, term
        return fn(array, term.index(name)), term if new is None else term.replace(name, new)

    return apply


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["factors", "key", "picks"],
    meta_fields=["terms", "scale", "key_term", "rate", "picked", "pick_terms", "latent", "in_parts"],
)
@dataclasses.dataclass(frozen=True)
class TensorNetwork:
    """One tensor network, `scale * einsum(factors, terms -> axes)`.

    Arguments:
        factors: the arrays, one for every term.
        terms: for every factor the indices of its axes. Indices that no axis of the weight has (ranks) are summed.
        scale: a static multiplier.
        key: a PRNG key (or an array of keys, whose axes `key_term` labels) for the dropout of this network's input.
        key_term: the indices of the axes of `key`.
        rate: the share of the input that dropout sets to zero if there is a key.
        picks: positions, integer scalars. Of the factors the entries at these positions are used, and taken from them
            by the equation that consumes the weight: a loop over layers gathers one layer's factors at a time.
        picked: the indices that `picks` are positions of, one for each. No axis of the weight has them.
        latent: an index of one factor alone, of size two: what the input gives with it is the mean and the logarithm of
            the variance of a normal distribution, from which the key draws. Empty without.
        pick_terms: for every position the indices of its axes: none, or that of a loop which gives each step its own.
        in_parts: whether a product on a mesh is divided, together with the base, along an index of the weight that
            several factors share, so that devices that divide this index exchange one sum.
    """

    factors: tuple[jax.Array, ...]
    terms: tuple[str, ...]
    scale: float = 1.0
    key: jax.Array | None = None
    key_term: str = ""
    rate: float = 0.0
    picks: tuple[jax.Array, ...] = ()
    picked: str = ""
    pick_terms: tuple[str, ...] = ()
    latent: str = ""
    in_parts: bool = False

    @property
    def arrays(self) -> list[tuple[jax.Array, str]]:
        """Every factor, every position, and the key if there is one, with the indices of its axes."""
        key = [] if self.key is None else [(self.key, self.key_term)]
        factors, picks = zip(self.factors, self.terms, strict=True), zip(self.picks, self.pick_terms, strict=True)
        return [*factors, *picks, *key]

    def map_arrays(self, fn: ArrayFn) -> "TensorNetwork":
        """Applies `fn(array, indices) -> (array, indices)` to every array, in the order of `arrays`."""
        pairs = [fn(array, term) for array, term in self.arrays]
        key, key_term = (None, "") if self.key is None else pairs.pop()
        arrays, terms = tuple(array for array, _ in pairs), tuple(term for _, term in pairs)
        n = len(self.factors)
        factors, picks = (arrays[:n], terms[:n]), (arrays[n:], terms[n:])
        changed = {"factors": factors[0], "terms": factors[1], "picks": picks[0], "pick_terms": picks[1]}
        return dataclasses.replace(self, key=key, key_term=key_term, **changed)

    def map(self, name: str, fn: Callable[[jax.Array, int], jax.Array], new: str | None = None) -> "TensorNetwork":
        """Applies `fn(array, axis)` to every array that has the index `name`, which is called `new` afterwards."""
        return self.map_arrays(at_index(name, fn, new))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["indices", "new", "old"])
@dataclasses.dataclass(frozen=True)
class AxisMap:
    """A linear map of one side of the weight: a matrix for each block of entries, or a multiplier of each entry.

        new weight[.., k, ..] = sum over q of  array[.., k, q] * weight[.., q, ..]

    Arguments:
        array: the matrices, or the multipliers.
        indices: of the axes of `array`: indices of the weight, and those in `old`.
        new: the indices of the weight that are mapped, k above; none if the array multiplies entries (IA3, DoRA).
        old: for each index in `new` the one in `indices`, q above, that stands for it in the weight before the map.
            No other array has it.
    """

    array: jax.Array
    indices: str
    new: str = ""
    old: str = ""

    def __post_init__(self) -> None:
        if not set(self.new + self.old) <= set(self.indices):
            raise AssertionError(
                f"A map of the indices {self.new!r} has lost one of them ({self.indices!r}). Materialise it first by "
                "`without_maps`."
            )

    @property
    def kept(self) -> str:
        """The indices of the weight that the array has, mapped ones included."""
        return "".join(c for c in self.indices if c not in self.old)

    def map_arrays(self, fn: ArrayFn) -> "AxisMap":
        """Applies `fn(array, indices) -> (array, indices)` to the array; `fn` keeps the mapped indices."""
        return AxisMap(*fn(self.array, self.indices), self.new, self.old)

    def rename(self, table: dict[int, str]) -> "AxisMap":
        """The map with other names for its indices, by a table of `str.maketrans`."""
        return AxisMap(self.array, *(names.translate(table) for names in (self.indices, self.new, self.old)))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "networks", "maps"],
    meta_fields=["axes", "indices", "paths", "gathered_axes", "multiplied"],
)
@dataclasses.dataclass(frozen=True)
class AdaptedWeight:
    """What a parameter is inside an adapted program: `maps(base) + sum of networks`.

    Arguments:
        base: the frozen array, or a `LazyArray` that yields it.
        networks: what is added to the base, after the maps.
        axes: for every axis of `base` its indices; none is empty.
        indices: every index in `axes`.
        paths: the parameters that this weight was computed from.
        gathered_axes: axes of parameters along which rows were looked up, several at once.
        maps: linear maps of the base, in the order in which they act. They do not act on the networks: a method that
            maps those too gives each network the array as one more factor.
        multiplied: of a product of weights the parameters on its left, which are dense if the product is materialised;
            None if the weight is no such product.
    """

    base: jax.Array | lazy.LazyArray
    networks: tuple[TensorNetwork, ...]
    axes: tuple[str, ...]
    indices: tuple[Index, ...]
    paths: tuple[str, ...]
    gathered_axes: tuple[Origin, ...] = ()
    maps: tuple[AxisMap, ...] = ()
    multiplied: tuple[str, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    @property
    def labels(self) -> str:
        """The indices of all axes in one string."""
        return "".join(self.axes)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every index."""
        return {index.name: index.size for index in self.indices}

    def index(self, name: str) -> Index:
        """The index of that name."""
        return next(index for index in self.indices if index.name == name)

    def size(self, names: str) -> int:
        """The product of the sizes of some indices."""
        return math.prod(self.index(name).size for name in names)

    @property
    def arrays(self) -> list[tuple[jax.Array, str]]:
        """Every array of the networks and the maps, with the indices of its axes."""
        maps = [(m.array, m.indices) for m in self.maps]
        return [pair for network in self.networks for pair in network.arrays] + maps

    @property
    def mapped(self) -> str:
        """The indices that a map sums over: what is done to the base along them does not commute with the maps."""
        return "".join(m.new for m in self.maps)

    def used(self) -> str:
        """Every index name that is taken, those that are summed inside networks included."""
        return self.labels + "".join(term for _, term in self.arrays)

    def map_arrays(self, fn: ArrayFn) -> "AdaptedWeight":
        """Applies `fn(array, indices) -> (array, indices)` to every array but the base, in the order of `arrays`."""
        networks = tuple(network.map_arrays(fn) for network in self.networks)
        maps = tuple(m.map_arrays(fn) for m in self.maps)
        return dataclasses.replace(self, networks=networks, maps=maps)

    @property
    def is_matrix(self) -> bool:
        """Whether at least two indices of size above one came from parameters: what a low-rank update can change."""
        return sum(is_wide(index.size) and bool(index.origins) for index in self.indices) > 1

    @property
    def is_dense(self) -> bool:
        """Whether every network is as large as the weight, so that adding it costs nothing."""
        return not self.maps and all(map(self.is_full_rank_network, self.networks))

    def is_full_rank_network(self, network: TensorNetwork) -> bool:
        """Whether the network is as large as the weight: one factor has all wide indices, none is summed."""
        wide = {index.name for index in self.indices if is_wide(index.size)}
        return set("".join(network.terms)) <= set(self.labels) and any(wide <= set(term) for term in network.terms)


def fresh_indices(used: Iterable[str], count: int = 1) -> str:
    """Names for new indices: `count` letters that `used` lacks."""
    taken = set("".join(used))
    free = [c for c in string.ascii_letters if c not in taken]
    if len(free) < count:
        raise ValueError(
            f"jlora labels the axes of a weight with {len(string.ascii_letters)} indices, and this weight needs more."
        )
    return "".join(free[:count])


def as_adapted_weight(base: Any, path: str) -> AdaptedWeight:
    """Wraps a parameter: one index for every axis, no update. A quantised parameter stays lazy."""
    base = lazy.lazy_leaf(base) if is_quantized(base) else base
    axes = tuple(fresh_indices((), base.ndim))
    indices = tuple(Index(c, n, ((path, k),)) for k, (c, n) in enumerate(zip(axes, base.shape, strict=True)))
    return AdaptedWeight(base, (), axes, indices, (path,))
