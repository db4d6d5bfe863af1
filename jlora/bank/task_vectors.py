"""How the changes of several adapters become one: pruned each for itself, and then summed or elected."""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import numpy as np

Prune = Callable[[np.ndarray, float, jax.Array | None], np.ndarray]  # of a change, a density and a PRNG key
Changes = Callable[[], Iterable[np.ndarray]]  # yields the weighted changes, again at each call


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the changes of one weight become one.

    Arguments:
        join: the result from the weighted changes.
        prune: what is done to each change before; None leaves it as it is.
        is_random: whether pruning needs a PRNG key.
    """

    join: Callable[[Changes], np.ndarray]
    prune: Prune | None = None
    is_random: bool = False


def keep_largest(change: np.ndarray, density: float, key: jax.Array | None = None) -> np.ndarray:
    """Keeps the share `density` of the entries with the largest magnitudes, at least one, and sets the rest to zero.

    Arguments:
        change: of any shape.
        density: the share, in (0, 1]; the number of entries is rounded down.
        key: not used.
    """
    count = max(int(density * change.size + 1e-9), 1)
    if count >= change.size:
        return change
    kept = np.argpartition(np.abs(change), change.size - count, axis=None)[change.size - count :]
    out = np.zeros_like(change)
    out.flat[kept] = change.flat[kept]
    return out


def drop_at_random(change: np.ndarray, density: float, key: jax.Array | None) -> np.ndarray:
    """Keeps each entry with the probability `density`, divided by it, so that the expected value does not change.

    Arguments:
        change: of any shape.
        density: the probability, in (0, 1].
        key: a PRNG key.
    """
    assert key is not None
    return np.where(jax.random.bernoulli(key, density, change.shape), change / density, 0)


def add(changes: Changes) -> np.ndarray:
    """The sum of the changes.

    Arguments:
        changes: yields the changes.
    """
    total, *rest = changes()
    for change in rest:
        total = total + change
    return total


def mean_of_elected_sign(changes: Changes) -> np.ndarray:
    """Of each entry the mean of the changes that have the sign of their sum; zero if the sum is zero.

        gamma = sign(sum_k d_k),    mean of { d_k : sign(d_k) = gamma }

    Arguments:
        changes: yields the changes; it is called twice, so that three arrays are in memory, and not all changes.
    """
    elected = np.sign(add(changes))
    total, count = np.zeros_like(elected), np.zeros(elected.shape, np.int32)
    for change in changes():
        agrees = (np.sign(change) == elected) & (elected != 0)
        total += np.where(agrees, change, 0)
        count += agrees
    return total / np.maximum(count, 1)


RULES = {
    "concat": Rule(add),
    "svd": Rule(add),
    "ties": Rule(mean_of_elected_sign, keep_largest),
    "dare": Rule(add, drop_at_random, is_random=True),
    "dare_ties": Rule(mean_of_elected_sign, drop_at_random, is_random=True),
    "magnitude": Rule(add, keep_largest),
}
