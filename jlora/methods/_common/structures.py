"""Structures of updates: small arrays that determine a matrix as large as the weight."""

import dataclasses
import math
from typing import final

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat
from jlora._ir.materialize import accumulation_dtype
from jlora._ir.structured import Structure
from jlora.methods._common.sparse_structures import drawn_positions, sparse_product


@final
@dataclasses.dataclass(frozen=True)
class Spectrum(Structure):
    """The real part of the inverse Fourier transform of a sparse spectrum with the coefficients theta.

    Position (k, l) and position (-k, -l) have the same real part. So each coefficient moves to the one with
    l <= out / 2, and the transforms along the out axis are those of real numbers.

    Arguments:
        n_in, n_out: the size of the matrix.
        count: how many coefficients.
        seed: of their positions.
        places: how they are drawn, as for `drawn_positions`.
    """

    n_in: int
    n_out: int
    count: int
    seed: int
    places: str = "stretches"

    def positions(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The row and the column of every coefficient, and whether the column is its own mirror."""
        rows, columns = drawn_positions(self.n_in, self.n_out, self.count, self.seed, self.places)
        moves = 2 * columns > self.n_out
        rows, columns = jnp.where(moves, -rows % self.n_in, rows), jnp.where(moves, self.n_out - columns, columns)
        return rows, columns, (columns == 0) | (2 * columns == self.n_out)

    def matrix(self, theta: jax.Array, *constants: jax.Array) -> jax.Array:
        rows, columns, is_mirror = self.positions()
        value = theta.astype(accumulation_dtype(theta.dtype)) / 2
        half = jnp.zeros((self.n_in, self.n_out // 2 + 1), value.dtype)
        half = half.at[rows, columns].add(value).at[-rows % self.n_in, columns].add(jnp.where(is_mirror, value, 0))
        columns_done = jnp.fft.ifft(half, axis=0)
        return _compat.row_major_gradient(jnp.fft.irfft(columns_done, self.n_out, axis=1))

    def apply(self, x: jax.Array, theta: jax.Array, *constants: jax.Array) -> jax.Array:
        """Transforms the rows of x, gathers the frequencies of the coefficients, and transforms back."""
        dtype = accumulation_dtype(x.dtype)
        rows, columns, is_mirror = self.positions()
        of_x, of_y = self.n_in // 2 + 1, self.n_out // 2 + 1
        spectrum = jnp.fft.rfft(_compat.row_major_gradient(x.astype(dtype)), axis=1).T / self.n_in
        parts = jnp.concatenate([spectrum.real, spectrum.imag])
        is_upper = 2 * rows > self.n_in
        frequency = jnp.where(is_upper, self.n_in - rows, rows)
        theta = theta.astype(dtype)
        real = jnp.where(is_mirror, 1, 0.5).astype(dtype) * theta
        imaginary = jnp.where(is_mirror, 0, jnp.where(is_upper, 0.5, -0.5)).astype(dtype) * theta
        sources, targets = (jnp.concatenate([a, a + n]) for a, n in ((frequency, of_x), (columns, of_y)))
        y = sparse_product(parts, sources, targets, jnp.concatenate([real, imaginary]), 2 * of_y)
        return _compat.row_major_gradient(jnp.fft.irfft(lax.complex(y[:of_y], y[of_y:]).T, self.n_out, axis=1))

    def apply_flops(self, rows: int) -> float:
        return rows * (2.5 * (self.n_in * math.log2(self.n_in) + self.n_out * math.log2(self.n_out)) + 4 * self.count)

    @property
    def matrix_flops(self) -> float:
        return 2.5 * self.n_in * self.n_out * math.log2(self.n_in * self.n_out)


@final
@dataclasses.dataclass(frozen=True)
class Wavelets(Structure):
    """The inverse Haar transform of one level, along both axes, of a sparse matrix with the coefficients theta.

    Along each axis the first half of the coefficients are those of means, the second half those of differences. An axis
    of odd size has one more coefficient, and the last entry is left out.

    Arguments:
        n_in, n_out: the size of the matrix.
        count: how many coefficients.
        seed: of their positions.
        places: how they are drawn, as for `drawn_positions`.
    """

    n_in: int
    n_out: int
    count: int
    seed: int
    places: str = "stretches"

    def positions(self) -> tuple[jax.Array, jax.Array]:
        """The row and the column of every coefficient.

        PEFT exchanges the coefficients of differences along one axis with those along the other.
        """
        rows, columns = drawn_positions(self.n_in, self.n_out, self.count, self.seed, self.places)
        if self.places == "stretches":
            return rows, columns
        half_in, half_out = _even(self.n_in) // 2, _even(self.n_out) // 2
        is_first, is_second = rows >= half_in, columns >= half_out
        towards = jnp.where(is_first == is_second, 0, jnp.where(is_first, -1, 1))
        return rows + towards * half_in, columns - towards * half_out

    def matrix(self, theta: jax.Array, *constants: jax.Array) -> jax.Array:
        coefficients = jnp.zeros((_even(self.n_in), _even(self.n_out)), accumulation_dtype(theta.dtype))
        coefficients = coefficients.at[self.positions()].set(theta.astype(coefficients.dtype))
        return inverse_haar(inverse_haar(coefficients, self.n_out).T, self.n_in).T

    def apply(self, x: jax.Array, theta: jax.Array, *constants: jax.Array) -> jax.Array:
        dtype = accumulation_dtype(x.dtype)
        x = jnp.pad(x.astype(dtype), [(0, 0), (0, self.n_in % 2)])
        y = sparse_product(haar(x).T, *self.positions(), theta.astype(dtype), _even(self.n_out))
        return inverse_haar(y.T, self.n_out)

    def apply_flops(self, rows: int) -> float:
        return 2 * rows * (self.n_in + self.n_out + self.count)

    @property
    def matrix_flops(self) -> float:
        return 4 * self.n_in * self.n_out


def _even(size: int) -> int:
    return size + size % 2


def haar(x: jax.Array) -> jax.Array:
    """The Haar transform of one level along the last axis, whose size is even: means, then differences."""
    first, second = x[..., ::2], x[..., 1::2]
    return jnp.concatenate([first + second, first - second], -1) * jnp.asarray(0.5**0.5, x.dtype)


def inverse_haar(x: jax.Array, size: int) -> jax.Array:
    """The inverse of `haar`, of which the first `size` entries are kept."""
    mean, difference = jnp.split(x, 2, -1)
    pairs = jnp.stack([mean + difference, mean - difference], -1) * jnp.asarray(0.5**0.5, x.dtype)
    return pairs.reshape(x.shape)[..., :size]


@final
@dataclasses.dataclass(frozen=True)
class Circulant(Structure):
    """Blocks that are circulant matrices: entry (j, i) of a block is theta[(j - i) mod block].

    Arguments:
        n_in, n_out: the size of the matrix, multiples of the block's.
        block: the size of a block. theta is (n_out / block, n_in / block, block).
    """

    n_in: int
    n_out: int
    block: int

    def matrix(self, theta: jax.Array, *constants: jax.Array) -> jax.Array:
        row, column = jnp.arange(self.block)[:, None], jnp.arange(self.block)[None, :]
        blocks = theta[:, :, (row - column) % self.block]
        return blocks.transpose(1, 2, 0, 3).reshape(self.n_in, self.n_out)

    def apply(self, x: jax.Array, theta: jax.Array, *constants: jax.Array) -> jax.Array:
        """The correlation of every block of x with its kernel, as a product of their Fourier transforms."""
        dtype = accumulation_dtype(x.dtype)
        blocks = x.astype(dtype).reshape(-1, self.n_in // self.block, self.block)
        of_x = jnp.fft.rfft(_compat.row_major_gradient(blocks), axis=-1)
        kernel = jnp.fft.rfft(theta.astype(dtype), axis=-1).conj()
        of_y = jnp.einsum("tif,oif->tof", of_x, kernel, precision=lax.Precision.HIGHEST)
        y = _compat.row_major_gradient(jnp.fft.irfft(of_y, self.block, axis=-1))
        return y.reshape(-1, self.n_out)

    def apply_flops(self, rows: int) -> float:
        transforms = 2.5 * (self.n_in + self.n_out) * math.log2(self.block)
        return rows * (transforms + 8 * self.n_in * self.n_out * (self.block // 2 + 1) / self.block**2)
