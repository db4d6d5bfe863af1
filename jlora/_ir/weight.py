"""The intermediate form: a weight as its base, gains and tensor networks, with every axis spelled in letters.

    W = base * gains + sum over networks of  scale * einsum(factors, terms -> axes)

A letter stands for one index. An axis is a string of letters, major first: `"i"` for a plain axis, `"gh"` for one
that joins two. A letter that no term of a network carries is a broadcast: the update is the same along it.
"""

import dataclasses
import functools
import math
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jlora._ir import lazy as _deferred
from jlora._ir.explicit_mesh import under_auto_axes
from jlora._ir.lazy import LazyArray, materialize
from jlora._tree.leaves import is_quantized

Origin = tuple[str, int]  # a path and an axis of the weight at that path


class Index(NamedTuple):
    """One index of a weight: its name, its size, and the axes of parameters that it came from."""

    name: str
    size: int
    origins: tuple[Origin, ...] = ()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["factors", "key"],
    meta_fields=["terms", "scale", "key_term", "rate"],
)
@dataclasses.dataclass(frozen=True)
class TensorNetwork:
    """One tensor network, `scale * einsum(factors, terms -> axes)`.

    Arguments:
        factors: the arrays, one for every term.
        terms: one string of letters a factor. Letters that no axis of the weight has (ranks) are summed.
        scale: a static multiplier.
        key: a PRNG key (or an array of keys, its axes spelled by `key_term`) that draws the dropout of the input.
        rate: the share of the input that this branch drops where it has a key.
    """

    factors: tuple[jax.Array, ...]
    terms: tuple[str, ...]
    scale: float = 1.0
    key: jax.Array | None = None
    key_term: str = ""
    rate: float = 0.0

    def map(self, name: str, fn: Callable[[jax.Array, int], jax.Array], new: str | None = None) -> "TensorNetwork":
        """Applies `fn(array, axis)` wherever the letter stands, and spells it `new` from then on."""
        new = name if new is None else new
        arrays = [fn(f, t.index(name)) if name in t else f for f, t in zip(self.factors, self.terms, strict=True)]
        key = fn(self.key, self.key_term.index(name)) if self.key is not None and name in self.key_term else self.key
        return dataclasses.replace(
            self,
            factors=tuple(arrays),
            terms=tuple(t.replace(name, new) for t in self.terms),
            key=key,
            key_term=self.key_term.replace(name, new),
        )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "networks", "axis_scales"],
    meta_fields=["axes", "indices", "paths", "gathered_axes"],
)
@dataclasses.dataclass(frozen=True)
class AdaptedWeight:
    """A weight that carries networks: what a parameter is inside an adapted program.

    Arguments:
        base: the frozen array, or what makes it (`Deferred`).
        networks: what is added to it, after the gains.
        axes: for every axis of `base`, its letters; none is empty.
        letters: what every letter in `axes` stands for.
        paths: the parameters that this weight was made of.
        read: axes of parameters along which rows were looked up, several at once.
        gains: vectors that multiply the base along some axes, each a network of one factor. They leave the networks
            alone: a method that scales those too gives each the vector as one more factor, which costs nothing.
    """

    base: jax.Array | LazyArray
    networks: tuple[TensorNetwork, ...]
    axes: tuple[str, ...]
    indices: tuple[Index, ...]
    paths: tuple[str, ...]
    gathered_axes: tuple[Origin, ...] = ()
    axis_scales: tuple[TensorNetwork, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    def index(self, name: str) -> Index:
        return next(letter for letter in self.indices if letter.name == name)

    def size(self, names: str) -> int:
        return math.prod(self.index(name).size for name in names)

    def used(self) -> str:
        """Every letter that is taken, the networks' own ones included."""
        return "".join([*self.axes, *(t for n in (*self.networks, *self.axis_scales) for t in n.terms)])

    def map(self, fn: Callable[[TensorNetwork], TensorNetwork]) -> "AdaptedWeight":
        """Applies `fn` to every network and every gain."""
        return dataclasses.replace(
            self, networks=tuple(map(fn, self.networks)), axis_scales=tuple(map(fn, self.axis_scales))
        )

    @property
    def is_matrix(self) -> bool:
        """Whether at least two indices of size above one came from parameters: what a low-rank update can change."""
        return sum(letter.size > 1 and bool(letter.origins) for letter in self.indices) > 1

    @property
    def is_dense(self) -> bool:
        """Whether every network is as large as the weight, so that adding it costs nothing."""
        return not self.axis_scales and all(map(self.is_full_rank_network, self.networks))

    def is_full_rank_network(self, network: TensorNetwork) -> bool:
        """Whether a network is as large as the weight: one factor has all letters of a size above one, and no rank."""
        wide = {letter.name for letter in self.indices if letter.size > 1}
        return set("".join(network.terms)) <= set("".join(self.axes)) and any(wide <= set(t) for t in network.terms)


def fresh_indices(used: Iterable[str], count: int = 1) -> str:
    """Letters that `used` lacks."""
    taken = set("".join(used))
    free = [c for c in string.ascii_letters if c not in taken]
    if len(free) < count:
        raise ValueError(f"jlora spells axes in {len(string.ascii_letters)} letters, and this weight needs more.")
    return "".join(free[:count])


def as_adapted_weight(base: Any, path: str) -> AdaptedWeight:
    """A parameter as the program starts with it: one letter an axis, no network. A quantised one is not made yet."""
    base = _deferred.lazy_leaf(base) if is_quantized(base) else base
    axes = tuple(fresh_indices((), base.ndim))
    letters = tuple(Index(c, n, ((path, k),)) for k, (c, n) in enumerate(zip(axes, base.shape, strict=True)))
    return AdaptedWeight(base, (), axes, letters, (path,))


def dense(f: AdaptedWeight, dtype: jnp.dtype | None = None) -> jax.Array:
    """The weight itself, `base * gains + sum of networks`: in float32 (or wider), and rounded once."""
    dtype = f.dtype if dtype is None else dtype
    if not f.networks and not f.axis_scales:
        return materialize(f.base).astype(dtype)
    return under_auto_axes(lambda f: _dense(f, accumulation_dtype(f.dtype)).astype(dtype), f.base)(f)


def _dense(f: AdaptedWeight, wide: jnp.dtype) -> jax.Array:
    base = materialize(f.base).astype(wide)
    for gain in f.axis_scales:
        base = base * broadcast_network(gain, f, wide)
    return base + delta(f, wide) if f.networks else base


def fold_full_rank(f: AdaptedWeight) -> tuple[AdaptedWeight, bool]:
    """The weight with the networks that are as large as itself added to its base, and whether there were any.

    Two products, one with the base and one with the update, cost more than the sum.
    """
    full, thin = [], []
    for n in f.networks:
        (full if n.key is None and f.is_full_rank_network(n) else thin).append(n)
    if not full:
        return f, False
    base = dense(dataclasses.replace(f, networks=tuple(full)))
    return dataclasses.replace(f, base=base, networks=tuple(thin), axis_scales=()), True


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Float32, or the dtype itself where that is wider. Not `jnp.promote_types`, which strict promotion forbids."""
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


def delta(f: AdaptedWeight, dtype: jnp.dtype) -> jax.Array:
    """What the networks add to the base, in the base's shape."""
    total = jnp.zeros(f.shape, dtype)
    for network in f.networks:
        total = total + broadcast_network(network, f, dtype)
    return total


def broadcast_network(network: TensorNetwork, f: AdaptedWeight, dtype: jnp.dtype) -> jax.Array:
    """A network's value in the shape of the weight, `scale * einsum(terms -> axes)`."""
    order = "".join(f.axes)
    span = "".join(c for c in order if any(c in term for term in network.terms))
    value = einsum(network.terms, network.factors, span, dtype)
    value = jnp.expand_dims(value, [k for k, c in enumerate(order) if c not in span])
    value = jnp.broadcast_to(value, [f.size(c) for c in order]).reshape(f.shape)
    return value * scalar(network.scale, dtype)


def einsum(terms: Sequence[str], factors: Sequence[jax.Array], out: str, dtype: jnp.dtype) -> jax.Array:
    """`jnp.einsum` of factors in one dtype, at full float32 precision."""
    arrays = [factor.astype(dtype) for factor in factors]
    return jnp.einsum(f"{','.join(terms)}->{out}", *arrays, precision=lax.Precision.HIGHEST)


def scalar(value: float, dtype: jnp.dtype) -> jax.Array:
    return jnp.asarray(value, dtype)


def barrier(values: Sequence[Any]) -> list[Any]:
    """`jax.lax.optimization_barrier` for arrays and weights.

    Bases have barriers of their own: what shares one with an array that has a tangent gets a tangent too, and a base
    that has one makes the backward pass compute the gradient of the whole weight.
    """
    bases = iter([lax.optimization_barrier(v.base) for v in values if isinstance(v, AdaptedWeight)])
    rest = iter(
        lax.optimization_barrier([(v.networks, v.axis_scales) if isinstance(v, AdaptedWeight) else v for v in values])
    )
    return [
        dataclasses.replace(v, base=next(bases), networks=r[0], axis_scales=r[1]) if isinstance(v, AdaptedWeight) else r
        for v, r in zip(values, rest, strict=True)
    ]


def concatenate_ranks(f: AdaptedWeight) -> AdaptedWeight:
    """The weight with its low-rank products side by side in one, whose rank is the sum: two matrices, not two a piece.

    Only plain ones join, with the same letters and one rank between them.
    """
    done: dict[Any, TensorNetwork] = {}
    for number, n in enumerate(f.networks):
        own = set("".join(n.terms)) - set("".join(f.axes))
        rank = "".join(own)
        plain = len(own) == 1 and len(n.terms) == 2 and all(rank in t for t in n.terms) and n.key is None
        kind = (*(t.replace(rank, "?") for t in n.terms), *(a.dtype for a in n.factors)) if plain else number
        done[kind] = _concatenate_pair(done[kind], n, rank) if kind in done else n
    return dataclasses.replace(f, networks=tuple(done.values()))


def _concatenate_pair(one: TensorNetwork, other: TensorNetwork, rank: str) -> TensorNetwork:
    (a, c), (b, d) = ((n.factors[0] * scalar(n.scale, n.factors[0].dtype), n.factors[1]) for n in (one, other))
    left, right = (term.index(rank) for term in other.terms)
    factors = jnp.concatenate([a, b], axis=left), jnp.concatenate([c, d], axis=right)
    return dataclasses.replace(one, factors=factors, scale=1.0)


# What structural rules do to the networks. Each returns a weight whose `base` is still the old one.


def relabel(f: AdaptedWeight, base: Any, axes: Sequence[str], letters: Iterable[Index] = ()) -> AdaptedWeight:
    """The same networks under another base and other axes; `letters` adds to those that are known."""
    known = {letter.name: letter for letter in (*f.indices, *letters)}
    order = "".join(axes)
    return dataclasses.replace(f, base=base, axes=tuple(axes), indices=tuple(known[c] for c in order))


def map_index(f: AdaptedWeight, name: str, fn: Callable[[jax.Array, int], jax.Array], size: int) -> AdaptedWeight:
    """Applies `fn(array, axis)` to every factor that carries the letter, whose size becomes `size`."""
    letters = tuple(x._replace(size=size) if x.name == name else x for x in f.indices)
    return dataclasses.replace(f.map(lambda n: n.map(name, fn)), indices=letters)


def rename_indices(f: AdaptedWeight, names: dict[str, str]) -> AdaptedWeight:
    """Spells letters anew, the networks' own ones included."""
    table = str.maketrans(names)

    def network(n: TensorNetwork) -> TensorNetwork:
        terms = tuple(t.translate(table) for t in n.terms)
        return dataclasses.replace(n, terms=terms, key_term=n.key_term.translate(table))

    return dataclasses.replace(
        f.map(network),
        axes=tuple(a.translate(table) for a in f.axes),
        indices=tuple(x._replace(name=names.get(x.name, x.name)) for x in f.indices),
    )


def split_index(f: AdaptedWeight, name: str, sizes: tuple[int, int]) -> AdaptedWeight:
    """Spells one letter as two, major first: an axis of 12 becomes (3, 4) in every factor that carries it."""
    major, minor = name, fresh_indices([f.used()])
    old = f.index(name)

    def fn(array: jax.Array, axis: int) -> jax.Array:
        return array.reshape(*array.shape[:axis], *sizes, *array.shape[axis + 1 :])

    two = (old._replace(size=sizes[0]), Index(minor, sizes[1], old.origins))
    letters = [y for x in f.indices for y in (two if x.name == name else (x,))]
    return dataclasses.replace(
        f.map(lambda n: n.map(name, fn, major + minor)),
        axes=tuple(a.replace(name, major + minor) for a in f.axes),
        indices=tuple(letters),
    )


def drop_index(f: AdaptedWeight, name: str) -> AdaptedWeight:
    """Removes a letter of size one from every factor; the caller removes it from the axes."""
    return f.map(lambda n: n.map(name, jnp.squeeze, ""))


def merge_indices(f: AdaptedWeight) -> AdaptedWeight:
    """Spells every axis in one letter where the networks allow it: where each factor carries all of an axis or none.

    An axis that some factor carries only in part (a Kronecker product) keeps its letters.
    """
    for axis in f.axes:
        terms = [t for n in (*f.networks, *f.axis_scales) for t in (*n.terms, n.key_term)]
        if len(axis) > 1 and all(set(axis) <= set(t) or not set(axis) & set(t) for t in terms):
            f = _merge_axis(f, axis)
    return f


def _merge_axis(f: AdaptedWeight, axis: str) -> AdaptedWeight:
    keep = axis[0]

    def one(array: jax.Array, term: str) -> tuple[jax.Array, str]:
        if keep not in term:
            return array, term
        rest = [c for c in term if c not in axis]
        array = array.transpose([term.index(c) for c in (*axis, *rest)])
        return array.reshape(-1, *array.shape[len(axis) :]), keep + "".join(rest)

    def network(n: TensorNetwork) -> TensorNetwork:
        pairs = [one(a, t) for a, t in zip(n.factors, n.terms, strict=True)]
        key, key_term = (n.key, n.key_term) if n.key is None else one(n.key, n.key_term)
        factors, terms = tuple(a for a, _ in pairs), tuple(t for _, t in pairs)
        return dataclasses.replace(n, factors=factors, terms=terms, key=key, key_term=key_term)

    origins = tuple(dict.fromkeys(o for c in axis for o in f.index(c).origins))
    letter = Index(keep, f.size(axis), origins)
    axes = tuple(keep if a == axis else a for a in f.axes)
    known = {**{x.name: x for x in f.indices}, keep: letter}
    return dataclasses.replace(f.map(network), axes=axes, indices=tuple(known[c] for a in axes for c in a))
