"""Arithmetic of adapters: one adapter from several, by what each adds to the weights."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._adapter.change import Change, change_of, is_matrix, wide_dtype
from jlora._adapter.svd import Cut, Index, Layer, Pair, concatenated
from jlora._adapter.to_lora import decompose, lora_update
from jlora._tree.paths import named_leaves, path_number
from jlora.bank.bank import Bank
from jlora.bank.members import Member, check_same_weight, weighted_members
from jlora.bank.task_vectors import RULES, Rule
from jlora.methods._base import Adapter, Update
from jlora.methods.full import Full


def combine(
    adapters: Sequence[Adapter] | Mapping[str, Adapter] | Bank,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    *,
    how: str = "concat",
    params: Any = None,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    key: jax.Array | None = None,
) -> tuple[Adapter, dict[str, float]]:
    """Combines adapters of one base into one adapter.

        d_k = w_k (merge(W, adapter_k) - W)          the weighted change of a weight by each adapter

        "concat":     sum_k d_k, exactly: a LoRA with the ranks of all
        "svd":        sum_k d_k, the nearest LoRA of the rank or the energy
        "ties":       the share `density` of each d_k with the largest magnitudes is kept; of each entry the sign of
                      the sum is elected, and the d_k of that sign are averaged (Yadav et al. 2023, arXiv:2306.01708)
        "dare":       each entry of d_k is kept with the probability `density` and divided by it; then the sum
                      (Yu et al. 2023, arXiv:2311.03099)
        "dare_ties":  drops as "dare", elects and averages as "ties"
        "magnitude":  prunes as "ties", then the sum

    All rules act on the changes of the weights, the task vectors of the papers, and never on the factors A and B. So
    "ties", "dare" and "magnitude" are PEFT's `ties_svd`, `dare_linear_svd` and `magnitude_prune_svd`, and not its
    `ties`, `dare_linear` and `magnitude_prune`, which act on A and on B. Signs are elected from the weighted changes.
    Every layer of a stack is pruned by itself, one after the other, and the result is decomposed by an SVD.

    A weight that an adapter does not update counts as a change of zero. Weights that are not matrices (biases) are
    combined by the same rule into `Full`, exactly; so is, with "concat", a matrix that a member updates by `Full`.

    Arguments:
        adapters: adapters of the same base: a list, a dict by name, or a bank.
        weights: a number for each, 1 by default: a list, or a dict by the same names. A negative one subtracts what
            the adapter has learned (task negation).
        how: the rule.
        params: the base parameters, quantised or not, for methods whose change depends on them.
        rank: the rank of the result; not with "concat".
        energy: the share of the squared Frobenius norm of the result to keep in every layer, in (0, 1]: the lowest rank
            that does, at most `rank`. Without `rank` and `energy`, "svd" takes the lowest rank with a relative error of
            at most 1e-6; the other rules need one of the two, because what they result in has full rank.
        density: the share of the entries that pruning keeps, in (0, 1]; of "ties", "dare", "dare_ties" and "magnitude".
        key: a PRNG key, of "dare" and "dare_ties". What is dropped depends on the key, the path, and the adapter's name
            (its number in a list) alone.

    Returns:
        the adapter, of LoRA and `Full` in float32, or in a wider dtype of the members, and for every path the relative
        error of the decomposition in the Frobenius norm, of a stack that of its worst layer. It is 0 with "concat",
        unless an update had to be converted to a LoRA by an SVD: then it is the error of that.

    Raises:
        TypeError: if `adapters` is not a list or a dict of adapters, or a bank.
        ValueError: if the adapters are for different weights, a number is out of range, an argument is missing or has
            no effect, or, with "concat", an update has no exactly equal LoRA; with the path and the adapter.

    Example:
        both, _ = jlora.combine([films, tweets], [0.7, 0.3])
        small, errors = jlora.combine({"films": films, "tweets": tweets}, how="ties", density=0.2, rank=16)
    """
    rule = _checked_rule(how, rank, energy, density, key)
    members = weighted_members(adapters, weights)
    leaves = dict(named_leaves(params))
    out, errors = {}, {}
    for path in dict.fromkeys(path for member in members for path in member.adapter):
        parts = [member for member in members if path in member.adapter]
        check_same_weight(path, parts)
        path_key = None if key is None else jax.random.fold_in(key, path_number(path))
        sum_ = _Sum(path, parts, leaves.get(path), rule, density, path_key)
        out[path], errors[path] = sum_.concatenated() if how == "concat" else sum_.decomposed(how, Cut(rank, energy))
    return out, errors


def _checked_rule(how: str, rank: int | None, energy: float | None, density: float | None, key: Any) -> Rule:
    if how not in RULES:
        raise ValueError(f"`how` is one of {', '.join(map(repr, RULES))}, not {how!r}.")
    rule = RULES[how]
    is_cut = rank is not None or energy is not None
    if how == "concat" and is_cut:
        raise ValueError("'concat' is exact and takes no rank and no energy. Pass how='svd' to truncate the sum.")
    if rule.prune and not is_cut:
        raise ValueError(f"What {how!r} results in has full rank: pass a rank or an energy, and look at the errors.")
    for name, value, is_needed in (("density", density, bool(rule.prune)), ("key", key, rule.is_random)):
        if (value is not None) != is_needed:
            does = "needs" if is_needed else "has no use for"
            raise ValueError(f"how={how!r} {does} `{name}`: {'pass it' if is_needed else 'leave it out'}.")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"The density is the share of the entries to keep, in (0, 1], not {density!r}.")
    return rule


class _Sum:
    """The changes of one weight by several adapters, and the one update that they become."""

    def __init__(
        self, path: str, members: Sequence[Member], leaf: Any, rule: Rule, density: float | None, key: Any
    ) -> None:
        self.path, self.members, self.rule, self.density, self.key = path, members, rule, density, key
        self.like = members[0].adapter[path]
        self.dtype = wide_dtype(*(member.adapter[path] for member in members))
        self.changes = [change_of(path, _or_nothing(m.adapter[path], m.weight), leaf) for m in members]

    def concatenated(self) -> tuple[Update, float]:
        """The exact sum, and the largest error of the conversions to LoRA."""
        if not is_matrix(self.like) or any(isinstance(m.adapter[self.path].method, Full) for m in self.members):
            return self._full(), 0.0
        exact = [_exact_pair(self.path, m.name, c) for m, c in zip(self.members, self.changes, strict=True)]
        pair, scale = self._concatenate([pair for pair, _ in exact])
        return lora_update(pair, scale, self.like, self._dropout()), max(error for _, error in exact)

    def decomposed(self, how: str, cut: Cut) -> tuple[Update, float]:
        """The nearest LoRA to what the rule results in, and its error."""
        if not is_matrix(self.like):
            return self._full(), 0.0
        pairs = [change.pair for change in self.changes if change.pair]
        if self.rule.prune or len(pairs) < len(self.changes):
            layer = self.layer
        else:  # no matrix of the weight's size is needed
            pair, scale = self._concatenate(pairs)
            if not pair[0].shape[-1]:
                return lora_update(pair, scale, self.like, self._dropout()), 0.0
            layer = functools.partial(_thin_layer, pair, scale)
        pair, error = decompose(self.path, self.like, layer, cut, self.dtype, f"the combination by {how!r}")
        return lora_update(pair, 1.0, self.like, self._dropout()), error

    def layer(self, index: Index) -> np.ndarray:
        """What the rule results in for one layer, as a matrix in float64."""
        number = int(np.ravel_multi_index(index, self.changes[0].stack)) if index else 0
        return self.rule.join(lambda: self._pruned(lambda change: change.matrix(index), number))

    def _full(self) -> Update:
        value = self.rule.join(lambda: self._pruned(Change.array, 0))
        return Update({"d": jnp.asarray(value, self.dtype)}, Full(), self.like.roles, self.like.shape)

    def _pruned(self, value_of: Callable[[Change], np.ndarray], number: int) -> Iterator[np.ndarray]:
        """The weighted changes by all members, pruned."""
        for member, change in zip(self.members, self.changes, strict=True):
            value = member.weight * value_of(change)
            if self.rule.prune and self.density is not None:
                value = self.rule.prune(value, self.density, self._key(member, number))
            yield value

    def _key(self, member: Member, number: int) -> Any:
        return None if self.key is None else jax.random.fold_in(jax.random.fold_in(self.key, member.number), number)

    def _concatenate(self, pairs: Sequence[tuple[Pair, float]]) -> tuple[Pair, float]:
        scales = [m.weight * scale for m, (_, scale) in zip(self.members, pairs, strict=True)]
        return concatenated([pair for pair, _ in pairs], scales)

    def _dropout(self) -> float:
        """The dropout rate of the members if they agree."""
        rates = {member.adapter[self.path].method.dropout for member in self.members}
        return rates.pop() if len(rates) == 1 else 0.0


def _or_nothing(update: Update, weight: float) -> Update:
    """The update, or one that adds nothing if its weight is zero."""
    return update if weight else dataclasses.replace(update, scale=0.0)


def _thin_layer(pair: Pair, scale: float, index: Index) -> Layer:
    a, b = pair
    return scale * a[index].astype(np.float64), b[index].astype(np.float64)


def _exact_pair(path: str, name: str, change: Change) -> tuple[tuple[Pair, float], float]:
    """A change as two thin matrices with their scale, and the relative error of the conversion."""
    if change.pair:
        return change.pair, 0.0
    subject = f"the update of {type(change.update.method).__name__} in adapter {name}"
    advice = "Combine with how='svd' and a rank or an energy, which returns the error, or merge the adapter."
    pair, error = decompose(path, change.update, change.layer, Cut(), wide_dtype(change.update), subject, advice)
    return (pair, 1.0), error
