"""The random numbers that torch draws on the CPU from a seed: PEFT's files leave out what it can draw again."""

import math

import numpy as np

_BLOCK = 16  # torch transforms as many uniform numbers to normal ones at a time


class Generator:
    """`torch.Generator().manual_seed(seed)`: successive calls give the numbers of successive calls in torch.

    The raw numbers are those of the Mersenne Twister of 32 bits. Uniform numbers, integers and permutations equal
    torch's to the last bit, normal numbers up to the rounding of the logarithm and the cosine.

    Arguments:
        seed: an integer; the generator reads its lowest 32 bits, as torch's does.
    """

    def __init__(self, seed: int) -> None:
        self._twister = np.random.RandomState(seed % 2**32)
        self._cached_normal: float | None = None

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """`torch.empty(shape).uniform_(low, high, generator=...)`, in float32.

        Arguments:
            shape: of the result.
            low, high: the bounds.
        """
        bounds = np.float32(low), np.float32(high)
        fractions = self._fractions(math.prod(shape))
        return (fractions * (bounds[1] - bounds[0]) + bounds[0]).astype(np.float32).reshape(shape)

    def kaiming_uniform(self, shape: tuple[int, ...]) -> np.ndarray:
        """Uniform numbers with a variance of 2 / fan-in (He), as PEFT draws the random matrices of VeRA.

        Arguments:
            shape: of the result; the fan-in is the product of all sizes but the first.
        """
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(math.prod(shape[1:])))
        return self.uniform(shape, -bound, bound)

    def normal(self, shape: tuple[int, ...], mean: float = 0.0, std: float = 1.0) -> np.ndarray:
        """`torch.normal(mean, std, shape, generator=...)`, in float32.

        By the transform of Box and Muller: fewer than 16 numbers one pair after the other in double precision, more in
        blocks of 16, the cosines of a block first; the last block may overlap the one before it, and is drawn anew.

        Arguments:
            shape: of the result.
            mean, std: of the numbers.
        """
        size = math.prod(shape)
        if size < _BLOCK:
            values = np.array([self._one_normal() for _ in range(size)], np.float64)
        else:
            uniform = self._fractions(size).astype(np.float32)
            full = size - size % _BLOCK
            values = np.empty(size, np.float32)
            values[:full] = _box_muller(uniform[:full])
            if full < size:
                values[-_BLOCK:] = _box_muller(self._fractions(_BLOCK).astype(np.float32))
        return (values * values.dtype.type(std) + values.dtype.type(mean)).astype(np.float32).reshape(shape)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> np.ndarray:
        """`torch.randint(low, high, shape, generator=...)`.

        Arguments:
            low, high: the range, high excluded.
            shape: of the result.
        """
        span, size = high - low, math.prod(shape)
        raw = self._words(size).astype(np.uint64) if span < 2**28 else self._double_words(size)
        return (raw % np.uint64(span)).astype(np.int64).reshape(shape) + low

    def permutation(self, n: int, count: int | None = None) -> np.ndarray:
        """`torch.randperm(n, generator=...)[:count]`, in memory of `count` entries.

        Arguments:
            n: the number of entries that are permuted.
            count: how many to return; None for all.
        """
        count = n if count is None else min(count, n)
        remaining = n - np.arange(min(count, n - 1), dtype=np.uint64)
        offsets = (self._words(len(remaining)).astype(np.uint64) % remaining).tolist()
        moved: dict[int, int] = {}  # the entries that an exchange has put to another position
        taken = []
        for position, offset in enumerate(offsets):
            taken.append(moved.get(position + offset, position + offset))
            moved[position + offset] = moved.pop(position, position)
        taken += [moved.get(position, position) for position in range(len(taken), count)]
        return np.array(taken, np.int64)

    def _words(self, count: int) -> np.ndarray:
        return self._twister.randint(0, 2**32, count, np.uint32)

    def _double_words(self, count: int) -> np.ndarray:
        """Numbers of 64 bits, each of two words, the high one first."""
        pairs = self._words(2 * count).astype(np.uint64).reshape(count, 2)
        return (pairs[:, 0] << np.uint64(32)) | pairs[:, 1]

    def _fractions(self, count: int) -> np.ndarray:
        """Uniform numbers of 24 bits in [0, 1)."""
        return (self._words(count) & np.uint32(2**24 - 1)) / 2.0**24

    def _one_normal(self) -> float:
        """A normal number in double precision; the second one of the pair is kept for the next call."""
        if self._cached_normal is not None:
            value, self._cached_normal = self._cached_normal, None
            return value
        turn, fraction = (self._double_words(2) & np.uint64(2**53 - 1)) / 2.0**53
        radius, angle = math.sqrt(-2 * math.log1p(-fraction)), 2 * math.pi * turn
        self._cached_normal = radius * math.sin(angle)
        return radius * math.cos(angle)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """Normal numbers from whole blocks of uniform ones, float32."""
    fractions, turns = np.split(uniform.reshape(-1, _BLOCK), 2, axis=1)
    radius = np.sqrt(np.float32(-2) * np.log(1 - fractions))
    angle = np.float32(2 * math.pi) * turns
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
