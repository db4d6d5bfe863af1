"""Fingerprints of arrays that do not depend on the order of their elements.

    H(array) = sum of h(bits of x) over all elements x, modulo 2^64

h is a hash of one number. The fingerprint of a stack or of a join is the sum of those of its parts, so the sums of
all rows along an axis give that of every slice. Equal fingerprints are a reason to compare, and no proof.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Domain = str  # the dtype that both sides are cast to before they are compared
_CHUNK = 1 << 14  # elements: the hashes of more are allocated anew by the system each time, which takes longer
_NARROW = ("bfloat16", "float16")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Fingerprint(NamedTuple):
    """What is kept of an array: its size, the sum of its hashes, and its value if all elements are equal."""

    size: int
    total: int
    constant: float | None

    @property
    def key(self) -> tuple[int, int]:
        """What equal arrays have in common, in whatever order their elements are."""
        return self.size, self.total


def chunks(shape: tuple[int, ...], limit: int = _CHUNK) -> Iterator[tuple[int | slice, ...]]:
    """Indices that divide an array of some shape into blocks of at most `limit` elements."""
    rest = math.prod(shape)
    if rest <= limit:
        yield (slice(None),) * len(shape)
        return
    leading = []
    for size in shape:
        rest //= size
        if rest <= limit:
            break
        leading.append(range(size))
    axis = len(leading)
    step = max(limit // max(rest, 1), 1)
    for index in itertools.product(*leading):
        for start in range(0, shape[axis], step):
            yield (*index, slice(start, start + step), *[slice(None)] * (len(shape) - axis - 1))


def cast(values: np.ndarray, domain: Domain) -> np.ndarray:
    """The values as they are after a cast to the domain, in float32, or float64 if that is the domain."""
    wide = np.dtype("float64" if domain == "float64" else "float32")
    if str(values.dtype) == domain or domain == "float64":
        return values.astype(wide, copy=False)
    with np.errstate(all="ignore"):
        return values.astype(jnp.dtype(domain)).astype(wide, copy=False)


def domain_of(array: np.ndarray) -> Domain:
    """The narrowest dtype that holds all values of an array: bfloat16 if it was cast to that, and then to float32."""
    dtype = str(array.dtype)
    if dtype in _NARROW:
        return dtype
    candidates = [*_NARROW, *(["float32"] if dtype == "float64" else [])]
    for index in chunks(array.shape):
        block = array[index]
        candidates = [domain for domain in candidates if np.array_equal(cast(block, domain), block)]
        if not candidates:
            return dtype
    return candidates[0]


def hashes(values: np.ndarray) -> np.ndarray:
    """The hash of each number, uint64. -0 has that of 0."""
    unsigned: Any = np.uint64 if values.dtype.itemsize == 8 else np.uint32
    mixed = (np.atleast_1d(values) + values.dtype.type(0)).view(unsigned).astype(np.uint64)
    mixed *= _MULTIPLIER
    mixed ^= mixed >> np.uint64(32)
    return mixed


def fingerprint(array: np.ndarray, domain: Domain) -> Fingerprint:
    """The fingerprint of an array after a cast."""
    total, first, is_constant = 0, cast(array[(slice(0, 1),) * array.ndim], domain).reshape(-1)[:1], True
    for index in chunks(array.shape):
        values = cast(array[index], domain)
        total += int(hashes(values).sum(dtype=np.uint64))
        is_constant = is_constant and bool((values == first).all())
    return Fingerprint(array.size, total % 2**64, float(first[0]) if is_constant else None)


def axis_sums(array: np.ndarray, domain: Domain, kept: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """The sums of hashes along all axes but some: with `(0,)` kept, entry i belongs to `array[i]`.

    Arguments:
        array: of any shape.
        domain: to which it is cast.
        kept: axes in ascending order, for each of the results.
    """
    results = [np.zeros([array.shape[axis] for axis in axes], np.uint64) for axes in kept]
    for index in chunks(array.shape):
        block = tuple(slice(i, i + 1) if isinstance(i, int) else i for i in index)
        mixed = hashes(cast(array[block], domain))
        for axes, sums in zip(kept, results, strict=True):
            others = tuple(axis for axis in range(array.ndim) if axis not in axes)
            sums[tuple(block[axis] for axis in axes)] += mixed.sum(axis=others, dtype=np.uint64)
    return results


def tiles(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Indices that divide an array into blocks that are about as long in all axes, for arrays in different layouts."""
    rank = sum(size > 1 for size in shape)
    step = int(_CHUNK ** (1 / max(rank, 1)))
    for corner in itertools.product(*(range(0, size, step) for size in shape)):
        yield tuple(slice(start, start + step) for start in corner)


def are_equal(one: np.ndarray, other: np.ndarray, domain: Domain) -> bool:
    """Whether two arrays of one shape are equal, element by element, after a cast."""
    return all(np.array_equal(cast(one[i], domain), cast(other[i], domain)) for i in tiles(one.shape))
