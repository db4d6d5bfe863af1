"""Structures of sparse updates, whose entries have places that are drawn or given."""

import dataclasses
import functools
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora import _compat
from jlora._ir.materialize import accumulation_dtype
from jlora._ir.sizes import is_static
from jlora._ir.structured import Structure
from jlora.methods._common.digits import from_digits
from jlora.methods._common.random_matrices import scattered_positions
from jlora.methods._common.torch_random import Generator


@final
@dataclasses.dataclass(frozen=True)
class Scattered(Structure):
    """A sparse matrix with the entries theta, at positions that are drawn from a seed.

    Arguments:
        n_in, n_out: the size of the matrix.
        count: how many entries.
        seed: of the positions.
    """

    n_in: int
    n_out: int
    count: int
    seed: int

    @property
    def is_branch(self) -> bool:
        return False

    def positions(self) -> tuple[jax.Array, jax.Array]:
        """The row and the column of every entry."""
        flat = scattered_positions(self.count, self.seed, self.n_in * self.n_out)
        return flat // self.n_out, flat % self.n_out

    def matrix(self, theta: jax.Array, *constants: jax.Array) -> jax.Array:
        positions = scattered_positions(self.count, self.seed, self.n_in * self.n_out)
        flat = jnp.zeros(self.n_in * self.n_out, theta.dtype)
        return (
            flat.at[positions].set(theta, unique_indices=True, indices_are_sorted=True).reshape(self.n_in, self.n_out)
        )

    def apply(self, x: jax.Array, theta: jax.Array, *constants: jax.Array) -> jax.Array:
        dtype = accumulation_dtype(x.dtype)
        return sparse_product(x.T, *self.positions(), theta.astype(dtype), self.n_out).T

    def apply_flops(self, rows: int) -> float:
        return 2 * rows * self.count


def drawn_positions(n_in: int, n_out: int, count: int, seed: int, places: str) -> tuple[jax.Array, jax.Array]:
    """The rows and the columns of distinct random entries of a matrix.

    Arguments:
        n_in, n_out: its sizes.
        count: how many entries.
        seed: of the generator.
        places: "stretches" for one in each of as many stretches of the matrix, "torch" for those that PEFT draws.
    """
    if places == "torch":
        flat = _permutation_of_torch(n_in * n_out, count, seed)
        return jnp.asarray(flat % n_in, jnp.int32), jnp.asarray(flat // n_in, jnp.int32)
    flat = scattered_positions(count, seed, n_in * n_out)
    return flat // n_out, flat % n_out


@functools.lru_cache(16)
def _permutation_of_torch(size: int, count: int, seed: int) -> np.ndarray:
    return Generator(seed).permutation(size, count)


@final
@dataclasses.dataclass(frozen=True)
class Placed(Structure):
    """A sparse matrix with the entries theta, at positions that are an array: digits of `column * n_in + row`.

    Arguments:
        n_in, n_out: the size of the matrix.
        count: how many entries.
    """

    n_in: int
    n_out: int
    count: int

    @property
    def is_branch(self) -> bool:
        return False

    def matrix(self, theta: jax.Array, *constants: jax.Array) -> jax.Array:
        (place,) = constants
        flat = jnp.zeros(self.n_in * self.n_out, theta.dtype).at[from_digits(place)].add(theta)
        return flat.reshape(self.n_out, self.n_in).T

    def apply(self, x: jax.Array, theta: jax.Array, *constants: jax.Array) -> jax.Array:
        (place,) = constants
        positions, dtype = from_digits(place), accumulation_dtype(x.dtype)
        columns, rows = positions // self.n_in, positions % self.n_in
        return sparse_product(x.T, rows, columns, theta.astype(dtype), self.n_out).T

    def apply_flops(self, rows: int) -> float:
        return 2 * rows * self.count


def sparse_product(x: jax.Array, rows: jax.Array, columns: jax.Array, values: jax.Array, n_out: int) -> jax.Array:
    """`S^T x` with the sparse matrix S: (in, out).

    Arguments:
        x: the transposed activation, (in, T).
        rows, columns: the positions of the entries in S.
        values: the entries.
        n_out: the out size of S.

    Returns:
        (out, T), in the dtype of the values, or of x if the product is a dense one.
    """
    n_in, n_rows = x.shape
    if not _compat.is_for_accelerator(x):
        return _by_entries(x, rows, columns, values, n_out, at_once=(n_in + n_out) // 4)
    if not _is_dense_faster(n_in, n_rows, n_out, len(values)):
        return _by_entries(x, rows, columns, values, n_out, at_once=len(values))
    dense = jnp.zeros((n_in, n_out), x.dtype).at[rows, columns].add(values.astype(x.dtype))
    return dense.T @ x


def _is_dense_faster(n_in: int, n_rows: Any, n_out: int, count: int) -> bool:
    """Whether an accelerator computes the dense product in less time than the products of the entries.

    Of every entry and row it moves about 12 bytes: it reads x, and reads and writes y. The dense product moves 4 bytes
    of every entry of S, and in the time of one byte it computes about 100 products (H100: 117, A100: 78, TPU v5e: 123).
    """
    return not is_static(n_rows) or 12 * count * n_rows > n_in * n_out * (4 + n_rows / 100)


def _by_entries(
    x: jax.Array, rows: jax.Array, columns: jax.Array, values: jax.Array, n_out: int, *, at_once: int
) -> jax.Array:
    """The product in chunks of so many entries; on the CPU those of a chunk are a fourth of the activations.

    Of the transposed activation an entry reads and writes rows, which are contiguous. On the CPU the values are
    multiplied by ones as a product of matrices: its gradient is one too, which takes a third of a sum's time there.
    """
    is_for_cpu = not _compat.is_for_accelerator(x)
    count, size = len(values), max(at_once, 1)
    chunks = -(-count // size)
    pad = chunks * size - count
    padded = [jnp.pad(a, (0, pad)).reshape(chunks, size) for a in (rows, columns, values)]

    @jax.checkpoint
    def add(y: jax.Array, chunk: list[jax.Array]) -> tuple[jax.Array, None]:
        rows, columns, values = chunk
        column = values.reshape(-1, 1)
        scales = column @ jnp.ones((1, x.shape[1]), values.dtype) if is_for_cpu else column
        return y.at[columns].add(scales * x[rows].astype(values.dtype)), None

    return lax.scan(add, jnp.zeros((n_out, x.shape[1]), values.dtype), padded)[0]
