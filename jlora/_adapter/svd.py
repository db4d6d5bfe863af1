"""Truncated singular value decompositions of stacks of matrices, one layer at a time."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import DTypeLike

Pair = tuple[np.ndarray, np.ndarray]
Layer = np.ndarray | Pair  # a matrix (in, out), or two thin ones whose product it is
Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Cut:
    """How many singular values a decomposition keeps, the same number in every layer of a stack.

    Arguments:
        rank: the rank; with `energy` the largest one.
        energy: the share of the squared Frobenius norm to keep in every layer, in (0, 1]: the lowest rank that does.
        tolerance: without the other two the lowest rank whose relative error is at most this, in the Frobenius norm.

    Raises:
        ValueError: if a number is out of its range.
    """

    rank: int | None = None
    energy: float | None = None
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        is_integer = isinstance(self.rank, int | np.integer) and not isinstance(self.rank, bool)
        if self.rank is not None and not (is_integer and self.rank >= 1):
            raise ValueError(f"The rank of a decomposition is a positive integer, not {self.rank!r}.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(
                f"The energy is the share of the squared Frobenius norm to keep, in (0, 1], not {self.energy!r}."
            )

    @property
    def is_given(self) -> bool:
        """Whether the caller accepts an error: a rank or an energy is given."""
        return self.rank is not None or self.energy is not None

    def may_lower(self, rank: int) -> bool:
        """Whether the cut can be below a rank."""
        return self.energy is not None or (self.rank is not None and self.rank < rank)

    def rank_for(self, values: np.ndarray) -> int:
        """The rank for singular values in descending order, `(layers, n)`."""
        count = values.shape[-1]
        if self.energy is not None:
            kept = np.cumsum(np.square(values), -1)
            share = kept / np.where(kept[:, -1:] == 0, 1, kept[:, -1:])
            share = np.where(kept[:, -1:] == 0, 1, share)
            lowest = int(np.argmax(share.min(0) >= self.energy)) + 1
            return min(lowest, self.rank or count)
        if self.rank is not None:
            return min(int(self.rank), count)
        return int(np.argmax(relative_errors(values) <= self.tolerance)) + 1


def relative_errors(values: np.ndarray) -> np.ndarray:
    """The relative errors, in the Frobenius norm, of the ranks 1, 2, ..., n: of each the worst of the layers.

    Arguments:
        values: singular values in descending order, `(layers, n)`.
    """
    tails = np.cumsum(np.square(values)[:, ::-1], -1)[:, ::-1]
    energy = np.where(tails[:, :1] == 0, 1, tails[:, :1])
    return np.append(np.sqrt(tails / energy).max(0)[1:], 0.0)


def truncated_svd(
    stack: Sequence[int], layer: Callable[[Index], Layer], cut: Cut, dtype: DTypeLike
) -> tuple[Pair, float]:
    """The nearest product of two thin matrices to each matrix of a stack, with one rank for all.

        M ~ A B,    A = U sqrt(S): (*stack, in, rank),    B = sqrt(S) V^T: (*stack, rank, out)

    A stack whose rank depends on its singular values is decomposed twice, once for the values alone, so that only one
    layer is in memory. The arithmetic is that of the layers; pass float64.

    Arguments:
        stack: the sizes of the stack axes; empty for a single matrix.
        layer: the matrix at an index of the stack, or a pair whose product it is, which costs only its rank.
        cut: the number of singular values to keep.
        dtype: of A and B.

    Returns:
        A and B, and the relative error of the worst layer in the Frobenius norm.

    Raises:
        ValueError: if a matrix has entries that are not finite.
    """
    indices = list(np.ndindex(*stack))
    depends_on_values = cut.energy is not None or cut.rank is None
    if len(indices) > 1 and depends_on_values:
        rank = _rank_of_all(layer, indices, cut)
        parts = [_leading(layer(index), lambda _: rank, dtype) for index in indices]
    else:
        parts = [_leading(layer(index), cut.rank_for, dtype) for index in indices]
    values = np.stack([s for _, s, _ in parts])
    a, b = (np.stack([part[k] for part in parts]) for k in (0, 2))
    pair = a.reshape(*stack, *a.shape[1:]), b.reshape(*stack, *b.shape[1:])
    return pair, float(relative_errors(values)[a.shape[-1] - 1])


def concatenated(pairs: Sequence[Pair], scales: Sequence[float]) -> tuple[Pair, float]:
    """One pair for a sum of products, `sum_k s_k A_k B_k = s [A_1 A_2 ...] [(s_1 / s) B_1; (s_2 / s) B_2; ...]`.

    Arguments:
        pairs: `(*stack, in, rank)` and `(*stack, rank, out)`, of any ranks.
        scales: the multiplier of each.

    Returns:
        the pair with the sum of the ranks, and its positive scale s: the absolute value of the first one.
    """
    unit = next((abs(scale) for scale in scales if scale), 1.0)
    ups = [b if s == unit else b * np.asarray(s / unit, b.dtype) for (_, b), s in zip(pairs, scales, strict=True)]
    return (np.concatenate([a for a, _ in pairs], -1), np.concatenate(ups, -2)), unit


def _rank_of_all(layer: Callable[[Index], Layer], indices: Sequence[Index], cut: Cut) -> int:
    """The rank for all layers, from their singular values alone."""
    cores = (_core(layer(index))[1] for index in indices)
    values = np.sqrt(np.stack([_squared_values(core)[0] for core in cores]))
    rank = cut.rank_for(values)
    if _is_coarse(values, rank):
        return rank
    cores = (_core(layer(index))[1] for index in indices)
    return cut.rank_for(np.stack([np.linalg.svd(core, compute_uv=False) for core in cores]))


def _leading(
    layer: Layer, rank_of: Callable[[np.ndarray], int], dtype: DTypeLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A and B of one layer, with all of its singular values between them."""
    left, core, right = _core(layer)
    a, s, b = _leading_of_matrix(core, rank_of)
    a, b = a if left is None else left @ a, b if right is None else b @ right
    return a.astype(dtype), s, b.astype(dtype)


def _leading_of_matrix(
    matrix: np.ndarray, rank_of: Callable[[np.ndarray], int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if matrix.shape[0] > matrix.shape[1]:
        b, s, a = _leading_of_matrix(matrix.T, rank_of)
        return a.T, s, b.T
    squared, u = _squared_values(matrix)
    s = np.sqrt(squared)
    rank = rank_of(s[None])
    if _is_coarse(s[None], rank):
        root = np.sqrt(s[:rank])
        return u[:, :rank] * root, s, u[:, :rank].T @ matrix / root[:, None]
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(s[: rank_of(s[None])])
    return u[:, : len(root)] * root, s, root[:, None] * vt[: len(root)]


def _squared_values(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The squared singular values in descending order, and the vectors of the shorter side.

    From the eigenvalues of a Gram matrix, which takes a fifth of the time of an SVD. Each is exact to 1e-15 of the sum.
    """
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    squared, vectors = np.linalg.eigh(matrix @ matrix.T)
    return np.maximum(squared[::-1], 0), vectors[:, ::-1]


def _is_coarse(values: np.ndarray, rank: int) -> bool:
    """Whether what a rank leaves out is so much that squared singular values give its norm to many digits."""
    return bool(relative_errors(values)[rank - 1] > 1e-5)


def _core(layer: Layer) -> tuple[np.ndarray | None, np.ndarray, np.ndarray | None]:
    """Q, R and P with the layer's matrix Q R P, orthonormal columns of Q and rows of P; both are None if R is it."""
    if not isinstance(layer, tuple):
        _check_finite(layer)
        return None, layer, None
    a, b = layer
    _check_finite(a)
    _check_finite(b)
    (left, down), (right, up) = np.linalg.qr(a), np.linalg.qr(b.T)
    return left, down @ up.T, right.T


def _check_finite(matrix: np.ndarray) -> None:
    if not np.isfinite(matrix).all():
        raise ValueError("it has entries that are infinite or not a number")


def is_thin(rank: int, n_in: int, n_out: int) -> bool:
    """Whether two matrices of this rank have fewer numbers than their product."""
    return rank * (n_in + n_out) < n_in * n_out
