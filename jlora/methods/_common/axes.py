"""A weight as a matrix: its axes by role, networks over them, blocks of them."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora._interpreter.context import Role, matrix_side
from jlora._interpreter.site import Site
from jlora._ir.algebra import split_index
from jlora._ir.materialize import accumulation_dtype, dense
from jlora._ir.weight import AdaptedWeight, AxisScale, TensorNetwork, fresh_indices
from jlora.methods._base import Update

Pair = tuple[jax.Array, str]


def letters(w: AdaptedWeight, roles: Sequence[Role]) -> tuple[str, str, str]:
    """The letters of a weight's stack, in and out axes, those of a window among the in axes."""
    stack, inner, outer = (
        "".join(axis for axis, r in zip(w.axes, roles, strict=True) if matrix_side(r) == role)
        for role in ("stack", "in", "out")
    )
    return stack, inner, outer


def within(w: AdaptedWeight, roles: Sequence[Role]) -> tuple[str, str]:
    """The letters of a weight's in axes, divided into channels and window."""
    channels, window = (
        "".join(axis for axis, r in zip(w.axes, roles, strict=True) if r == role) for role in ("in", "window")
    )
    return channels, window


def channels(site: Site) -> tuple[int, ...]:
    """The sizes of a site's in axes without its window."""
    return tuple(n for n, r in zip(site.shape, site.roles, strict=True) if r == "in")


def counts(site: Site) -> tuple[int, int]:
    """The joint sizes of a site's in and out axes."""
    return math.prod(site.sizes("in")), math.prod(site.sizes("out"))


def name(w: AdaptedWeight) -> str:
    """A weight's path for an error; a merge knows none."""
    return ", ".join(w.paths) or "the weight"


def ranks(w: AdaptedWeight, count: int = 1) -> str:
    """Letters for ranks."""
    return fresh_indices([w.used()], count)


def add(
    w: AdaptedWeight, pairs: Sequence[Pair], sizes: Mapping[str, int], scale: float, **options: Any
) -> AdaptedWeight:
    """The weight with one more network.

    Arguments:
        w: the weight.
        pairs: factors with their terms; each is reshaped to one axis a letter.
        sizes: of the letters that the weight does not have.
        scale: the network's.
        options: as for `Network`.

    Raises:
        ValueError: where a factor's axes are no parts of its letters' axes, nor joined from them.
    """
    known = {x.name: x.size for x in w.indices} | dict(sizes)
    factors = tuple(_spelled(a, [known[c] for c in term], w) for a, term in pairs)
    network = TensorNetwork(factors, tuple(term for _, term in pairs), scale, **options)
    return dataclasses.replace(w, networks=(*w.networks, network))


def _spelled(factor: jax.Array, sizes: Sequence[int], w: AdaptedWeight) -> jax.Array:
    """A factor with one axis a letter, axes split and joined only."""
    borders, wanted = (set(itertools.accumulate(shape, operator.mul)) for shape in (factor.shape, sizes))
    if factor.size != math.prod(sizes) or not (borders <= wanted or wanted <= borders):
        raise ValueError(
            f"A factor of {name(w)} has shape {factor.shape}, which cannot be read as {tuple(sizes)}. "
            "An adapter with an axis in front of every factor is used under jax.vmap."
        )
    return factor.reshape(sizes)


def dropout(update: Update, stack: str) -> dict[str, Any]:
    """The options of a network whose branch has dropout."""
    if update.key is None:
        return {}
    return {"key": update.key, "key_term": stack, "rate": update.method.dropout}


def multiply(w: AdaptedWeight, vector: jax.Array, term: str) -> AdaptedWeight:
    """The weight, base and networks, times a vector along some letters."""
    vector = vector.reshape([w.size(c) for c in term])
    networks = tuple(dataclasses.replace(n, factors=(*n.factors, vector), terms=(*n.terms, term)) for n in w.networks)
    return dataclasses.replace(w, networks=networks, axis_scales=(*w.axis_scales, AxisScale(vector, term)))


def add_matrix(w: AdaptedWeight, matrix: jax.Array, roles: Sequence[Role], scale: float) -> AdaptedWeight:
    """The weight plus a difference of its own size, given as a matrix `(*stack, in, out)`."""
    stack, inner, outer = letters(w, roles)
    return add(w, [(matrix, stack + inner + outer)], {}, scale)


def as_matrix(array: jax.Array, roles: Sequence[Role]) -> jax.Array:
    """A weight's value as `(*stack, in, out)`, each joined, in float32 or wider."""
    order = [k for role in ("stack", "in", "out") for k, r in enumerate(roles) if matrix_side(r) == role]
    shape = [n for n, r in zip(array.shape, roles, strict=True) if r == "stack"]
    n_in = math.prod(n for n, r in zip(array.shape, roles, strict=True) if matrix_side(r) == "in")
    return array.transpose(order).reshape(*shape, n_in, -1).astype(max(array.dtype, jnp.dtype(jnp.float32), key=_bits))


def matrix(w: AdaptedWeight, roles: Sequence[Role]) -> jax.Array:
    """The whole weight, as `as_matrix` gives it."""
    return as_matrix(jnp.asarray(dense(w, accumulation_dtype(w.dtype))), roles)


def rank_above(site: Site, rank: int) -> str:
    """Why a rank is too high for a site; empty where it is not."""
    n_in, n_out = counts(site)
    if rank <= min(n_in, n_out):
        return ""
    return f"rank {rank} is above the smaller of its in size {n_in} and out size {n_out}; lower the rank"


def too_many(site: Site, count: int) -> str:
    """Why a number of entries is too high for a site; empty where it is not."""
    n_in, n_out = counts(site)
    return "" if count <= n_in * n_out else f"{count} entries are more than its {n_in} x {n_out}; lower their number"


def _bits(dtype: Any) -> int:
    return jnp.finfo(dtype).bits


def blocks(w: AdaptedWeight, names: str, minor: int) -> tuple[AdaptedWeight, str, str]:
    """Divides the joint axis of some letters into a major and a minor part, `(n / minor, minor)`.

    Returns the weight, with a letter split where the border runs through one, and the letters of both parts.
    """
    part, reach = "", 1
    while reach < minor:
        name = names[-1]
        size = w.index(name).size
        if reach * size <= minor:
            part, names, reach = name + part, names[:-1], reach * size
        else:
            known = {x.name for x in w.indices}
            w = split_index(w, name, (size * reach // minor, minor // reach))
            (new,) = (x.name for x in w.indices if x.name not in known)
            part, reach = new + part, minor
    return w, names, part


def blocks_fit(sizes: Sequence[int], minor: int) -> bool:
    """Whether the joint axis of some sizes can be divided into blocks of `minor`."""
    reach = 1
    for size in reversed(sizes):
        if reach == minor:
            return True
        if minor % (reach * size) == 0:
            reach *= size
        else:
            return minor % reach == 0 and size % (minor // reach) == 0
    return reach == minor
