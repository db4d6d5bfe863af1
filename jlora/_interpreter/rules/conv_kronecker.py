"""Kronecker products on convolutions (LoKr): a convolution with one factor, and a product with the others.

    W[w, a b, c d] = C[a, c] D[w, b, d]:    z[n, a] = conv(x[n, a], D),    y[n, c] = sum over a of z[n, a] C[a, c]

The index a of the input channels is a part of the batch for the convolution, so no array is as large as W.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora._ir.weight import AdaptedWeight, TensorNetwork, fresh_indices
from jlora._ops.contraction import apply_network


@dataclasses.dataclass(frozen=True)
class Kronecker:
    """A network whose factors fall into two parts that share no index.

    Arguments:
        convolved: the numbers of the factors that meet the window.
        mixed: those of the other factors.
        inner, outer: the indices of the input and output channels that the first part has.
        batched: the indices of the input channels that the second part has.
    """

    convolved: list[int]
    mixed: list[int]
    inner: str
    outer: str
    batched: str


def divide_kronecker(n: TensorNetwork, inner: str, outer: str, spatial: str, sizes: dict[str, int]) -> Kronecker | None:
    """Divides a network in two parts, None if all factors are connected or the second has no output channels.

    Arguments:
        n: the network.
        inner, outer, spatial: the indices of the kernel's input channels, output channels and window.
        sizes: of these.
    """
    convolved = _connected(n.terms, spatial)
    mixed = [k for k in range(len(n.terms)) if k not in convolved]
    names = set("".join(n.terms[k] for k in mixed))
    if not convolved or math.prod(sizes[c] for c in outer if c in names) == 1:
        return None
    batched = "".join(c for c in inner if c in names)
    inner, outer = ("".join(c for c in channels if c not in names) for channels in (inner, outer))
    return Kronecker(convolved, mixed, inner, outer, batched)


def _connected(terms: Sequence[str], names: str) -> list[int]:
    """The numbers of the terms that have some indices, or share one with such a term, and so on."""
    reached, size = set(names), -1
    while len(reached) > size:
        size = len(reached)
        reached |= {c for term in terms if set(term) & reached for c in term}
    return [k for k, term in enumerate(terms) if set(term) & reached]


def part_of(n: TensorNetwork, numbers: Sequence[int]) -> TensorNetwork:
    """The network of some of the factors, with its scale."""
    factors, terms = (tuple(values[k] for k in numbers) for values in (n.factors, n.terms))
    return dataclasses.replace(n, factors=factors, terms=terms)


def narrowed(f: AdaptedWeight, part: Kronecker, in_axis: int, out_axis: int) -> AdaptedWeight:
    """The weight as the first part has it: its shape and its indices, without values."""
    axes, shape = list(f.axes), list(f.shape)
    for axis, names in ((in_axis, part.inner), (out_axis, part.outer)):
        axes[axis], shape[axis] = names, f.size(names)
    base: Any = jax.ShapeDtypeStruct(tuple(shape), f.dtype)
    return dataclasses.replace(f, base=base, axes=tuple(axes))


def apply_kronecker(
    x: jax.Array,
    n: TensorNetwork,
    part: Kronecker,
    channels: tuple[str, str],
    f: AdaptedWeight,
    specs: tuple[Sequence[int], Sequence[int]],
    *,
    convolve: Callable[[jax.Array, TensorNetwork], jax.Array],
    dtype: jnp.dtype,
    precision: Any,
) -> jax.Array:
    """A network's branch.

    Arguments:
        x: the input.
        n, part: the network and its division.
        channels: the indices of the input and of the output channels.
        f: the weight, for sizes.
        specs: the axes of the batch and of the channels, of the input and of the output.
        convolve: the convolution of an input, whose batch has the second part's indices in front, with the first part.
        dtype, precision: of the result and of the products.
    """
    names = fresh_indices([f.used()], x.ndim)
    (batch, channel), (out_batch, out_channel) = specs
    sizes = f.sizes | dict(zip(names, x.shape, strict=True))
    before = _labelled(names, {channel: channels[0]})
    after = _labelled(names, {batch: part.batched + names[batch], channel: part.inner})
    x = x.reshape([sizes[c] for term in before for c in term])
    x = x.transpose(["".join(before).index(c) for c in "".join(after)])
    z = convolve(x.reshape([math.prod(sizes[c] for c in term) for term in after]), part_of(n, part.convolved))
    sizes |= {c: size for k, (c, size) in enumerate(zip(names, z.shape, strict=True)) if k != out_batch}
    sizes[names[out_batch]] = z.shape[out_batch] // f.size(part.batched)
    of_z = _labelled(names, {out_batch: part.batched + names[out_batch], out_channel: part.outer})
    of_y = _labelled(names, {out_channel: channels[1]})
    z = z.reshape([sizes[c] for term in of_z for c in term])
    mixed = dataclasses.replace(part_of(n, part.mixed), scale=1.0, key=None, rate=0.0)
    y = apply_network(z, "".join(of_z), mixed, "".join(of_y), dtype=dtype, precision=precision)
    return y.reshape([math.prod(sizes[c] for c in term) for term in of_y])


def _labelled(names: str, changed: dict[int, str]) -> list[str]:
    """The indices of each axis."""
    return [changed.get(k, name) for k, name in enumerate(names)]
