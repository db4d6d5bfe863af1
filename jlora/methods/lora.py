"""LoRA: the low-rank update itself."""

import dataclasses
import math
import re
from typing import Any, final

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float

from jlora._interpreter.site import Site
from jlora._ir.algebra import split_index
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import axes as _axes
from jlora.methods._common import choices as _check
from jlora.methods._common import initializers as _start


@final
@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """Adds a product of two thin matrices to a weight.

        W + s A B,    A: (*stack, *in, rank),    B: (*stack, rank, *out),    s = alpha / rank

    Axes of the weight that the program contracts belong to A, those that it hands on to B; a stacked weight
    (layers of a scan, experts) has one pair a layer. At the start the program is the base: one of A and B is zero, or
    the start is subtracted.

    Arguments:
        rank: the rank of the update, from 1 to the smaller of the weight's joint in and out sizes.
        alpha: the numerator of the scale; None makes the scale 1.
        rank_stabilized: divides alpha by sqrt(rank) instead of rank (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: the share of the branch's input that is dropped in training, in [0, 1); see `jlora.with_dropout`.
            Rows that an embedding looks up are never dropped.
        a_init: initialiser of A, called with the shape `(in, rank)` for each layer of a stack. The default is
            Kaiming-uniform with a = sqrt(5), that is uniform in +-1/sqrt(in); zeros for an embedding.
        b_init: initialiser of B, called with `(rank, out)`. The default is zeros; standard normal for an embedding.
        start: in place of initialisers "gaussian", "orthogonal", or one that takes both matrices from the weight, with
            the start subtracted and the base untouched: "pissa", "pissa_niter_4" (or another number of subspace
            iterations), "milora", "olora". Those need `jlora.init(..., params=params)`.
        freeze_a: trains B alone (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303).
        groups: how many equal parts of an out axis (query, key and value of a fused kernel) have matrices of their own.
        enable: which of the groups are adapted; None means all.
        group_axis: the weight's axis that the groups divide. The default is its only out axis, or the only one whose
            size is the number of groups.

    Raises:
        ValueError: where a hyper-parameter makes no sense, and from `jlora.init`, where it does not fit the weight.

    Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
    """

    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = False
    dropout: float = 0.0
    a_init: Initializer | None = None
    b_init: Initializer | None = None
    start: str | None = None
    freeze_a: bool = False
    groups: int = 1
    enable: tuple[bool, ...] | None = None
    group_axis: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.enable is not None:
            object.__setattr__(self, "enable", tuple(bool(e) for e in self.enable))
            if len(self.enable) != self.groups or not any(self.enable):
                raise ValueError(
                    f"LoRA's enable says of each of the {self.groups} groups whether it is adapted, and at least one "
                    f"is: not {self.enable!r}."
                )
        if self.start is not None:
            if not re.fullmatch(_start.STARTS, self.start):
                raise ValueError(f"LoRA's start is one of {_start.STARTS.replace('|', ', ')}, not {self.start!r}.")
            if self.a_init or self.b_init or self.groups > 1:
                raise ValueError("LoRA takes a start, or initialisers, or groups: one of them.")

    @property
    def scale(self) -> float:
        return _check.scale(self.alpha, self.rank, self.rank_stabilized)

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("a",) if self.freeze_a else ()

    @property
    def init_needs_weight(self) -> bool:
        return bool(re.fullmatch(_start.FROM_BASE, self.start or ""))

    def unsupported_reason(self, site: Site) -> str:
        if site.unsupported_reason:
            return site.unsupported_reason
        n_in, n_out = _axes.counts(site)
        if self.groups > 1:
            axis = self._axis(site.shape, site.roles)
            if axis is None:
                return f"no single out axis among {site.roles} can be the one of {self.groups} groups; give group_axis"
            if site.roles[axis] != "out" or site.shape[axis] % self.groups:
                return (
                    f"{self.groups} groups do not divide axis {axis}, {site.roles[axis]!r} of size {site.shape[axis]}"
                )
        if self.rank > min(n_in, n_out // self.groups):
            each = f" of each of {self.groups} groups" if self.groups > 1 else ""
            return (
                f"rank {self.rank} is above the smaller of its in size {n_in} and out size {n_out // self.groups}"
                f"{each}; lower the rank"
            )
        return ""

    def _axis(self, shape: tuple[int, ...], roles: tuple[str, ...]) -> int | None:
        if self.group_axis is not None:
            return self.group_axis % len(shape)
        outs = [k for k, role in enumerate(roles) if role == "out"]
        exact = [k for k in outs if shape[k] == self.groups]
        return outs[0] if len(outs) == 1 else exact[0] if len(exact) == 1 else None

    def _enabled(self) -> tuple[int, ...]:
        return tuple(k for k in range(self.groups) if self.enable is None or self.enable[k])

    def without_init_fields(self) -> "LoRA":
        offset = self.offset or self.init_needs_weight
        return dataclasses.replace(self, a_init=None, b_init=None, start=None, offset=offset)

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        stack, inner, outer = (site.sizes(role) for role in ("stack", "in", "out"))
        n_in, n_out = _axes.counts(site)
        if self.start:
            weight = None if base is None else _axes.as_matrix(base, site.roles)
            a, b = _start.pair(self.start, key, weight, (*stack, n_in, n_out), self.rank)
            if self.init_needs_weight and self.scale != 1:
                a, b = (f / math.sqrt(self.scale) for f in (a, b))
            a, b = a.astype(dtype), b.astype(dtype)
        else:
            count = len(self._enabled())
            many = (*stack, count) if self.groups > 1 else stack
            a, b = self._matrices(key, many, n_in, n_out // self.groups, site.is_lookup, dtype)
            if self.groups > 1:  # the letters' order is stack, in, group, rank and stack, group, rank, out
                a = jnp.moveaxis(a, len(stack), -2)
                return {"a": a.reshape(*stack, *inner, count, self.rank), "b": b}
        return {"a": a.reshape(*stack, *inner, self.rank), "b": b.reshape(*stack, self.rank, *outer)}

    def _matrices(
        self, key: jax.Array, stack: tuple[int, ...], n_in: int, n_out: int, lookup: bool, dtype: Any
    ) -> tuple[Float[Array, "*stack {n_in} {self.rank}"], Float[Array, "*stack {self.rank} {n_out}"]]:
        zeros, normal = _start.zeros, _start.normal(1.0)
        a_key, b_key = jax.random.split(key)
        down = normal if lookup and self.freeze_a else zeros if lookup else _start.kaiming
        up = normal if lookup and not self.freeze_a else zeros
        a = _start.stacked(self.a_init or down, a_key, stack, (n_in, self.rank), dtype)
        b = _start.stacked(self.b_init or up, b_key, stack, (self.rank, n_out), dtype)
        return a, b

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        pairs: list[_axes.Pair] = []
        group = kept = ""
        if self.groups > 1:
            w, group, kept = self._grouped(update, w)
            enabled = self._enabled()
            if len(enabled) == self.groups:
                kept = group
            else:
                chosen = jnp.zeros((len(enabled), self.groups)).at[jnp.arange(len(enabled)), jnp.array(enabled)].set(1)
                pairs = [(chosen, kept + group)]
        stack, inner, outer = _axes.letters(w, update.roles)
        rank = next(c for c in _axes.ranks(w, 2) if c != kept)
        outer = outer.replace(group, "") if group else outer
        pairs = [(update["a"], stack + inner + kept + rank), (update["b"], stack + kept + rank + outer), *pairs]
        if "kept" in update.frozen:
            pairs.append((update["kept"], rank))
        sizes = {rank: self.rank, kept: len(self._enabled())} if kept else {rank: self.rank}
        return _axes.add(w, pairs, sizes, self.scale * update.scale, **_axes.dropout(update, stack))

    def _grouped(self, update: Update, w: AdaptedWeight) -> tuple[AdaptedWeight, str, str]:
        """The weight with a letter for the groups, and a letter for those that are adapted."""
        axis = self._axis(update.shape, update.roles)
        assert axis is not None
        group = w.axes[axis][0]
        size = w.index(group).size
        if size != self.groups:
            w = split_index(w, group, (self.groups, size // self.groups))
        return w, group, _axes.ranks(w)
