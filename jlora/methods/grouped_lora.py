"""GroupedLoRA: separate low-rank updates for equal parts of an out axis, such as a fused query, key and value."""

import dataclasses
from collections.abc import Mapping
from typing import Any, final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jlora._interpreter.context import Role
from jlora._interpreter.site import Site
from jlora._ir.algebra import split_index
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import fraction, integer, nonzero, positive_integer, scale_of, switch
from jlora.methods._common.initializers import Initializer, stacked
from jlora.methods._common.matrices import in_out, nearest
from jlora.methods._common.networks import Term, add_network, group_labels
from jlora.methods.lora import pair_initializers


@final
@dataclasses.dataclass(frozen=True)
class GroupedLoRA(Method):
    """Adds a product of two thin matrices to each of several equal parts of an out axis (query, key and value).

        W[..., g, :] + s A_g B_g,    A: (*stack, *in, enabled, rank),    B: (*stack, enabled, rank, out / groups)

    with s = alpha / rank, for every enabled group g: the MergedLinear of the original library. Each group has a pair of
    its own, unlike a `LoRA` of the fused kernel, whose groups share A.

    Arguments:
        rank: the rank for each group.
        alpha, rank_stabilized, dropout, a_init, b_init, freeze_a: as for `LoRA`.
        groups: how many equal parts the axis has.
        enable: which of the groups are adapted; None means all.
        group_axis: the weight's axis that the groups divide. The default is its only out axis, or the only one whose
            size is the number of groups.

    Raises:
        ValueError: if a hyper-parameter is not valid, and from `jlora.init`, if it does not fit the weight.

    Example:
        jlora.GroupedLoRA(rank=8, groups=3, enable=(True, False, True))  # query and value of a fused kernel

    Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
    """

    rank: int = positive_integer(8)
    alpha: float | None = nonzero(None)
    rank_stabilized: bool = switch(False)
    dropout: float = fraction(0.0)
    a_init: Initializer | None = None
    b_init: Initializer | None = None
    freeze_a: bool = switch(False)
    groups: int = positive_integer(3)
    enable: tuple[bool, ...] | None = None
    group_axis: int | None = integer(None)

    factors = {"a": "*stack *in enabled rank", "b": "*stack enabled rank group_out"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.enable is not None:
            object.__setattr__(self, "enable", tuple(bool(e) for e in self.enable))
            if len(self.enable) != self.groups or not any(self.enable):
                raise ValueError(
                    f"GroupedLoRA's enable specifies for each of the {self.groups} groups whether it is adapted, and "
                    f"at least one is, not {self.enable!r}."
                )

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rank_stabilized)

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("a",) if self.freeze_a else ()

    @property
    def enabled(self) -> tuple[int, ...]:
        """The numbers of the groups that are adapted."""
        return tuple(g for g in range(self.groups) if self.enable is None or self.enable[g])

    def unsupported_reason(self, site: Site) -> str:
        if site.unsupported_reason:
            return site.unsupported_reason
        n_in, n_out = in_out(site)
        axis = self.axis(site.shape, site.roles)
        if axis is None:
            return f"no single out axis among {site.roles} can be the one of {self.groups} groups; give group_axis"
        if site.roles[axis] != "out" or site.shape[axis] % self.groups:
            size = site.shape[axis]
            would = nearest(self.groups, size, lambda n: site.roles[axis] == "out" and size % n == 0)
            return (
                f"{self.groups} groups do not divide axis {axis}, {site.roles[axis]!r} of size {size}; {would} would do"
            )
        if self.rank > min(n_in, n_out // self.groups):
            return (
                f"rank {self.rank} is above the smaller of its in size {n_in} and out size {n_out // self.groups} of "
                f"each of {self.groups} groups; lower the rank"
            )
        return ""

    def axis(self, shape: tuple[int, ...], roles: tuple[Role, ...]) -> int | None:
        """The weight's axis that the groups divide; None if it is ambiguous."""
        if self.group_axis is not None:
            return self.group_axis % len(shape)
        outs = [axis for axis, role in enumerate(roles) if role == "out"]
        exact = [axis for axis in outs if shape[axis] == self.groups]
        return outs[0] if len(outs) == 1 else exact[0] if len(exact) == 1 else None

    def without_init_fields(self) -> "GroupedLoRA":
        return dataclasses.replace(self, a_init=None, b_init=None)

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        return {"enabled": len(self.enabled), "group_out": axes.count("*out") // self.groups}

    def init(self, key: jax.Array, site: Site, dtype: DTypeLike, base: jax.Array | None) -> dict[str, jax.Array]:
        pair = pair_initializers(self.a_init, self.b_init, self.freeze_a, site)
        n_in, n_out = in_out(site)
        stack, a_key, b_key = site.sizes("stack"), *jax.random.split(key)
        a = stacked(pair["a"], a_key, (*stack, len(self.enabled)), (n_in, self.rank), dtype)
        b = stacked(pair["b"], b_key, (*stack, len(self.enabled)), (self.rank, n_out // self.groups), dtype)
        return {"a": jnp.moveaxis(a, len(stack), -2), "b": b}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        axis = self.axis(update.shape, update.roles)
        assert axis is not None
        group = w.axes[axis][0]
        if w.size(group) != self.groups:
            w = split_index(w, group, (self.groups, w.size(group) // self.groups))
        labels: dict[str, Any] = group_labels(w, update)
        labels |= {"group": group, "group_out": labels["*out"].replace(group, "")}
        # B as one matrix with a block for each pair, zero elsewhere: a product with a batch axis copies activations.
        b = update["b"]
        places = jnp.eye(self.groups, dtype=b.dtype)[jnp.array(self.enabled)]  # (enabled, groups)
        blocks = jnp.einsum("...ero,eg->...ergo", b, places, precision="highest")
        terms: list[Term] = [(update["a"], update.declared["a"]), (blocks, "*stack enabled rank group group_out")]
        return add_network(w, update, terms, self.scale * update.scale, labels)
