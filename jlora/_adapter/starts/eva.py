"""EVA: A from the principal components of the inputs, and ranks by the variance that they explain."""

import numpy as np

from jlora._adapter.starts.inputs import Inputs, layer, layers_of
from jlora._adapter.starts.pairs import check, with_pair
from jlora.methods._base import Adapter, Update
from jlora.methods._lowering import as_single

_NOISE = 1e-6  # of sums in float32


def eva(adapter: Adapter, inputs: dict[str, Inputs], *, rho: float = 2.0) -> Adapter:
    """Initialises LoRA or DoRA with the principal components of the inputs, and gives ranks to where they explain most.

        A = [e_1 ... e_r],    B = 0,    e_k the eigenvectors of the covariance of the inputs, by eigenvalue

    The sum of the ranks stays as it is. They are given to the components of all weights with the largest share of the
    variance of their own inputs, at most `rho` times the rank to a weight. The scale of every update stays as it is:
    alpha changes with the rank. A weight that gets no rank has no update any more. The layers of a stack have ranks of
    their own, and the stack the largest of them: the other columns of A are zero, as those of B, and stay so.

    An embedding gets the unit vectors of the ids that occur most often, each with the share of its occurrences.

    Arguments:
        adapter: from `jlora.init`, of LoRA or DoRA; its factors are replaced.
        inputs: from `jlora.calibrate`, at least for the paths of the adapter.
        rho: the largest rank of a weight in units of the present one, at least 1; with 1 no rank changes.

    Returns:
        the adapter. The decompositions are computed in float64 on the host, one layer at a time.

    Raises:
        TypeError: if `adapter` is not an adapter.
        ValueError: if `rho` is below 1, a method is another one, or the inputs of a weight are missing or not finite.

    Example:
        adapter = jlora.init(key, sites, {".*/kernel": jlora.LoRA(rank=8)})
        inputs = jax.jit(jlora.calibrate(model.apply, adapter))(params, batch)
        adapter = jlora.eva(adapter, inputs)

    Paischer et al. 2024, Parameter Efficient Fine-tuning via Explained Variance Adaptation, arXiv:2410.07170.
    """
    if not rho >= 1:
        raise ValueError(f"EVA's rho is a number from 1 on, not {rho}.")
    updates = as_single(adapter)
    components = {path: _components(path, update, inputs, rho) for path, update in updates.items()}
    budget = sum(update.method.rank * len(components[path]) for path, update in updates.items())  # pyright: ignore[reportAttributeAccessIssue]
    shares = [(path, k, share) for path, parts in components.items() for k, (_, s) in enumerate(parts) for share in s]
    order = np.argsort([-share for *_, share in shares], kind="stable")
    ranks = {path: np.zeros(len(parts), int) for path, parts in components.items()}
    for position in order[:budget]:
        path, k, _ = shares[position]
        ranks[path][k] += 1
    return {
        path: _with_columns(update, [vectors for vectors, _ in components[path]], ranks[path])
        for path, update in updates.items()
        if ranks[path].any()
    }


def _components(
    path: str, update: Update, inputs: dict[str, Inputs], rho: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The principal components of each layer, `(in, k)`, and the shares of the variance that they explain."""
    method = check(path, update, "EVA", is_zero=True)
    axes = update.axes
    count = min(round(method.rank * rho), axes.count("*in"), axes.count("*out"))
    sums = layers_of(path, update, inputs)
    return [_principal(layer(sums, index, path), count) for index in np.ndindex(*axes.sizes("*stack"))]


def _principal(x: Inputs, count: int) -> tuple[np.ndarray, np.ndarray]:
    if x.second is None:
        often = np.argsort(-x.total, kind="stable")[:count]
        vectors = np.zeros((len(x.total), count))
        vectors[often, np.arange(count)] = 1
        return vectors, x.total[often] / x.total.sum()
    covariance = x.second - np.outer(x.total, x.total) / x.rows
    values, vectors = np.linalg.eigh(covariance)
    noise = _NOISE * np.trace(x.second)  # of inputs that are all equal the covariance is rounding errors alone
    shares = np.where(values > noise, values, 0) / max(np.trace(covariance), noise, np.finfo(float).tiny)
    return vectors[:, ::-1][:, :count], shares[::-1][:count]


def _with_columns(update: Update, vectors: list[np.ndarray], ranks: np.ndarray) -> Update:
    """The update with the first columns of each layer; the other ones are zero."""
    largest = int(ranks.max())
    columns = [v[:, :largest] * (np.arange(largest) < rank) for v, rank in zip(vectors, ranks, strict=True)]
    stack = update.axes.sizes("*stack")
    a = np.stack(columns).reshape(*stack, -1, largest)
    return with_pair(update, a, np.zeros((*stack, largest, update.axes.count("*out"))), is_zero=True)
