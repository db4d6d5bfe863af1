"""ConvLoRA: the original library's update of a convolution, a matrix product read as a kernel."""

import dataclasses
import math
from collections.abc import Mapping
from typing import final

import jax
import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import nonzero, positive_integer, scale_of
from jlora.methods._common.initializers import kaiming, zeros
from jlora.methods._common.matrices import nearest
from jlora.methods._common.networks import add_network


@final
@dataclasses.dataclass(frozen=True)
class ConvLoRA(Method):
    """Adds a reshaped matrix product to a convolution's kernel, as loralib, the library of LoRA's authors, does.

        W + s reshape(B^T A^T, (out, in / groups, *window)),    A: (*stack, in k, rank k),    B: (*stack, rank k, out q)

    with s = alpha / rank, k the window's last size, q the product of its others over `groups`. For a square window this
    is the library's own; in one and in three dimensions, for which its reshape fails, the shapes are chosen to fit.
    Without groups the product is a LoRA of rank (rank k q), whose A has a block for each of the q rows that one out
    channel takes, and it stays factored as long as that is cheaper. `LoRA` is the better choice for a new adapter. B
    starts at zero.

    Arguments:
        rank: the rank for one size of the window.
        alpha: the numerator of the scale; None makes the scale 1.
        groups: the convolution's `feature_group_count`.

    Raises:
        ValueError: from `jlora.init`, if the weight has no window, or if the groups do not divide its rows.

    Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
    """

    rank: int = positive_integer(8)
    alpha: float | None = nonzero(None)
    groups: int = positive_integer(1)

    factors = {"a": "*stack in_rows rank_columns", "b": "*stack rank_columns out_rows"}
    initializers = {"a": kaiming, "b": zeros}

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank)

    def unsupported_reason(self, site: Site) -> str:
        window = site.sizes("window") if not site.unsupported_reason else ()
        if site.unsupported_reason or not window:
            return site.unsupported_reason or "it is not the kernel of a convolution; LoRA adapts it"
        rows = math.prod((*site.sizes("out"), *window[:-1]))
        if rows % self.groups == 0:
            return ""
        would = nearest(self.groups, rows, lambda n: rows % n == 0)
        return f"groups {self.groups} do not divide its {rows} rows; {would} would do"

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        *others, last = axes.sizes("*window")
        return {
            "in_rows": self.groups * axes.count("*channels") * last,
            "rank_columns": self.rank * last,
            "out_rows": axes.count("*out") * math.prod(others) // self.groups,
        }

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        a, b, axes, scale = update["a"], update["b"], update.axes, self.scale * update.scale
        *others, _ = axes.sizes("*window")
        count, rank = math.prod(others), a.shape[-1]
        n_in, n_out = axes.count("*in"), axes.count("*out")
        stack, out, channels, window = (axes.sizes(group) for group in ("*stack", "*out", "*channels", "*window"))
        if self.groups > 1 or rank * count * (n_in + n_out) >= n_in * n_out:
            product = jnp.matmul(b.mT, a.mT, precision=jax.lax.Precision.HIGHEST)
            kernel = product.reshape(*stack, *out, *channels, *window)
            return add_network(w, update, [(kernel, "*stack *out *channels *window")], scale)
        blocks = jnp.eye(count, dtype=a.dtype)[:, None, :, None] * a[..., None, :, None, :]
        ups = jnp.moveaxis(b.reshape(*b.shape[:-1], n_out, count), -1, -3)
        blocks = blocks.reshape(*stack, *channels, *window, count, rank)
        terms = [(blocks, "*stack *channels *window row rank_columns"), (ups, "*stack row rank_columns *out")]
        return add_network(w, update, terms, scale)
